"""Many simple gangs in turn, compiled: the same places as `place.place` gives one after the other.

Simple is a gang of equal pods, all of which must start, without constraints between pods: most of what waits. A cycle
hands what follows each other in the queue to one call, and a simulator a whole trace. Sources of the order in which
nodes are filled: `place` and `place_class`, with which it is held equal by a property.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from colocate.objects import Node, NodeStatus, ObjectMeta
from podgroup.jit import njit
from podgroup.policy import DEFAULT
from podgroup.solve.place import HOSTNAME, place
from podgroup.solve.place_class import is_extended, scarcest
from podgroup.solve.question import Class, Gang, Member, Placed, Trial, looked_at
from podgroup.state.ledger import Ints, Ledger, Mask
from podgroup.state.shape import Shape

NONE = -1
Flags = npt.NDArray[np.bool_]


class _Kinds(NamedTuple):
    """What the gangs of one call have in common: kinds of members and topology labels, each once."""

    masks: Mask
    """kinds x nodes."""
    asks: Ints
    """kinds x resources."""
    scarce: Ints
    """The column of the scarcest extended resource that a kind asks for; -1 if it asks for none."""
    codes: Ints
    """labels x nodes: the domain of each node."""
    ranks: Ints
    """labels x domains: the order of their names."""
    sizes: Ints
    """How many domains each label has."""


def place_in_turn(ledger: Ledger, gangs: Sequence[Gang], stop: bool = False) -> list[list[Placed] | None]:
    """Where each of these simple gangs goes, those before it in place; None for one that does not fit.

    With `stop` the first that does not fit is the last that is answered. The ledger is not changed.
    """
    if not gangs or not ledger.names:
        return [None for _ in gangs[: 1 if stop else None]]
    if ledger.policy is not DEFAULT or any(
        ledger.budgeted(shape) for shape in {id(g.members[0].shape): g.members[0].shape for g in gangs}.values()
    ):
        return _one_by_one(ledger, gangs, stop)
    keys, kinds, labels = ledger.repelling_keys, dict[tuple[object, ...], int](), dict[str, int]()
    classes: list[Class] = []
    rows = np.empty((len(gangs), 3), dtype=np.int64)
    preferred = np.full((len(gangs), max((len(g.preferred_topology) for g in gangs), default=0)), NONE, dtype=np.int64)
    for i, gang in enumerate(gangs):
        first = gang.members[0]
        kind = kinds.setdefault((id(first.shape), first.namespace, looked_at(first, keys)), len(kinds))
        if kind == len(classes):
            classes.append(Class(first.shape, first.namespace, first.labels, ()))
        required = labels.setdefault(gang.required_topology, len(labels)) if gang.required_topology else NONE
        rows[i] = kind, len(gang.members), required
        for j, key in enumerate(gang.preferred_topology if len(gang.members) > 1 else ()):
            preferred[i, j] = labels.setdefault(key, len(labels))
    known = _kinds(ledger, classes, list(labels))
    narrowest = np.array([key == HOSTNAME for key in labels], dtype=np.bool_)
    extended = np.array([c for name, c in ledger.columns.items() if is_extended(name)], dtype=np.int64)
    free = ledger.allocatable - ledger.used
    cpu, memory = ledger.columns["cpu"], ledger.columns["memory"]
    nodes = np.empty(int(rows[:, 1].sum()), dtype=np.int64)
    done = _place_all(free, rows, preferred, *known, narrowest, extended, cpu, memory, stop, nodes)
    found: list[list[Placed] | None] = []
    at = 0
    for gang in gangs[:done]:
        here = nodes[at : at + len(gang.members)].tolist()
        at += len(gang.members)
        names = ledger.names
        found.append(
            None if here[0] < 0 else [Placed(m, names[row]) for m, row in zip(gang.members, here, strict=True)]
        )
    return found


def _one_by_one(ledger: Ledger, gangs: Sequence[Gang], stop: bool) -> list[list[Placed] | None]:
    """The same where budgets of sets of nodes or another policy count, which the compiled loop does not know."""
    found: list[list[Placed] | None] = []
    with ExitStack() as held:
        for gang in gangs:
            placed = place(ledger, gang)
            found.append(placed)
            if placed is not None:
                held.enter_context(ledger.with_also([one.holding for one in placed]))
            elif stop:
                break
    return found


def _kinds(ledger: Ledger, classes: Sequence[Class], labels: Sequence[str]) -> _Kinds:
    trial = Trial(ledger, np.ones(len(ledger.names), dtype=bool))
    masks = np.array([trial.mask(group) for group in classes])
    asks = np.zeros((len(classes), len(ledger.columns)), dtype=np.int64)
    scarce = np.full(len(classes), NONE, dtype=np.int64)
    for i, group in enumerate(classes):
        for resource, amount in group.shape.requests:
            if resource in ledger.columns:
                asks[i, ledger.columns[resource]] = amount
            else:
                masks[i] = False  # no node has any
        if masks[i].any():
            name = scarcest(ledger, group)
            scarce[i] = ledger.columns[name[0]] if name is not None else NONE
    columns = [ledger.label(key) for key in labels]
    codes = np.array([c.codes for c in columns], dtype=np.int64).reshape(len(columns), len(ledger.names))
    sizes = np.array([len(c.code_of) for c in columns], dtype=np.int64)
    ranks = np.zeros((len(columns), max(int(sizes.max()) if len(sizes) else 0, 1)), dtype=np.int64)
    for i, column in enumerate(columns):
        ranks[i, : len(column.ranks)] = column.ranks
    return _Kinds(masks, asks, scarce, codes, ranks, sizes)


def compile_all() -> None:
    """Compile, or load what was compiled before: seconds, that no lease should have to wait for."""
    ledger = Ledger()
    ledger.set_node(Node(metadata=ObjectMeta(name="n"), status=NodeStatus(allocatable={"cpu": "1", "pods": "1"})))
    member = Member("m", "m", "ns", Shape(requests=(("cpu", 1), ("pods", 1))), {})
    place_in_turn(ledger, [Gang((member,), 1, HOSTNAME, (HOSTNAME,)), Gang((member, member), 2)])


@njit
def _place_all(
    free: Ints,
    gangs: Ints,
    preferred: Ints,
    masks: Mask,
    asks: Ints,
    scarce: Ints,
    codes: Ints,
    ranks: Ints,
    sizes: Ints,
    narrowest: Flags,
    extended: Ints,
    cpu: int,
    memory: int,
    stop: bool,
    nodes: Ints,
) -> int:
    """All gangs in turn; `free` and `nodes` are filled in. How many were answered."""
    count = len(free)
    rooms = _rooms(free, masks, asks)
    capped, part = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.bool_)
    everywhere, kept = np.ones(count, dtype=np.bool_), np.empty(count, dtype=np.bool_)
    for n in range(count):
        kept[n] = _has_extended(n, free, extended)
    at = 0
    for g in range(len(gangs)):
        kind, wanted, required = gangs[g]
        room, total = rooms[kind], 0
        if wanted == 1 and required < 0:  # no domains to choose from: one pass over the nodes
            best = _first(1, free, asks[kind], scarce[kind], kept, cpu, memory, room, everywhere)
            nodes[at] = best
            at += 1
            if best >= 0:
                free[best] -= asks[kind]
                kept[best] = kept[best] and _has_extended(best, free, extended)
                _look_again(best, free, masks, asks, rooms)
            elif stop:
                return g + 1
            continue
        for n in range(count):
            part[n] = room[n] > 0 and (required < 0 or codes[required, n] >= 0)
            capped[n] = min(room[n], wanted) if part[n] else 0
            total += capped[n]
        fits = total >= wanted
        if fits and required >= 0:
            fits = _tightest(codes[required], ranks[required], sizes[required], capped, part, wanted)
        if fits:
            _as_few_domains(preferred[g], codes, ranks, sizes, narrowest, capped, part, wanted)
            here = nodes[at : at + wanted]
            _fill(free, asks[kind], scarce[kind], kept, cpu, memory, room, part, here)
            for i in range(wanted):
                free[here[i]] -= asks[kind]
            for i in range(wanted):
                if i == 0 or here[i] != here[i - 1]:
                    kept[here[i]] = kept[here[i]] and _has_extended(here[i], free, extended)
                    _look_again(here[i], free, masks, asks, rooms)
        else:
            nodes[at : at + wanted] = -1
        at += wanted
        if stop and not fits:
            return g + 1
    return len(gangs)


@njit
def _rooms(free: Ints, masks: Mask, asks: Ints) -> Ints:
    """How many members of each kind each node takes, kinds x nodes."""
    found = np.empty((len(asks), len(free)), dtype=np.int64)
    for kind in range(len(asks)):
        mask, asked = masks[kind], asks[kind]
        for n in range(len(free)):
            found[kind, n] = _room(n, free, mask, asked)
    return found


@njit
def _look_again(n: int, free: Ints, masks: Mask, asks: Ints, rooms: Ints) -> None:
    """How many members of each kind a node takes now."""
    for kind in range(len(asks)):
        rooms[kind, n] = _room(n, free, masks[kind], asks[kind])


@njit
def _room(n: int, free: Ints, mask: Mask, asked: Ints) -> int:
    """How many members of a kind a node takes now. Amounts are less than 2**53, so that a quotient is exact."""
    if not mask[n]:
        return 0
    least = np.inf
    for r in range(len(asked)):
        if asked[r] > 0:
            if free[n, r] < asked[r]:
                return 0
            least = min(least, free[n, r] / asked[r])
    return np.iinfo(np.int64).max if least == np.inf else int(least)


@njit
def _by_domain(codes: Ints, size: int, capped: Ints, part: Flags) -> Ints:
    found = np.zeros(size, dtype=np.int64)
    for n in range(len(codes)):
        if part[n] and codes[n] >= 0:
            found[codes[n]] += capped[n]
    return found


@njit
def _tightest(codes: Ints, ranks: Ints, size: int, capped: Ints, part: Flags, wanted: int) -> bool:
    """Narrow the part to the tightest single domain with room; False, and nothing changed, if there is none."""
    rooms = _by_domain(codes, size, capped, part)
    best = -1
    for d in range(size):
        better = best < 0 or rooms[d] < rooms[best] or (rooms[d] == rooms[best] and ranks[d] < ranks[best])
        if rooms[d] >= wanted and better:
            best = d
    if best >= 0:
        for n in range(len(codes)):
            part[n] = part[n] and codes[n] == best
    return best >= 0


@njit
def _as_few_domains(
    keys: Ints,
    codes: Ints,
    ranks: Ints,
    sizes: Ints,
    narrowest: Flags,
    capped: Ints,
    part: Flags,
    wanted: int,
) -> None:
    """Into one domain of the narrowest label where one holds it; of the labels below that the fewest."""
    first = 0
    for i in range(len(keys) - 1, -1, -1):
        key = keys[i]
        if key >= 0 and _tightest(codes[key], ranks[key], sizes[key], capped, part, wanted):
            first = i + 1
            break
    for i in range(first, len(keys)):
        key = keys[i]
        if key >= 0 and not narrowest[key]:
            _fewest(codes[key], ranks[key], sizes[key], capped, part, wanted)


@njit
def _fewest(codes: Ints, ranks: Ints, size: int, capped: Ints, part: Flags, wanted: int) -> None:
    """The largest domains first, until one holds what is left: of those the tightest."""
    rooms = _by_domain(codes, size, capped, part)
    if rooms.sum() < wanted:
        return
    chosen, left = np.zeros(size, dtype=np.bool_), wanted
    while True:
        last, largest = -1, -1
        for d in range(size):
            if chosen[d]:
                continue
            tighter = last < 0 or rooms[d] < rooms[last] or (rooms[d] == rooms[last] and ranks[d] < ranks[last])
            if rooms[d] >= left and tighter:
                last = d
            if largest < 0:
                largest = d
            else:
                mine, other = min(rooms[d], wanted), min(rooms[largest], wanted)
                if mine > other or (mine == other and ranks[d] < ranks[largest]):
                    largest = d
        chosen[last if last >= 0 else largest] = True
        if last >= 0:
            break
        left -= rooms[largest]
    for n in range(len(codes)):
        part[n] = part[n] and codes[n] >= 0 and chosen[codes[n]]


@njit
def _has_extended(n: int, free: Ints, extended: Ints) -> bool:
    found = False
    for r in extended:
        found = found or free[n, r] > 0
    return found


@njit
def _before(
    a: int, b: int, free: Ints, asked: Ints, scarce: int, kept: Flags, cpu: int, memory: int, room: Ints
) -> bool:
    """Whether node a is filled before node b (`policy.AgeAndTightest`)."""
    if scarce >= 0:
        over_a = free[a, scarce] - room[a] * asked[scarce]
        over_b = free[b, scarce] - room[b] * asked[scarce]
        if over_a != over_b:
            return bool(over_a < over_b)
        if free[a, scarce] != free[b, scarce]:
            return bool(free[a, scarce] < free[b, scarce])
        return a < b
    if kept[a] != kept[b]:
        return bool(kept[b])
    if free[a, cpu] != free[b, cpu]:
        return bool(free[a, cpu] < free[b, cpu])
    if free[a, memory] != free[b, memory]:
        return bool(free[a, memory] < free[b, memory])
    return a < b


@njit
def _first(
    least: int,
    free: Ints,
    asked: Ints,
    scarce: int,
    kept: Flags,
    cpu: int,
    memory: int,
    room: Ints,
    part: Flags,
) -> int:
    """The node to fill first; with `least` the tightest one that takes so many, the first of equals.

    Of those that are kept for others (`policy.Nodes`) only where no other takes so many.
    """
    best = -1
    for n in range(len(free)):
        if not part[n] or room[n] < least:
            continue
        if best < 0 or (least > 0 and scarce < 0 and kept[n] != kept[best]):
            better = best < 0 or kept[best]
        elif least > 0 and room[n] != room[best]:
            better = room[n] < room[best]
        else:
            better = _before(n, best, free, asked, scarce, kept, cpu, memory, room)
        if better:
            best = n
    return best


@njit
def _fill(
    free: Ints,
    asked: Ints,
    scarce: int,
    kept: Flags,
    cpu: int,
    memory: int,
    room: Ints,
    part: Flags,
    nodes: Ints,
) -> None:
    """Nodes in their order, the last part on the tightest node that takes it whole (`place_class.spread_out`)."""
    left, at = len(nodes), 0
    while left > 0:
        best = -1 if left == 1 else _first(0, free, asked, scarce, kept, cpu, memory, room, part)
        if best < 0 or room[best] >= left:
            best = _first(left, free, asked, scarce, kept, cpu, memory, room, part)
        taken = min(room[best], left)
        nodes[at : at + taken] = best
        at += taken
        left -= taken
        part[best] = False
