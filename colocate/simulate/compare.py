"""What policies make of the same jobs: a report card each, and paired comparisons over windows of the trace.

An average alone hides who pays for it: waits are told for each size of gang (see docs/simulator.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from colocate.model.statistics import ratio_interval
from colocate.simulate.fleet import DISCIPLINES, Run, simulate
from colocate.simulate.outages import NO_OUTAGES, Outages, Trouble
from colocate.simulate.paces import NO_PACES, Paces, Throughputs
from colocate.simulate.placement import Nodes
from colocate.simulate.scores import WHOLE
from colocate.simulate.threads import side_by_side
from colocate.simulate.workloads import Workload

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
CLASSES = (
    (0, "none"),
    (WHOLE - 1, "a part of one"),
    (WHOLE, "1"),
    (3 * WHOLE, "up to 3"),
    (7 * WHOLE, "up to 7"),
    (8 * WHOLE, "up to 8"),
    (16 * WHOLE, "up to 16"),
)
"""Of jobs: by at most so many thousandths of GPUs."""
LARGER = "more than 16"
SHORT_SECONDS = 10.0
"""Of bounded slowdowns: who runs for less is taken to run so long (Feitelson, JSSPP 2001)."""
POINTS = 200
"""Of a timeline."""


def known_policies() -> dict[str, str]:
    """Names of policies, and what each is: ours, and those of other packages (entry points `colocate.simulate`)."""
    found = {name: discipline.about for name, discipline in DISCIPLINES.items()}
    return found | {name: point.load().__doc__ or "" for name, point in _others().items()}


@cache
def _others() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group="colocate.simulate")}


class Measured(NamedTuple):
    """How fast jobs run by their GPUs, and beside whom."""

    throughputs: Throughputs
    gpus: tuple[str, ...]
    """What the nodes' GPUs are called, by the numbers of their models."""

    def paces(self, workload: Workload) -> Paces:
        """Of its jobs. Raises BadInput of what was not measured."""
        work, kinds = workload.work, workload.kinds
        each, part = kinds.gpus[work.kind], (kinds.gpu_milli < WHOLE)[work.kind]
        return self.throughputs.paces(self.gpus, workload.model, each, work.least, work.members, part)


class Conditions(NamedTuple):
    """What is not the same everywhere."""

    trouble: Trouble | None = None
    """Nodes fail, or jobs are stopped for more important ones."""
    gpu_watts: tuple[float, float] | None = None
    """Of a GPU that no job runs on, and of one that a job runs on."""
    priorities: bool = False
    """Jobs differ in them."""
    measured: Measured | None = None


USUAL = Conditions()


class Window(NamedTuple):
    """A part of the trace: from which job, and how many."""

    first: int
    jobs: int


def windows(jobs: int, count: int, size: int | None, seed: int) -> list[Window]:
    """The whole trace, or so many different parts of it that are drawn, or as many as there are; they may overlap."""
    if size is None:
        return [Window(0, jobs)]
    possible = jobs - size + 1
    firsts = np.random.default_rng(seed).choice(possible, size=min(count, possible), replace=False)
    return [Window(int(first), size) for first in firsts]


def classes(workload: Workload) -> NDArray[np.str_]:
    """Of each job, its size: by GPUs of all members, or by members where no job has a GPU."""
    each = (workload.kinds.gpus * workload.kinds.gpu_milli)[workload.work.kind]
    asked = (each if each.any() else WHOLE) * workload.work.members
    found = np.full(len(asked), LARGER, dtype="<U16")
    for most, name in reversed(CLASSES):
        found[asked <= most] = name
    return found


