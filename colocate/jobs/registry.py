"""What the agent knows of the jobs in the tier, kept in the state directory so that a successor knows it too."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from colocate.actuate.statedir import StateDirectory
from colocate.plan import Plan
from colocate.units import MOST_BYTES, MOST_CORES

FILE = "jobs.json"


class Wanted(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What `colocate run` asks for."""

    name: str = ""
    command: str = ""
    cores: Annotated[float, msgspec.Meta(gt=0, le=MOST_CORES)] | None = None
    memory_bytes: Annotated[int, msgspec.Meta(gt=0, le=MOST_BYTES)] | None = None
    priority: int = 0
    gang: str = ""
    checkpoint_signal: str = ""
    max_runtime_seconds: float | None = None


class Job(Wanted, kw_only=True, omit_defaults=True):
    """One job in the tier."""

    path: str
    uid: int
    pid: int
    start_time: int
    started_seconds: float
    """Monotonic, like all times of a job: any agent of this boot reads it right, whatever happens to the clock."""
    checkpointed_seconds: float | None = None
    evicted: str = ""
    """Why, once it was told to go."""


class Registry:
    """The jobs by name."""

    def __init__(self, state: StateDirectory | None) -> None:
        self._state = state
        self.jobs: dict[str, Job] = {}
        data = state.load(FILE) if state is not None else None
        if state is not None and data is not None:
            try:
                self.jobs = {j.name: j for j in msgspec.convert(data.get("jobs"), list[Job])}
            except msgspec.ValidationError:
                state.set_aside(FILE)

    def save(self) -> None:
        """Write the jobs down."""
        if self._state is not None:
            self._state.save(FILE, {"jobs": msgspec.to_builtins(list(self.jobs.values()))})

    def add(self, job: Job) -> None:
        """A new job."""
        self.jobs[job.name] = job
        self.save()

    def remove(self, name: str) -> None:
        """The job has ended."""
        if self.jobs.pop(name, None) is not None:
            self.save()

    def known(self) -> dict[str, dict[str, Any]]:
        """What the observer adds to the workloads of the tier."""
        return {
            name: {
                "priority": job.priority,
                "gang": job.gang,
                "checkpoint_signal": job.checkpoint_signal,
                "started_seconds": job.started_seconds,
                "checkpointed_seconds": job.checkpointed_seconds,
                "requested_cores": job.cores,
                "max_runtime_seconds": job.max_runtime_seconds,
            }
            for name, job in self.jobs.items()
        }

    def note(self, plan: Plan, monotonic_seconds: float) -> list[Job]:
        """Mark what a plan does to jobs; those newly evicted are returned. A sent checkpoint signal counts as one."""
        evicted = []
        for action in plan.actions:
            job = self.jobs.get(action.workload.removeprefix("job:"))
            if job is None:
                continue
            if action.knob == "signal" and action.reason == "CheckpointSignal":
                job.checkpointed_seconds = monotonic_seconds
            elif action.knob in ("signal", "cgroup.kill") and not job.evicted:
                job.evicted = f"{action.reason}: {action.message}"
                evicted.append(job)
        if evicted:
            self.save()
        return evicted
