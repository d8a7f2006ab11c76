"""What the agent knows of the jobs in the tier, kept in the state directory so that a successor knows it too."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import msgspec

from colocate.actuate.statedir import StateDirectory
from colocate.plan import Outcome, Plan
from colocate.snapshot import NodeSnapshot, Workload
from colocate.units import MOST_BYTES, MOST_CORES, MOST_SLOWDOWN, MOST_WATTS

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
    gpu_memory_bytes: Annotated[int, msgspec.Meta(gt=0, le=MOST_BYTES)] | None = None
    power_watts: Annotated[float, msgspec.Meta(gt=0, le=MOST_WATTS)] | None = None
    max_slowdown: Annotated[float, msgspec.Meta(ge=0, le=MOST_SLOWDOWN)] | None = None
    """What these watts may cost; where they are not said, they are found by it."""
    power_class: str = ""
    deadline_seconds: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """After its start."""
    work_seconds: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """How long its work takes with all its watts."""
    visible_gpus: str = ""
    """CUDA_VISIBLE_DEVICES of its caller."""


class Job(Wanted, kw_only=True, omit_defaults=True):
    """One job in the tier."""

    path: str
    uid: int
    pid: int
    start_time: int
    started_seconds: float
    """Monotonic, like all times of a job: any agent of this boot reads it right, whatever happens to the clock."""
    checkpointed_seconds: float | None = None
    checkpointed_cpu_us: int = 0
    """Its CPU time at its last checkpoint."""
    acknowledges: bool = False
    """It says itself when its state is saved; of others a signal that was delivered has to do."""
    done_ratio: float | None = None
    """How much of its work it says that it has done, ..."""
    done_at_seconds: float = 0.0
    """... and when it said so."""
    evicted: str = ""
    """Why, once it was told to go."""


class Registry:
    """The jobs by name."""

    def __init__(self, state: StateDirectory | None) -> None:
        self._state = state
        self._disk = ThreadPoolExecutor(1, "colocate-registry")  # an fsync must not hold up the loop
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
            self._disk.submit(self._state.save, FILE, {"jobs": msgspec.to_builtins(list(self.jobs.values()))})

    def close(self) -> None:
        """Wait until all is written down."""
        self._disk.shutdown(wait=True)

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
                "gang": f"{job.uid}/{job.gang}" if job.gang else "",
                "checkpoint_signal": job.checkpoint_signal,
                "started_seconds": job.started_seconds,
                "checkpointed_seconds": job.checkpointed_seconds,
                "checkpointed_cpu_us": job.checkpointed_cpu_us,
                "requested_cores": job.cores,
                "max_runtime_seconds": job.max_runtime_seconds,
                "gpu_memory_bytes": job.gpu_memory_bytes,
                "power_watts": job.power_watts,
                "power_class": job.power_class,
                "max_slowdown": job.max_slowdown,
                "due_seconds": None if job.deadline_seconds is None else job.started_seconds + job.deadline_seconds,
                "work_seconds": job.work_seconds,
                "done_ratio": job.done_ratio,
                "done_at_seconds": job.done_at_seconds,
            }
            for name, job in self.jobs.items()
        }

    def checkpointed(self, job: Job, now_seconds: float, seen: Workload | None) -> None:
        """The job says that its state is saved; written down, for a successor must not count that work as lost."""
        job.acknowledges, job.checkpointed_seconds = True, now_seconds
        job.checkpointed_cpu_us = (seen.cpu_usage_us or 0) if seen is not None else 0
        self.save()

    def progressed(self, job: Job, ratio: float, now_seconds: float) -> None:
        """The job says how much of its work is done; written down, for a successor has not seen it run."""
        job.done_ratio, job.done_at_seconds = ratio, now_seconds
        self.save()

    def delivered(self, outcomes: Iterable[Outcome], snapshot: NodeSnapshot) -> None:
        """Checkpoint signals that reached a process that handles them: all that is known of jobs that never answer."""
        for outcome in outcomes:
            job = self.jobs.get(outcome.workload.removeprefix("job:"))
            sent = (outcome.knob, outcome.reason, outcome.status) == ("signal", "CheckpointSignal", "applied")
            if sent and job is not None and not job.acknowledges:
                job.checkpointed_seconds = snapshot.monotonic_seconds
                job.checkpointed_cpu_us = snapshot.workloads[outcome.workload].cpu_usage_us or 0

    def note(self, plan: Plan) -> list[Job]:
        """Mark what a plan does to jobs; those newly evicted are returned."""
        evicted = []
        for action in plan.actions:
            job = self.jobs.get(action.workload.removeprefix("job:"))
            if job is None:
                continue
            evicts = action.knob == "cgroup.kill" or (action.knob == "signal" and action.reason != "CheckpointSignal")
            if evicts and not job.evicted:
                job.evicted = f"{action.reason}: {action.message}"
                evicted.append(job)
        if evicted:
            self.save()
        return evicted
