import errno
import io
import os
import signal
import subprocess
import sys

import click
import pytest
from rich.table import Table

from cache import CacheBusyError, CacheDamagedError, CacheInvalidError, CacheMismatchError, CacheNotFoundError
from pipeline import options
from pipeline.cli import main, verbs
from pipeline.config import ConfigError
from pipeline.engine import EngineError
from pipeline.terminal import complain, explain, show
from stages.errors import InputError, StageError
from tests.test_cache import toy

STUDY = """
name = "toy"
work = "runs"
[[sets]]
name = "train"
role = "id-train"
images = "sklearn:digits[0-6]/train"
"""
VERBS = ["extract", "train", "finetune", "score", "report", "run", "plan", "predict", "verify", "info"]


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "toy.toml"
    path.write_text(STUDY)
    return str(path)


@pytest.fixture
def refused(capsys):
    """Run a command line that must end with status 2 and one line; gives the line."""

    def run(*arguments: str) -> str:
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err.removeprefix("error: ").rstrip("\n")

    return run


def test_help_names_every_verb_and_loads_nothing_heavy():
    heavy = "{'torch', 'timm', 'sklearn', 'faiss', 'distributed', 'h5py', 'matplotlib'}"
    code = f"import sys; from pipeline.cli import main; main(['--help']); assert not {heavy} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(f"\n  {verb} " in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(verb, capsys):
    assert main([verb, "--help"]) == 0
    assert "--set KEY=VALUE" in capsys.readouterr().out


def test_as_a_program(study):
    command = [sys.executable, "-m", "pipeline", "train", study, "--set", "train.epochs=0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: --set train.epochs: 0 given, must be greater than 0\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command."),
        (["extrakt"], "No such command 'extrakt'"),
        (["extract"], "Missing argument 'EXPERIMENT.toml'."),
        (["extract", "no.toml"], "no.toml: No such file or directory; give the experiment's TOML file"),
        (["extract", "TOY", "--max-failures", "2"], "Invalid value for '--max-failures': 2"),
        (["extract", "TOY", "--workers", "0"], "Invalid value for '--workers': 0"),
        (["extract", "TOY", "--workers", "2", "--scheduler", "host:1"], "--workers is for local processes"),
        *(
            ([verb, "TOY", option, "2"], f"No such option '{option}'")
            for verb in ("finetune", "report", "predict", "verify", "info")  # they would ignore it
            for option in ("--workers", "--scheduler")
        ),
        (["extract", "TOY", "--repair"], "No such option"),
        (["train", "TOY", "--backbone", "best"], "Invalid value for '--backbone': 'best'"),
        (["train", "TOY", "--backbone", "finetuned"], "TOY: finetune: missing; add a section [finetune]"),
        (["train", "TOY", "--set", "train.epoch=1"], "--set train.epoch: unknown key; did you mean 'epochs'?"),
        (["finetune", "TOY"], "TOY: finetune: missing; add a section [finetune]"),
        (["score", "TOY"], "sets: score needs a set with role id-test"),
        (["run", "TOY"], "sets: run needs a set with role id-test"),
        (["predict", "TOY"], "Missing argument 'PATH...'."),
        (["predict", "TOY", "a.jpg", "--score", "kn"], "Invalid value for '--score': \"kn\""),
        (
            ["predict", "TOY", "a.jpg", "--score", "knn+enrgy"],
            "Invalid value for '--score': \"enrgy\" is not a known score; did you mean 'energy'?",
        ),
    ],
)
def test_refused(arguments, message, study, refused):
    line = refused(*(study if argument == "TOY" else argument for argument in arguments))
    assert line.startswith(message.replace("TOY", study))


def test_folder_that_is_no_cache(tmp_path, refused):
    assert "no cache stands there" in refused("info", str(tmp_path))
    assert "--set changes an experiment file" in refused("info", str(tmp_path), "--set", "name=x")


