"""Names and numbers of the page, as people read them."""

import math
from collections.abc import Mapping
from typing import Any

from stages.metrics.ranking import METRICS, Metric
from stages.results.method import NO_HEAD, Method
from stages.scorers import title_of

_LEFT_OUT = ("aupr_in", "aupr_out")  # of the page; table.csv has them
SHOWN_METRICS = tuple(metric for metric in METRICS.values() if metric.name not in _LEFT_OUT)
COMPARED_METRICS = tuple(metric for metric in SHOWN_METRICS if metric.compared)

KINDS = {
    "end": "Each expert is a copy of the backbone's own end.",
    "adapter": "Each expert is a small bottleneck added to the frozen features.",
    "frozen": "No experts: a head with “other” for each group, on the frozen features (MOS).",
    "dense": "One network of as many parameters as all experts have; nothing is routed.",
}


def score_title(method: Method) -> str:
    """A score as the field writes it: ``kNN+energy`` for ``knn+energy``."""
    return title_of(method.score)


def method_name(method: Method) -> str:
    """Short name of a method for people."""
    features = {"cls": "Frozen" if method.backbone == "pretrained" else "Fine-tuned", "mofe": "MoFE"}[method.features]
    return f"{features} {score_title(method)}" + (f" ({method.head})" if method.head not in (NO_HEAD, "probe") else "")


def positive_class(metric: Metric) -> str:
    """Which class a metric takes as positive: ``ID positive``; empty where that makes no difference."""
    return f"{metric.positive} positive" if metric.positive else ""


def percent(fraction: float | None) -> str:
    """``93.1`` for 0.931.

    >>> percent(0.931), percent(None)
    ('93.1', '–')
    """
    return "–" if fraction is None or math.isnan(fraction) else f"{100 * fraction:.1f}"


def points(fraction: float) -> str:
    """A difference in percentage points, signed.

    >>> points(0.012), points(-0.5), points(0.0)
    ('+1.2', '−50.0', '0.0')
    """
    text = f"{100 * fraction:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def verdict(line: Mapping[str, Any], metric: Metric) -> str:
    """What a line's difference to the frozen kNN says, as `stages.metrics.intervals` has it: better, worse or open."""
    word = line[f"{metric.name}_minus_knn_says"].split(" ")[0]
    return {"gain": "better", "loss": "worse"}.get(word, "open")


def duration(seconds: float) -> str:
    """A duration for people.

    >>> duration(5.4), duration(192), duration(7260)
    ('5.4 s', '3 min 12 s', '2 h 1 min')
    """
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, hours = divmod(round(seconds), 60), divmod(round(seconds / 60), 60)
    return f"{minutes[0]} min {minutes[1]} s" if seconds < 3600 else f"{hours[0]} h {hours[1]} min"


def size(n_bytes: float) -> str:
    """Bytes for people.

    >>> size(512), size(198_144), size(3_300_000), size(508e9)
    ('512 B', '193.5 KiB', '3.1 MiB', '473.1 GiB')
    """
    for unit in ("B", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.1f} {unit}" if unit != "B" else f"{n_bytes:.0f} B"
        n_bytes /= 1024
    return f"{n_bytes:.1f} GiB"
