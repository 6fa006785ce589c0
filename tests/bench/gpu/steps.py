"""The steps of the check, in order of worth. A step is added here: a line, whose function takes a `Bench`.

What it is called and proves is read in the table; see `tests.bench.gpu.step` for how one is written. That the device
computes what it should comes before how fast, and ViT-S before EfficientNet-Lite0: for each convolution, number of
rows and thread cuDNN chooses a kernel once, which takes a convolutional network seconds. What compiles comes late.
"""

from collections.abc import Mapping
from typing import Any

from tests.bench.gpu.step import Step

HERE = "tests.bench.gpu"
NAMES: Mapping[str, str] = {
    "lite0": "EfficientNet-Lite0",
    "conv": "EfficientNet-Lite0",
    "small": "ViT-S/14",
    "base": "ViT-B/14",
    "large": "ViT-L/14",
}  # those of DINOv2 have seeded weights


def of_network(what: str, proves: str, run: str, name: str, **limits: Any) -> Step:
    """A step on one network."""
    return Step(f"{what}: {NAMES[name]}", proves, f"{HERE}.{run}", {"name": name}, **limits)


def features(name: str) -> Step:
    """Features of a network."""
    proves = "extraction gives the CPU's features, to a tolerance of each precision"
    return of_network("features", proves, "features:compare", name)


def mixture(name: str) -> Step:
    """A mixture on its features."""
    proves = "a mixture that is trained has the CPU's losses; rows a second, memory"
    return of_network("mixture", proves, "training:mixture", name)


def fine_tune(name: str) -> Step:
    """Its fine-tune."""
    proves = "a backbone that is fine-tuned has the CPU's losses; images a second, memory"
    return of_network("fine-tune", proves, "tuning:fine_tune", name, limit_s=75)


def same_training(name: str) -> Step:
    """A mixture twice."""
    proves = "a mixture that is trained again has the same bits, in half precision and in full"
    return of_network("same training", proves, "training:same_bits", name)


def refining(name: str) -> Step:
    """What follows a mixture's training."""
    proves = "rows as the experts see them, and heads that are fitted on them, are the CPU's"
    return of_network("refining", proves, "refining:refining", name)


def experts(name: str) -> Step:
    """Both ways of experts."""
    proves = "experts that are stacked compute what they do one after another; rows a second both ways"
    return of_network("experts", proves, "experts:compare", name, limit_s=45)


def of_size(what: str, proves: str, run: str, name: str, large: bool = False, **limits: Any) -> Step:
    """A step on images of one of both sizes."""
    title = f"{what}: {NAMES[name]}, {'518' if large else '224'} px"
    return Step(title, proves, f"{HERE}.{run}", {"name": name, "large": large}, **limits)


def images_a_second(name: str, large: bool = False) -> Step:
    """Stage one."""
    proves = "how far stage one, from JPEG files, is from the bare forward pass"
    return of_size("images/s", proves, "feeding:extraction", name, large)


def shares(name: str) -> Step:
    """Where its time goes."""
    proves = "where the time of stage one goes, with threads that decode and with processes"
    return of_size("shares", proves, "shares:shares", name)


def compiled(name: str, large: bool = False) -> Step:
    """What the compiler gives."""
    proves = "what torch.compile makes of the bare forward pass"
    return of_size("compiled", proves, "feeding:compiled", name, large, limit_s=60)


def trial(name: str) -> Step:
    """What an extraction gains by the compiler."""
    proves = "what an extraction gains by torch.compile, and from how many images on"
    return of_network("compile trial", proves, "feeding:trial", name, limit_s=90)


STEPS: tuple[Step, ...] = (
    features("small"),
    mixture("small"),
    fine_tune("small"),
    same_training("small"),
    Step("FAISS", "its search on GPUs is the flat one of the CPU; queries a second", f"{HERE}.search:search"),
    refining("small"),
    Step("heads", "linear heads are the CPU's; seconds of ImageNet-1K's rows", f"{HERE}.heads:heads", limit_s=75),
    features("lite0"),
    mixture("conv"),
    fine_tune("conv"),
    experts("small"),
    Step("same bytes", "an extraction that is repeated gives the same bits", f"{HERE}.features:same_bytes"),
    Step(
        "decoding: failures",
        'with decode = "cuda" the same files cannot be used, for the same reasons, as by Pillow',
        f"{HERE}.decoding:failures",
    ),
    Step(
        "decoding: features",
        'with decode = "cuda" features are those by Pillow but for a few values of a pixel',
        f"{HERE}.decoding:changes",
    ),
    Step("NCCL: one process", "what processes do together works on this device", f"{HERE}.ranks:one_process"),
    shares("small"),
    images_a_second("small"),
    Step(
        "demo",
        "the demo's table on the device is within the intervals of the same demo on the CPU",
        f"{HERE}.demo:demo",
        limit_s=75,
    ),
    Step("memory", "what a long run holds, on the GPU and beside it, does not grow", f"{HERE}.memory:long_run"),
    same_training("conv"),
    refining("conv"),
    images_a_second("conv"),
    trial("small"),
    Step("NCCL: two processes", "two GPUs train one mixture as one does", f"{HERE}.ranks:two_processes", limit_s=90),
    features("large"),
    Step(
        "decoding: speed",
        "images a second from JPEG files, by nvJPEG and by all cores",
        f"{HERE}.decoding:speed",
    ),
    images_a_second("small", large=True),
    trial("conv"),
    experts("conv"),
    features("base"),
    Step("decoder", "how many images a second the cores decode", f"{HERE}.feeding:decoder"),
    compiled("small"),
    shares("conv"),
    compiled("small", large=True),
    Step(
        "demo: fine-tuned",
        "the same of the backbone that is fine-tuned on the device",
        f"{HERE}.demo:demo",
        {"last": "finetuned"},
        limit_s=120,
    ),
)
