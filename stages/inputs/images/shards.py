"""Several tars that are one set: a folder of them, or a pattern with wildcards and braces.

A shard is called by its path below the folder, or below the last folder of the pattern that is written without
wildcards and braces; the ids of its images begin with that. So they do not depend on where the shards lie, and what has
one name in two shards has two ids.
"""

import glob
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator

from braceexpand import braceexpand

from cache import is_remote
from stages.errors import InputError
from stages.inputs.images.columns import Columns
from stages.inputs.images.folder import Files
from stages.inputs.images.kind import extension, is_image_name
from stages.inputs.images.names import shown
from stages.inputs.images.opening import absolute, is_folder, is_there, matches_below
from stages.inputs.images.packed import is_packed, is_packed_tar, refuse_packed, unpacked_name
from stages.inputs.images.table import SampleTable
from stages.inputs.images.tar import Shard, list_tars

_MOST_SHARDS = 1_000_000  # of one range; more is a slip of the hand, and would be held in memory
_MOST_NAMED = 5
_RANGE = re.compile(r"\{(-?\d{1,18})\.\.(-?\d{1,18})")
_WILD = re.compile(r"[*?\[]")


def is_pattern(source: str) -> bool:
    """Whether a source that is no file or folder by this name stands for several."""
    return "{" in source or bool(_WILD.search(source))


def list_pattern(source: str, columns: Columns) -> SampleTable:
    """List the images of the tars that a pattern names.

    Braces are WebDataset's (`braceexpand`): `train-{0000..0146}.tar`, `{a,b}`, `{0..20..2}`; every file that they give
    has to be there. `*`, `?`, `[…]` and `**` are a shell's; what they match beside tars is left out.

    Raises:
        InputError: A shard is not there, compressed or no tar, or as `list_tars` raises it.
    """
    folder, pattern = _fixed_folder(absolute(source))
    found, matched, missing = dict[str, None](), dict[str, None](), list[str]()
    for name in _expand(source, pattern):
        if is_there(os.path.join(folder, name)):
            found[name] = None
        elif _WILD.search(name) and (names := _matches(folder, name)):
            matched |= dict.fromkeys(names)
        else:
            missing.append(name)
    if missing:
        raise InputError(f"{source}: not there in {folder}: {_some(missing)}")
    shards = found.keys() | set(filter(_is_shard, matched))
    if others := [name for name in found if not _is_shard(name)] if shards else list(matched):
        raise InputError(f"{source}: a pattern is for tars, but {_some(others)} is none; give a folder of images")
    return _list_shards(source, folder, shards, Counter(map(extension, matched.keys() - shards)), columns)


def list_tars_below(source: str, files: Files, columns: Columns) -> SampleTable | None:
    """List the images of a folder of tars; None where a folder is none.

    It is one if tars lie in it, at any depth, and no image: no file whose name or first bytes are those of one. All
    else beside the tars is left out, as img2dataset's `.parquet` and `_stats.json` files are. Of a folder with images
    the tars are left out, and counted as such.

    Args:
        source: The folder.
        files: What it holds.
        columns: Which field of a sample is its class.

    Raises:
        InputError: A tar is compressed, or the folder has nothing but archives; or as `list_tars` raises it.
    """
    unreadable = [sample.id for sample in files.samples if not (sample.size or sample.mtime_ns)]  # links to nothing
    if len(unreadable) < len(files.samples) or any(map(is_image_name, unreadable)):
        return None
    names = [*files.others, *unreadable]
    if shards := set(filter(_is_shard, names)):
        left_out = Counter(extension(name) for name in names if name not in shards) + files.special
        return _list_shards(source, absolute(source), shards, left_out, columns)
    for name in sorted(filter(is_packed, names)):
        refuse_packed(os.path.join(source, name), where=f"{source}: no images, and {shown(name)} is")
    return None


def _is_shard(name: str) -> bool:
    return name.lower().endswith(".tar") or is_packed_tar(name)


def _list_shards(
    source: str, folder: str, names: Collection[str], left_out: Counter[str], columns: Columns
) -> SampleTable:
    """List tars by their paths below a folder; a compressed one that is there unpacked as well is left out."""
    packed = sorted(filter(is_packed_tar, names))
    shards = sorted(set(names).difference(packed))
    if still_packed := [name for name in packed if unpacked_name(name) not in names]:
        first = os.path.join(folder, still_packed[0])
        refuse_packed(first, where=f"{source}: {_some(still_packed)}")
        raise InputError(f"{first}: not compressed, whatever its name says; call it .tar")
    left_out = left_out + Counter(map(extension, packed))
    return list_tars(source, [Shard(os.path.join(folder, name), f"{name}/") for name in shards], columns, left_out)


def _fixed_folder(path: str) -> tuple[str, str]:
    """The last folder of a pattern that is there as it is written, or has nothing to expand, and the rest."""
    folder, rest = os.path.split(path)
    while is_pattern(folder) and not is_folder(folder):
        folder, name = os.path.split(folder)
        rest = os.path.join(name, rest)
    return folder, rest


def _expand(source: str, pattern: str) -> Iterator[str]:
    if "{" not in pattern:
        return iter((pattern,))
    if any(abs(int(last) - int(first)) >= _MOST_SHARDS for first, last in _RANGE.findall(pattern)):
        raise InputError(f"{source}: a range of more than {_MOST_SHARDS:,} shards; give fewer")
    try:
        return iter(braceexpand(pattern))
    except ValueError as error:
        raise InputError(f"{source}: no such file, and its braces do not pair: {error}") from error


def _matches(folder: str, pattern: str) -> list[str]:
    if is_remote(folder):
        return matches_below(folder, pattern)
    names = glob.iglob(pattern, root_dir=folder, recursive=True)
    return sorted(name for name in names if not os.path.isdir(os.path.join(folder, name)))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED:,} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(map(shown, names[:_MOST_NAMED])) + more