def test_info_and_verify_of_a_cache(tmp_path, capsys):
    cache = toy.fill(tmp_path / "toy-12345678")
    assert main(["info", str(cache.path)]) == 0
    out = capsys.readouterr().out
    assert f"{cache.n_rows} rows + " in out
    assert "cls [n, 6], tap_cls [n, 4], registers [n, 2, 4], patches [n, 6, 4] as float16" in out
    assert main(["verify", str(cache.path)]) == 0
    assert "whole" in capsys.readouterr().out
    shard = cache.path / cache.manifest.shards[0].name
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    assert main(["verify", str(cache.path)]) == 1
    out, err = capsys.readouterr()
    assert out.startswith(f"{shard.name}: ")
    assert "1 damaged files" in err
    assert main(["verify", str(cache.path), "--repair"]) == 2
    assert "give the experiment file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (click.UsageError("a"), 2),
        (ConfigError("a"), 2),
        (InputError("a"), 2),
        (CacheMismatchError("a"), 2),
        (CacheNotFoundError("a"), 2),
        (StageError("a"), 1),
        (EngineError("a"), 1),
        (CacheDamagedError("a"), 1),
        (CacheInvalidError("a"), 1),
        (CacheBusyError("a"), 1),
    ],
)
def test_status_of_an_error(error, status):
    assert explain(error) == (status, "a")


def test_a_complaint_is_one_line_whatever_is_in_it_and_costs_nothing_where_it_cannot_be_made(capsys, monkeypatch):
    complain("a\nname \x1b[31mof\x07 a\rfile")
    assert capsys.readouterr().err == "a name \\x1b[31mof\\x07 a file\n"

    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sys.stderr", Full())
    complain("is lost")


def test_full_disk_is_said_plainly():
    full = os.strerror(errno.ENOSPC)
    assert explain(OSError(errno.ENOSPC, full, "runs/shard.h5")) == (1, f"runs/shard.h5: {full}")
    assert explain(OSError(errno.ENOSPC, full)) == (1, full)


def _raise(error: BaseException):
    def instead(*_):
        raise error

    return instead


def test_defect_is_one_line_and_debug_says_where(study, monkeypatch, capsys):
    monkeypatch.setattr(options, "load_config", _raise(KeyError("lost\nkey")))
    assert main(["info", study]) == 1
    assert capsys.readouterr().err.startswith("error: unexpected KeyError: 'lost\\nkey'; this is a defect")
    assert main(["info", study, "--debug"]) == 1
    traceback, _, last = capsys.readouterr().err.rstrip("\n").rpartition("\n")
    assert traceback.startswith("Traceback")
    assert last.startswith("error: ")


def test_no_option_of_a_range_takes_nan(refused):
    """It compares with nothing: a bound would be switched off, or the work done before it is refused."""
    ranges = [
        (verb, option)
        for verb, command in verbs.commands.items()
        for option in command.params
        if isinstance(option.type, click.FloatRange)
    ]
    assert len(ranges) >= 6
    for verb, option in ranges:
        needed = ["x"] * sum(param.required for param in verbs.commands[verb].params)
        assert refused(verb, *needed, option.opts[0], "nan").startswith(f"Invalid value for '{option.opts[0]}': nan is")


def test_an_interrupt_that_became_another_error(study, monkeypatch, capsys):
    """As where it comes while a module written in C is imported."""

    def load(*_):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise SystemError("returned a result with an exception set") from error

    monkeypatch.setattr(options, "load_config", load)
    assert main(["info", study]) == 130
    assert capsys.readouterr().err.startswith("interrupted; ")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupted(study, monkeypatch, capsys):
    monkeypatch.setattr(options, "load_config", _raise(KeyboardInterrupt()))
    assert main(["info", study]) == 130
    line = "interrupted; what is finished is kept: the same command goes on where it was\n"
    assert capsys.readouterr().err == line


def test_show_keeps_wide_tables_whole_in_a_file(capsys):
    table = Table("score", *(f"set-{i}" for i in range(20)))
    table.add_row("knn", *["0.123456"] * 20)
    show(None)
    show(["a line", "another [not markup]", table])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["a line", "another [not markup]"]
    assert max(map(len, lines)) > 200
    assert not any("…" in line for line in lines)
