"""What a graph of ONNX says, looked at before a runtime believes it; of protobuf's wire format it takes a page.

ONNX Runtime reads what a graph names: tensors in other files, at any path; operations of other libraries; loops without
end; sizes that are only said. `stages.detection.graph` writes none of that, so whatever has it is refused unread.
"""

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from stages.errors import InputError

_MOST_NODES = 100_000
_LARGEST_NUMBER = 1 << 24  # that a graph computes shapes from; slices end at the largest there is
_NO_END = (1 << 63) - 1

# Numbers of fields in onnx.proto.
_MODEL = {
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    14,
}  # versions, producer, texts, graph, operators' versions: no functions, no training
_MODEL_GRAPH, _MODEL_OPERATORS = 7, 8
_GRAPH = {1, 2, 5, 10, 11, 12, 13, 14, 16}  # nodes, names, tensors, texts, inputs, outputs: no sparse tensors
_GRAPH_NODE, _GRAPH_TENSOR = 1, 5
_NODE_OPERATION, _NODE_ATTRIBUTE, _NODE_DOMAIN = 4, 5, 7
_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS = 5, 10
_ATTRIBUTE_GRAPHS = {6, 11, 22, 23}  # branches and loops; sparse tensors
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_RAW, _TENSOR_EXTERNAL, _TENSOR_PLACE = 1, 2, 9, 13, 14
_TENSOR_VALUES = {4, 5, 6, 7, 10, 11}  # other ways to store values
_OPERATORS_DOMAIN = 1
# Bytes of an element by the number of its type: float, uint8, int8, …; of those that the exporter writes.
_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
_INT64 = 7


class _Field(NamedTuple):
    number: int
    value: int | memoryview  # a number, or what has a length


def check_graph(graph: bytes) -> None:
    """Refuse what `stages.detection.graph` does not write.

    Args:
        graph: a file of ONNX.

    Raises:
        InputError: it is truncated, or reaches beyond itself: other files, other libraries, loops, sizes that lie.
    """
    seen = False
    for field in _fields(memoryview(graph)):
        if field.number not in _MODEL:
            raise _refused(f"has part {field.number} of a model, such as functions or training")
        if field.number == _MODEL_OPERATORS:
            _check_domain(_text(field, _OPERATORS_DOMAIN))
        if field.number == _MODEL_GRAPH:
            seen = True
            _check_nodes(_message(field))
    if not seen:
        raise _refused("has no graph")


def _check_nodes(graph: memoryview) -> None:
    nodes = 0
    for field in _fields(graph):
        if field.number not in _GRAPH:
            raise _refused(f"has part {field.number} of a graph, such as sparse tensors")
        if field.number == _GRAPH_TENSOR:
            _check_tensor(_message(field))
        elif field.number == _GRAPH_NODE:
            nodes += 1
            _check_node(field)
    if not 0 < nodes <= _MOST_NODES:
        raise _refused(f"has {nodes} operations")


def _check_node(node: _Field) -> None:
    _check_domain(_text(node, _NODE_DOMAIN))
    for attribute in _fields(_message(node)):
        if attribute.number != _NODE_ATTRIBUTE:
            continue
        for field in _fields(_message(attribute)):
            if field.number in _ATTRIBUTE_GRAPHS:
                raise _refused(f"has {_text(node, _NODE_OPERATION)[:20]!a}, which holds a graph of its own")
            if field.number in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
                _check_tensor(_message(field))


def _check_domain(domain: str) -> None:
    if domain not in ("", "ai.onnx"):
        raise _refused(f"has operations of {domain[:40]!a}: those of ONNX alone are run")


def _check_tensor(tensor: memoryview) -> None:
    """Refuse one that is not all there."""
    dims: list[int] = []
    kind, raw = 0, memoryview(b"")
    for field in _fields(tensor):
        if field.number == _TENSOR_EXTERNAL or (field.number == _TENSOR_PLACE and field.value):
            raise _refused("has a tensor in another file")
        if field.number in _TENSOR_VALUES:
            raise _refused("has a tensor whose values are not stored as bytes")
        if field.number == _TENSOR_DIMS:
            dims += [field.value] if isinstance(field.value, int) else _numbers(field.value)
        elif field.number == _TENSOR_TYPE and isinstance(field.value, int):
            kind = field.value
        elif field.number == _TENSOR_RAW:
            raw = _message(field)
    if kind not in _BYTES or prod(dims) * _BYTES[kind] != len(raw):
        raise _refused(f"has a tensor of type {kind} and shape {str(dims)[:60]} in {len(raw)} bytes")
    if kind == _INT64 and any(_LARGEST_NUMBER < abs(each) < _NO_END for each in raw.cast("q").tolist()):
        raise _refused(f"has whole numbers above {_LARGEST_NUMBER}, which no shape here needs")


def _text(message: _Field, number: int) -> str:
    """A field of text in a message, the last where it stands several times; empty where it does not."""
    found = [field for field in _fields(_message(message)) if field.number == number]
    return bytes(_message(found[-1])).decode("utf-8", "replace") if found else ""


def _message(field: _Field) -> memoryview:
    if isinstance(field.value, int):
        raise _refused("has a number where a message belongs")
    return field.value


def _fields(message: memoryview) -> Iterator[_Field]:
    """Fields of a message of protobuf."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield _Field(number, value)
            continue
        if wire == 2:
            length, at = _varint(message, at)
        else:
            length = {1: 8, 5: 4}.get(wire, len(message))
        if at + length > len(message):
            raise _refused("is damaged, or truncated")
        yield _Field(number, message[at : at + length])
        at += length


def _numbers(packed: memoryview) -> list[int]:
    found, at = [], 0
    while at < len(packed):
        value, at = _varint(packed, at)
        found.append(value)
    return found


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """A number, and where the next begins."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _refused("is damaged, or truncated")


def _refused(what: str) -> InputError:
    return InputError(f"model.onnx: {what}")
