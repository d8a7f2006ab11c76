"""Which volumes the claims get that several pods of a gang share: decided before its classes are placed.

Which volume is best for one class with the claim says nothing of the other claims of the next class, so all classes are
looked at together: what suits each class with the claim alone, the widest reach first, then the combinations of those,
the best ranks first. A bounded search: a gang for which none of them does waits, and is tried again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, product

from podgroup.solve.place_class import place_class
from podgroup.solve.question import Class, Trial
from podgroup.state.ledger import Ledger, Mask
from podgroup.state.supply import Supply
from podgroup.state.volumes import Unbound

MOST_LOOKED_AT, MOST_VOLUMES, MOST_COMBINATIONS, MOST_TRIED = 128, 16, 4096, 64
"""Volumes of a claim that are looked at, and kept; combinations that are ranked, and tried."""


def decisions(ledger: Ledger, classes: Sequence[Class], within: Mask) -> Iterator[dict[str, str]]:
    """Claims -> volumes, "" for one that is made; one empty decision where nothing is open."""
    shared = {w.shared: w for group in classes for w in group.shape.unbound if w.shared}
    open_ = {key: w for key, w in shared.items() if ledger.storage.decided(key) is None}
    found = [list(islice(_suitable(ledger, classes, w, within), MOST_VOLUMES)) for w in open_.values()]
    each = max(int(MOST_COMBINATIONS ** (1 / len(found))), 2) if found else 0
    ranks = sorted(
        product(*(range(len(names[:each])) for names in found)), key=lambda combined: (sum(combined), combined)
    )
    tried = 0
    for combined in ranks:
        names = [of[rank] for of, rank in zip(found, combined, strict=True)]
        taken = [name for name in names if name]
        if len(set(taken)) == len(taken) and tried < MOST_TRIED:
            tried += 1
            yield dict(zip(open_, names, strict=True))


def _suitable(ledger: Ledger, classes: Sequence[Class], wanted: Unbound, within: Mask) -> Iterator[str]:
    """The volumes of a claim with which each class that has it fits alone; first what most of their nodes reach."""
    users = [group for group in classes if any(w.shared == wanted.shared for w in group.shape.unbound)]
    anywhere = within & False
    for group in users:
        anywhere |= Trial(ledger, within).mask(group)
    known = [g for g in users if not g.shape.affinity and sum(bool(w.shared) for w in g.shape.unbound) == 1]
    for name in islice(Supply(ledger, [wanted], frozenset(), {}, anywhere).ranked(), MOST_LOOKED_AT):
        if all(place_class(Trial(ledger, within, {wanted.shared: name}), group) is not None for group in known):
            yield name
