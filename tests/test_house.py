"""The rules of the house, read from the source: layers, circles, doors of libraries, sizes, one name for one thing."""

import ast
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from stages.scorers import SCORERS
from tests.conftest import LONGEST

ROOT = Path(__file__).parent.parent
PACKAGES = ("cache", "stages", "pipeline")

# Lowest first. A module imports what is below its layer, or stays inside its own entry.
GROUND = ("stages.errors", "stages.config", "stages.progress", "stages.context", "stages.machine")
VERBS = ("stages.extract", "stages.train", "stages.finetune", "stages.score", "stages.predict", "stages.export")
LAYERS: tuple[tuple[str, ...], ...] = (
    ("cache",),
    GROUND,
    ("stages.files",),
    ("stages.metrics",),
    ("stages.inputs",),
    ("stages.networks",),
    ("stages.id_data",),
    ("stages.heads",),
    ("stages.scorers",),
    ("stages.mixture",),
    ("stages.training", "stages.extraction"),
    ("stages.detection",),
    ("stages.results",),
    (*VERBS, "stages.compare", "stages.sanity"),
    ("pipeline",),
)
LEVELS = {entry: level for level, entries in enumerate(LAYERS) for entry in entries}

# A library, and the only places that know it: a package, or a module.
DOORS = {
    "h5py": ("cache.shard",),
    "fsspec": ("cache.remote",),
    "faiss": ("stages.scorers.neighbours.bank",),
    "timm": ("stages.networks", "stages.training"),
    "distributed": ("pipeline.engine",),
    "click": (
        "pipeline.cli",
        "pipeline.options",
        "pipeline.detector_options",
        "pipeline.output_files",
        "pipeline.terminal",
    ),
    "tqdm": ("pipeline.progress",),
    "matplotlib": ("pipeline.report.figures",),
    "jinja2": ("pipeline.report.page", "pipeline.report.study"),
    "datasets": ("stages.inputs.images.huggingface",),
    "onnx": ("stages.detection.graph",),
    "onnxruntime": ("stages.detection.onnx_runtime",),
    "starlette": ("pipeline.serving",),
    "uvicorn": ("pipeline.serving.front",),
}
CLOSED = {  # what a package may never import
    "cache": {"torch", "torchvision", "timm", "sklearn", "scipy", "PIL", "pydantic", "rich", "datasets"},
    "stages": {"click", "rich", "tqdm", "dask", "distributed", "starlette", "uvicorn"},
}

BY_STRING = {"pipeline.stages_of_study", "stages.scorers"}  # import modules of their own when one is asked for

MOST_LINES = 400  # of a module
MOST_BODY_LINES = 50  # of a function
MOST_PARAMETERS = 7


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


@cache
def trees() -> dict[str, ast.Module]:
    """What each module says; read by the worker that asks, not by all that collect tests."""
    return {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in FILES.items()}


def for_types_alone(tree: ast.Module) -> set[int]:
    """Nodes under ``if TYPE_CHECKING``, which never run."""
    tests = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    return {id(node) for test in tests for statement in test.body for node in ast.walk(statement)}


def imported(module: str) -> Iterator[str]:
    """Every name that a module imports when it runs, at its top or in a function: of ``from a import b`` ``a.b``."""
    skipped = for_types_alone(trees()[module])
    for node in ast.walk(trees()[module]):
        if isinstance(node, ast.Import) and id(node) not in skipped:
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and id(node) not in skipped:
            assert node.level == 0, f"{module}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def project_module(name: str) -> str | None:
    """The module of the project that an imported name is, or is in."""
    while name and name not in FILES:
        name = name.rpartition(".")[0]
    return name or None


@cache
def imports() -> dict[str, set[str]]:
    return {module: set(imported(module)) for module in FILES}


@cache
def graph() -> dict[str, set[str]]:
    """Modules of the project that each imports."""
    return {
        module: {found for name in names if (found := project_module(name)) not in (None, module)}
        | {
            other
            for other in FILES
            if module in BY_STRING and other.startswith(f"{module}.") and "__main__" not in other
        }
        for module, names in imports().items()
    }


def entry_of(module: str) -> str | None:
    """The entry of `LAYERS` that a module belongs to."""
    while module and module not in LEVELS:
        module = module.rpartition(".")[0]
    return module or None


