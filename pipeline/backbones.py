"""The backbones of a study: the pre-trained one and each fine-tuned one. What each has on disk, and where.

<work>/extract/<backbone>.json       which caches the sets' features are in, and from what settings
<work>/model/<kind>/…                probe and mixtures
<work>/finetune/seed-<s>/            where a fine-tuned backbone comes from
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cache import CacheMismatchError, CacheNotFoundError, FeatureCache, FeatureSpec, Place, file_sha256, place
from cache.spec import first_difference
from pipeline.config import RunConfig, SetConfig
from stages.config import BackboneConfig
from stages.errors import InputError
from stages.extraction.begun import chosen_spec
from stages.files.documents import read_document, write_document
from stages.id_data.rows import IdData, has_classes, id_data
from stages.inputs.arrays import ARRAY_SEMANTICS, ArrayTable
from stages.machine import default_device
from stages.networks.compute import COMPUTE_BATCH, COMPUTE_THREADS, EXTRACTION_SEMANTICS

if TYPE_CHECKING:  # timm, for those alone who run a network or ask for its shape
    from stages.networks.backbone import Backbone

_TUNED = "backbone.safetensors"  # of a fine-tune


@dataclass(frozen=True)
class StudyBackbone:
    """One backbone of a study.

    Attributes:
        config: the study.
        kind: ``pretrained`` or ``finetuned``, as in the table's column ``backbone``.
        seed: of the fine-tune; None for the pre-trained backbone.
        tuned_from: the pre-trained backbone, which has the same architecture; None for itself.
    """

    config: RunConfig
    kind: Literal["pretrained", "finetuned"]
    seed: int | None = None
    tuned_from: "StudyBackbone | None" = None

    @property
    def name(self) -> str:
        """Unique in the study; part of file names."""
        return self.kind if self.seed is None else f"{self.kind}-seed-{self.seed}"

    @property
    def finetune_folder(self) -> Path:
        """Where the fine-tune that made it stands."""
        return self.config.work / "finetune" / f"seed-{self.seed}"

    @property
    def exists(self) -> bool:
        """Whether its backbone is there: the fine-tuned one once it was trained."""
        return self.seed is None or (self.finetune_folder / "finetune.json").is_file()

    @property
    def start(self) -> BackboneConfig:
        """What the pre-trained network is built from.

        Raises:
            InputError: the study has features and names no network.
        """
        if self.config.backbone is None:
            raise InputError("backbone: missing; features came as arrays, and this needs the network that made them")
        return self.config.backbone

    @property
    def backbone_config(self) -> BackboneConfig:
        """What its network is built from."""
        if self.seed is None:
            return self.start
        weights = str(self.finetune_folder / _TUNED)
        return self.start.model_copy(update={"weights": weights})

    @property
    def probe_folder(self) -> Path:
        """Where its linear probe stands."""
        folder = self.config.work / "model" / self.kind / "probe"
        return folder if self.seed is None else folder / f"seed-{self.seed}"

    def mixture_folder(self, variant: str, seed: int) -> Path:
        """Where a mixture trained on its features stands."""
        return self.config.work / "model" / self.kind / variant / f"seed-{seed}"

    @property
    def train_seeds(self) -> tuple[int, ...]:
        """Seeds of its mixtures: all of the study's, or that of its fine-tune."""
        return self.config.seeds if self.seed is None else (self.seed,)

    # ----------------------------------------------------------------------------------------------- its features

    @property
    def link_path(self) -> Path:
        """Which caches its sets are in."""
        return self.config.work / "extract" / f"{self.name}.json"

    @cached_property
    def device(self) -> str:
        """Where networks run."""
        return default_device()

    def asked(self) -> dict[str, Any]:
        """All settings that features depend on but the kind of device, known without opening the weights."""
        if self.config.has_features:
            network = {} if self.config.backbone is None else self._asked_network(self.config.backbone)
            own = self.config.cache.model_dump(mode="json", include={"dtype"} & self.config.cache.model_fields_set)
            return {"origin": self.config.sets[0].origin, **own, **network, "semantics": ARRAY_SEMANTICS}
        cache = self.config.cache
        return {
            **self._asked_network(self.start),
            "dtype": cache.dtype,
            "patches": cache.patches,
            "batch": COMPUTE_BATCH,
            "threads": COMPUTE_THREADS,
            "semantics": EXTRACTION_SEMANTICS,
            **(
                {} if cache.taps is None else cache.model_dump(mode="json", include={"taps"})
            ),  # as in links from before
        }

    def _asked_network(self, backbone: BackboneConfig) -> dict[str, Any]:
        weights: dict[str, Any] = {"weights": backbone.weights}
        if self.seed is not None:  # by what it was made of, so that a study may be moved
            about = read_document(self.finetune_folder / "finetune.json") or {}
            weights = {"weights": f"finetune/seed-{self.seed}", "finetune": about.get("files", {}).get(_TUNED)}
        elif backbone.weights not in ("hub", "embedded") and Path(backbone.weights).is_file():
            weights = {"weights": "file", "weights_sha256": self._file_digest(Path(backbone.weights))}
        # As in the links from before there was a choice.
        unsaid = [key for key, plain in (("decode", "pil"), ("batch", "auto")) if getattr(backbone, key) == plain]
        return {
            "backbone": backbone.name,
            **backbone.model_dump(mode="json", exclude={"name", "weights", *unsaid}),
            **weights,
            "expert_blocks": self.config.cache.expert_blocks,
        }

    def _file_digest(self, path: Path) -> str:
        """SHA-256 of a file; the one that was extracted with is read anew only where its size or time is another."""
        known, now = (self._stored_link() or {}).get("weights_file", {}), _stamp(path)
        return str(known["sha256"]) if known.get("stamp") == now else file_sha256(path)

    def _stored_link(self) -> dict[str, Any] | None:
        return read_document(self.link_path)

    @cached_property
    def loaded(self) -> "Backbone":
        """Its network with weights; built on first use.

        Raises:
            InputError: see `stages.networks.backbone.load_backbone`.
            CacheMismatchError: the weights are others, under the same name, than those that filled the caches.
        """
        from stages.networks.backbone import load_backbone, weights_sha

        network = load_backbone(self.backbone_config, self.config.cache.expert_blocks, self.device)
        known = self.known_spec()
        if known is not None and known.weights_sha and known.weights_sha != weights_sha(network.model):
            raise CacheMismatchError(
                f"backbone.weights: {self.backbone_config.weights} gives other weights now than those that the "
                f"{self.name} features were extracted with: delete {self.link_path}, run make extract"
            )
        return network

    @cached_property
    def architecture(self) -> "Backbone":
        """Its network without weights, one for all of a study; built on first use."""
        if self.tuned_from is not None:
            return self.tuned_from.architecture
        from stages.networks.backbone import build_architecture

        return build_architecture(self.start, self.config.cache.expert_blocks)

    def known_spec(self) -> FeatureSpec | None:
        """What its features are, if they were extracted with these settings before; needs no weights."""
        link = self._stored_link()
        if link is None or link.get("asked") != self.asked():
            return None
        return FeatureSpec.from_dict(link["spec"])

    def spec(self, n_images: int = 0) -> FeatureSpec:
        """What its features are; loads the backbone where that is not known yet.

        Args:
            n_images: that are to be extracted, where it is not.
        """
        cache = self.config.cache
        known = self.known_spec()
        if known is not None:
            return known
        if self.config.has_features:
            raise InputError("the sets' features are not in caches yet, or with other settings: run make extract")
        return chosen_spec(self.loaded, cache.dtype, cache.patches, cache.root, n_images, cache.taps)

    def given_spec(self, tables: Mapping[str, ArrayTable]) -> FeatureSpec:
        """What the features of a study are whose sets came as arrays, by name; only the first rows are read.

        Raises:
            InputError: arrays of different shapes, or tokens that are not the named network's.
        """
        config = self.config
        dtypes = {table.dtype for table in tables.values()}
        dtype = config.cache.dtype if "dtype" in config.cache.model_fields_set else max(dtypes)  # "float32" if in doubt
        network = None
        if config.backbone is not None and all(table.has_tokens for table in tables.values()):
            known = self.known_spec()
            if known is not None and known.weights_sha:
                network = known.backbone, known.weights_sha, known.expert_blocks, known.image_size
            else:
                from stages.networks.backbone import network_of

                network = network_of(self.loaded)
        origin = str(config.sets[0].origin)
        specs = {name: table.spec(origin, dtype, network) for name, table in tables.items()}
        (first, spec), *others = specs.items()
        for name, other in others:
            if spec != other:
                raise InputError(
                    f"sets.{name}.features: {tables[name].path} has {_shapes(other)}, set {first} has {_shapes(spec)}: "
                    "sets of one study have the same arrays, row by row of the same shape"
                )
        return spec

    def other_device(self, spec: FeatureSpec) -> str | None:
        """On what kind of device features of images were made, where this machine would make them on another."""
        device = spec.compute.get("device")
        return None if device in (None, self.device) else str(device)

    def link(self, spec: FeatureSpec, caches: dict[str, FeatureCache], files: Mapping[str, Iterable[str]]) -> None:
        """Remember which caches its sets are in.

        Args:
            spec: of their features.
            caches: by the names of the sets.
            files: of features, by the names of the sets that have such.
        """
        sets = {
            entry.name: {
                "images": entry.source,
                "relative": self._relative(entry),
                "path": self._stored_path(caches[entry.name].path),
                "files": {os.path.relpath(file, self.config.work): _stamp(file) for file in files.get(entry.name, ())},
            }
            for entry in self.config.sets
        }
        link: dict[str, Any] = {"asked": self.asked(), "spec": spec.to_dict(), "sets": sets}
        if (digest := link["asked"].get("weights_sha256")) is not None:
            link["weights_file"] = {"stamp": _stamp(self.start.weights), "sha256": digest}
        if self._stored_link() != json.loads(json.dumps(link)):
            write_document(self.link_path, link)

    def _stored_path(self, path: Place) -> str:
        """Where a cache stands, relative to ``work``, or in which store."""
        return os.path.relpath(path.resolve(), self.config.work.resolve()) if isinstance(path, Path) else str(path)

    def _relative(self, entry: SetConfig) -> str:
        """What a set is made from, relative to ``work``: so a study that is moved as a whole is found again."""
        given = {name: getattr(entry, name) for name in ("images", "features", "root", "classes")}
        places = {
            name: os.path.relpath(path, self.config.work)
            for name, path in given.items()
            if isinstance(path, str) and os.path.isabs(path)
        }
        return entry.model_copy(update=places).source

    def changed_files(self, entry: SetConfig) -> list[str]:
        """Files of features whose size or time is another than when they were extracted, as far as they are there."""
        stored = (self._stored_link() or {}).get("sets", {}).get(entry.name, {}).get("files", {})
        paths = {os.path.normpath(self.config.work / name): stamp for name, stamp in stored.items()}
        return [path for path, stamp in paths.items() if os.path.exists(path) and _stamp(path) != stamp]

    def cache(self, entry: SetConfig) -> FeatureCache:
        """The sealed cache of one set; opens no image and no weights.

        Raises:
            InputError: not extracted yet.
            CacheNotFoundError: the cache is gone.
            CacheMismatchError: extracted with other settings or from other images.
        """
        path, spec = self._linked(entry)
        try:
            return FeatureCache.open(path, spec)
        except CacheNotFoundError as error:
            raise CacheNotFoundError(f"set {entry.name!r}: {error}: run make extract") from error

    def cache_path(self, entry: SetConfig) -> Place:
        """Folder of the cache of one set; raises as `cache` does, but for what is in the folder."""
        return self._linked(entry)[0]

    def _linked(self, entry: SetConfig) -> tuple[Place, FeatureSpec]:
        link = self._stored_link()
        if link is None:
            what = "is damaged" if self.link_path.exists() else "is missing"
            raise InputError(
                f"the {self.name} features are not extracted yet ({self.link_path} {what}): run make extract"
            )
        if difference := first_difference(link["asked"], self.asked()):
            raise CacheMismatchError(f"{self.link_path}: extracted with other settings: {difference}: run make extract")
        stored = link["sets"].get(entry.name)
        if stored is None:
            raise InputError(f"set {entry.name!r} is not extracted yet: run make extract")
        if stored["images"] != entry.source and stored["relative"] != self._relative(entry):
            raise CacheMismatchError(
                f"set {entry.name!r} was extracted from {stored['images']}, this run gives {entry.source}: "
                "run make extract"
            )
        # Relative to ``work``, or where the file says that caches are: one of them or both may have been moved.
        path = place(stored["path"])
        if isinstance(path, Path):
            path = Path(os.path.normpath(self.config.work.resolve() / path))
        if not path.is_dir():
            path = self.config.cache.root / path.name
        return path, FeatureSpec.from_dict(link["spec"])

    def id_data(self) -> IdData:
        """ID features with the study's split, the same for all of its backbones.

        Of a backbone that was fine-tuned only rows that it never saw can calibrate. So a study that fine-tunes is not
        cross-fitted: all of its rows, those of the pre-trained backbone too, train, select and calibrate on the same.
        Where there are no labels, the clusters that stand for classes are those of the pre-trained backbone's features.
        """
        (train,), val = self.config.sets_of("id-train"), self.config.sets_of("id-val")
        cache = self.cache(train)
        own = self.tuned_from is None or has_classes(cache.labels)
        return id_data(
            cache,
            self.cache(val[0]) if val else None,
            self.config.split.val,
            cross_fit=self.config.finetune is None,
            classes_of=None if own or self.tuned_from is None else self.tuned_from.id_data(),
        )


def _stamp(path: str | Path) -> list[int]:
    """Size and time of a file."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns]


def _shapes(spec: FeatureSpec) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, (shape, _) in spec.datasets().items())


def backbones_of(config: RunConfig) -> list[StudyBackbone]:
    """All backbones of a study, the pre-trained one first."""
    pretrained = StudyBackbone(config, "pretrained")
    return [pretrained, *(StudyBackbone(config, "finetuned", seed, pretrained) for seed in config.finetune_seeds())]
