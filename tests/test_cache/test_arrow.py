"""Columns of Arrow tables are those that pyarrow makes of the same values, and pandas stays out of it."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.arrow import column_of_numbers, column_of_text, column_values

ROUND = """
import sys
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from cache.arrow import column_of_numbers, column_of_text, column_values
table = pa.table({"n": column_of_numbers(np.arange(3)), "text": column_of_text(["a", "", "ä"])})
pq.write_table(table, sys.argv[1])
with pq.ParquetFile(sys.argv[1]) as file:
    table = file.read()
print(column_values(table["n"]).tolist(), table["text"].to_pylist(), "pandas" in sys.modules)
"""


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_text(values):
    assert column_of_text(values).equals(pa.array(values, pa.string()))


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float32, np.float64])
@pytest.mark.parametrize("n", [0, 7])
def test_numbers_there_and_back(dtype, n):
    values = np.random.default_rng(0).normal(size=2 * n).astype(dtype)[::2]  # not in one piece
    values[3:4] = 0 if np.issubdtype(dtype, np.integer) else np.nan
    column = column_of_numbers(values)
    assert column.type == pa.array(values).type
    np.testing.assert_array_equal(column.to_numpy(zero_copy_only=False), values)
    for chunked in (pa.chunked_array([column]), pa.chunked_array([column[: n // 2], column[n // 2 :]])):
        found = column_values(chunked)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, values)


def test_pandas_is_not_imported(tmp_path):
    command = [sys.executable, "-c", ROUND, str(tmp_path / "table.parquet")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said == "[0, 1, 2] ['a', '', 'ä'] False\n"
