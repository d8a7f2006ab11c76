"""When a gang that waits can start: from what is known of how long the others still run.

Known is what a pod declares (`colocate.io/expected-runtime-seconds`, else `activeDeadlineSeconds` as the latest end),
or what pods of the same owner have taken before. Nothing is guessed about the rest: they never end here. Nobody
enforces a declared runtime: of an owner whose pods have taken longer it is not believed.
"""

from __future__ import annotations

from statistics import quantiles
from typing import NamedTuple

from colocate.objects import Pod
from colocate.units import seconds_of
from podgroup.solve.place import place
from podgroup.solve.question import Gang
from podgroup.state.cluster import Cluster
from podgroup.state.gangs import family

RUNTIME = "colocate.io/expected-runtime-seconds"
LEAST_RUNS = 3
MOST_DIGITS = 9
OVERRUN_SECONDS = 2.0
"""Times of the API server are in whole seconds."""

Interval = tuple[float, float]
"""(earliest, latest), in seconds since the epoch."""


class Known(NamedTuple):
    """What the pods of each family have taken."""

    took: dict[str, list[float]]
    """Family -> how long its completed pods took, in seconds."""
    overran: set[str]
    """Families of which a pod has taken longer than it declared."""


def _declared(pod: Pod) -> float | None:
    text = pod.metadata.annotations.get(RUNTIME, "")
    return float(text) if text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS else None


def durations(cluster: Cluster, now: float) -> Known:
    """What is known at this time, in seconds since the epoch."""
    found = Known({}, set())
    for pod in cluster.pods.values():
        began = seconds_of(pod.status.start_time)
        if began is None or not family(pod):
            continue
        took = now - began if not pod.terminal else 0.0
        ended = next((c.last_transition_time for c in pod.status.conditions if c.type == "Ready"), None)
        if pod.status.phase == "Succeeded" and ended:
            took = max((seconds_of(ended) or 0.0) - began, 0.0)
            found.took.setdefault(family(pod), []).append(took)
        declared = _declared(pod)
        if declared is not None and took > declared + OVERRUN_SECONDS:
            found.overran.add(family(pod))
    return found


def runtime(pod: Pod, known: Known) -> Interval | None:
    """(least, most) seconds that a pod takes in all; None if nothing is known."""
    declared = _declared(pod)
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
    known = durations(cluster, now)
    ends = {}
    for uid in cluster.ledger.holdings:
        pod = cluster.pods.get(uid)
        end = end_of(pod, known, now) if pod is not None else None
        if end is not None:
            ends[uid] = end
    low, high = _first_fit(cluster, gang, {u: e[0] for u, e in ends.items()}), None
    if low is not None:
        high = _first_fit(cluster, gang, {u: e[1] for u, e in ends.items()})
    return None if low is None or high is None else (low, high)


def _first_fit(cluster: Cluster, gang: Gang, ends: dict[str, float]) -> float | None:
    """The first end after which the gang fits, found by bisection: what has ended stays ended."""
    moments = sorted(set(ends.values()))
    if not moments or not _fits(cluster, gang, ends, moments[-1]):
        return None
    low, high = 0, len(moments) - 1
    while low < high:
        middle = (low + high) // 2
        if _fits(cluster, gang, ends, moments[middle]):
            high = middle
        else:
            low = middle + 1
    return moments[low]


def _fits(cluster: Cluster, gang: Gang, ends: dict[str, float], moment: float) -> bool:
    with cluster.ledger.without([uid for uid, end in ends.items() if end <= moment]):
        return place(cluster.ledger, gang) is not None
