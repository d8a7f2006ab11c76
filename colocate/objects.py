"""Lean structs of Kubernetes objects: only the fields that are used, decoded straight from the API server's JSON.

A field that is not named here costs nothing to skip, and an object decodes in microseconds. Field names and meanings
are those of the Kubernetes API (core/v1, coordination/v1, scheduling.x-k8s.io/v1alpha1) and of our own `GangPlan`.
Quantities stay text until `colocate.units.parse_quantity` reads them; times are RFC 3339 text.
"""

from __future__ import annotations

import msgspec

Quantities = dict[str, str | int | float]
"""Resource name -> quantity, as written."""
HELD_BACK, GANG_HELD, EVICTED = "colocate.io/HeldBack", "colocate.io/GangHeld", "EvictedForServices"
"""The condition of a batch pod that has to do with less for the services of its node, and the reason of the Events
about one that had to go, and about its PodGroup."""


class Lean(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True, kw_only=True, gc=False):
    """The way all of them are written: camelCase, absent means default, unknown fields are skipped."""


class OwnerReference(Lean, frozen=True):
    """Who made the object and will make it anew."""

    api_version: str = ""
    kind: str = ""
    name: str = ""
    uid: str = ""
    controller: bool = False


class ObjectMeta(Lean, frozen=True):
    """What every object has."""

    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    generation: int = 0
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    deletion_grace_period_seconds: int | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    owner_references: list[OwnerReference] = []
    finalizers: list[str] = []


class LabelRequirement(Lean, frozen=True):
    """`key operator values`: In, NotIn, Exists, DoesNotExist, and for nodes Gt, Lt."""

    key: str
    operator: str
    values: list[str] = []


class LabelSelector(Lean, frozen=True):
    """All of matchLabels and matchExpressions; empty selects everything."""

    match_labels: dict[str, str] = {}
    match_expressions: list[LabelRequirement] = []


class NodeSelectorTerm(Lean, frozen=True):
    """All of its requirements; an empty term selects nothing."""

    match_expressions: list[LabelRequirement] = []
    match_fields: list[LabelRequirement] = []


class NodeSelector(Lean, frozen=True):
    """Any of its terms."""

    node_selector_terms: list[NodeSelectorTerm] = []


class NodeAffinity(Lean, frozen=True):
    """The required part; preferences are not read."""

    required: NodeSelector | None = msgspec.field(default=None, name="requiredDuringSchedulingIgnoredDuringExecution")


class PodAffinityTerm(Lean, frozen=True):
    """Beside (or away from) the pods that the selector finds, counted by the node label `topologyKey`."""

    topology_key: str
    label_selector: LabelSelector | None = None
    namespaces: list[str] = []
    namespace_selector: LabelSelector | None = None


class PodAffinity(Lean, frozen=True):
    """The required terms, all of which must hold."""

    required: list[PodAffinityTerm] = msgspec.field(
        default_factory=list, name="requiredDuringSchedulingIgnoredDuringExecution"
    )


class Affinity(Lean, frozen=True):
    """The three kinds."""

    node_affinity: NodeAffinity | None = None
    pod_affinity: PodAffinity | None = None
    pod_anti_affinity: PodAffinity | None = None


class TopologySpreadConstraint(Lean, frozen=True):
    """At most `maxSkew` more matching pods in a domain than in the emptiest one (KEP-895)."""

    max_skew: int
    topology_key: str
    when_unsatisfiable: str
    label_selector: LabelSelector | None = None
    min_domains: int | None = None
    node_affinity_policy: str = "Honor"
    node_taints_policy: str = "Ignore"
    match_label_keys: list[str] = []


class Toleration(Lean, frozen=True):
    """An empty key with Exists tolerates every taint; an empty effect tolerates every effect."""

    key: str = ""
    operator: str = "Equal"
    value: str = ""
    effect: str = ""


class Taint(Lean, frozen=True):
    """NoSchedule and NoExecute repel; PreferNoSchedule is a preference."""

    key: str
    effect: str
    value: str = ""


class Resources(Lean, frozen=True):
    """What a container asks for and may have at most."""

    requests: Quantities = {}
    limits: Quantities = {}


class ContainerPort(Lean, frozen=True):
    """Only ports of the host matter to scheduling."""

    host_port: int = 0
    host_ip: str = msgspec.field(default="", name="hostIP")
    protocol: str = "TCP"


class Container(Lean, frozen=True):
    """A container, or an init container; `restartPolicy: Always` makes the latter a sidecar (KEP-753)."""

    name: str = ""
    resources: Resources = Resources()
    ports: list[ContainerPort] = []
    restart_policy: str = ""


class ClaimSource(Lean, frozen=True):
    """A volume's claim."""

    claim_name: str = ""


class EphemeralSource(Lean, frozen=True):
    """Its claim is made with the pod, and goes with it."""

    volume_claim_template: ClaimTemplate | None = None


