"""Pixels as the bytes of an image file, without loss and without a compressor on which the bytes would depend."""

import numpy as np
from numpy.typing import NDArray


def to_netpbm(pixels: NDArray[np.uint8]) -> bytes:
    r"""Binary netpbm of pixels [h, w] (gray) or [h, w, 3] (RGB).

    >>> to_netpbm(np.array([[65, 66]], np.uint8))
    b'P5\n2 1\n255\nAB'
    """
    kind = "P5" if pixels.ndim == 2 else "P6"
    return f"{kind}\n{pixels.shape[1]} {pixels.shape[0]}\n255\n".encode() + pixels.tobytes()
