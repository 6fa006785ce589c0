"""The experiment file: read, overridden by ``--set``, and checked as a whole before any work.

``extends = "other.toml"`` takes that file's keys and puts this one's over them: tables are merged, all else is
replaced. Paths are relative to the file that names them; those of a set's images and features to ``data``, where it
is given.
"""

import datetime
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cache import is_remote
from pipeline.config.explain import as_given, first_problem
from pipeline.config.schema import ConfigError, RunConfig
from pipeline.config.tables import FeaturesConfig
from stages.config import nearest

# Keys that hold a path, and the words that stand there for something else ("*": any entry of a list).
_PATHS: dict[str, tuple[str, ...]] = {
    "data": (),
    "work": (),
    "cache.root": (),
    "backbone.weights": ("hub", "embedded"),
    "sets.*.images": (),
    "sets.*.features": (),
    "sets.*.root": (),
    "sets.*.classes": (),
    "train.grouping": ("balanced", "kmeans"),
    "variants.*.set.train.grouping": ("balanced", "kmeans"),
}
_BELOW_DATA = {"sets.*.images", "sets.*.features", "sets.*.root"}
_IN_STORES = {"data", "cache.root", "sets.*.images", "sets.*.root"}  # may be a URL of an object store


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read an experiment file.

    Args:
        path: the TOML file; paths in it are relative to its folder, those of sets to ``data``.
        overrides: ``a.b=value``; a value is a TOML literal, or else text, and paths are relative to the current
            folder. ``sets.<name>.key`` and ``variants.<name>.key`` address an entry by its name.

    Raises:
        ConfigError: with the first problem and the number of the others.
    """
    given: dict[str, Any] = {}
    for text in overrides:
        if text.partition("=")[0].strip() == "data":
            _override(given, text)
    document = _open(str(path), given.get("data"))
    overridden = [_override(document, text) for text in overrides]
    cache = document.setdefault("cache", {})
    if isinstance(cache, dict):
        cache.setdefault("root", os.path.join(str(document.get("work")), "cache"))
    try:
        return RunConfig.model_validate(document)
    except ValidationError as error:
        first = first_problem(error, document, RunConfig)
        raise ConfigError(f"{'--set ' if _comes_from(overridden, first) else f'{path}: '}{first}") from error


def features_config(given: Mapping[str, Mapping[str, Any]], overrides: Sequence[str] = ()) -> FeaturesConfig:
    """The network and what is kept of it, where there is no experiment file.

    Args:
        given: keys of ``[backbone]`` and ``[cache]``; paths are relative to the current folder.
        overrides: ``a.b=value`` as for `load_config`.

    Raises:
        ConfigError: with the first problem and the number of the others.
    """
    document = _resolve({table: dict(keys) for table, keys in given.items()}, os.getcwd(), os.getcwd(), "")
    for text in overrides:
        _override(document, text)
    try:
        return FeaturesConfig.model_validate(document)
    except ValidationError as error:
        raise ConfigError(first_problem(error, document, FeaturesConfig)) from error


def _comes_from(overridden: Iterable[str], problem: str) -> bool:
    key, _, text = problem.replace(" #", ".", 1).partition(": ")  # `seeds #2` stands in `seeds`
    unknown = text.startswith("unknown key")  # the table itself may then stand in the override alone
    return any(f"{key}.".startswith(f"{name}.") or (unknown and name.startswith(f"{key}.")) for name in overridden)


def _open(path: str, data: object, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """The document with every path in it absolute, over the one that it extends.

    Args:
        path: the TOML file.
        data: what the paths of sets are relative to, where that is known already.
        above: absolute paths of the files that extend this one.
    """
    raw, here = read_toml(path), os.path.abspath(path)
    folder, where = os.path.dirname(here), f"{path}: "
    data = data or _resolve(raw.get("data"), folder, folder, where, "data")
    parent: dict[str, Any] = {}
    if (extended := raw.pop("extends", None)) is not None:
        if not isinstance(extended, str):
            raise ConfigError(f"{where}extends: {as_given(extended)} given, must be the path of an experiment file")
        if not os.path.isfile(os.path.join(folder, extended)):
            raise ConfigError(f"{where}extends: {as_given(extended)} given, there is no such file beside it")
        if here in above:
            raise ConfigError(f"{where}extends: {extended} extends this file; a file cannot extend itself")
        parent = _open(os.path.join(folder, extended), data, (*above, here))
        data = data or parent.get("data")
    return _over(parent, _resolve(raw, folder, data if isinstance(data, str) else folder, where))


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Two documents as one: tables merged, all else from above."""
    both = {key: _over(below[key], above[key]) for key in below.keys() & above.keys() if _are_tables(below, above, key)}
    return below | above | both


