"""The freeze law: owner of cgroup.freeze. Other laws ask; it freezes, thaws, and limits how long a job may be frozen.

Between ticks its grants are carried out by the hand (pulses), for whoever has to answer within milliseconds.

A frozen job holds its memory and runs no signal handler, so after `maxFrozen` it is evicted, and a job that is being
evicted or signalled is thawed first. designs/0003-freeze.md.
"""

from __future__ import annotations

import msgspec

from colocate.decide.law import Decision, View, act
from colocate.plan import Pulse, Rejected, Request, Verdict

LAW, KNOB = "freeze", "cgroup.freeze"
EVALUATE = "evaluate"
"""The asker whose windows are bounded by the evaluation itself, so the maximum frozen time is not applied."""


class FreezeState(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Since when (monotonic seconds) each workload has been frozen by us."""

    since: dict[str, float] = {}
    pulsed: tuple[str, ...] = ()
    """Workloads that the hand stops and lets go: what was read of their freezers is older than what they are now."""


def since_of(wanted: bool, frozen: bool, since: float, now: float) -> float:
    """The core: since when a job has been frozen by us, -1 if it is not.

    What was read back counts, not what was wished: one that cannot be frozen is not frozen too long.
    """
    if wanted:
        return since if frozen and since >= 0.0 else now
    return since if frozen and since >= 0.0 else -1.0


def decide_freeze(view: View, state: FreezeState) -> Decision:
    """The freeze law for one tick; its requests are evictions for the next one.

    A thaw request beats a freeze request: a job that must end must run.
    """
    snapshot, now, most = view.snapshot, view.now, view.spec.freeze.max_frozen
    freeze = {r.workload: r for r in view.requests if r.verb == "freeze"}
    thaw = {r.workload: r for r in view.requests if r.verb == "thaw"}
    suspend = {r.workload for r in view.requests if r.verb == "suspend"} & set(snapshot.workloads)
    pulses: dict[str, tuple[Pulse, ...]] = {}
    for request in view.requests:
        if request.pulse is not None and request.workload not in {*freeze, *thaw, *suspend}:
            pulses[request.workload] = (*pulses.get(request.workload, ()), request.pulse)
    actions, rejected, follow = [], [], []
    since: dict[str, float] = {}
    for job in snapshot.of("batch"):
        wish = freeze.get(job.id)
        if wish is not None and job.id in thaw:
            why = f"{thaw[job.id].law}: {thaw[job.id].message}"
            rejected.append(Rejected(law=LAW, considered=f"freezing {job.name} for {wish.law}", why=why))
            wish = None
        if wish is not None and job.id in suspend:  # the driver does nothing with a frozen process
            why = "it is taken off its card, and launches nothing meanwhile"
            rejected.append(Rejected(law=LAW, considered=f"freezing {job.name} for {wish.law}", why=why))
            wish = None
        ours = job.id in state.since or job.id in state.pulsed
        if job.frozen and job.in_place and not ours and job.id not in thaw and job.found.get(KNOB, "1") == "1":
            pulses.pop(job.id, None)  # others froze it, by a `docker pause` say: it is theirs to let go
            continue
        began = since_of(wish is not None, job.frozen, state.since.get(job.id, -1.0), now)
        if began >= 0.0:
            since[job.id] = began
        longest = most if wish is None or wish.patience_seconds is None else wish.patience_seconds
        if wish is not None and now - began > longest and wish.law != EVALUATE:
            message = f"{job.name} has been frozen for {now - began:.0f} s (at most {longest:g} s): {wish.message}"
            follow.append(Request(verb="evict", workload=job.id, law=LAW, reason="FrozenTooLong", message=message))
        wanted = "1" if wish is not None else "0"
        if job.id in pulses:
            since.pop(job.id, None)
            continue
        if job.frozen != (wanted == "1") or job.id in state.pulsed:
            reason = wish.reason if wish is not None else "Thaw"
            message = wish.message if wish is not None else "nothing asks for a freeze any more"
            actions.append(act(LAW, job, KNOB, wanted, reason, message))
    state = FreezeState(since=since, pulsed=tuple(sorted(pulses)))
    if pulses and not since:
        message = f"{len(pulses)} job(s) are stopped and let go within milliseconds, as their cards' services need it"
        verdict = Verdict(law=LAW, state="pulsed", reason="PulseGranted", message=message)
    elif since:
        longest = max(now - t for t in since.values())
        message = f"{len(since)} job(s) frozen, the longest for {longest:.1f} s of at most {most:g} s"
        verdict = Verdict(law=LAW, state="frozen", reason="FreezeRequested", message=message)
    else:
        verdict = Verdict(law=LAW, state="thawed", reason="NothingFrozen", message="no law asks for a freeze")
    return Decision(state, actions, verdict, rejected, follow, pulses=pulses, suspended=tuple(sorted(suspend)))
