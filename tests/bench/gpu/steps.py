"""The steps of the check, in order of worth. A step is added here: a line, whose function takes a `Bench`."""

from tests.bench.gpu.step import Step

STEPS: tuple[Step, ...] = (
    Step(
        "features: EfficientNet-Lite0",
        "extraction with real weights gives the CPU's features, to a tolerance of each precision",
        "tests.bench.gpu.features:lite0",
    ),
    *(
        Step(
            f"features: ViT-{size[0].upper()}/14",
            f"the same of DINOv2's ViT-{size[0].upper()}/14 with seeded weights",
            "tests.bench.gpu.features:vit",
            {"size": size},
        )
        for size in ("small", "base", "large")
    ),
    Step(
        "same bytes",
        "an extraction that is repeated gives the same bits",
        "tests.bench.gpu.features:same_bytes",
    ),
)
