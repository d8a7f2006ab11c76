"""One cgroup's figures, the same on v1 and v2.

Sources: Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/{cpuacct,memory}.rst, accounting/psi.rst. The working set is
kubelet's: usage less inactive file pages. On v1, PSI comes from the unified hierarchy if the cgroup exists there too.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from colocate.cgroup.knobfiles import read_knob
from colocate.cgroup.layout import UNIFIED
from colocate.cgroup.port import FilePort
from colocate.cgroup.tree import joined, processes_below
from colocate.knob import HELD
from colocate.snapshot import Tier, Workload

INACTIVE_FILE_SECONDS = QUOTA_SECONDS = 5.0
INACTIVE_FILE_MOVED_RATIO = 1 / 64


class InactiveFile(NamedTuple):
    """A reading of inactive file pages, with the usage and the time at which it was taken."""

    inode: int
    usage_bytes: int
    bytes: int
    mapped_bytes: int
    at_seconds: float
    stalled_us: int | None
    """Of its memory pressure: a service that stalls is looked at closely."""

    def good(self, inode: int, usage_bytes: int, stalled_us: int | None, now: float) -> bool:
        """Whether it still stands: memory.stat costs as much as all other files of a cgroup together."""
        moved = abs(usage_bytes - self.usage_bytes) > INACTIVE_FILE_MOVED_RATIO * self.usage_bytes
        same = inode == self.inode and stalled_us == self.stalled_us
        return same and not moved and 0 <= now - self.at_seconds < INACTIVE_FILE_SECONDS


class FilePages:
    """The latest reading of each cgroup that is only watched; what is governed is read anew each time."""

    def __init__(self) -> None:
        self._kept: dict[str, InactiveFile] = {}
        self._hits: dict[str, tuple[int, int | None, int | None]] = {}
        self._unlimited: dict[str, tuple[int, float, int | None]] = {}
        """Cgroup without a CPU quota (v1) -> inode, when that was read, and its throttled time, which stands still."""
        self._stalls: dict[str, tuple[int, int | None, int | None]] = {}
        """Cgroup below a common group -> inode and its (some, full) memory pressure."""
        self._above: tuple[str, int | None] = ("", None)
        self._group = ""
        self.now = 0.0

    def look_above(self, port: FilePort, group: str) -> None:
        """Read the memory pressure of a group of many: while its `some` stands still, so does that of all below it.

        A task that stalls stalls in its cgroup and in all above (Documentation/accounting/psi.rst). A reading adds up
        what every CPU of the machine saw, so that one for each pod is dear on large ones.
        """
        some, _ = parse_pressure(port.read(UNIFIED, group, "memory.pressure"))
        self._group = f"{group}/"
        if some is None or (group, some) != self._above:
            self._stalls = {}
        self._above = (group, some)

    def memory_pressure(self, port: FilePort, path: str, inode: int) -> tuple[int | None, int | None]:
        """(some, full) of a cgroup in microseconds."""
        if not self._group or not path.startswith(self._group):
            return parse_pressure(port.read(UNIFIED, path, "memory.pressure", inode))
        kept = self._stalls.get(path)
        if kept is None or kept[0] != inode:
            read = parse_pressure(port.read(UNIFIED, path, "memory.pressure", inode))
            kept = self._stalls[path] = (inode, *read)
        return kept[1:]

    def keep(
        self, path: str, inode: int, usage_bytes: int, stalled_us: int | None, inactive_bytes: int, mapped_bytes: int
    ) -> None:
        """Note a reading."""
        self._kept[path] = InactiveFile(inode, usage_bytes, inactive_bytes, mapped_bytes, self.now, stalled_us)

    def known(self, path: str, inode: int, usage_bytes: int, stalled_us: int | None) -> tuple[int, int] | None:
        """Inactive and mapped bytes of a reading that still stands."""
        kept = self._kept.get(path)
        if kept is None or not kept.good(inode, usage_bytes, stalled_us, self.now):
            return None
        return kept.bytes, kept.mapped_bytes

    def limit_hits(self, port: FilePort, path: str, inodes: dict[str, int], stalled_us: int | None) -> int | None:
        """How often a cgroup met its own limit: read anew only when it has stalled since, else it stands."""
        inode = inodes.get(port.layout.hierarchy("memory") or "", 0)
        kept = self._hits.get(path)
        if kept is None or kept[0] != inode or kept[1] is None or kept[1] != stalled_us:
            kept = self._hits[path] = (inode, stalled_us, limit_hits(port, path, inodes))
        return kept[2]

    def throttled(self, port: FilePort, path: str, hierarchy: str, inode: int) -> int | None:
        """Nanoseconds that a cgroup was throttled for (v1); without a quota that stands still, and is seldom read."""
        kept = self._unlimited.get(path)
        if kept is not None and kept[0] == inode and 0 <= self.now - kept[1] < QUOTA_SECONDS:
            return kept[2]
        throttled = _throttled(port, path, hierarchy, inode)
        if (port.read(hierarchy, path, "cpu.cfs_quota_us", inode) or "").startswith("-1"):
            self._unlimited[path] = (inode, self.now, throttled)
        else:
            self._unlimited.pop(path, None)
        return throttled

    def forget_others(self, paths: Collection[str]) -> None:
        """Only these cgroups are left."""
        self._hits = {path: kept for path, kept in self._hits.items() if path in paths}
        self._unlimited = {path: kept for path, kept in self._unlimited.items() if path in paths}
        self._stalls = {path: kept for path, kept in self._stalls.items() if path in paths}
        if len(self._kept) > len(paths):
            self._kept = {path: kept for path, kept in self._kept.items() if path in paths}


def parse_pressure(text: str | None) -> tuple[int | None, int | None]:
    """(some, full) totals in microseconds of a pressure file; None where absent."""
    if not text or not text.startswith("some "):
        return None, None
    first, _, rest = text.partition("\n")
    full = int(rest.rpartition("total=")[2]) if rest.startswith("full ") else None
    return int(first.rpartition("total=")[2]), full


def parse_flat_keyed(text: str | None, *keys: str) -> list[int | None]:
    """The values of the wanted keys of a flat keyed file (cpu.stat, memory.stat), None where absent."""
    found: list[int | None] = []
    padded = f"\n{text or ''}"
    for key in keys:
        at = padded.find(f"\n{key} ")
        if at < 0:
            found.append(None)
            continue
        start = at + len(key) + 2
        end = padded.find("\n", start)
        found.append(int(padded[start : end if end >= 0 else None]))
    return found


def limit_hits(port: FilePort, path: str, inodes: dict[str, int]) -> int | None:
    """How often a cgroup, or one below it, met its own memory limit or high mark; None if the kernel does not say.

    memory.events (hierarchical); on v1 memory.failcnt of it and of its children.
    """
    hierarchy = port.layout.hierarchy("memory")
    if hierarchy not in inodes:
        return None
    if hierarchy == UNIFIED:
        counts = parse_flat_keyed(port.read(hierarchy, path, "memory.events", inodes[hierarchy]), "high", "max")
        return None if counts == [None, None] else sum(c or 0 for c in counts)
    paths = [path, *(joined(path, c) for c in port.children(hierarchy, path))]
    texts = [port.read(hierarchy, p, "memory.failcnt") for p in paths]
    return sum(int(t) for t in texts if t) if any(texts) else None


def oom_kills(port: FilePort, path: str, inodes: dict[str, int]) -> tuple[int, bool]:
    """How many processes of a cgroup the OOM killer ended, and whether the cgroup's own limit was ever reached.

    memory.events and memory.events.local; on v1 memory.oom_control (since Linux 4.13) and memory.failcnt.
    """
    hierarchy = port.layout.hierarchy("memory")
    if hierarchy not in inodes:
        return 0, False
    v2, inode = hierarchy == UNIFIED, inodes[hierarchy]
    events = port.read(hierarchy, path, "memory.events" if v2 else "memory.oom_control", inode)
    (killed,) = parse_flat_keyed(events, "oom_kill")
    if v2:
        (reached,) = parse_flat_keyed(port.read(hierarchy, path, "memory.events.local", inode), "oom")
    else:
        reached = int(port.read(hierarchy, path, "memory.failcnt", inode) or 0)
    return killed or 0, bool(reached)


def _cpu_v2(port: FilePort, path: str, inode: int) -> dict[str, Any]:
    usage, throttled = parse_flat_keyed(port.read(UNIFIED, path, "cpu.stat", inode), "usage_usec", "throttled_usec")
    return {"cpu_usage_us": usage, "throttled_us": throttled}


def _throttled(port: FilePort, path: str, hierarchy: str, inode: int) -> int | None:
    (found,) = parse_flat_keyed(port.read(hierarchy, path, "cpu.stat", inode), "throttled_time")
    return found


def _cpu_v1(port: FilePort, path: str, inodes: dict[str, int], pages: FilePages | None) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    controllers = port.layout.controllers
    cpuacct, cpu = controllers.get("cpuacct"), controllers.get("cpu")
    if cpuacct in inodes:
        usage = port.read(cpuacct, path, "cpuacct.usage", inodes[cpuacct])
        figures["cpu_usage_us"] = int(usage) // 1000 if usage else None
    if cpu is not None and cpu in inodes:
        read = _throttled if pages is None else pages.throttled
        throttled = read(port, path, cpu, inodes[cpu])
        figures["throttled_us"] = None if throttled is None else throttled // 1000
    return figures


def _memory(
    port: FilePort, path: str, inodes: dict[str, int], pages: FilePages | None, stalled_us: int | None, *, service: bool
) -> dict[str, Any]:
    """A service's mapped file pages are in use, though nobody has looked at them yet: only reclaim activates them.

    `mapped` counts shared memory and active pages too, which may be all that is mapped: what is sure is the rest.
    """
    hierarchy = port.layout.hierarchy("memory")
    if hierarchy not in inodes:
        return {}
    inode = inodes[hierarchy]
    v2 = hierarchy == UNIFIED
    text = port.read(hierarchy, path, "memory.current" if v2 else "memory.usage_in_bytes", inode)
    if not text:
        return {}
    usage = int(text)
    known = pages.known(path, inode, usage, stalled_us) if pages is not None else None
    if known is None:
        stat, total = port.read(hierarchy, path, "memory.stat", inode), "" if v2 else "total_"
        keys = ("inactive_file", "file_mapped" if v2 else "mapped_file", "shmem", "active_file")
        inactive, *others = parse_flat_keyed(stat, *(total + key for key in keys))
        mapped, shared, active = (v or 0 for v in others)
        known = inactive or 0, max(mapped - shared - active, 0)
        if pages is not None and inactive is not None:
            pages.keep(path, inode, usage, stalled_us, *known)
    in_use = min(known) if service else 0
    return {"memory_bytes": usage, "working_set_bytes": max(usage - known[0] + in_use, 0), "mapped_bytes": in_use}


def read_workload(
    port: FilePort,
    *,
    id_: str,
    name: str,
    tier: Tier,
    path: str,
    inodes: dict[str, int],
    pages: FilePages | None = None,
    **known: Any,
) -> Workload | None:
    """The workload's figures now; None if its cgroup is gone. `known` is passed into the Workload as it is."""
    main = port.layout.hierarchy("cpu")
    main = main if main in inodes else next(iter(inodes), None)
    if main is None:
        return None
    governed = tier in ("batch", "tier")
    v2 = port.layout.version == 2
    figures = _cpu_v2(port, path, inodes[UNIFIED]) if v2 else _cpu_v1(port, path, inodes, None if governed else pages)
    if figures.get("cpu_usage_us") is None and port.read(main, path, "cgroup.procs", inodes[main]) is None:
        return None
    if UNIFIED in inodes and "psi" in port.layout.controllers:
        inode = inodes[UNIFIED]
        figures["cpu_pressure_us"], _ = parse_pressure(port.read(UNIFIED, path, "cpu.pressure", inode))
        if pages is None:
            memory = parse_pressure(port.read(UNIFIED, path, "memory.pressure", inode))
        else:
            memory = pages.memory_pressure(port, path, inode)
        figures["memory_pressure_us"], figures["memory_pressure_full_us"] = memory
    service, stalled = tier == "service", figures.get("memory_pressure_us")
    figures.update(_memory(port, path, inodes, None if governed else pages, stalled, service=service))
    if service and pages is not None:
        figures["memory_limit_hits"] = pages.limit_hits(port, path, inodes, stalled)
    if governed:
        knobs = {k: read_knob(port, path, k, inodes) for k in HELD}
        figures["knobs"] = {k: v for k, v in knobs.items() if v is not None}
        figures["frozen"] = figures["knobs"].get("cgroup.freeze") == "1"
        figures["processes"] = len(processes_below(port, main, path))
    figures.update(known)
    return Workload(id=id_, name=name, tier=tier, path=path, inodes=inodes, **figures)
