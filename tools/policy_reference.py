"""Writes docs/policy.md: every field of a ColocationPolicy with its type, default and meaning, from `config.py`."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from colocate.policy import schema as config

TARGET = Path(__file__).resolve().parent.parent / "docs" / "policy.md"
HEAD = """# The policy, field by field

One schema: `apiVersion: colocate.io/v1alpha1`, `kind: ColocationPolicy`, then `metadata.name` and `spec`. Every field
has a default except where it says *required*. Durations are written `20ms`, `1.5s`, `1m30s`; bytes `512Mi`; cores
`2`, `500m`; percentages `65` or `65%`. An unknown field is an error that names the nearest known one. This page is
generated from `colocate/policy/schema.py` (`python -m tools.policy_reference`).
"""


def meanings_of(module: ModuleType) -> dict[tuple[str, str], str]:
    """(class, field) -> the text that stands below the field."""
    found = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ClassDef):
            for field, text in zip(node.body, node.body[1:], strict=False):
                if (
                    isinstance(field, ast.AnnAssign)
                    and isinstance(text, ast.Expr)
                    and isinstance(text.value, ast.Constant)
                ):
                    assert isinstance(field.target, ast.Name)
                    found[node.name, field.target.id] = " ".join(str(text.value.value).split())
    return found


def _kind(kind: Any) -> tuple[str, Any]:
    """How a type is written for people, and the struct behind it, if any."""
    info = msgspec.inspect
    if isinstance(kind, info.UnionType):
        return _kind(next(k for k in kind.types if not isinstance(k, info.NoneType)))
    if isinstance(kind, info.Metadata):
        return str((kind.extra or {}).get("quantity", "")), None
    if isinstance(kind, info.VarTupleType):
        name, struct = _kind(kind.item_type)
        return f"list of {name}", struct
    if isinstance(kind, info.StructType):
        return kind.cls.__name__, kind.cls
    if isinstance(kind, info.LiteralType):
        return " or ".join(f"`{v}`" for v in kind.values), None
    if isinstance(kind, info.DictType):
        return "mapping of text", None
    names = {"StrType": "text", "IntType": "number", "FloatType": "number", "BoolType": "true or false"}
    return names[type(kind).__name__], None


def _default(field: Any, struct: Any) -> str:
    if field.required:
        return "*required*"
    if struct is not None or field.default in (msgspec.NODEFAULT, None, "", ()):
        return ""
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def generate() -> str:
    """The page."""
    meanings, parts, done = meanings_of(config), [HEAD], set()
    waiting: list[tuple[str, Any]] = [("spec", config.PolicySpec)]
    while waiting:
        path, cls = waiting.pop(0)
        if cls in done:
            continue
        done.add(cls)
        parts.append(f"\n## `{path}`\n{' '.join((cls.__doc__ or '').split())}\n\n")
        parts.append("| field | type | default | |\n|---|---|---|---|\n")
        for field in msgspec.inspect.type_info(cls).fields:  # type: ignore[attr-defined]
            kind, struct = _kind(field.type)
            meaning = meanings.get((cls.__name__, field.name), "")
            parts.append(f"| `{field.encode_name}` | {kind} | {_default(field, struct)} | {meaning} |\n")
            if struct is not None:
                waiting.append((f"{path}.{field.encode_name}" + ("[]" if kind.startswith("list") else ""), struct))
    return "".join(parts)


if __name__ == "__main__":
    TARGET.write_text(generate())
