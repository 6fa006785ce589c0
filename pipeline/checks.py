"""What can be known before any work: refused by the experiment file, the listings and the network's shape alone.

Each check is that of the stage which would refuse, asked early; no image is decoded and no weights are read. What knows
networks is imported where one is asked for: of a study that is fresh, none is.
"""

import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cache import FeatureSpec
from pipeline.backbones import StudyBackbone
from pipeline.config import CacheConfig, RunConfig, SetConfig
from pipeline.layers import asked_layers, check_layers
from pipeline.workspace import Workspace
from stages.config import BackboneConfig
from stages.detection.frozen import cannot_read_patches
from stages.errors import InputError
from stages.files.regular import check_takes_files
from stages.id_data.rows import IdData, Labels, check_split, has_classes
from stages.inputs.images import SampleTable
from stages.inputs.images.names import match_classes
from stages.machine import default_device
from stages.mixture.grouping import check_groups
from stages.scorers import AUTO, get_scorer, needs_of, parts_of
from stages.scorers.features.gmm import GMMScorer
from stages.training.recipes import resolve_recipe, resolve_settings
from stages.training.tensorboard import require_tensorboard

if TYPE_CHECKING:
    from stages.networks.backbone import Backbone

_Network = Callable[[], "Backbone"]  # the backbone, with weights or without
_Listing = Callable[[SetConfig], SampleTable]  # what a set holds
_Names = tuple[str, ...] | None  # of the classes that have images; None where there are none to tell apart
_FEWEST = 2  # classes that there are in any case


def check_before_extraction(workspace: Workspace, network: _Network | None = None) -> None:
    """Refuse all that can be known before work: this comes before hours of it.

    Args:
        workspace: the study.
        network: gives the architecture, where it is needed later as well; otherwise it is not kept.
    """
    workspace.sets.check()
    config, backbone = workspace.config, workspace.pretrained
    check_scalars(config)
    network = network or functools.cache(lambda: _built(backbone.start, config.cache.expert_blocks))
    to_train = _variants_to_train(workspace, backbone)
    check_study(config, workspace.sets.table, workspace.known_spec(backbone), network, to_train)
    check_before_tuning(workspace, network)


def _built(start: BackboneConfig, expert_blocks: int) -> "Backbone":
    from stages.networks.backbone import build_architecture

    return build_architecture(start, expert_blocks)


def check_before_training(workspace: Workspace, backbone: StudyBackbone, data: IdData) -> None:
    """Refuse what no mixture on a backbone's features can be trained with, before the first of them is."""
    check_scalars(workspace.config)
    names, spec = data.class_names, data.train.spec
    check_mixtures(workspace.config, names, spec)
    to_train = _variants_to_train(workspace, backbone)
    check_patches(workspace.config, names, spec, to_train, lambda: backbone.architecture)


def check_before_tuning(workspace: Workspace, network: _Network) -> None:
    """Refuse fine-tunes that cannot be, unless none is left to do."""
    if not workspace.all_finetuned():
        check_tuning(workspace.config, workspace.sets.table, network)


def _variants_to_train(workspace: Workspace, backbone: StudyBackbone) -> set[str]:
    return {variant for variant, _ in workspace.to_train(backbone)}


def check_study(
    config: RunConfig, table: _Listing, spec: FeatureSpec | None, network: _Network, to_train: Collection[str]
) -> None:
    """Refuse a study of which some stage is bound to refuse something.

    Args:
        config: the study.
        table: what each of its sets holds.
        spec: of features that came as arrays or were extracted before; None where images are still to be.
        network: the backbone, asked for where its shape matters.
        to_train: variants of which a mixture is still to be trained.

    Raises:
        InputError: in the words of the stage that cannot work so.
    """
    check_folder("work", config.work)
    if isinstance(config.cache.root, Path):  # a store says for itself what it refuses, when it is asked first
        check_folder("cache.root", config.cache.root)
    names, _ = _split(config, table)
    check_mixtures(config, names, spec)
    if spec is not None:
        check_layers(config, spec)
    if config.has_features or config.backbone is None:
        return
    if spec is None:
        _check_network(config.backbone, config.cache, network)
    check_patches(config, names, spec, to_train, network)
    if spec is None:
        _check_scores(config, _count(names), network)


def _check_network(config: BackboneConfig, cache: CacheConfig, network: _Network) -> None:
    """Refuse a network without weights, an image size that it cannot have, and what it cannot give of an image."""
    from stages.networks.preprocessing import check_decode
    from stages.networks.tokens import stored_grid
    from stages.networks.weights.loading import check_source

    check_source(config)
    built = network()
    built.tap_layout(cache.taps)
    stored_grid(built.grid, cache.patches)
    check_decode(config, default_device(), built.data_config)


def check_folder(key: str, folder: Path) -> None:
    """Refuse a folder that can neither be there nor be made.

    Raises:
        InputError: a file stands where it is to be, or nobody may write there.
    """
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        raise InputError(f"{key}: {there} is a file, a folder is needed")
    try:
        check_takes_files(there)
    except OSError as error:
        raise InputError(
            f"{key}: {there} cannot be written to: {error.strerror or error}: give another folder"
        ) from error


