"""Snapshots and forecasts for tests of the laws: a quiet two-CPU node unless a test says otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from colocate.calibration import Calibration
from colocate.decide.law import View
from colocate.model.forecast import Forecast, WorkloadForecast
from colocate.plan import Request
from colocate.policy.schema import PolicySpec
from colocate.snapshot import NodeSnapshot, Objective, Workload

GIB = 1 << 30
OPEN_KNOBS = {
    "cpu.weight": "1",
    "cpu.idle": "0",
    "cpu.max": "max 100000",
    "cpuset.cpus": "0-1",
    "memory.high": "max",
    "cgroup.freeze": "0",
}


def tier(**changes: Any) -> Workload:
    known: dict[str, Any] = {"memory_bytes": GIB // 4, "working_set_bytes": GIB // 4, "knobs": OPEN_KNOBS}
    return Workload(id="tier", name="tier", tier="tier", path="/batch", inodes={"unified": 9}, **{**known, **changes})


def service(name: str = "web", **changes: Any) -> Workload:
    return Workload(id=f"service:{name}", name=name, tier="service", path=f"/{name}", inodes={"unified": 5}, **changes)


def job(name: str = "train", **changes: Any) -> Workload:
    known: dict[str, Any] = {
        "knobs": OPEN_KNOBS,
        "processes": 1,
        "working_set_bytes": GIB // 4,
        "inodes": {"unified": 11},
        "path": f"/batch/{name}",
    }
    return Workload(id=f"job:{name}", name=name, tier="batch", **{**known, **changes})


def besteffort(**changes: Any) -> Workload:
    return Workload(
        id="besteffort", name="besteffort", tier="besteffort", path="/kubepods/besteffort", inodes={}, **changes
    )


def snapshot(*workloads: Workload, at: float = 100.0, **changes: Any) -> NodeSnapshot:
    known: dict[str, Any] = {
        "sequence": 1,
        "time_seconds": 1_700_000_000.0 + at,
        "monotonic_seconds": at,
        "cgroup_version": 2,
        "cpus": (0, 1),
        "cores": ((0,), (1,)),
        "memory_bytes": 2 * GIB,
        "memory_available_bytes": GIB,
        "tier": tier(),
        "workloads": {w.id: w for w in workloads},
        "capabilities": ("psi", "freeze", "kill", "memory.high", "memory.reclaim", "cpuset"),
    }
    return NodeSnapshot(**{**known, **changes})


def forecast(workloads: dict[str, WorkloadForecast] | None = None, **changes: Any) -> Forecast:
    known: dict[str, Any] = {
        "interval_seconds": 1.0,
        "workloads": workloads or {},
        "node_cores": 2.0,
        "services_cores": 0.5,
        "services_peak_cores": 0.7,
        "batch_cores": 1.2,
        "system_cores": 0.1,
        "idle_cores": 0.2,
    }
    return Forecast(**{**known, **changes})


def view(
    now: NodeSnapshot,
    seen: Forecast | None = None,
    *,
    spec: PolicySpec | None = None,
    calibration: Calibration | None = None,
    requests: Sequence[Request] = (),
    evicting: Iterable[str] = (),
) -> View:
    return View(
        now,
        seen if seen is not None else forecast({i: WorkloadForecast() for i in now.workloads}),
        spec or SPEC,
        calibration or Calibration(),
        tuple(requests),
        frozenset(evicting),
    )


OBJECTIVE = Objective(0.02)
SPEC = PolicySpec()