def _are_tables(below: dict[str, Any], above: dict[str, Any], key: str) -> bool:
    return isinstance(below[key], dict) and isinstance(above[key], dict)


def read_toml(path: str | Path) -> dict[str, Any]:
    """A TOML file as it stands.

    Raises:
        ConfigError: no such file, no text, or no TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give the experiment's TOML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8; give the experiment's TOML file") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def _resolve(value: Any, base: str, data: str, where: str, at: str = "") -> Any:
    """The same document with every path in it absolute.

    Args:
        value: document, or a part of it.
        base: what paths are relative to.
        data: what the paths of sets are relative to.
        where: begins the message of an error.
        at: dotted key of the part.
    """
    if isinstance(value, dict):
        return {key: _resolve(child, base, data, where, f"{at}.{key}" if at else key) for key, child in value.items()}
    if isinstance(value, list):
        return [_resolve(child, base, data, where, f"{at}.*") for child in value]
    words = _PATHS.get(at)
    if words is None or not isinstance(value, str) or value in words or value.startswith("sklearn:"):
        return value
    if not value.strip() or "\0" in value:
        raise ConfigError(f"{where}{at}: {as_given(value)} given, must be a path")
    below = data if at in _BELOW_DATA else base
    path = value if is_remote(value) else os.path.join(below, os.path.expanduser(value))
    if is_remote(path) and at not in _IN_STORES:
        raise ConfigError(f"{where}{at}: {as_given(path)} given, must be a path of this machine")
    return path if is_remote(path) else os.path.abspath(path)


def _override(document: dict[str, Any], text: str) -> str:
    """Set one key of the document in place; returns the key."""
    key, equals, literal = text.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {text}: must be key=value, such as train.epochs=5")
    node, rest, at = document, key, ""
    while True:
        head, _, rest = rest.partition(".")
        at = f"{at}.{head}" if at else head
        if not rest:
            node[head] = _resolve(_literal(literal), os.getcwd(), os.getcwd(), "--set ", at)
            return key
        child = node.setdefault(head, {})
        if isinstance(child, list):
            child, rest = _entry(child, rest, key)
            at += ".*"
        if not isinstance(child, dict):
            raise ConfigError(f"--set {key}: {head} is a single value, it has no keys")
        node = child


def _entry(entries: list[Any], rest: str, key: str) -> tuple[Any, str]:
    """The entry that the rest of a dotted key begins with, by name (names may have dots), and what remains."""
    named = {str(entry["name"]): entry for entry in entries if isinstance(entry, dict) and "name" in entry}
    matches = [name for name in named if rest.startswith(f"{name}.")]
    if not matches:
        hint = nearest(rest.split(".")[0], named)
        raise ConfigError(f"--set {key}: must be <list>.<name>.<key> with the name of an entry{hint}")
    name = max(matches, key=len)
    return named[name], rest[len(name) + 1 :]


def _literal(text: str) -> Any:
    # Inside an inline table, a comment or a line break is no valid end of a literal, so `a#1` stays text.
    try:
        parsed = tomllib.loads(f"v = {{ v = {text} }}")["v"]
    except (ValueError, RecursionError):
        return text
    is_date = isinstance(parsed["v"], datetime.date | datetime.time)  # no setting is one
    return text if is_date or len(parsed) > 1 else parsed["v"]