def check_scalars(config: RunConfig) -> None:
    """Refuse TensorBoard files that are asked for and cannot be written."""
    for key, stage in (("train", config.train), ("finetune", config.finetune)):
        if stage is not None and stage.tensorboard:
            require_tensorboard(f"{key}.tensorboard")


def check_mixtures(config: RunConfig, names: _Names, spec: FeatureSpec | None) -> None:
    """Refuse settings of any variant that cannot be, before the first of them is trained.

    Args:
        config: the study.
        names: of the classes that have images; None where clusters of images are to stand for them.
        spec: what there is to train on, where it is known.

    Raises:
        InputError: in the words of the training.
    """
    for variant, train in config.variant_configs().items():
        with _about(variant):
            settings = resolve_settings(train, _count(names), spec)
            if names is not None:
                check_groups(settings.experts, settings.grouping, names)
            elif settings.grouping not in ("balanced", "kmeans"):
                raise InputError(
                    f"train.grouping: {settings.grouping} names the classes of each group, and id-train has none to "
                    'tell apart: give "balanced" or "kmeans"'
                )


def check_patches(
    config: RunConfig,
    names: _Names,
    spec: FeatureSpec | None,
    to_train: Collection[str],
    network: _Network,
) -> None:
    """Refuse experts that are copies of the network's end and cannot run on the patches that are kept.

    Args:
        config: the study.
        names: as of `check_mixtures`.
        spec: what there is to train on, where it is known.
        to_train: variants of which a mixture is still to be trained.
        network: the backbone, asked for where not all patches are kept and an end is to read them.

    Raises:
        InputError: in the words of the training.
    """
    patches = config.cache.patches if spec is None else spec.patches
    if patches == "full":
        return
    for variant, train in config.variant_configs().items():
        kind = resolve_settings(train, _count(names), spec).expert
        if variant in to_train and kind in ("end", "dense") and not network().end_reads(patches):
            from stages.mixture.model import cannot_read

            with _about(variant):
                raise cannot_read(kind, network().config.name, patches)


def check_tuning(config: RunConfig, table: _Listing, network: _Network) -> None:
    """Refuse a fine-tune that cannot be.

    Raises:
        InputError: in the words of the fine-tune.
    """
    if config.finetune is None or config.backbone is None:
        return
    from stages.finetune import check_finetune

    names, n_train = _split(config, table)
    settings = resolve_recipe(config.finetune, n_train)
    check_finetune(config.backbone, settings, _count(names), network)


def _count(names: _Names) -> int:
    return _FEWEST if names is None else len(names)


def _split(config: RunConfig, table: _Listing) -> tuple[_Names, int]:
    """Names of the classes that have images, and how many images train; refuses sets that cannot be split."""
    (train,), val = config.sets_of("id-train"), config.sets_of("id-val")
    samples = table(train)
    if not has_classes(samples.labels):
        sizes = [len(samples), *(len(table(entry)) for entry in val)]
        alone = [np.zeros(size, np.int32) for size in sizes]
        return None, _check_split(config, ("all",), alone[0], alone[1] if val else None)
    used, labels = np.unique(samples.labels, return_inverse=True)
    names = tuple(samples.class_names[number] for number in used)
    held_out: Labels | None = None
    if val:
        others = table(val[0])
        held_out = np.asarray(match_classes(others.class_names, names), np.int32)[others.labels]
    return names, _check_split(config, names, labels.astype(np.int32), held_out)


def _check_split(config: RunConfig, names: tuple[str, ...], labels: Labels, held_out: Labels | None) -> int:
    """How many images train; refuses sets that cannot be split."""
    (train,) = config.sets_of("id-train")
    what = "image" if train.features is None else "row"
    return check_split(train.name, names, labels, held_out, config.split.val, config.finetune is None, what)


def _check_scores(config: RunConfig, n_classes: int, network: _Network) -> None:
    """Scores that the features to be extracted cannot have."""
    if config.cache.taps is not None:
        count = network().taps.count
        for name, most in ((name, max(layers)) for name, layers in asked_layers(config)):
            if most > count:
                raise InputError(f"score.params.{name}.layers: {most} given, the network has {count} blocks or stages")
    patches = config.cache.patches
    for score in config.score.scores:
        if score == AUTO:
            continue
        if "patches" in needs_of(score) and patches == "none":
            raise InputError(
                f'score.scores: {score} reads patch tokens, and none are kept: give cache.patches = "full"'
            )
        if "patches" in needs_of(score) and patches != "full" and not network().end_reads(patches):
            raise cannot_read_patches(network().config.name, patches)
        for part, _ in parts_of(score):
            scorer = get_scorer(part, config.score.profile, **config.score.params.get(part, {}))
            if isinstance(scorer, GMMScorer):
                scorer.check_size(n_classes, network().dim)


@contextmanager
def _about(variant: str) -> Iterator[None]:
    """Name the variant in front of what is wrong with its settings."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error) if variant == "default" else f"variants.{variant}.set.{error}") from error