class Volume(Lean, frozen=True):
    """Only volumes that bind a pod to nodes are told apart."""

    name: str = ""
    persistent_volume_claim: ClaimSource | None = None
    ephemeral: EphemeralSource | None = None

    def claim(self, pod: str) -> str:
        """The name of its claim in a pod of this name; empty if it needs none."""
        if self.ephemeral is not None:
            return f"{pod}-{self.name}"
        return self.persistent_volume_claim.claim_name if self.persistent_volume_claim is not None else ""


class Named(Lean, frozen=True):
    """A scheduling gate or a resource claim."""

    name: str = ""


class PodSpec(Lean, frozen=True):
    """What a pod asks for."""

    node_name: str = ""
    scheduler_name: str = "default-scheduler"
    priority: int = 0
    priority_class_name: str = ""
    preemption_policy: str = "PreemptLowerPriority"
    containers: list[Container] = []
    init_containers: list[Container] = []
    overhead: Quantities = {}
    resources: Resources = Resources()
    node_selector: dict[str, str] = {}
    affinity: Affinity | None = None
    tolerations: list[Toleration] = []
    topology_spread_constraints: list[TopologySpreadConstraint] = []
    scheduling_gates: list[Named] = []
    volumes: list[Volume] = []
    resource_claims: list[Named] = []
    active_deadline_seconds: int | None = None
    termination_grace_period_seconds: int | None = None


class Condition(Lean, frozen=True):
    """metav1.Condition, and the older kinds that lack some of its fields."""

    type: str
    status: str
    reason: str = ""
    message: str = ""
    last_transition_time: str | None = None
    observed_generation: int = 0


class ContainerStatus(Lean, frozen=True):
    """That there is one at all says that the kubelet has accepted the pod."""

    name: str = ""
    container_id: str = msgspec.field(default="", name="containerID")
    """RUNTIME://ID"""
    restart_count: int = 0
    started: bool | None = None
    allocated_resources: Quantities = {}
    """What the kubelet has set aside for it: while a resize to less is under way, more than it asks for (KEP-1287)."""
    resources: Resources = Resources()
    """What is in force: what its container runs with."""


class PodStatus(Lean, frozen=True):
    """How a pod is."""

    phase: str = ""
    reason: str = ""
    message: str = ""
    conditions: list[Condition] = []
    start_time: str | None = None
    nominated_node_name: str = ""
    container_statuses: list[ContainerStatus] = []
    init_container_statuses: list[ContainerStatus] = []


class Event(Lean, frozen=True):
    """core/v1 Event: what somebody tells of an object."""

    metadata: ObjectMeta
    reason: str = ""
    message: str = ""
    last_timestamp: str | None = None


class Pod(Lean, frozen=True):
    """core/v1 Pod."""

    metadata: ObjectMeta
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()

    @property
    def terminal(self) -> bool:
        """Whether it has ended and holds no capacity any more."""
        return self.status.phase in ("Succeeded", "Failed")

    @property
    def deleting(self) -> bool:
        """Whether its end has been asked for."""
        return self.metadata.deletion_timestamp is not None


class NodeSpec(Lean, frozen=True):
    """What repels pods."""

    unschedulable: bool = False
    taints: list[Taint] = []


class NodeStatus(Lean, frozen=True):
    """What a node offers."""

    allocatable: Quantities = {}
    conditions: list[Condition] = []


class Node(Lean, frozen=True):
    """core/v1 Node."""

    metadata: ObjectMeta
    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()


class LeaseSpec(Lean, frozen=True):
    """coordination.k8s.io/v1."""

    holder_identity: str | None = None
    lease_duration_seconds: int | None = None
    acquire_time: str | None = None
    renew_time: str | None = None
    lease_transitions: int | None = None


class Lease(Lean, frozen=True):
    """Who leads."""

    metadata: ObjectMeta
    spec: LeaseSpec = LeaseSpec()


class DisruptionBudgetSpec(Lean, frozen=True):
    """Which pods it protects; None: none."""

    selector: LabelSelector | None = None


class DisruptionBudgetStatus(Lean, frozen=True):
    """How many of them may be disrupted now."""

    disruptions_allowed: int = 0


class DisruptionBudget(Lean, frozen=True):
    """policy/v1 PodDisruptionBudget."""

    metadata: ObjectMeta
    spec: DisruptionBudgetSpec = DisruptionBudgetSpec()
    status: DisruptionBudgetStatus = DisruptionBudgetStatus()


class PriorityClass(Lean, frozen=True):
    """scheduling.k8s.io/v1: the API server writes its value into each pod that names it."""

    metadata: ObjectMeta
    value: int = 0
    global_default: bool = False
    preemption_policy: str = "PreemptLowerPriority"


