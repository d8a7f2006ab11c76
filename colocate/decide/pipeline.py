"""Joins the laws: runs them in order, hands requests on, settles conflicts, drops what is already so, orders the rest.

The order of writing is the kernel's demand: thaw before signals, `cpu.idle` off before a weight, limits widened from
parent to child and then tightened from child to parent, freezing last. Sources: cgroup-v2.rst; the nested rule is
KEP-1287's and koordinator's updater.
"""

from __future__ import annotations

from typing import Any

import msgspec

from colocate.calibration import Calibration
from colocate.decide.allocatable import AllocatableState, decide_allocatable
from colocate.decide.allowance import PowerState, allowance
from colocate.decide.boost import Boosted
from colocate.decide.caps import power_caps
from colocate.decide.cards import CardsState, decide_cards
from colocate.decide.cpu import CpuState, decide_cpu
from colocate.decide.cpu_power import CpuPowerState, ceiling
from colocate.decide.deadlines import Progress
from colocate.decide.elastic import Shifted
from colocate.decide.eviction import EvictionState, decide_eviction, still_leaving
from colocate.decide.freeze import EVALUATE, FreezeState, decide_freeze
from colocate.decide.gangs import GangsState, decide_gangs
from colocate.decide.law import Decision, Law, View, act
from colocate.decide.memory import MemoryState, decide_memory
from colocate.decide.node_budget import Known, budgeted
from colocate.decide.refine import Heard, better, heard
from colocate.decide.unused import Drew, needs, watched
from colocate.errors import StateTooNew, StateTooOld
from colocate.knob import KNOBS, narrowest, place, same, width
from colocate.model.forecast import Forecast
from colocate.plan import Action, Plan, Rejected, Request
from colocate.policy.schema import PolicySpec
from colocate.snapshot import NodeSnapshot, Workload
from colocate.units import cpu_max, format_cpulist

LAWS: tuple[tuple[str, Law], ...] = (
    ("gangs", decide_gangs),
    ("cpu", decide_cpu),
    ("memory", decide_memory),
    ("gpu", decide_cards),
    ("eviction", decide_eviction),
    ("freeze", decide_freeze),
    ("allocatable", decide_allocatable),
)
"""Each with the field of LawState that is its memory, in an order in which requests reach their owner."""
LAWS_VERSION = 6


