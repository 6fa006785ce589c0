"""Links inside a tar, followed as they lead where it is unpacked, without leaving it."""

import posixpath
from collections.abc import Iterable, Iterator

from stages.inputs.images.decode import ImageError
from stages.inputs.images.kind import is_hidden
from stages.inputs.images.members import Link, Members
from stages.inputs.images.names import shown
from stages.inputs.images.table import Content, Unusable

_MOST_HOPS = 40  # from link to link, as Linux has it


def follow_links(members: Members) -> dict[str, Content]:
    """Files of a tar by name, those behind links as well.

    A link to a file is that file; one to a folder is all that lies below it, as in a folder on disk, and a loop ends
    where it comes back to a folder that it lies in. A link that leads to nothing, outside, or round in a circle, is a
    file that cannot be read. A member under its own name counts before what a link brings there.
    """
    files: dict[str, Content] = {name: entry for name, entry in members.entries.items() if not isinstance(entry, Link)}
    if not members.links:
        return files
    symbolic = dict[str, str]()
    for name in members.links:
        end = _hard_end(name, members)
        if isinstance(end, Link):
            symbolic[name] = end.target
        else:
            files[name] = end
    tree = _Tree(files, symbolic, members.folders)
    for name in symbolic:
        for alias, content in tree.behind(name):
            if not is_hidden(alias):
                files.setdefault(alias, content)
    return files


def _hard_end(name: str, members: Members) -> Content | Link:
    """What a link is a name of, if it is a hard one: a file, or a symbolic link."""
    entry = members.entries[name]
    for _ in range(_MOST_HOPS):
        if not (isinstance(entry, Link) and entry.hard):
            return entry
        target = entry.target
        if target not in members.entries:
            return Unusable(_nothing(target))
        entry = members.entries[target]
    return Unusable("a link that leads round in a circle")


class _Tree:
    """The folders of a tar, to walk in."""

    def __init__(self, files: dict[str, Content], symbolic: dict[str, str], folders: Iterable[str]) -> None:
        self._files, self._symbolic = dict(files), symbolic
        self._children: dict[str, dict[str, None]] = {"": {}}
        for folder in folders:
            self._children.setdefault("" if folder == "." else folder, {})
        for name in [*files, *symbolic, *self._children]:
            while name:
                folder, _, base = name.rpartition("/")
                children = self._children.setdefault(folder, {})
                if base in children:
                    break
                children[base] = None
                name = folder

    def behind(self, name: str) -> Iterator[tuple[str, Content]]:
        """Files that a symbolic link leads to, under the names that they have through it."""
        return self._behind(name, name, frozenset(_above(name)))

    def _behind(self, alias: str, link: str, above: frozenset[str]) -> Iterator[tuple[str, Content]]:
        try:
            end = self._end(link)
        except ImageError as error:
            yield alias, Unusable(str(error))
            return
        if end in self._files:
            yield alias, self._files[end]
        elif end in self._children:
            yield from self._below(alias, end, above)
        else:
            yield alias, Unusable(_nothing(self._symbolic[link]))

    def _below(self, alias: str, folder: str, above: frozenset[str]) -> Iterator[tuple[str, Content]]:
        if folder in above:
            return
        above |= {folder}
        for base in self._children[folder]:
            name, alias_of_it = posixpath.join(folder, base), posixpath.join(alias, base)
            if name in self._symbolic:
                yield from self._behind(alias_of_it, name, above)
            elif name in self._files:
                yield alias_of_it, self._files[name]
            else:
                yield from self._below(alias_of_it, name, above)

    def _end(self, link: str) -> str:
        """Name of what a symbolic link leads to, every link on the way followed; it need not be there.

        Raises:
            ImageError: It leads outside, round in a circle, or through what is no folder.
        """
        *here, base = link.split("/")
        ahead, hops = [base], 0
        while ahead:
            part = ahead.pop()
            if "/".join(here) not in self._children:
                raise ImageError(_nothing(self._symbolic[link]))
            if part in ("", "."):
                continue
            if part == "..":
                if not here or here.pop() == "..":
                    raise ImageError(_outside(self._symbolic[link]))
                continue
            here.append(part)
            if (target := self._symbolic.get("/".join(here))) is None:
                continue
            if (hops := hops + 1) > _MOST_HOPS:
                raise ImageError("a link that leads round in a circle")
            if target.startswith("/"):
                raise ImageError(_outside(self._symbolic[link]))
            here.pop()
            ahead += reversed(target.split("/"))
        return "/".join(here)


def _above(name: str) -> Iterator[str]:
    """Folders that a name lies in."""
    while name:
        name = name.rpartition("/")[0]
        yield name


def _nothing(target: str) -> str:
    return f"a link to {shown(target)}, which the tar does not hold"


def _outside(target: str) -> str:
    return f"a link to {shown(target)}, outside of the tar"
