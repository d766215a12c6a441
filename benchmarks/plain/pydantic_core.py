"""Beside `pydantic` here: what `fedlora.config` names of it."""


class PydanticCustomError(ValueError):
    """Never raised."""
