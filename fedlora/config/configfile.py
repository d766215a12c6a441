"""From YAML files and dotted overrides to a checked `RunConfig`, with errors that say what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from fedlora.config import yamltext
from fedlora.config.run import INSTEAD_OF, RunConfig
from fedlora.errors import ConfigError, StrategyRefusal, did_you_mean
from fedlora.files.limits import clean, read_text, short
from fedlora.sections import Section

Overrides = Mapping[str, Any]

_LONGEST_MESSAGE = 800


def load(source: str | Path | None, overrides: Overrides | None = None, presets: Path | None = None) -> RunConfig:
    """The configuration of a preset name or YAML file, with dotted `overrides` on top.

    Raises:
        ConfigError: unreadable file, unknown preset or key, a value that is not allowed, or an impossible combination.
    """
    return build(layered(read_flat(source, presets), overrides or {}))


def layered(*layers: Overrides) -> dict[str, Any]:
    """Dotted keys of several layers, a later one over an earlier one.

    Of keys that say the same in two ways (`config.INSTEAD_OF`) the later layer's counts: it unsets what an earlier
    layer, or the default, says in the other way.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= {key: None for key in unset_by(layer) if merged.get(key, default_of(key)) is not None}
        merged |= layer
    return merged


def unset_by(layer: Overrides) -> list[str]:
    """The keys that a layer unsets because it says in another way what they would."""
    return [other for key, other in INSTEAD_OF.items() if layer.get(key) is not None and other not in layer]


def default_of(dotted: str) -> Any:
    """The value of a key that is set nowhere; None for a key that there is not."""
    return flatten(RunConfig().model_dump(mode="json")).get(dotted)


def build(values: Overrides) -> RunConfig:
    """A `RunConfig` from dotted keys; keys not given keep their defaults."""
    check_keys(values)
    try:
        return RunConfig.model_validate(nest(values))
    except ValidationError as error:
        cause = error.errors()[0].get("ctx", {}).get("error")
        kind = StrategyRefusal if isinstance(cause, StrategyRefusal) else ConfigError
        raise kind(clean(_describe(error, values), _LONGEST_MESSAGE)) from None


def check_keys(values: Iterable[str]) -> None:
    """Refuse dotted keys that are none of a run's.

    Raises:
        ConfigError: there is one; with the nearest that there is.
    """
    known = set(dotted_keys())
    for dotted in values:
        if dotted not in known and not dotted.startswith("strategy_options."):
            raise ConfigError(f"unknown key '{clean(str(dotted))}'.{_nearest_key(dotted, known)}")


