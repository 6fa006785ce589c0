"""Images as the network of a detector takes them, read and decoded by several threads."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from stages.detection.detector import Detector
from stages.inputs.images import ImageError, ImageReader
from stages.machine import usable_cores


def prepared_images(detector: Detector, images: ImageReader) -> list[NDArray[np.uint8] | str]:
    """Each image ``[3, size, size]``, or why it cannot be used."""

    def read(index: int) -> NDArray[np.uint8] | str:
        try:
            return detector.prepare(images.read(index))
        except ImageError as error:
            return str(error)

    with ThreadPoolExecutor(max(2, usable_cores())) as pool:
        return list(pool.map(read, range(len(images))))
