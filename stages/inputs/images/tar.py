"""Images in uncompressed tars: a tree of folders, flat, or WebDataset; one tar, or the shards of one set.

The headers are read once, while listing; after that every image is a range of bytes of its tar, read without tarfile.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import IO, NamedTuple

from stages.errors import InputError
from stages.inputs.images.columns import USUAL, Columns
from stages.inputs.images.kind import SPECIAL, extension, is_hidden, is_image
from stages.inputs.images.links import follow_links
from stages.inputs.images.members import Members, SparseRange, first_bytes, read_members
from stages.inputs.images.names import listed, shown
from stages.inputs.images.opening import absolute, open_file
from stages.inputs.images.table import Content, FileRange, Sample, SampleTable, Unusable, first_folder, make_table
from stages.inputs.images.webdataset import SideFiles, keys_apart

_MOST_REASONS = 5  # of damaged shards in one line; the others are named


class Shard(NamedTuple):
    """One tar of a set."""

    path: str
    prefix: str = ""  # what the ids of its members begin with


def list_tar(source: str, columns: Columns = USUAL) -> SampleTable:
    """List the images of one tar, see `list_tars`; their ids are the names of its members."""
    return list_tars(source, [Shard(absolute(source))], columns)


def list_tars(
    source: str,
    shards: Sequence[Shard],
    columns: Columns = USUAL,
    left_out: Mapping[str, int] = MappingProxyType({}),
) -> SampleTable:
    """List the images of tars that are one set.

    If any image of the set has its class beside it (see `stages.inputs.images.webdataset`), classes come from there
    alone; otherwise the class of an image is the first folder of its name in the tar. The same name, or WebDataset key,
    in two shards is two images. In one tar the later of two members with one name counts, as when it is unpacked, and a
    note says so. Links are followed inside the tar, and never lead out of it.

    Members are dated by their tar: what their headers say need not change when they do.

    Args:
        source: What messages call the set.
        shards: The tars, in the order in which they are read.
        columns: Which field of a sample is its class.
        left_out: Files beside the shards that are not read, by extension.

    Raises:
        InputError: A tar is damaged or not there (all that are are named), or a class beside an image cannot be read.
    """
    images = _Images(columns, left_out)
    damaged: list[str] = []
    unreadable: InputError | None = None
    for shard in shards:
        try:
            members = read_members(shard.path)
        except InputError as error:
            damaged.append(str(error))
            continue
        if not damaged and unreadable is None:
            try:
                images.add(shard, members)
            except InputError as error:  # said only if no other shard is damaged
                unreadable = error
    if damaged:
        raise InputError(_all_damaged(source, damaged, len(shards)))
    if unreadable is not None:
        raise unreadable
    return images.table(source)


def _all_damaged(source: str, damaged: list[str], n_shards: int) -> str:
    if n_shards == 1:
        return damaged[0]
    others = [message.partition(": ")[0] for message in damaged[_MOST_REASONS:]]
    lines = "; ".join([*damaged[:_MOST_REASONS], *others])
    return f"{source}: {len(damaged)} of {n_shards} shards cannot be read: {lines}"


class _Images:
    """Images of the shards so far."""

    def __init__(self, columns: Columns, left_out: Mapping[str, int]) -> None:
        self._columns, self._left_out = columns, Counter(left_out)
        self._samples: list[Sample] = []  # their class is the first folder
        self._beside: dict[str, str | None] = {}  # class by id, where a file beside the image gives it
        self._numbers: dict[str, str | None] = {}  # class by id, where .txt files are to give it
        self._number_files: Counter[str] = Counter()  # these by extension
        self._notes: list[str] = []

    def add(self, shard: Shard, members: Members) -> None:
        files = follow_links(members)
        seen = [name for name in files if name not in members.hidden]
        with open_file(shard.path) as file:
            images = [
                name for name in seen if name in members.images or _is_linked_image(name, files[name], members, file)
            ]
            side = SideFiles(shard.path, file, files, self._columns)
            beside = side.classes(images)
            numbers = side.numbers(images) if self._has_numbers and not self._beside and not beside else {}
        self._beside |= {shard.prefix + name: class_name for name, class_name in beside.items()}
        self._numbers |= {shard.prefix + name: class_name for name, class_name in numbers.items()}
        for name in images:
            content = files[name]
            size = content.size or 0 if isinstance(content, FileRange | SparseRange) else 0
            self._samples.append(Sample(shard.prefix + name, _folder(name), size, members.mtime_ns, content))
        self._number_files.update(map(extension, side.used_for_numbers))
        others = set(seen).difference(images, side.used, side.used_for_numbers)
        self._left_out.update(map(extension, others))
        self._left_out.update(SPECIAL for name in members.special if not is_hidden(name))
        if repeated := [name for name in dict.fromkeys(members.repeated) if name not in members.hidden]:
            self._notes.append(f"{shard.path}: members that stand there twice, the later counts: {_counted(repeated)}")
        if beside and (keys := keys_apart(name for name in members.entries if name not in members.hidden)):
            self._notes.append(f"{shard.path}: keys that stand there twice, others in between: {_counted(keys)}")
        self._notes += side.notes

    def table(self, source: str) -> SampleTable:
        """All of them.

        Raises:
            InputError: There is none, or none has the field that is to be its class.
        """
        classes = self._beside
        if not classes and self._columns.label is not None and self._samples:
            raise InputError(
                f"{source}: label_column {self._columns.label!r} is not there: no image has a file "
                f".{self._columns.label} or a .json beside it"
            )
        if not classes and self._has_numbers and not any(sample.class_name for sample in self._samples):
            classes = self._numbers
            self._notes += [f"{source}: classes are the whole numbers in .txt files; label_column may say otherwise"]
        else:
            self._left_out.update(self._number_files)
        samples: Iterable[Sample] = self._samples
        if classes:
            samples = (sample._replace(class_name=classes.get(sample.id)) for sample in self._samples)
        return make_table(source, samples, self._left_out, self._notes)

    @property
    def _has_numbers(self) -> bool:
        """Whether every image so far has a `.txt` with a whole number."""
        return len(self._numbers) == len(self._samples)


def _counted(names: list[str]) -> str:
    return f"{len(names):,} ({listed([shown(name) for name in names])})"


def _folder(name: str) -> str | None:
    """First folder of a member; `..` is none."""
    while name.startswith("../"):
        name = name[3:]
    return first_folder(name)


def _is_linked_image(name: str, content: Content, members: Members, file: IO[bytes]) -> bool:
    """Whether what a link leads to is an image, or nobody knows since it leads nowhere."""
    if name in members.entries and name not in members.links:
        return False
    return isinstance(content, Unusable) or is_image(name, lambda: first_bytes(content, file))
