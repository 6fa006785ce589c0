"""Refined features: what the mixture makes of cached tokens, kept so that re-scoring runs no network.

A cluster makes them a part at a time: whole batches, so that the bits are those of one process, in files that are put
together when all are there. A run that was killed goes on with the parts that are missing.
"""

import io
import shutil
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache import FeatureCache
from cache.files import write_file
from cache.fingerprint import fingerprint
from stages.context import Cluster, Context
from stages.errors import StageError
from stages.files.rows import RowFormat, described_rows
from stages.files.tensors import read_handed, write_tensors
from stages.id_data.rows import unit
from stages.id_data.tokens import as_tokens, bytes_of_row, stored_tokens
from stages.mixture.model import MixtureOfFeatureExperts
from stages.mixture.refined import Refined, Routes, load_refined
from stages.networks.repeatable import repeatable, torch_threads
from stages.networks.tokens import Tokens
from stages.networks.transfer import Fetched, Tensors, sent_ahead
from stages.progress import NullProgress, Progress

PART_ROWS = 2048  # of what a cluster's worker refines at a time; batches of the CPU divide it
REFINE_BATCH = 64  # rows, on the CPU; on a GPU at least
_GPU_BYTES, _GPU_ROWS = 64 << 20, 1024  # what is read of them, and rows, at most


def refine(
    mixture: MixtureOfFeatureExperts, cache: FeatureCache, routes: Routes = Routes(), context: Context = Context()
) -> Refined:
    """Run the mixture over a cache, in memory; see `refine_to` for rows that are to be kept, or are many.

    Args:
        mixture: trained.
        cache: of any set whose fingerprint is the one that the mixture was trained on.
        routes: which of its rows, and where they are sent.
        context: counts rows; the mixture runs on its device, and is brought back from there. In float32 everywhere: a
            GPU gives the CPU's features to rounding.
    """
    n = routes.count(cache)
    columns = _columns(mixture, cache)
    whole: dict[str, Any] = {name: np.empty((n, *column.shape), column.dtype) for name, column in columns.items()}
    start = 0
    with _placed(mixture, context.place):
        for batch in _batches(mixture, cache, routes, context.progress):
            stop = start + len(batch.expert)
            for name, array in vars(batch).items():
                whole[name][start:stop] = array
            start = stop
    return Refined(**whole)


def refine_to(
    path: Path,
    identity: Mapping[str, str],
    mixture: MixtureOfFeatureExperts,
    cache: FeatureCache,
    routes: Routes = Routes(),
    context: Context = Context(),
) -> Refined:
    """Run the mixture over a cache into a file, in memory that does not grow with N.

    Args:
        path: of the safetensors file; the JSON beside it says, last, of which mixture and which features it is.
        identity: what that is.
        mixture: as for `refine`, like all that follows.
        cache: of the set.
        routes: likewise,
        context: likewise; of its cluster, where there is one, workers do what is more than one part.

    Returns:
        What stands in the file, as `load_refined` gives it.
    """
    n = routes.count(cache)
    if context.cluster is not None and n > PART_ROWS:
        refine_in_parts(path, identity, mixture, cache, routes, context, PART_ROWS)
    else:
        with _placed(mixture, context.place), described_rows(path, _columns(mixture, cache), n, identity) as writer:
            for batch in _batches(mixture, cache, routes, context.progress):
                writer.append(vars(batch))
    written = load_refined(path, identity)
    if written is None:
        raise StageError(f"{path} was written and cannot be read: another process may be at work there")
    return written


@dataclass(frozen=True)
class RefinePart:
    """Some rows of a set, refined by whoever takes this: plain and small.

    Attributes:
        network: file of the mixture.
        device: see `Context`.
        cache: folder, or URL, of the sealed cache.
        digest: of its bytes.
        rows, expert: the part's own `Routes`.
        path: of the file that they go to.
        threads: of one process that would refine them all; their number is seen in the last bits.
    """

    network: str
    device: str
    cache: str
    digest: str
    rows: NDArray[np.int64]
    expert: NDArray[np.int64] | None
    path: str
    threads: int

    def __str__(self) -> str:
        return f"rows {self.rows[0]} to {self.rows[-1]} of {self.cache}, to be refined"


