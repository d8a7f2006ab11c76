"""The CPU law: the calibrated class first; a grant only while batch is asked, or was found to harm.

Owns cpu.weight, cpu.idle, cpu.max and cpuset.cpus of the tier and of batch governed in place. What it remembers and
when it changes is `attribution`'s: this file says what that law is told, and what follows from its answer. BestEffort
is one more subject, whose CPU batch may not take. Batch in place never gets more than its owner gave.
designs/0001-cpu.md.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from colocate.calibration import Calibration
from colocate.decide import attribution as pulse
from colocate.decide import evidence
from colocate.decide.law import Decision, View, act
from colocate.knob import narrowest
from colocate.model.forecast import Forecast, WorkloadForecast
from colocate.plan import Action, Rejected, Verdict
from colocate.policy.schema import PolicySpec
from colocate.snapshot import NodeSnapshot, Workload
from colocate.units import cores_of_cpu_max, cpu_max, format_cpulist

LAW = "cpu"
LOOK_AGAIN_SECONDS = 0.5
"""While batch is tried beside a service that may be harmed."""
MODES = ("open", "asking, at the floor", "asking, open", "held", "trying more", "yielding")
REASONS = {
    pulse.NOTHING_SUFFERS: "NothingSuffers",
    pulse.BATCH_IDLE: "NotCausedByBatch",
    pulse.NOT_CAUSED: "NotCausedByBatch",
    pulse.ASKED_NOW: "BatchAsked",
    pulse.CAUSED: "CausedByBatch",
    pulse.TRYING_MORE: "TryingMore",
    pulse.SIGNAL_LOST: "SignalLost",
    pulse.BURSTS: "YieldsToBurst",
}
WAITING, LONG_WAITS, LATENCY, DISPLACED = "waiting", "long waits", "latency", "displaced"
_KINDS = {
    WAITING: evidence.WAITING,
    LONG_WAITS: evidence.WAITING,
    LATENCY: evidence.LATENCY,
    DISPLACED: evidence.DISPLACED,
}
UNKNOWN_SECONDS = 2.0
"""A service whose waits were told apart so lately is judged by the long ones; in between nothing is known of them."""


class CpuState(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What the law remembers: the rows of `attribution`, and the CPUs that BestEffort or a service leaves idle."""

    node: tuple[float, ...] = ()
    subjects: dict[str, tuple[float, ...]] = {}
    """`workload id/kind` -> its row."""
    cpus: tuple[int, ...] | None = None
    suspended: bool = False
    """Another's rule was in force in the last tick."""

    @property
    def confined_to(self) -> tuple[int, ...] | None:
        """The CPUs to which batch is kept just now."""
        return self.cpus if self.node and self.node[pulse.ELSEWHERE] > 0.0 else None

    @property
    def mode(self) -> str:
        """Where the law is, in words."""
        return MODES[int(self.node[pulse.MODE])] if self.node else MODES[0]

    @property
    def narrows(self) -> bool:
        """Whether batch is kept to less than it could take: asked at the floor, held, or tried with more."""
        return self.mode not in (MODES[0], MODES[2])

    @property
    def grant_cores(self) -> float | None:
        """The cores that are granted; None: no quota."""
        return None if not self.node or self.node[pulse.GRANT] == pulse.UNLIMITED else self.node[pulse.GRANT]


