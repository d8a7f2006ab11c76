"""When a gang that waits can start: from what is known of how long the others still run.

Known is what a pod declares (`colocate.io/expected-runtime-seconds`, else `activeDeadlineSeconds` as the latest end),
or what pods of the same owner have taken before. Nothing is guessed about the rest: they never end here.
"""

from __future__ import annotations

from statistics import quantiles

from colocate.objects import Pod
from colocate.podgroup.cluster import Cluster
from colocate.podgroup.fit import Gang
from colocate.podgroup.gangs import family
from colocate.podgroup.place import place
from colocate.units import seconds_of

RUNTIME = "colocate.io/expected-runtime-seconds"
LEAST_RUNS = 3
MOST_DIGITS = 9

Interval = tuple[float, float]
"""(earliest, latest), in seconds since the epoch."""


def durations(cluster: Cluster) -> dict[str, list[float]]:
    """Family -> how long its completed pods took, in seconds."""
    found: dict[str, list[float]] = {}
    for pod in cluster.pods.values():
        ended = next((c.last_transition_time for c in pod.status.conditions if c.type == "Ready"), None)
        if pod.status.phase == "Succeeded" and pod.status.start_time and ended and family(pod):
            took = (seconds_of(ended) or 0.0) - (seconds_of(pod.status.start_time) or 0.0)
            found.setdefault(family(pod), []).append(max(took, 0.0))
    return found


def runtime(pod: Pod, known: dict[str, list[float]]) -> Interval | None:
    """(least, most) seconds that a pod takes in all; None if nothing is known."""
    declared = pod.metadata.annotations.get(RUNTIME, "")
    if declared.isascii() and declared.isdecimal() and len(declared) <= MOST_DIGITS:
        return float(declared), float(declared)
    before = known.get(family(pod), [])
    if len(before) >= LEAST_RUNS:
        low, _, high = quantiles(before, n=4)
        return low, high
    if pod.spec.active_deadline_seconds:
        return 0.0, float(pod.spec.active_deadline_seconds)
    return None


def end_of(pod: Pod, known: dict[str, list[float]], now: float) -> Interval | None:
    """When a pod that runs will have ended, never before now; None if nothing is known, or it has run for longer."""
    takes = runtime(pod, known)
    if takes is None:
        return None
    began = seconds_of(pod.status.start_time) or now
    return (max(began + takes[0], now), began + takes[1]) if began + takes[1] >= now else None


def starts_at(cluster: Cluster, gang: Gang, now: float) -> Interval | None:
    """When a gang fits for the first time as others end; None if what is known does not say."""
    known = durations(cluster)
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
