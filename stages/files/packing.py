"""Typed values as JSON and named arrays, and back: what a class says of its fields is what may stand in the file.

The JSON holds no name of a class. Whoever reads it says which type he expects, and everything that is not of that type
(a key too many, a number where a text should be, an array of another kind) is an `InputError`. So what a stranger wrote
can build nothing but what was asked for.

==================================  =================================================================================
None, bool, int, float, text        itself
tuple, list                         a JSON array
dataclass, named tuple              a JSON object of its fields, without those that its constructor does not take
mapping of text                     a JSON object
array, rows that are read lazily    the array under the place's name (``head.weight``); in the JSON its type
`Made`                              what it says that it is made of
==================================  =================================================================================
"""

import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Protocol, Self, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from stages.errors import InputError

Kind = TypeVar("Kind")

_KINDS = {name: np.dtype(name) for name in ("float16", "float32", "float64", "int32", "int64", "uint8", "bool")}
_TRANSPOSED = "transposed "  # before the type of an array in Fortran's order: last bits of a product depend on it
_BLOCK = 1 << 20  # values that are looked at together
_DEEPEST = 64


class Made(Protocol):
    """An object that is stored as something else, which it is made of again."""

    def parts(self) -> Any:
        """What it is made of; the annotation says how that is stored."""

    @classmethod
    def of_parts(cls, parts: Any) -> Self:
        """The object again."""


# ----------------------------------------------------------------------------------------------------------- to a file


