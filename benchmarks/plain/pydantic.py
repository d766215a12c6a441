"""As much of pydantic as `fedlora.config` needs to hold settings that are right: for machines that have torch,
Transformers and PEFT alone (`benchmarks/gpu.py`). Nothing is checked."""

from __future__ import annotations

import copy
from typing import Any, ClassVar


class BaseModel:
    """Class attributes are defaults, keyword arguments values."""

    model_fields: ClassVar[dict[str, None]] = {}

    def __init_subclass__(cls, **_: Any) -> None:
        cls.model_fields = {
            **cls.model_fields,
            **dict.fromkeys(vars(cls).get("__annotations__", {})),
        }

    def __init__(self, **values: Any) -> None:
        for name in type(self).model_fields:
            setattr(self, name, values.get(name, copy.deepcopy(getattr(type(self), name, None))))

    def model_copy(self, update: dict[str, Any]) -> Any:
        return type(self)(**{**vars(self), **update})


def Field(default: Any = None, *, default_factory: Any = None, **_: Any) -> Any:
    """The default."""
    return default_factory() if default_factory else default


def _as_it_is(*_: Any, **__: Any) -> Any:
    """A decorator that changes nothing."""
    return lambda function: function


class _Anything:
    def __init__(self, *_: Any, **__: Any) -> None:
        """Whatever it is told."""

    def __class_getitem__(cls, _: Any) -> Any:
        return cls


ConfigDict = dict
field_validator = model_validator = _as_it_is
BeforeValidator = TypeAdapter = _Anything


class ValidationError(ValueError):
    """Never raised."""