def refine_in_parts(
    path: Path,
    identity: Mapping[str, str],
    mixture: MixtureOfFeatureExperts,
    cache: FeatureCache,
    routes: Routes,
    context: Context,
    part_rows: int,
) -> None:
    """What `refine_to` writes, made by the context's cluster.

    Args:
        path: as there, like all that follows but the last.
        identity: likewise.
        mixture: likewise.
        cache: likewise.
        routes: likewise.
        context: likewise.
        part_rows: rows of a part, a multiple of `REFINE_BATCH`.

    Raises:
        StageError: as `stages.context.Cluster.map`; parts that are done are kept.
    """
    assert context.cluster is not None
    folder, n = path.parent / f".{path.stem}.parts-{fingerprint(dict(identity))[:16]}", routes.count(cache)
    for other in path.parent.glob(f".{path.stem}.parts-*"):
        if other != folder:  # of another mixture or set
            shutil.rmtree(other, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    network = folder / "mixture.pt"
    if not network.exists():
        pickled = io.BytesIO()
        torch.save(mixture, pickled)
        write_file(network, pickled.getvalue())
    numbers = np.arange(n, dtype=np.int64) if routes.rows is None else routes.rows
    parts = [
        RefinePart(
            str(network.absolute()),
            context.device,
            str(cache.path.absolute() if isinstance(cache.path, Path) else cache.path),
            cache.digest,
            numbers[start : start + part_rows],
            None if routes.expert is None else routes.expert[start : start + part_rows],
            str((folder / f"{start:012d}.safetensors").absolute()),
            torch.get_num_threads(),
        )
        for start in range(0, n, part_rows)
    ]
    _do_parts(parts, cache, context.cluster, context.progress)
    with described_rows(path, _columns(mixture, cache), n, identity) as writer:
        for part in parts:
            writer.append(read_handed(Path(part.path)))
    shutil.rmtree(folder)


def _do_parts(parts: Sequence[RefinePart], cache: FeatureCache, cluster: Cluster, progress: Progress) -> None:
    pending = [part for part in parts if not Path(part.path).exists()]
    n, left = (sum(len(part.rows) for part in some) for some in (parts, pending))
    progress.start(n, unit(cache), f"refine {cache.manifest.dataset}")
    progress.advance(n - left)
    for done in cluster.map(refine_part, pending):
        progress.advance(done)
    progress.close()


def refine_part(part: RefinePart) -> int:
    """Refine one part in whatever process this is, which keeps the mixture for the next; returns how many rows."""
    mixture, cache = _mixture_of_process(part.network, Context(device=part.device).place), _opened(part.cache)
    if cache.digest != part.digest:
        raise StageError(f"{part.cache} was replaced while its rows were refined: run the same again")
    with repeatable(mixture.group.device), torch_threads(part.threads):
        batches = list(_batches(mixture, cache, Routes(part.expert, part.rows), NullProgress()))
    columns = {name: np.concatenate([vars(batch)[name] for batch in batches]) for name in vars(batches[0])}
    write_tensors(Path(part.path), columns)
    return len(part.rows)


@lru_cache(maxsize=1)
def _mixture_of_process(path: str, device: str) -> MixtureOfFeatureExperts:
    # A module, pickled: what an expert's end is made of, only the backbone that it was cut from could say otherwise.
    mixture: MixtureOfFeatureExperts = torch.load(path, map_location="cpu", weights_only=False)
    return mixture.to(device)


@lru_cache(maxsize=4)
def _opened(path: str) -> FeatureCache:
    return FeatureCache.open(path)


@torch.inference_mode()
def _batches(
    mixture: MixtureOfFeatureExperts, cache: FeatureCache, routes: Routes, progress: Progress
) -> Iterator[Refined]:
    mixture.eval()
    device, n, rows, expert = mixture.group.device, routes.count(cache), routes.rows, routes.expert
    reads = mixture.config.reads
    size = rows_of_batch(bytes_of_row(cache, reads), device)
    batches = [slice(start, min(start + size, n)) for start in range(0, n, size)]

    def read(batch: slice) -> Tensors:
        stored = stored_tokens(cache, batch if rows is None else rows[batch], reads)
        forced = {} if expert is None else {"forced": torch.from_numpy(np.ascontiguousarray(expert[batch]))}
        return stored | forced

    progress.start(n, unit(cache), f"refine {cache.manifest.dataset}")
    # A batch is taken from a GPU while that computes the next one.
    made: deque[list[Fetched]] = deque()
    for stored in sent_ahead((partial(read, batch) for batch in batches), device):
        made.append([Fetched(column) for column in _refined(mixture, as_tokens(stored), stored.get("forced"))])
        if len(made) > 1:
            yield _taken(made.popleft(), progress)
    while made:
        yield _taken(made.popleft(), progress)
    progress.close()


def rows_of_batch(row_bytes: int, device: torch.device) -> int:
    """How many rows a pass has: on a GPU more of small ones, or it waits for the host that starts its kernels.

    >>> [rows_of_batch(n, torch.device("cuda")) for n in (20_000, 200_000, 3_000_000)]
    [1024, 335, 64]
    >>> rows_of_batch(200_000, torch.device("cpu"))
    64
    """
    if device.type != "cuda":
        return REFINE_BATCH
    return min(max(_GPU_BYTES // row_bytes, REFINE_BATCH), _GPU_ROWS)


def _refined(mixture: MixtureOfFeatureExperts, tokens: Tokens, forced: Tensor | None) -> tuple[Tensor, ...]:
    """The fields of `Refined`, where the mixture is."""
    gate, probability = mixture.route(tokens)
    chosen = gate.argmax(1)
    if forced is not None:
        chosen = torch.where(forced >= 0, forced, chosen)
    out = mixture(tokens, chosen)
    others = _others(mixture, tokens)
    return out.features, out.logits, out.other, out.expert, gate, probability.argmax(1), others


@torch.inference_mode()
def refine_tokens(mixture: MixtureOfFeatureExperts, tokens: Tokens, forced: Tensor | None = None) -> Refined:
    """One batch.

    Args:
        mixture: in evaluation mode.
        tokens: of B images, on the mixture's device.
        forced: ``[B]`` sends each row to a given expert; −1, and None, leave it to the router.
    """
    return Refined(*(column.cpu().numpy() for column in _refined(mixture, tokens, forced)))


def _taken(columns: list[Fetched], progress: Progress) -> Refined:
    refined = Refined(*(column.array() for column in columns))
    progress.advance(len(refined.expert))
    return refined


@contextmanager
def _placed(mixture: MixtureOfFeatureExperts, device: str) -> Iterator[None]:
    """The mixture on a device, computing there as precisely as a CPU does, and back where it was."""
    before = mixture.group.device
    mixture.to(device)
    try:
        with repeatable(device):
            yield
    finally:
        mixture.to(before)


def _columns(mixture: MixtureOfFeatureExperts, cache: FeatureCache) -> dict[str, RowFormat]:
    """What `Refined` has of each row."""
    real, index = np.dtype(np.float32), np.dtype(np.int64)
    n_experts = mixture.n_experts
    return {
        "features": RowFormat(real, (cache.spec.cls_dim,)),
        "logits": RowFormat(real, (mixture.config.n_classes,)),
        "other": RowFormat(real),
        "expert": RowFormat(index),
        "gate": RowFormat(real, (n_experts,)),
        "router_class": RowFormat(index),
        "others": RowFormat(real, (n_experts if _says_other_of_all(mixture) else 0,)),
    }


def _others(mixture: MixtureOfFeatureExperts, tokens: Tokens) -> Tensor:
    """``[B, E]`` each group's log odds of "other"; ``[B, 0]`` where that needs E experts a row, or there is none."""
    if not _says_other_of_all(mixture):
        return tokens.cls[:, :0]
    outputs = [expert(tokens)[1] for expert in mixture.experts]  # over the group's classes and, last, "other"
    return torch.stack([each[:, -1] - each[:, :-1].logsumexp(1) for each in outputs], dim=1)


def _says_other_of_all(mixture: MixtureOfFeatureExperts) -> bool:
    return mixture.config.kind == "frozen" and mixture.n_experts > 1  # heads on the same features, each with an "other"