class LawState(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The memory of all laws, handed in and out."""

    cpu: CpuState = CpuState()
    memory: MemoryState = MemoryState()
    gpu: CardsState = CardsState()
    freeze: FreezeState = FreezeState()
    gangs: GangsState = GangsState()
    eviction: EvictionState = EvictionState()
    allocatable: AllocatableState = AllocatableState()
    power: PowerState = PowerState()
    cpu_power: CpuPowerState = CpuPowerState()
    drew: dict[str, Drew] = {}
    """What the cards drew of late, where a power budget is kept or a forecast followed."""
    progress: dict[str, Progress] = {}
    """Of workloads that have a deadline."""
    shifted: dict[str, Shifted] = {}
    """Of those, whose watts follow a forecast."""
    boosted: dict[str, Boosted] = {}
    """Of jobs that are bound by power."""
    heard: Heard = Heard()
    """What jobs have said of their progress, where models are made better by that."""
    pending: tuple[Request, ...] = ()
    """Evictions that the freeze law asked for in the last tick."""
    version: int = 0
    """Of the laws that wrote it, in a record or a handover; 0 is this program's, for a default is not written."""


def laws_to_builtins(state: LawState) -> Any:
    """For a keyframe or a handover, with the version."""
    return msgspec.to_builtins(msgspec.structs.replace(state, version=LAWS_VERSION))


def laws_from_builtins(data: object, source: str) -> LawState:
    """The state again. Raises StateTooNew or StateTooOld naming `source`, and msgspec.ValidationError."""
    version = data.get("version", 1) if isinstance(data, dict) else 1
    if version != LAWS_VERSION:
        error = StateTooNew if version > LAWS_VERSION else StateTooOld
        raise error(f"{source} has the memory of laws version {version}, this colocate knows version {LAWS_VERSION}")
    return msgspec.structs.replace(msgspec.convert(data, LawState), version=0)


OFF_FROZEN, OFF_UNMANAGED = "off-frozen", "off-unmanaged"
"""Arms of an evaluation in which co-location is off: batch frozen, or at the weight of a service without any limit."""


def order(actions: list[Action], workloads: dict[str, Workload]) -> list[Action]:
    """The same actions in an order in which every intermediate state is allowed by the kernel."""

    def key(action: Action) -> tuple[int, int, str, str]:
        workload = workloads.get(action.workload)
        found = workload.knobs.get(action.knob) if workload is not None else None
        first, depth = place(action.knob, action.value, found, action.path.count("/"))
        return first, depth, action.workload, action.knob

    return sorted(actions, key=key)


def settle(actions: list[Action]) -> tuple[list[Action], list[Rejected]]:
    """One value a knob: where two laws want one, the narrower wins, and the loser is recorded."""
    kept: dict[tuple[object, str], Action] = {}
    rejected = []
    for action in actions:
        key = (action.target, action.knob)
        other = kept.get(key)
        if other is None or KNOBS[action.knob].codec == "act":
            kept[key if other is None else (action.target, f"{action.knob} {len(kept)}")] = action
            continue
        loser = action
        if width(action.knob, action.value) < width(other.knob, other.value):
            kept[key], loser = action, other
        winner = kept[key]
        why = f"{winner.law} wants {winner.value}, which is narrower ({winner.reason})"
        rejected.append(Rejected(law=loser.law, considered=f"{loser.knob} = {loser.value}", why=why))
    return list(kept.values()), rejected


def within_found(action: Action, workload: Workload) -> Action:
    """The same, never wider than what its owner had given batch in place; here once, so that no law can forget it."""
    found = workload.found.get(action.knob)
    if found is None or KNOBS[action.knob].codec == "act" or action.knob == "cgroup.freeze":  # what must end must run
        return action
    return msgspec.structs.replace(action, value=narrowest(action.knob, action.value, found))


def _unmanaged(snapshot: NodeSnapshot, message: str) -> list[Action]:
    """Every law is off: the tier at the weight of a service without a limit, batch in place as its owner had it."""
    actions = []
    opened = {"cpu.idle": "0", "cpu.weight": "100", "cpu.max": cpu_max(None), "memory.high": "max", "memory.max": "max"}
    opened["cpuset.cpus"] = format_cpulist(snapshot.cpus)
    tier = [snapshot.tier] if snapshot.tier is not None else []
    for workload in [*tier, *(w for w in snapshot.of("batch") if w.in_place)]:
        values = workload.found if workload.in_place else opened
        idle = values.get("cpu.idle") == "1"
        for knob, value in values.items():
            if knob in workload.knobs and not (knob == "cpu.weight" and idle):
                actions.append(act(EVALUATE, workload, knob, value, "Evaluation", message))
    for job in snapshot.of("batch"):
        if not job.in_place and job.requested_cores is not None:  # what a job asked for is no rule of ours
            actions.append(act(EVALUATE, job, "cpu.max", cpu_max(job.requested_cores), "Evaluation", message))
        if not job.in_place and job.knobs.get("cpuset.cpus"):
            actions.append(act(EVALUATE, job, "cpuset.cpus", opened["cpuset.cpus"], "Evaluation", message))
    return actions


def decide(
    snapshot: NodeSnapshot,
    forecast: Forecast,
    spec: PolicySpec,
    calibration: Calibration,
    state: LawState,
    arm: str = "",
) -> tuple[LawState, Plan]:
    """The next state of all laws and this tick's plan. `arm` is set while an evaluation runs."""
    now = snapshot.monotonic_seconds
    under_way = state.eviction.under_way
    evicting = frozenset(id_ for id_, e in under_way.items() if still_leaving(snapshot, id_, e, now))
    cpu_power, about_cpus = ceiling(state.cpu_power, snapshot, forecast.batch_cores, spec.power, spec.cpu.floor)
    view = View(snapshot, forecast, spec, calibration, state.pending, evicting, cpu_power.cores)
    message = f"`colocate evaluate` is measuring the arm {arm}"
    if arm == OFF_FROZEN:
        frozen = [
            Request(verb="freeze", workload=w.id, law=EVALUATE, reason="Evaluation", message=message)
            for w in snapshot.of("batch")
        ]
        view = view._replace(requests=(*view.requests, *frozen))
    off = arm in (OFF_FROZEN, OFF_UNMANAGED)
    if off:
        # What a service feels while another's rule is in force says nothing about ours: nothing is learnt from it.
        state = msgspec.structs.replace(state, cpu=msgspec.structs.replace(state.cpu, suspended=True))
    decisions: dict[str, Decision] = {}
    for name, law in LAWS:
        if arm == OFF_UNMANAGED and name in ("cpu", "memory", "gpu"):
            continue
        if name == "gpu" and not snapshot.cards:
            continue
        if name == "gangs" and not (state.gangs.since or any(w.gang_held for w in snapshot.workloads.values())):
            continue
        decisions[name] = law(view, getattr(state, name))
        view = view._replace(requests=(*view.requests, *decisions[name].requests))
    known = dict(snapshot.workloads)
    if snapshot.tier is not None:
        known[snapshot.tier.id] = snapshot.tier
    wanted = [a for d in decisions.values() for a in d.actions]
    if arm == OFF_UNMANAGED:
        wanted += _unmanaged(snapshot, message)
    wanted, rejected = settle([within_found(a, known[a.workload]) for a in wanted])
    pulsed = state.freeze.pulsed  # what was read of their freezers is not what they are now
    actions = [
        a
        for a in wanted
        if (a.knob == "cgroup.freeze" and a.workload in pulsed)
        or not same(a.knob, a.value, known[a.workload].knobs.get(a.knob, "\0"))
    ]
    has_budget = bool(spec.power.budget or snapshot.power_share)
    power = allowance(state.power, snapshot, spec.power)
    drew = watched(state.drew, snapshot) if has_budget or snapshot.power_ahead else {}
    said = heard(state.heard, snapshot, spec.power)
    known_jobs = Known(state.progress, state.shifted, said, state.boosted)
    caps = budgeted(power_caps(snapshot), snapshot, better(spec.power, said), power, needs(drew, now), known_jobs)
    following = msgspec.structs.replace(
        state,
        **{name: d.state for name, d in decisions.items() if not (off and name in ("cpu", "gpu"))},
        cpu_power=cpu_power,
        power=power,
        drew=drew,
        progress=caps.progress,
        shifted=caps.shifted,
        heard=said,
        boosted=caps.boosted,
        pending=tuple(r for r in decisions["freeze"].requests if r.verb == "evict"),
    )
    looks = [d.look_again_seconds for d in decisions.values() if d.look_again_seconds is not None]
    plan = Plan(
        sequence=snapshot.sequence,
        actions=tuple(order(actions, known)),
        verdicts=(
            *(v for d in decisions.values() for v in (d.verdict, *d.also)),
            *caps.capped.verdicts,
            *([about_cpus] if about_cpus is not None else []),
        ),
        rejected=(*rejected, *(r for d in decisions.values() for r in d.rejected)),
        look_again_seconds=min(looks, default=None),
        pulses=dict(decisions["freeze"].pulses),
        suspended=tuple(decisions["freeze"].suspended),
        limits=tuple(limit for d in decisions.values() for limit in d.limits),
        caps=caps.capped.caps,
        power_budget=has_budget,
        power_needs=caps.needs,
    )
    return following, plan
