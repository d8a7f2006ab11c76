"""Label selectors (apimachinery, LabelSelectorAsSelector)."""

from __future__ import annotations

from collections.abc import Mapping

from colocate.objects import LabelRequirement, LabelSelector


def selector_text(selector: LabelSelector | None) -> str:
    """A selector in one line, equal for equal ones."""
    if selector is None:
        return "-"
    parts = [f"{k}={v}" for k, v in sorted(selector.match_labels.items())]
    parts += sorted(f"{r.key} {r.operator} {sorted(r.values)}" for r in selector.match_expressions)
    return ",".join(parts)


def selector_keys(selector: LabelSelector) -> set[str]:
    """The label keys that a selector looks at."""
    return {*selector.match_labels, *(r.key for r in selector.match_expressions)}


def matches(selector: LabelSelector | None, labels: Mapping[str, str]) -> bool:
    """Whether a label selector selects these labels; None selects nothing, an empty one everything."""
    if selector is None:
        return False
    if any(labels.get(key) != value for key, value in selector.match_labels.items()):
        return False
    return all(_requirement_holds(r, labels) for r in selector.match_expressions)


def _requirement_holds(requirement: LabelRequirement, labels: Mapping[str, str]) -> bool:
    value = labels.get(requirement.key)
    if requirement.operator == "In":
        return value in requirement.values
    if requirement.operator == "NotIn":
        return value not in requirement.values
    return (value is not None) == (requirement.operator == "Exists")