def within(module: str, places: tuple[str, ...]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


def libraries(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imports()[module]}


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for module, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{module}.{node.name}", node


def public_names(tree: ast.Module) -> Iterator[str]:
    """What a module defines for others: functions, classes, constants."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def test_every_module_is_seen():
    assert {"cache.shard", "stages.inputs.images", "stages.scorers.neighbours.knn", "pipeline.cli"} <= FILES.keys()
    assert "h5py" in libraries("cache.shard")
    assert "cache.store" in graph()["cache"]
    assert "distributed" in libraries("pipeline.engine")  # imported inside functions


def test_every_module_has_its_layer():
    assert not [module for module in FILES if entry_of(module) is None and module != "stages"]


def test_imports_go_down_the_layers():
    wrong = []
    for module, found in graph().items():
        for other in found:
            mine, theirs = entry_of(module), entry_of(other)
            if mine is None or theirs is None or mine == theirs:
                continue
            beside = mine in GROUND and theirs in GROUND
            if LEVELS[theirs] > LEVELS[mine] or (LEVELS[theirs] == LEVELS[mine] and not beside):
                wrong.append(f"{module} imports {other}")
    assert not wrong


def test_no_circle_of_imports():
    """Those inside functions count: what needs them is in the wrong place."""
    left = {module: set(found) for module, found in graph().items()}
    while free := [module for module, found in left.items() if not found & left.keys()]:
        for module in free:
            del left[module]
    assert not sorted(left)


@pytest.mark.parametrize("package", CLOSED)
def test_packages_know_no_library_of_others(package):
    found = {module: libraries(module) & CLOSED[package] for module in FILES if within(module, (package,))}
    assert not {module: wrong for module, wrong in found.items() if wrong}


@pytest.mark.parametrize("library", DOORS)
def test_heavy_libraries_have_one_door(library):
    users = {module for module in FILES if library in libraries(module)}
    assert users
    assert not {module for module in users if not within(module, DOORS[library])}


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_meet_on_disk(verb):
    """A verb's module is imported by the pipeline alone."""
    assert {module.partition(".")[0] for module, found in graph().items() if verb in found} == {"pipeline"}


def test_modules_are_imported_by_name_only():
    """Otherwise this file would not see it; but for a study's stages and for scores, loaded when one is asked for."""
    by_string = {m for m, names in imports().items() if names & {"importlib.import_module", "importlib.util", "runpy"}}
    assert by_string == BY_STRING
    assert all(scorer.__module__.startswith("stages.scorers.") for scorer in SCORERS.values())
    assert not any("__import__" in path.read_text(encoding="utf-8") for path in FILES.values())


ABSENT = {
    "cache": ("stages", "pipeline", "torch", "timm", "sklearn", "PIL", "pydantic"),
    "stages.machine": ("torch", "numpy", "pydantic"),
    "stages.networks.tokens": ("timm", "torchvision", "PIL", "pydantic"),
    "stages.detection": ("torch", "timm", "faiss", "h5py", "pyarrow", "sklearn", "matplotlib"),
    "stages.detection.onnx_runtime": ("torch", "torchvision", "timm", "onnxruntime"),
    "stages.networks.backbone": ("h5py", "pyarrow", "sklearn", "matplotlib"),
    "stages.score": ("torch", "timm", "torchvision", "huggingface_hub", "matplotlib", "pandas", "scipy.optimize"),
    "pipeline.stages_of_study.score": ("torch", "timm", "torchvision", "faiss", "sklearn", "matplotlib"),
    "pipeline.one_bundle": ("torch", "timm", "faiss", "h5py", "pyarrow", "sklearn", "matplotlib"),
    "pipeline.serving.supervisor": ("torch", "timm", "starlette", "uvicorn", "h5py", "pyarrow", "sklearn"),
    "pipeline.cli": ("torch", "timm", "sklearn", "faiss", "distributed", "matplotlib", "h5py", "pyarrow"),
}
# Each module is imported in a process of its own, forked from one that has loaded nothing, or numpy and torch where
# they are allowed: they take seconds, and so are loaded once.
IMPORTED = """
import importlib, json, os, sys

absent = json.loads(sys.argv[1])
for module in sorted(absent, key=lambda module: [name not in absent[module] for name in ("numpy", "torch")]):
    for name in {"numpy", "torch"} - set(absent[module]):
        importlib.import_module(name)
    if not (child := os.fork()):
        importlib.import_module(module)
        print(json.dumps([module, sorted(set(absent[module]) & sys.modules.keys())]), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def loaded():
    """What should be absent and is not where each of some modules is imported alone."""
    command = [sys.executable, "-c", IMPORTED, json.dumps(ABSENT)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(map(json.loads, run.stdout.splitlines()))


@pytest.mark.parametrize("module", ABSENT)
def test_light_modules_load_nothing_heavy(module, loaded):
    """Reading a cache needs no torch, scoring no network, and an experiment file is checked before either loads."""
    assert loaded[module] == []


def test_modules_are_read_in_one_sitting():
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in FILES.items()}
    assert not {module: n for module, n in lengths.items() if n > MOST_LINES}


def test_functions_are_short():
    long = {}
    for name, function in functions():
        body = function.body[1:] if ast.get_docstring(function) and len(function.body) > 1 else function.body
        n = (body[-1].end_lineno or 0) - body[0].lineno + 1
        if n > MOST_BODY_LINES:
            long[name] = n
    assert not long


def test_functions_have_few_parameters():
    many = {}
    for name, function in functions():
        given = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        n = len([argument for argument in given if argument.arg not in ("self", "cls")])
        if n > MOST_PARAMETERS:
            many[name] = n
    assert not many


def test_a_public_name_is_defined_once():
    owners: dict[str, list[str]] = defaultdict(list)
    for module, tree in trees().items():
        for name in set(public_names(tree)):
            if not name.startswith("_"):
                owners[name].append(module)
    assert not {name: modules for name, modules in owners.items() if len(modules) > 1}


def test_the_files_that_tests_begin_with_are_there():
    assert not [name for name in LONGEST if not (ROOT / "tests" / name).is_file()]
