"""One cgroup of the model in one hierarchy, and what the kernel allows to be written into its files.

Transcribed from kernel/sched/core.c (shares, idle, bandwidth), kernel/cgroup/{cgroup,cpuset,cpuset-v1}.c,
mm/memcontrol{,-v1}.c; held against the real kernel by tests/kernel/test_model_differential.py.
"""

from __future__ import annotations

import errno

from colocate.units import format_cpulist, parse_cpulist

PAGE = 4096
UNLIMITED_V1 = 0x7FFFFFFFFFFFF000
QUOTA_MIN_US = 1000
QUOTA_MAX_US = 1_000_000
SHARES_MAX = 262144


def refuse(number: int, why: str) -> OSError:
    """The error that the kernel would return."""
    return OSError(number, why)


class Group:
    """The settings of a cgroup. Fields are in the kernel's units; None is `max`."""

    def __init__(self, parent: Group | None, inode: int, unified: bool, cpus: tuple[int, ...]) -> None:
        self.parent, self.inode, self.unified = parent, inode, unified
        self.children: dict[str, Group] = {}
        self.weight = 100
        self.shares = 1024
        self.idle = False
        self.quota_us: int | None = None
        self.period_us = 100_000
        self.cpus: tuple[int, ...] = cpus if parent is None else ()
        self.mems = "0" if parent is None else ""
        self.memory_max: int | None = None
        self.memory_high: int | None = None
        self.frozen = False
        self.controllers: set[str] = set()
        """cgroup.subtree_control"""
        self.removed = False

    def effective_cpus(self) -> tuple[int, ...]:
        """CPUs that tasks here may use."""
        if self.parent is None:
            return self.cpus
        above = self.parent.effective_cpus()
        mine = tuple(c for c in self.cpus if c in above)
        return mine or above if self.unified else mine

    def frozen_here(self) -> bool:
        """Whether this or any ancestor is frozen."""
        return self.frozen or (self.parent is not None and self.parent.frozen_here())

    def scheduler_weight(self) -> float:
        """The weight among siblings, in shares."""
        if self.idle:
            return 3.0
        return self.weight * 10.24 if self.unified else float(self.shares)

    # -- writing -----------------------------------------------------------------------------------------------

    def write_weight(self, text: str) -> None:
        """cpu.weight."""
        value = _integer(text)
        if not 1 <= value <= 10000:
            raise refuse(errno.ERANGE, "cpu.weight is 1 to 10000")
        if self.idle:
            raise refuse(errno.EINVAL, "weight of an idle group")
        self.weight = value

    def write_shares(self, text: str) -> None:
        """cpu.shares: clamped, not refused."""
        value = _integer(text)
        if self.idle or self.parent is None:
            raise refuse(errno.EINVAL, "shares of an idle group or the root")
        self.shares = min(max(value, 2), SHARES_MAX)

    def write_idle(self, text: str) -> None:
        """cpu.idle: clearing it leaves weight 100 (shares 1024), not the old value."""
        value = _integer(text)
        if value not in (0, 1):
            raise refuse(errno.EINVAL, "cpu.idle is 0 or 1")
        if self.idle and not value:
            self.weight, self.shares = 100, 1024
        self.idle = bool(value)

    def write_max(self, text: str) -> None:
        """cpu.max: `max` or a quota, and optionally a period."""
        fields = text.split()
        if not 1 <= len(fields) <= 2:
            raise refuse(errno.EINVAL, "cpu.max")
        period = _integer(fields[1]) if len(fields) == 2 else self.period_us
        quota = None if fields[0] == "max" else _integer(fields[0])
        self._check_bandwidth(quota, period)
        self.quota_us, self.period_us = quota, period

    def write_quota(self, text: str) -> None:
        """cpu.cfs_quota_us: a child may not have a larger share than its parent, nor a parent than a child."""
        value = _integer(text)
        quota = None if value < 0 else value
        self._check_bandwidth(quota, self.period_us)
        if quota is not None:
            self._check_hierarchy(quota / self.period_us)
        elif (above := self._nearest_ratio()) is not None:
            # an unlimited child inherits its parent's bandwidth
            del above
        self.quota_us = quota

    def write_period(self, text: str) -> None:
        """cpu.cfs_period_us."""
        period = _integer(text)
        self._check_bandwidth(self.quota_us, period)
        if self.quota_us is not None:
            self._check_hierarchy(self.quota_us / period)
        self.period_us = period

    def _check_bandwidth(self, quota: int | None, period: int) -> None:
        if self.parent is None:
            raise refuse(errno.EINVAL, "the root has no bandwidth")
        if quota is not None and quota < QUOTA_MIN_US:
            raise refuse(errno.EINVAL, "quota below 1 ms")
        if not QUOTA_MIN_US <= period <= QUOTA_MAX_US:
            raise refuse(errno.EINVAL, "period not within 1 ms and 1 s")

    def _nearest_ratio(self) -> float | None:
        above = self.parent
        while above is not None:
            if above.quota_us is not None:
                return above.quota_us / above.period_us
            above = above.parent
        return None

    def _largest_below(self) -> float:
        found = 0.0
        for child in self.children.values():
            own = child.quota_us / child.period_us if child.quota_us is not None else child._largest_below()  # noqa: SLF001
            found = max(found, own)
        return found

    def _check_hierarchy(self, ratio: float) -> None:
        above = self._nearest_ratio()
        if above is not None and ratio > above + 1e-9:
            raise refuse(errno.EINVAL, "quota above the parent's")
        if self._largest_below() > ratio + 1e-9:
            raise refuse(errno.EINVAL, "quota below a child's")

    def write_cpus(self, text: str, occupied: bool) -> None:
        """cpuset.cpus."""
        try:
            cpus = parse_cpulist(text)
        except ValueError:
            raise refuse(errno.EINVAL, "not a CPU list") from None
        root: Group = self
        while root.parent is not None:
            root = root.parent
        if any(c not in root.cpus for c in cpus):
            raise refuse(errno.ERANGE, "no such CPU")
        if self.parent is None:
            raise refuse(errno.EACCES, "the root's CPUs are fixed")
        if not self.unified:
            if not cpus and occupied:
                raise refuse(errno.ENOSPC, "a cpuset with tasks needs CPUs")
            if any(c not in self.parent.cpus for c in cpus):
                raise refuse(errno.EACCES, "not a subset of the parent's CPUs")
            below = {c for child in self.children.values() for c in child.cpus}
            if below - set(cpus):
                raise refuse(errno.EBUSY, "a child has CPUs outside")
        self.cpus = cpus

    def write_mems(self, text: str, occupied: bool) -> None:
        """cpuset.mems; the model has one memory node."""
        if text.strip() not in ("", "0"):
            raise refuse(errno.EINVAL, "no such memory node")
        if not text.strip() and occupied:
            raise refuse(errno.ENOSPC, "a cpuset with tasks needs memory nodes")
        self.mems = text.strip()

    def write_memory_max(self, text: str, usage: int) -> None:
        """memory.max: accepted below usage, which then is reclaimed or killed; v1's limit is EBUSY instead."""
        value = self._memory(text)
        if not self.unified and value is not None and value < usage:
            raise refuse(errno.EBUSY, "usage cannot be reclaimed below the limit")
        self.memory_max = value

    def write_memory_high(self, text: str) -> None:
        """memory.high."""
        self.memory_high = self._memory(text)

    def _memory(self, text: str) -> int | None:
        if self.parent is None:
            raise refuse(errno.EINVAL, "the root has no limit")
        word = text.strip()
        if word == ("max" if self.unified else "-1"):
            return None
        value = _integer(word)
        if value < 0:
            raise refuse(errno.EINVAL, "negative")
        return value // PAGE * PAGE

    def write_freeze(self, text: str) -> None:
        """cgroup.freeze."""
        value = _integer(text)
        if value not in (0, 1):
            raise refuse(errno.ERANGE, "cgroup.freeze is 0 or 1")
        self.frozen = bool(value)

    def write_freezer_state(self, text: str) -> None:
        """freezer.state."""
        if text.strip() not in ("FROZEN", "THAWED"):
            raise refuse(errno.EINVAL, "freezer.state")
        self.frozen = text.strip() == "FROZEN"

    # -- reading -----------------------------------------------------------------------------------------------

    def read_setting(self, file: str) -> str | None:
        """The text of a settings file, None if it is none."""
        quota = self.quota_us
        unlimited = "max" if self.unified else str(UNLIMITED_V1)
        texts = {
            "cpu.weight": "0" if self.idle else str(self.weight),
            "cpu.shares": "3" if self.idle else str(self.shares),
            "cpu.idle": str(int(self.idle)),
            "cpu.max": f"{'max' if quota is None else quota} {self.period_us}",
            "cpu.cfs_quota_us": str(-1 if quota is None else quota),
            "cpu.cfs_period_us": str(self.period_us),
            "cpuset.cpus": format_cpulist(self.cpus),
            "cpuset.mems": self.mems,
            "cpuset.cpus.effective": format_cpulist(self.effective_cpus()),
            "cpuset.effective_cpus": format_cpulist(self.effective_cpus()),
            "memory.max": unlimited if self.memory_max is None else str(self.memory_max),
            "memory.limit_in_bytes": unlimited if self.memory_max is None else str(self.memory_max),
            "memory.high": unlimited if self.memory_high is None else str(self.memory_high),
            "cgroup.freeze": str(int(self.frozen)),
            "freezer.state": "FROZEN" if self.frozen_here() else "THAWED",
        }
        return f"{texts[file]}\n" if file in texts else None


def _integer(text: str) -> int:
    word = text.strip()
    if not word.lstrip("-").isdigit():
        raise refuse(errno.EINVAL, "not a number")
    return int(word)