class Subject(NamedTuple):
    """Somebody whose suffering counts: a service, or BestEffort."""

    key: str
    workload: Workload
    now: WorkloadForecast
    kind: str

    @property
    def seen(self) -> list[float]:
        """What `attribution` is told of it."""
        now, row = self.now, [0.0] * evidence.SUBJECT_INPUTS
        row[evidence.KIND], row[evidence.SEEN_AT], row[evidence.SEEN_WAITED] = (
            _KINDS[self.kind],
            now.at_seconds,
            now.waited_seconds,
        )
        row[evidence.SEEN_T], row[evidence.SEEN_N] = now.waited_seconds, now.at_seconds
        if self.kind == LATENCY:
            row[evidence.SEEN_AT], row[evidence.SEEN_T] = now.latency_at_seconds, now.over_requests
            row[evidence.SEEN_N], row[evidence.SILENT] = now.requests, float(now.silent)
        elif self.kind == DISPLACED:
            row[evidence.SEEN_T] = -now.used_seconds
        elif self.kind == LONG_WAITS:
            row[evidence.SEEN_AT] = now.looked_at_last
            row[evidence.SEEN_T], row[evidence.SEEN_N] = now.long_waits_seconds, now.looked_at_seconds
        return row

    def feels(self) -> str:
        """What it feels now, in words."""
        name, now, objective = self.workload.name, self.now, self.workload.objective
        if self.kind == LATENCY and objective is not None:
            target = objective.p99_seconds * 1e3
            p99 = f"p99 {now.p99_seconds * 1e3:.2f} ms" if now.p99_seconds is not None else "too few requests for a p99"
            return f"{name}: {p99}, target {target:.2f} ms"
        felt, every = now.cpu_waiting_ratio or 0.0, now.cpu_pressure_ratio or 0.0
        return f"{name} waits for a CPU {felt:.1%} of the time" + (
            f" in waits long enough to be felt, {every:.1%} with shorter ones" if every > felt else ""
        )


def subjects_of(snapshot: NodeSnapshot, forecast: Forecast) -> list[Subject]:
    """Everybody whose suffering counts: by latency where a service has it, else (or while it is silent) by waiting.

    Of one that shares a card with batch, latency is what the law of the card goes by: batch without CPU launches
    nothing either, so that here it would seem to be the CPU's.
    """
    found = []
    for workload in snapshot.of("service"):
        now = forecast.workloads[workload.id]
        latency = workload.objective is not None and workload.latency is not None
        latency = latency and workload.id not in snapshot.beside_batch_on_cards
        if latency:
            found.append(Subject(f"{workload.id}/{LATENCY}", workload, now, LATENCY))
        if not latency or now.silent:
            apart = now.looked_at_last > 0.0 and 0.0 <= now.at_seconds - now.looked_at_last <= UNKNOWN_SECONDS
            kind = LONG_WAITS if apart else WAITING  # two subjects: what is felt has another unit
            found.append(Subject(f"{workload.id}/{kind}", workload, now, kind))
    return found + [
        Subject(f"{w.id}/{DISPLACED}", w, forecast.workloads[w.id], DISPLACED) for w in snapshot.of("besteffort")
    ]


def guard_rail_cores(forecast: Forecast, spec: PolicySpec) -> float:
    """node - services' forecast peak - system - reserve: what no grant may exceed; never below the floor."""
    reserve = forecast.node_cores * spec.cpu.reserve / 100
    left = forecast.node_cores - forecast.services_peak_cores - forecast.system_cores - reserve
    return round(max(left, spec.cpu.floor), 4)


def shared_cpus(snapshot: NodeSnapshot) -> tuple[int, ...]:
    """The CPUs that batch may be sent to: all but those that belong to one workload alone."""
    return tuple(c for c in snapshot.cpus if c not in snapshot.reserved_cpus) or snapshot.cpus


def chosen_cpus(snapshot: NodeSnapshot, count: int) -> tuple[int, ...]:
    """Whole cores from the last one down until `count` CPUs are reached, of those that batch may be sent to."""
    allowed, cpus = shared_cpus(snapshot), list[int]()
    for core in reversed(snapshot.cores):
        usable = [c for c in core if c in allowed]
        if usable and len(cpus) + len(usable) <= max(count, len(usable)):
            cpus.extend(usable)
    return tuple(sorted(cpus)) or allowed


def _governed(snapshot: NodeSnapshot) -> list[Workload]:
    """What a grant is for: the tier, and batch in place that has a CPU controller."""
    in_place = [w for w in snapshot.of("batch") if w.in_place and "cpu.max" in w.knobs]
    return [*((snapshot.tier,) if snapshot.tier is not None else ()), *in_place]


