"""How far the end-to-end fine-tune is from bare training steps, and what checkpointing saves. ``make bench-finetune``.

The limit is forward, backward and AdamW's step of the same network on a batch that is in memory already. Ours are whole
epochs of `finetune` on JPEG files of 500 x 375 pixels: one process decodes and augments them on the same cores, and
checkpoints are stored as they fall due; held-out images are judged outside the time. Both in turn: bare steps run
between the epochs of one fine-tune, whose first is the warm-up. Medians. Nothing here is a test.

Peak memory is that of a process that trains on two batches. It is read as VmHWM, since ``ru_maxrss`` of a process
begins at that of the one that started it.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import nn

import pipeline.__main__  # noqa: F401  the process is set up as the command line sets it up
from cache import FeatureCache
from stages.config import BackboneConfig, FinetuneConfig
from stages.context import Context
from stages.extract import extract_set
from stages.finetune import TuningImages, finetune
from stages.id_data.rows import IdData, id_data
from stages.inputs.images import list_images
from stages.networks.backbone import build_architecture, load_backbone
from stages.networks.weights.loading import build_model
from stages.progress import NullProgress
from stages.training.objectives import freeze_batch_norm
from tests.bench.bench_extract import write_jpegs
from tests.bench.timing import RUNS, rates, row

CLASSES = 2
HELD_OUT = 0.1


@dataclass(frozen=True)
class Subject:
    """What is fine-tuned: a network, images of a batch, batches of an epoch, and of those that are measured bare."""

    name: str
    backbone: str
    batch: int
    batches: int
    bare: int

    def config(self, folder: Path) -> BackboneConfig:
        """With the embedded weights, or random ones from a file."""
        path = folder / f"{self.backbone}.safetensors"
        embedded = BackboneConfig(name=self.backbone, weights="embedded")
        if self.backbone == "tf_efficientnet_lite0":
            return embedded
        config = embedded.model_copy(update={"weights": str(path)})
        if not path.exists():
            network = build_architecture(config).model
            save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path)
        return config

    def data(self, folder: Path, batches: int) -> IdData:
        """The ID side of a study on as many batches."""
        (path,) = folder.glob("cache/bench-*")
        data = id_data(FeatureCache.open(path), None, HELD_OUT, cross_fit=False)
        fold = data.split.folds[0]
        fold = replace(fold, train=fold.train[: batches * self.batch], select=fold.select[: self.batch])
        assert len(fold.train) == batches * self.batch
        return replace(data, split=replace(data.split, folds=(fold,), final_train=fold.train))


SUBJECTS = (
    Subject("EfficientNet-Lite0, 224 px", "tf_efficientnet_lite0", batch=32, batches=6, bare=3),
    Subject("ViT-S/14, 224 px", "vit_small_patch14_dinov2", batch=8, batches=4, bare=2),
)


def main() -> None:
    """Measure and print the tables."""
    if len(sys.argv) > 1:
        folder, number, checkpointing = sys.argv[1:]
        print(peak_here(SUBJECTS[int(number)], Path(folder), checkpointing == "checkpointing"))
        return
    speed = rates(f"median of {RUNS} epochs and as many runs of bare steps, in turn; {torch.get_num_threads()} threads")
    memory = Table(
        "what", "images of a batch", "peak, MiB", "with checkpointing, MiB", title="one process, two batches"
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        n_images = max(int(subject.batch * subject.batches / (1 - HELD_OUT)) + CLASSES for subject in SUBJECTS)
        extract(folder, n_images)
        for number, subject in enumerate(SUBJECTS):
            row(speed, subject.name, "images/s", *in_turn(subject, folder))
            peaks = [f"{peak(number, folder, how):,.0f}" for how in ("plain", "checkpointing")]
            memory.add_row(subject.name, str(subject.batch), *peaks)
    for table in (speed, memory):
        Console(width=120).print(table)


def extract(folder: Path, n_images: int) -> None:
    """Images, and a cache of them, which says what may be trained on: the small network's does for all."""
    write_jpegs(folder / "jpeg", n_images)
    lines = [f"jpeg/{number:04d}.jpg,{number % CLASSES}\n" for number in range(n_images)]
    (folder / "train.csv").write_text("path,label\n" + "".join(lines))
    backbone = load_backbone(SUBJECTS[0].config(folder))
    spec = backbone.feature_spec("float16", "none")
    extract_set("bench", list_images(str(folder / "train.csv")), spec, folder / "cache", lambda: backbone)


def in_turn(subject: Subject, folder: Path) -> tuple[float, float]:
    """Images per second: bare steps, epochs of the fine-tune."""
    step = bare_step(subject, folder)

    def limit() -> None:
        for _ in range(subject.bare):
            step()

    watch = Watch(limit)
    tune(subject, folder, subject.batches, watch, epochs=RUNS + 1, workers=1)
    bare, ours = (statistics.median(seconds[1:]) for seconds in (watch.pauses, watch.epochs))
    return subject.bare * subject.batch / bare, subject.batches * subject.batch / ours


class Watch(NullProgress):
    """Times each epoch to its last step, and what it does itself once the held-out images were judged."""

    def __init__(self, pause: Callable[[], None]) -> None:
        self.epochs: list[float] = []
        self.pauses: list[float] = []
        self._pause = pause
        self._begun = self._stepped = time.perf_counter()

    def advance(self, n: int = 1, **fields: object) -> None:
        """See `Progress`."""
        if n:
            self._stepped = time.perf_counter()
        elif "accuracy" in fields:
            self.epochs.append(self._stepped - self._begun)
            start = time.perf_counter()
            self._pause()
            self._begun = time.perf_counter()
            self.pauses.append(self._begun - start)


def bare_step(subject: Subject, folder: Path) -> Callable[[], None]:
    """A step of all weights on one batch in memory."""
    model = build_model(subject.config(folder))
    model.reset_classifier(CLASSES)  # type: ignore[operator]
    freeze_batch_norm(model.train())
    images, labels = torch.randn(subject.batch, 3, 224, 224), torch.arange(subject.batch) % CLASSES
    if not hasattr(model, "patch_embed"):
        model.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(images), labels).backward()
        optimiser.step()

    return step


def tune(subject: Subject, folder: Path, batches: int, progress: NullProgress, **settings: object) -> None:
    """Fine-tune with the small-data recipe into a folder that is thrown away."""
    data, images = subject.data(folder, batches), list_images(str(folder / "train.csv"))
    config = FinetuneConfig(batch_size=subject.batch, preset="small").model_copy(update=settings)
    with tempfile.TemporaryDirectory() as result:
        finetune(subject.config(folder), TuningImages(data, images, images), config, 0, Path(result), Context(progress))


def peak(number: int, folder: Path, how: str) -> float:
    """MiB that another process held at most."""
    command = [sys.executable, "-m", "tests.bench.bench_finetune", str(folder), str(number), how]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout) / 1024


def peak_here(subject: Subject, folder: Path, checkpointing: bool) -> int:
    """KiB that this process held at most, once it has fine-tuned."""
    tune(subject, folder, 2, NullProgress(), epochs=1, workers=0, checkpointing=checkpointing)
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


if __name__ == "__main__":
    main()
