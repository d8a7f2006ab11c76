"""Run delay: how long threads were runnable but waited for a CPU, from /proc/<pid>/task/*/schedstat.

The second field is nanoseconds on the run queue (Documentation/scheduler/sched-stats.rst). Reading is O(threads), so
it is done for services with few threads only; PSI covers the others at the cost of one read.
"""

from __future__ import annotations

from collections.abc import Iterable

from colocate.cgroupfs import FilePort

MAX_THREADS = 128


def run_delay_us(port: FilePort, pids: Iterable[int]) -> int | None:
    """Microseconds that all threads of the processes have waited; None without schedstat or with too many threads."""
    total = threads = 0
    seen = False
    for pid in pids:
        for thread in port.proc_list(f"/proc/{pid}/task"):
            threads += 1
            if threads > MAX_THREADS:
                return None
            text = port.proc(f"/proc/{pid}/task/{thread}/schedstat")
            if text:
                total += int(text.split()[1])
                seen = True
    return total // 1000 if seen else None
