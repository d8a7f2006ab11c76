"""Where a gang can go: all of its quorum or nothing.

Among the nodes that fit, a gang of GPUs goes where it leaves the least fragments, and every gang into as few topology
domains as it can: into one where one holds it, else into the fewest of the broadest kind, and of those into the fewest
of the next. Homogeneous gangs are decided exactly. Several classes that compete for the same nodes are packed
greedily in up to `MAX_ORDERS` orders, then by a bounded search (pack.py); a larger gang whose packing neither finds
waits, and is tried again with each change of the cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice, permutations

import numpy as np

from podgroup.policy import Floats
from podgroup.solve.pack import pack
from podgroup.solve.place_class import more_watts, most_on_a_node, place_class
from podgroup.solve.question import Class, Debt, Gang, Member, Placed, Trial, changes_on_the_way, classes_of
from podgroup.solve.volumes import decisions
from podgroup.state.ledger import Ints, Ledger, Mask
from podgroup.state.node_budgets import capped

MAX_ORDERS = 24
MAX_PREFERRED_DOMAINS = 4
UNKNOWN_WATTS = 1e9
"""More than any node draws."""
HOSTNAME = "kubernetes.io/hostname"


def _orders(classes: list[Class], ledger: Ledger) -> Iterator[Sequence[Class]]:
    """The hardest classes first, then the other orders."""
    total = np.maximum(ledger.allocatable.sum(axis=0), 1)

    def weight(group: Class) -> float:
        parts = [a / int(total[ledger.columns[r]]) for r, a in group.shape.requests if r in ledger.columns]
        return -max(parts, default=1.0)

    ranked = sorted(classes, key=weight)
    return islice(permutations(ranked), MAX_ORDERS)


def _within(
    ledger: Ledger, classes: list[Class], within: Mask, gang: Gang, reserve_within: Mask
) -> list[Placed] | None:
    for decided in decisions(ledger, classes, within):
        placed = _in_some_order(ledger, partial(Trial, ledger, within, decided), classes, gang, reserve_within)
        if placed is not None:
            return placed
    return None


def _in_some_order(
    ledger: Ledger, fresh: Callable[[], Trial], classes: list[Class], gang: Gang, reserve_within: Mask
) -> list[Placed] | None:
    for order in _orders(classes, ledger):
        tried = fresh()
        for group in order:
            rows = place_class(tried, group)
            if rows is None:
                break
            tried.commit(group, rows)
        else:
            if _enough_left(tried, gang, reserve_within):
                return [
                    Placed(member, tried.ledger.names[row])
                    for group, rows in tried.put
                    for member, row in zip(group.members, rows.tolist(), strict=True)
                ]
        if len(classes) == 1 or _hopeless(fresh, classes):
            return None
    return _searched(fresh(), classes, gang, reserve_within)


def _searched(trial: Trial, classes: list[Class], gang: Gang, within: Mask) -> list[Placed] | None:
    """A packing of a small gang that no order of its classes finds; only for filters that do not change on the way."""
    members = [(group, m) for group in classes for m in group.members]
    masks = {id(group): trial.mask(group) for group in classes}
    if any(changes_on_the_way(group.shape) for group in classes):
        return None
    rows = np.flatnonzero(np.any([trial.room(g, masks[id(g)]) > 0 for g in classes], axis=0))
    columns = sorted({trial.ledger.columns[r] for g in classes for r, _ in g.shape.requests})
    free = (trial.ledger.allocatable - trial.used)[np.ix_(rows, np.array(columns, dtype=np.int64))]
    asks = [[dict(g.shape.requests).get(r, 0) for r, c in _by_column(trial.ledger) if c in columns] for g, _ in members]
    found = pack(free.tolist(), asks, [masks[id(g)][rows].tolist() for g, _ in members])
    if found is None:
        return None
    for (group, _), node in zip(members, found, strict=True):
        trial.commit(group, rows[[node]])
    asked = {resource for group in classes for resource, _ in group.shape.requests}
    if any(budget.left < 0 for budget in trial.ledger.left_of(asked, trial.used)):
        return None
    if not _enough_left(trial, gang, within):
        return None
    return [Placed(m, trial.ledger.names[int(rows[node])]) for (_, m), node in zip(members, found, strict=True)]


def _by_column(ledger: Ledger) -> list[tuple[str, int]]:
    return sorted(ledger.columns.items(), key=lambda item: item[1])


def _enough_left(trial: Trial, gang: Gang, within: Mask) -> bool:
    """Whether the rest of the gang's minResources is left, and what others are owed on the nodes that it touches."""
    if not gang.min_resources and not gang.leave:
        return True
    own = np.zeros(len(trial.ledger.names), dtype=bool)
    if gang.min_resources:
        own = trial.ledger.standing(gang.members[0].shape)
    if not _free(trial, gang.min_resources, within & own):
        return False
    for mask, owed in _debts(trial.ledger, gang.leave):
        shared = bool((mask & own).any())
        if not shared and not any(mask[rows].any() for _, rows in trial.put):
            continue
        both = {r: a + gang.min_resources.get(r, 0) for r, a in owed.items()}
        if not _free(trial, owed, mask) or (shared and not _free(trial, both, mask | own)):
            return False
    return True


