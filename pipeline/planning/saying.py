"""A plan as people read it."""

from rich.table import Table

from pipeline.planning.plan import Plan
from pipeline.report.wording import duration, size
from pipeline.terminal import Lines


def plan_lines(plan: Plan) -> Lines:
    """A plan as text and tables."""
    return [*_size_lines(plan), "", _kept_table(plan), _cost_table(plan), *_notes(plan)]


def _size_lines(plan: Plan) -> list[str]:
    how = "counted" if plan.size.counted else "stated, and drawn to calibrate by: computed, not measured"
    rows = ", ".join(f"{name} {n:,}" for name, n in plan.size.rows.items())
    classes = f"{plan.size.n_classes:,} classes ({how})"
    return [f"{plan.name}: {plan.size.total:,} images in {len(plan.size.rows)} sets, {classes}", rows]


def _kept_table(plan: Plan) -> Table:
    table = Table(title=f"what is kept, for {plan.n_backbones} backbones; the first is asked for")
    for column in ("patches", "bytes an image", "all images", "with taps"):
        table.add_column(column, justify="left" if column == "patches" else "right")
    for kept in plan.kept:
        taps = size((kept.row_bytes + kept.tap_bytes) * plan.n_images * plan.n_backbones) if kept.tap_bytes else "–"
        whole = size(kept.row_bytes * plan.n_images * plan.n_backbones)
        table.add_row(kept.patches, f"{kept.row_bytes:,}", whole, taps)
    return table


def _cost_table(plan: Plan) -> Table:
    table = Table(title=f"time with so many workers, each a machine like this one ({plan.cores} cores)")
    table.add_column("stage")
    for n in plan.workers:
        table.add_column(str(n), justify="right")
    table.add_column("memory", justify="right")
    table.add_column("what")
    for cost in plan.costs:
        times = [duration(cost.with_workers(n)) for n in plan.workers]
        table.add_row(cost.name, *times, size(cost.memory) if cost.memory else "–", cost.about)
    table.add_row("all", *(duration(plan.seconds(n)) for n in plan.workers), "", "")
    return table


def _notes(plan: Plan) -> list[str]:
    return [f"calibrated for {plan.calibrated:.0f} s", *plan.notes]
