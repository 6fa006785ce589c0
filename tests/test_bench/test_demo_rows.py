"""Rows of the demo's table on a device are held to the intervals of the CPU's."""

import pytest

from tests.bench.gpu.demo import KEYS, compare
from tests.bench.gpu.step import TINY, Bench


def table(auroc, backbone="pretrained", low="0.88", high="0.92"):
    row = dict.fromkeys(KEYS, "") | {"backbone": backbone, "auroc": auroc, "auroc_lo": low, "auroc_hi": high}
    row |= {"fpr95": "0.5", "fpr95_lo": "0.4", "fpr95_hi": "0.6"}
    return {(backbone, "knn"): row}


def compared(ours, exact, tmp_path):
    values = []
    compare(Bench("cpu", TINY, tmp_path, tmp_path, values.append), ours, exact)
    return {value.what: value for value in values}


def test_a_row_within_its_interval_holds(tmp_path):
    found = compared(table("0.91"), table("0.90"), tmp_path)
    assert all(value.holds for value in found.values())
    assert found["pretrained: auroc, largest difference"].value == pytest.approx(1.0)


def test_a_row_outside_does_not(tmp_path):
    found = compared(table("0.93"), table("0.90"), tmp_path)
    assert not found["pretrained: rows whose auroc is in the CPU's interval"].holds
    assert found["pretrained: rows whose fpr95 is in the CPU's interval"].holds


def test_a_fine_tuned_row_is_counted_and_not_held(tmp_path):
    found = compared(table("0.93", "finetuned"), table("0.90", "finetuned"), tmp_path)
    outside = found["finetuned: rows whose auroc is in the CPU's interval"]
    assert (outside.value, outside.holds) == (0, True)


def test_a_row_that_is_missing_is_said(tmp_path):
    found = compared(table("0.91") | table("0.9", "finetuned"), table("0.90"), tmp_path)
    assert not found["rows that only one of the tables has"].holds