class ClaimSpec(Lean, frozen=True):
    """What is asked for, and the volume that it is bound to; empty while it is not."""

    volume_name: str = ""
    access_modes: list[str] = []
    storage_class_name: str | None = None
    volume_mode: str = "Filesystem"
    volume_attributes_class_name: str | None = None
    selector: LabelSelector | None = None
    resources: Resources = Resources()


class ClaimTemplate(Lean, frozen=True):
    """A claim that is made for each pod."""

    metadata: ObjectMeta = ObjectMeta()
    spec: ClaimSpec = ClaimSpec()


class ClaimStatus(Lean, frozen=True):
    """Pending, Bound, or Lost: bound to a volume that is not there."""

    phase: str = ""


class Claim(Lean, frozen=True):
    """core/v1 PersistentVolumeClaim."""

    metadata: ObjectMeta
    spec: ClaimSpec = ClaimSpec()
    status: ClaimStatus = ClaimStatus()


class Namespace(Lean, frozen=True):
    """core/v1 Namespace; its labels."""

    metadata: ObjectMeta


class VolumeNodeAffinity(Lean, frozen=True):
    """Where a volume can be reached from."""

    required: NodeSelector | None = None


class ClaimReference(Lean, frozen=True):
    """The claim that a volume is bound to, or kept for where it has no uid."""

    namespace: str = ""
    name: str = ""
    uid: str = ""


class CsiSource(Lean, frozen=True):
    """The volume as its driver knows it."""

    driver: str = ""
    volume_handle: str = ""


class PersistentVolumeSpec(Lean, frozen=True):
    """What it offers, whose it is, and from where it can be used."""

    capacity: Quantities = {}
    access_modes: list[str] = []
    storage_class_name: str = ""
    volume_mode: str = "Filesystem"
    volume_attributes_class_name: str | None = None
    claim_ref: ClaimReference | None = None
    csi: CsiSource | None = None
    node_affinity: VolumeNodeAffinity | None = None


class PersistentVolumeStatus(Lean, frozen=True):
    """Available, Bound, Released, ..."""

    phase: str = ""


class PersistentVolume(Lean, frozen=True):
    """core/v1 PersistentVolume."""

    metadata: ObjectMeta
    spec: PersistentVolumeSpec = PersistentVolumeSpec()
    status: PersistentVolumeStatus = PersistentVolumeStatus()


class TopologyRequirement(Lean, frozen=True):
    """A label with one of these values."""

    key: str
    values: list[str] = []


class TopologySelectorTerm(Lean, frozen=True):
    """All of these; an empty one matches nothing."""

    match_label_expressions: list[TopologyRequirement] = []


class StorageClass(Lean, frozen=True):
    """storage.k8s.io/v1 StorageClass: who makes its volumes, when, and for which nodes."""

    metadata: ObjectMeta
    provisioner: str = ""
    volume_binding_mode: str = "Immediate"
    allowed_topologies: list[TopologySelectorTerm] = []


class CsiDriverSpec(Lean, frozen=True):
    """Whether its room is told by CSIStorageCapacity."""

    storage_capacity: bool = False


class CsiDriver(Lean, frozen=True):
    """storage.k8s.io/v1 CSIDriver."""

    metadata: ObjectMeta
    spec: CsiDriverSpec = CsiDriverSpec()


class CsiStorageCapacity(Lean, frozen=True):
    """storage.k8s.io/v1 CSIStorageCapacity: how large a volume of a class can be made for these nodes."""

    metadata: ObjectMeta
    storage_class_name: str = ""
    node_topology: LabelSelector | None = None
    capacity: str | int | None = None
    maximum_volume_size: str | int | None = None


class CsiAllocatable(Lean, frozen=True):
    """How many volumes of a driver a node can have; None: no limit."""

    count: int | None = None


class CsiNodeDriver(Lean, frozen=True):
    """A driver on a node."""

    name: str
    allocatable: CsiAllocatable = CsiAllocatable()


class CsiNodeSpec(Lean, frozen=True):
    """The drivers of a node; kubelet writes null where there is none."""

    drivers: list[CsiNodeDriver] | None = []


class CsiNode(Lean, frozen=True):
    """storage.k8s.io/v1 CSINode, of the node of the same name."""

    metadata: ObjectMeta
    spec: CsiNodeSpec = CsiNodeSpec()


class AttachmentSource(Lean, frozen=True):
    """What is attached."""

    persistent_volume_name: str = ""


class VolumeAttachmentSpec(Lean, frozen=True):
    """A volume, a node, and the driver that attaches it."""

    attacher: str = ""
    node_name: str = ""
    source: AttachmentSource = AttachmentSource()


class VolumeAttachment(Lean, frozen=True):
    """storage.k8s.io/v1 VolumeAttachment."""

    metadata: ObjectMeta
    spec: VolumeAttachmentSpec = VolumeAttachmentSpec()
