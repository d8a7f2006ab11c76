"""The node manager's own kinds on the API server. NodeColocation: what batch may have of one node, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from colocate.objects import Lean, ObjectMeta, Pod, Quantities
from colocate.units import parse_quantity

NODE_API = "colocate.io/v1alpha1"
NODE_COLOCATIONS = f"/apis/{NODE_API}/nodecolocations"
POLICIES = f"/apis/{NODE_API}/colocationpolicies"
BATCH_CPU, BATCH_MEMORY = "kubernetes.io/batch-cpu", "kubernetes.io/batch-memory"
"""Extended resources of nodes, in thousandths of a CPU and in bytes, as Koordinator's."""
GPU_BORROW = "colocate.io/gpu-borrow"
"""An extended resource too: cards of services that lend them, a batch job a card."""
POWER = "colocate.io/power"
"""An extended resource too: watts that the devices of a pod may draw, all together."""
POWER_RESOURCES = (POWER, "intel.com/power")
"""How pods ask for watts: by ours, and by the name of GEOPM's device plugin."""
POWER_CLASS = "colocate.io/power-class"
"""Label or annotation: of jobs that feel a power cap alike."""
POWER_DEADLINE, POWER_WORK = "colocate.io/power-deadline", "colocate.io/power-work"
"""By when a pod's work is to be done (RFC 3339), and how long that takes with all the watts that it asks for."""
MAX_SLOWDOWN, POWER_BECAUSE = "colocate.io/max-slowdown", "colocate.io/power-because"
"""Annotations: watts that are asked for by what they may cost, and how that was turned into watts."""
QOS, BATCH = "colocate.io/qos", "batch"
BATCH_LABELS = {QOS: BATCH, "koordinator.sh/qosClass": "BE", "volcano.sh/qos-level": "-1"}
"""How a pod says that it is batch, by label or annotation: ours, Koordinator's and Volcano's."""
GANGS = (
    "scheduling.x-k8s.io/pod-group",
    "pod-group.scheduling.sigs.k8s.io",
    "scheduling.k8s.io/group-name",
    "gang.scheduling.koordinator.sh/name",
)
"""How a pod names its gang, by label or annotation: coscheduling's, its former one, Volcano's and Koordinator's."""
SYSTEM = "colocate-system"
"""The namespace of what the manifests install."""
HEARTBEAT_SECONDS = 60.0
"""What does not change is said again so often."""
SILENT_SECONDS = 150.0
"""An agent that has said nothing for so long promises nothing."""


SHADOW, STOPPED, ANOTHER = "Shadow", "Stopped", "AnotherAgent"
"""The reasons of an agent that only computes, whose promises are nobody's, of one that has ended, and of one that has
found another program on its node that governs batch: two would contradict each other in the node's status."""
FROZEN, WITH_GANG, CARD_SHARED, NARROWED, WAITS = HOLDS = "Frozen", "WithGang", "CardShared", "Narrowed", "Waits"
"""For what a batch pod gets less than it could use: it is stopped, for itself or with its gang; it is stopped and let
go beside a card's services; batch is kept to less CPU; services come first."""
MOST_HELD_BACK = 256
"""Pods of a node that are named: more than a kubelet should have."""
PUBLISHED = "colocate.io/published"
"""An annotation of nodes: their batch resources are ours. Those of others are left alone."""
POWER_PUBLISHED = "colocate.io/published-power"
"""The same of their watts, which an administrator may have set by hand."""
POWER_CURVE, CPU_UTILIZATION = "colocate.io/power-curve", "colocate.io/cpu-utilization"
CPU_REQUESTED = "colocate.io/cpu-requested"
"""Annotations of nodes: what one draws, as `UTILIZATION:WATTS ...` from 0 to 1, how busy its CPUs are, and what its
pods requested then, in thousandths of a CPU."""


def is_batch(labels: Mapping[str, str], annotations: Mapping[str, str]) -> bool:
    """Whether a pod says so in one of the known ways."""
    return any(value in (labels.get(key), annotations.get(key)) for key, value in BATCH_LABELS.items())


def gang_of(meta: ObjectMeta) -> str:
    """`namespace/name` of the gang that a pod says it is in; empty if it is in none."""
    named = (known.get(key, "") for key in GANGS for known in (meta.labels, meta.annotations))
    name = next(filter(None, named), "")
    return f"{meta.namespace}/{name}" if name else ""


def asks_batch(pod: Pod) -> bool:
    """Whether one of its containers asks for batch resources, which only batch pods may."""
    every = (*pod.spec.containers, *pod.spec.init_containers)
    return any(name in c.resources.requests for c in every for name in (BATCH_CPU, BATCH_MEMORY, GPU_BORROW))


def amount(quantity: object, times: int = 1) -> int:
    """So many times a quantity, in whole units; 0 of what cannot be read."""
    try:
        return int(parse_quantity(str(quantity)) * times) if quantity is not None else 0
    except ValueError:
        return 0


