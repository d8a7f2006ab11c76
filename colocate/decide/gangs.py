"""The law of gangs over nodes: who waits for a member that is frozen elsewhere stands still as well.

The members of a gang wait for each other, many of them by looking all the time: on a GPU that is a kernel that runs, on
a CPU a core that is busy, beside services that get nothing for it. That a member is frozen on another node the API
server's side tells (condition `colocate.io/GangHeld` of the pod); one on this node the law of cards sees itself.
What is told and never taken back holds nobody: after twice `freeze.maxFrozen`, when that member has long been thawed or
evicted, it counts no more.
"""

from __future__ import annotations

import msgspec

from colocate.decide.law import Decision, View
from colocate.plan import Request, Verdict

LAW = "gangs"
PATIENCE = 2.0
"""Of freeze.maxFrozen."""


class GangsState(msgspec.Struct, frozen=True, omit_defaults=True):
    """Since when (monotonic seconds) each workload has been told so."""

    since: dict[str, float] = {}


def decide_gangs(view: View, state: GangsState) -> Decision:
    """One tick. Pure."""
    most = PATIENCE * view.spec.freeze.max_frozen
    waiting = [w for w in view.snapshot.of("batch") if w.gang_held and view.spec.freeze.gangs == "together"]
    since = {w.id: state.since.get(w.id, view.now) for w in waiting}
    requests = [
        Request(
            verb="freeze",
            workload=w.id,
            law=LAW,
            reason="GangHeld",
            message=w.gang_held,
            patience_seconds=2.0 * most,  # it is no reason to go
        )
        for w in waiting
        if view.now - since[w.id] <= most
    ]
    if requests:
        text = f"{len(requests)} job(s) stand still with a member of their gang on another node"
        verdict = Verdict(law=LAW, state="together", reason="GangHeld", message=text)
    else:
        verdict = Verdict(law=LAW, state="free", reason="NoGangHeld", message="no member elsewhere is frozen")
    return Decision(GangsState(since), [], verdict, requests=requests)