class Outcome(NamedTuple):
    """One policy on one window."""

    policy: str
    window: Window
    run: Run
    work: Workload
    conditions: Conditions = USUAL

    def card(self, nodes: Nodes) -> dict[str, Any]:
        """The report card. Seconds and shares; deterministic."""
        work, run = self.work.work, self.run
        ran = ~np.isnan(run.end)
        wait, jct = (run.start - work.submit)[ran], (run.end - work.submit)[ran]
        slowdown = np.maximum(jct / np.maximum(work.run[ran], SHORT_SECONDS), 1.0)
        span = float(work.submit[-1] - work.submit[0])
        capacity = float(nodes.gpus.sum()) * span
        card: dict[str, Any] = {
            "policy": self.policy,
            "jobs": len(ran),
            "never_started": int((~ran).sum()),
            "jct_seconds": _summary(jct),
            "wait_seconds": _summary(wait),
            "bounded_slowdown": _summary(slowdown),
            "fairness": round(fairness(slowdown), 6) if ran.any() else None,
            "makespan_seconds": round(float(run.end[ran].max() - work.submit[0]), 3) if ran.any() else None,
            "gpu_allocation": round(run.busy_gpu_seconds / capacity, 6) if capacity else None,
            "gpu_held_idle": round(run.held_gpu_seconds / capacity, 6) if capacity else None,
            "gpu_idle_while_waiting": round(run.idle_gpu_seconds / capacity, 6) if capacity else None,
            "decisions": int(run.decisions),
            "wait_seconds_by_size": self._by(classes(self.work), [*(name for _, name in CLASSES), LARGER], wait, ran),
        }
        if self.conditions.priorities:
            priority = self.work.kinds.priority[work.kind]
            names = [str(value) for value in np.unique(priority)[::-1]]
            card["wait_seconds_by_priority"] = self._by(priority.astype(str), names, wait, ran)
        if self.conditions.trouble is not None:
            asked = float((self._gpus() * work.run)[ran].sum())
            card["restarts"] = int(run.restarts)
            card["work_redone"] = round(run.lost_gpu_seconds / asked, 6) if asked else None
        if self.conditions.measured is not None:
            card["gpu_effective"] = round(run.done_gpu_seconds / capacity, 6) if capacity else None
        if self.conditions.gpu_watts is not None:
            idle, busy = self.conditions.gpu_watts
            joules = idle * (capacity - run.busy_gpu_seconds) + busy * run.busy_gpu_seconds
            card["gpu_kwh"] = round(joules / 3.6e6, 3)
        return card

    def _gpus(self) -> Floats:
        """Of each job, with all its members."""
        each = (self.work.kinds.gpus * self.work.kinds.gpu_milli)[self.work.work.kind] / WHOLE
        return np.asarray(each * self.work.work.members, dtype=np.float64)

    def _by(
        self, label: NDArray[np.str_], names: Sequence[str], wait: Floats, ran: NDArray[np.bool_]
    ) -> dict[str, dict[str, Any]]:
        """The waits of jobs of each label, in this order."""
        found = {}
        for name in names:
            here, started = label == name, (label == name)[ran]
            if here.any():
                never = int((here & ~ran).sum())
                found[name] = {"jobs": int(here.sum()), "never_started": never, **_summary(wait[started])}
        return found

    def timeline(self) -> list[tuple[float, float]]:
        """(hours, GPUs of jobs that run) at POINTS moments from the first arrival to the last one; of no restarts."""
        work, ran = self.work.work, ~np.isnan(self.run.end)
        gpus, start, ends = self._gpus()[ran], self.run.start[ran], self.run.end[ran]
        began = work.submit[0]
        times = np.linspace(began, work.submit[-1], POINTS)
        order = np.argsort(start)
        by_end = np.argsort(ends)
        begun = np.concatenate(([0.0], np.cumsum(gpus[order])))[np.searchsorted(start[order], times, "right")]
        over = np.concatenate(([0.0], np.cumsum(gpus[by_end])))[np.searchsorted(ends[by_end], times, "right")]
        return [(float(t - began) / 3600.0, float(g)) for t, g in zip(times, begun - over, strict=True)]


def fairness(slowdown: Floats) -> float:
    """Jain's index: 1 where all are slowed down alike, 1/n where one of n is alone (Jain, Chiu and Hawe, 1984)."""
    return float(slowdown.sum() ** 2 / (len(slowdown) * (slowdown**2).sum()))


