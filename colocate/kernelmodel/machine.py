"""The machine behind the model: processes that want CPU and memory, shared out by the cgroups' settings.

A fluid model in small steps: on each CPU the runnable tasks share by hierarchical weights; quotas are budgets per
period; a service's worker is a queue (seeded arrivals elsewhere hand it requests), whose wake-up waits up to a slice of
the neighbour it preempts. It is right about order and proportion, not about microseconds.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable

SLICE_SECONDS = 0.003
"""What a neighbour of equal weight may run before a waking task gets the CPU."""


class Request:
    """One request in a worker's queue."""

    __slots__ = ("due", "left")

    def __init__(self, due: float, seconds: float) -> None:
        self.due, self.left = due, seconds


class Task:
    """A process with one thread. `demand` is `hog`, `sleep`, or `queue` (a service worker)."""

    def __init__(self, pid: int, ppid: int, start: int, demand: str, cpu: int | None, command: str, uid: int) -> None:
        self.pid, self.ppid, self.start_time, self.demand, self.cpu = pid, ppid, start, demand, cpu
        self.command, self.uid = command, uid
        self.where: dict[str, str] = {}
        """hierarchy -> path"""
        self.queue: deque[Request] = deque()
        self.wait_left = 0.0
        self.usage_seconds = 0.0
        self.waited_seconds = 0.0
        self.memory_bytes = 1 << 20
        self.growth_bytes_per_second = 0
        self.most_bytes = 1 << 40
        self.oom_score_adj = 0
        self.handlers: dict[int, Callable[[], None]] = {}
        self.placed = cpu if cpu is not None else 0

    def wants_cpu(self) -> bool:
        """Runnable now."""
        return self.demand == "hog" or (self.demand == "queue" and bool(self.queue))


class Machine:
    """CPUs and memory."""

    def __init__(self, cpus: int, memory_bytes: int, seed: int) -> None:
        self.cpus = tuple(range(cpus))
        self.memory_bytes = memory_bytes
        self.random = random.Random(seed)
        self.tasks: dict[int, Task] = {}
        self.now = 1000.0
        self.idle_seconds = dict.fromkeys(self.cpus, 0.0)
        self.busy_seconds = dict.fromkeys(self.cpus, 0.0)
        self.finished: Callable[[Task, Request, float], None] = lambda _task, _request, _now: None
        self._next_pid = 100

    def spawn(self, demand: str, *, cpu: int | None = None, ppid: int = 1, command: str = "task", uid: int = 0) -> Task:
        """A new process."""
        self._next_pid += 1
        task = Task(self._next_pid, ppid, int(self.now * 100), demand, cpu, command, uid)
        self.tasks[task.pid] = task
        return task

    def kill(self, pid: int, number: int) -> bool:
        """Deliver a signal; without a handler every signal is fatal."""
        task = self.tasks.get(pid)
        if task is None:
            return False
        handler = task.handlers.get(number)
        if handler is not None:
            handler()
        elif number != 0:
            del self.tasks[pid]
        return True

    def wake_delay(self, ratio: float) -> float:
        """How long a waking task waits for a neighbour of `ratio` times its weight to be preempted."""
        return self.random.random() * SLICE_SECONDS * min(ratio, 1.0)

    def grow(self, task: Task, seconds: float, allowed: bool) -> None:
        """Memory growth of a running task."""
        if allowed and task.growth_bytes_per_second:
            task.memory_bytes = min(task.memory_bytes + int(task.growth_bytes_per_second * seconds), task.most_bytes)

    def oom_badness(self, task: Task) -> float:
        """Who is killed first for want of memory: what it holds, and its oom_score_adj thousandths of the machine."""
        return task.memory_bytes + task.oom_score_adj / 1000 * self.memory_bytes

    def memory_of(self, tasks: Iterable[Task]) -> int:
        """Bytes of these tasks."""
        return sum(t.memory_bytes for t in tasks)
