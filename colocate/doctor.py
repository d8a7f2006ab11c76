"""doctor's probes: what this host offers, what each missing thing costs, and the mend.

Nothing is changed: only reading, `access(2)`, and writing a PSI trigger, which lives as long as its descriptor.
"""

from __future__ import annotations

import os
import shutil
from typing import Any, NamedTuple

from colocate.cgroup.layout import UNIFIED
from colocate.cgroup.port import KernelPort
from colocate.cgroup.tree import find_kubepods, find_tree, joined, main_hierarchy
from colocate.observe.neighbourhood import reserved_cpus
from colocate.observe.node import capacity, has_amd, has_nvidia
from colocate.observe.peers import PEERS, peers
from colocate.observe.workloads import Target
from colocate.units import format_cpulist

LEAST_CHECKPOINT_DRIVER = 570
"""Its checkpoint interface locks processes (CUDA driver API, 6.37)."""


class Check(NamedTuple):
    """One line of the doctor."""

    name: str
    ok: bool
    found: str
    cost: str = ""
    """What is lost without it."""
    mend: str = ""
    required: bool = False


def _first_child(port: KernelPort, hierarchy: str) -> str:
    """Any child cgroup: some files exist only below the root."""
    children = port.children(hierarchy, "/")
    return f"/{next(iter(children))}" if children else "/"


def _has(port: KernelPort, controller: str, *files: str) -> str:
    hierarchy = port.layout.hierarchy(controller)
    if hierarchy is None:
        return ""
    for path in ("/", _first_child(port, hierarchy)):
        for file in files:
            if os.path.exists(f"{port.layout.mounts[hierarchy]}{'' if path == '/' else path}/{file}"):
                return file
    return ""


def _cgroup(port: KernelPort) -> list[Check]:
    layout = port.layout
    main = layout.mounts.get(main_hierarchy(port), "") if layout.mounts else ""
    mounted = bool(layout.mounts)
    driver, parent = "none", main
    if mounted:
        kubepods = find_kubepods(port, "/")
        parent = f"{main}{kubepods or ''}"  # the root itself is writable for capabilities only, which we do without
        driver = "systemd" if (kubepods or "").endswith(".slice") else "cgroupfs" if kubepods else "plain host"
    writable = bool(main) and os.access(parent, os.W_OK)
    kinds = sorted(layout.controllers)
    return [
        Check(
            "cgroup version",
            mounted,
            f"v{layout.version}, {driver}" if mounted else "no cgroup file system is mounted",
            "no tier is possible",
            "mount -t cgroup2 none /sys/fs/cgroup",
            required=True,
        ),
        Check(
            "cgroups writable",
            writable,
            parent or "-",
            "no tier is possible for this user",
            "run as root, or in a delegated scope: systemd-run --user --scope -p Delegate=yes -- ...",
            required=True,
        ),
        Check(
            "cpu controller",
            "cpu" in kinds,
            layout.controllers.get("cpu", "-"),
            "batch cannot be held below services",
            "boot with the cpu controller (no cgroup_disable=cpu)",
            required=True,
        ),
        Check(
            "memory controller",
            "memory" in kinds,
            layout.controllers.get("memory", "-"),
            "the memory law is off",
            "boot with cgroup_enable=memory",
        ),
        Check(
            "cpuset controller",
            "cpuset" in kinds,
            layout.controllers.get("cpuset", "-"),
            "the cpuset rung is skipped",
            "enable cpuset in cgroup.subtree_control",
        ),
    ]


def _cpu(port: KernelPort) -> list[Check]:
    run_delay = port.proc("/proc/self/schedstat")
    return [
        Check("cpu.idle", bool(_has(port, "cpu", "cpu.idle")), _has(port, "cpu", "cpu.idle") or "-",
              "the idle class is no lever", "Linux 5.15 or newer"),
        Check("cfs burst", bool(_has(port, "cpu", "cpu.cfs_burst_us", "cpu.max.burst")),
              _has(port, "cpu", "cpu.cfs_burst_us", "cpu.max.burst") or "-",
              "quotas cost services more tail latency", "Linux 5.14 or newer"),
        Check("run delay", bool(run_delay), "/proc/<pid>/schedstat" if run_delay else "-",
              "waiting without PSI is invisible", "CONFIG_SCHED_INFO"),
    ]  # fmt: skip


