"""Plans of thousands of members, in a form that an API server takes: etcd refuses requests above 1.5 MiB.

What all names of the pods have in common, and each node's name, are then written once.
"""

from __future__ import annotations

from itertools import takewhile

import msgspec

from podgroup.api import GangPlan, PlannedMember

LARGE = 1000


def compact(plan: GangPlan) -> GangPlan:
    """The plan as it is stored."""
    members = plan.spec.members
    if len(members) < LARGE or plan.spec.nodes:
        return plan
    names = [m.name for m in members]
    pairs = zip(min(names), max(names), strict=False)  # what the first and the last in order share, all do
    prefix = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    nodes = sorted({m.node for m in members})
    number = {name: i for i, name in enumerate(nodes)}
    short = [
        PlannedMember(name=m.name.removeprefix(prefix), uid=m.uid, at=number[m.node], volumes=m.volumes)
        for m in members
    ]
    spec = msgspec.structs.replace(plan.spec, prefix=prefix, nodes=nodes, members=short)
    return msgspec.structs.replace(plan, spec=spec)


def expand(plan: GangPlan) -> GangPlan:
    """The plan as it is worked with. A number without a name is no node: such a member is taken for lost."""
    spec = plan.spec
    if not spec.nodes:
        return plan
    names: dict[int | None, str] = dict(enumerate(spec.nodes))
    whole = [
        PlannedMember(name=spec.prefix + m.name, uid=m.uid, node=m.node or names.get(m.at, ""), volumes=m.volumes)
        for m in spec.members
    ]
    return msgspec.structs.replace(plan, spec=msgspec.structs.replace(spec, prefix="", nodes=[], members=whole))
