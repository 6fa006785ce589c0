import io
import time

from pipeline.progress import TqdmProgress
from stages.progress import NullProgress, Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def work(progress: Progress) -> None:
    progress.start(3, "image", "extract train")
    progress.advance(1, failures=0)
    progress.note("one line that stays")
    progress.advance(2, loss=0.12345)
    progress.close()


def test_log_file_has_whole_lines():
    stream = io.StringIO()
    work(TqdmProgress(stream, every_s=0))
    text = stream.getvalue()
    assert "\r" not in text
    first, *others = text.splitlines()
    assert first.startswith("extract train: 0/3 [00:00<")
    assert "one line that stays" in others
    assert others[-1].startswith("extract train: 3/3 [")
    assert others[-1].endswith("image/s, failures=0, loss=0.123]")


def test_log_file_is_not_flooded():
    stream = io.StringIO()
    progress = TqdmProgress(stream, every_s=60)
    progress.start(1000, "image", "extract")
    for _ in range(1000):
        progress.advance()
    progress.close()
    first, last = stream.getvalue().splitlines()
    assert first.startswith("extract: 0/1000")
    assert last.startswith("extract: 1000/1000")


def test_terminal_has_one_line():
    stream = Terminal()
    work(TqdmProgress(stream))
    last = stream.getvalue().rstrip("\n").rpartition("\r")[2]
    assert last.startswith("extract train: 100%")
    assert "3/3" in last
    assert "\rone line" in stream.getvalue()
    assert stream.getvalue().count("\n") == 2  # after the note and at the end


def test_a_new_task_ends_the_one_before():
    stream = io.StringIO()
    progress = TqdmProgress(stream, every_s=60)
    progress.start(2, "image", "first")
    progress.advance(1, failures=1)
    progress.start(2, "image", "second")
    progress.close()
    assert [line[:11] for line in stream.getvalue().splitlines()] == ["first: 0/2 ", "first: 1/2 ", "second: 0/2"]
    assert "failures" not in stream.getvalue().splitlines()[-1]


def test_what_is_mostly_over_in_a_moment_is_shown_only_where_it_is_not():
    """Then it is shown before its first unit is done, which may be the longest."""
    stream = io.StringIO()
    progress = TqdmProgress(stream, every_s=0)
    progress.start(2, "fit", "short", after_s=60)
    progress.advance(2)
    progress.start(2, "fit", "long", after_s=0.01)
    while not stream.getvalue():
        time.sleep(0.01)
    progress.advance(2)
    progress.close()
    assert [line[:9] for line in stream.getvalue().splitlines()][::2] == ["long: 0/2", "long: 2/2"]


def test_nobody_listens():
    work(NullProgress())
