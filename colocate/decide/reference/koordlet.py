"""koordlet's CPU suppress: BestEffort gets what is left below a fixed share of the node.

Source: koordinator pkg/koordlet/qosmanager/plugins/cpusuppress/cpu_suppress.go at a7a1b76 (2026-07-24). Amounts are
milli-CPUs, as there; quotas are microseconds in a period of 100 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

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