def _targets(snapshot: NodeSnapshot, forecast: Forecast) -> list[tuple[Workload, float]]:
    """Each with its part of the grant: half by what it uses, half the same for each."""
    governed = _governed(snapshot)
    if len(governed) < 2:
        return [(w, 1.0) for w in governed]
    in_place = {w.id: forecast.workloads[w.id].usage_cores or 0.0 for w in governed if w.in_place}
    used = {**in_place, "tier": max(forecast.batch_cores - sum(in_place.values()), 0.0)}
    total = max(sum(used.get(w.id, 0.0) for w in governed), 1e-9)
    return [(w, round(0.5 * used.get(w.id, 0.0) / total + 0.5 / len(governed), 6)) for w in governed]


def can_confine(snapshot: NodeSnapshot) -> bool:
    """Whether all batch work can be kept to chosen CPUs.

    v1 refuses a cpuset less than a child's, and every container that a runtime made below batch in place has one.
    """
    v1 = snapshot.cgroup_version == 1
    return all("cpuset.cpus" in w.knobs and not (v1 and w.in_place) for w in _governed(snapshot))


def _in_force(snapshot: NodeSnapshot, forecast: Forecast, floor: float) -> bool:
    """Whether the floor was read back wherever batch still uses more than it: only then does an answer count."""
    for workload in _governed(snapshot):
        held = cores_of_cpu_max(workload.knobs.get("cpu.max", "max"))
        used = forecast.batch_cores if workload.tier == "tier" else forecast.workloads[workload.id].usage_cores or 0.0
        if (held is None or held > floor + 1e-6) and used > floor + pulse.NOISE_CORES:
            return False
    return True


def _step(
    view: View, state: CpuState, subjects: list[Subject]
) -> tuple[CpuState, list[list[float]], int, Subject | None]:
    """One look of `attribution`: the next state, the subjects' rows, the reason, and whom to name."""
    snapshot, forecast, spec = view.snapshot, view.forecast, view.spec
    node = list(state.node) or [0.0] * pulse.NODE_STATE
    if not state.node:
        pulse.new_node(node, spec.cpu.hold_down)
    rows, seen = [], [s.seen for s in subjects]
    for subject, now in zip(subjects, seen, strict=True):
        row = list(state.subjects.get(subject.key, ())) or [0.0] * evidence.SUBJECT_STATE
        if subject.key not in state.subjects:
            window = subject.workload.objective.window_seconds if subject.workload.objective else evidence.NEAR_SECONDS
            evidence.new_subject(row, now, window)
        rows.append(row)
    idle = [c for c in forecast.idle_cpus if c in shared_cpus(snapshot)]
    inputs = [0.0] * evidence.NODE_INPUTS
    inputs[evidence.NOW], inputs[evidence.BATCH_CORES] = view.now, forecast.batch_cores
    inputs[evidence.IN_FORCE] = float(_in_force(snapshot, forecast, spec.cpu.floor))
    inputs[evidence.RAIL_CORES], inputs[evidence.NODE_CORES] = (
        guard_rail_cores(forecast, spec),
        forecast.node_cores,
    )
    some = 0 < len(idle) < len(snapshot.cpus)
    inputs[evidence.IDLE_CPUS] = float(len(idle) if some and can_confine(snapshot) else 0)
    inputs[evidence.FLOOR_CORES], inputs[evidence.QUESTION_SECONDS] = spec.cpu.floor, spec.cpu.question
    inputs[evidence.HOLD_SECONDS], inputs[evidence.PRESSURE_RATIO] = spec.cpu.hold_down, spec.cpu.pressure / 100
    inputs[evidence.BESTEFFORT_RATIO] = spec.cpu.best_effort_waits / 100
    if state.suspended:
        pulse.resume(node, rows, seen)
    reason, who = pulse.step(node, rows, seen, inputs)
    cpus = None if node[pulse.ELSEWHERE] == 0.0 else state.cpus or tuple(idle)
    kept = {s.key: tuple(row) for s, row in zip(subjects, rows, strict=True)}
    following = CpuState(node=tuple(node), subjects=kept, cpus=cpus)
    return following, rows, reason, subjects[who] if who >= 0 else None


