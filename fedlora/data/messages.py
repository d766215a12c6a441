"""What is said in a dialogue, checked: a list of messages, each of a role and a content."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fedlora.errors import DataError

Message = dict[str, str]
"""`role` (of `ROLES`) and `content`."""
ROLES = ("system", "user", "assistant")
_ROLES_ELSEWHERE = {"human": "user", "gpt": "assistant"}


class _Empty(DataError):
    """Somebody says nothing."""


def understood(
    form: Callable[[Mapping[str, Any]], Any], row: Mapping[str, Any], where: str, drop: bool
) -> list[Message] | None:
    """The messages of a row; None where one is empty and such rows are left out (`drop`).

    Raises:
        DataError: the row, named by `where`, holds no dialogue, or nothing that could be learned.
    """
    try:
        return _checked(form(row))
    except _Empty as error:
        if drop:
            return None
        raise DataError(
            f"{where} has {error}; fill it in, remove the row, or set data.empty=drop to leave such rows out"
        ) from None
    except DataError as error:
        raise DataError(f"{where}: {error}" if str(error).startswith("data.") else f"{where} {error}") from None


def _checked(messages: Any) -> list[Message]:
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise DataError(f"holds {type(messages).__name__} for messages, expected a list of role and content")
    found = [_message(each) for each in messages]
    if not any(each["role"] == "assistant" for each in found):
        raise DataError("has no message of role assistant, so nothing could be learned from it; remove it")
    return found


def _message(each: Mapping[str, Any]) -> Message:
    """Of `role` and `content`, or of `from` and `value`; lines end in one way."""
    role = each.get("role") or each.get("from")
    role = _ROLES_ELSEWHERE.get(str(role), role)
    content = each.get("value") if each.get("content") is None else each.get("content")
    if role not in ROLES:
        raise DataError(f"has a message of role {role!r:.40}, expected one of {', '.join(ROLES)}")
    if isinstance(content, list | dict):
        raise DataError(
            f"has a {type(content).__name__} for what the {role} says, expected text; name a column inside of it with "
            "dots, like data.prompt=task.question or data.response=answers.0"
        )
    if content is None or not str(content).strip():
        raise _Empty("an empty response" if role == "assistant" else f"an empty message of role {role}")
    return {"role": role, "content": str(content).replace("\r\n", "\n")}
