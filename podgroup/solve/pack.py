"""Vector bin packing by search, for the few members that greedy orders leave without a place."""

from __future__ import annotations

from collections.abc import Sequence

MAX_STEPS = 20_000
MAX_MEMBERS = 32


def pack(
    free: Sequence[Sequence[int]], asks: Sequence[Sequence[int]], allowed: Sequence[Sequence[bool]]
) -> list[int] | None:
    """The node of each member, or None: there is none, or `MAX_STEPS` did not find it.

    `free` is nodes x resources, `asks` members x resources, `allowed` members x nodes. Nodes that are alike are tried
    once.
    """
    if len(asks) > MAX_MEMBERS:
        return None
    left = [list(row) for row in free]
    order = sorted(range(len(asks)), key=lambda m: (sum(allowed[m]), [-a for a in asks[m]]))
    nodes: list[int] = []
    steps = 0

    def settle(depth: int) -> bool:
        nonlocal steps
        if depth == len(order):
            return True
        member, tried = order[depth], set()
        rest = order[depth:]
        for node, room in enumerate(left):
            if not allowed[member][node] or any(a > r for a, r in zip(asks[member], room, strict=True)):
                continue
            alike = (tuple(room), tuple(allowed[m][node] for m in rest))
            if alike in tried:
                continue
            tried.add(alike)
            steps += 1
            if steps > MAX_STEPS:
                return False
            left[node] = [r - a for r, a in zip(room, asks[member], strict=True)]
            nodes.append(node)
            if settle(depth + 1):
                return True
            nodes.pop()
            left[node] = list(room)
        return False

    if not settle(0):
        return None
    found = [0] * len(asks)
    for member, node in zip(order, nodes, strict=True):
        found[member] = node
    return found