def pack(value: Any, arrays: dict[str, NDArray[Any]], at: str = "") -> Any:
    """A value as JSON; its arrays are put into `arrays`, each in the narrowest float type that keeps every value.

    Args:
        value: of the kinds above.
        arrays: by name.
        at: begins the names.

    Raises:
        TypeError: of no kind that can be stored.

    >>> arrays = {}
    >>> pack({"mean": np.array([0.5, 2.0]), "n": 3}, arrays), arrays["mean"].dtype.name
    ({'mean': 'float64', 'n': 3}, 'float16')
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "__array__"):
        return _pack_array(np.asarray(value), arrays, at)
    if isinstance(value, Mapping):
        return {str(key): pack(each, arrays, _below(at, str(key))) for key, each in value.items()}
    if hasattr(value, "of_parts"):
        return pack(value.parts(), arrays, at)
    if names := _field_names(type(value)):
        return {name: pack(getattr(value, name), arrays, _below(at, name)) for name in names}
    if isinstance(value, tuple | list):
        return [pack(each, arrays, _below(at, str(index))) for index, each in enumerate(value)]
    raise TypeError(f"{at or 'the value'}: {type(value).__name__} cannot be stored")


def _pack_array(array: NDArray[Any], arrays: dict[str, NDArray[Any]], at: str) -> str:
    if array.dtype.name not in _KINDS:
        raise TypeError(f"{at}: an array of {array.dtype} cannot be stored")
    if at in arrays:
        raise TypeError(f"two arrays are called {at}")
    turned = array.ndim > 1 and array.flags.f_contiguous and not array.flags.c_contiguous
    arrays[at] = np.asarray(narrowed(array.T if turned else array), order="C")
    return f"{_TRANSPOSED if turned else ''}{array.dtype.name}"


def narrowed(array: NDArray[Any]) -> NDArray[Any]:
    """The same values in the narrowest float type that gives each of them back: nothing is ever rounded.

    Features that were cached in float16 take two bytes again, whatever they were read as.

    >>> narrowed(np.array([1.5, -np.inf])).dtype.name, narrowed(np.array([1.0, 0.1])).dtype.name
    ('float16', 'float64')
    """
    if array.dtype.kind != "f":
        return array
    flat = array.reshape(-1)
    for kind in (np.float16, np.float32):
        if np.dtype(kind).itemsize < array.dtype.itemsize and all(_keeps(kind, block) for block in _blocks(flat)):
            return array.astype(kind)
    return array


def _blocks(flat: NDArray[Any]) -> Iterator[NDArray[Any]]:
    return (flat[start : start + _BLOCK] for start in range(0, len(flat), _BLOCK))


def _keeps(kind: type[np.floating], values: NDArray[Any]) -> bool:
    with np.errstate(over="ignore"):  # what does not fit is inf, and another value
        return bool(np.array_equal(values.astype(kind).astype(values.dtype), values))


def _below(at: str, name: str) -> str:
    return f"{at}.{name}" if at else name


def _field_names(kind: Any) -> tuple[str, ...]:
    """What a dataclass or a named tuple is made of; nothing where it is neither."""
    if is_dataclass(kind):
        return tuple(each.name for each in fields(kind) if each.init)
    return tuple(getattr(kind, "_fields", ()))


# --------------------------------------------------------------------------------------------------------- from a file


def unpack(kind: type[Kind] | Any, value: Any, arrays: Mapping[str, NDArray[Any]]) -> Kind:
    """What `pack` stored of a value of this type.

    Args:
        kind: as an annotation says it.
        value: the JSON.
        arrays: by name; each is to be asked for.

    Raises:
        InputError: anything else stands there, or more.
    """
    reader = _Reader(arrays)
    found: Kind = reader.read(kind, value, "", 0)
    if left := sorted(arrays.keys() - reader.used):
        raise InputError(f"{_shown(left[0])}: an array that nothing asks for")
    return found


class _Reader:
    """Builds values, and remembers which arrays they took."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.used: set[str] = set()
        self._arrays = arrays

    def read(self, kind: Any, value: Any, at: str, depth: int) -> Any:
        """A value of a type."""
        if depth > _DEEPEST:
            raise _wrong(at, "nested too deep")
        origin = get_origin(kind) or kind
        if origin is typing.Annotated:
            return self.read(get_args(kind)[0], value, at, depth)
        if origin in (Union, types.UnionType):
            return self._read_union(get_args(kind), value, at, depth)
        if _is_array(origin):
            return self._read_array(kind, value, at)
        if origin is Any or origin is object:
            return value
        if origin is Literal:
            return _checked(value in get_args(kind) and type(value) in map(type, get_args(kind)), value, at)
        if origin in _SCALARS:
            return _checked(*_SCALARS[origin](value), at)
        if isinstance(origin, type) and issubclass(origin, tuple) and not hasattr(origin, "_fields"):
            return self._read_tuple(get_args(kind), value, at, depth)
        if origin in (list, Sequence):
            (each,) = get_args(kind)
            return list(self._read_tuple((each, ...), value, at, depth))
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return self._read_mapping(get_args(kind)[1], value, at, depth)
        return self._read_object(kind, value, at, depth)

    def _read_union(self, kinds: tuple[Any, ...], value: Any, at: str, depth: int) -> Any:
        if value is None and type(None) in kinds:
            return None
        fitting = [kind for kind in kinds if kind is not type(None) and _may_be(kind, value)]
        if not fitting:
            raise _wrong(at, f"{_shown(value)} given")
        return self.read(fitting[0], value, at, depth)

    def _read_array(self, kind: Any, value: Any, at: str) -> NDArray[Any]:
        turned = isinstance(value, str) and value.startswith(_TRANSPOSED)
        dtype = _KINDS.get(value.removeprefix(_TRANSPOSED)) if isinstance(value, str) else None
        stored = self._arrays.get(at)
        if dtype is None or stored is None:
            raise _wrong(at, "no such array" if dtype else f"{_shown(value)} given, the type of an array expected")
        wanted = _element(kind)
        if not (np.issubdtype(dtype, wanted) and np.can_cast(stored.dtype, dtype, "safe")):
            raise _wrong(at, f"{stored.dtype} stored as {dtype} given, {wanted.__name__} expected")
        self.used.add(at)
        array = stored.astype(dtype, copy=False)
        return array.T if turned else array

    def _read_tuple(self, kinds: tuple[Any, ...], value: Any, at: str, depth: int) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise _wrong(at, f"{_shown(value)} given, a list expected")
        own = [kinds[0]] * len(value) if len(kinds) == 2 and kinds[1] is ... else list(kinds)
        if len(own) != len(value):
            raise _wrong(at, f"{len(value)} values given, {len(own)} expected")
        pairs = enumerate(zip(own, value, strict=True))
        return tuple(self.read(kind, each, _below(at, str(index)), depth + 1) for index, (kind, each) in pairs)

    def _read_mapping(self, kind: Any, value: Any, at: str, depth: int) -> dict[str, Any]:
        given = _object(value, at)
        return {key: self.read(kind, each, _below(at, key), depth + 1) for key, each in given.items()}

    def _read_object(self, kind: Any, value: Any, at: str, depth: int) -> Any:
        if hasattr(kind, "of_parts"):
            parts = self.read(get_type_hints(kind.parts)["return"], value, at, depth + 1)
            return _built(lambda: kind.of_parts(parts), at)
        names, given = _field_names(kind), _object(value, at)
        if not names:
            raise TypeError(f"{at}: {kind} cannot be read")
        if unknown := sorted(given.keys() - set(names)):
            raise _wrong(_below(at, unknown[0]), "unknown key")
        if missing := [name for name in names if name not in given]:
            raise _wrong(_below(at, missing[0]), "missing")
        hints = get_type_hints(kind, include_extras=True)
        read = {name: self.read(hints[name], given[name], _below(at, name), depth + 1) for name in names}
        return _built(lambda: kind(**read), at)


