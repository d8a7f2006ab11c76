"""Koordinator's laws: what BestEffort may use now (koordlet's CPU suppress), and what nodes promise to batch and mid.

Sources: koordinator pkg/koordlet/qosmanager/plugins/cpusuppress/cpu_suppress.go and pkg/slo-controller/noderesource/
plugins/{util,batchresource,midresource} at a7a1b76 (2026-07-24). Amounts are milli-CPUs or bytes, as there; quotas are
microseconds in a period of 100 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Literal, NamedTuple

MIN_QUOTA_US = 2000
MIN_CPUS = 2
PERIOD_US = 100_000
BYPASS_RATIO = 0.01
GROWTH_RATIO = 0.1


def suppress_milli(
    *,
    capacity_milli: int,
    threshold_percent: int,
    node_used_milli: int,
    pods_used_milli: Sequence[tuple[str, int]],
    host_apps_used_milli: Sequence[tuple[str, int]] = (),
    reserved_milli: int = 0,
    min_percent: int | None = None,
) -> int:
    """What BestEffort may use: capacity * threshold - non-BE pods - non-BE host applications - system.

    Pods and host applications are (qos, used); any qos but `BE` counts as non-BE, also unknown ones. The system is what
    the node uses beyond all pods and applications, at least the reserved amount.
    """
    pods = sum(used for _, used in pods_used_milli)
    apps = sum(used for _, used in host_apps_used_milli)
    system = max(node_used_milli - pods - apps, 0, reserved_milli)
    pods_not_be = sum(used for qos, used in pods_used_milli if qos != "BE")
    apps_not_be = sum(used for qos, used in host_apps_used_milli if qos != "BE")
    result = capacity_milli * threshold_percent // 100 - pods_not_be - apps_not_be - system
    if min_percent is not None:
        result = max(result, capacity_milli * min_percent // 100)
    return result


def next_quota_us(suppressed_milli: int, current_us: int, capacity_cores: int) -> int | None:
    """The quota to write, None to leave it: small changes are skipped, growth is at most 10 % of the node a tick.

    `current_us` is -1 for no quota; then the target is taken at once.
    """
    wanted = max(suppressed_milli * PERIOD_US // 1000, MIN_QUOTA_US)
    if abs(wanted - current_us) < capacity_cores * PERIOD_US * BYPASS_RATIO and wanted != MIN_QUOTA_US:
        return None
    step = int(capacity_cores * PERIOD_US * GROWTH_RATIO)
    if current_us != -1 and wanted - current_us > step:
        return current_us + step
    return wanted


def cpus_wanted(suppressed_milli: int, current_cpus: int, node_cpus: int) -> int:
    """How many CPUs the cpuset policy gives: whole CPUs rounded up, at least 2, growing by at most 10 % of the node."""
    wanted = max(ceil(suppressed_milli / 1000), MIN_CPUS)
    return min(wanted, current_cpus + ceil(node_cpus * GROWTH_RATIO))


def choose_cpus(wanted: int, topology: Sequence[tuple[int, int, int]]) -> list[int] | None:
    """CPUs for BestEffort from (cpu, core, numa or socket) rows; None if there are not enough.

    Buckets by NUMA node take turns; pairs of hyper-threads first, single threads to fill up.
    """
    if wanted > len(topology):
        return None
    buckets: dict[int, dict[int, list[int]]] = {}
    for cpu, core, numa in sorted(topology):
        buckets.setdefault(numa, {}).setdefault(core, []).append(cpu)
    pairs = {n: [sorted(c) for _, c in sorted(cores.items(), key=lambda i: min(i[1]))] for n, cores in buckets.items()}
    chosen: list[int] = []
    progress = True
    while progress and len(chosen) < wanted:
        progress = False
        for numa in sorted(pairs):
            cores = [core for core in pairs[numa] if len(core) >= 2]
            if cores and len(chosen) < wanted:
                pairs[numa].remove(cores[0])
                chosen.extend(cores[0][: wanted - len(chosen)])
                progress = True
    singles = [cpu for numa in sorted(pairs) for core in pairs[numa] for cpu in core]
    return chosen + singles[: wanted - len(chosen)]


class Demand(NamedTuple):
    """One pod that is neither batch nor free; `used` is None where nobody has measured it yet."""

    request: int
    used: int | None


CPU_RECLAIM_PERCENT, MEMORY_RECLAIM_PERCENT = 60, 65


def batch_allocatable(
    *,
    capacity: int,
    reclaim_percent: int,
    system_used: int,
    pods: Sequence[Demand],
    policy: Literal["usage", "request", "maxUsageRequest"] = "usage",
    reserved: int = 0,
    threshold_percent: int | None = None,
) -> int:
    """What batch pods may ask for: capacity - margin - system - the others' use, request, or the larger of the two.

    A pod that nobody has measured counts with its request, also under `maxUsageRequest`, where Koordinator forgets it.
    A reclaim percentage above 100 promises more than there is, as there.
    """
    margin = capacity * (100 - reclaim_percent) // 100
    if policy == "request":
        found = capacity - margin - reserved - sum(p.request for p in pods)
    elif policy == "usage":
        used = sum(p.request if p.used is None else p.used for p in pods)
        found = capacity - margin - max(system_used, reserved) - used
    else:
        most = sum(max(p.request, p.used or 0) for p in pods)
        found = capacity - margin - max(system_used, reserved) - most
    found = max(found, 0)
    return found if threshold_percent is None else min(found, capacity * threshold_percent // 100)


def mid_allocatable(
    *,
    capacity: int,
    reclaimable: int,
    used: int,
    requested: int,
    reserved: int = 0,
    unallocated_percent: int = 0,
    threshold_percent: float = 100,
    static_percent: float | None = None,
) -> int:
    """What mid pods may ask for: what production reclaims of what is unused, and part of what nobody has asked for."""
    most = int(capacity * threshold_percent / 100)
    if static_percent is not None:
        return min(int(capacity * static_percent / 100), most)
    unallocated = max(capacity - reserved - requested, 0)
    return min(min(reclaimable, max(capacity - used, 0)) + unallocated * unallocated_percent // 100, most)
