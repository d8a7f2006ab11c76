"""The node manager's own kinds on the API server. NodeColocation: what batch may have of one node, and why."""

from __future__ import annotations

from collections.abc import Mapping

from colocate.objects import Lean, ObjectMeta, Pod, Quantities

NODE_API = "colocate.io/v1alpha1"
NODE_COLOCATIONS = f"/apis/{NODE_API}/nodecolocations"
BATCH_CPU, BATCH_MEMORY = "kubernetes.io/batch-cpu", "kubernetes.io/batch-memory"
"""Extended resources of nodes, in thousandths of a CPU and in bytes, as Koordinator's."""
BATCH_LABELS = {"colocate.io/qos": "batch", "koordinator.sh/qosClass": "BE", "volcano.sh/qos-level": "-1"}
"""How a pod says that it is batch, by label or annotation: ours, Koordinator's and Volcano's."""
HEARTBEAT_SECONDS = 60.0
"""What does not change is said again so often."""
SILENT_SECONDS = 150.0
"""An agent that has said nothing for so long promises nothing."""


SHADOW, STOPPED = "Shadow", "Stopped"
"""The reasons of an agent that only computes, whose promises are nobody's, and of one that has ended."""


def is_batch(labels: Mapping[str, str], annotations: Mapping[str, str]) -> bool:
    """Whether a pod says so in one of the known ways."""
    return any(value in (labels.get(key), annotations.get(key)) for key, value in BATCH_LABELS.items())


def asks_batch(pod: Pod) -> bool:
    """Whether one of its containers asks for batch resources, which only batch pods may."""
    every = (*pod.spec.containers, *pod.spec.init_containers)
    return any(name in c.resources.requests for c in every for name in (BATCH_CPU, BATCH_MEMORY))


class NodeColocationSpec(Lean, frozen=True):
    """Nothing is asked of a node here: that is the policy's."""


class PodToEvict(Lean, frozen=True):
    """A batch pod of this node that has to go."""

    namespace: str
    name: str
    uid: str
    reason: str = ""
    message: str = ""
    grace_seconds: int = 0
    """Between SIGTERM and its kill."""


class NodeColocationStatus(Lean, frozen=True):
    """What the agent of the node says."""

    promised: Quantities = {}
    """What batch pods may ask for: `kubernetes.io/batch-cpu` and `kubernetes.io/batch-memory`."""
    reason: str = ""
    """`Promised`, `Learning`, `StaleReadings`, `Unknown`, `Stopped` or `Shadow`."""
    message: str = ""
    """The arithmetic, with the numbers of that moment."""
    pressure: str = ""
    """What the CPU law found then: its reason."""
    last_action: str = ""
    """The last change that was made on the node, and why."""
    evict: list[PodToEvict] = []
    """Batch pods of this node that have to go."""
    observed: str = ""
    """When it was said, by the node's clock."""


class NodeColocation(Lean, frozen=True):
    """colocate.io/v1alpha1 NodeColocation, of the same name as its node."""

    metadata: ObjectMeta
    spec: NodeColocationSpec = NodeColocationSpec()
    status: NodeColocationStatus = NodeColocationStatus()
