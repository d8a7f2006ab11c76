"""Joins the collectors into a NodeSnapshot. One collector failing marks its section stale; the tick goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import structlog

from colocate.cgroup.layout import UNIFIED
from colocate.cgroup.port import FilePort
from colocate.cgroup.tree import Tree, find_tree, inodes_of, main_hierarchy, processes_below, start_time
from colocate.errors import HostUnfit
from colocate.observe import node as node_figures
from colocate.observe.cgroup import FilePages, read_workload
from colocate.observe.latency import LatencyScraper
from colocate.observe.neighbourhood import reserved_cpus, strangers_us
from colocate.observe.pods import PodLister
from colocate.observe.powercap import CpuMeter
from colocate.observe.schedstat import RunDelays
from colocate.observe.signal import SignalFile
from colocate.observe.workloads import Target, Units, discover
from colocate.policy.schema import BatchPolicy, ColocationPolicy, ServicePolicy
from colocate.snapshot import Card, NodeSnapshot, Objective, Workload

log = structlog.get_logger()
REDISCOVER_TREE_SECONDS = 10.0
INODES_AGAIN_SECONDS = 60.0
TICKS_A_SECOND = 100
"""USER_HZ, in which /proc counts."""


class _Found:
    """A cgroup in all hierarchies, as it was looked up last."""

    def __init__(self, main: int | None, now: float) -> None:
        self.main, self.since, self.again = main, now, now
        self.inodes: dict[str, int] = {}


class Observer:
    """Makes one NodeSnapshot a tick."""

    def __init__(
        self,
        port: FilePort,
        policy: ColocationPolicy,
        jobs: Callable[[], dict[str, dict[str, Any]]],
        scraper: LatencyScraper,
        monotonic: Callable[[], float] | None = None,
    ) -> None:
        """`monotonic` tells when a workload was read; without it, all are read at the snapshot's time."""
        self._port, self._jobs, self._scraper, self._monotonic = port, jobs, scraper, monotonic
        self.policy = policy
        self.lister = PodLister()
        self.capacity = node_figures.capacity(port, policy.spec.node_root)
        self.tree: Tree = find_tree(port, policy.spec.node_root)
        self.problems: dict[str, str] = {}
        self.objectives: dict[str, Objective] = {}
        """Objectives of services whose readings do not come by a URL of the policy."""
        self.extra_problems: dict[str, str] = {}
        """Problems of the shell (an invalid policy file), shown with the others."""
        self.vanished = 0
        self.long_waits: Callable[[str, float], int | None] = lambda _id, _at: None
        """What is known of a service's long waits: its id and the time -> microseconds so far."""
        self.cards: Callable[[list[Target]], dict[str, Card]] = lambda _targets: {}
        """Who is on which card; on a node without GPUs there is none, and nothing of theirs is imported."""
        self.power_share = 0
        """Watts that the cluster leaves to this node; 0: it says nothing."""
        self.looks_for_strangers = False
        """Whether it matters who else uses the CPUs."""
        self._last: dict[str, tuple[float, Any]] = {}
        """section -> when it was read last, and what it said."""
        self._failing: set[str] = set()
        self._workloads_before: dict[str, Workload] = {}
        self._delays = RunDelays()
        self._units = Units()
        self._started: dict[str, tuple[dict[str, int], float]] = {}
        self._reserved: tuple[int, ...] = ()
        self._tree_at = float("-inf")
        self._sequence = 0
        self._at = 0.0
        self._inodes: dict[str, _Found] = {}
        self._pages = FilePages()
        self._signal = SignalFile()
        self._meter = CpuMeter()
        self._targets: list[Target] = []
        self._governed: set[str] = set()
        """The cgroups of batch in place, as of the last tick."""

    def _now(self) -> float:
        return round(self._monotonic(), 6) if self._monotonic is not None else self._at

    def _section(self, name: str, collect: Callable[[], Any], otherwise: Any) -> tuple[float, Any]:
        """When it was read, and what it says: that of an earlier time if the collector fails now."""
        try:
            self._last[name] = (self._now(), collect())
            self._failing.discard(name)
        except (OSError, ValueError, IndexError) as error:
            if name not in self._failing:
                log.warning("collector_failed", section=name, error=str(error))
            self._failing.add(name)
            self._last.setdefault(name, (self._at, otherwise))
        return self._last[name]

    def _capabilities(self) -> tuple[str, ...]:
        layout, offered = self._port.layout, []
        if layout.hierarchy("psi"):
            offered.append("psi")
        if layout.hierarchy("freeze"):
            offered.append("freeze")
        if layout.hierarchy("kill"):
            offered.append("kill")
        if layout.version == 2 and layout.hierarchy("memory"):
            offered += ["memory.high", "memory.reclaim"]
        elif layout.hierarchy("memory"):
            offered.append("memory.max")
        if layout.hierarchy("cpuset"):
            offered.append("cpuset")
        return tuple(offered)

    def _read(self, target: Target) -> Workload | None:
        known, at = dict(target.known), self._now()
        psi = "psi" in self._port.layout.controllers and UNIFIED in target.inodes
        if target.tier == "service":
            entry = target.entry or target.name
            if entry in self.objectives:
                known["objective"] = self.objectives[entry]
            if entry in self._scraper.readings:
                known["latency"] = self._scraper.readings[entry]
            known["long_waits_us"] = self.long_waits(target.id, at)
        if target.tier != "batch" and (target.pids is not None or not psi):
            pids = target.pids
            if pids is None:
                pids = tuple(processes_below(self._port, next(iter(target.inodes)), target.path))
            known["waited_us"] = self._delays.waited_us(self._port, target.id, pids, at)
        if target.in_place:
            known["started_seconds"] = self._started_seconds(target)
        tier: Any = target.tier
        workload = read_workload(
            self._port,
            id_=target.id,
            name=target.name,
            tier=tier,
            path=target.path,
            inodes=target.inodes,
            pages=self._pages,
            at_seconds=at,
            **known,
        )
        if workload is None:
            self.vanished += 1
        elif target.pids is not None and workload.waited_us is not None:
            # The cgroup of chosen processes may be shared: what they themselves waited is what counts.
            workload = msgspec.structs.replace(workload, cpu_pressure_us=None)
        return workload

    def _read_or_keep(self, target: Target) -> Workload | None:
        """One unreadable cgroup is stale by itself: what was known of it stays, with its old time."""
        try:
            return self._read(target)
        except (OSError, ValueError, IndexError) as error:
            self.problems[target.id] = f"{target.name}: {target.path} cannot be read: {error}"
            before = self._workloads_before.get(target.id)
            return before if before is not None and before.inodes == target.inodes else None

    def _started_seconds(self, target: Target) -> float:
        """Monotonic time at which the oldest process of a cgroup started; 0 if it has none."""
        kept = self._started.get(target.path)
        if kept is not None and kept[0] == target.inodes and kept[1]:
            return kept[1]
        pids = processes_below(self._port, next(iter(target.inodes)), target.path)
        starts = [s for pid in pids if (s := start_time(self._port, pid)) is not None]
        uptime = (self._port.proc("/proc/uptime") or "").split()
        boot = self._at - float(uptime[0]) if uptime else 0.0  # /proc counts from the boot, suspended time included
        found = round(boot + min(starts) / TICKS_A_SECOND, 3) if starts else 0.0
        self._started[target.path] = (target.inodes, found)
        return found

    def _workloads(self) -> dict[str, Workload]:
        targets, self.problems = discover(
            self._port,
            self.tree,
            self.policy.spec,
            self._jobs(),
            self._known_inodes,
            self.lister.pods,
            self._governed,
            self._units,
            self._at,
            evictable=self.lister.expected,
        )
        self._governed = {t.path for t in targets if t.in_place}
        paths = {t.path for t in targets}
        self._inodes = {path: found for path, found in self._inodes.items() if path in paths}
        self._pages.forget_others(self._inodes)
        self._pages.now = self._at
        if self.tree.burstable and "psi" in self._port.layout.controllers:
            self._pages.look_above(self._port, self.tree.burstable)
        self.problems.update(self.extra_problems)
        if self.lister.problem:
            self.problems["kubelet"] = self.lister.problem
        self._targets = targets
        self._delays.forget_others(t.id for t in targets)
        found = [self._read_or_keep(t) for t in targets if t.inodes]
        self._workloads_before = {w.id: w for w in found if w is not None}
        return self._workloads_before

    def _strangers(self) -> dict[str, int]:
        if not self.looks_for_strangers:
            return {}
        return strangers_us(self._port, self.tree, (t.path for t in self._targets))

    def _known_inodes(self, path: str, main_inode: int | None = None) -> dict[str, int]:
        """The inodes of a cgroup. They are not looked up in each tick: ten stat calls a cgroup add up.

        Whoever makes a cgroup on v1 makes it in one hierarchy after the other, and we may look in between: a new one is
        looked at again soon, and then less and less often.
        """
        main = main_inode or self._port.inode(main_hierarchy(self._port), path)
        known = self._inodes.get(path)
        if known is None or known.main != main:
            known = self._inodes[path] = _Found(main, self._at)
        if self._at >= known.again:
            known.inodes = inodes_of(self._port, path)
            known.again = self._at + min(self._at - known.since, INODES_AGAIN_SECONDS)
        return known.inodes

    def watched(self, snapshot: NodeSnapshot) -> dict[str, tuple[str, int]]:
        """The few cgroups whose memory pressure is looked at between ticks: id -> (path, inode in the unified one).

        Services of the policy and Guaranteed pods each by itself, all Burstable pods by their common group.
        """
        burstable = self.tree.burstable
        found = {}
        for workload in snapshot.of("service"):
            if UNIFIED in workload.inodes and not (
                workload.id.startswith("pod:") and burstable and workload.path.startswith(f"{burstable}/")
            ):
                found[workload.id] = (workload.path, workload.inodes[UNIFIED])
        if burstable and UNIFIED in self._port.layout.mounts:
            inode = self._port.inode(UNIFIED, burstable)
            if inode is not None:
                found["burstable"] = (burstable, inode)
        return found

    def _discover_tree(self) -> tuple[node_figures.Capacity, Tree]:
        root = self.policy.spec.node_root
        self.extra_problems.pop("tree", None)
        try:
            tree = find_tree(self._port, root)
        except HostUnfit as error:
            self.extra_problems["tree"], tree = str(error), self.tree
        return node_figures.capacity(self._port, root), tree

    def _cpu_watts(self) -> float | None:
        """Read only where a budget needs it."""
        power = self.policy.spec.power
        self.extra_problems.pop("cpu power", None)
        if not power.cpu_budget:
            self._meter.forget()
            return None
        found = self._meter.watts(Path(power.powercap), self._now())
        if self._meter.problem:
            self.extra_problems["cpu power"] = f"power.cpuBudget is not watched: {self._meter.problem}"
        return found

    def _say_of_signal(self) -> None:
        self.extra_problems.pop("power signal", None)
        if self._signal.problem:
            self.extra_problems["power signal"] = f"{self._signal.problem}: the whole power budget counts"

    def _tier(self) -> Workload | None:
        inodes = inodes_of(self._port, self.tree.tier_path)
        if not inodes:
            return None
        path = self.tree.tier_path
        return read_workload(
            self._port, id_="tier", name="tier", tier="tier", path=path, inodes=inodes, at_seconds=self._now()
        )

    def refresh_pods(self) -> None:
        """Ask the kubelet for its pods, in the background, if a selector needs them."""
        spec = self.policy.spec
        entries: list[ServicePolicy | BatchPolicy] = [*spec.services, *spec.batch]
        if self.lister.expected:
            return
        if any(e.selector.pod_selector is not None for e in entries):
            self.lister.refresh(spec.kubelet)
        else:
            self.lister.forget()

    def snapshot(self, time_seconds: float, monotonic_seconds: float) -> NodeSnapshot:
        """Everything known now. Times are given, so that a model's clock can stand in."""
        self._sequence += 1
        self._at = round(monotonic_seconds, 6)
        if not 0 <= self._at - self._tree_at < REDISCOVER_TREE_SECONDS:
            self._tree_at = self._at
            _, (self.capacity, self.tree) = self._section("tree", self._discover_tree, (self.capacity, self.tree))
            rediscovered = True
        else:
            rediscovered = False
        have = self.capacity
        node_at, figures = self._section(
            "node",
            lambda: node_figures.figures(self._port, self.tree.root, have.cpus, have.memory_bytes),
            node_figures.NodeFigures(None, None, None, 0, {}),
        )
        workloads_at, workloads = self._section("workloads", self._workloads, {})
        tier_at, tier = self._section("tier", self._tier, None)
        if rediscovered:
            _, self._reserved = self._section(
                "reserved", lambda: reserved_cpus(self._port, self.tree, have.cpus, self._targets), ()
            )
        signal = self._signal.value(self.policy.spec.power.signal, time_seconds, monotonic_seconds)
        self._say_of_signal()
        ages = {"node": node_at, "workloads": workloads_at, "tier": tier_at}
        return NodeSnapshot(
            sequence=self._sequence,
            time_seconds=round(time_seconds, 3),
            monotonic_seconds=self._at,
            cgroup_version=self._port.layout.version,
            cpus=have.cpus,
            cores=have.cores,
            memory_bytes=have.memory_bytes,
            node_at_seconds=node_at,
            cpu_busy_us=figures.cpu_busy_us,
            cpu_idle_us=figures.cpu_idle_us,
            cpu_idle_each_us=figures.cpu_idle_each_us,
            memory_available_bytes=figures.memory_available_bytes,
            swap_free_bytes=figures.swap_free_bytes,
            reserved_cpus=self._reserved,
            strangers_us=self._section("strangers", self._strangers, {})[1],
            workloads=workloads,
            tier=tier,
            cpu_watts=self._cpu_watts(),
            power_share=self.power_share,
            power_signal=signal,
            power_ahead=() if signal is None else self._signal.ahead(self.policy.spec.power.signal, time_seconds),
            cards=self._section("cards", lambda: self.cards(self._targets), {})[1],
            stale_seconds={name: round(self._at - at, 6) for name, at in ages.items() if name in self._failing},
            capabilities=self._capabilities(),
        )
