"""The eviction law: owner of SIGTERM and kill. Thaw, SIGTERM, the grace period, then every process of the cgroup.

A frozen task runs no handler and v1's freezer holds back even SIGKILL, so the order is signal first, thaw before it.
Jobs past their declared maximum runtime are evicted by the same steps. designs/0003-freeze.md.
"""

from __future__ import annotations

import msgspec

from colocate.decide.law import Decision, View, act
from colocate.plan import Request, Verdict
from colocate.snapshot import NodeSnapshot

LAW = "eviction"
KILLING_SECONDS = 5.0


class Eviction(msgspec.Struct, frozen=True, kw_only=True):
    """One job on its way out."""

    deadline: float
    """Monotonic seconds; then it is killed."""
    reason: str
    message: str
    killed: float = 0.0
    """When it was first killed."""
    inodes: dict[str, int] = {}
    """Of the cgroup that was told: one that its owner has made anew since is another."""


class EvictionState(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Jobs that were told to go."""

    under_way: dict[str, Eviction] = {}


def decide_eviction(view: View, state: EvictionState) -> Decision:
    """The eviction law for one tick; its requests are thaws."""
    snapshot, now = view.snapshot, view.now
    jobs = {w.id: w for w in snapshot.of("batch")}
    wishes = {r.workload: r for r in view.requests if r.verb == "evict" and r.workload in jobs}
    for job in jobs.values():
        limit = job.max_runtime_seconds
        if limit is not None and job.started_seconds and now - job.started_seconds > limit:
            message = f"{job.name} ran longer than its --max-runtime of {limit:g} s"
            wishes.setdefault(
                job.id, Request(verb="evict", workload=job.id, law=LAW, reason="MaxRuntime", message=message)
            )
    under_way = {id_: e for id_, e in state.under_way.items() if still_leaving(snapshot, id_, e, now)}
    actions = []
    for id_, wish in wishes.items():
        if id_ in under_way or not _alive(snapshot, id_):
            continue
        deadline = now + view.spec.memory.termination_grace
        inodes = jobs[id_].inodes
        under_way[id_] = Eviction(deadline=deadline, reason=wish.reason, message=wish.message, inodes=inodes)
        actions.append(act(LAW, jobs[id_], "signal", "SIGTERM", wish.reason, wish.message))
    thaws = []
    for id_, eviction in list(under_way.items()):
        thaws.append(Request(verb="thaw", workload=id_, law=LAW, reason="Evicting", message=eviction.message))
        if now >= eviction.deadline:
            under_way[id_] = msgspec.structs.replace(eviction, killed=eviction.killed or now)
            actions.append(act(LAW, jobs[id_], "cgroup.kill", "1", eviction.reason, eviction.message))
    if under_way:
        names = ", ".join(jobs[i].name for i in under_way)
        first = next(iter(under_way.values()))
        verdict = Verdict(law=LAW, state="evicting", reason=first.reason, message=f"{names}: {first.message}")
    else:
        verdict = Verdict(law=LAW, state="none", reason="NothingToEvict", message="no law asks for an eviction")
    return Decision(EvictionState(under_way=under_way), actions, verdict, [], thaws)


def still_leaving(snapshot: NodeSnapshot, id_: str, eviction: Eviction, now: float) -> bool:
    """Whether a job that was told to go is still on its way; what its owner has made anew is another."""
    job = snapshot.workloads.get(id_)
    if job is None or not _alive(snapshot, id_) or eviction.inodes != job.inodes:
        return False
    return not (eviction.killed and now >= eviction.killed + KILLING_SECONDS)  # whatever runs then was started since


def _alive(snapshot: NodeSnapshot, id_: str) -> bool:
    processes = snapshot.workloads[id_].processes
    return processes is None or processes > 0
