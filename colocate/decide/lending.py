"""Which cards batch may borrow: of services that lend theirs, where there is memory for somebody else.

Nothing but a service's consent is asked: who shares a card is governed as all batch beside services is.
"""

from __future__ import annotations

from colocate.policy.schema import PolicySpec
from colocate.snapshot import Card, NodeSnapshot

LEAST_BYTES = 1 << 30
"""Beside what the services use and the reserve."""


def lendable(snapshot: NodeSnapshot, spec: PolicySpec) -> tuple[str, ...]:
    """UUIDs of the cards that are lent, a batch job each, in their order. None of a card that anybody else uses."""
    cards = sorted(snapshot.cards.values(), key=lambda c: (c.index, c.uuid))
    return tuple(card.uuid for card in cards if _lent(card, snapshot, spec.gpu.memory_reserve))


def _lent(card: Card, snapshot: NodeSnapshot, reserve_bytes: int) -> bool:
    if card.mig or card.virtual or card.strangers or card.problem or card.memory_bytes is None:
        return False
    services = [snapshot.workloads[i] for i in card.users if i in snapshot.workloads]
    services = [w for w in services if w.tier == "service"]
    used = [card.users[w.id].memory_bytes for w in services]
    if not services or None in used or not all(w.lends_gpu for w in services):
        return False
    return card.memory_bytes - sum(u or 0 for u in used) - reserve_bytes >= LEAST_BYTES