def read_flat(source: str | Path | None, presets: Path | None = None) -> dict[str, Any]:
    """The dotted keys that a preset or YAML file sets (none for no source); paths in it are relative to the file."""
    if source is None:
        return {}
    path = find(str(source), presets)
    content = read_yaml(path)
    try:
        return absolute_paths(flatten(content), path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def find(source: str, presets: Path | None, kind: str = "preset") -> Path:
    """The file that a name in the folder `presets` (of presets, or whatever `kind` says) or a path means."""
    if source.endswith(YAML):
        try:
            path = Path(source).expanduser()
            if path.is_file():
                return path
            beside = [other.name for other in path.parent.iterdir() if other.suffix in YAML] if path.name else []
        except FileNotFoundError:
            beside = []
        except (OSError, ValueError, RuntimeError) as error:  # a name that no file can have, a home of nobody
            raise ConfigError(f"no such file: {clean(source)} ({clean(str(error))})") from None
        raise ConfigError(f"no such file: {clean(source)}{_nearest_file(path, beside)}")
    names = preset_names(presets)
    if source in names and presets is not None:
        return presets / f"{source}.yaml"
    hint = did_you_mean(source, names) or _with_ending(source)
    raise ConfigError(
        f"unknown {kind} '{clean(source)}'.{hint} There are: {', '.join(names) or 'none'}; or name a .yaml file."
    )


YAML = (".yaml", ".yml")
"""How the names of YAML files end."""


def _nearest_file(path: Path, beside: Sequence[str]) -> str:
    """A hint with the file of the same name and the other ending, or else of the nearest name, in the same folder."""
    same = [name for name in beside if Path(name).stem == path.stem]
    near = same or difflib.get_close_matches(path.name, beside, n=1)
    return f". Did you mean '{clean(str(path.with_name(near[0])))}'?" if near else ""


def _with_ending(source: str) -> str:
    """A hint where a file's name was given without its ending."""
    try:
        there = [f"{source}{ending}" for ending in YAML if Path(f"{source}{ending}").expanduser().is_file()]
    except (OSError, ValueError, RuntimeError):
        return ""
    return f" Did you mean '{clean(there[0])}'?" if there else ""


def preset_names(presets: Path | None) -> list[str]:
    """Names of the presets in a folder."""
    return sorted(path.stem for path in presets.glob("*.yaml")) if presets else []


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping of plain values (an empty file is an empty mapping).

    Raises:
        ConfigError: it cannot be read, or is not such YAML (see `fedlora.config.yamltext`).
    """
    try:
        text = read_text(path, yamltext.LARGEST)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {clean(str(error))}") from None
    try:
        content = yamltext.parse(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} should hold keys and values, but holds a {type(content).__name__}")
    return content


def parse_overrides(words: Iterable[str]) -> dict[str, Any]:
    """`["lora.rank=4", "data.client=null"]` as dotted keys; values are read as YAML."""
    values: dict[str, Any] = {}
    for word in words:
        dotted, equals, text = word.partition("=")
        if not equals or not dotted:
            raise ConfigError(f"'{clean(word)}' is not of the form key=value, for example lora.rank=4")
        try:
            values[dotted] = _value(text) if dotted not in _VERBATIM or text == "null" else text or None
        except ValueError as error:
            raise ConfigError(f"the value of '{clean(dotted)}' cannot be read: {clean(text)} ({error})") from None
    nest(values)
    flat: dict[str, Any] = {}
    for dotted, value in values.items():
        flat |= {dotted: value} if value == {} else flatten({dotted: value})
    return flat


_VERBATIM = ("data.template",)
"""Keys whose text is taken as it is: to YAML a template in braces is a mapping."""


def _value(text: str) -> Any:
    """A value as YAML reads it, except that only `true` and `false` are truth values: `yes` may be a column's name."""
    value = yamltext.parse(text)
    return text if isinstance(value, bool) and text.strip().lower() not in ("true", "false") else value


def absolute_paths(values: Overrides, folder: Path | None = None) -> dict[str, Any]:
    """The same keys with local data files and model folders made absolute: a worker has another working folder.

    Args:
        values: dotted keys; a list is that of a sweep's grid.
        folder: what relative paths are relative to. Empty: the working directory.
    """
    return {key: _absolute(value, folder) if key in _PATH_KEYS else value for key, value in values.items()}


_PATH_KEYS = ("data.name", "model.name", "lora.init")


def _absolute(value: Any, folder: Path | None) -> Any:
    if isinstance(value, list):
        return [_absolute(each, folder) for each in value]
    if not isinstance(value, str) or not ("/" in value or "." in value):  # a name with neither may be a known one
        return value
    try:
        path = (folder or Path()) / Path(value).expanduser()
        return str(path.absolute()) if path.exists() else value  # what is not there may be a hub id
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, a home of nobody
        return value


def dotted_keys(section: type[Section] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every key of the configuration, dotted."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from dotted_keys(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def field(dotted: str) -> FieldInfo:
    """What is known of a key: its type, default, limits and meaning.

    Raises:
        KeyError: there is no such key.
    """
    kind: Any = RunConfig
    *sections, last = dotted.split(".")
    for name in sections:
        kind = kind.model_fields[name].annotation
    found: FieldInfo = kind.model_fields[last]
    return found


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; the free-form `strategy_options` are opened one level, `lora.ranks` is not.

    Raises:
        ConfigError: a key is there in both forms.
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        dotted = f"{prefix}{name}"
        opened = isinstance(value, Mapping) and not dotted.startswith("strategy_options.") and dotted not in _WHOLE
        found = flatten(value, f"{dotted}.") if opened else {dotted: value}
        if twice := flat.keys() & found.keys():
            raise ConfigError(f"'{clean(min(twice))}' is given twice, as a dotted key and in its section; remove one")
        flat |= found
    return flat


_WHOLE = {"lora.ranks"}
"""Keys whose value may be a mapping that is one value: another replaces it as a whole."""


def nest(values: Overrides) -> dict[str, Any]:
    """Dotted keys as nested mappings.

    Raises:
        ConfigError: a key is used both as a value and as a section.
    """
    tree: dict[str, Any] = {}
    for dotted, value in values.items():
        *sections, last = str(dotted).split(".")
        node = tree
        for name in sections:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise ConfigError(f"'{dotted}' is inside '{name}', which was given a plain value")
        node[last] = value
    return tree


def to_yaml(config: BaseModel) -> str:
    """The full configuration as YAML, defaults included."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _nearest_key(dotted: str, known: Iterable[str]) -> str:
    known = sorted(known)
    same_ending = [name for name in known if name.rsplit(".", 1)[-1] == dotted.rsplit(".", 1)[-1]]
    if same_ending:
        return f" Did you mean '{' or '.join(same_ending)}'?"
    return did_you_mean(dotted, known) or did_you_mean(dotted.rsplit(".", 1)[-1], known)


def _describe(error: ValidationError, values: Overrides) -> str:
    """The first complaint of pydantic as one line: key, value, what is allowed."""
    first = error.errors(include_url=False)[0]
    dotted = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "secret":
        return message
    if not dotted or (first["type"] == "value_error" and dotted not in values):
        return message if not dotted else f"{dotted}: {message}"
    hint = ""
    allowed = _choices(dotted)
    if allowed and isinstance(first["input"], str):
        message, hint = f"allowed: {', '.join(allowed)}", did_you_mean(first["input"], allowed)
    if dotted == "strategy" and isinstance(first["input"], str):
        hint = did_you_mean(first["input"], message.partition("known: ")[2].split(", "))
    return f"{dotted}={short(first['input'])} is not allowed: {message}.{hint}"


def _choices(dotted: str) -> tuple[str, ...]:
    """The words that a key with a fixed choice allows."""
    if dotted not in dotted_keys():
        return ()
    kind = field(dotted).annotation
    return tuple(str(word) for word in get_args(kind)) if get_origin(kind) is Literal else ()
