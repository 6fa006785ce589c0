"""What `watch` says of a stream of scores, and how it goes on."""

import json
import math

import numpy as np
import pytest

from pipeline.deciding import Watching
from pipeline.watching import Seen, StreamWatch, scores_of
from stages.detection.drift import DriftMonitor
from stages.errors import InputError
from stages.files.documents import read_document, write_document

CALIBRATION = np.random.default_rng(0).normal(size=77).astype(np.float32)


def stream(n=40):
    scores = np.random.default_rng(1).normal(size=n) + 3 * (np.arange(n) >= 20)
    return [Seen(f"{index:03d}.jpg", score) for index, score in enumerate(scores.tolist())]


def test_a_line_is_a_score_its_promise_and_the_stream(tmp_path):
    rows = [json.loads(line) for line in StreamWatch(CALIBRATION, Watching()).lines(stream())]
    monitor = DriftMonitor(CALIBRATION)
    for row, seen in zip(rows, stream(), strict=True):
        report = monitor.update(seen.score)
        assert row["id"] == seen.id
        assert [row[name] for name in ("score", "p_value", "log10_evidence", "ood_share_hi")] == [
            *(report.score, report.p_value, report.log10_evidence, report.ood_share_hi)
        ]
    assert [row["drift"] for row in rows[:20]] == [False] * 20
    assert rows[-1]["drift"]
    assert rows[-1]["step"] == 40


def test_a_killed_watch_goes_on_with_the_same_values(tmp_path):
    """After each line that was delivered, and before, as if it were killed then."""
    whole = list(StreamWatch(CALIBRATION, Watching()).lines(stream()))
    asked = Watching(state=tmp_path / "state.json")
    found = []
    for seen in stream():
        watch = StreamWatch(CALIBRATION, asked)
        assert watch.last == (None if not found else json.loads(found[-1])["id"])
        undelivered = watch.lines([seen])
        line = next(undelivered)
        undelivered.close()  # as by a full disk
        found += StreamWatch(CALIBRATION, asked).lines([seen])
        assert found[-1] == line
    assert found == whole
    assert asked.state.stat().st_size < 10_000


def test_what_is_no_score_is_said_and_not_counted():
    given = ["1e3", "", "NaN", "1e999", "true", '{"id": "a", "score": 1}', '{"id": 7}', "[" * 100_000, '"2"']
    seen = list(scores_of(given))
    assert [each.score for each in seen if not each.unusable] == [1000.0, 1.0]
    assert [each.id for each in seen] == [*("line 1", "line 3", "line 4", "line 5", "a", "7", "line 8", "line 9")]
    assert [each.id for each in scores_of(['{"id": "\\ud800", "score": 1}'])] == ["?"]  # UTF-8 has no bytes for it
    rows = [json.loads(line) for line in StreamWatch(CALIBRATION, Watching()).lines(seen)]
    assert [row["step"] for row in rows if "step" in row] == [1, 2]
    assert rows[1] == {"id": "line 3", "unusable": "'NaN' is no score"}


def test_prometheus_reads_the_last_values(tmp_path):
    path = tmp_path / "watch.prom"
    (*_, last) = StreamWatch(CALIBRATION, Watching(prometheus=path)).lines([Seen("x", unusable="cut short"), *stream()])
    values = dict(line.split() for line in path.read_text().splitlines() if not line.startswith("#"))
    row = json.loads(last)
    assert values["ood_watch_images_total"] == "40"
    assert values["ood_watch_unusable_total"] == "1"
    assert values["ood_watch_drift"] == "1"
    assert float(values["ood_watch_ood_share_lo"]) == row["ood_share_lo"]
    assert math.isfinite(float(values["ood_watch_log10_evidence"]))
    assert [values[f"ood_watch_{name}"] for name in ("ood_share", "log10_evidence")] == [
        *(f"{row[name]:.17g}" for name in ("ood_share", "log10_evidence"))
    ]
    few = tmp_path / "few.prom"
    list(StreamWatch(CALIBRATION[:9], Watching(prometheus=few)).lines(stream(1)))
    assert "ood_share" not in few.read_text()


def test_prometheus_counts_what_has_no_score_when_it_comes(tmp_path):
    """First, and last; so that whoever is warned by it hears of a camera that sends nothing else."""
    path = tmp_path / "watch.prom"

    def counted(*seen):
        list(watch.lines(seen))
        values = dict(line.split() for line in path.read_text().splitlines() if not line.startswith("#"))
        return [values[f"ood_watch_{name}_total"] for name in ("images", "unusable")], "ood_watch_ood_share" in values

    watch = StreamWatch(CALIBRATION, Watching(prometheus=path))
    broken = Seen("x", unusable="cut short")
    assert counted(broken) == (["0", "1"], False)
    assert counted(*stream(2)) == (["2", "1"], True)
    assert counted(broken) == (["2", "2"], True)


def test_a_state_of_something_else_is_refused(tmp_path):
    path = tmp_path / "state.json"
    list(StreamWatch(CALIBRATION, Watching(state=path)).lines(stream(3)))
    for calibration, asked, key in (
        (CALIBRATION[:9], Watching(state=path), "calibration"),
        (CALIBRATION, Watching(state=path, alpha=0.1), "alpha 0.01, not 0.1"),
        (CALIBRATION, Watching(state=path, seed=3), "seed 0, not 3"),
    ):
        with pytest.raises(InputError, match=key):
            StreamWatch(calibration, asked)
    with pytest.raises(InputError, match="a stream with kind 'scores', not 'images'"):  # whose names it would look for
        StreamWatch(CALIBRATION, Watching(state=path), kind="images")
    with pytest.raises(InputError, match="strict None, not True"):
        StreamWatch(CALIBRATION, Watching(state=path, strict=True))
    stored = read_document(path)
    for lacking in ("last", "stream"):
        write_document(path, {key: value for key, value in stored.items() if key != lacking})
        with pytest.raises(InputError, match="no state of a stream"):
            StreamWatch(CALIBRATION, Watching(state=path))
    write_document(path, stored)
    path.write_text(path.read_text().replace('"steps": 3', '"steps": 4'))
    with pytest.raises(InputError, match="damaged"):
        StreamWatch(CALIBRATION, Watching(state=path))
