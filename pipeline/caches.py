"""Sealed caches without a study: what is at hand goes in, no experiment file and no roles are needed."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pipeline.checks import check_folder
from pipeline.config import FeaturesConfig, RunOptions
from pipeline.engine import engine_for
from stages.errors import InputError
from stages.extract import ExtractOptions, extract_features, set_name
from stages.inputs.images import SampleTable, describe_left_out, list_images
from stages.inputs.images.table import Sample, is_one_file, make_table
from stages.machine import default_device
from stages.networks.backbone import load_backbone
from stages.progress import Progress
from stages.sanity import check_features

_FILES = "images"  # set of the image files that are given one by one


def cache_images(
    paths: Sequence[str], config: FeaturesConfig, options: RunOptions, progress: Progress, name: str | None = None
) -> Iterator[str]:
    """A sealed cache of each folder, tar or list, and one of all image files that are given by themselves.

    Args:
        paths: sources as `stages.inputs.images.list_images` takes them.
        config: network, and what is kept of it; ``cache.root`` is where caches go.
        options: how to run.
        progress: counts images.
        name: of the set, where there is one; by default after its source.

    Yields:
        A line for each cache.

    Raises:
        InputError: before any work, where a source is not there or two sets would have one name.
        StageError, CacheError: as `stages.extract.extract_features`; caches that were sealed before stay.
    """
    tables, root = _tables(paths, name), config.cache.root
    if isinstance(root, Path):
        check_folder("--out", root)
    backbone = load_backbone(config.backbone, config.cache.expert_blocks, default_device())
    for note in backbone.notes():
        progress.note(note)
    shared = [root] if isinstance(root, Path) else []
    with engine_for(options.scheduler, options.workers, shared, progress) or nullcontext() as engine:
        for own, table in tables.items():
            for note in table.notes:
                progress.note(note)
            cache = extract_features(
                table,
                backbone,
                patches=config.cache.patches,
                dtype=config.cache.dtype,
                taps=config.cache.taps,
                out=config.cache.root,
                name=own,
                options=ExtractOptions(
                    max_failures=options.max_failures,
                    rehash=options.rehash,
                    mapper=None if engine is None else engine.map,
                    progress=progress,
                ),
            )
            for note in check_features(cache, by_class=bool((cache.labels >= 0).all())):
                progress.note(note)
            counts = f"{cache.n_rows} rows + {cache.manifest.n_failures} failures = {len(table)} inputs"
            yield "; ".join(filter(None, (f"{cache.path}: {counts}", describe_left_out(table.left_out))))


def _tables(paths: Sequence[str], name: str | None) -> dict[str, SampleTable]:
    """What each set holds, by its name."""
    tables: list[tuple[str, SampleTable]] = []
    files: list[Sample] = []
    for path in paths:
        table = list_images(path)
        if is_one_file(path, table.ids):
            row: Any = (int(table.sizes[0]), int(table.mtimes_ns[0]), table.contents[0])
            files.append(Sample(path, None, *row))
        else:
            tables.append((set_name(path), table))
    if files:
        tables.append((_FILES, make_table(f"{len(files)} image files", files)))
    if name is not None:
        if len(tables) > 1:
            raise InputError(f"--name {name}: is for one set, {len(tables)} are given: leave it out, or run once a set")
        tables = [(name, tables[0][1])]
    for own, n in Counter(own for own, _ in tables).items():
        if n > 1:
            sources = ", ".join(table.source for other, table in tables if other == own)
            raise InputError(f"{sources}: all would be called {own!r}: give each by itself, with --name")
    return dict(tables)
