"""Settings of a score: what its constructor says that they may be is what they are checked against."""

import inspect
import re
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field, ValidationError, create_model

from stages.config import StageConfig, nearest
from stages.errors import InputError

if TYPE_CHECKING:
    from stages.scorers.scorer import Scorer

Temperature = Annotated[float, Field(gt=0)]


@cache
def _settings_model(scorer: "type[Scorer]") -> type[BaseModel]:
    parameters = inspect.signature(scorer).parameters
    given: dict[str, Any] = {name: (each.annotation, each.default) for name, each in parameters.items()}
    return create_model(scorer.__name__, __base__=StageConfig, **given)


def check_settings(scorer: "type[Scorer]", settings: Mapping[str, Any]) -> None:
    """Check settings of a score by name against what its constructor says that they may be.

    Raises:
        InputError: ``react.percentile: 120 given, must be less than or equal to 100``.
    """
    model = _settings_model(scorer)
    try:
        model.model_validate(dict(settings))
    except ValidationError as error:
        problem = error.errors()[0]
        key = str(problem["loc"][0])
        if problem["type"] == "extra_forbidden":
            raise InputError(f"{scorer.name}.{key}: unknown setting{nearest(key, model.model_fields)}") from error
        must = re.sub(r"^\w+ should ", "", problem["msg"])
        raise InputError(f"{scorer.name}.{key}: {problem['input']!r} given, must {must}") from error
