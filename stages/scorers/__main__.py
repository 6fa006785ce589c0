"""Write the table of all scores into ``README.md`` beside this file, of what their classes say of themselves.

python -m stages.scorers
"""

from pathlib import Path

from stages.scorers import SCORERS
from stages.scorers.scorer import Scorer

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- scores: begin -->\n", "<!-- scores: end -->\n"
_READ = ("features", "logits", "others", "other", "patches", "taps", "head")
_FITTED_ON = {"bank": "training", "select": "held-out", "labels": "labels"}


def scores_table() -> str:
    """A line a score in the order of `SCORERS`, as Markdown."""
    lines = [
        "| score | title | higher where more OOD | paper | reads | fitted on ID rows | a row costs | other defaults |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, scorer in SCORERS.items():
        reads = ", ".join(f"`{what}`" for what in _READ if what in scorer.needs)
        fitted_on = ", ".join(rows for what, rows in _FITTED_ON.items() if what in scorer.needs)
        cells = (f"`{name}`", scorer.title, scorer.says, scorer.paper, reads, fitted_on, scorer.cost, _defaults(scorer))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _defaults(scorer: type[Scorer]) -> str:
    """Settings of each profile that differ from the paper's."""
    return "; ".join(
        f"{profile}: " + ", ".join(f"{key} = {value}" for key, value in settings.items())
        for profile, settings in scorer.profiles.items()
    )


def stated_table(readme: str) -> str:
    """What stands between the marks of a README."""
    return readme.partition(BEGIN)[2].partition(END)[0]


def write_scores_table() -> None:
    """Write it anew; what is right is left alone."""
    readme = README.read_text(encoding="utf-8")
    README.write_text(readme.replace(stated_table(readme), scores_table()), encoding="utf-8")


if __name__ == "__main__":
    write_scores_table()
