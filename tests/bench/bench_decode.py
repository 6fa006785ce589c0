"""How fast images are decoded, by how many threads and processes, and what another way to decode changes.

``make bench-decode``: from the bytes of JPEG files (500 x 375 pixels, ImageNet's size) to the pixels of a network at
224, hash included, by the parts of the extraction; nothing computes beside it. Perfect scaling is the rate of one
thread, as often as there are of them, up to the cores.

``--ways``: each way to decode by one core, files of several sizes; on a GPU nvJPEG's too.

``--difference SOURCE``: features of the same images decoded another way, beside those by Pillow in full. Any source of
labelled images; those that are decoded no other way are not counted.
"""

import argparse
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_images

import pipeline.__main__  # noqa: F401  the process is set up as the command line sets it up
from stages.config import BackboneConfig
from stages.extraction.decoding import Decoders, DecodingProcesses, DecodingThreads
from stages.extraction.encoder import Encoder
from stages.extraction.gpu_jpeg import decode_left
from stages.extraction.reader import Reader
from stages.inputs.images import ImageReader, SampleTable, list_images
from stages.machine import default_device, usable_cores
from stages.networks.backbone import Backbone, load_backbone
from stages.networks.preprocessing import Preprocessing
from stages.scorers.neighbours.bank import FeatureBank

LITE0 = BackboneConfig(name="tf_efficientnet_lite0", weights="embedded")
IMAGENET = {
    "input_size": (3, 224, 224),
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_pct": 0.875,
    "crop_mode": "center",
}
SIZES = ((500, 375), (1600, 1200), (4000, 3000))
A_WORKER, AHEAD = 16, 3  # images of a batch that each has to decode, and batches on their way
NEIGHBOURS = 5


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20, help="for all threads and processes together")
    parser.add_argument("--ways", action="store_true", help="time each way to decode instead")
    parser.add_argument("--difference", metavar="SOURCE", help="compare features of these images instead")
    parser.add_argument("--decode", choices=("draft", "cuda"), default="draft", help="the way that is compared")
    parser.add_argument("--size", type=int, default=224, help="pixels of the network whose features are compared")
    parser.add_argument("--images", type=int, default=200, help="how many are compared")
    given = parser.parse_args()
    if given.difference:
        samples = list_images(given.difference)
        found = difference(samples, given.decode, given.size, given.images, default_device())
        Console().print(difference_table(found, given.decode, given.size))
    elif given.ways:
        Console().print(ways_table(default_device(), given.seconds))
    else:
        Console().print(scaling_table(given.seconds))


# --------------------------------------------------------------------------------------------- threads and processes


def scaling_table(seconds: float) -> Table:
    """Images a second by the number of threads and of processes."""
    cores = usable_cores()
    counts = [n for n in (2**power for power in range(10)) if n < cores] + [cores]
    each = seconds / (2 * len(counts) + 5)  # starting processes takes about as long as five of them
    reader = Reader(ImageReader([jpeg(500, 375)]), Preprocessing(IMAGENET, "pil"))
    table = Table(title=f"images a second, decoded and resized to 224; {cores} cores")
    for column in ("decoding", *map(str, counts)):
        table.add_column(column, justify="right")
    alone = 0.0
    for what in ("threads", "processes"):
        rates, starts = [], []
        for n in counts:
            start = time.perf_counter()
            with _decoders(what, n) as decoders:
                if isinstance(decoders, DecodingProcesses):
                    decoders.started()
                with decoders.begin(reader, [0] * (A_WORKER * n)):
                    starts.append(time.perf_counter() - start)
                rates.append(rate(decoders, reader, n, each))
        alone = alone or rates[0]
        table.add_row(what, *(f"{found:.0f}" for found in rates))
        table.add_row("of perfect", *(f"{found / (alone * n):.2f}" for found, n in zip(rates, counts, strict=True)))
        table.add_row("first batch, s", *(f"{seconds:.2f}" for seconds in starts))
    return table


def _decoders(what: str, n: int) -> Decoders:
    preprocessing = Preprocessing(IMAGENET, "pil")
    return DecodingThreads(n) if what == "threads" else DecodingProcesses(n, preprocessing, A_WORKER * n, AHEAD)


def rate(decoders: Decoders, reader: Reader, n: int, seconds: float) -> float:
    """Images a second that `n` workers give."""
    rows, done = [0] * (A_WORKER * n), 0
    start = time.perf_counter()
    begun = [decoders.begin(reader, rows) for _ in range(AHEAD)]
    while begun:
        with begun.pop(0):
            done += len(rows)
        if time.perf_counter() - start < seconds:
            begun.append(decoders.begin(reader, rows))
    return done / (time.perf_counter() - start)


def jpeg(width: int, height: int) -> bytes:
    """One of scikit-learn's photographs as a JPEG file of some size."""
    out = io.BytesIO()
    Image.fromarray(load_sample_images().images[0]).resize((width, height)).save(out, "JPEG", quality=90)
    return out.getvalue()


# ------------------------------------------------------------------------------------------------- ways to decode


def ways_table(device: str, seconds: float) -> Table:
    """Images a second by the way to decode and the size of the files."""
    rates = dict(ways(device, seconds, 224))
    table = Table(title=f"images a second of one core, decoded and resized to 224; {device}")
    for column in ("decode", *(f"{width} x {height}" for width, height in SIZES)):
        table.add_column(column, justify="right")
    for decode in dict.fromkeys(decode for decode, _ in rates):
        table.add_row(decode, *(f"{rates[decode, size]:.1f}" for size in SIZES))
    return table


