"""The CPU law: the calibrated class first, a grant only on evidence, strictly below BestEffort.

Owns cpu.weight, cpu.idle, cpu.max and cpuset.cpus of the tier and of batch governed in place. Evidence is a service's
slack (Heracles' thresholds: below 0 to the floor at once, below 10 % no growth, above 20 % growth). During the
hold-down the rungs are tried in calibrated order; one replaces the floor only if slack holds. Waiting without an SLO is
weaker evidence: if it does not fall when batch is at its floor, batch was not its cause. designs/0001-cpu.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec

from colocate.config import Calibration, PolicySpec
from colocate.decide import besteffort
from colocate.model.forecast import Forecast
from colocate.model.slack import slack_of_waiting
from colocate.plan import Action, Rejected, Request, Verdict
from colocate.snapshot import NodeSnapshot, Workload
from colocate.units import cpu_max, format_cpulist

LAW = "cpu"
MAX_HOLD_SECONDS = 300.0
EXONERATION_SECONDS = 60.0
MAX_EXONERATION_SECONDS = 600.0
NOT_HELPED_RATIO = 0.8
OWN_WAITING_FADE = 0.1
OWN_WAITING_SECONDS = 600.0
LEAST_OWN_WAITING_RATIO = 0.01
OPEN_AFTER_TICKS_AT_RAIL = 5
NOISE_CORES = 0.1
"""What batch uses above its floor without anything to gain from the floor."""
Mode = Literal["open", "floor", "trial", "granted"]


class CpuState(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What the law remembers. Times are monotonic seconds."""

    mode: Mode = "open"
    grant_cores: float | None = None
    cpu_count: int | None = None
    """CPUs of the tier's cpuset, in whole cores; None for all."""
    freeze: bool = False
    hold_until: float = 0.0
    hold_seconds: float = 0.0
    rung: int = 0
    ticks: int = 0
    """Ticks in this mode; while open, ticks in a row in which batch does not run."""
    growing: bool = False
    """Growth has begun above `growthAbove`; it goes on down to `noGrowthBelow`."""
    requests: int = 0
    """The service's requests in this trial."""
    used_before_cores: float = 0.0
    waited_before_ratio: float = 0.0
    suspicion: str = ""
    """The service whose waiting, and not its latency, sent batch to its floor."""
    own_waiting: dict[str, float] = {}
    """service -> how much it waits while batch is at its floor or does not run: its own doing, on top of which
    `pressure` is judged."""
    own_until: float = 0.0
    """Then it is forgotten, and the question asked anew: while batch runs, it cannot be told how much it still is."""
    exonerated: str = ""
    """The service whose waiting batch did not cause."""
    exonerated_until: float = 0.0
    exonerated_seconds: float = 0.0
    besteffort: besteffort.BestEffortState = besteffort.BestEffortState()


class Evidence(NamedTuple):
    """The service that has the least slack."""

    service: str
    slack: float
    kind: str
    waiting_ratio: float
    new_requests: int
    text: str


class Decision(NamedTuple):
    """What the law wants this tick."""

    state: CpuState
    actions: list[Action]
    verdict: Verdict
    rejected: list[Rejected]
    requests: list[Request]


def worst_service(
    snapshot: NodeSnapshot, forecast: Forecast, spec: PolicySpec, own_waiting: Mapping[str, float], exonerated: str = ""
) -> Evidence | None:
    """The least slack of all services; None if none can be judged. The waiting of the exonerated one does not count.

    A service without a histogram is judged by what it waits beyond its own waiting, as far as that is known.
    """
    found: Evidence | None = None
    for workload in snapshot.of("service"):
        now = forecast.workloads[workload.id]
        waiting = now.cpu_waiting_ratio or 0.0
        slack, own = now.slack, own_waiting.get(workload.name)
        if slack is not None and now.evidence == "waiting" and own is not None:
            slack = slack_of_waiting(spec.cpu.pressure / 100, max(waiting - own, 0.0))
        if slack is None or (found is not None and slack >= found.slack):
            continue
        if workload.name == exonerated and now.evidence == "waiting":
            continue
        if now.evidence == "latency" and workload.objective is not None and now.p99_seconds is not None:
            target = workload.objective.p99_seconds
            text = f"{workload.name}: p99 {now.p99_seconds * 1e3:.2f} ms of target {target * 1e3:.2f} ms"
        else:
            text = f"{workload.name}: waits for a CPU {waiting:.1%} of the time"
            text += f", {own:.1%} by itself" if own is not None else ""
        found = Evidence(workload.name, slack, now.evidence, waiting, now.new_requests, text)
    return found


