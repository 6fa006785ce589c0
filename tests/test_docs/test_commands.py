"""Every command that a document shows is one: make knows the target, the command line the verb and its options."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from pipeline.cli import verbs
from pipeline.config import load_config
from tests.test_docs.pages import PAGES, ROOT
from tests.test_docs.settings import SETTINGS, key_of

STARTS = ("make", "python", "torchrun", "pip", "apt-get")
PLACEHOLDERS = {"VERB", "…"}


def commands(page):
    """Lines of blocks, and code inside lines, that begin as a command does; without comments."""
    lines = [line for block in page.blocks("") for line in block.splitlines()]
    mentioned = [f"{span} DATA=folder" if re.fullmatch(r"make [\w-]+", span) else span for span in page.spans]
    for text in [*lines, *mentioned]:
        if text.split(" ")[0] in STARTS:
            words = shlex.split(re.sub(r"\s+#.*", "", text))
            if len(words) > 1 and not PLACEHOLDERS & set(words):
                yield words


COMMANDS = sorted({tuple(words) for page in PAGES.values() for words in commands(page)})


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """What make would run, in a checkout whose environment is ready."""
    home = tmp_path_factory.mktemp("checkout")
    shutil.copy(ROOT / "Makefile", home)
    stages = Path("pipeline", "stages_of_study")  # which are targets
    shutil.copytree(ROOT / stages, home / stages)
    for name in ("pyproject.toml", ".ci/constraints.txt", ".venv/.installed-cpu"):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).touch()

    def run(arguments):
        told = subprocess.run(
            ["env", "-i", shutil.which("make"), "--dry-run", "--no-print-directory", "FAISS=cpu", *arguments],
            cwd=home,
            capture_output=True,
            text=True,
            check=True,
        )
        lines = told.stdout.replace("\\\n", " ").splitlines()
        return [shlex.split(line.replace(".venv/bin/", "")) for line in lines if line.startswith(".venv/bin/")]

    return run


def assert_known(words):
    """What follows ``python``."""
    assert words[0] == "-m", words
    module, arguments = words[1], words[2:]
    if module == "pipeline":
        assert_pipeline(arguments)
    elif module.startswith("tests."):
        assert importlib.util.find_spec(module) is not None, module
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text("utf-8")
        assert [word for word in arguments if word.startswith("--") and f'"{word}"' not in source] == []
    elif module != "pytest":
        assert importlib.util.find_spec(f"{module}.__main__") is not None, module
        assert not arguments


def assert_pipeline(arguments):
    """The command line takes it; an experiment file that comes with the project is loaded with what is overridden."""
    assert arguments, "a verb is missing"
    verb, *rest = arguments
    command = verbs.commands[verb]
    if "--help" in rest:
        return
    with command.make_context(verb, rest.copy()) as context:
        overrides = context.params.get("overrides", ())
        for override in overrides:
            assert key_of(override.partition("=")[0]) in SETTINGS, override
        experiment = context.params.get("experiment")
    if experiment is not None and (ROOT / experiment).is_file():
        load_config(ROOT / experiment, overrides)


@pytest.mark.parametrize("words", COMMANDS, ids=[" ".join(words) for words in COMMANDS])
def test_command(words, make):
    if words[0] == "make":
        for told in make(words[1:]):
            if told[0] == "python":
                assert_known(told[1:])
        given = [word.partition("=")[0] for word in words[1:] if "=" in word]
        makefile = (ROOT / "Makefile").read_text("utf-8")
        assert [name for name in given if f"$({name})" not in makefile] == []
    elif words[0] == "python":
        assert_known(words[1:])
    elif words[0] == "torchrun":
        assert_known(words[words.index("-m") :])
    elif words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
        assert re.fullmatch(r"mofe-feature-cache\[(\w+)\]", words[-1])[1] in extras


def test_there_are_commands():
    assert {"make", "python", "torchrun", "pip"} <= {words[0] for words in COMMANDS}
    assert len(COMMANDS) > 30


def test_every_option_that_text_names_exists():
    known = {name for verb in verbs.commands.values() for option in verb.params for name in option.opts}
    files = [*(ROOT / "tests").rglob("*.py"), ROOT / "Makefile", *(ROOT / "pipeline").rglob("*.sbatch")]
    others = "".join(path.read_text("utf-8") for path in files)
    for page in PAGES.values():
        for option in {word for span in page.spans for word in re.findall(r"(?<![\w-])--[a-z][a-z-]+", span)}:
            assert option in known or option in others, (page.name, option)


def test_every_verb_is_documented():
    text = PAGES["pipeline/EXPERIMENTS.md"].text
    assert [verb for verb in verbs.commands if not re.search(rf"^\| `{verb}[ `]", text, re.MULTILINE)] == []


def test_every_option_is_documented():
    """But those that its verb's own page has, and help."""
    text = "".join(page.text for page in PAGES.values())
    options = {name for verb in verbs.commands.values() for option in verb.params for name in option.opts}
    assert [name for name in options if name.startswith("--") and name not in text] == []
