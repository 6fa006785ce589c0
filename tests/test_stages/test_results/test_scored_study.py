"""What stage three left is read back as it was left, or not at all."""

import pytest

from stages.errors import InputError
from stages.files.documents import write_contents
from stages.results.scored_study import check_scores
from stages.results.writer import FILES


def test_scores_are_those_that_were_left(tmp_path):
    with pytest.raises(InputError, match=r"contents\.json .*: run make score"):
        check_scores(tmp_path)
    names = [*FILES, "samples/a.parquet"]
    (tmp_path / "samples").mkdir()
    for name in names:
        (tmp_path / name).write_text(name)
    write_contents(tmp_path, "of these", names)
    assert check_scores(tmp_path)["identity"] == "of these"
    (tmp_path / "samples" / "._a.parquet").write_text("left by a Mac")
    check_scores(tmp_path)
    for name in names:
        (tmp_path / name).write_text(name.upper())
        with pytest.raises(InputError, match=f"{name} is not as it was left: run make score"):
            check_scores(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(InputError, match=f"{name} is missing: run make score"):
            check_scores(tmp_path)
        (tmp_path / name).write_text(name)