def _waiting_ratios(snapshot: NodeSnapshot, forecast: Forecast) -> dict[str, float]:
    found = {w.name: forecast.workloads[w.id].cpu_waiting_ratio for w in snapshot.of("service")}
    return {name: waits for name, waits in found.items() if waits is not None}


def _still_own(own_waiting: Mapping[str, float], snapshot: NodeSnapshot, forecast: Forecast) -> dict[str, float]:
    """What a service waits by itself falls towards what it waits now, if that is less: its load has fallen since.

    Not at once, for waiting comes in bursts: a quiet tick would forget what a floor was spent to learn.
    """
    now = _waiting_ratios(snapshot, forecast)
    return {
        name: round(own - OWN_WAITING_FADE * max(own - now[name], 0.0), 4)
        for name, own in own_waiting.items()
        if name in now
    }


def guard_rail_cores(forecast: Forecast, spec: PolicySpec) -> float:
    """node - services' forecast peak - system - reserve: what no grant may exceed; never below the floor."""
    reserve = forecast.node_cores * spec.cpu.reserve / 100
    left = forecast.node_cores - forecast.services_peak_cores - forecast.system_cores - reserve
    return round(max(left, spec.cpu.floor), 4)


def _to_floor(state: CpuState, seen: Evidence, forecast: Forecast, now: float, spec: PolicySpec) -> CpuState:
    again = now < state.hold_until + state.hold_seconds
    hold = min(max(state.hold_seconds * 2 if again else 0.0, spec.cpu.hold_down), MAX_HOLD_SECONDS)
    was_open = state.mode in ("open", "granted")
    return msgspec.structs.replace(
        state,
        mode="floor",
        grant_cores=spec.cpu.floor,
        cpu_count=None,
        freeze=False,
        ticks=0,
        requests=0,
        rung=0 if was_open else state.rung + 1,
        hold_until=now + hold if was_open else state.hold_until,
        hold_seconds=hold if was_open else state.hold_seconds,
        used_before_cores=forecast.batch_cores if was_open else state.used_before_cores,
        waited_before_ratio=seen.waiting_ratio if was_open else state.waited_before_ratio,
        suspicion=_suspicion(state, seen, forecast, was_open=was_open),
    )


def _suspicion(state: CpuState, seen: Evidence, forecast: Forecast, *, was_open: bool) -> str:
    """The service whose waiting alone is the reason for the floor; empty if another one's latency is one too."""
    slow = any(w.evidence == "latency" and (w.slack or 0.0) < 0 for w in forecast.workloads.values())
    same = was_open or seen.service == state.suspicion
    return seen.service if seen.kind == "waiting" and same and not slow else ""


def _start_trial(
    state: CpuState, snapshot: NodeSnapshot, forecast: Forecast, spec: PolicySpec, rungs: Sequence[str]
) -> CpuState:
    rung = rungs[state.rung]
    replace = msgspec.structs.replace
    if rung == "cpuset":
        cores = len(snapshot.cores) // 2
        count = sum(len(c) for c in snapshot.cores[len(snapshot.cores) - cores :])
        if count == 0:
            return replace(state, rung=state.rung + 1)
        return replace(state, mode="trial", grant_cores=None, cpu_count=count, ticks=0, requests=0)
    if rung == "quota":
        wanted = max(state.used_before_cores / 2, spec.cpu.floor)
        grant = min(wanted, guard_rail_cores(forecast, spec))
        return replace(state, mode="trial", grant_cores=round(grant, 4), cpu_count=None, ticks=0, requests=0)
    return replace(state, mode="trial", grant_cores=spec.cpu.floor, freeze=True, ticks=0, requests=0)


