"""Which field of a record is the image and which its class: columns of a table, fields of a JSON object.

A name that is given must be there. Without one the usual names are looked for, in the order of `PATH_NAMES` and
`LABEL_NAMES`, whatever their case, blanks, dashes and underscores: "File Name" is ``filename``. Where several are
there the first in that order counts, and a note says so.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from stages.config import nearest
from stages.errors import InputError
from stages.inputs.images.names import listed, trimmed

PATH_NAMES = ("path", "file", "filename", "filepath", "image", "imagepath")
_MOST_NAMES = 12  # that a message shows of those that are there
LABEL_NAMES = ("label", "class", "target", "category", "labels", "cls", "classname")


@dataclass(frozen=True)
class Columns:
    """Names that a set gives; None: the usual ones.

    Attributes:
        path: of the field that has the path of the image, or the image itself.
        label: of the field that has its class.
    """

    path: str | None = None
    label: str | None = None

    def find_path(self, source: str, names: Iterable[str]) -> str | None:
        """The one of `names` that is the image; see `find_label`."""
        return _found(source, "path_column", self.path, list(names), PATH_NAMES)

    def find_label(self, source: str, names: Iterable[str]) -> str | None:
        r"""The one of `names` that is the class, as it stands there, or None where there is none.

        Raises:
            InputError: the given name is not there, or the name that counts stands there twice.

        >>> Columns().find_label("my.csv", ["path", "\ufeff Category "])
        '\ufeff Category '
        """
        return _found(source, "label_column", self.label, list(names), LABEL_NAMES)

    def notes(self, source: str, *, paths: Iterable[str] = (), labels: Iterable[str] = ()) -> tuple[str, ...]:
        """What was chosen among several usual names, a line each.

        Args:
            source: begins each line.
            paths: names that the image was looked for in.
            labels: names that the class was looked for in.
        """
        lines = []
        for key, given, names, usual in (
            ("path_column", self.path, paths, PATH_NAMES),
            ("label_column", self.label, labels, LABEL_NAMES),
        ):
            found = [] if given is not None else _usual(list(names), usual)
            if len(found) > 1:
                others = ", ".join(repr(trimmed(name)) for name in found[1:])
                lines.append(f"{source}: {trimmed(found[0])!r} is taken, not {others}: {key} says otherwise")
        return tuple(lines)


USUAL = Columns()


def _found(source: str, key: str, given: str | None, names: list[str], usual: tuple[str, ...]) -> str | None:
    if given is None:
        found = _usual(names, usual)
    elif not (found := [name for name in names if trimmed(name) == trimmed(given)]):
        known = [trimmed(name) for name in names]
        raise InputError(
            f"{source}: {key} {given!r} is not there{nearest(given, known)} (it has {listed(known, most=_MOST_NAMES)})"
        )
    if found and names.count(found[0]) > 1:
        raise InputError(f"{source}: {trimmed(found[0])!r} stands there twice: give each column a name of its own")
    return found[0] if found else None


def _usual(names: list[str], usual: tuple[str, ...]) -> list[str]:
    """Those of the names that are usual, in the order of preference."""
    plain = {name: re.sub(r"[\s_-]", "", trimmed(name)).casefold() for name in names}
    return [name for wanted in usual for name in plain if plain[name] == wanted]
