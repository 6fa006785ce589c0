"""What trained models are made of, and whether a folder holds the one that would be made now.

Of every model a *document* says what it is made of (``identity``) and what bytes its files have; a folder is *fresh*
where its document has the identity of now and is whole. Loads neither timm nor scikit-learn: who only asks is quick.
"""

from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache.fingerprint import fingerprint
from stages.config import FinetuneConfig
from stages.errors import InputError
from stages.files.documents import digest_of, read_document, read_made_of
from stages.files.tensors import read_tensors
from stages.id_data.rows import IdData
from stages.mixture.grouping import grouping_content
from stages.mixture.refined import LEFT_OUT, load_refined, refined_path
from stages.training.recipes import MixturePlan, TrainSettings, recorded_settings, resolve_recipe

TRAIN_SEMANTICS = 6  # raise it when the same settings would train another model
FINETUNE_SEMANTICS = 2  # raise it when the same settings would train another backbone

_UNREAD = ("metrics.jsonl",)  # which nothing is made of but the report


def probe_identity(data: IdData) -> str:
    """What a linear probe is made of: features and split."""
    return fingerprint({"data": data.identity, "semantics": TRAIN_SEMANTICS})


def mixture_identity(data: IdData, settings: TrainSettings, seed: int, probe: Path) -> str:
    """What a trained mixture is made of: features, split, settings (a grouping file by its content), seed and start.

    Args:
        data: features and split.
        settings: resolved.
        seed: of all that is drawn.
        probe: folder of the linear probe, whose bytes count where heads and router start from it.
    """
    own = recorded_settings(settings) | {"grouping": grouping_content(settings.grouping)}
    made_of = {"data": data.identity, "settings": own, "seed": seed, "semantics": TRAIN_SEMANTICS}
    if settings.start == "probe":
        made_of["probe"] = (read_document(probe / "probe.json") or {}).get("files")
    return fingerprint(made_of)


def joint_identity(data: IdData, source: Path) -> str:
    """What such a variant is made of: features, split, and the fine-tune that left it in `source`.

    Raises:
        InputError: no fine-tune stands there, or one without experts.
    """
    tuned, about = (read_document(source / name) or {} for name in ("finetune.json", "mofe.json"))
    made_by = tuned.get("identity")
    if made_by is None or about.get("identity") != made_by:
        raise InputError(f"{source} holds no backbone with experts that were trained together: run make finetune")
    joint = {"joint": made_by, "weights": about["files"]}
    return fingerprint({"data": data.identity, **joint, "semantics": TRAIN_SEMANTICS})


def mixture_is_fresh(folder: Path, identity: str, data: IdData) -> bool:
    """Whether a folder holds the trained mixture of this identity, with all its files, and these as they were left."""
    description = read_made_of(folder / "mofe.json", identity, _UNREAD)
    if description is None:
        return False
    banks = [(run, "id-train", description["bank"].get(run)) for run in data.train_rows()]
    if data.split.cross_fitted:
        banks += [(run, LEFT_OUT, description["left_out"].get(run)) for run, _ in data.runs()]
    return all(_bank_is_whole(refined_path(folder, run, name), digest) for run, name, digest in banks)


def _bank_is_whole(path: Path, digest: str | None) -> bool:
    return load_refined(path, {"files": {path.name: digest}}) is not None


def finetune_identity(data: IdData, config: FinetuneConfig, seed: int, mixture: MixturePlan | None = None) -> str:
    """What a fine-tuned backbone is made of: images and their split, weights to start from, settings and seed."""
    start = data.train.spec
    joint = None if mixture is None else asdict(mixture) | {"grouping": grouping_content(mixture.grouping)}
    return fingerprint(
        {
            "data": data.identity,
            "settings": recorded_settings(resolve_recipe(config, len(data.split.folds[0].train))),
            "mixture": joint,
            "seed": seed,
            "weights": start.weights_sha,
            "image_size": start.image_size,
            "semantics": FINETUNE_SEMANTICS,
        }
    )


def finetune_is_fresh(folder: Path, identity: str) -> bool:
    """Whether a folder holds the fine-tuned backbone of this identity, with all its files."""
    return read_made_of(folder / "finetune.json", identity, _UNREAD) is not None


def read_finetuned_head(folder: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight ``[C, D]`` and bias ``[C]`` of the head that was trained with the backbone.

    Raises:
        InputError: no whole fine-tune stands there.
    """
    about, path = read_document(folder / "finetune.json"), folder / "head.safetensors"
    tensors = read_tensors(path)
    if about is None or tensors is None or digest_of(path) != about["files"][path.name]:
        raise InputError(f"{folder} holds no whole fine-tuned head: run make finetune")
    return tensors["weight"], tensors["bias"]
