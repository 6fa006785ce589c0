"""The steps of the check, in order of worth. A step is added here: a line, whose function takes a `Bench`.

What it is called and proves is read in the table; see `tests.bench.gpu.step` for how one is written.
"""

from collections.abc import Mapping

from tests.bench.gpu.step import Step

HERE = "tests.bench.gpu"
NAMES: Mapping[str, str] = {
    "lite0": "EfficientNet-Lite0",
    "conv": "EfficientNet-Lite0",
    "small": "ViT-S/14",
    "base": "ViT-B/14",
    "large": "ViT-L/14",
}  # those of DINOv2 have seeded weights

STEPS: tuple[Step, ...] = (
    *(
        Step(
            f"features: {NAMES[name]}",
            "extraction gives the CPU's features, to a tolerance of each precision",
            f"{HERE}.features:compare",
            {"name": name},
        )
        for name in ("lite0", "small", "base", "large")
    ),
    Step("same bytes", "an extraction that is repeated gives the same bits", f"{HERE}.features:same_bytes"),
    *(
        Step(
            f"images/s: {NAMES[name]}, {'518' if large else '224'} px",
            "how far stage one, from JPEG files, is from the bare forward pass",
            f"{HERE}.feeding:extraction",
            {"name": name, "large": large},
        )
        for name, large in (("small", False), ("conv", False), ("small", True))
    ),
    Step("decoder", "how many images a second the cores decode", f"{HERE}.feeding:decoder", limit_s=30),
    *(
        Step(
            f"mixture: {NAMES[name]}",
            "a mixture that is trained has the CPU's losses; rows a second, memory",
            f"{HERE}.training:mixture",
            {"name": name},
        )
        for name in ("conv", "small")
    ),
    *(
        Step(
            f"fine-tune: {NAMES[name]}",
            "a backbone that is fine-tuned has the CPU's losses; images a second, memory",
            f"{HERE}.tuning:fine_tune",
            {"name": name},
            limit_s=60,
        )
        for name in ("conv", "small")
    ),
    *(
        Step(
            f"same training: {NAMES[name]}",
            "a mixture that is trained again has the same bits, in half precision and in full",
            f"{HERE}.training:same_bits",
            {"name": name},
        )
        for name in ("small", "conv")
    ),
    *(
        Step(
            f"experts: {NAMES[name]}",
            "experts that are stacked compute what they do one after another; rows a second both ways",
            f"{HERE}.experts:compare",
            {"name": name},
            limit_s=60,
        )
        for name in ("conv", "small")
    ),
    Step("FAISS", "its search on GPUs is the flat one of the CPU; queries a second", f"{HERE}.search:search"),
    *(
        Step(
            f"refining: {NAMES[name]}",
            "rows as the experts see them, and heads that are fitted on them, are the CPU's",
            f"{HERE}.refining:refining",
            {"name": name},
        )
        for name in ("conv", "small")
    ),
    Step(
        "decoding: failures",
        'with decode = "cuda" the same files cannot be used, for the same reasons, as by Pillow',
        "tests.bench.gpu.decoding:failures",
    ),
    Step(
        "decoding: features",
        'with decode = "cuda" features are those by Pillow but for a few values of a pixel',
        "tests.bench.gpu.decoding:changes",
    ),
    Step(
        "decoding: speed",
        "images a second from JPEG files, by nvJPEG and by all cores",
        "tests.bench.gpu.decoding:speed",
    ),
    Step("NCCL: one process", "what processes do together works on this device", f"{HERE}.ranks:one_process"),
    Step("NCCL: two processes", "two GPUs train one mixture as one does", f"{HERE}.ranks:two_processes", limit_s=90),
    Step(
        "demo",
        "the demo's table on the device is within the intervals of the same demo on the CPU",
        f"{HERE}.demo:demo",
        limit_s=100,
    ),
    Step("memory", "what a long run holds, on the GPU and beside it, does not grow", f"{HERE}.memory:long_run"),
    *(
        Step(
            f"compiled: {NAMES[name]}, {'518' if large else '224'} px",
            "what torch.compile makes of the bare forward pass",
            f"{HERE}.feeding:compiled",
            {"name": name, "large": large},
            limit_s=60,
        )
        for name, large in (("small", False), ("small", True))
    ),
    *(
        Step(
            f"compile trial: {NAMES[name]}",
            "what an extraction gains by torch.compile, and from how many images on",
            f"{HERE}.feeding:trial",
            {"name": name},
            limit_s=90,
        )
        for name in ("small", "conv")
    ),
)
