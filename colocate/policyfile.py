"""Loads the policy file: YAML to ColocationPolicy, with the exact path of an error and the nearest known name."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import yaml

from colocate.config import ColocationPolicy, check
from colocate.errors import BadInput, ConfigError
from colocate.units import Bytes, Cores, Duration, Percent, parse_bytes, parse_cores, parse_duration, parse_percent

_PARSERS: dict[type, Any] = {
    Duration: parse_duration,
    Bytes: parse_bytes,
    Cores: parse_cores,
    Percent: parse_percent,
}


def _decode(kind: type, value: Any) -> Any:
    parser = _PARSERS.get(kind)
    if parser is None:
        raise NotImplementedError(kind)  # pragma: no cover - the schema has no other custom type
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"expected a quantity, got {type(value).__name__}")
    return parser(value)


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


def parse_policy(text: str, source: str) -> ColocationPolicy:
    """The policy in a YAML text. Raises ConfigError, and BadInput if it is no YAML."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadInput(f"{source} is not YAML: {' '.join(str(error).split())}") from error
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise BadInput(f"{source} must be a mapping with apiVersion, kind and spec, not a {type(data).__name__}")
    try:
        return check(msgspec.convert(data, ColocationPolicy, dec_hook=_decode))
    except msgspec.ValidationError as error:
        raise _explain(error) from error


def load_policy(path: Path) -> ColocationPolicy:
    """The policy in a file. Raises BadInput, ConfigError."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"the policy {path} cannot be read: {error}") from error
    return parse_policy(text, str(path))


def policy_of_builtins(data: Any) -> ColocationPolicy:
    """The policy in a record's keyframe."""
    return msgspec.convert(data, ColocationPolicy, dec_hook=_decode)
