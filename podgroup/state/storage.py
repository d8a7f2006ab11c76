"""Claims, volumes, and what is told of storage, as last seen; and which free volume each planned pod is to have.

A pod that is planned on a node takes its volumes there at once, as it takes its room: nobody else is promised them.
What must be written for that (`todo`), and how far it has come, follows from the objects as they are, so that a
controller that was killed goes on where it was. Source: the scheduler's VolumeBinding plugin (binder.go).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from itertools import islice
from typing import Literal, NamedTuple, TypeVar

import msgspec

from colocate.objects import (
    Claim,
    CsiAllocatable,
    CsiDriver,
    CsiNode,
    CsiNodeDriver,
    CsiNodeSpec,
    CsiStorageCapacity,
    NodeSelector,
    ObjectMeta,
    PersistentVolume,
    Pod,
    StorageClass,
    Volume,
    VolumeAttachment,
)
from podgroup.state.volumes import (
    ATTACHABLE,
    BOUND_BY_US,
    DELAYED,
    NO_PROVISIONER,
    SELECTED_NODE,
    Needs,
    Unbound,
    capacity_of,
    class_of,
    class_of_volume,
    is_bound,
    is_free,
    large_enough,
    names,
    nodes_of,
    suits,
    unbound,
    zones_of,
)

replace = msgspec.structs.replace
T = TypeVar("T")
K = TypeVar("K")


class Todo(NamedTuple):
    """A write: keep this volume for the claim, or, without one, have it made for the node."""

    claim: Claim
    volume: PersistentVolume | None


class Progress(NamedTuple):
    """How far the volumes of a planned pod have come."""

    state: Literal["Bound", "Open", "Failed"] = "Bound"
    text: str = ""
    todo: tuple[Todo, ...] = ()
    written: tuple[Todo, ...] = ()
    """What was written and has not led to a volume yet: the end of the plan takes it back."""


class _User(NamedTuple):
    pod: str
    claims: tuple[str, ...]


class Storage:
    """The objects of storage, by name; claims by `namespace/name`."""

    def __init__(self) -> None:
        self.claims: dict[str, Claim] = {}
        self.volumes: dict[str, PersistentVolume] = {}
        self.classes: dict[str, StorageClass] = {}
        self.drivers: dict[str, CsiDriver] = {}
        self.capacities: dict[str, tuple[CsiStorageCapacity, NodeSelector | None]] = {}
        """Each with the nodes that can reach it; None for all, where it says so."""
        self._drivers_limited: Counter[str] = Counter()
        """Driver -> how many nodes have a limit for it."""
        self._taken: Counter[str] = Counter()
        """The volumes that planned pods are to have."""
        self._free: dict[str, list[tuple[int, str, PersistentVolume]]] = {}
        """StorageClass -> its free volumes, by size and name."""
        self._remembered: dict[str, dict[str, str]] = {}
        """uid -> what a plan says that it is to have."""
        self.version = 0
        """Of everything that a pod's needs depend on."""
        self._kept: dict[tuple[str, str], set[str]] = {}
        """(namespace, claim) -> the volumes that name it."""
        self._limits: dict[str, dict[str, int]] = {}
        """Node -> driver -> how many volumes it can have there."""
        self._attachments: dict[str, VolumeAttachment] = {}
        self._attached: dict[str, set[str]] = {}
        """Node -> attachments."""
        self._claims_on: dict[str, set[str]] = {}
        """Volume -> the claims that name it."""
        self._same: dict[tuple[str, str], set[str]] = {}
        """(driver, handle) -> the volumes that are the same one to the driver."""
        self._wanting: dict[str, set[str]] = {}
        """Claim -> uids of the living pods with it."""
        self._users: dict[str, _User] = {}
        """uid of a living pod with claims."""
        self._on: dict[str, str] = {}
        """uid -> node, of pods with claims."""
        self._on_node: dict[str, set[str]] = {}
        self.chosen: dict[str, dict[str, str] | None] = {}
        """uid of a planned pod -> claim -> its volume, "" for one that is to be made; None if there is none."""
        self._left_as_is: set[str] = set()
        """uids of which what was written could not be taken back."""
        self._asked: dict[str, set[str]] = {}
        """uid -> the claims that have been written for."""

    # what the watches tell

    def set_claim(self, key: str, claim: Claim | None) -> bool:
        """A claim as it is now, or that it is gone; False if nothing changed that matters here."""
        before = self.claims.get(key)
        if before is not None and before.spec.volume_name:
            _discard(self._claims_on, before.spec.volume_name, key)
        _put(self.claims, key, claim)
        if claim is not None and claim.spec.volume_name:
            self._claims_on.setdefault(claim.spec.volume_name, set()).add(key)
        changed = not _alike(before, claim)
        self.version += changed
        return changed

    def set_volume(self, name: str, volume: PersistentVolume | None) -> bool:
        """A volume as it is now, or that it is gone; False if nothing changed that matters here."""
        before = self.volumes.get(name)
        if before is not None:
            if before.spec.claim_ref is not None:
                _discard(self._kept, (before.spec.claim_ref.namespace, before.spec.claim_ref.name), name)
            elif is_free(before):
                free = self._free[class_of_volume(before)]
                del free[bisect_left(free, (capacity_of(before), name), key=lambda one: one[:2])]
            if before.spec.csi is not None:
                _discard(self._same, (before.spec.csi.driver, before.spec.csi.volume_handle), name)
        _put(self.volumes, name, volume)
        if volume is not None:
            if is_free(volume):
                free = self._free.setdefault(class_of_volume(volume), [])
                insort(free, (capacity_of(volume), name, volume), key=lambda one: one[:2])
            whose = volume.spec.claim_ref
            if whose is not None:
                self._kept.setdefault((whose.namespace, whose.name), set()).add(name)
            csi = volume.spec.csi
            if csi is not None:
                self._same.setdefault((csi.driver, csi.volume_handle), set()).add(name)
        changed = not _alike(before, volume)
        self.version += changed
        return changed

    def set_class(self, name: str, made_by: StorageClass | None) -> None:
        """A StorageClass as it is now, or that it is gone."""
        _put(self.classes, name, made_by)
        self.version += 1

    def set_driver(self, name: str, driver: CsiDriver | None) -> None:
        """A CSIDriver as it is now, or that it is gone."""
        _put(self.drivers, name, driver)
        self.version += 1

    def set_capacity(self, key: str, capacity: CsiStorageCapacity | None) -> None:
        """A CSIStorageCapacity as it is now, or that it is gone."""
        nodes = nodes_of(capacity.node_topology) if capacity is not None and capacity.node_topology else None
        _put(self.capacities, key, None if capacity is None else (capacity, nodes))
        self.version += 1

    def set_csi_node(self, name: str, node: CsiNode | None) -> bool:
        """The drivers of a node as they are now; whether volumes count now that did not before, or the reverse."""
        drivers = self._drivers_limited.keys() | set()
        for driver in self._limits.pop(name, {}):
            self._drivers_limited[driver] -= 1
            if not self._drivers_limited[driver]:
                del self._drivers_limited[driver]
        limits = (
            {d.name: d.allocatable.count for d in node.spec.drivers or () if d.allocatable.count is not None}
            if node
            else {}
        )
        if limits:
            self._limits[name] = limits
            self._drivers_limited.update(limits.keys())
        changed = drivers != self._drivers_limited.keys()
        self.version += changed
        return changed

    def set_attachment(self, name: str, attachment: VolumeAttachment | None) -> str:
        """An attachment as it is now, or that it is gone; the node of it."""
        before = self._attachments.get(name)
        _put(self._attachments, name, attachment)
        if before is not None:
            _discard(self._attached, before.spec.node_name, name)
        if attachment is not None:
            self._attached.setdefault(attachment.spec.node_name, set()).add(name)
        known = attachment or before
        return known.spec.node_name if known is not None else ""

    def csi_nodes(self) -> list[CsiNode]:
        """The limits of the nodes, as objects."""
        found = []
        for name, limits in self._limits.items():
            drivers = [CsiNodeDriver(name=d, allocatable=CsiAllocatable(count=n)) for d, n in limits.items()]
            found.append(CsiNode(metadata=ObjectMeta(name=name), spec=CsiNodeSpec(drivers=drivers)))
        return found

    def attachments(self) -> list[VolumeAttachment]:
        """What is attached anywhere."""
        return list(self._attachments.values())

    # who uses what

    def living(self, pod: Pod) -> Set[str]:
        """A pod that has not ended waits with, or uses, its claims; the uids for whom that changes something."""
        uid, keys = pod.metadata.uid, tuple(key for key, _ in claims_of(pod))
        if not keys or uid in self._users:
            return frozenset()
        self._users[uid] = _User(pod.metadata.name, keys)
        return self._changed(uid, keys, set.add)

    def gone(self, uid: str) -> Set[str]:
        """A pod has ended or is gone; the uids for whom that changes something."""
        self.left(uid)
        user = self._users.pop(uid, None)
        return self._changed(uid, user.claims, set.discard) if user is not None else frozenset()

    def wanting(self, key: str) -> Set[str]:
        """uids of the living pods with a claim."""
        return self._wanting.get(key, frozenset())

    def _changed(self, uid: str, keys: Iterable[str], change: Callable[[set[str], str], None]) -> Set[str]:
        others: set[str] = set()
        for key in keys:
            wanting = self._wanting.setdefault(key, set())
            change(wanting, uid)
            company = self._sharing(key) - {uid}
            if len(company) == 1:  # who was alone with it is no more, or is again
                others |= company
            if not wanting:
                del self._wanting[key]
        if others:
            self.version += 1
        return others

    def _sharing(self, key: str) -> set[str]:
        """uids of the living pods that have the volume of a claim, by this claim or another one."""
        claim = self.claims.get(key)
        volume = self.volumes.get(claim.spec.volume_name) if claim is not None else None
        if volume is None or volume.spec.csi is None:
            return set(self._wanting.get(key, ()))
        same = self._same[volume.spec.csi.driver, volume.spec.csi.volume_handle]
        return {uid for name in same for other in self._claims_on.get(name, ()) for uid in self._wanting.get(other, ())}

    def on_node(self, uid: str, node: str) -> bool:
        """A pod with claims holds room on a node; False if it did already."""
        if uid not in self._users or self._on.get(uid) == node:
            return False
        said = self._remembered.get(uid)
        self.left(uid)
        if said is not None:
            self._remembered[uid] = said
        self._on[uid] = node
        self._on_node.setdefault(node, set()).add(uid)
        self._used_alone(uid)
        return True

    def left(self, uid: str) -> bool:
        """It holds none any more; False if it did not."""
        node = self._on.pop(uid, None)
        if node is not None:
            _discard(self._on_node, node, uid)
            self._used_alone(uid)
        self._choose(uid, None)
        self.chosen.pop(uid, None)
        self._asked.pop(uid, None)
        self._remembered.pop(uid, None)
        self._left_as_is.discard(uid)
        return node is not None

    def users(self) -> list[str]:
        """uids of the living pods with claims."""
        return list(self._users)

    def remember(self, uid: str, volumes: Mapping[str, str]) -> None:
        """What a plan says that a pod is to have, before it is promised its place."""
        if uid not in self.chosen:
            self._remembered[uid] = dict(volumes)

    def recall(self, uid: str, claims: list[str]) -> bool:
        """A planned pod is to have what its plan says; False if none has."""
        said = self._remembered.pop(uid, None)
        if not said:  # all are to be made, or a former version wrote it
            return False
        self.choose(uid, {key: said.get(key, "") for key in claims})
        return True

    def choose(self, uid: str, volumes: dict[str, str] | None) -> None:
        """A planned pod is to have these volumes, by claim; None if there are none."""
        self._choose(uid, volumes)
        self.chosen[uid] = volumes

    def _choose(self, uid: str, volumes: Mapping[str, str] | None) -> None:
        self._taken.subtract(filter(None, (self.chosen.get(uid) or {}).values()))
        self._taken.update(filter(None, (volumes or {}).values()))
        self._taken = +self._taken if len(self._taken) > 2 * len(self.chosen) + 64 else self._taken

    def written_in_plan(self, uid: str) -> dict[str, str]:
        """What a plan says of the volumes of a member."""
        return {key: name for key, name in (self.chosen.get(uid) or {}).items() if name}

    def _used_alone(self, uid: str) -> None:
        """Others can, or cannot, have what is for one pod alone."""
        user = self._users.get(uid)
        modes = (self.claims[key].spec.access_modes for key in user.claims if key in self.claims) if user else ()
        self.version += any("ReadWriteOncePod" in its for its in modes)

    def on_nodes(self) -> list[str]:
        """uids of the pods with claims that hold room on nodes."""
        return list(self._on)

    # what pods need

    def needs(self, pod: Pod) -> Needs:
        """What the claims of a pod ask for; what a refused one has attached counts on the node that it runs on."""
        refused = ""
        reach: list[NodeSelector] = []
        open_claims: list[Unbound] = []
        attached: dict[str, int] = {}
        shared: list[tuple[str, str]] = []
        alone: list[str] = []
        for key, volume in claims_of(pod):
            claim, why = self.claims.get(key), self._refused(pod, key, volume)
            if why:
                refused = refused or f"volume claim {key.partition('/')[2]}: {why}"
            if claim is None:
                continue
            together = len(self._wanting.get(key, ())) > 1
            if not why and is_bound(claim):
                its = self.volumes[claim.spec.volume_name]
                reach += [] if reaches(its) is None else [reaches(its)]  # type: ignore[list-item]
                reach += zones_of(its)
            elif not why:
                open_claims.append(unbound(claim, self._kept_for(claim), key if together else ""))
            driver, handle = self._attachment(key, claim)
            if driver in self._drivers_limited:
                resource = f"{ATTACHABLE}{driver}"
                if self._sharing(key) - {pod.metadata.uid}:
                    shared.append((resource, handle))
                else:
                    attached[resource] = attached.get(resource, 0) + 1
            if together and "ReadWriteOncePod" in claim.spec.access_modes:
                alone.append(key)
        counted = tuple(sorted(attached.items())), tuple(sorted(set(shared)))
        return Needs(tuple(reach), tuple(open_claims), *counted, tuple(alone), refused)

    def _refused(self, pod: Pod, key: str, volume: Volume) -> str:
        claim = self.claims.get(key)
        if claim is None:
            return "the claim does not exist"
        if volume.ephemeral is not None and not any(o.uid == pod.metadata.uid for o in claim.metadata.owner_references):
            return "the claim was not made for this pod, whose ephemeral volume has its name"
        if claim.status.phase == "Lost":
            return "the claim has lost its volume"
        if claim.metadata.deletion_timestamp is not None:
            return "the claim is being deleted"
        if not is_bound(claim):
            name = class_of(claim)
            if claim.spec.volume_name or not name:
                return "the claim is not bound to a volume yet"
            if name not in self.classes:
                return f"the claim is not bound to a volume yet (there is no StorageClass {name})"
            if self.classes[name].volume_binding_mode != DELAYED:
                return f"the claim is not bound to a volume yet (StorageClass {name} does that before a pod has a node)"
        elif claim.spec.volume_name not in self.volumes:
            return f"its volume {claim.spec.volume_name} does not exist"
        others = {uid for uid in self._wanting.get(key, ()) if uid in self._on} - {pod.metadata.uid}
        if "ReadWriteOncePod" in claim.spec.access_modes and others:
            return f"it is for one pod alone (ReadWriteOncePod), and {self._users[min(others)].pod} uses it"
        return ""

    def _kept_for(self, claim: Claim) -> str:
        whose, wanted = (claim.metadata.namespace, claim.metadata.name), unbound(claim, "", "")
        kept = (self.volumes[name] for name in sorted(self._kept.get(whose, ())))
        fit = (v for v in kept if names(v, claim) and large_enough(v, wanted))
        return next((v.metadata.name for v in fit if class_of_volume(v) == wanted.storage_class), "")

    def _attachment(self, key: str, claim: Claim) -> tuple[str, str]:
        """(driver, volume) as it is counted on a node; of a volume that is still to be made the claim stands for it."""
        volume = self.volumes.get(claim.spec.volume_name)
        if volume is None:
            made_by = self.classes.get(class_of(claim))
            return (made_by.provisioner if made_by is not None else ""), key
        csi = volume.spec.csi
        return (csi.driver, csi.volume_handle) if csi is not None else ("", "")

    def available(self, wanted: Unbound) -> list[PersistentVolume]:
        """The volumes that a claim can have, the smallest first; none that a planned pod is to have."""
        if wanted.selected_node:
            return []
        if wanted.kept:
            return [self.volumes[wanted.kept]]
        free = self._free.get(wanted.storage_class, [])
        first = bisect_left(free, (wanted.size, ""), key=lambda one: one[:2])
        return [v for _, name, v in islice(free, first, None) if not self._taken[name] and suits(v, wanted)]

    def decided(self, key: str, but: str = "") -> str | None:
        """The volume that another planned pod with this claim is to have, "" for one that is made; None if none is."""
        for uid in sorted(self._wanting.get(key, ())):
            choice = self.chosen.get(uid)
            if uid != but and choice is not None and key in choice:
                return choice[key]
        return None

    def decide(self, key: str, volume: str) -> None:
        """All planned pods with a claim are to have this volume."""
        for uid in self._wanting.get(key, ()):
            choice = self.chosen.get(uid)
            if choice is not None and key in choice:
                self.choose(uid, {**choice, key: volume})

    def planned_with(self, key: str) -> list[str]:
        """The nodes of the planned pods with a claim."""
        return [self._on[uid] for uid in self._wanting.get(key, ()) if self.chosen.get(uid) and uid in self._on]

    def limits(self, node: str) -> dict[str, int]:
        """Resource -> how many attachments the pods of a node can have."""
        found = {f"{ATTACHABLE}{driver}": most for driver, most in self._limits.get(node, {}).items()}
        for resource in self._idle(node) if found else ():
            if resource in found:
                found[resource] = max(found[resource] - 1, 0)
        return found

    def _idle(self, node: str) -> Iterator[str]:
        """One for each attachment of a node that none of its pods uses."""
        used = set()
        for uid in self._on_node.get(node, ()):
            used |= {self.claims[key].spec.volume_name for key in self._users[uid].claims if key in self.claims}
        for name in self._attached.get(node, ()):
            spec = self._attachments[name].spec
            volume = self.volumes.get(spec.source.persistent_volume_name)
            if volume is not None and volume.spec.csi is not None and volume.metadata.name not in used:
                yield f"{ATTACHABLE}{spec.attacher}"

    # how planned pods get theirs

    def open_claims(self, pod: Pod) -> list[tuple[str, Unbound]]:
        """The claims of a pod that are bound only once it has a node."""
        keys = [key for key, _ in claims_of(pod)]
        found = [(key, self.claims[key]) for key in keys if key in self.claims and not is_bound(self.claims[key])]
        return [
            (key, unbound(c, self._kept_for(c), key if len(self._wanting.get(key, ())) > 1 else "")) for key, c in found
        ]

    def bound_to(self, pod: Pod) -> set[str]:
        """The volumes to which claims of a pod are bound."""
        claims = (self.claims.get(key) for key, _ in claims_of(pod))
        return {c.spec.volume_name for c in claims if c is not None and is_bound(c)}

    def leave(self, uid: str) -> None:
        """What was written for a pod's volumes cannot be taken back: nobody waits for that."""
        self._left_as_is.add(uid)

    def asked(self, uid: str, key: str) -> None:
        """What `todo` said of this claim has been written."""
        self._asked.setdefault(uid, set()).add(key)

    def progress(self, pod: Pod, node: str, reached: Set[str]) -> Progress:
        """How far the volumes of a pod that is planned on a node have come; `reached` can be reached from there."""
        uid, keys = pod.metadata.uid, [key for key, _ in claims_of(pod)]
        each = {key: self._claim_progress(uid, key, node, reached) for key in keys}
        written = () if uid in self._left_as_is else tuple(todo for key in keys for todo in self._written(key, node))
        for one in each.values():
            if one.state == "Failed":
                return one._replace(written=written)
        waits = [key.partition("/")[2] for key in keys if each[key].state == "Open"]
        if not waits:
            return Progress()
        todo = tuple(todo for one in each.values() for todo in one.todo)
        return Progress("Open", f"waiting for the volumes of {', '.join(waits)}", todo, written)

    def _claim_progress(self, uid: str, key: str, node: str, reached: Set[str]) -> Progress:
        claim, name = self.claims.get(key), key.partition("/")[2]
        if claim is None or claim.metadata.deletion_timestamp is not None:
            return Progress("Failed", f"claim {name} has gone")
        if is_bound(claim) and claim.spec.volume_name in self.volumes:
            there = claim.spec.volume_name in reached
            text = f"volume {claim.spec.volume_name} of claim {name} cannot be used on {node}"
            return Progress() if there else Progress("Failed", text)
        if claim.spec.volume_name:
            return Progress("Open")  # it is being bound
        choice, asked = (self.chosen.get(uid) or {}).get(key), key in self._asked.get(uid, ())
        if choice is None:
            return Progress("Failed", f"there is no volume for claim {name} on {node}")
        if choice:
            its = self.volumes.get(choice)
            whose = its.spec.claim_ref if its is not None else None
            if its is not None and whose is not None and whose.uid and names(its, claim):
                return Progress("Open")  # it is being bound
            if its is None or asked or not (whose is None or names(its, claim)):
                return Progress("Failed", f"volume {choice} could not be bound to claim {name}")
            return Progress("Open", todo=(Todo(claim, its),))
        if claim.metadata.annotations.get(SELECTED_NODE):
            return Progress("Open")  # it is being made
        if asked:  # whoever makes volumes says so by taking the node away
            return Progress("Failed", f"no volume could be made for claim {name} on {node}")
        return Progress("Open", todo=(Todo(claim, None),))

    def _written(self, key: str, node: str) -> Iterator[Todo]:
        """What was written for a claim that is to have its volume on a node, and has not led to any yet."""
        claim = self.claims.get(key)
        if claim is None or claim.spec.volume_name:
            return
        if claim.metadata.annotations.get(SELECTED_NODE) == node:
            yield Todo(claim, None)
        for name in sorted(self._kept.get((claim.metadata.namespace, claim.metadata.name), ())):
            its = self.volumes[name]
            if names(its, claim) and BOUND_BY_US in its.metadata.annotations and its.status.phase == "Available":
                yield Todo(claim, its)


