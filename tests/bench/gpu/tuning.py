"""The end-to-end fine-tune: its losses beside the CPU's, its images a second beside bare steps, its memory."""

import itertools
import json
import shutil
import statistics
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from stages.config import BackboneConfig, FinetuneConfig
from stages.context import Context
from stages.extract import extract_set
from stages.finetune import TuningImages, finetune
from stages.id_data.rows import id_data
from stages.inputs.images import list_images
from stages.networks.repeatable import repeatable
from stages.networks.weights.loading import build_model
from stages.training.loading import worker_count
from stages.training.objectives import freeze_batch_norm
from stages.training.run import Record
from tests.bench.bench_finetune import CLASSES, Watch
from tests.bench.gpu.step import Bench
from tests.bench.gpu.subjects import jpegs, named_network, network, placed, rate
from tests.bench.gpu.training import reset_peak, say_peak

# Relative, of an epoch's loss: rounding that every step adds to; convolutions of a GPU's training take TF32.
TOLERANCES = {"float32": 5e-3, "bfloat16": 5e-2}
HELD_OUT = 0.1
EPOCHS = 3  # of the timed one, whose first is the warm-up
_numbers = itertools.count()


def fine_tune(bench: Bench, name: str) -> None:
    """Train in every precision as on the CPU, then for speed."""
    config = stored(bench, named_network(bench, name, batch=bench.sizes.tuned_batch))
    images = tuning_images(bench, bench.sizes.tuned)
    exact = tune(bench, config, images, "cpu", epochs=1, workers=0, precision="float32")
    for precision, tolerance in TOLERANCES.items():
        ours = tune(bench, config, images, bench.device, epochs=1, workers=0, precision=precision)
        for what in ("loss", "select_loss"):
            error = abs(ours[-1][what] - exact[-1][what]) / exact[-1][what]
            bench.measure(f"{precision}: {what}, relative to the CPU's", error, at_most=tolerance)
    step = bare_step(bench, config)
    limit = rate(bench, bench.sizes.tuned_batch, step)
    bench.measure("bare forward, backward, AdamW", limit, "images/s")
    with repeatable(bench.device, trains=True):
        bench.measure(
            "the same by kernels that repeat their bits", rate(bench, bench.sizes.tuned_batch, step), "images/s"
        )
    del step
    watch = Watch(lambda: None)
    reset_peak(bench)
    images = tuning_images(bench, bench.sizes.timed_tuned)
    # As many as for a study that is worth them; beside the CPU's passes there are none.
    workers = worker_count("auto", 1 << 20, 1, bench.device) if bench.device == "cuda" else 0
    tune(bench, config, images, bench.device, watch, epochs=EPOCHS, workers=workers)
    ours_s = statistics.median(watch.epochs[1:])
    n_images = images.n_train
    bench.measure("processes that decode", workers)
    bench.measure("epochs from JPEG files", n_images / ours_s, "images/s")
    bench.measure("epochs / bare", n_images / ours_s / limit)
    bench.measure("first epoch, with the start of the workers", watch.epochs[0], "s")
    say_peak(bench, "peak memory")


def stored(bench: Bench, config: BackboneConfig) -> BackboneConfig:
    """The same with its seeded weights in a file."""
    if config.weights == "embedded":
        return config
    path = bench.scratch / f"{config.name}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in network(config).state_dict().items()}, path)
    return config.model_copy(update={"weights": str(path)})


def tuning_images(bench: Bench, n: int) -> TuningImages:
    """JPEG files of two classes, and the ID side of a study on a cache of them, which says what may be trained on.

    Of which network the features are does not matter: of the smallest, on the CPU.
    """
    folder, table = jpegs(bench, n), bench.scratch / f"train-{n}.csv"
    lines = (f"{path},{number % CLASSES}\n" for number, path in enumerate(sorted(folder.iterdir())))
    table.write_text("path,label\n" + "".join(lines))
    images = list_images(str(table))
    config = BackboneConfig(name="test_vit", weights="hub", image_size=32)
    backbone = placed(network(config), config, "cpu")
    spec = backbone.feature_spec("float16", "none")
    cache = extract_set(f"tuned-{n}", images, spec, bench.scratch / "tuned", lambda: backbone)
    data = id_data(cache, None, HELD_OUT, cross_fit=False)
    return TuningImages(data, images, images)


def tune(
    bench: Bench, backbone: BackboneConfig, images: TuningImages, device: str, watch: Any = None, **settings: Any
) -> list[Record]:
    """Fine-tune with the small-data recipe into a folder that is thrown away; its metrics."""
    asked = FinetuneConfig(batch_size=bench.sizes.tuned_batch, preset="small").model_copy(update=settings)
    folder = bench.scratch / f"tuned-{next(_numbers)}"
    context = Context(device=device) if watch is None else Context(watch, device)
    finetune(backbone, images, asked, 0, folder, context)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    shutil.rmtree(folder)
    return metrics


def bare_step(bench: Bench, config: BackboneConfig) -> Callable[[], None]:
    """A step of all weights on one batch in the device's memory, in the precision that a fine-tune takes."""
    model: Any = build_model(config)
    model.reset_classifier(CLASSES)
    freeze_batch_norm(model.to(bench.device).train())
    n, size = bench.sizes.tuned_batch, config.image_size
    images, labels = torch.randn(n, 3, size, size, device=bench.device), torch.arange(n, device=bench.device) % CLASSES
    if not hasattr(model, "patch_embed"):
        model.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5)
    autocast = torch.autocast(bench.device, torch.bfloat16, enabled=bench.device == "cuda")

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        with autocast:
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimiser.step()

    return step
