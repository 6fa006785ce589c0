"""One exported file by itself: where it came from, what it promises, what was measured of it and what was not."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.terminal import Lines
from stages.detection.bundle import GRAPH, read_about
from stages.errors import InputError
from stages.scorers import AUTO


def bundle_lines(path: Path) -> Lines:
    """Where a bundle came from, what was measured of it and what was not, a line each.

    Raises:
        InputError: another file, or damaged.
    """
    archive, about = read_about(path)
    try:
        return [
            f"bundle     {path}: {archive.nbytes / 2**20:.1f} MiB, whole; {archive.digest[:8]}",
            *_origin_lines(about),
            *(
                ['graph      model.onnx: Detector.load(…, runtime="onnx") runs without torch']
                if GRAPH in archive
                else []
            ),
            *_promise_lines(about),
            *(_metric_line(row) for row in about["metrics"]),
            *(f"unknown    {what}" for what in about["not_measured"]),
            f"made with  {', '.join(f'{name} {version}' for name, version in about['made_with'].items())}",
        ]
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise InputError(f"{path}: about.json does not say what it should: {error}") from error


def _origin_lines(about: Mapping[str, Any]) -> Iterator[str]:
    network, data = about["network"], about["data"]
    chosen = f" ({about['params']['chosen']})" if about["score"] == AUTO else ""
    of = f"{about['backbone']}, {about['features']} features" + (f", {about['variant']}" if about["variant"] else "")
    seed = "" if about["seed"] is None else f", seed {about['seed']}"
    yield f"study      {about['study']}: {about['score']}{chosen} by head {about['head']}, {of}{seed}"
    if network["name"]:
        size, weights = network["image_size"], network["weights_sha256"][:8]
        yield f"network    {network['name']} at {size} px, weights {weights}; takes {about['takes']}"
    classes = "classes" if about.get("labels", "given") == "given" else "clusters that stand for classes"
    yield f"data       features {data['features'][:8]}, ID {data['id'][:8]}, {about['classes']} {classes}"
    for own in about["sets"]:
        failed = f" + {own['failures']} failures" if own["failures"] else ""
        yield f"set        {own['name']}: {own['role']}, {own['rows']} rows{failed}, {own['sha256'][:8]}"


def _promise_lines(about: Mapping[str, Any]) -> Iterator[str]:
    calibration = about["calibration"]
    nearly = "" if calibration["exact"] else ", which promise nearly: scores are cross-fitted or put on a scale"
    yield f"promise    from {calibration['rows']} calibration rows{nearly}"
    for own in about["thresholds"]:
        admits = f"{own['admit']:.0%} of ID"
        if own["threshold"] is None:
            yield f"threshold  none for {admits}: needs {own['n_needed']} calibration rows"
        else:
            ends = " to ".join("unknown" if end is None else f"{end:.4g}" for end in (own["lo"], own["hi"]))
            yield f"threshold  {own['threshold']:.4g} admits {admits}, 95 % interval {ends}"


def _metric_line(row: Mapping[str, Any]) -> str:
    cells = [f"{name} {_interval(row, name.lower())}" for name in ("AUROC", "FPR95")]
    return f"measured   {row['ood']} ({row['group']}, {row['n_ood']} images): {', '.join(cells)}"


def _interval(row: Mapping[str, Any], name: str) -> str:
    return f"{row[name]:.3f} ({row[f'{name}_lo']:.3f} to {row[f'{name}_hi']:.3f})"
