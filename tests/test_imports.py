"""Who may import whom, read from the source: pipeline → stages → cache, and one door for each heavy library."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.scorers import SCORERS

ROOT = Path(__file__).parent.parent
PACKAGES = ("cache", "stages", "pipeline")
VERBS = ("stages.extract", "stages.train", "stages.finetune", "stages.score", "stages.predict")

# A library, and the only modules that know it.
DOORS = {
    "h5py": {"cache.shard"},
    "faiss": {"stages.scorers.neighbours.bank"},
    "timm": {
        "stages.networks.backbone",
        "stages.networks.weights.loading",
        "stages.training.augment",
        "stages.training.objectives",
        "stages.training.images",
        "stages.training.optim",
    },
    "dask": {"pipeline.engine"},
    "distributed": {"pipeline.engine"},
    "click": {"pipeline.cli", "pipeline.options", "pipeline.terminal"},
    "tqdm": {"pipeline.progress"},
    "matplotlib": {"pipeline.report.figures"},
    "jinja2": {"pipeline.report.page", "pipeline.report.study"},
    "datasets": {"stages.inputs.images.huggingface"},
}
# What a package may never import, whatever the module.
CLOSED = {
    "cache": {
        "stages",
        "pipeline",
        "torch",
        "torchvision",
        "timm",
        "sklearn",
        "scipy",
        "PIL",
        "pydantic",
        "rich",
        "datasets",
    },
    "stages": {"pipeline", "click", "rich", "tqdm", "dask", "distributed"},
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or in a function; ``from a import b`` gives ``a`` and ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


IMPORTS = {
    module_name(path): set(imported(path)) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))
}


def libraries(module: str) -> set[str]:
    return {name.partition(".")[0] for name in IMPORTS[module]}


def test_every_module_is_seen():
    assert {
        "cache.shard",
        "stages.networks.backbone",
        "stages.inputs.images",
        "stages.scorers.neighbours.knn",
        "pipeline.cli",
    } <= IMPORTS.keys()
    assert "h5py" in libraries("cache.shard")
    assert "cache.FeatureCache" in IMPORTS["stages.id_data.rows"]
    assert "distributed" in libraries("pipeline.engine")  # imported inside functions


@pytest.mark.parametrize("package", CLOSED)
def test_packages_know_nothing_of_those_above(package):
    wrong = {m: both for m in IMPORTS if m.split(".")[0] == package and (both := libraries(m) & CLOSED[package])}
    assert not wrong


@pytest.mark.parametrize("library", DOORS)
def test_heavy_libraries_have_one_door(library):
    assert {module for module in IMPORTS if library in libraries(module)} <= DOORS[library]


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_meet_on_disk_and_nouns_never_import_them(verb):
    """A verb's module is imported by the command line's package alone."""
    users = {module for module, names in IMPORTS.items() if verb in names}
    assert {user.split(".")[0] for user in users} == {"pipeline"}


def test_modules_are_imported_by_name_only():
    """Otherwise this file would not see it; but for a study's stages and for scores, loaded when one is asked for."""
    by_text = {m for m, names in IMPORTS.items() if names & {"importlib.import_module", "importlib.util", "runpy"}}
    assert by_text == {"pipeline.stages_of_study", "stages.scorers"}
    assert all(scorer.__module__.startswith("stages.scorers.") for scorer in SCORERS.values())
    sources = [path.read_text(encoding="utf-8") for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert not any("__import__" in source for source in sources)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("cache", ("stages", "pipeline", "torch", "timm", "sklearn", "PIL", "pydantic")),
        ("stages.machine", ("torch", "numpy", "pydantic")),
        ("stages.networks.tokens", ("timm", "torchvision", "PIL", "pydantic")),
        ("stages.score", ("timm", "torchvision", "huggingface_hub", "matplotlib")),
        ("pipeline.cli", ("torch", "timm", "sklearn", "faiss", "distributed", "matplotlib", "h5py", "pyarrow")),
    ],
)
def test_light_modules_load_nothing_heavy(module, absent):
    """Reading a cache needs no torch, and the command line checks an experiment file before anything heavy loads."""
    command = f"import sys, {module}; print(*set({absent!r}) & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