def has_claims(pod: Pod) -> bool:
    """Whether a pod has any; nearly every pod has some other volume."""
    return any(v.persistent_volume_claim is not None or v.ephemeral is not None for v in pod.spec.volumes)


def _alike(before: Claim | PersistentVolume | None, now: Claim | PersistentVolume | None) -> bool:
    """Whether nothing has changed that a pod's needs depend on."""
    if before is None or now is None:
        return before is now
    a, b = (replace(o.metadata, resource_version="", finalizers=[]) for o in (before, now))
    return a == b and before.spec == now.spec and before.status == now.status


def claims_of(pod: Pod) -> list[tuple[str, Volume]]:
    """(namespace/name, volume) of the claims of a pod, each once."""
    found = {v.claim(pod.metadata.name): v for v in pod.spec.volumes}
    return [(f"{pod.metadata.namespace}/{name}", v) for name, v in found.items() if name]


def reaches(volume: PersistentVolume) -> NodeSelector | None:
    """From where a volume can be reached by its node affinity; None from everywhere."""
    return volume.spec.node_affinity.required if volume.spec.node_affinity else None


def makes(made_by: StorageClass | None) -> bool:
    """Whether a class makes volumes."""
    return made_by is not None and made_by.provisioner not in ("", NO_PROVISIONER)


def _discard(into: dict[K, set[str]], key: K, value: str) -> None:
    """Out of a set of an index, and the set out of the index once it is empty."""
    into[key].discard(value)
    if not into[key]:
        del into[key]


def _put(into: dict[str, T], key: str, value: T | None) -> None:
    if value is None:
        into.pop(key, None)
    else:
        into[key] = value
