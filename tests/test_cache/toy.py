"""A small cache that any process can make: features follow from the input's number."""

import os
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cache import CacheBuilder, Failure, FeatureCache, FeatureSpec, InputSet, InputTable, commit_shard, plan_shards

CLASSES = ("Katze", "犬", "été")


def make_spec(**changes) -> FeatureSpec:
    fields = {
        "backbone": "toy_vit",
        "weights_sha": "0a1b",
        "transform": {"mean": (0.5, 0.5, 0.5), "interpolation": "bicubic"},
        "image_size": 28,
        "expert_blocks": 1,
        "patches": "full",
        "dtype": "float16",
        "cls_dim": 6,
        "tap_dim": 4,
        "n_registers": 2,
        "grid": (2, 3),
        "compute": {"precision": "float32", "device": "cpu", "batch": 2},
        "semantics": 1,
    }
    return FeatureSpec(**fields | changes)


def make_inputs(n: int = 23) -> InputTable:
    ids = [f"{CLASSES[i % 3]}/{i:03d}.png" for i in range(n)]
    return InputTable.listing(ids, np.arange(n) % 3, np.arange(n) + 100, np.arange(n) * 10**9)


def features(spec: FeatureSpec, number: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    return {name: rng.standard_normal(shape, np.float32) for name, (shape, _) in spec.datasets().items()}


def fails(number: int) -> bool:
    """Every seventh input, and all of the third shard."""
    return number % 7 == 3 or 8 <= number < 12


def commit(path: Path, spec: FeatureSpec, inputs: InputTable, plan) -> None:
    numbers = range(plan.start, plan.stop)
    failed = np.array([fails(i) for i in numbers])
    hashes = np.array([np.random.default_rng(i).integers(0, 256, 32) for i in numbers]).astype(np.uint8)
    used = [features(spec, i) for i in numbers if not fails(i)]
    arrays = {
        name: np.array([row[name] for row in used], np.float32).reshape(len(used), *shape)
        for name, (shape, _) in spec.datasets().items()
    }
    failures = [Failure(inputs.ids[i], f"truncated after {i} bytes") for i in numbers if fails(i)]
    commit_shard(path, plan, arrays, inputs[plan.start : plan.stop].with_results(hashes, failed), failures)


def begin(
    path: Path,
    spec: FeatureSpec | None = None,
    inputs: InputTable | None = None,
    *,
    dataset: str = "pets",
    class_names: Sequence[str] = CLASSES,
    **changes,
) -> CacheBuilder:
    spec, inputs = spec or make_spec(), make_inputs() if inputs is None else inputs
    plans = plan_shards(len(inputs), spec.row_bytes, max_rows=4, multiple=2)
    arguments = {"plans": plans, "made_with": {"torch": "2.14"}}
    return CacheBuilder.begin(path, InputSet(dataset, inputs, class_names), spec, **arguments | changes)


def fill(path: Path, spec: FeatureSpec | None = None, inputs: InputTable | None = None, pause_s=0.0) -> FeatureCache:
    spec, inputs = spec or make_spec(), make_inputs() if inputs is None else inputs
    with begin(path, spec, inputs) as builder:
        for plan in builder.pending():
            commit(path, spec, inputs, plan)
            time.sleep(pause_s)
        return builder.seal()


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def restore(path: Path, content: dict[str, bytes]) -> Path:
    path.mkdir(exist_ok=True)
    for file in path.iterdir():
        file.unlink()
    for name, data in content.items():
        (path / name).write_bytes(data)
    return path


def fork(work: Callable[[], object]) -> int:
    """Do work in a process of its own; gives its number, see `wait`."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait(pid: int) -> int:
    """Exit status of a forked process; the negative signal where one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
