"""Typed values come back as they were, to the bit; whatever else stands in a file is one line that says where."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from numpy.typing import NDArray

from stages.errors import InputError
from stages.files.packing import narrowed, pack, unpack
from stages.scorers.neighbours.bank import FeatureBank


class Pair(NamedTuple):
    left: int
    right: str | None


@dataclass(frozen=True, eq=False)
class Thing:
    weight: NDArray[np.float32]
    scale: float
    kind: Literal["one", "two"]
    pairs: tuple[Pair, ...]
    names: dict[str, float]
    either: Pair | tuple[int, ...]
    record: dict[str, Any]
    found: dict[int, float] = field(init=False, default_factory=dict)  # not stored


def thing(**changed: Any) -> Thing:
    usual: dict[str, Any] = {
        "weight": np.float32([[0.1, 2.0], [3.0, -np.inf]]),
        "scale": 0.1,
        "kind": "two",
        "pairs": (Pair(1, None), Pair(-2, "é")),
        "names": {"a": 1.0},
        "either": (1, 2),
        "record": {"rule": [1, None, {"x": 0.5}]},
    }
    return Thing(**usual | changed)


def stored(value: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """As it stands in a file."""
    arrays: dict[str, np.ndarray] = {}
    return json.loads(json.dumps(pack(value, arrays), allow_nan=False)), arrays


def test_what_is_stored_comes_back():
    document, arrays = stored(thing())
    assert document["weight"] == "float32"
    assert arrays.keys() == {"weight"}
    again = unpack(Thing, document, arrays)
    np.testing.assert_array_equal(again.weight, thing().weight)
    assert {**vars(again), "weight": 0} == {**vars(thing()), "weight": 0}
    assert unpack(Thing, *stored(thing(either=Pair(3, "x")))).either == Pair(3, "x")


@settings(max_examples=40)
@given(st_numpy.arrays(st.sampled_from([np.float16, np.float32, np.float64]), st_numpy.array_shapes(min_side=0)))
def test_no_value_is_rounded(array):
    document, arrays = stored({"it": array})
    again = unpack(dict[str, NDArray[np.floating]], document, arrays)["it"]
    assert again.dtype == array.dtype
    np.testing.assert_array_equal(again, array)
    assert arrays["it"].nbytes <= array.nbytes


def test_features_that_were_cached_in_half_precision_take_half_the_room_and_give_the_same_distances():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(300, 24)).astype(np.float16).astype(np.float32)
    bank, queries = FeatureBank(features), rng.normal(size=(40, 24)).astype(np.float32)
    document, arrays = stored(bank)
    assert arrays["features"].dtype == np.float16
    again = unpack(FeatureBank, document, arrays)
    for ours, theirs in zip(again.search(queries, 20), bank.search(queries, 20), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(FeatureBank(arrays["features"]).search(queries, 20)[0], bank.search(queries, 20)[0])


def test_memory_layout_is_kept():
    """A product's last bits depend on it."""
    turned = np.asfortranarray(np.random.default_rng(0).normal(size=(5, 3)))
    again = unpack(NDArray[np.float64], *stored(turned))
    assert again.flags.f_contiguous
    np.testing.assert_array_equal(again, turned)


def test_narrowing_keeps_signs_infinities_and_small_numbers():
    values = np.array([-0.0, np.inf, -np.inf, 2.0**-24, 65504.0])
    assert narrowed(values).dtype == np.float16
    assert np.signbit(narrowed(values)[0])
    assert narrowed(np.array([65520.0])).dtype == np.float32
    assert narrowed(np.array([2.0**-25])).dtype == np.float32
    assert narrowed(np.array([np.nan])).dtype == np.float64


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"scale": "0.1"}, "^scale: 0.1 given$"),
        ({"scale": True}, "^scale: True given$"),
        ({"kind": "three"}, "^kind: three given$"),
        ({"kind": []}, r"^kind: \[\] given$"),
        ({"pairs": {}}, r"^pairs: {} given, a list expected$"),
        ({"pairs": [{"left": 1}]}, r"^pairs\.0\.right: missing$"),
        ({"pairs": [{"left": 1.0, "right": None}]}, r"^pairs\.0\.left: 1\.0 given$"),
        ({"pairs": [{"left": 2**63, "right": None}]}, r"^pairs\.0\.left: 9223372036854775808 given$"),
        ({"names": [1.0]}, r"^names: \[1\.0\] given, an object expected$"),
        ({"either": 3}, "^either: 3 given$"),
        ({"weight": "float64"}, "^weight: float32 stored as float64 given, float32 expected$"),
        ({"weight": "float16"}, "^weight: float32 stored as float16 given, float32 expected$"),
        ({"weight": "object"}, "^weight: object given, the type of an array expected$"),
        ({"weight": 4}, "^weight: 4 given, the type of an array expected$"),
        ({"more": 1}, "^more: unknown key$"),
        ({"m" * 99: 1}, "^m{59}…: unknown key$"),
        ({"line\nbreak": 1}, r"^'line\\nbreak': unknown key$"),
    ],
)
def test_another_value_is_refused_in_one_line(changed, said):
    document, arrays = stored(thing())
    with pytest.raises(InputError, match=said):
        unpack(Thing, document | changed, arrays)


def test_arrays_too_many_or_too_few_are_refused():
    document, arrays = stored(thing())
    with pytest.raises(InputError, match=r"^weight: no such array$"):
        unpack(Thing, document, {})
    with pytest.raises(InputError, match=r"^extra: an array that nothing asks for$"):
        unpack(Thing, document, arrays | {"extra": np.zeros(1)})


def test_what_a_class_refuses_is_said_with_its_place():
    document, _ = stored({"bank": FeatureBank(np.eye(2))})
    with pytest.raises(InputError, match=r"^bank: a bank of shape \(0, 2\) has no features to compare with$"):
        unpack(dict[str, FeatureBank], document, {"bank.features": np.zeros((0, 2), np.float16)})


def test_only_what_can_be_read_again_is_stored():
    with pytest.raises(TypeError, match=r"^it: object cannot be stored$"):
        pack({"it": object()}, {})
    with pytest.raises(TypeError, match=r"^it: an array of object cannot be stored$"):
        pack({"it": np.array([None])}, {})