def _pressure(port: KernelPort) -> list[Check]:
    psi = port.proc("/proc/pressure/cpu") is not None
    below = UNIFIED in port.layout.mounts and bool(_has(port, "psi", "memory.pressure"))
    trigger = ""
    try:
        fd = os.open("/proc/pressure/memory", os.O_RDWR | os.O_NONBLOCK)
    except OSError as error:
        trigger = error.strerror or "refused"
    else:
        try:
            os.write(fd, b"some 50000 500000\n")  # the last byte is cut off there
        except OSError as error:
            trigger = f"windows below 2 s: {error.strerror}"
        finally:
            os.close(fd)
    return [
        Check("PSI", psi, "/proc/pressure" if psi else "-", "memory pressure is seen late", "boot with psi=1"),
        Check("PSI per cgroup", below, "unified hierarchy" if below else "-",
              "services cannot be told apart by pressure", "mount the cgroup2 hierarchy"),
        Check("PSI triggers of 500 ms", not trigger, trigger or "allowed",
              "pressure totals are read every 100 ms instead (1-2 ms of CPU a second)", "CAP_SYS_RESOURCE"),
    ]  # fmt: skip


def _memory_and_freeze(port: KernelPort) -> list[Check]:
    v2 = port.layout.controllers.get("memory") == UNIFIED
    freeze = port.layout.hierarchy("freeze")
    swap = any(
        line.split()[1] != "0" for line in (port.proc("/proc/meminfo") or "").splitlines() if "SwapTotal" in line
    )
    return [
        Check("freeze", freeze is not None, freeze or "-", "the freeze rung is skipped", "mount the cgroup2 hierarchy"),
        Check("cgroup.kill", "kill" in port.layout.controllers, port.layout.controllers.get("kill", "-"),
              "jobs are killed process by process", "Linux 5.14 or newer, cgroup2 mounted"),
        Check("memory.high", v2, "memory.high" if v2 else "cgroup v1 has none",
              "the v1 ladder is used: limit, reclaim, checkpoint, evict", "cgroup v2"),
        Check("memory.reclaim", (v2 and bool(_has(port, "memory", "memory.reclaim"))) or
              bool(_has(port, "memory", "memory.force_empty")),
              _has(port, "memory", "memory.reclaim", "memory.force_empty") or "-",
              "the reclaim rung is skipped", "Linux 5.19 or newer"),
        Check("swap", swap, "on" if swap else "off", "freezing frees no memory, so that rung is skipped", "swapon"),
    ]  # fmt: skip


def _devices(port: KernelPort) -> list[Check]:
    io = [f for f in ("io.max", "io.weight", "io.cost.qos", "blkio.throttle.write_bps_device")
          if _has(port, "blkio", f)]  # fmt: skip
    htb = any("sch_htb" in (port.proc(f) or "") for f in ("/proc/modules",)) or os.path.exists("/sys/module/sch_htb")
    nvml = has_nvidia()
    rapl = bool(port.proc_list("/sys/class/powercap"))
    return [
        Check("disk control", bool(io), ", ".join(io) or "-", "disk use of batch is not limited", "the io controller"),
        Check("HTB", htb, "sch_htb" if htb else "-", "network use of batch is not limited", "modprobe sch_htb"),
        Check("nft", shutil.which("nft") is not None, shutil.which("nft") or "-",
              "pods cannot be classed on the network", "install nftables"),
        Check("NVML", nvml, "NVIDIA driver" if nvml else "-", "GPU work is not governed", "install the NVIDIA driver"),
        Check("powercap", rapl, "/sys/class/powercap" if rapl else "-", "power is not measured",
              "modprobe intel_rapl_msr"),
    ]  # fmt: skip


def _neighbours(port: KernelPort) -> list[Check]:
    names = {}
    for entry in port.proc_list("/proc"):
        if entry.isdigit():
            names[(port.proc(f"/proc/{entry}/comm") or "").strip()] = entry
    kubelet = "kubelet" in names
    runtimes = [n for n in ("containerd", "crio", "dockerd") if n in names]
    nri = any(os.path.exists(p) for p in ("/var/run/nri/nri.sock", "/run/nri/nri.sock"))
    others = peers(port)
    return [
        Check("kubelet", kubelet, f"pid {names['kubelet']}" if kubelet else "-",
              "a plain host: services are chosen by the policy's selectors", ""),
        Check("container runtime", bool(runtimes), ", ".join(runtimes) or "-", "no pods here", ""),
        Check("NRI", nri, "nri.sock" if nri else "-", "pods cannot be placed into the tier at their creation",
              "containerd 2.0 or CRI-O 1.26 with NRI enabled"),
        *(Check(f"without {name}", False, f"pid {pid}", PEERS[name].does, PEERS[name].mend)
          for name, pid in others.items()),
        *([] if others else [Check("no other agents", True, "none seen")]),
    ]  # fmt: skip


