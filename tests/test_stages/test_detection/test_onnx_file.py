"""A graph that reaches beyond itself, or lies, is refused in one line before a runtime reads it."""

import numpy as np
import pytest

from stages.detection.onnx_file import check_graph
from stages.errors import InputError

pytest.importorskip("onnx", reason="needs the extra export")
pytest.importorskip("onnxruntime", reason="needs the extra export")

from onnx import TensorProto, helper, numpy_helper

from stages.detection.onnx_runtime import open_session

WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)


def small_model(*nodes, tensors=(), **settings):
    """``y = x @ weight + shift``, and whatever else is asked for."""
    own = [helper.make_node("MatMul", ["x", "weight"], ["z"]), helper.make_node("Add", ["z", "shift"], ["y"])]
    weight = numpy_helper.from_array(WEIGHT, "weight")
    shift = numpy_helper.from_array(np.float32([1, 2, 3, 4]), "shift")
    graph = helper.make_graph(
        [*nodes, *own],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [weight, shift, *tensors],
    )
    operators = [helper.make_opsetid(domain, 18) for domain in ("", *settings.pop("domains", ()))]
    return helper.make_model(graph, opset_imports=operators, ir_version=8, **settings)


def test_what_is_as_it_is_written_runs():
    graph = small_model().SerializeToString()
    check_graph(graph)
    (found,) = open_session(graph).run(["y"], {"x": np.ones((2, 3), np.float32)})
    np.testing.assert_array_equal(found, np.ones((2, 3), np.float32) @ WEIGHT + np.float32([1, 2, 3, 4]))


def elsewhere(place):
    """A tensor whose values are in another file."""
    tensor = TensorProto(name="more", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=place)
    return small_model(tensors=[tensor])


def branching():
    then = helper.make_graph([], "then", [], [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)])
    return small_model(helper.make_node("If", ["x"], ["w"], then_branch=then, else_branch=then))


def huge_shape():
    shape = numpy_helper.from_array(np.int64([1 << 40]))
    return small_model(
        helper.make_node("Constant", [], ["shape"], value=shape), helper.make_node("ConstantOfShape", ["shape"], ["w"])
    )


HOSTILE = {
    "a file beside it": (lambda: elsewhere("weights.bin"), "a tensor in another file"),
    "a file anywhere": (lambda: elsewhere("/etc/passwd"), "a tensor in another file"),
    "a file above": (lambda: elsewhere("../../secret"), "a tensor in another file"),
    "operations of a library": (
        lambda: small_model(helper.make_node("Run", ["x"], ["w"], domain="evil")),
        "operations of 'evil'",
    ),
    "operations of the runtime": (lambda: small_model(domains=["com.microsoft"]), "operations of 'com.microsoft'"),
    "a branch": (branching, "'If', which holds a graph of its own"),
    "a huge shape": (huge_shape, "whole numbers above 16777216"),
    "a tensor that is not there": (
        lambda: small_model(tensors=[TensorProto(name="m", data_type=1, dims=[1 << 40, 1 << 20])]),
        r"a tensor of type 1 and shape \[1099511627776, 1048576\] in 0 bytes",
    ),
    "a tensor of texts": (
        lambda: small_model(tensors=[helper.make_tensor("m", TensorProto.STRING, [1], [b"x"])]),
        "a tensor whose values are not stored as bytes",
    ),
    "a function": (
        lambda: small_model(
            functions=[helper.make_function("own", "f", ["a"], ["a"], [], [helper.make_opsetid("", 18)])]
        ),
        "part 25 of a model",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_reaches_beyond_itself_is_refused(name):
    make, said = HOSTILE[name]
    with pytest.raises(InputError, match=rf"^model\.onnx: has {said}"):
        check_graph(make().SerializeToString())


@pytest.mark.parametrize(
    "graph", [b"", b"no graph", b"\x3a", b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\x38\x01"]
)
def test_what_is_no_graph_is_refused(graph):
    with pytest.raises(InputError, match=r"^model\.onnx: "):
        check_graph(graph)


def test_nonsense_is_refused_or_runs(pytestconfig):
    """Any byte changed, or cut: one line, or a session."""
    graph, rng, refused = small_model().SerializeToString(), np.random.default_rng(0), []
    n = pytestconfig.getoption("--mutants")
    for number in range(n):
        changed = bytearray(graph[: rng.integers(len(graph))] if number % 4 == 0 else graph)
        for place in rng.integers(len(changed), size=number % 3 + 1) if changed else ():
            changed[place] = rng.integers(256)
        try:
            check_graph(bytes(changed))
            open_session(bytes(changed))
        except InputError as error:
            refused.append(str(error))
    assert all(said.startswith("model.onnx: ") and "\n" not in said for said in refused)
    assert len(refused) > n / 4
