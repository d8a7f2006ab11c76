"""Volumes for claims that are bound only once their pod has a node: on which nodes there are any, and which are taken.

On each node a pod's claims take what is there in the order of their sizes, the smallest volume that fits each; what is
not there must be made. Source: the scheduler's VolumeBinding plugin (findMatchingVolumes, checkVolumeProvisions).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import numpy as np

from colocate.objects import CsiStorageCapacity
from podgroup.state.ledger import Ints, Ledger, Mask
from podgroup.state.storage import makes, reaches
from podgroup.state.volumes import Unbound, size_of, topologies_of

MANY = np.iinfo(np.int64).max


class Supply:
    """For the claims of one class of pods; a pick is taken from all of them."""

    def __init__(
        self, ledger: Ledger, wanted: Sequence[Unbound], taken: Set[str], decided: Mapping[str, str], within: Mask
    ) -> None:
        """`decided` are claims that several pods share -> the volume that one of them has got, "" if it is made."""
        self._ledger, self.wanted = ledger, wanted
        self.taken, self.decided, self._within = set(taken), dict(decided), within
        self._order = sorted(range(len(wanted)), key=lambda i: wanted[i].size)
        self._made = [makeable(ledger, w) for w in wanted]
        self._found = [self._candidates(w, within) for w in wanted]
        self._count = [self._counted(found) for found in self._found]

    def _candidates(self, wanted: Unbound, within: Mask) -> list[tuple[str, Mask]]:
        storage = self._ledger.storage
        if wanted.shared in self.decided:
            name = self.decided[wanted.shared]
            return [(name, reach(self._ledger, name))] if name in storage.volumes else []
        found = [(v.metadata.name, reach(self._ledger, v.metadata.name)) for v in storage.available(wanted)]
        return [(name, mask) for name, mask in found if name not in self.taken and (mask & within).any()]

    def _counted(self, found: list[tuple[str, Mask]]) -> Ints:
        count = np.zeros(len(self._ledger.names), dtype=np.int64)
        for _, mask in found:
            count += mask
        return count

    def ranked(self) -> list[str]:
        """The volumes that a single claim could have, "" for one that is made: first those that most nodes reach.

        Of volumes that the same nodes reach the smallest is enough.
        """
        (found,), (made,) = self._found, self._made
        widest = sorted(found, key=lambda one: -int((one[1] & self._within).sum()))
        reached = {(mask & self._within).tobytes(): name for name, mask in reversed(widest)}
        return [*reversed(reached.values()), *([""] if (made & self._within).any() else [])]

    def copy(self) -> Supply:
        """The same, to be taken from by itself."""
        return Supply(self._ledger, self.wanted, self.taken, self.decided, self._within)

    @property
    def scarce(self) -> bool:
        """Whether a pick leaves less, or other nodes, to the next: else all of them are made."""
        return any(self._found) or any(w.shared for w in self.wanted)

    @property
    def most(self) -> Ints:
        """How many pods a node can have at most, by their volumes."""
        found = np.full(len(self._ledger.names), MANY, dtype=np.int64)
        for wanted, made, count in zip(self.wanted, self._made, self._count, strict=True):
            many = made | (count > 0) if wanted.shared else made
            found = np.minimum(found, np.where(many, MANY, count))
        return found

    @property
    def mask(self) -> Mask:
        """The nodes on which one more pod has all its volumes."""
        found = np.ones(len(self._ledger.names), dtype=bool)
        for wanted, made, count in zip(self.wanted, self._made, self._count, strict=True):
            may = made & (self.decided.get(wanted.shared, "") == "")
            found &= may | (count > 0)
        if len(self.wanted) > 1 and self._compete:
            for row in np.flatnonzero(found):
                found[row] = self.pick(int(row)) is not None
        return found

    @property
    def _compete(self) -> bool:
        sets = [{name for name, _ in found} for found in self._found]
        return len(set().union(*sets)) < sum(map(len, sets))

    def pick(self, row: int) -> list[str] | None:
        """The volume of each claim on a node, "" for one that is to be made; None if there is none for some."""
        picks = [""] * len(self.wanted)
        for i in self._order:
            name = next((n for n, mask in self._found[i] if mask[row] and n not in picks), "")
            if not name and (not self._made[i][row] or self.decided.get(self.wanted[i].shared, "")):
                return None
            picks[i] = name
        return picks

    def take(self, row: int) -> bool:
        """A pod has been placed on a node: its volumes are taken. False if there are none."""
        picks = self.pick(row)
        for i, name in enumerate(picks or ()):
            if not name or self.wanted[i].shared:
                continue
            self.taken.add(name)
            for j, found in enumerate(self._found):
                gone = [mask for n, mask in found if n == name]
                if gone:
                    self._found[j] = [one for one in found if one[0] != name]
                    self._count[j] = self._count[j] - gone[0]
        return picks is not None


def reach(ledger: Ledger, volume: str) -> Mask:
    """The nodes from which a volume can be reached, by its node affinity."""
    selector = reaches(ledger.storage.volumes[volume])
    return np.ones(len(ledger.names), dtype=bool) if selector is None else ledger.selected(selector)


def makeable(ledger: Ledger, wanted: Unbound) -> Mask:
    """The nodes for which a volume can be made for a claim, as far as anybody has said."""
    storage, nowhere = ledger.storage, np.zeros(len(ledger.names), dtype=bool)
    made_by = storage.classes.get(wanted.storage_class)
    if made_by is None or not makes(made_by):
        return nowhere
    topologies = topologies_of(made_by)
    found = np.ones_like(nowhere) if topologies is None else ledger.selected(topologies).copy()
    if wanted.selected_node:
        chosen = nowhere.copy()
        chosen[[ledger.rows[n] for n in (wanted.selected_node,) if n in ledger.rows]] = True
        found &= chosen
    driver = storage.drivers.get(made_by.provisioner)
    if wanted.size and driver is not None and driver.spec.storage_capacity:
        enough = nowhere.copy()
        for capacity, nodes in storage.capacities.values():
            if capacity.storage_class_name == wanted.storage_class and _sufficient(capacity, wanted.size):
                enough |= np.ones_like(nowhere) if nodes is None else ledger.selected(nodes)
        found &= enough
    return found


def _sufficient(capacity: CsiStorageCapacity, size: int) -> bool:
    most = capacity.capacity if capacity.maximum_volume_size is None else capacity.maximum_volume_size
    return capacity.node_topology is not None and most is not None and size_of(most) >= size