def decide_cpu(view: View, state: CpuState) -> Decision:
    """The CPU law for one tick."""
    snapshot, forecast, spec = view.snapshot, view.forecast, view.spec
    stale = view.stale("workloads", "node", "tier")
    look_again = None
    if stale >= spec.staleness.stop_tightening_after:
        left_open = stale >= spec.staleness.open_after
        state = CpuState() if left_open else state
        reason = "ReadingsOld"
        message = f"readings are {stale:.0f} s old: " + (
            "the tier is left open" if left_open else "nothing is tightened"
        )
        numbers: dict[str, float] = {}
    else:
        subjects = subjects_of(snapshot, forecast)
        state, rows, code, subject = _step(view, state, subjects)
        row = rows[subjects.index(subject)] if subject is not None else []
        reason = REASONS[code]
        message = _message(view, state, code, subject, row)
        numbers = _of_subject(row)
        look_again = _look_again(state, view.now)
    limits, rejected = _limits(view, state)
    numbers |= {
        "node_cores": forecast.node_cores,
        "services_cores": forecast.services_cores,
        "services_peak_cores": forecast.services_peak_cores,
        "system_cores": forecast.system_cores,
        "besteffort_cores": forecast.besteffort_cores,
        "besteffort_waiting_ratio": forecast.besteffort_waiting_ratio,
        "batch_cores": forecast.batch_cores,
        "guard_rail_cores": guard_rail_cores(forecast, spec),
    }
    if state.grant_cores is not None:
        numbers["grant_cores"] = state.grant_cores
    actions = _actions(view, limits, reason, message)
    verdict = Verdict(law=LAW, state=state.mode, reason=reason, message=message, numbers=numbers)
    return Decision(state, actions, verdict, rejected, [], look_again)


def _look_again(state: CpuState, now: float) -> float | None:
    """At the end of a phase, and twice a second while batch runs beside a service that it may harm."""
    mode = state.node[pulse.MODE]
    if mode == pulse.OPEN:
        return None
    left = state.node[pulse.UNTIL] - now
    ends = left if left > 0.05 else LOOK_AGAIN_SECONDS
    marked = state.node[pulse.MARK] - now
    if mode in (pulse.ASKING_ON, pulse.TRYING):
        return min(ends, LOOK_AGAIN_SECONDS)
    return min(ends, marked) if marked > 0.05 else ends


def _of_subject(row: list[float]) -> dict[str, float]:
    """The numbers of the answer, for explain and the records."""
    if not row:
        return {}
    return {
        "level": round(row[evidence.LEVEL], 4),
        "off": round(row[evidence.OFF_SUM] / max(row[evidence.OFF], 1.0), 4),
        "on": round(row[evidence.ON_SUM] / max(row[evidence.ON], 1.0), 4),
        "added": round(row[evidence.ADDED], 4),
        "certainty": round(row[evidence.CERTAINTY], 3),
        "questions": row[evidence.ON] + row[evidence.OFF],
    }


def _share(kind: str, value: float) -> str:
    if kind == DISPLACED:
        return f"{abs(value):.2f} cores"
    return f"{value:.1%} of its requests" if kind == LATENCY else f"{value:.1%} of the time"


def _answer(subject: Subject, row: list[float]) -> str:
    """What was found, in words."""
    if row[evidence.ON] < 1.0 or row[evidence.OFF] < 1.0:
        return ""
    without, beside = row[evidence.OFF_SUM] / row[evidence.OFF], row[evidence.ON_SUM] / row[evidence.ON]
    verb = {WAITING: "waits", LONG_WAITS: "waits long", LATENCY: "is late with", DISPLACED: "gets"}[subject.kind]
    alone, both = _share(subject.kind, without), _share(subject.kind, beside)
    return f"{subject.workload.name} {verb} {alone} without batch and {both} beside it"