def _cards(_port: KernelPort) -> list[Check]:
    """Each card that the driver has, and what of it the law can go by; nothing where there is no driver."""
    if not has_nvidia():
        return []
    from colocate.observe.nvml import NvmlSilent, Worker

    worker = Worker()
    try:
        found = worker.ask(ask="read")
    except NvmlSilent as error:
        mend = "load the driver, and give the agent its NVML (manifests/overlays/gpu; gpu.nvmlLibrary)"
        return [Check("GPUs", False, str(error), "batch beside services on cards is not governed", mend)]
    finally:
        worker.end()
    return [line for card in found["cards"] for line in _card(card, found["driver"])]


def _not_held(card: dict[str, Any], driver: str) -> str:
    """Why the driver's checkpoint interface cannot hold processes of a card; empty: it can."""
    major = driver.partition(".")[0]
    if not major.isdigit() or int(major) < LEAST_CHECKPOINT_DRIVER:
        return f"driver {driver}"
    return "MPS" if card["mps"] else "MIG" if card["mig"] else ""


def _card(card: dict[str, Any], driver: str) -> list[Check]:
    name = f"GPU {card['index']}"
    held = _not_held(card, driver) if not card["error"] else ""
    if card["error"]:
        lost = "batch on it is kept as it was decided last"
        return [Check(name, False, f"NVML: {card['error']}", lost, "look at it with nvidia-smi; it may need a reset")]
    whole = not card["mig"] and not card["virtual"]
    shared = "MIG" if card["mig"] else "a vGPU" if card["virtual"] else "MPS" if card["mps"] else "time slices"
    return [
        Check(f"{name} driver", True, f"{card['name']} {card['uuid']}, driver {driver}"),
        Check(f"{name} sharing", whole and not card["mps"], shared,
              "who meets whom is not seen: batch is only watched" if not whole else
              "clients run together, which the law does not model",
              "whole cards, shared by time slices (the device plugin's timeSlicing)"),
        Check(f"{name} counters", card["counted"], "GPM" if card["counted"] else "-",
              "drains are not measured: a second is taken for granted", "a Hopper card or newer"),
        Check(f"{name} memory limits", card["limits"], "of cgroups" if card["limits"] else "-",
              "batch is stopped before the reserve, and not refused memory", "a driver from r615 on, and cgroup v2"),
        Check(f"{name} checkpoints", not held, held or f"if gpu.lockDrivers names {driver}",
              "batch is held by the freezer alone, so that its CPU side stands still too", "a driver from 570 on"),
        *([] if card["persistence"] in (None, True) else
          [Check(f"{name} persistence", False, "off", "the driver forgets its settings with its last client",
                 "nvidia-smi -pm 1, or nvidia-persistenced")]),
    ]  # fmt: skip


def _amd(port: KernelPort) -> list[Check]:
    if not has_amd():
        return []
    from colocate.observe.kfd import read_cards

    seen = read_cards(port)
    return [
        Check("AMD GPUs", bool(seen), ", ".join(c["name"] for c in seen) or "/dev/kfd alone",
              "batch beside services on them is not seen", "the amdgpu driver's files in /sys/class/kfd"),
        Check("AMD suspended queues", os.geteuid() == 0, "if gpu.suspendQueues is on",
              "batch on them is only watched", "be root (CAP_SYS_PTRACE), Linux 6.5 or newer"),
    ]  # fmt: skip


def _kubelets(port: KernelPort) -> list[Check]:
    """What kubelet itself governs where we do too, and how both go together."""
    tree = find_tree(port, "/")
    if tree.kubepods is None:
        return []
    levels = [tree.kubepods, *filter(None, (tree.burstable, tree.besteffort))]
    pods = [joined(level, name) for level in levels for name in port.children(main_hierarchy(port), level)]
    pods = [path for path in pods if path not in (*levels, tree.tier_path)]
    targets = [Target(path, path, "service", path, {}) for path in pods]
    alone = reserved_cpus(port, tree, capacity(port, "/").cpus, targets)
    memory = port.layout.hierarchy("memory")
    high = [
        path
        for pod in pods
        if memory == UNIFIED
        for path in (joined(pod, child) for child in port.children(UNIFIED, pod))
        if (port.read(UNIFIED, path, "memory.high") or "max").strip() != "max"
    ]
    return [
        Check("CPUs of the static CPU manager", True,
              f"{format_cpulist(alone)}: never batch's, nor offered" if alone else "none"),
        Check("kubelet's MemoryQoS", True,
              f"memory.high of {len(high)} containers: kubelet's; ours is the tier's" if high else "off, or no limits"),
    ]  # fmt: skip


def checks(port: KernelPort) -> list[Check]:
    """All lines of the doctor, in the order of the table."""
    parts = (_cgroup, _cpu, _pressure, _memory_and_freeze, _devices, _cards, _amd, _neighbours, _kubelets)
    return [check for part in parts for check in part(port)]
