"""Strict configuration: YAML or JSON mappings become nested frozen dataclasses; an unknown key names the nearest."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from vocalnet.errors import ConfigError

T = TypeVar("T")


def _convert(kind: Any, value: Any, where: str) -> Any:
    """`value` checked against the annotation `kind` and converted: dict → dataclass, list → tuple, int → float."""
    origin = typing.get_origin(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(kind)
        if value is None and type(None) in options:
            return None
        return _convert(next(option for option in options if option is not type(None)), value, where)
    if origin is typing.Literal:
        allowed = typing.get_args(kind)
        if value not in allowed:
            raise ConfigError(f"{where} is {value!r}; allowed: {', '.join(map(repr, allowed))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} is {value!r}; expected a list")
        args = typing.get_args(kind)
        kinds = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
        if len(kinds) != len(value):
            raise ConfigError(f"{where} has {len(value)} entries; expected {len(kinds)}")
        return tuple(_convert(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where} is {value!r}; expected a mapping")
        inner = typing.get_args(kind)[1]
        return {key: _convert(inner, item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(kind):
        cls = typing.cast(type, kind)
        return value if isinstance(value, cls) else from_dict(cls, value, where)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-3 as text
        except ValueError:
            raise ConfigError(f"{where} is {value!r}; expected a number") from None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{where} is {value!r} ({type(value).__name__}); expected {kind.__name__}")
    return value


def from_dict(cls: type[T], mapping: Any, where: str = "config") -> T:
    """Builds the dataclass `cls` from a mapping.

    Raises:
        ConfigError: unknown key (the nearest valid one is named), missing key, or wrong type.
    """
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    if not isinstance(mapping, dict):
        raise ConfigError(f"{where} is {mapping!r}; expected a mapping with keys {', '.join(names)}")
    hints = typing.get_type_hints(cls)
    for key in mapping:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"allowed: {', '.join(names)}"
            raise ConfigError(f"{where} has no key '{key}'; {hint}")
    missing = [
        f.name
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]
        if f.name not in mapping and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}")
    return cls(**{key: _convert(hints[key], value, f"{where}.{key}") for key, value in mapping.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as plain JSON types; `from_dict` inverts it."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, (tuple, list)):
            return [plain(item) for item in value]
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return str(value) if isinstance(value, Path) else value

    return plain(config)


def with_overrides(mapping: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Applies `key.sub=value` overrides (values are YAML) to a copy of a nested mapping.

    Raises:
        ConfigError: an override without '='.
    """
    result: dict[str, Any] = json.loads(json.dumps(mapping))
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"override '{item}' has no '='; write key.sub=value")
        *parents, last = key.split(".")
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = yaml.safe_load(text)
    return result


def load_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML mapping.

    Raises:
        ConfigError: the file is missing, is not YAML, or is not a mapping.
    """
    if not path.is_file():
        raise ConfigError(f"no configuration file {path}; give the path of a YAML file")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}; expected a mapping")
    return content