def _others(forecast: Forecast) -> str:
    """Who else it may be, in words."""
    if forecast.stranger_cores < pulse.NOISE_CORES:
        return ""
    return f"; {forecast.stranger} uses {forecast.stranger_cores:.2f} cores, and is neither a service nor batch"


def _message(view: View, state: CpuState, code: int, subject: Subject | None, row: list[float]) -> str:
    """What, why, and what would change it."""
    spec, forecast = view.spec, view.forecast
    if subject is None:
        if code == pulse.NOTHING_SUFFERS:
            services = len(view.snapshot.of("service"))
            return (
                f"none of {services} service(s) suffers: no limit"
                if services
                else "no service: the class alone protects"
            )
        if code == pulse.BURSTS:
            left = max(state.node[pulse.UNTIL] - view.now, 0.0)
            return f"a service was in a burst of its own: batch stays at its floor for {left:.0f} s more"
        return f"{MODES[int(state.node[pulse.MODE])]}: nobody suffers any more"
    feels, left = subject.feels(), max(state.node[pulse.UNTIL] - view.now, 0.0)
    if code == pulse.SIGNAL_LOST:
        name = subject.workload.name
        return f"{name} has not answered since it was past its target or asked about: batch stays at its floor"
    if code == pulse.BURSTS:
        if not _in_force(view.snapshot, forecast, spec.cpu.floor):
            return f"{feels}, a burst of its own; batch was to add nothing to that, but the floor is not in force"
        patience = f"for {state.node[pulse.PATIENCE]:.0f} s at most"
        return f"{feels} by its own doing: batch adds nothing to that until it is over, {patience}"
    if code == pulse.BATCH_IDLE:
        return f"{feels}, but batch hardly runs ({forecast.batch_cores:.2f} cores)" + _others(forecast)
    if code == pulse.NOT_CAUSED and not _in_force(view.snapshot, forecast, spec.cpu.floor) and not row[evidence.ON]:
        return f"{feels}; the floor did not come into force, so nobody can tell whether it is batch: no limit"
    if code == pulse.NOT_CAUSED:
        answer = _answer(subject, row) or f"{subject.workload.name} was not helped by less batch"
        return f"{feels}: not batch's doing ({answer}){_others(forecast)}"
    if code == pulse.ASKED_NOW:
        where = "at its floor" if state.node[pulse.MODE] == pulse.ASKING_OFF else "open again"
        text = f"{feels}; is it batch? It is {where} to find out"
        if state.node[pulse.MODE] == pulse.ASKING_OFF and not _in_force(view.snapshot, forecast, spec.cpu.floor):
            text += ", but the floor is not in force yet"
        answer = _answer(subject, row)
        return f"{text} ({answer} so far)" if answer else text
    answer = _answer(subject, row) or feels
    grant = f"{state.grant_cores:g} cores" if state.grant_cores is not None else "the CPUs that are idle"
    if code == pulse.TRYING_MORE:
        what = "no limit" if state.grant_cores is None and state.confined_to is None else grant
        return f"{answer}; {what} is tried for {left:.1f} s"
    return f"{answer}: batch keeps {grant}, more is tried in {left:.0f} s"


class Limits(NamedTuple):
    """What the grant means for this host: a quota, or a set of CPUs, or neither."""

    cores: float | None
    cpus: tuple[int, ...]


def _limits(view: View, state: CpuState) -> tuple[Limits, list[Rejected]]:
    """The grant, within what the CPUs' power budget leaves to batch."""
    limits, rejected = _granted(view, state)
    most = view.batch_ceiling
    if most is None or most >= min(limits.cores or len(limits.cpus), len(limits.cpus)):
        return limits, rejected
    return limits._replace(cores=most), rejected


