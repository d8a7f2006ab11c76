"""What a pod's claims ask of a node: where their volumes can be reached, which must still be found or made, and how
many attachments they take.

Sources: the scheduler's VolumeBinding, VolumeZone, VolumeRestrictions and NodeVolumeLimits plugins, and
FindMatchingVolume of component-helpers.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from colocate.objects import (
    Claim,
    LabelRequirement,
    LabelSelector,
    NodeSelector,
    NodeSelectorTerm,
    PersistentVolume,
    StorageClass,
)
from colocate.units import parse_quantity
from podgroup.state.selectors import matches

BOUND = "pv.kubernetes.io/bind-completed"
"""Annotation of a claim whose binding to its volume is complete (volume.IsVolumeBound)."""
BOUND_BY_US = "pv.kubernetes.io/bound-by-controller"
"""Annotation of a volume that no user has kept for its claim."""
SELECTED_NODE = "volume.kubernetes.io/selected-node"
"""Annotation of a claim: its volume is to be made for this node."""
FORMER_CLASS = "volume.beta.kubernetes.io/storage-class"
DELAYED, NO_PROVISIONER = "WaitForFirstConsumer", "kubernetes.io/no-provisioner"
ATTACHABLE = "attachable-volumes-csi-"
"""How the resources begin that stand for the attachments of a driver."""
ZONES = {
    "failure-domain.beta.kubernetes.io/zone": "topology.kubernetes.io/zone",
    "failure-domain.beta.kubernetes.io/region": "topology.kubernetes.io/region",
    "topology.kubernetes.io/zone": "topology.kubernetes.io/zone",
    "topology.kubernetes.io/region": "topology.kubernetes.io/region",
}
"""Labels of a volume that say where it is, and what they are called today."""


class Unbound(msgspec.Struct, frozen=True):
    """A claim whose volume is found, or made, once its pod has a node; equal ones can take each other's volumes."""

    storage_class: str
    size: int
    """Bytes."""
    access_modes: tuple[str, ...] = ()
    volume_mode: str = ""
    attributes_class: str = ""
    selector: LabelSelector | None = None
    selected_node: str = ""
    """Its volume is being made for this node already."""
    kept: str = ""
    """A volume that names this claim: only with it can it be bound, or else be made."""
    shared: str = ""
    """Which claim it is, where several pods use it: they will have one volume."""


class Needs(NamedTuple):
    """What the claims of one pod ask for."""

    reach: tuple[NodeSelector, ...] = ()
    """From where all of its volumes can be reached."""
    unbound: tuple[Unbound, ...] = ()
    attached: tuple[tuple[str, int], ...] = ()
    """(resource, how many) attachments that are for this pod alone."""
    shared: tuple[tuple[str, str], ...] = ()
    """(resource, volume) of attachments that other pods of its node may have made already."""
    alone: tuple[str, ...] = ()
    """Claims for one pod alone (ReadWriteOncePod) that several wait with."""
    refused: str = ""


def class_of(claim: Claim) -> str:
    """The name of a claim's StorageClass."""
    return claim.metadata.annotations.get(FORMER_CLASS, claim.spec.storage_class_name or "")


def class_of_volume(volume: PersistentVolume) -> str:
    """The name of a volume's StorageClass."""
    return volume.metadata.annotations.get(FORMER_CLASS, volume.spec.storage_class_name)


def is_bound(claim: Claim) -> bool:
    """Whether a claim has its volume for good."""
    return bool(claim.spec.volume_name) and BOUND in claim.metadata.annotations


def names(volume: PersistentVolume, claim: Claim) -> bool:
    """Whether a volume is bound to, or kept for, this claim (IsVolumeBoundToClaim)."""
    whose, meta = volume.spec.claim_ref, claim.metadata
    return (
        whose is not None
        and (whose.namespace, whose.name) == (meta.namespace, meta.name)
        and whose.uid in ("", meta.uid)
    )


def size_of(amount: str | float | None) -> int:
    """Bytes, rounded up; 0 of what is no amount."""
    try:
        return -int(-parse_quantity(amount) // 1) if amount is not None else 0
    except ValueError:
        return 0


def unbound(claim: Claim, kept: str, shared: str) -> Unbound:
    """What a claim that is not bound asks for."""
    spec = claim.spec
    return Unbound(
        storage_class=class_of(claim),
        size=size_of(spec.resources.requests.get("storage")),
        access_modes=tuple(sorted(spec.access_modes)),
        volume_mode=spec.volume_mode,
        attributes_class=spec.volume_attributes_class_name or "",
        selector=spec.selector,
        selected_node=claim.metadata.annotations.get(SELECTED_NODE, ""),
        kept=kept,
        shared=shared,
    )


def capacity_of(volume: PersistentVolume) -> int:
    """Bytes."""
    return size_of(volume.spec.capacity.get("storage"))


def is_free(volume: PersistentVolume) -> bool:
    """Whether a volume is there for whoever it suits."""
    return volume.spec.claim_ref is None and volume.status.phase == "Available"


def large_enough(volume: PersistentVolume, wanted: Unbound) -> bool:
    """Whether a volume that is kept for a claim is what it asks for."""
    return (
        capacity_of(volume) >= wanted.size
        and volume.spec.volume_mode == wanted.volume_mode
        and (volume.spec.volume_attributes_class_name or "") == wanted.attributes_class
        and volume.metadata.deletion_timestamp is None
    )


def suits(volume: PersistentVolume, wanted: Unbound) -> bool:
    """Whether a free volume is what a claim asks for, wherever it is."""
    return (
        is_free(volume)
        and large_enough(volume, wanted)
        and set(wanted.access_modes) <= set(volume.spec.access_modes)
        and (wanted.selector is None or matches(wanted.selector, volume.metadata.labels))
    )


def zones_of(volume: PersistentVolume) -> tuple[NodeSelector, ...]:
    """Where a volume is by its labels (VolumeZone): on nodes with one of its values, or that have no such labels."""
    nowhere = NodeSelectorTerm(match_expressions=[LabelRequirement(key=key, operator="DoesNotExist") for key in ZONES])
    found = []
    for key, today in ZONES.items():
        values = [v.strip() for v in volume.metadata.labels.get(key, "").split("__") if v.strip()]
        if values:
            there = [
                NodeSelectorTerm(match_expressions=[LabelRequirement(key=name, operator="In", values=values)])
                for name in dict.fromkeys((key, today))
            ]
            found.append(NodeSelector(node_selector_terms=[*there, nowhere]))
    return tuple(found)


def topologies_of(made_by: StorageClass) -> NodeSelector | None:
    """For which nodes a class makes volumes; None for all."""
    terms = [
        NodeSelectorTerm(
            match_expressions=[
                LabelRequirement(key=r.key, operator="In", values=r.values) for r in term.match_label_expressions
            ]
        )
        for term in made_by.allowed_topologies
    ]
    return NodeSelector(node_selector_terms=terms) if terms else None


def nodes_of(selector: LabelSelector) -> NodeSelector | None:
    """A selector of labels as one of nodes; None if it selects all."""
    labels = [LabelRequirement(key=k, operator="In", values=[v]) for k, v in sorted(selector.match_labels.items())]
    expressions = [*labels, *selector.match_expressions]
    return NodeSelector(node_selector_terms=[NodeSelectorTerm(match_expressions=expressions)]) if expressions else None
