"""How `plan` is to work, as it is asked on the command line."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Planning:
    """What is planned for.

    Attributes:
        workers: n of the last column; None: 4.
        seconds: that the calibration may take.
        images: of id-train, where there are none to count; None: they are listed.
        classes: of these images.
        test_images: of each other set.
        as_json: whether the plan is printed as JSON.
    """

    workers: int | None = None
    seconds: float = 60
    images: int | None = None
    classes: int | None = None
    test_images: int | None = None
    as_json: bool = False
