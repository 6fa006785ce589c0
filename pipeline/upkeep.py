"""What stands on the disk of a study: whether it is whole, how it is put right, and what there is."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial

from cache import CacheDamagedError, CacheError, CacheInvalidError, FeatureCache, Place, restore_manifest
from cache.files import TEMPORARY, is_stray
from pipeline.backbones import StudyBackbone
from pipeline.config import SetConfig
from pipeline.one_cache import cache_lines
from pipeline.pseudo_ood import PseudoOOD
from pipeline.terminal import Lines, show
from pipeline.workspace import Workspace
from stages.errors import InputError, StageError
from stages.files.documents import CONTENTS, find_damages, read_document


def verify_study(workspace: Workspace, repair: bool = False) -> Lines:
    """Compare every byte of every cache with its manifest, and of models and scores with what they say of them.

    Repair makes damaged shards again.

    Raises:
        StageError: something is damaged.
    """
    broken, stale = 0, _verify_work(workspace)
    seen = set[Place]()
    for backbone in workspace.backbones:
        if backbone.seed is None or backbone.link_path.is_file():  # a fine-tuned one is extracted later than the other
            for entry in workspace.config.sets:
                broken += _verify_set(workspace, backbone, entry, repair, seen)
            broken += _verify_pseudo(workspace, backbone, repair)
    if broken:
        hint = "delete these caches, run make extract" if repair else "verify --repair makes damaged shards again"
        raise StageError(f"{broken + stale} damaged files: {hint}")
    if stale:
        raise StageError(
            f"{stale} damaged files of models or scores: make run makes those again that it needs; the others may "
            "be deleted"
        )
    return []


def _verify_work(workspace: Workspace) -> int:
    """Say what is damaged of models and scores, and what is none of theirs; how many are damaged."""
    work = workspace.config.work
    files = [path for name in ("model", "finetune") for path in sorted((work / name).rglob("*")) if path.is_file()]
    strays = [path for path in files if is_stray(path.name) and path.suffix != TEMPORARY]
    show(f"{path}: not part of the study, ignored" for path in strays)
    documents = [path for path in files if path.suffix == ".json" and path not in strays]
    documents += [path for name in ("scores", "report") if (path := work / name / CONTENTS).is_file()]
    found = dict(find_damages(documents))
    show(f"{path}: {what}" for path, what in found.items())
    return len(found)


_Repair = Callable[[FeatureCache, list[str]], None]  # makes these damaged files of a cache again


def _verify_set(workspace: Workspace, backbone: StudyBackbone, entry: SetConfig, repair: bool, seen: set[Place]) -> int:
    """Say what is damaged of one cache, repair it where that is asked for; how many files are damaged then.

    A cache that was `seen`, of a set of the same images, is not looked at again.
    """

    def again(cache: FeatureCache, files: list[str]) -> None:
        from stages.extract import repair_import, repair_set  # and the networks

        if entry.features is not None:
            repair_import(cache, files, workspace.sets.arrays(entry), workspace.progress)
        else:
            _check_device(backbone, cache)
            table = workspace.sets.table(entry)
            repair_set(cache, files, table, lambda: backbone.loaded, progress=workspace.progress)

    where = partial(backbone.cache_path, entry)
    with suppress(CacheError, InputError):  # said below
        if (path := where()) in seen:
            return 0
        seen.add(path)
    return _verify_cache(where, partial(backbone.cache, entry), again if repair else None)


def _verify_pseudo(workspace: Workspace, backbone: StudyBackbone, repair: bool) -> int:
    """The same of the images that play OOD, where there are such."""
    pseudo = PseudoOOD(workspace, backbone)
    try:
        path = pseudo.path
    except (InputError, CacheError):  # those that they are made of are not there, or damaged: that is said of them
        path = None
    if path is None or not path.is_dir():
        return 0

    def again(cache: FeatureCache, files: list[str]) -> None:
        from stages.extract import repair_set  # and the networks

        _check_device(backbone, cache)
        repair_set(cache, files, pseudo.samples(), lambda: backbone.loaded, progress=workspace.progress)

    return _verify_cache(lambda: path, partial(FeatureCache.open, path), again if repair else None)


def _verify_cache(path: Callable[[], Place], opened: Callable[[], FeatureCache], repair: _Repair | None) -> int:
    """Say what is damaged of one cache, and repair it by what is given for that; how many files are damaged then."""
    try:
        if repair and restore_manifest(path()):
            show([f"{path()}: the manifest was put back from its copy, or the copy from it"])
        cache = opened()
    except (CacheDamagedError, CacheInvalidError) as error:  # its manifest; the other caches are looked at as well
        show([str(error)])
        return 1
    damages = cache.verify()
    show(f"{cache.path / damage.file}: {damage.what}" for damage in damages)
    show(f"{cache.path / name}: not part of the cache, ignored" for name in cache.strays())
    if not damages:
        show([f"{cache.path}: whole, {cache.n_rows} rows"])
    elif repair:
        repair(cache, [damage.file for damage in damages])
        damages = FeatureCache.open(cache.path).verify()
        show([f"{cache.path}: {'still damaged' if damages else 'repaired'}"])
    return len(damages)


def _check_device(backbone: StudyBackbone, cache: FeatureCache) -> None:
    """Refuse to make features again that would be others."""
    if device := backbone.other_device(cache.spec):
        raise InputError(
            f"{cache.path}: made on {device}; made on {backbone.device}, as here, its features would be others: "
            f"repair it on a machine with {device}"
        )


def study_lines(workspace: Workspace) -> Lines:
    """What the study has on disk: a paragraph a cache, a line a mixture."""
    lines: Lines = [f"study      {workspace.config.name}, work in {workspace.config.work}"]
    for backbone in workspace.backbones:
        for entry in workspace.config.sets:
            try:
                cache = backbone.cache(entry)
            except (InputError, CacheError) as error:
                lines.append(f"{backbone.name:10} {entry.name}: {error}")
                continue
            lines += ["", *cache_lines(cache)]
        spec = backbone.known_spec()
        if spec is not None and (pseudo := PseudoOOD(workspace, backbone).found(spec)) is not None:
            lines += ["", *cache_lines(pseudo)]
        for variant, seed in workspace.mixtures(backbone):
            about = read_document(backbone.mixture_folder(variant, seed) / "mofe.json")
            state = (
                f"{about['settings']['experts']} experts, {about['parameters']:,} parameters"
                if about
                else "not trained"
            )
            lines.append(f"model      {backbone.name} {variant} seed {seed}: {state}")
    return lines
