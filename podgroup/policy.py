"""In which order gangs of one priority are tried, and which nodes are filled first: arrays in, arrays out.

Priorities, quorums before members that are only wished for, repairs, the head's claim and what fits are not a policy's
business: no policy can start a gang in part, jump a priority or put more on a node than it holds. A policy is pure, and
its id stands in every snapshot, so that a cycle can be decided again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from colocate.errors import BadInput

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class Gangs(NamedTuple):
    """Gangs that wait, as arrays of shape (gangs,); `requests` is (gangs, resources)."""

    created: Floats
    """Seconds since the epoch."""
    members: Ints
    quorum: Ints
    """How many members are still missing from the quorum."""
    requests: Ints
    """What the members ask for together, in whole units (millicores for cpu)."""
    columns: Mapping[str, int]
    """Resource -> column of `requests`."""


class Nodes(NamedTuple):
    """All nodes before one class of equal members is put on them; arrays of shape (nodes,) or (nodes, resources)."""

    free: Ints
    allocatable: Ints
    room: Ints
    """How many members of the class each node takes; 0 where it takes none."""
    asks: Ints
    """What a member asks for, shape (resources,)."""
    scarce: int
    """The column of the extended resource of which the class takes the largest share; -1 if it asks for none."""
    extended: Ints
    """The columns of all extended resources."""
    more_watts: Floats | None
    """By how much more each member makes its node draw where as many come as can, shape (nodes,); infinite where that
    is not known. None unless the policy reads it."""
    columns: Mapping[str, int]

    @property
    def kept_for_others(self) -> Mask:
        """Those with free extended resources, for a class that asks for none, shape (nodes,)."""
        if self.scarce >= 0:
            return np.zeros(len(self.free), dtype=np.bool_)
        found: Mask = np.any(self.free[:, self.extended] > 0, axis=1)
        return found


class Policy(Protocol):
    """An order of gangs and of nodes."""

    @property
    def id(self) -> str:
        """Name and version."""

    @property
    def order(self) -> Callable[[Gangs], Floats] | None:
        """A number for each gang, shape (gangs,): the smaller goes first; equal ones by age, then by name.

        None: age alone decides, and no arrays are made.
        """

    @property
    def reads_power(self) -> bool:
        """Whether `rows` goes by watts."""

    def rows(self, nodes: Nodes) -> Ints:
        """The rows of all nodes in the order in which they are filled, shape (nodes,)."""


class AgeAndTightest:
    """The oldest gang first; nodes that are left with the fewest fragments first.

    solve/sequence.py has the same order of nodes compiled, and a property holds the two equal.
    """

    id, order, reads_power = "age-tightest/1", None, False

    def rows(self, nodes: Nodes) -> Ints:
        """With an extended resource: those that the class fills up with the least left over, and of them the fullest.

        Without: nodes without extended resources before those that have some free, and of them the fullest.
        """
        if nodes.scarce >= 0:
            column = nodes.free[:, nodes.scarce]
            return np.lexsort((column, column - nodes.room * nodes.asks[nodes.scarce]))
        cpu, memory = nodes.free[:, nodes.columns["cpu"]], nodes.free[:, nodes.columns["memory"]]
        return np.lexsort((memory, cpu, nodes.kept_for_others))


class AgeAndLeastWatts:
    """The oldest gang first; of nodes those that draw the least more, by their curves and by how busy they are now.

    Nodes of which nothing is known come last. What would leave fragments of an extended resource still goes before
    watts: a GPU that nobody can use costs more than any curve saves. Watts that are less than one apart are equal.
    """

    id, order, reads_power = "age-least-watts/1", None, True

    def rows(self, nodes: Nodes) -> Ints:
        """Equal ones in the order of `AgeAndTightest`."""
        tightest = np.empty(len(nodes.free), dtype=np.int64)
        tightest[DEFAULT.rows(nodes)] = np.arange(len(tightest))
        watts = np.full(len(tightest), np.inf) if nodes.more_watts is None else np.floor(nodes.more_watts)
        if nodes.scarce >= 0:
            left = nodes.free[:, nodes.scarce] - nodes.room * nodes.asks[nodes.scarce]
            return np.lexsort((tightest, watts, left))
        return np.lexsort((tightest, watts, nodes.kept_for_others))


DEFAULT = AgeAndTightest()
POLICIES: dict[str, Policy] = {each.id: each for each in (DEFAULT, AgeAndLeastWatts())}


def policy_named(id_: str) -> Policy:
    """The policy of that id. Raises BadInput."""
    if id_ not in POLICIES:
        raise BadInput(
            f"settings.policy (--order): {id_!r} is not known here; known are: {', '.join(sorted(POLICIES))}"
        )
    return POLICIES[id_]