def _is_array(origin: Any) -> bool:
    return isinstance(origin, type) and (origin is np.ndarray or hasattr(origin, "__array__"))


def _element(kind: Any) -> type[np.generic]:
    """The type of an array's elements, as its annotation has it: ``NDArray[np.float64]``, ``NDArray[np.integer]``."""
    if get_origin(kind) is not np.ndarray:
        return np.floating  # rows that are read lazily
    (found,) = get_args(get_args(kind)[1])
    return np.generic if found is Any else found


def _may_be(kind: Any, value: Any) -> bool:
    """Whether JSON of this form can be of a type, as far as members of a union differ."""
    origin = get_origin(kind) or kind
    if origin in _SCALARS:
        return bool(_SCALARS[origin](value)[0])
    if origin is Literal:
        return value in get_args(kind)
    if _is_array(origin):
        return isinstance(value, str)
    if isinstance(origin, type) and issubclass(origin, tuple | list) and not hasattr(origin, "_fields"):
        return isinstance(value, list)
    return isinstance(value, dict)


def _number(value: Any) -> tuple[bool, Any]:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return fits, float(value) if fits else value


_SCALARS: dict[Any, Callable[[Any], tuple[bool, Any]]] = {
    type(None): lambda value: (value is None, None),
    bool: lambda value: (type(value) is bool, value),
    int: lambda value: (type(value) is int and abs(value) < 2**63, value),
    float: _number,
    str: lambda value: (type(value) is str, value),
}


def _checked(fits: bool, value: Any, at: str) -> Any:
    if not fits:
        raise _wrong(at, f"{_shown(value)} given")
    return value


def _object(value: Any, at: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(at, f"{_shown(value)} given, an object expected")
    return value


def _built(build: Callable[[], Any], at: str) -> Any:
    """What a class makes of its parts; that it refuses them is said with the place."""
    try:
        return build()
    except InputError as error:
        raise _wrong(at, str(error)) from error
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError) as error:
        raise _wrong(at, f"cannot be: {_shown(str(error))}") from error


def _wrong(at: str, what: str) -> InputError:
    return InputError(f"{_shown(at)}: {what}" if at else what)


def _shown(value: Any) -> str:
    """A value from a file, short and in one line, for a message."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
