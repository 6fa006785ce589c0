"""What detection needs of a study: features, models and test sets of its backbones."""

from collections.abc import Sequence

from pipeline.backbones import StudyBackbone
from pipeline.pseudo_ood import PseudoOOD
from pipeline.workspace import Workspace
from stages.detection.sources import CS_ID, BackboneSource, MixtureFolder, ScoredSet
from stages.errors import InputError
from stages.files.documents import digest_of
from stages.heads.choose import FittedHeads, load_heads
from stages.id_data.rows import IdData
from stages.training.identity import probe_identity, read_finetuned_head

NO_VARIANT = "none"  # the backbone's own features

GROUP_OF_ROLE = {"id-test": "id", "near-ood": "near", "far-ood": "far", "cs-id": CS_ID}


def sources_to_score(workspace: Workspace, which: str, fits: bool = True) -> list[BackboneSource]:
    """All that stage three reads; the pre-trained backbone first.

    Args:
        workspace: the study.
        which: kind of the backbones.
        fits: whether a linear probe that is not there is fitted in passing.

    Raises:
        InputError: a backbone that was asked for, or a model on its features, is not there or not of now.
    """
    sources = [_source_to_score(workspace, backbone, fits) for backbone in workspace.existing(which)]
    if sources[0].name != "pretrained":
        # The frozen kNN of the pre-trained backbone is the baseline of every table.
        sources.insert(0, _source_to_score(workspace, workspace.pretrained, fits))
    return sources


def _source_to_score(workspace: Workspace, backbone: StudyBackbone, fits: bool) -> BackboneSource:
    tests = [
        ScoredSet(entry.name, GROUP_OF_ROLE[entry.role], backbone.cache(entry))
        for entry in workspace.config.sets_of(*GROUP_OF_ROLE)
    ]
    return _source(workspace, backbone, workspace.mixtures(backbone), tests, fits)


def source_to_predict(workspace: Workspace, backbone: StudyBackbone, variant: str | None = None) -> BackboneSource:
    """What `predict` needs: ID features and one mixture; no other need be trained, no set be scored.

    Args:
        workspace: the study.
        backbone: whose features.
        variant: whose mixture, that of the first seed; None: the first, or none where clusters of ID images stand for
            classes; `NO_VARIANT`: no mixture.

    Raises:
        InputError: no such variant; a model that is not there or not of now.
    """
    mixtures = workspace.mixtures(backbone)
    if variant is not None:
        known = [*dict.fromkeys(name for name, _ in mixtures), NO_VARIANT]
        if variant not in known:
            raise InputError(f"--variant: {variant!r} is none of {', '.join(known)}")
        mixtures = [mixture for mixture in mixtures if mixture[0] == variant]
    return _source(workspace, backbone, mixtures[:1], [], fits=True, of_clusters=variant is not None)


def _source(
    workspace: Workspace,
    backbone: StudyBackbone,
    mixtures: Sequence[tuple[str, int]],
    tests: Sequence[ScoredSet],
    fits: bool,
    of_clusters: bool = True,
) -> BackboneSource:
    """A backbone with some mixtures; unless `of_clusters`, without those of classes that are clusters."""
    workspace.check_caches(backbone, "id-train", "id-val", *(GROUP_OF_ROLE if tests else ()))
    data = backbone.id_data()
    # First, for mixtures that start from it are known by its bytes.
    probe = linear_probe(workspace, backbone, data, fits)
    scores = {variant.name: variant.scores for variant in workspace.config.variants}
    folders = [
        MixtureFolder(variant, seed, workspace.trained(backbone, data, variant, seed), scores.get(variant))
        for variant, seed in mixtures
        if of_clusters or data.labels == "given"
    ]
    documents = [backbone.probe_folder / "probe.json", *(folder.path / "mofe.json" for folder in folders)]
    documents += [] if backbone.seed is None else [backbone.finetune_folder / "finetune.json"]
    config = workspace.config
    return BackboneSource(
        name=backbone.kind,
        seed=backbone.seed,
        data=data,
        probe=probe,
        finetuned_head=None if backbone.seed is None else read_finetuned_head(backbone.finetune_folder),
        mixtures=tuple(folders),
        tests=tuple(tests),
        architecture=lambda: backbone.architecture,
        network=None if config.backbone is None else lambda: backbone.loaded,
        models={str(path.relative_to(config.work)): digest_of(path) for path in documents},
        pseudo=PseudoOOD(workspace, backbone).cache(data.train.spec),
    )


def linear_probe(workspace: Workspace, backbone: StudyBackbone, data: IdData, fits: bool) -> FittedHeads:
    """The linear probe; where it is not there, it is fitted or refused."""
    stored = load_heads(backbone.probe_folder, "probe", probe_identity(data))
    if stored is not None:
        return stored["probe"]
    if not fits:
        raise InputError(f"{backbone.probe_folder} holds no whole linear probe of these features: run make train")
    from stages.train import train_probe  # and all that trains

    return train_probe(data, backbone.probe_folder, workspace.context())
