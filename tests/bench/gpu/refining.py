"""What follows a training: rows as the experts see them, and heads that are fitted on them."""

import numpy as np

from stages.context import Context
from stages.heads.choose import fit_head
from stages.mixture.refine import refine
from tests.bench.gpu.features import TOLERANCES, relative_error
from tests.bench.gpu.step import Bench
from tests.bench.gpu.subjects import rate
from tests.bench.gpu.training import Subject

STRENGTH = 0.1


def refining(bench: Bench, name: str) -> None:
    """Refine on the device and on the CPU, fit a head on each, and let both judge the device's rows."""
    subject = Subject(bench, name)
    data = subject.data
    context = Context(device=bench.device)
    mixture = subject.train(subject.some_rows, subject.some_data, context, experts=2).mixture
    ours, exact = (refine(mixture, data.train, context=each) for each in (context, Context(device="cpu")))
    bench.measure("rows that go to the same expert", (ours.expert == exact.expert).mean(), at_least=1)
    for column in ("features", "gate", "other"):
        error = relative_error(getattr(ours, column), getattr(exact, column))
        bench.measure(f"{column}, ‖a − b‖ / ‖b‖", error, at_most=TOLERANCES["float32"])
    speed = rate(bench, data.train.n_rows, lambda: refine(mixture, data.train, context=context))
    bench.measure("refining", speed, "rows/s")
    heads = [fit_head(rows.features, data.train_labels, data.n_classes, STRENGTH) for rows in (ours, exact)]
    logits, there = (head.logits(ours.features) for head in heads)
    bench.measure("refitted heads: logits, ‖a − b‖ / ‖b‖", relative_error(logits, there), at_most=1e-2)
    same = np.mean(logits.argmax(1) == there.argmax(1))
    bench.measure("refitted heads: rows of the same class", same, at_least=0.999)
