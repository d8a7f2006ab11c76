"""Joins the collectors into a NodeSnapshot. One collector failing marks its section stale; the tick goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import structlog

from colocate.cgroupfs import UNIFIED, FilePort, processes
from colocate.config import BatchPolicy, ColocationPolicy, ServicePolicy
from colocate.observe import node as node_figures
from colocate.observe.cgroup import FilePages, inodes_of, read_workload
from colocate.observe.latency import LatencyScraper
from colocate.observe.pods import PodLister
from colocate.observe.schedstat import run_delay_us
from colocate.observe.workloads import Target, Tree, discover, find_tree, main_hierarchy
from colocate.snapshot import NodeSnapshot, Objective, Workload

log = structlog.get_logger()
REDISCOVER_TREE_EVERY = 10


class Observer:
    """Makes one NodeSnapshot a tick."""

    def __init__(
        self,
        port: FilePort,
        policy: ColocationPolicy,
        jobs: Callable[[], dict[str, dict[str, Any]]],
        scraper: LatencyScraper,
    ) -> None:
        self._port, self._jobs, self._scraper = port, jobs, scraper
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
        self._stale: dict[str, int] = {}
        self._last: dict[str, Any] = {}
        self._sequence = 0
        self._inodes: dict[str, dict[str, int]] = {}
        self._pages = FilePages()
        self._governed: set[str] = set()
        """The cgroups of batch in place, as of the last tick."""

    def _section(self, name: str, collect: Callable[[], Any], otherwise: Any) -> Any:
        try:
            self._last[name] = collect()
            self._stale.pop(name, None)
        except (OSError, ValueError, IndexError) as error:
            self._stale[name] = self._stale.get(name, 0) + 1
            if self._stale[name] == 1:
                log.warning("collector_failed", section=name, error=str(error))
        return self._last.get(name, otherwise)

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
        known = dict(target.known)
        if target.tier == "service":
            entry = target.entry or target.name
            if entry in self.objectives:
                known["objective"] = self.objectives[entry]
            if entry in self._scraper.readings:
                known["latency"] = self._scraper.readings[entry]
            if target.pids is not None:
                known["run_delay_us"] = run_delay_us(self._port, target.pids)
            elif known.get("objective") is not None or "psi" not in self._port.layout.controllers:
                hierarchy = next(iter(target.inodes))
                pids = processes(self._port, hierarchy, target.path)
                known["run_delay_us"] = run_delay_us(self._port, pids)
        tier: Any = target.tier
        workload = read_workload(
            self._port,
            id_=target.id,
            name=target.name,
            tier=tier,
            path=target.path,
            inodes=target.inodes,
            pages=self._pages,
            **known,
        )
        if workload is None:
            self.vanished += 1
        return workload

    def _workloads(self) -> dict[str, Workload]:
        targets, self.problems = discover(
            self._port,
            self.tree,
            self.policy.spec,
            self._jobs(),
            self._known_inodes,
            self.lister.pods,
            self._governed,
        )
        self._governed = {t.path for t in targets if t.in_place}
        self._inodes = {t.path: t.inodes for t in targets}
        self._pages.forget_others(self._inodes)
        self._pages.tick = self._sequence
        self.problems.update(self.extra_problems)
        if self.lister.problem:
            self.problems["kubelet"] = self.lister.problem
        found = (self._read(t) for t in targets if t.inodes)
        return {w.id: w for w in found if w is not None}

    def _known_inodes(self, path: str, main_inode: int | None = None) -> dict[str, int]:
        """The inodes of a cgroup, looked up anew only if its main one is another: ten stat calls a cgroup add up."""
        known = self._inodes.get(path)
        main = main_hierarchy(self._port)
        if known and main in known and (main_inode or self._port.inode(main, path)) == known[main]:
            return known
        return inodes_of(self._port, path)

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
        return node_figures.capacity(self._port, root), find_tree(self._port, root)

    def _tier(self) -> Workload | None:
        inodes = inodes_of(self._port, self.tree.tier_path)
        if not inodes:
            return None
        return read_workload(self._port, id_="tier", name="tier", tier="tier", path=self.tree.tier_path, inodes=inodes)

    def refresh_pods(self) -> None:
        """Ask the kubelet for its pods, in the background, if a selector needs them."""
        spec = self.policy.spec
        entries: list[ServicePolicy | BatchPolicy] = [*spec.services, *spec.batch]
        if any(e.selector.pod_selector is not None for e in entries):
            self.lister.refresh(spec.kubelet)
        else:
            self.lister.forget()

    def snapshot(self, time_seconds: float, monotonic_seconds: float) -> NodeSnapshot:
        """Everything known now. Times are given, so that a model's clock can stand in."""
        self._sequence += 1
        if self._sequence % REDISCOVER_TREE_EVERY == 1:
            self.capacity, self.tree = self._section("tree", self._discover_tree, (self.capacity, self.tree))
        have = self.capacity
        figures = self._section(
            "node",
            lambda: node_figures.figures(self._port, self.tree.root, have.cpus, have.memory_bytes),
            node_figures.NodeFigures(None, None, None, 0, {}),
        )
        return NodeSnapshot(
            sequence=self._sequence,
            time_seconds=round(time_seconds, 3),
            monotonic_seconds=round(monotonic_seconds, 6),
            cgroup_version=self._port.layout.version,
            cpus=have.cpus,
            cores=have.cores,
            memory_bytes=have.memory_bytes,
            cpu_busy_us=figures.cpu_busy_us,
            cpu_idle_us=figures.cpu_idle_us,
            cpu_idle_each_us=figures.cpu_idle_each_us,
            memory_available_bytes=figures.memory_available_bytes,
            swap_free_bytes=figures.swap_free_bytes,
            workloads=self._section("workloads", self._workloads, {}),
            tier=self._section("tier", self._tier, None),
            stale_ticks=dict(self._stale),
            capabilities=self._capabilities(),
        )
