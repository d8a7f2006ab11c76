"""What is asked of a dialect: where its groups are, whose a pod is, and what its users read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from colocate.objects import Pod
from podgroup.api import PodGroup, PodGroupStatus


class Collection(NamedTuple):
    """A collection that is watched for the sake of a dialect."""

    path: str
    """Of the API, over all namespaces."""
    kind: type[Any]
    """The struct that its objects are decoded into."""


class Dialect(Protocol):
    """The words of one API group. Pure: what it returns is read and written by the controller."""

    api: str
    """group/version"""
    kind: str
    groups: Collection

    def group_of(self, pod: Pod) -> str:
        """The name of the pod's group, in its namespace; empty for a pod that is alone."""

    def group(self, written: Any) -> PodGroup:
        """What users have written, in our words."""

    def admitted(self, pod: Pod) -> bool:
        """Whether the pod may be scheduled by now: nobody holds it back (a quota's gate, an owner's)."""

    def status(self, group: PodGroup, pods: Sequence[Pod]) -> PodGroupStatus:
        """What users are to read of a group whose pods are these."""

    def status_fields(self, status: PodGroupStatus, conditions: bool) -> Mapping[str, Any]:
        """The same as a merge patch of the object's status; `conditions`: the installed schema has them."""