def whole(flat: Lean) -> dict[str, object]:
    """Every field of a flat struct, the empty ones too: a merge patch leaves alone what it does not name."""
    names = zip(flat.__struct_encode_fields__, flat.__struct_fields__, strict=True)
    return {encoded: getattr(flat, name) for encoded, name in names}


class NodeColocationSpec(Lean, frozen=True):
    """What the cluster asks of a node; all else is the policy's."""

    power_watts: int = 0
    """What the GPUs of this node may draw for pods that ask for watts, by the PowerBudgets that are enforced; 0: none
    says anything."""


class PodToEvict(Lean, frozen=True):
    """A batch pod of this node that has to go."""

    namespace: str
    name: str
    uid: str
    reason: str = ""
    message: str = ""
    grace_seconds: int = 0
    """Between SIGTERM and its kill."""


class PodHeldBack(Lean, frozen=True):
    """A batch pod of this node that has to do with less for its services, or has had to of late."""

    namespace: str
    name: str
    uid: str
    reason: str = ""
    """`Frozen`, `WithGang`, `CardShared`, `Narrowed` or `Waits`; empty of one that no longer has to."""
    message: str = ""
    since: str = ""
    """Since when that is so, by the node's clock."""


class FrozenGang(Lean, frozen=True):
    """A gang of which a member is frozen on this node, for what happens on this node."""

    gang: str
    """`namespace/name`."""
    message: str = ""


class PolicyInForce(Lean, frozen=True):
    """The policy by which a node is governed."""

    name: str = ""
    generation: int = 0
    """Of the ColocationPolicy of that name; 0 where the agent goes by its file alone."""
    problem: str = ""
    """Why a later one is not in force."""


class CurvePoint(Lean, frozen=True):
    """What a node draws at a utilization of its CPUs."""

    utilization: float = 0.0
    """0 to 1, of all of them."""
    watts: float = 0.0


class NodePower(Lean, frozen=True):
    """What work more on a node would draw, for whoever places work."""

    utilization: float = 0.0
    """Of its CPUs, over the last minute."""
    requested_milli: int = 0
    """Thousandths of a CPU that its pods asked for then, batch included."""
    curve: list[CurvePoint] = []
    """Rising in utilization; watts never fall."""
    measured: bool = False
    """Whether the node's own meter says so, and not its policy."""


class PowerNeed(Lean, frozen=True):
    """What the power limits of a node's pods have to add up to."""

    slowdown: float = 0.0
    """By which none of them is slowed by more."""
    watts: int = 0


class PowerNeeds(Lean, frozen=True):
    """How much those of a node who ask for watts would feel less."""

    asked: int = 0
    """Watts that they ask for together."""
    least: list[PowerNeed] = []
    """Rising in slowdown; watts never rise. Beyond the last the time is taken to grow as the watts fall."""


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
    policy: PolicyInForce = PolicyInForce()
    evict: list[PodToEvict] = []
    """Batch pods of this node that have to go."""
    held_back: list[PodHeldBack] = []
    """Batch pods of this node that get less than they could use."""
    frozen_gangs: list[FrozenGang] = []
    """Gangs whose members on other nodes would wait for one on this."""
    power_watts: int | None = None
    """What the power limits of pods that ask for watts add up to, as they are in force; None: the agent sets none."""
    power: NodePower | None = None
    """None: nothing is known of that."""
    power_needs: PowerNeeds | None = None
    """None: nobody on it asks for watts."""
    observed: str = ""
    """When it was said, by the node's clock."""


class NodeColocation(Lean, frozen=True):
    """colocate.io/v1alpha1 NodeColocation, of the same name as its node."""

    metadata: ObjectMeta
    spec: NodeColocationSpec = NodeColocationSpec()
    status: NodeColocationStatus = NodeColocationStatus()


class ColocationPolicyStatus(Lean, frozen=True):
    """What came of a policy on the nodes."""

    observed_generation: int = 0
    nodes: int = 0
    """Whose agents go by the policy of this name and are not silent."""
    ready: str = ""
    """How many of them have this generation in force, of how many."""
    batch_cores: str = ""
    """What batch pods may ask for on all of them."""
    pressure: str = ""
    """What the CPU law says on most of them, of those where it says anything but that nothing suffers."""
    last_action: str = ""
    """A node and the last change that was made there: of those who spoke last."""
    problem: str = ""
    """A node that refuses this generation, and why."""


class ColocationPolicyObject(Lean, frozen=True):
    """colocate.io/v1alpha1 ColocationPolicy on the API server: how agents govern whose policy has this name."""

    metadata: ObjectMeta
    spec: dict[str, Any] = {}
    status: ColocationPolicyStatus = ColocationPolicyStatus()