def _debts(ledger: Ledger, leave: Sequence[Debt]) -> list[tuple[Mask, dict[str, int]]]:
    """What is owed on each set of nodes; of a resource that no node has nothing can be kept."""
    found: dict[bytes, tuple[Mask, dict[str, int]]] = {}
    for debt in leave:
        mask = ledger.standing(debt.shape)
        total = found.setdefault(mask.tobytes(), (mask, {}))[1]
        for resource, amount in debt.amounts.items():
            if resource in ledger.columns:
                total[resource] = total.get(resource, 0) + amount
    return list(found.values())


def _free(trial: Trial, wanted: Mapping[str, int], usable: Mask) -> bool:
    for resource, amount in wanted.items():
        column = trial.ledger.columns.get(resource)
        if column is None:
            return amount <= 0
        free = np.where(usable, np.maximum(trial.ledger.allocatable[:, column] - trial.used[:, column], 0), 0)
        caps = [left.cap(1) for left in trial.ledger.left_of((resource,), trial.used)]
        if int(capped(free, caps, np.arange(len(free))).sum()) < amount:
            return False
    return True


def _hopeless(fresh: Callable[[], Trial], classes: list[Class]) -> bool:
    """Whether some class does not even fit alone: no order can help then."""
    return any(place_class(fresh(), group) is None for group in classes if not group.shape.affinity)


def _rooms(ledger: Ledger, classes: list[Class], within: Mask) -> list[Ints] | None:
    """For each class alone, how many members each node takes; None if a class does not fit even so."""
    trial, rooms = Trial(ledger, within), []
    for group in classes:
        room = np.minimum(trial.room(group, trial.mask(group)), most_on_a_node(ledger, group))
        caps, anyhow = trial.caps(group), np.arange(len(room))
        if caps:  # those of parts; how much of a whole each part may have is not known here
            room = np.minimum(room, len(group.members))
            if int(capped(room, caps, anyhow).sum()) < len(group.members):
                return None
            room = capped(room, [cap for cap in caps if (within & ~cap.nodes).any()], anyhow)
        if int(room.sum()) < len(group.members):
            return None
        rooms.append(room)
    return rooms


def _domains(ledger: Ledger, classes: list[Class], rooms: list[Ints], key: str, within: Mask) -> Iterator[Mask]:
    """The domains of a label with room for each class alone, the tightest first, or by a policy of watts those that
    draw the least more."""
    column = ledger.label(key)
    size, here = len(column.code_of), column.codes >= 0
    enough, total = np.ones(size, dtype=bool), np.zeros(size)
    for group, room in zip(classes, rooms, strict=True):
        by_domain = np.bincount(column.codes[here], weights=room[here].astype(float), minlength=size)
        enough &= by_domain >= len(group.members)
        total += by_domain
    watts = _watts(ledger, classes, rooms, column.codes, size) if ledger.policy.reads_power else np.zeros(size)
    for code in np.lexsort((column.ranks, total, np.floor(watts))):
        if enough[code]:
            yield within & (column.codes == code)


def _watts(ledger: Ledger, classes: list[Class], rooms: list[Ints], codes: Ints, size: int) -> Floats:
    """What each domain would draw more for the classes, each of them where it draws the least there, shape (size,)."""
    found = np.zeros(size)
    for group, room in zip(classes, rooms, strict=True):
        wanted, watts = len(group.members), np.minimum(more_watts(ledger, group, room, ledger.used), UNKNOWN_WATTS)
        order = np.lexsort((watts, codes))
        order = order[(codes[order] >= 0) & (room[order] > 0)]
        taken, code = np.minimum(room[order], wanted), codes[order]
        before = np.cumsum(taken) - taken
        first = np.searchsorted(code, code)  # of its domain, for they are sorted by domain
        there = np.clip(wanted - (before - before[first]), 0, taken)
        found += np.bincount(code, weights=there * watts[order], minlength=size)
    return found