def _opened(state: CpuState) -> CpuState:
    """No grant any more; what was learnt stays."""
    return CpuState(
        besteffort=state.besteffort,
        hold_until=state.hold_until,
        hold_seconds=state.hold_seconds,
        own_waiting=state.own_waiting,
        own_until=state.own_until,
    )


def _grown(state: CpuState, snapshot: NodeSnapshot, forecast: Forecast, spec: PolicySpec) -> CpuState:
    """One tick's growth: at most `growth` of the node, whole cores for a cpuset; open once nothing is held back."""
    replace = msgspec.structs.replace
    step = forecast.node_cores * spec.cpu.growth / 100
    if state.freeze:
        return replace(state, freeze=False, grant_cores=spec.cpu.floor, mode="granted", ticks=0)
    if state.cpu_count is not None:
        cores = len(snapshot.cores)
        per_core = max(len(snapshot.cpus) // max(cores, 1), 1)
        count = state.cpu_count + max(int(step) // per_core * per_core, per_core)
        if count >= len(snapshot.cpus):
            return _opened(state)
        return replace(state, cpu_count=count, mode="granted", ticks=0)
    grant = round((state.grant_cores or 0.0) + step, 4)
    # Slack has been ample at the guard rail for a while: the evidence for a grant is gone, the class alone is enough.
    at_rail = (state.grant_cores or 0.0) >= guard_rail_cores(forecast, spec)
    if grant >= forecast.node_cores or (at_rail and state.ticks >= OPEN_AFTER_TICKS_AT_RAIL):
        return _opened(state)
    grant = min(grant, guard_rail_cores(forecast, spec))
    return replace(state, grant_cores=grant, mode="granted", ticks=state.ticks if at_rail else 0)


def _step(
    state: CpuState,
    seen: Evidence | None,
    snapshot: NodeSnapshot,
    forecast: Forecast,
    spec: PolicySpec,
    calibration: Calibration,
) -> tuple[CpuState, str, str]:
    """The next state, its reason, and the law in today's words."""
    now, replace = snapshot.monotonic_seconds, msgspec.structs.replace
    state = replace(state, ticks=state.ticks + 1)
    if seen is None:
        return _unseen(state, snapshot, forecast, spec)
    bound = spec.cpu.no_growth_below if state.growing else spec.cpu.growth_above
    state = replace(state, growing=seen.slack > bound / 100 and state.mode == "granted")
    violated = seen.slack < 0
    if state.mode == "open":
        return _while_open(state, seen, snapshot, forecast, spec)
    if violated and state.mode in ("trial", "granted"):
        return _to_floor(state, seen, forecast, now, spec), "SlackNegative", f"slack {seen.slack:.0%} ({seen.text})"
    if state.mode == "floor":
        return _at_floor(state, seen, snapshot, forecast, spec, calibration)
    if state.mode == "trial":
        requests = state.requests + seen.new_requests
        state = replace(state, requests=requests)
        enough = seen.kind != "latency" or requests >= spec.cpu.trial_requests
        if state.ticks >= spec.cpu.trial_ticks and enough:
            return replace(state, mode="granted", ticks=0), "TrialHeld", f"slack {seen.slack:.0%} held ({seen.text})"
        return state, "Trial", f"{state.ticks} ticks and {requests} requests so far, slack {seen.slack:.0%}"
    if state.freeze and state.ticks * forecast.interval_seconds > spec.freeze.max_frozen / 2:
        grown = _grown(state, snapshot, forecast, spec)
        return grown, "FrozenLongEnough", "a freeze as a rung ends at half of maxFrozen: back to the floor"
    if state.growing and now >= state.hold_until:
        return _grown(state, snapshot, forecast, spec), "SlackAmple", f"slack {seen.slack:.0%} ({seen.text}): grow"
    return state, "HoldGrant", f"slack {seen.slack:.0%} ({seen.text}): no growth before {spec.cpu.growth_above:g} %"


def _unseen(state: CpuState, snapshot: NodeSnapshot, forecast: Forecast, spec: PolicySpec) -> tuple[CpuState, str, str]:
    """No service can be judged in this tick."""
    now = snapshot.monotonic_seconds
    if state.mode == "open" and now < state.exonerated_until:
        return state, "NotCausedByBatch", f"{state.exonerated} waits as much with batch at its floor"
    if state.mode == "open":
        return state, "NoServices", "no service can be judged: the calibrated class alone protects"
    if now < state.hold_until:
        return state, "HoldDown", "no new requests to judge by; the hold-down stands"
    return _grown(state, snapshot, forecast, spec), "NoRequests", "no service has requests: the grant grows"


def _while_open(
    state: CpuState, seen: Evidence, snapshot: NodeSnapshot, forecast: Forecast, spec: PolicySpec
) -> tuple[CpuState, str, str]:
    replace = msgspec.structs.replace
    idle = forecast.batch_cores < min(2 * spec.cpu.floor, spec.cpu.floor + NOISE_CORES)
    state = replace(state, ticks=state.ticks if idle else 0)
    learnt = idle and state.ticks >= spec.cpu.trial_ticks
    if learnt:
        waits = _waiting_ratios(snapshot, forecast)
        state = _learnt(state, {n: w for n, w in waits.items() if w >= LEAST_OWN_WAITING_RATIO}, snapshot)
    if seen.slack >= 0:
        return state, "SlackEnough", f"slack {seen.slack:.0%} ({seen.text}): no grant is needed"
    if learnt and seen.kind == "waiting":
        return state, "OwnWaiting", f"{seen.text} while batch does not run: its own doing"
    if idle:
        return state, "BatchIdle", f"slack {seen.slack:.0%} ({seen.text}), but batch does not run"
    now = snapshot.monotonic_seconds
    return _to_floor(state, seen, forecast, now, spec), "SlackNegative", f"slack {seen.slack:.0%} ({seen.text})"


def _learnt(state: CpuState, own: Mapping[str, float], snapshot: NodeSnapshot) -> CpuState:
    until = snapshot.monotonic_seconds + OWN_WAITING_SECONDS
    return msgspec.structs.replace(state, own_waiting={n: round(w, 4) for n, w in own.items()}, own_until=until)


def _at_floor(
    state: CpuState,
    seen: Evidence,
    snapshot: NodeSnapshot,
    forecast: Forecast,
    spec: PolicySpec,
    calibration: Calibration,
) -> tuple[CpuState, str, str]:
    now, replace = snapshot.monotonic_seconds, msgspec.structs.replace
    if seen.slack < 0:
        settled = state.ticks >= spec.cpu.trial_ticks
        if seen.kind == "waiting" and settled and seen.waiting_ratio >= NOT_HELPED_RATIO * state.waited_before_ratio:
            seconds = min(max(state.exonerated_seconds * 2, EXONERATION_SECONDS), MAX_EXONERATION_SECONDS)
            freed = CpuState(
                besteffort=state.besteffort,
                own_waiting=state.own_waiting,
                own_until=state.own_until,
                exonerated=seen.service,
                exonerated_until=now + seconds,
                exonerated_seconds=seconds,
            )
            return freed, "NotCausedByBatch", f"{seen.text}, before the floor {state.waited_before_ratio:.1%}"
        if seen.kind == "waiting" and settled:
            state = _learnt(state, {**state.own_waiting, seen.service: seen.waiting_ratio}, snapshot)
            return state, "OwnWaiting", f"{seen.text} with batch at its floor: its own doing"
        return state, "FloorInForce", f"slack {seen.slack:.0%} ({seen.text}) with batch at its floor"
    if state.ticks < spec.cpu.trial_ticks:
        return state, "FloorInForce", f"slack {seen.slack:.0%} ({seen.text}): recovering"
    own = _waiting_ratios(snapshot, forecast).get(state.suspicion)
    if own is not None and state.waited_before_ratio - own <= spec.cpu.pressure / 100:
        learnt = _learnt(_opened(state), {**state.own_waiting, state.suspicion: own}, snapshot)
        added = f"{state.suspicion} waits {own:.1%} with batch at its floor, {state.waited_before_ratio:.1%} before"
        return learnt, "BatchAddsLittle", f"{added}: batch adds less than {spec.cpu.pressure:g} %"
    if state.rung < len(calibration.rungs):
        trial = _start_trial(state, snapshot, forecast, spec, calibration.rungs)
        return trial, "Trial", f"slack {seen.slack:.0%}: trying {calibration.rungs[state.rung]} in place of the floor"
    if now < state.hold_until:
        return state, "HoldDown", f"slack {seen.slack:.0%}; no rung held; floor for {state.hold_until - now:.0f} s more"
    return replace(state, mode="granted", ticks=0), "HoldDownOver", f"slack {seen.slack:.0%}: growing from the floor"


def chosen_cpus(snapshot: NodeSnapshot, count: int | None, allowed: tuple[int, ...] | None) -> tuple[int, ...]:
    """The tier's CPUs: whole cores from the last one down until `count` is reached, within what is allowed."""
    cpus: list[int] = []
    for core in reversed(snapshot.cores):
        if count is None or len(cpus) + len(core) <= max(count, len(core)):
            cpus.extend(core)
    if allowed is not None:
        cpus = [c for c in cpus if c in allowed] or list(allowed)
    return tuple(sorted(cpus))


def _targets(snapshot: NodeSnapshot, forecast: Forecast) -> list[tuple[Workload, float]]:
    """What the grant is for: the tier and each batch workload in place, with its part of the batch use."""
    in_place = [w for w in snapshot.of("batch") if w.in_place]
    used = {w.id: forecast.workloads[w.id].usage_cores or 0.0 for w in in_place}
    rest = max(forecast.batch_cores - sum(used.values()), 0.0)
    total = max(forecast.batch_cores, 1e-9)
    each = 1.0 / (len(in_place) + (snapshot.tier is not None)) if in_place or snapshot.tier else 1.0
    found = [(w, 0.5 * used[w.id] / total + 0.5 * each) for w in in_place]
    if snapshot.tier is not None:
        found.insert(0, (snapshot.tier, 0.5 * rest / total + 0.5 * each if in_place else 1.0))
    return found


def decide_cpu(
    snapshot: NodeSnapshot, forecast: Forecast, spec: PolicySpec, calibration: Calibration, state: CpuState
) -> Decision:
    """The CPU law for one tick."""
    if state.own_waiting:
        asked_anew = snapshot.monotonic_seconds >= state.own_until
        known = {} if asked_anew else _still_own(state.own_waiting, snapshot, forecast)
        state = msgspec.structs.replace(state, own_waiting=known)
    doubted = state.exonerated if snapshot.monotonic_seconds < state.exonerated_until else ""
    seen = worst_service(snapshot, forecast, spec, state.own_waiting, doubted)
    stale = max(snapshot.stale_ticks.get("workloads", 0), snapshot.stale_ticks.get("node", 0))
    if stale >= spec.staleness.open_after:
        state, reason, message = CpuState(), "ReadingsTooOld", f"readings are {stale} ticks old: the tier is left open"
    elif stale >= spec.staleness.stop_tightening_after:
        reason, message = "ReadingsOld", f"readings are {stale} ticks old: nothing is tightened"
    else:
        state, reason, message = _step(state, seen, snapshot, forecast, spec, calibration)
        below = besteffort.step(state.besteffort, snapshot, forecast, spec)
        state = msgspec.structs.replace(state, besteffort=below)
    below = state.besteffort
    grants = {"slack": state.grant_cores, "besteffort": below.grant_cores}
    in_force = {k: v for k, v in grants.items() if v is not None}
    grant = min(in_force.values(), default=None)
    rejected = [
        Rejected(law=LAW, considered=f"grant of {v:g} cores by {k}", why=f"the smaller grant of {grant:g} cores wins")
        for k, v in in_force.items()
        if grant is not None and v > grant
    ]
    if (grant is not None and below.grant_cores == grant and state.grant_cores != grant) or (
        state.mode == "open" and below.mode != "clear"
    ):
        reason, message = below.reason, below.message
    cpus = chosen_cpus(snapshot, state.cpu_count, below.cpus)
    actions = _actions(snapshot, forecast, calibration, grant, cpus, reason, message)
    requests = [
        Request(verb="freeze", workload=w.id, law=LAW, reason=reason, message=message)
        for w in snapshot.of("batch")
        if state.freeze
    ]
    numbers = {
        "node_cores": forecast.node_cores,
        "services_cores": forecast.services_cores,
        "services_peak_cores": forecast.services_peak_cores,
        "system_cores": forecast.system_cores,
        "besteffort_cores": forecast.besteffort_cores,
        "besteffort_waiting_ratio": forecast.besteffort_waiting_ratio,
        "batch_cores": forecast.batch_cores,
        "guard_rail_cores": guard_rail_cores(forecast, spec),
        **({"grant_cores": grant} if grant is not None else {}),
        **({"slack": seen.slack} if seen is not None else {}),
    }
    where = state.mode if grant is None or state.grant_cores == grant else f"{state.mode}+besteffort"
    verdict = Verdict(law=LAW, state=where, reason=reason, message=message, numbers=numbers)
    return Decision(state, actions, verdict, rejected, requests)


def _actions(
    snapshot: NodeSnapshot,
    forecast: Forecast,
    calibration: Calibration,
    grant: float | None,
    cpus: tuple[int, ...],
    reason: str,
    message: str,
) -> list[Action]:
    actions = []
    tier_grant = grant
    for workload, share in _targets(snapshot, forecast):
        if workload.tier == "tier" and grant is not None:
            tier_grant = grant * share
        idle = calibration.lever == "idle" and "cpu.idle" in workload.knobs
        wanted = {} if "cpu.idle" not in workload.knobs else {"cpu.idle": "1" if idle else "0"}
        if not idle:
            wanted["cpu.weight"] = "1"
        wanted["cpu.max"] = cpu_max(None if grant is None else grant * share)
        if "cpuset.cpus" in workload.knobs and not workload.in_place:
            wanted["cpuset.cpus"] = format_cpulist(cpus)
        for knob, value in wanted.items():
            class_knob = knob in ("cpu.idle", "cpu.weight")
            why = "CalibratedClass" if class_knob else reason
            text = f"lever {calibration.lever} of this kernel" if class_knob else message
            actions.append(
                Action(
                    workload=workload.id, path=workload.path, knob=knob, value=value, reason=why, message=text, law=LAW
                )
            )
    return actions + _job_actions(snapshot, tier_grant, cpus)


def _job_actions(snapshot: NodeSnapshot, grant: float | None, cpus: tuple[int, ...]) -> list[Action]:
    """v1 refuses a child's quota above its parent's, and a parent's CPUs less its child's: jobs move with the tier.

    `grant` is the tier's own.
    """
    actions = []
    for job in snapshot.of("batch"):
        wanted = {}
        if job.requested_cores is not None:
            wanted["cpu.max"] = cpu_max(job.requested_cores if grant is None else min(job.requested_cores, grant))
        if job.knobs.get("cpuset.cpus"):  # on v2 an empty one follows the tier by itself
            wanted["cpuset.cpus"] = format_cpulist(cpus)
        for knob, value in () if job.in_place else wanted.items():
            message = "a job has at most what it asked for, within the tier"
            actions.append(
                Action(
                    workload=job.id,
                    path=job.path,
                    knob=knob,
                    value=value,
                    reason="WithinTier",
                    message=message,
                    law=LAW,
                )
            )
    return actions