def ways(device: str, seconds: float, image_size: int) -> Iterator[tuple[tuple[str, tuple[int, int]], float]]:
    """Images a second for each way to decode and size of files: of a core's time, by nvJPEG in batches of 128."""
    names = ("pil", "draft", "cuda") if device == "cuda" else ("pil", "draft")
    for size in SIZES:
        files = ImageReader([jpeg(*size)] * (128 if size == SIZES[0] else 16))
        for decode in names:
            preprocessing = Preprocessing(IMAGENET | {"input_size": (3, image_size, image_size)}, decode)
            n, clock = (len(files), time.perf_counter) if decode == "cuda" else (1, time.thread_time)
            _decode(files, preprocessing, range(n), device)
            start, done = clock(), 0
            while clock() - start < seconds / (len(SIZES) * len(names)):
                _decode(files, preprocessing, range(n), device)
                done += n
            yield (decode, size), done / (clock() - start)


def _decode(files: ImageReader, preprocessing: Preprocessing, rows: Sequence[int], device: str) -> list[torch.Tensor]:
    """Pixels of some images, those that can be decoded; on a GPU all that was asked for is done."""
    reader = Reader(files, preprocessing)
    read = decode_left([reader.read(row) for row in rows], preprocessing, torch.device(device))
    if device == "cuda":
        torch.cuda.synchronize()
    return [image.content for image in read if isinstance(image.content, torch.Tensor)]


# ------------------------------------------------------------------------------------------------- what it changes


class Difference(NamedTuple):
    """Features by another way to decode beside those by Pillow in full.

    Attributes:
        n: images whose pixels are others,
        of: among so many.
        pixels: mean difference of theirs, of 255.
        largest, mean: ‖a − b‖ / ‖b‖ of ``cls`` of an image, over these.
        accuracy: of the nearest neighbours among all others, by Pillow in full; fraction,
        changed: by the other way,
        crossed: and of images by the other way among those by Pillow.
    """

    n: int
    of: int
    pixels: float
    largest: float
    mean: float
    accuracy: float
    changed: float
    crossed: float


def difference(samples: SampleTable, decode: str, image_size: int, n: int, device: str) -> Difference:
    """Compare ``cls`` of EfficientNet-Lite0 by a way to decode with those by Pillow in full.

    Args:
        samples: images with labels.
        decode: the way.
        image_size: pixels that the network sees.
        n: images, spread evenly over the samples.
        device: where it runs.
    """
    rows = np.unique(np.linspace(0, len(samples) - 1, n).astype(int))
    networks = {
        way: load_backbone(LITE0.model_copy(update={"image_size": image_size, "decode": way}), device=device)
        for way in ("pil", decode)
    }
    pixels = {way: _decode(samples.reader(), net.preprocessing, rows, device) for way, net in networks.items()}
    cls = {way: _features(net, pixels[way]) for way, net in networks.items()}
    away = [float((a.cpu().int() - b.cpu().int()).abs().float().mean()) for a, b in zip(*pixels.values(), strict=True)]
    others = np.asarray(away) > 0
    if not others.any():
        raise SystemExit(f"no image of {samples.source} is decoded otherwise by {decode!r} at {image_size} pixels")
    error = np.linalg.norm(cls[decode] - cls["pil"], axis=1) / np.linalg.norm(cls["pil"], axis=1)
    labels = samples.labels[rows]
    return Difference(
        int(others.sum()),
        len(rows),
        float(np.mean(np.asarray(away)[others])),
        float(error[others].max()),
        float(error[others].mean()),
        neighbours_accuracy(cls["pil"], cls["pil"], labels),
        neighbours_accuracy(cls[decode], cls[decode], labels),
        neighbours_accuracy(cls[decode], cls["pil"], labels),
    )


def _features(network: Backbone, pixels: Sequence[torch.Tensor]) -> NDArray[np.float32]:
    spec = network.feature_spec("float32", "none")
    encoder, batch = Encoder(network, spec), spec.compute["batch"]
    return np.concatenate(
        [encoder.encode(pixels[start : start + batch])["cls"].copy() for start in range(0, len(pixels), batch)]
    )


def neighbours_accuracy(queries: NDArray[np.float32], bank: NDArray[np.float32], labels: NDArray[np.integer]) -> float:
    """Share of images whose class most of their nearest neighbours have, none of an image itself.

    Args:
        queries: ``[n, D]``, an image a row.
        bank: ``[n, D]``, the same images.
        labels: ``[n]``.
    """
    _, near = FeatureBank(bank).search(queries, NEIGHBOURS + 1)
    own = np.arange(len(queries))[:, None]
    right = 0
    for row, places in enumerate(near):
        others = labels[places[places != own[row]][:NEIGHBOURS]]
        right += int(np.bincount(others[others >= 0], minlength=1).argmax() == labels[row])
    return right / len(queries)


def difference_table(found: Difference, decode: str, image_size: int) -> Table:
    """A line each."""
    table = Table(title=f"EfficientNet-Lite0 at {image_size} px, {decode!r} beside 'pil'", show_header=False)
    lines: Mapping[str, str] = {
        "images whose pixels are others": f"{found.n} of {found.of}",
        "pixels, mean difference of 255": f"{found.pixels:.2f}",
        "cls, ‖a − b‖ / ‖b‖, largest": f"{found.largest:.3f}",
        "cls, ‖a − b‖ / ‖b‖, mean": f"{found.mean:.3f}",
        f"{NEIGHBOURS}-NN accuracy, 'pil'": f"{100 * found.accuracy:.1f} %",
        f"{NEIGHBOURS}-NN accuracy, {decode!r}": f"{100 * found.changed:.1f} %",
        f"{NEIGHBOURS}-NN accuracy, {decode!r} among 'pil'": f"{100 * found.crossed:.1f} %",
    }
    for line in lines.items():
        table.add_row(*line)
    return table


if __name__ == "__main__":
    main()
