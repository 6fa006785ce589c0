"""Options of the verbs that make an exported detector, or use one."""

import click

from pipeline.deciding import Exporting, Serving, Watching
from pipeline.options import DECIDING_SCORE, RealRange, gathered
from pipeline.output_files import OutputFile

RUNTIME = click.option(
    "--runtime",
    type=click.Choice(["torch", "onnx"]),
    default="torch",
    show_default=True,
    help="What runs the network of an exported detector; onnx: of one that was exported with --onnx.",
)
EXPORTING = gathered(
    "exporting",
    Exporting,
    click.option(
        "-o",
        "--output",
        type=OutputFile(),
        required=True,
        metavar="FILE",
        help="Where to, such as pets.ood.",
    ),
    DECIDING_SCORE,
    click.option("--variant", metavar="NAME", help="Whose experts; none: the backbone's own features."),
    click.option(
        "--no-backbone",
        "with_backbone",
        flag_value=False,
        type=bool,
        default=True,
        help="Leave the network's weights out: they are loaded from where the study has them.",
    ),
    click.option("--onnx", is_flag=True, help="Add the network as model.onnx, which is run without torch."),
)
WATCHING = gathered(
    "watching",
    Watching,
    click.option(
        "--alpha",
        type=RealRange(0, 1, min_open=True, max_open=True),
        default=Watching.alpha,
        show_default=True,
        help="Probability that a stream of ID images is ever called drifting, at most.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(0, 2**128 - 1),
        default=Watching.seed,
        show_default=True,
        help="Of what is drawn.",
    ),
    click.option(
        "--state",
        type=OutputFile(),
        metavar="FILE.json",
        help="Go on from what stands in it, and keep it up to date; the same command goes on where it was killed.",
    ),
    click.option(
        "--prometheus",
        type=OutputFile(),
        metavar="FILE.prom",
        help="Keep the last values in it, as text for Prometheus.",
    ),
    click.option(
        "--strict",
        is_flag=True,
        help="Compare the stream with itself alone: alpha is exact for every score, but OOD that is there from the "
        "first image on is not noticed.",
    ),
    RUNTIME,
)
SERVING = gathered(
    "serving",
    Serving,
    click.option("--host", default=Serving.host, show_default=True, help="Address; 0.0.0.0: every one, to everybody."),
    click.option(
        "--port", type=click.IntRange(0, 65535), default=Serving.port, show_default=True, help="0: any that is free."
    ),
    click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default=Serving.device,
        show_default=True,
        help="Where the network runs; auto: a GPU where there is one.",
    ),
    click.option(
        "--batch",
        type=click.IntRange(min=1),
        default=Serving.batch,
        show_default=True,
        help="Images that go through the network together, at most; on a CPU a pass, 16, if that is less.",
    ),
    click.option(
        "--patience",
        type=RealRange(0, 10),
        default=Serving.patience,
        show_default=True,
        help="Seconds that images wait for the next to be decoded, to go through the network together, at most.",
    ),
    click.option(
        "--max-bytes", type=click.IntRange(min=1), default=Serving.max_bytes, show_default=True, help="Of a request."
    ),
    click.option(
        "--max-pixels", type=click.IntRange(min=1), default=Serving.max_pixels, show_default=True, help="Of an image."
    ),
    click.option(
        "--timeout",
        type=RealRange(0, 3600, min_open=True),
        default=Serving.timeout,
        show_default=True,
        help="Seconds until a request is refused.",
    ),
    RUNTIME,
)
