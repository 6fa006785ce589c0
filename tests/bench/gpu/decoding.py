"""JPEG files decoded on the device: what it changes, what fails, and how fast it and the cores decode."""

import time

import torch

from stages.extraction.decoding import DecodingProcesses
from stages.extraction.gpu_jpeg import decode_left
from stages.extraction.reader import Reader
from stages.inputs.images import ImageReader, decode_image, list_images
from stages.machine import usable_cores
from stages.networks.preprocessing import Preprocessing
from tests.bench.bench_decode import A_WORKER, AHEAD, IMAGENET, difference, jpeg, rate, ways
from tests.bench.gpu.step import Bench
from tests.test_stages.jpegs import damaged, odd, plain


def changes(bench: Bench) -> None:
    """Features of scikit-learn's digits as JPEG files of 96 pixels, decoded there and by Pillow."""
    folder, table = bench.scratch / "digits-as-jpeg", list_images("sklearn:digits[0-9]/test")
    n = bench.sizes.decoded
    for row in range(0, len(table), len(table) // n):
        path = (folder / table.ids[row]).with_suffix(".jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        decode_image(table.reader().read(row)).resize((96, 96)).save(path, quality=90)
    found = difference(list_images(str(folder)), "cuda", bench.sizes.image_size, n, bench.device)
    bench.measure("images whose pixels are others, of all", found.n / found.of)
    bench.measure("their pixels, mean difference of 255", found.pixels, at_most=3)
    bench.measure("their cls, ‖a − b‖ / ‖b‖, largest", found.largest)
    bench.measure("their cls, ‖a − b‖ / ‖b‖, mean", found.mean, at_most=0.1)
    bench.measure("5-NN accuracy by Pillow", found.accuracy)
    bench.measure("5-NN accuracy by the device, difference", abs(found.changed - found.accuracy), at_most=0.05)
    bench.measure("5-NN accuracy among Pillow's, difference", abs(found.crossed - found.accuracy), at_most=0.05)


def failures(bench: Bench) -> None:
    """Whole, odd and damaged files: how many of them end otherwise than by Pillow."""
    files = ImageReader([*plain().values(), *odd().values(), *damaged(bench.sizes.decoded // 3), b"", b"no image"])
    ends = []
    for decode in ("cuda", "pil"):
        preprocessing = _preprocessing(bench, decode)
        reader = Reader(files, preprocessing)
        read = decode_left([reader.read(row) for row in range(len(files))], preprocessing, torch.device(bench.device))
        ends.append([image.content if isinstance(image.content, str) else "pixels" for image in read])
    bench.measure("files that end otherwise", sum(a != b for a, b in zip(*ends, strict=True)), at_most=0)
    bench.measure("files that cannot be used", sum(end != "pixels" for end in ends[0]))


def speed(bench: Bench) -> None:
    """Images a second by each way to decode, and by a process on each core; `feeding.decoder` has threads."""
    for (decode, (width, height)), found in ways(bench.device, 6 * bench.sizes.seconds, bench.sizes.image_size):
        bench.measure(f"{decode!r}, {width} x {height}, one thread", found, "images/s")
    if bench.device == "cpu":  # beside which nobody starts processes
        return
    n, preprocessing = usable_cores(), _preprocessing(bench, "pil")
    reader, start = Reader(ImageReader([jpeg(500, 375)]), preprocessing), time.perf_counter()
    with DecodingProcesses(n, preprocessing, A_WORKER * n, AHEAD) as decoders:
        decoders.started()
        bench.measure(f"{n} processes start in", time.perf_counter() - start, "s")
        bench.measure(f"'pil', 500 x 375, {n} processes", rate(decoders, reader, n, bench.sizes.seconds), "images/s")


def _preprocessing(bench: Bench, decode: str) -> Preprocessing:
    return Preprocessing(IMAGENET | {"input_size": (3, bench.sizes.image_size, bench.sizes.image_size)}, decode)
