"""Names of samples and classes: as they can be stored, as they are compared, and how two that differ are shown.

A class is what people read: Unicode NFC, without blanks and byte order marks around it. Where every class of a set is a
whole number, `7`, `007` and `7.0` are the class `7`; beside other names they stay text.
"""

import difflib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stages.errors import InputError

_WHOLE = re.compile(r"([+-]?\d{1,18})(?:\.0*)?", re.ASCII)
_UNKNOWN = re.compile(r"-1(?:\.0*)?")
_SHOWN = 3  # names a message shows
_SHOWN_LENGTH = 60


class Classes(NamedTuple):
    """Classes of the samples of one set."""

    labels: NDArray[np.int32]  # [n] index into names; -1: unknown
    names: tuple[str, ...]  # sorted: whole numbers by value, other names by UTF-8 bytes
    notes: tuple[str, ...]  # what was taken for one class, a line each


def storable(name: str) -> str:
    """Name that can be stored: what is not UTF-8 (lone surrogates in a str) and zero bytes are escaped."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\0")


def trimmed(name: str) -> str:
    r"""A name without the blanks and byte order marks around it.

    >>> trimmed("\ufeff\xa0cat ")
    'cat'
    """
    while name != (name := name.strip().strip("\ufeff")):
        pass
    return name


def tidy(name: str) -> str:
    r"""A class as it is stored and compared.

    >>> tidy(" cafe\u0301") == "caf\u00e9"
    True
    """
    return unicodedata.normalize("NFC", storable(trimmed(name)))


def given_class(label: str) -> str | None:
    """Class of a label written by hand: empty and -1 stand for unknown."""
    label = trimmed(label)
    return None if not label or _UNKNOWN.fullmatch(label) else label


def class_texts(source: str, values: NDArray[Any]) -> list[str | None]:
    """Classes of a column of labels: names or class numbers from 0; -1, empty, None and NaN stand for unknown.

    Args:
        source: begins the message of an error.
        values: [n] text, bytes in UTF-8, whole numbers of any type, or objects of these kinds and None.

    Raises:
        InputError: a label is something else, naming its row.
    """
    if values.dtype.kind not in "iufUSO":
        raise InputError(f"{source}: label is {values.dtype}, must be whole numbers or text")
    texts: list[str | None] = []
    for row, value in enumerate(values.tolist()):
        if isinstance(value, float) and (value != value or value.is_integer()):
            value = None if value != value else int(value)
        if isinstance(value, bytes):
            try:
                value = value.decode()
            except UnicodeDecodeError as error:
                raise InputError(f"{source}: label of row {row} is not text in UTF-8") from error
        if value is None or isinstance(value, str):
            texts.append(value and given_class(value))
        elif type(value) is not int or value < -1:
            raise InputError(
                f"{source}: label of row {row} is {value!r}, must be a name, a class number from 0, or -1: unknown"
            )
        else:
            texts.append(None if value < 0 else str(value))
    return texts


def beyond_classes(where: str, numbers: NDArray[np.integer], n: int, what: str, whose: str) -> InputError:
    """What to say of class numbers of which one is n or more; that they count from 1, where they seem to.

    Args:
        where: begins the message.
        numbers: ``[rows]`` class of each row, negative where it is unknown.
        n: classes that there are.
        what: they are, "classes" or "columns".
        whose: begins the range of numbers that there are, such as "the classes are".
    """
    low, high = int(numbers[numbers >= 0].min()), int(numbers.max())
    if low and high == n:
        return InputError(f"{where}: labels run from {low} to {high} for {n} {what}: subtract 1, they count from 0")
    row = int(np.argmax(numbers >= n))
    return InputError(f"{where}: label of row {row} is {numbers[row]}, {whose} 0 to {n - 1}")


def number_classes(source: str, names: Sequence[str | None]) -> Classes:
    """Number the classes of a set's samples.

    Args:
        source: begins each note.
        names: of the class of each sample, as its source has it; None: unknown.
    """
    tidied = {name: tidy(name) for name in dict.fromkeys(names) if name is not None}
    if all(_WHOLE.fullmatch(text) for text in tidied.values() if text):
        tidied = {name: str(_number(text)) if text else "" for name, text in tidied.items()}
    order = class_order(set(tidied.values()) - {""})
    index: dict[str | None, int] = {name: place for place, name in enumerate(order)}
    number: dict[str | None, int] = {name: index.get(text, -1) for name, text in tidied.items()}
    spellings = defaultdict(list)
    for name, place in number.items():
        spellings[place].append(str(name))
    several = [
        f"{' and '.join(map(shown, ways[:_SHOWN]))}{' …' if len(ways) > _SHOWN else ''}"
        for place, ways in spellings.items()
        if place >= 0 and len(ways) > 1
    ]
    notes = (f"{source}: taken for one class each: {listed(several)}",) if several else ()
    return Classes(np.array([number.get(name, -1) for name in names], np.int32), order, notes)


def class_order(names: Iterable[str]) -> tuple[str, ...]:
    """Names in order; numbers by value, so that complete labels 0 … C - 1 keep their number."""
    ordered = sorted(set(names))
    if all(_WHOLE.fullmatch(name) for name in ordered):
        ordered.sort(key=_number)
    return tuple(ordered)


def match_classes(names: Sequence[str], known: Sequence[str]) -> list[int]:
    """Place in `known` of each of some classes; -1 where it is not there.

    A number that `known` spells in another way is that class, unless two of them are this number.

    >>> match_classes(["7", "caf\u00e9", "Cat"], ["cat", "007", "cafe\u0301"])
    [1, 2, -1]
    """
    place = {tidy(name): index for index, name in reversed(list(enumerate(known)))}
    by_number = defaultdict(list)
    for text, index in place.items():
        if _WHOLE.fullmatch(text):
            by_number[_number(text)].append(index)
    wholly = all(_WHOLE.fullmatch(tidy(name)) for name in names)
    found = []
    for name in map(tidy, names):
        same = by_number[_number(name)] if _WHOLE.fullmatch(name) else []
        if len(same) > 1 and wholly:  # which of them was meant, its own spelling no longer says
            found.append(-1)
        else:
            found.append(place.get(name, same[0] if len(same) == 1 else -1))
    return found


def unlike(names: Sequence[str], known: Sequence[str], whose: str = "id-train") -> str:
    r"""Classes that are not among the known ones, and what tells each from the one that it nearly is.

    >>> unlike(["c\u0430t"], ["cat", "dog"])
    "'c\u0430t' (has U+0430 CYRILLIC SMALL LETTER A where id-train's 'cat' has U+0061 LATIN SMALL LETTER A)"
    """
    others = [tidy(name) for name in known]
    return listed([f"{shown(name)}{_reason(name, others, whose)}" for name in map(tidy, names[:_SHOWN])], len(names))


def listed(parts: Sequence[str], n: int | None = None, most: int = _SHOWN) -> str:
    """The first of several, and whether there are more: n in all, where not all of them are given."""
    more = (len(parts) if n is None else n) > most
    return ", ".join(parts[:most]) + (", …" if more else "")


def shown(name: str) -> str:
    """A name in quotes, what cannot be seen in it escaped, not too long."""
    return repr(name if len(name) <= _SHOWN_LENGTH else f"{name[: _SHOWN_LENGTH - 1]}…")


def _number(text: str) -> int:
    match = _WHOLE.fullmatch(text)
    assert match is not None
    return int(match[1])


def _reason(name: str, known: Sequence[str], whose: str) -> str:
    if _WHOLE.fullmatch(name):
        same = [other for other in known if _WHOLE.fullmatch(other) and _number(other) == _number(name)]
        return f" ({whose} has {' and '.join(map(shown, same))}, one number)" if len(same) > 1 else ""
    if (near := _nearest(name, known)) is None:
        return ""
    if near.casefold() == name.casefold():
        return f" ({whose} has {shown(near)}, in other case)"
    ours, theirs = _where_they_differ(name, near)
    if (ours + theirs).isascii() and (ours + theirs).isprintable():
        return f" (did you mean {whose}'s {shown(near)}?)"
    if not ours:
        return f" (lacks the {_code_points(theirs)} of {whose}'s {shown(near)})"
    if not theirs:
        return f" (has {_code_points(ours)}, which {whose}'s {shown(near)} lacks)"
    return f" (has {_code_points(ours)} where {whose}'s {shown(near)} has {_code_points(theirs)})"


def _nearest(name: str, known: Sequence[str]) -> str | None:
    skeleton = _skeleton(name)
    for other in known:
        if _skeleton(other) == skeleton or _looks_like(name, other):
            return other
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    return close[0] if close else None


def _skeleton(name: str) -> str:
    """What is left of a name without case, blanks, marks, punctuation and characters that cannot be seen."""
    plain = unicodedata.normalize("NFKD", name.casefold())
    return "".join(c for c in plain if unicodedata.category(c)[0] not in "ZCMP") or name


def _looks_like(name: str, other: str) -> bool:
    """Whether two names differ in letters of other alphabets alone."""
    return len(name) == len(other) and all(
        a == b or a.isascii() != b.isascii() for a, b in zip(name, other, strict=True)
    )


def _where_they_differ(name: str, other: str) -> tuple[str, str]:
    start = next((i for i, (a, b) in enumerate(zip(name, other, strict=False)) if a != b), min(len(name), len(other)))
    end = next(
        (i for i, (a, b) in enumerate(zip(name[start:][::-1], other[start:][::-1], strict=False)) if a != b),
        min(len(name), len(other)) - start,
    )
    return name[start : len(name) - end], other[start : len(other) - end]


def _code_points(text: str) -> str:
    points = [f"U+{ord(c):04X} {unicodedata.name(c, '(no name)')}" for c in text[:_SHOWN]]
    return " ".join(points) + (" …" if len(text) > _SHOWN else "")
