"""The model behind the file port: time. `advance(seconds)` lets the machine run under the settings of the cgroups."""

from __future__ import annotations

from colocate.cgroup.layout import UNIFIED
from colocate.cgroup.tree import joined
from colocate.kernelmodel.files import ModelFiles
from colocate.kernelmodel.machine import Task

STEP_SECONDS = 0.001
CRAWLING_SHARE = 0.05
"""What a task that allocates at memory.high still runs; memory.c puts it to sleep for up to two seconds at a time."""
STALLED_SHARE = 0.9
"""What a service loses when no memory is left: nearly every access waits for its page."""


class ModelKernel(ModelFiles):
    """A kernel with cgroup v1 (and the unified hierarchy beside it) or v2, and its clock."""

    _stalled_ratio = 0.0

    def time(self) -> float:
        """Wall clock, seconds."""
        return 1_700_000_000.0 + self.machine.now

    def monotonic(self) -> float:
        """Seconds that never go back."""
        return self.machine.now

    def spawn(
        self, demand: str, path: str = "/", *, cpu: int | None = None, command: str = "task", ppid: int = 1
    ) -> Task:
        """A new process in a cgroup, in every hierarchy where it exists."""
        task = self.machine.spawn(demand, cpu=cpu, command=command, ppid=ppid)
        for hierarchy in self.layout.mounts:
            if self.group(hierarchy, path) is not None:
                task.where[hierarchy] = path
        return task

    def charge(self, task: Task, core_seconds: float) -> None:
        """CPU time of a task whose life is modelled elsewhere."""
        task.usage_seconds += core_seconds
        self._charge(self._cpu_path(task), cpu=core_seconds)

    def advance(self, seconds: float) -> None:
        """Let the machine run."""
        end = self.machine.now + seconds
        while self.machine.now < end - 1e-9:
            step = min(STEP_SECONDS, end - self.machine.now)
            self._step(step)
            self.machine.now += step
            for actor in self.actors:
                actor(self.machine.now)

    def _step(self, step: float) -> None:
        runnable = [
            t
            for t in self.machine.tasks.values()
            if t.wants_cpu() and not self.frozen(t) and not self._waits_for_memory(t, step)
        ]
        self._refill(step)
        by_cpu: dict[int, list[Task]] = {c: [] for c in self.machine.cpus}
        for task in sorted(runnable, key=lambda t: (t.cpu is None, t.pid)):
            allowed = [task.cpu] if task.cpu is not None else self._allowed(task)
            if allowed:
                task.placed = min(allowed, key=lambda c: (len(by_cpu[c]), c != task.placed, c))
                by_cpu[task.placed].append(task)
        for cpu, tasks in by_cpu.items():
            self._run_cpu(cpu, tasks, step)
        self._enforce_memory()
        self._press_memory(step)

    def _allowed(self, task: Task) -> list[int]:
        hierarchy = self.layout.controllers["cpuset"]
        group = self.group(hierarchy, task.where.get(hierarchy, "/"))
        return list(group.effective_cpus()) if group is not None else list(self.machine.cpus)

    def _cpu_path(self, task: Task) -> str:
        return task.where.get(self.layout.controllers["cpu"], "/")

    def _refill(self, step: float) -> None:
        hierarchy = self.layout.controllers["cpu"]
        for path, usage in self._usage.items():
            group = self.group(hierarchy, path)
            if group is None or group.quota_us is None:
                continue
            period = group.period_us / 1e6
            if self.machine.now - usage.period_start >= period - step / 2:
                usage.period_start = self.machine.now
                usage.budget = group.quota_us / 1e6

    def _throttled_by(self, path: str) -> str | None:
        """The group whose quota is used up; None if there is none."""
        hierarchy = self.layout.controllers["cpu"]
        while path != "/":
            group = self.group(hierarchy, path)
            if group is not None and group.quota_us is not None and self.usage(path).budget <= 0:
                return path
            path = path.rpartition("/")[0] or "/"
        return None

    def _run_cpu(self, cpu: int, tasks: list[Task], step: float) -> None:
        ready = []
        for task in tasks:
            path = self._cpu_path(task)
            if (throttling := self._throttled_by(path)) is not None:
                self.usage(throttling).throttled += step  # cpu.stat counts a group's own quota alone
                self._wait(task, step)
            else:
                ready.append(task)
        shares = self._shares(ready)
        used = 0.0
        for task in ready:
            share = shares[task.pid]
            got = self._serve(task, share, step) if task.demand == "queue" else share * step
            used += got
            task.usage_seconds += got
            self._charge(self._cpu_path(task), cpu=got)
            if share < 0.999:
                self._wait(task, step * (1 - share))
            self.machine.grow(task, got, self._may_grow(task))
        self.machine.busy_seconds[cpu] += min(used, step)
        self.machine.idle_seconds[cpu] += max(step - used, 0.0)

    def _wait(self, task: Task, seconds: float) -> None:
        task.waited_seconds += seconds
        path = task.where.get(UNIFIED, "/")
        while True:
            self.usage(path).cpu_pressure += seconds
            if path == "/":
                return
            path = path.rpartition("/")[0] or "/"

    def _charge(self, path: str, cpu: float) -> None:
        while True:
            usage = self.usage(path)
            usage.cpu += cpu
            usage.budget -= cpu
            if path == "/":
                return
            path = path.rpartition("/")[0] or "/"

    def _shares(self, tasks: list[Task]) -> dict[int, float]:
        """The share of the CPU of each task, by the weights of the groups from the root down."""
        found: dict[int, float] = {}

        def divide(path: str, members: list[Task], share: float) -> None:
            hierarchy = self.layout.controllers["cpu"]
            here = [t for t in members if self._cpu_path(t) == path]
            below: dict[str, list[Task]] = {}
            prefix = path.rstrip("/")
            for task in members:
                where = self._cpu_path(task)
                if where != path:
                    below.setdefault(f"{prefix}/{where[len(prefix) + 1 :].split('/')[0]}", []).append(task)
            weights = {p: (g.scheduler_weight() if (g := self.group(hierarchy, p)) else 1024.0) for p in below}
            total = 1024.0 * len(here) + sum(weights.values())
            for task in here:
                found[task.pid] = share * 1024.0 / total
            for child, inside in below.items():
                divide(child, inside, share * weights[child] / total)

        if tasks:
            divide("/", tasks, 1.0)
        return found

    def _serve(self, task: Task, share: float, step: float) -> float:
        """Work off a worker's queue; a request that found the worker idle waits for the neighbour to be preempted."""
        left, used = step, 0.0
        while left > 1e-9 and task.queue:
            request = task.queue[0]
            if task.wait_left < 0:
                task.wait_left = self.machine.wake_delay((1 - share) / max(share, 1e-3)) if share < 0.999 else 0.0
            waits = min(task.wait_left, left)
            task.wait_left -= waits
            left -= waits
            needed = request.left / max(share, 1e-6)
            runs = min(needed, left)
            request.left -= runs * share
            used += runs * share
            left -= runs
            if request.left <= 1e-9:
                task.queue.popleft()
                self.machine.finished(task, request, self.machine.now + step - left)
        if not task.queue:
            task.wait_left = -1.0
        return used

    # -- memory ------------------------------------------------------------------------------------------------

    def _may_grow(self, task: Task) -> bool:
        hierarchy = self.layout.controllers["memory"]
        path = task.where.get(hierarchy, "/")
        while path != "/":
            group = self.group(hierarchy, path)
            if (
                group is not None
                and group.memory_high is not None
                and self.memory_usage(hierarchy, path) >= group.memory_high
            ):
                return False
            path = path.rpartition("/")[0] or "/"
        return True

    def _enforce_memory(self) -> None:
        """The OOM killer: the largest task of a group over its limit, or of the machine."""
        hierarchy = self.layout.controllers["memory"]
        stack = [("/", self.roots[hierarchy])]
        while stack:
            path, group = stack.pop()
            limit = self.machine.memory_bytes if group.parent is None else group.memory_max
            while limit is not None and self.memory_usage(hierarchy, path) > limit:
                victim = max(self.tasks_in(hierarchy, path, below=True), key=self.machine.oom_badness)
                self.machine.kill(victim.pid, 9)
            stack.extend((joined(path, name), child) for name, child in group.children.items())

    def _press_memory(self, step: float) -> None:
        """Everybody stalls while the machine is nearly full: the nearer, the longer."""
        used = self.machine.memory_of(self.machine.tasks.values()) / self.machine.memory_bytes
        self._stalled_ratio = min(max(used - 0.93, 0.0) / 0.07, 1.0)
        if self._stalled_ratio:
            self._stall({t.where.get(UNIFIED, "/") for t in self.machine.tasks.values()}, step * self._stalled_ratio)

    def _waits_for_memory(self, task: Task, step: float) -> bool:
        """Whether a task sleeps in the kernel: it allocates at its group's memory.high, or serves on a full machine."""
        if task.demand == "queue":
            return self._stalled_ratio > 0.0 and self.machine.random.random() < STALLED_SHARE * self._stalled_ratio
        if not task.growth_bytes_per_second or task.memory_bytes >= task.most_bytes or self._may_grow(task):
            return False
        if self.machine.random.random() < CRAWLING_SHARE:
            return False
        self._stall({task.where.get(UNIFIED, "/")}, step)
        return True

    def _stall(self, paths: set[str], seconds: float) -> None:
        """Who stalls stalls in its cgroup and in all above."""
        stalled, level = set[str](), paths
        while level:
            stalled |= level
            level = {path.rpartition("/")[0] or "/" for path in level if path != "/"}
        for path in stalled:
            self.usage(path).memory_pressure += seconds
