"""Joins the laws: runs them in order, hands requests on, drops what is already so, and orders what is left.

The order of writing is the kernel's demand: thaw before signals, `cpu.idle` off before a weight, limits widened from
parent to child and then tightened from child to parent, freezing last. Sources: cgroup-v2.rst; the nested rule is
KEP-1287's and koordinator's updater.
"""

from __future__ import annotations

import msgspec

from colocate.config import Calibration, PolicySpec
from colocate.decide.cpu import CpuState, decide_cpu
from colocate.decide.eviction import EvictionState, decide_eviction
from colocate.decide.freeze import EVALUATE, FreezeState, decide_freeze
from colocate.decide.memory import MemoryState, decide_memory
from colocate.model.forecast import Forecast
from colocate.plan import Action, Plan, Request
from colocate.snapshot import NodeSnapshot, Workload
from colocate.units import cores_of_cpu_max, cpu_max, format_cpulist, parse_cpulist

_ONCE = ("signal", "cgroup.kill", "memory.reclaim")


class LawState(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The memory of all laws, handed in and out."""

    cpu: CpuState = CpuState()
    memory: MemoryState = MemoryState()
    freeze: FreezeState = FreezeState()
    eviction: EvictionState = EvictionState()
    pending: tuple[Request, ...] = ()
    """Evictions that the freeze law asked for in the last tick."""


def already(knob: str, wanted: str, found: str | None) -> bool:
    """Whether the value on disk means what is wanted."""
    if found is None or knob in _ONCE:
        return False
    if knob == "cpuset.cpus":
        return parse_cpulist(found) == parse_cpulist(wanted)
    if knob == "cpu.max":
        return cores_of_cpu_max(found) == cores_of_cpu_max(wanted)
    return found == wanted


def _size(knob: str, value: str) -> float:
    """How wide a limit is; larger is wider."""
    if knob == "cpuset.cpus":
        return float(len(parse_cpulist(value)))
    if value.startswith("max"):
        return float("inf")
    if knob == "cpu.max":
        return cores_of_cpu_max(value) or 0.0
    return float(value)


def order(actions: list[Action], workloads: dict[str, Workload]) -> list[Action]:
    """The same actions in an order in which every intermediate state is allowed by the kernel."""

    def key(action: Action) -> tuple[int, int, str, str]:
        depth = action.path.count("/")
        knob, value = action.knob, action.value
        place = {"signal": 1, "memory.reclaim": 7, "cgroup.kill": 9}.get(knob, 4)
        if knob == "cgroup.freeze":
            place = 0 if value == "0" else 8
        elif knob == "cpu.idle":
            place = 2 if value == "0" else 5
        elif knob == "cpu.weight":
            place = 3
        elif place == 4:
            found = workloads[action.workload].knobs.get(knob) if action.workload in workloads else None
            tightens = found is None or _size(knob, value) < _size(knob, found)
            place, depth = (6, -depth) if tightens else (4, depth)
        return place, depth, action.workload, knob

    return sorted(actions, key=key)


OFF_FROZEN, OFF_UNMANAGED = "off-frozen", "off-unmanaged"
"""Arms of an evaluation in which co-location is off: batch frozen, or at the weight of a service without any limit."""


def _evaluation(arm: str, snapshot: NodeSnapshot, actions: list[Action]) -> tuple[list[Action], list[Request]]:
    """What an evaluation's off arm makes of the CPU law's actions."""
    message = f"`colocate evaluate` is measuring the arm {arm}"
    if arm == OFF_FROZEN:
        return actions, [
            Request(verb="freeze", workload=w.id, law=EVALUATE, reason="Evaluation", message=message)
            for w in snapshot.of("batch")
        ]
    if arm == OFF_UNMANAGED:
        everywhere = format_cpulist(snapshot.cpus)
        open_values = {"cpu.weight": "100", "cpu.idle": "0", "cpu.max": cpu_max(None), "cpuset.cpus": everywhere}

        def value(action: Action) -> str:
            job = snapshot.workloads.get(action.workload)
            if action.knob == "cpu.max" and job is not None and job.requested_cores is not None:
                return cpu_max(job.requested_cores)  # what a job asked for is no rule of ours
            return open_values[action.knob]

        return [
            msgspec.structs.replace(a, value=value(a), reason="Evaluation", message=message)
            for a in actions
            if a.knob in open_values
        ], []
    return actions, []


def decide(
    snapshot: NodeSnapshot,
    forecast: Forecast,
    spec: PolicySpec,
    calibration: Calibration,
    state: LawState,
    arm: str = "",
) -> tuple[LawState, Plan]:
    """The next state of all laws and this tick's plan. `arm` is set while an evaluation runs."""
    replace = msgspec.structs.replace
    cpu = decide_cpu(snapshot, forecast, spec, calibration, state.cpu)
    memory = decide_memory(snapshot, forecast, spec, state.memory)
    cpu_actions, evaluation = _evaluation(arm, snapshot, cpu.actions)
    unmanaged = arm == OFF_UNMANAGED
    wishes = [*state.pending, *(() if unmanaged else cpu.requests), *memory.requests, *evaluation]
    eviction = decide_eviction(snapshot, spec, wishes, state.eviction)
    freeze = decide_freeze(snapshot, spec, [*wishes, *eviction.requests], state.freeze)
    known = dict(snapshot.workloads)
    if snapshot.tier is not None:
        known[snapshot.tier.id] = snapshot.tier
    actions = [
        a
        for a in (*cpu_actions, *memory.actions, *eviction.actions, *freeze.actions)
        if not already(a.knob, a.value, known[a.workload].knobs.get(a.knob))
    ]
    # What a service feels while another's rule is in force says nothing about ours: nothing is learnt from it.
    law_of_cpu = cpu.state
    if unmanaged:  # `ticks` too: where the tier is then says nothing of where it was sent
        law_of_cpu = replace(state.cpu, besteffort=replace(state.cpu.besteffort, ticks=0))
    following = LawState(
        cpu=law_of_cpu,
        memory=memory.state,
        freeze=freeze.state,
        eviction=eviction.state,
        pending=tuple(freeze.requests),
    )
    plan = Plan(
        sequence=snapshot.sequence,
        actions=tuple(order(actions, known)),
        verdicts=(cpu.verdict, memory.verdict, eviction.verdict, freeze.verdict),
        rejected=(*cpu.rejected, *memory.rejected, *eviction.rejected, *freeze.rejected),
    )
    return following, plan
