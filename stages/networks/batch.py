"""How many images a forward pass of an extraction has on a GPU: as many as its memory holds, by a short trial.

The number is part of what features are (`cache.FeatureSpec.compute`): kernels, and so the last bits, depend on it. It
is chosen once, before the first cache of a network, and from then on the caches say it.

In a training rows come in all numbers. For each of them cuDNN chooses the kernels of every convolution anew, which
takes longer than some hundred passes: so passes are `filled` up to one of a few.
"""

from collections.abc import Callable, Iterable

import torch

CHOICES = (8, 16, 32, 64, 128, 256)  # more images compute no faster, and the first of them wait for the last
_TRIED = (8, 16)
_SHARE = 0.25  # of the free memory: other workers, and what torch cannot put together again, take some as well
_MOST_INPUT = 256 << 20  # bytes of the images of a pass: so large ones keep a GPU busy with fewer
_COPIES = 2  # of them beside those that the pass is given: on their way, as pixels and as numbers


def choose_batch(peak: Callable[[int], int], free: int, image_bytes: int) -> int:
    """The largest of `CHOICES` that fits; the smallest where none does.

    Args:
        peak: bytes of memory that a pass of so many images takes at its height.
        free: bytes that there are.
        image_bytes: of one transformed image.

    >>> choose_batch(lambda n: 2**30 + n * 2**24, free=80 * 2**30, image_bytes=3 * 4 * 224**2)
    256
    >>> choose_batch(lambda n: 2**30 + n * 2**24, free=8 * 2**30, image_bytes=3 * 4 * 224**2)
    32
    """
    few, many = (peak(n) for n in _TRIED)
    each = max(many - few, 0) / (_TRIED[1] - _TRIED[0])
    fixed = max(few - each * _TRIED[0], 0)
    fits = [
        n
        for n in CHOICES
        if fixed + n * (each + _COPIES * image_bytes) <= _SHARE * free and n * image_bytes <= _MOST_INPUT
    ]
    return max(fits, default=CHOICES[0])


def batch_of_gpu(encode: Callable[[torch.Tensor], object], image_size: int, device: torch.device) -> int:
    """The same for a network on a GPU, which is run on a few empty images.

    Args:
        encode: one forward pass of ``[n, 3, H, W]``.
        image_size: H and W.
        device: the GPU.
    """
    shape = (3, image_size, image_size)

    def peak(n: int) -> int:
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        encode(torch.zeros(n, *shape, device=device))
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    try:
        peak(_TRIED[0])  # workspaces that stay come with the first
        return choose_batch(peak, free_bytes(device), 4 * 3 * image_size**2)
    except torch.cuda.OutOfMemoryError:
        return CHOICES[0]
    finally:
        torch.cuda.empty_cache()  # passes have streams of their own, which do not take what this one has left


def free_bytes(device: torch.device) -> int:
    """Of a GPU's memory, what torch can take: what nobody has, and what it holds and does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def rows_of_pass(n: int) -> int:
    """The next number of rows of which there are few: a multiple of 8 and of an eighth of the next power of two.

    >>> [rows_of_pass(n) for n in (1, 8, 9, 33, 64, 65, 300)]
    [8, 8, 16, 40, 64, 80, 320]
    """
    step = 1 << max(3, (n - 1).bit_length() - 3)
    return -(-n // step) * step


def filled(rows: torch.Tensor, sizes: Iterable[int]) -> torch.Tensor:
    """Rows of a pass, the last of them over and over up to the next of some sizes; as they are where all are smaller.

    >>> filled(torch.arange(3), (8, 4)).tolist(), filled(torch.arange(5), (4,)).tolist()
    ([0, 1, 2, 2], [0, 1, 2, 3, 4])
    """
    n = len(rows)
    size = min((size for size in sizes if size >= n), default=n)
    return rows if size == n else torch.cat([rows, rows[-1:].expand(size - n, *rows.shape[1:])])
