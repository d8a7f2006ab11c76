"""When a gang that waits can start: from what is known of how long the others still run.

Known is what a pod declares (`colocate.io/expected-runtime-seconds`, else `activeDeadlineSeconds` as the latest end),
or what pods of the same owner have taken before. Nothing is guessed about the rest: they never end here. Nobody
enforces a declared runtime: of an owner whose pods have taken longer it is not believed.
"""

from __future__ import annotations

from collections.abc import Generator
from statistics import quantiles
from typing import NamedTuple, TypeVar

from colocate.objects import Pod
from colocate.units import seconds_of
from podgroup.solve.preempt import Question
from podgroup.solve.question import Gang
from podgroup.state.cluster import Cluster
from podgroup.state.gangs import family

RUNTIME = "colocate.io/expected-runtime-seconds"
LEAST_RUNS = 3
MOST_DIGITS, PODS_A_STEP = 9, 2000
OVERRUN_SECONDS = 2.0
"""Times of the API server are in whole seconds."""

T = TypeVar("T")
Steps = Generator[None, None, T]
Interval = tuple[float, float]
"""(earliest, latest), in seconds since the epoch."""


class Known(NamedTuple):
    """What the pods of each family have taken."""

    took: dict[str, list[float]]
    """Family -> how long its completed pods took, in seconds."""
    overran: set[str]
    """Families of which a pod has taken longer than it declared."""


def declared_seconds(pod: Pod) -> float | None:
    """How long a pod says that it will run; None: it does not, or says what is no number."""
    text = pod.metadata.annotations.get(RUNTIME, "")
    return float(text) if text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS else None


def durations(cluster: Cluster, now: float) -> Known:
    """What is known at this time, in seconds since the epoch."""
    return _at_once(_learn(cluster, now))


def _at_once(steps: Steps[T]) -> T:
    while True:
        try:
            next(steps)
        except StopIteration as ended:
            return ended.value  # type: ignore[no-any-return]


def _learn(cluster: Cluster, now: float) -> Steps[Known]:
    found = Known({}, set())
    for i, pod in enumerate(list(cluster.pods.values())):
        if i % PODS_A_STEP == PODS_A_STEP - 1:
            yield
        began = seconds_of(pod.status.start_time)
        if began is None or not family(pod):
            continue
        took = now - began if not pod.terminal else 0.0
        ended = next((c.last_transition_time for c in pod.status.conditions if c.type == "Ready"), None)
        if pod.status.phase == "Succeeded" and ended:
            took = max((seconds_of(ended) or 0.0) - began, 0.0)
            found.took.setdefault(family(pod), []).append(took)
        declared = declared_seconds(pod)
        if declared is not None and took > declared + OVERRUN_SECONDS:
            found.overran.add(family(pod))
    return found


def runtime(pod: Pod, known: Known) -> Interval | None:
    """(least, most) seconds that a pod takes in all; None if nothing is known."""
    declared = declared_seconds(pod)
    if declared is not None and (not family(pod) or family(pod) not in known.overran):
        return declared, declared
    before = known.took.get(family(pod), [])
    if len(before) >= LEAST_RUNS:
        low, _, high = quantiles(before, n=4)
        return low, high
    if pod.spec.active_deadline_seconds:
        return 0.0, float(pod.spec.active_deadline_seconds)
    return None


def end_of(pod: Pod, known: Known, now: float) -> Interval | None:
    """When a pod that runs will have ended, never before now; None if nothing is known, or it has run for longer."""
    takes = runtime(pod, known)
    if takes is None:
        return None
    began = seconds_of(pod.status.start_time) or now
    return (max(began + takes[0], now), began + takes[1]) if began + takes[1] >= now else None


def starts_at(cluster: Cluster, gang: Gang, now: float) -> Interval | None:
    """When a gang fits for the first time as others end; None if what is known does not say."""
    return _at_once(starts_step_by_step(cluster, gang, now))


def starts_step_by_step(cluster: Cluster, gang: Gang, now: float) -> Steps[Interval | None]:
    """The same; the cluster is as before after each step."""
    known = yield from _learn(cluster, now)
    ends = {}
    for uid in list(cluster.ledger.holdings):
        pod = cluster.pods.get(uid)
        end = end_of(pod, known, now) if pod is not None else None
        if end is not None:
            ends[uid] = end
    low = yield from _first_fit(cluster, gang, {u: e[0] for u, e in ends.items()})
    if low is None:
        return None
    high = yield from _first_fit(cluster, gang, {u: e[1] for u, e in ends.items()})
    return None if high is None else (low, high)


def _first_fit(cluster: Cluster, gang: Gang, ends: dict[str, float]) -> Steps[float | None]:
    """The first end after which the gang fits, found by bisection: what has ended stays ended."""
    moments = sorted(set(ends.values()))
    pods = [cluster.pods[uid] for uid in ends if uid in cluster.pods]

    def fits(moment: float) -> bool:
        there = [p for p in pods if p.metadata.uid in cluster.ledger.holdings]  # some may have gone since
        return bool(Question(cluster, gang).placed([p for p in there if ends[p.metadata.uid] <= moment]))

    if not moments or not fits(moments[-1]):
        return None
    low, high = 0, len(moments) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(moments[middle]) else (middle + 1, high)
        yield
    return moments[low]
