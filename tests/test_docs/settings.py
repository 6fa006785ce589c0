"""Keys of an experiment file, from its schema, and keys as documents write them."""

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel

from pipeline.config import RunConfig

EXTENDS = "extends"  # a key of the file that is gone once it is loaded


def _model(annotation: Any) -> type[BaseModel] | None:
    """The table of settings that a key holds, or a list of them; None where it holds a value."""
    if members := get_args(annotation):
        return next(filter(None, map(_model, members)), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _keys(model: type[BaseModel], at: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        below = _model(field.annotation)
        if below is None:
            yield f"{at}{name}"
        else:
            yield from _keys(below, f"{at}{name}.")


# `train.lr`, `sets.images`, …; those of entries of lists without the entry's name.
SETTINGS = frozenset(_keys(RunConfig)) | {EXTENDS}
TABLES = frozenset(key.rpartition(".")[0] for key in SETTINGS) - {""}
LISTS = {"sets", "variants"}  # whose entries --set addresses by name
FREE = {"score.params", "sets.columns", "variants.set"}  # what is below these is checked where it is used


def key_of(text: str) -> str:
    """The key that dotted text names, ``sets.textures.images`` as ``sets.images``."""
    table, _, rest = text.partition(".")
    if table in LISTS and rest.count("."):
        rest = rest.partition(".")[2]
    key = f"{table}.{rest}" if rest else table
    return next((free for free in FREE if key.startswith(f"{free}.")), key)


def keys_in(document: Mapping[str, Any], at: str = "") -> Iterator[str]:
    """Every key of an experiment file, or of a part of one."""
    for name, value in document.items():
        key = f"{at}{name}"
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, Mapping) and key not in FREE:
                yield from keys_in(entry, f"{key}.")
            else:
                yield key