def _granted(view: View, state: CpuState) -> tuple[Limits, list[Rejected]]:
    """The grant as a cpuset where it is whole cores and every target can be confined, else as a quota."""
    snapshot, grant = view.snapshot, state.grant_cores
    everywhere = shared_cpus(snapshot)
    if state.confined_to is not None:  # an exclusive pod may have come since
        return Limits(None, tuple(c for c in state.confined_to if c in everywhere) or everywhere), []
    if grant is None:
        return Limits(None, everywhere), []
    rungs = [r for r in view.calibration.rungs if r != "freeze"]
    if grant >= 1.0 and grant > view.spec.cpu.floor and rungs[:1] == ["cpuset"]:
        if can_confine(snapshot):
            return Limits(None, chosen_cpus(snapshot, int(grant))), []
        why = "batch in place has no cpuset of its own"
        return Limits(grant, everywhere), [Rejected(law=LAW, considered=f"a cpuset of {int(grant)}", why=why)]
    return Limits(grant, everywhere), []


def _actions(view: View, limits: Limits, reason: str, message: str) -> list[Action]:
    snapshot, calibration = view.snapshot, view.calibration
    actions, tier_cores = [], limits.cores
    confined = limits.cpus != snapshot.cpus
    for workload, share in _targets(snapshot, view.forecast):
        cores = None if limits.cores is None else limits.cores * share
        if workload.tier == "tier":
            tier_cores = cores
        for knob, value in _wanted(workload, cores, limits.cpus, confined, calibration).items():
            of_class = knob in ("cpu.idle", "cpu.weight")
            why = "CalibratedClass" if of_class else reason
            text = f"lever {calibration.lever} of this kernel" if of_class else message
            actions.append(act(LAW, workload, knob, value, why, text))
    return actions + _job_actions(snapshot, tier_cores, limits.cpus)


def _wanted(
    workload: Workload, cores: float | None, cpus: tuple[int, ...], confined: bool, calibration: Calibration
) -> dict[str, str]:
    """The values of one target's knobs, never wider than what its owner gave."""
    wanted = {"cpu.max": cpu_max(cores)}
    if "cpu.idle" in workload.knobs:
        wanted["cpu.idle"] = "1" if calibration.lever == "idle" else "0"
    wanted["cpu.weight"] = "1"
    if "cpuset.cpus" in workload.knobs:
        wanted["cpuset.cpus"] = format_cpulist(cpus)
    for knob, found in workload.found.items():
        if knob in wanted:
            wanted[knob] = narrowest(knob, wanted[knob], found)
    if workload.in_place and not confined:  # nothing of ours: as its owner had it
        wanted.pop("cpuset.cpus", None)
        if "cpuset.cpus" in workload.found:
            wanted["cpuset.cpus"] = workload.found["cpuset.cpus"]
    if wanted.get("cpu.idle") == "1":
        del wanted["cpu.weight"]  # the kernel refuses a weight for an idle group
    return wanted


def _job_actions(snapshot: NodeSnapshot, cores: float | None, cpus: tuple[int, ...]) -> list[Action]:
    """v1 refuses a child's quota above its parent's, and a parent's CPUs less its child's: jobs move with the tier.

    `cores` are the tier's own.
    """
    actions = []
    for job in snapshot.of("batch"):
        if job.in_place:
            continue
        wanted = {}
        if job.requested_cores is not None:
            wanted["cpu.max"] = cpu_max(job.requested_cores if cores is None else min(job.requested_cores, cores))
        if job.knobs.get("cpuset.cpus"):  # on v2 an empty one follows the tier by itself
            wanted["cpuset.cpus"] = format_cpulist(cpus)
        for knob, value in wanted.items():
            message = "a job has at most what it asked for, within the tier"
            actions.append(act(LAW, job, knob, value, "WithinTier", message))
        if job.weight is not None:
            message = "batch pods share what there is by what they request"
            actions.append(act(LAW, job, "cpu.weight", str(job.weight), "Requested", message))
    return actions
