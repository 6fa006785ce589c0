"""What is wrong with a document, as one line that names the key, what was given and what is allowed.

``train.epochs: 0 given, must be greater than 0``
"""

import json
import re
from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from stages.config import nearest
from stages.scorers import AUTO, FROZEN, SCORERS, parts_of, unknown_part

_KINDS = {"model_type": "be a table", "dict_type": "be a table", "tuple_type": "be a list", "list_type": "be a list"}


def problem_lines(error: ValidationError, document: Any, model: type[BaseModel]) -> list[str]:
    """Each problem as ``key: what was given and what is allowed``, one line a key.

    Args:
        error: what the model refused.
        document: what it was given.
        model: whose keys are known.
    """
    lines: list[str] = []
    allowed: dict[str, list[str]] = {}  # a union fails once per member: gathered into one line
    given: dict[str, str] = {}
    for problem in error.errors():
        kind, loc = problem["type"], problem["loc"]
        key = _key(loc, document, may_be_absent=kind in ("missing", "extra_forbidden"))
        if kind == "value_error":
            cause = str(problem["ctx"]["error"])
            whole = isinstance(problem["input"], dict)  # of a table; the cause begins with its key
            lines += [f"{key}{'.' if whole else ': '}{cause}"] if key else cause.splitlines()
        elif kind == "missing" and isinstance(loc[-1], int):  # a list that is too short
            lines.append(f"{key}: {as_given(problem['input'])} given, must have {loc[-1] + 1} values at least")
        elif kind == "missing":
            lines.append(f"{key}: missing")
        elif kind == "extra_forbidden":
            lines.append(f"{key}: unknown key{nearest(str(loc[-1]), _keys_at(model, loc[:-1]))}")
        else:
            message = _KINDS.get(kind) or re.sub(r"^\w+ should ", "", problem["msg"])
            given[key] = as_given(problem["input"])
            allowed.setdefault(key, []).append(message)
    for key, messages in allowed.items():
        alternatives = " or ".join([messages[0], *(message.removeprefix("be ") for message in messages[1:])])
        lines.append(f"{key}: {given[key]} given, must {alternatives}")
    return lines


def first_problem(error: ValidationError, document: Any, model: type[BaseModel]) -> str:
    """The first line of `problem_lines`, and how many others there are."""
    first, *others = problem_lines(error, document, model)
    return first + (f" (and {len(others)} more)" if others else "")


def _key(loc: tuple[int | str, ...], document: Any, may_be_absent: bool) -> str:
    """Dotted key as the user writes it: entries of lists by name, members of unions left out."""
    key, node = "", document
    for part in loc:
        inside = (
            part in node
            if isinstance(node, dict)
            else isinstance(node, list) and isinstance(part, int) and part < len(node)
        )
        if not inside and not (may_be_absent and isinstance(node, dict)):
            break
        child = node[part] if inside else None
        if isinstance(part, int):
            name = child.get("name") if isinstance(child, dict) else None
            key += f".{name}" if isinstance(name, str) else f" #{part + 1}"
        else:
            key += f".{part}"
        node = child
    return key.removeprefix(".")


def _keys_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> Iterable[str]:
    for part in loc:
        if isinstance(part, str):
            model = _model_in(model.model_fields[part].annotation) or model
    return model.model_fields


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if members := get_args(annotation):
        return next(filter(None, map(_model_in, members)), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def score_problem(score: str) -> str | None:
    """What is wrong with the name of a score or of a sum of them; None where nothing is.

    >>> score_problem("frozen:knn+energy") is None
    True
    >>> print(score_problem("enrgy"))
    "enrgy" is not a known score; did you mean 'energy'?
    """
    unknown = unknown_part(score)
    if unknown == AUTO:
        return f"{as_given(score)} given, but {AUTO} is chosen as a whole, and no part of a sum"
    if unknown is not None:
        return f"{as_given(unknown)} is not a known score{nearest(unknown, SCORERS)}"
    if score != AUTO and all(part.frozen for part in parts_of(score)):
        plain = as_given(score.replace(FROZEN, ""))
        return f"{as_given(score)} given, which reads nothing that experts make: {plain} says the same"
    return None


def as_given(value: object) -> str:
    """A value as it stands in a message: JSON of 60 characters at most."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
