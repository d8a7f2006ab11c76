"""Loads the policy file: YAML to ColocationPolicy, with the exact path of an error and the nearest known name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import yaml
from msgspec import inspect

from colocate.errors import BadInput, ConfigError
from colocate.policy.schema import ColocationPolicy, check
from colocate.units import parse_bytes, parse_cores, parse_duration, parse_percent

_SCHEMA = inspect.type_info(ColocationPolicy)
NOT_YAML = (yaml.YAMLError, ValueError, AttributeError, RecursionError)
"""What PyYAML raises: the latter three of `0x_`, `!!timestamp foo` and very deep nesting."""
_PARSERS: dict[str, Callable[[Any], float | int]] = {
    "duration": parse_duration,
    "bytes": parse_bytes,
    "cores": parse_cores,
    "percent": parse_percent,
}


def _quantities(value: Any, kind: Any, path: str) -> Any:
    """The value with every quantity below it parsed, along the schema. Raises ConfigError with the path."""
    if isinstance(kind, inspect.UnionType):
        kind = next((k for k in kind.types if not isinstance(k, inspect.NoneType)), kind)
    if isinstance(kind, inspect.Metadata) and isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            return _PARSERS[(kind.extra or {})["quantity"]](value)
        except (ValueError, OverflowError) as error:
            raise ConfigError(path, str(error)) from error
    if isinstance(kind, inspect.StructType) and isinstance(value, dict):
        fields = {f.encode_name: f.type for f in kind.fields}
        return {k: _quantities(v, fields[k], f"{path}.{k}") if k in fields else v for k, v in value.items()}
    if isinstance(kind, inspect.VarTupleType) and isinstance(value, list):
        return [_quantities(v, kind.item_type, f"{path}[{i}]") for i, v in enumerate(value)]
    return value


def _fields_at(path: str) -> list[str]:
    """The names that are known at a path like `$.spec.cpu`."""
    kind: Any = ColocationPolicy
    for part in re.findall(r"\.(\w+)|\[", path):
        if part:
            names = dict(zip(kind.__struct_encode_fields__, kind.__struct_fields__, strict=True))
            kind = get_type_hints(kind)[names[part]]
        candidates = [kind, *get_args(kind)]
        kind = next((c for c in candidates if hasattr(c, "__struct_fields__")), kind)
    return list(getattr(kind, "__struct_encode_fields__", []))


def _explain(error: msgspec.ValidationError) -> ConfigError:
    message, _, path = str(error).partition(" - at `")
    path = path.rstrip("`") or "$"
    unknown = re.search(r"unknown field `(\w+)`", message)
    if unknown is not None:
        known = _fields_at(path)
        near = difflib.get_close_matches(unknown[1], known, n=1, cutoff=0.5)
        mend = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return ConfigError(f"{path}.{unknown[1]}", "unknown field", mend)
    return ConfigError(path, message[:1].lower() + message[1:])


class StrictLoader(yaml.SafeLoader):
    """YAML in which a key given twice is an error, as the YAML specification says, and not the last one's win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See yaml.SafeLoader."""
        keys = [str(key.value) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1 and key != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def parse_policy(text: str, source: str) -> ColocationPolicy:
    """The policy in a YAML text. Raises ConfigError, and BadInput if it is no YAML."""
    return policy_of(_mapping(text, source))


def policy_of(data: dict[str, Any]) -> ColocationPolicy:
    """The policy in a mapping, whose quantities are as an operator writes them. Raises ConfigError."""
    try:
        return check(msgspec.convert(_quantities(data, _SCHEMA, "$"), ColocationPolicy))
    except msgspec.ValidationError as error:
        raise _explain(error) from error


def _mapping(text: str, source: str) -> dict[str, Any]:
    try:
        data = yaml.load(text, StrictLoader)
    except NOT_YAML as error:
        said = " ".join(str(error).replace('in "<unicode string>", ', "").split())
        raise BadInput(f"{source} is not YAML: {said}") from error
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise BadInput(f"{source} must be a mapping with apiVersion, kind and spec, not a {type(data).__name__}")
    return data


def read_policy(path: Path) -> dict[str, Any]:
    """What a policy file says, not checked yet. Raises BadInput."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"the policy {path} cannot be read: {error}") from error
    return _mapping(text, str(path))


def load_policy(path: Path) -> ColocationPolicy:
    """The policy in a file. Raises BadInput, ConfigError."""
    return policy_of(read_policy(path))


def policy_of_builtins(data: Any) -> ColocationPolicy:
    """The policy in a record's keyframe."""
    return msgspec.convert(data, ColocationPolicy)
