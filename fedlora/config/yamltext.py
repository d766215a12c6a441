"""YAML of settings: plain values only, of a size that is known before any of them is made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from fedlora.files.limits import clean, short

LARGEST = 1_000_000
"""Characters of a text, also with every alias written out."""
_DEEPEST = 30
_LONGEST_KEY = 200
_LONGEST_NUMBER = 100
_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")

_SAFE_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The safe loader, in its fast form where the platform has it."""


class _Loader(_SAFE_LOADER):  # type: ignore[misc]
    """Knows no dates, sets and binaries: what looks like a date stays text. Every key is there once."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        _refuse_twice(self, node, set())
        return node


def _number(loader: Any, node: Any) -> Any:
    """Numbers in hexadecimal or of base 60 have no other limit, and the latter take time with the square of theirs."""
    text = loader.construct_scalar(node)
    if len(text) > _LONGEST_NUMBER:
        raise yaml.constructor.ConstructorError(None, None, f"a number of {len(text)} characters", node.start_mark)
    kind = node.tag.rpartition(":")[2]
    return getattr(loader, f"construct_yaml_{kind}")(node)


def _refuse_twice(loader: Any, node: Any, seen: set[int]) -> None:
    """Look for a key that a mapping has twice: PyYAML takes the last, and what the first says is lost.

    Before anything is made of the nodes: merging (`<<`) rewrites them, and what it brings may be given anew.
    """
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for each in node.value:
            _refuse_twice(loader, each, seen)
    elif isinstance(node, yaml.MappingNode):
        first: dict[tuple[str, Any], Any] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                other = first.setdefault(_identity(loader, key), key)
                if other is not key and not key.tag.endswith(":merge"):
                    raise _OurError(
                        f"the key {short(key.value)} is there twice, on lines {_line(other)} and "
                        f"{_line(key)}; make one of the two"
                    )
            _refuse_twice(loader, value, seen)


def _identity(loader: Any, key: Any) -> tuple[str, Any]:
    """What tells a key from others: `4` and `0x4` are the same number, `4` and `"4"` are not the same key."""
    kind = key.tag.rpartition(":")[2]
    return kind, loader.construct_object(key) if kind in ("int", "float") else key.value


def _line(place: Any) -> int:
    """Of a node or an event."""
    return int(place.start_mark.line) + 1


_TAG = "tag:yaml.org,2002:"
_KNOWN = (*(f"{_TAG}{name}" for name in _PLAIN), None)
_Loader.yaml_constructors = {tag: make for tag, make in _SAFE_LOADER.yaml_constructors.items() if tag in _KNOWN}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, expression) for tag, expression in found if tag != f"{_TAG}timestamp"]
    for first, found in _SAFE_LOADER.yaml_implicit_resolvers.items()
}
_Loader.add_constructor(f"{_TAG}int", _number)
_Loader.add_constructor(f"{_TAG}float", _number)


def parse(text: str) -> Any:
    """The one document in a text, as mappings, lists, text, numbers, truth values and None.

    Raises:
        ValueError: not YAML, too large or too deep (aliases count each time they are used), a tag of another kind of
            value, a key that is no text or number, or one that is there twice; one line that says where.
    """
    if len(text) > LARGEST:
        raise ValueError(f"{len(text)} characters; at most {LARGEST} are read")
    try:
        _measure(yaml.parse(text, Loader=_Loader))
        content = yaml.load(text, Loader=_Loader)  # noqa: S506 (a safe loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1} " if mark else ""
        raise ValueError(f"{where}{clean(error.problem or '')}".rstrip()) from None
    except yaml.YAMLError as error:
        raise ValueError(clean(" ".join(str(error).split()))) from None
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        if isinstance(error, _OurError):
            raise
        # Constructors of PyYAML fall over values that their tag does not fit, such as `!!int ''`.
        raise ValueError(f"a value does not fit its tag ({clean(str(error), 100)})") from None
    _check(content)
    return content


class _OurError(ValueError):
    """A complaint that is in words already."""


def _measure(events: Iterator[Any]) -> None:
    """Depth, and size with aliases written out, from the events alone: nothing is made of them yet."""
    sizes: dict[str | None, int] = {}
    open_ones: list[list[Any]] = [[None, 0]]  # of every collection not closed yet: its anchor, its size so far
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            open_ones.append([event.anchor, 1])
            if len(open_ones) > _DEEPEST:
                raise _OurError(f"line {_line(event)}: nested deeper than {_DEEPEST} levels")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_ones.pop()
        elif isinstance(event, yaml.AliasEvent):
            if any(event.anchor == anchor for anchor, _ in open_ones):
                raise _OurError(f"line {_line(event)}: {short(event.anchor)} holds itself")
            anchor, size = None, sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 1 + len(event.value)
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        open_ones[-1][1] += size
        if open_ones[-1][1] > LARGEST:
            raise _OurError(f"with its aliases written out it has more than {LARGEST} characters")


def _check(content: Any) -> None:
    """Keys that can be keys, and text that can be written."""
    if isinstance(content, dict):
        if len({isinstance(key, str) for key in content}) > 1:
            raise ValueError(f"the keys {short(list(content))} are partly text, partly numbers; put all in quotes")
        for key, value in content.items():
            if isinstance(key, bool) or not isinstance(key, str | int | float):
                raise ValueError(f"the key {short(key)} is not text; put it in quotes")
            if isinstance(key, str) and (len(key) > _LONGEST_KEY or not key.isprintable()):
                raise ValueError(f"the key {short(key)} cannot be printed, or is above {_LONGEST_KEY} characters")
            _check(value)
    elif isinstance(content, list):
        for value in content:
            _check(value)
    elif isinstance(content, str) and any("\ud800" <= letter <= "\udfff" for letter in content):
        raise ValueError(f"{short(content)} is not Unicode text")
