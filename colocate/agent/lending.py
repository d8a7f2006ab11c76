"""Cards that services lend to batch pods, as their containers are made: which pod has which."""

from __future__ import annotations

from collections.abc import Callable

from colocate.decide.lending import lendable
from colocate.policy.schema import PolicySpec
from colocate.snapshot import NodeSnapshot


class Lending:
    """One node's."""

    def __init__(
        self, seen: Callable[[], tuple[NodeSnapshot | None, PolicySpec]], pods: Callable[[], set[str]]
    ) -> None:
        """`seen`: the last snapshot and the policy; `pods`: uids of those that are there."""
        self._seen, self._pods = seen, pods
        self._lent: dict[str, str] = {}
        """Pod -> card; of an agent before this one it is seen by who is on the card."""

    def lend(self, uid: str) -> str:
        """The CDI name of the card that a pod gets, the same for all of its containers; empty if there is none."""
        snapshot, spec = self._seen()
        if snapshot is None or not spec.gpu.borrow:
            return ""
        there = self._pods()
        self._lent = {pod: card for pod, card in self._lent.items() if pod in there or pod == uid}
        if uid not in self._lent:
            taken = set(self._lent.values())
            taken |= {c.uuid for c in snapshot.cards.values() if any(_batch(snapshot, i) for i in c.users)}
            free = next((card for card in lendable(snapshot, spec) if card not in taken), "")
            if not free:
                return ""
            self._lent[uid] = free
        return f"{spec.gpu.cdi_kind}={self._lent[uid]}"


def _batch(snapshot: NodeSnapshot, id_: str) -> bool:
    return id_ in snapshot.workloads and snapshot.workloads[id_].tier == "batch"
