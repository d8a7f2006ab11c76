"""Programs of others that govern batch work on this node, by the names of their processes, and what then holds.

Sources: the documentation and sources of Koordinator, Volcano, Katalyst, Crane and openEuler's rubik.
"""

from __future__ import annotations

from typing import NamedTuple

from colocate.cgroup.port import FilePort


class Peer(NamedTuple):
    """What one of them does where we do something, and what an operator does about it."""

    does: str
    mend: str
    publishes: bool = False
    """Whether its cluster half writes `kubernetes.io/batch-cpu` and `batch-memory` into nodes' status, as ours does."""


_REMOVE = "take its DaemonSet off the nodes that colocate governs, before colocate comes to them"
PEERS = {
    "koordlet": Peer("it limits BestEffort, and offers batch-cpu by its own law", _REMOVE, publishes=True),
    "vc-agent": Peer("it limits low-priority pods, and offers batch-cpu by its own law", _REMOVE, publishes=True),
    "katalyst-agent": Peer("it writes cpusets of all pods and weights of BestEffort", _REMOVE),
    "crane-agent": Peer("it throttles and evicts BestEffort pods", _REMOVE),
    "rubik": Peer("it writes quotas and memory limits of offline pods", _REMOVE),
    "systemd-oomd": Peer(
        "it kills whole cgroups for their memory pressure, by which batch is to be slowed down",
        "ManagedOOMMemoryPressure=auto for kubepods.slice",
    ),
    "oomd": Peer("it kills whole cgroups for their memory pressure", "leave kubepods out of its configuration"),
}


def peers(port: FilePort) -> dict[str, int]:
    """Those that run here: name -> process id."""
    found = {}
    for entry in port.proc_list("/proc"):
        if entry.isdigit() and (name := (port.proc(f"/proc/{entry}/comm") or "").strip()) in PEERS:
            found[name] = int(entry)
    return dict(sorted(found.items()))


def publishers(port: FilePort) -> list[str]:
    """Those of them that offer batch resources of this node too."""
    return [name for name in peers(port) if PEERS[name].publishes]
