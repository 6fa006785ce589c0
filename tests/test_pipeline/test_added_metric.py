"""A metric that is added where metrics are defined is in the table, in the summary and in the report."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FIELD = "    aupr_out: float\n"
LINE = '        Metric("aupr_out", "AUPR", True, "OOD", _Curve.aupr_out),\n'
ADDED = '        Metric("best_f1", "best F1", True, "OOD", lambda curve: 0.1234),\n'
SHOW = """
import sys
from pathlib import Path
from tests.test_pipeline.test_report import make_study, page_of

work = make_study(Path(sys.argv[1]), seeds=())
(work / "text").write_text(page_of(work).text)
"""


def test_one_place_adds_a_column(tmp_path):
    tree, work = tmp_path / "tree", tmp_path / "work"
    work.mkdir()
    for name in ("cache", "stages", "pipeline", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    place = tree / "stages" / "metrics" / "ranking.py"
    source = place.read_text("utf-8")
    assert source.count(FIELD) == source.count(LINE) == 1
    place.write_text(source.replace(FIELD, f"{FIELD}    best_f1: float\n").replace(LINE, LINE + ADDED), "utf-8")
    subprocess.run([sys.executable, "-c", SHOW, work], cwd=tree, check=True, capture_output=True, text=True)

    rows = json.loads((work / "scores" / "table.json").read_text("utf-8"))
    assert {row["best_f1"] for row in rows} == {0.1234}
    header = (work / "scores" / "table.csv").read_text("utf-8").splitlines()[0].split(",")
    assert header[header.index("aupr_out") + 1] == "best_f1"
    summary = json.loads((work / "scores" / "summary.json").read_text("utf-8"))
    assert {line["best_f1_mean"] for line in summary} == {0.1234}
    text = (work / "text").read_text("utf-8")
    assert text.count("best F1 ↑") == 3 + 1  # of each group in the table of methods, and in that of every set
    assert "12.3" in text