def _summary(values: Floats) -> dict[str, float | None]:
    if not len(values):
        return {"mean": None, "p50": None, "p99": None}
    p50, p99 = np.percentile(values, [50, 99])
    return {"mean": round(float(values.mean()), 3), "p50": round(float(p50), 3), "p99": round(float(p99), 3)}


def run_all(
    nodes: Nodes,
    workload: Workload,
    policies: Sequence[str],
    parts: Sequence[Window],
    seed: int,
    say: Callable[[int, int], None],
    workers: int | None = None,
    conditions: Conditions = USUAL,
) -> list[Outcome]:
    """Each policy on each window, in that order with any number of workers: the kernels let go of the interpreter."""
    tasks = [(policy, number, part) for policy in policies for number, part in enumerate(parts)]
    found = list[Outcome]()
    say(0, len(tasks))  # the first use compiles, which takes a while

    def one(task: tuple[str, int, Window]) -> Outcome:
        policy, number, part = task
        return one_run(nodes, workload, policy, part, seed + number, conditions)

    for outcome in side_by_side(one, tasks, workers):
        found.append(outcome)
        say(len(found), len(tasks))
    return found


def one_run(
    nodes: Nodes, workload: Workload, policy: str, part: Window, seed: int, conditions: Conditions = USUAL
) -> Outcome:
    """One policy on one window."""
    if len(np.unique(workload.kinds.priority)) > 1:
        conditions = conditions._replace(trouble=conditions.trouble or Trouble(), priorities=True)
    chosen, trouble = workload.part(part.first, part.first + part.jobs), conditions.trouble
    known = (
        [NO_OUTAGES] if trouble is None else trouble.drawn(len(nodes.gpus), chosen.work.submit, chosen.work.run, seed)
    )
    paces = NO_PACES if conditions.measured is None else conditions.measured.paces(chosen)
    for outages in known:
        run = known_run(policy, nodes, chosen, seed, None, outages, paces)
        if not run.cut:
            break
    return Outcome(policy, part, run, chosen, conditions)


def known_run(
    policy: str,
    nodes: Nodes,
    workload: Workload,
    seed: int,
    running: Ints | None = None,
    outages: Outages = NO_OUTAGES,
    paces: Paces = NO_PACES,
) -> Run:
    """By the name of a policy; `running`: the nodes of the pods of the first jobs, which are there already."""
    if policy in DISCIPLINES:
        return simulate(nodes, workload.kinds, workload.work, DISCIPLINES[policy], seed, running, outages, paces)
    return Run(*_others()[policy].load()(nodes, workload.kinds, workload.work, seed, running, outages, paces))


def comparisons(every: Sequence[dict[str, Any]], policies: Sequence[str]) -> list[dict[str, Any]]:
    """Of each policy beside the first: paired ratios of mean completion times over windows, 95 % for all together.

    `every` is all cards, those of a policy in the order of their windows.
    """
    cards = {policy: [card for card in every if card["policy"] == policy] for policy in policies}
    base, rest = policies[0], policies[1:]
    found: list[dict[str, Any]] = []
    for policy in rest:
        never = sum(card["never_started"] for name in (policy, base) for card in cards[name])
        if never:  # a mean over those that started would praise whoever lets the others wait for ever
            found.append({"policy": policy, "beside": base, "windows": 0, "jct": None})
            continue
        means = [[card["jct_seconds"]["mean"] for card in cards[name]] for name in (policy, base)]
        pairs = [(a, b) for a, b in zip(*means, strict=True) if a and b]
        if len(pairs) < 2:
            continue
        ratio = ratio_interval([a for a, _ in pairs], [b for _, b in pairs], comparisons=len(rest))
        values = {"ratio": round(ratio.value, 6), "low": round(ratio.low, 6), "high": round(ratio.high, 6)}
        found.append({"policy": policy, "beside": base, "windows": len(pairs), "jct": values})
    return found