def _required(ledger: Ledger, gang: Gang, classes: list[Class]) -> Iterator[Mask]:
    """The parts of the cluster in any of which the whole gang may be."""
    everywhere = np.ones(len(ledger.names), dtype=bool)
    if not gang.required_topology:
        yield everywhere
        return
    column = ledger.label(gang.required_topology)
    everywhere = column.codes >= 0
    bound = {int(column.codes[ledger.rows[n]]) for n in gang.fixed if n in ledger.rows}
    if len(bound) > 1:
        return
    for code in bound:
        everywhere = everywhere & (column.codes == code)
    rooms = _rooms(ledger, classes, everywhere)
    if rooms is not None:
        yield from _domains(ledger, classes, rooms, gang.required_topology, everywhere)


def _place_exactly(ledger: Ledger, gang: Gang, members: Sequence[Member]) -> list[Placed] | None:
    classes = classes_of(members, ledger)
    for domain in _required(ledger, gang, classes):
        rooms = _rooms(ledger, classes, domain)
        if rooms is None:
            continue
        for part in _parts(ledger, classes, rooms, gang.preferred_topology if len(members) > 1 else (), domain):
            placed = _within(ledger, classes, part, gang, domain)
            if placed is not None:
                return placed
    return None


def _parts(
    ledger: Ledger, classes: list[Class], rooms: list[Ints], keys: Sequence[str], domain: Mask
) -> Iterator[Mask]:
    """Where to try, the best first: single domains from the narrowest label to the broadest, then all of it.

    Of each first the fewest domains of the narrower labels that have room.
    """
    for i in reversed(range(len(keys))):
        for part in islice(_domains(ledger, classes, rooms, keys[i], domain), MAX_PREFERRED_DOMAINS):
            yield from _narrowed(ledger, classes, rooms, keys[i + 1 :], part)
    yield from _narrowed(ledger, classes, rooms, keys, domain)


def _narrowed(
    ledger: Ledger, classes: list[Class], rooms: list[Ints], keys: Sequence[str], part: Mask
) -> Iterator[Mask]:
    """The fewest domains of each label within those of the one before it; then all of the part."""
    few = part
    for key in keys:
        if key != HOSTNAME:  # as few nodes as possible are filled anyway
            few = _fewest(ledger, classes, rooms, key, few)
    if few is not part:
        yield few
    yield part


def _fewest(ledger: Ledger, classes: list[Class], rooms: list[Ints], key: str, part: Mask) -> Mask:
    """The fewest domains of a label that have room for all classes, the last one the tightest; the part if none have.

    Exact for one class: the largest ones first. For several, those first that hold the largest share of them.
    """
    column = ledger.label(key)
    here = part & (column.codes >= 0)
    size = len(column.code_of)
    by_domain = np.array(
        [np.bincount(column.codes[here], weights=room[here].astype(float), minlength=size) for room in rooms]
    )
    left = np.array([float(len(group.members)) for group in classes])
    if size == 0 or (by_domain.sum(axis=1) < left).any():
        return part
    share = (np.minimum(by_domain, left[:, None]) / left[:, None]).sum(axis=0)
    chosen: list[int] = []
    order = np.lexsort((column.ranks, -share))
    for code in order:
        rest = np.setdiff1d(order, chosen)
        enough = rest[(by_domain[:, rest] >= left[:, None]).all(axis=0)]
        if len(enough):
            chosen.append(int(enough[np.lexsort((column.ranks[enough], by_domain[:, enough].sum(axis=0)))[0]]))
            return part & np.isin(column.codes, chosen)
        chosen.append(int(code))
        left = np.maximum(left - by_domain[:, code], 0.0)
    return part


def place(ledger: Ledger, gang: Gang) -> list[Placed] | None:
    """A node for at least `quorum` of the members, and for as many more as fit; None if the quorum does not fit.

    Members beyond the quorum are taken in their order. The ledger is not changed.
    """
    if len(gang.members) < gang.quorum:
        return None
    placed = _place_exactly(ledger, gang, gang.members)
    if placed is not None or len(gang.members) == gang.quorum:
        return placed
    low, best = gang.quorum, _place_exactly(ledger, gang, gang.members[: gang.quorum])
    if best is None:
        return None
    high = len(gang.members)
    while high - low > 1:
        middle = (low + high) // 2
        placed = _place_exactly(ledger, gang, gang.members[:middle])
        if placed is None:
            high = middle
        else:
            low, best = middle, placed
    return best


def most_that_fit(ledger: Ledger, gang: Gang) -> int:
    """How many members fit at once, in their order: what an explanation says of a gang that does not."""
    return len(place(ledger, gang._replace(quorum=0, min_resources={})) or [])
