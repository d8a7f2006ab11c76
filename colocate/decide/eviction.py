"""The eviction law: owner of SIGTERM and kill. Thaw, SIGTERM, the grace period, then every process of the cgroup.

A pod that the API server knows is evicted there, which honours its budget and has it made anew elsewhere; its kubelet
would start it again on the spot. Only for want of memory one that is still here after `API_SECONDS` is signalled, as
kubelet does it then; until its end has begun nothing is thawed for it.
A frozen task runs no handler and v1's freezer holds back even SIGKILL, so the order is signal first, thaw before it.
Jobs past their declared maximum runtime are evicted by the same steps. designs/0003-freeze.md.
"""

from __future__ import annotations

import msgspec

from colocate.decide.law import Decision, View, act
from colocate.plan import Request, Verdict
from colocate.snapshot import NodeSnapshot, Workload

LAW = "eviction"
KILLING_SECONDS = 5.0
API_SECONDS = 15.0
URGENT = frozenset({"MemoryPressure", "OverAllowance", "CardMemory"})
"""Who goes for these reasons goes whatever a budget says."""


class Eviction(msgspec.Struct, frozen=True, kw_only=True):
    """One job on its way out."""

    deadline: float = 0.0
    """Monotonic seconds; then it is killed. 0: it has not been signalled."""
    asked: float = 0.0
    """Of a pod: until when the API server's eviction is waited for."""
    reason: str
    message: str
    killed: float = 0.0
    """When it was first killed."""
    inodes: dict[str, int] = {}
    """Of the cgroup that was told: one that its owner has made anew since is another."""

    @property
    def presses(self) -> bool:
        """Whether it frees something soon: an API that may refuse for ever is nothing to count on."""
        return bool(self.deadline) or self.reason in URGENT


class EvictionState(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Jobs that were told to go."""

    under_way: dict[str, Eviction] = {}


STAYS, TOLD, WAITED_FOR, KILLED = range(4)


def proceed(
    alive: bool, wished: bool, deadline: float, killed: float, now: float, grace_seconds: float
) -> tuple[int, float, float]:
    """The core: (what is done, deadline, when it was first killed) of one job; deadline 0: it was not told to go."""
    if not alive or (killed > 0.0 and now >= killed + KILLING_SECONDS):  # whatever runs then was started since
        deadline = killed = 0.0
    if deadline <= 0.0:
        if not (alive and wished):
            return STAYS, 0.0, 0.0
        return TOLD, now + grace_seconds, 0.0
    if now >= deadline:
        return KILLED, deadline, killed if killed > 0.0 else now
    return WAITED_FOR, deadline, killed


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
    under_way: dict[str, Eviction] = {}
    actions, thaws = [], []
    for id_, job in jobs.items():
        known, wish = state.under_way.get(id_), wishes.get(id_)
        if known is not None and known.inodes != job.inodes:
            known = None  # what its owner has made anew is another
        deadline, killed = (known.deadline, known.killed) if known is not None else (0.0, 0.0)
        grace = view.spec.memory.termination_grace
        wish = _wish_for_pod(wish, known, job) if job.pod else wish
        if job.pod and wish is not None and deadline <= 0.0 and _alive(snapshot, id_):
            if known is None or (wish.reason in URGENT and known.reason not in URGENT):
                asked = now + API_SECONDS
                known = Eviction(asked=asked, reason=wish.reason, message=wish.message, inodes=job.inodes)
            if now < known.asked or known.reason not in URGENT:
                under_way[id_] = known
                if job.leaving:
                    thaws.append(Request(verb="thaw", workload=id_, law=LAW, reason="Evicting", message=known.message))
                continue
        done, deadline, killed = proceed(_alive(snapshot, id_), wish is not None, deadline, killed, now, grace)
        if done == TOLD and wish is not None:
            asked = known.asked if known is not None else 0.0
            known = Eviction(
                deadline=deadline, asked=asked, reason=wish.reason, message=wish.message, inodes=job.inodes
            )
            actions.append(act(LAW, job, "signal", "SIGTERM", wish.reason, wish.message))
        if done == STAYS or known is None:
            continue
        under_way[id_] = msgspec.structs.replace(known, killed=killed)
        if done == KILLED:
            actions.append(act(LAW, job, "cgroup.kill", "1", known.reason, known.message))
        thaws.append(Request(verb="thaw", workload=id_, law=LAW, reason="Evicting", message=known.message))
    if under_way:
        names = ", ".join(jobs[i].name for i in under_way)
        first = next(iter(under_way.values()))
        verdict = Verdict(law=LAW, state="evicting", reason=first.reason, message=f"{names}: {first.message}")
    else:
        verdict = Verdict(law=LAW, state="none", reason="NothingToEvict", message="no law asks for an eviction")
    return Decision(EvictionState(under_way=under_way), actions, verdict, [], thaws)


def _wish_for_pod(wish: Request | None, known: Eviction | None, pod: Workload) -> Request | None:
    """What wants a pod to go: who needs its memory asks once, the others as long as they want it."""
    if known is None or known.deadline or (wish is not None and wish.reason in URGENT):
        return wish
    if known.reason in URGENT or pod.leaving:
        return Request(verb="evict", workload=pod.id, law=LAW, reason=known.reason, message=known.message)
    return wish


def still_leaving(snapshot: NodeSnapshot, id_: str, eviction: Eviction, now: float) -> bool:
    """Whether a job that was told to go is still on its way; what its owner has made anew is another."""
    job = snapshot.workloads.get(id_)
    if job is None or not _alive(snapshot, id_) or eviction.inodes != job.inodes:
        return False
    if not eviction.presses and not job.leaving:
        return False
    return not (eviction.killed and now >= eviction.killed + KILLING_SECONDS)  # whatever runs then was started since


def _alive(snapshot: NodeSnapshot, id_: str) -> bool:
    processes = snapshot.workloads[id_].processes
    return processes is None or processes > 0
