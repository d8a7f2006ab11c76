"""Power caps of cards that a workload is given, in force before it starts; and who was given which.

A container's cards are in its environment or among its CDI devices, as device plugins put them there (a DRA driver's
device is a claim, which tells of no card); a job's in its caller's CUDA_, ROCR_ or HIP_VISIBLE_DEVICES. A cap that
cannot be set keeps the container from being made: kubelet tries again, and says why.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from colocate.actuate.driver import DriverFailed
from colocate.cgroup.port import FilePort
from colocate.cgroup.tree import Tree, joined, main_hierarchy
from colocate.cluster.api import MAX_SLOWDOWN, POWER
from colocate.decide.caps import Share, caps_of, shares_of
from colocate.decide.node_budget import others_watts
from colocate.decide.outcome import watts_for
from colocate.errors import BadInput, JournalBroken
from colocate.observe.pods import PodLister
from colocate.observe.workloads import pod_uid
from colocate.policy.schema import PowerPolicy
from colocate.snapshot import Card, NodeSnapshot
from colocate.units import parse_watts

if TYPE_CHECKING:
    from colocate.agent.cards import NodeCards
    from colocate.nri import Container, Pod

KNOWN_SECONDS, START_SECONDS = 0.5, 1.2
"""So long a container that is about to start waits at most, to be known and for its caps: a runtime drops a plugin
after two seconds."""
VISIBLE = ("NVIDIA_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
"""What NVIDIA's device plugin and runtime go by, and what a program goes by."""
KFD, RENDER = "/dev/kfd", "/dev/dri/renderD"
ALL_DEVICES = frozenset({"/dev/mem", "/dev/kmsg", "/dev/port"})
"""Which no device plugin gives."""
NOBODYS = frozenset({"", "all", "none", "void", "nodevfiles", "-1"})
"""Of an image rather than of a device plugin: they give a container no card of its own."""


def named(values: Iterable[str]) -> tuple[str, ...]:
    """The cards in lists like `GPU-…,GPU-…` or `0,1`, each once: UUIDs and indices."""
    found: dict[str, None] = {}
    for value in values:
        for each in value.split(","):
            if each.strip().lower() not in NOBODYS:
                found[each.strip()] = None
    return tuple(found)


def files_of(container: Container) -> tuple[str, ...]:
    """Device files by which AMD's device plugin tells of cards; none of a privileged container, which has all there
    are: that says nothing, and it must not wait for anything of ours."""
    if KFD not in container.files or not ALL_DEVICES.isdisjoint(container.files):
        return ()
    return tuple(dict.fromkeys(file for file in container.files if file.startswith(RENDER)))


def given(container: Container) -> tuple[str, ...]:
    """What a container is given: of a DRA driver the claim, which tells of no card."""
    kinds = (device.partition("=") for device in container.devices)
    by_name = [value for kind, _, value in kinds if "gpu" in kind or kind.endswith("/mig")]
    return named([*by_name, container.env.get(VISIBLE[0], "")])


class Watts:
    """One node's."""

    def __init__(
        self,
        port: FilePort,
        tree: Callable[[], Tree],
        lister: PodLister,
        cards: Callable[[], tuple[NodeCards | None, NodeSnapshot | None]],
        policy: Callable[[], PowerPolicy],
        allowed: Callable[[], float],
    ) -> None:
        self._port, self._tree, self._lister, self._cards, self._policy = port, tree, lister, cards, policy
        self._allowed = allowed
        """What all limits may add up to, in watts; 0: whatever they do."""
        self._starting: dict[str, dict[str, float]] = {}
        """Cgroup -> what its cards are about to be capped at."""
        self._starting_lock = threading.Lock()

    async def read(self, seconds: float) -> None:
        """Wait until the node's cards are known, at most so long; not where there are none to wait for."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            cards, snapshot = self._cards()
            if cards is None or (snapshot is not None and snapshot.cards):
                return
            await asyncio.sleep(0.05)

    def known(self, pods: Iterable[tuple[Pod, Container]]) -> None:
        """Containers that were there before us: what they were given."""
        cards, _ = self._cards()
        if cards is None:
            return
        for pod, container in pods:
            if names := given(container):  # the cards themselves may not be read yet
                self._allot(cards, f"pod:{pod.uid}", names)

    def ended(self, id_: str, path: str = "") -> None:
        """A workload is no more."""
        cards, _ = self._cards()
        if cards is not None:
            cards.allotted.pop(id_, None)
            cards.caps.ended(path)

    def pod_removed(self, uid: str) -> None:
        """A sandbox of a pod is no more; the pod may have another."""
        if self._path(uid) is None:
            self.ended(f"pod:{uid}")

    async def before_start(self, pod: Pod, container: Container) -> None:
        """Have the caps of its cards in force. Raises BadInput: then it may not start."""
        wanted, what = given(container), f"{pod.namespace}/{pod.name}"
        deadline = time.monotonic() + KNOWN_SECONDS
        while pod.uid not in self._lister.pods and self._lister.expected and time.monotonic() < deadline:
            await asyncio.sleep(0.02)  # the API server tells of it about when kubelet hears of it
        watts = self._asked(pod, what)
        if wanted and not watts and MAX_SLOWDOWN in pod.annotations:
            mend = "its admission writes them (colocate power outcomes)"
            raise BadInput(f"{what} has {MAX_SLOWDOWN} and asks for no watts: {mend}")
        cards, snapshot = self._cards()
        if cards is None or snapshot is None:
            if watts:
                raise BadInput(f"{what} asks for {watts} W, and the GPUs of this node are not read (yet)")
            return
        there, known = _by_name(snapshot), self._lister.pods.get(pod.uid)
        missing = next((name for name in wanted if name not in there), "")
        if watts and missing:
            why = "a part of a card has no limit of its own" if missing.startswith("MIG-") else "it is not read (yet)"
            raise BadInput(f"{what} asks for {watts} W, and is given {missing}: {why}")
        wanted = (*wanted, *(there[file].uuid for file in files_of(container) if file in there))
        every = self._allot(cards, f"pod:{pod.uid}", wanted)
        if not watts:
            return
        path = self._path(pod.uid)
        if path is None:
            raise BadInput(f"{what} asks for {watts} W, and its cgroup is not found")
        uuids = [there[name].uuid for name in every if name in there]  # those of its other containers have less now
        share = Share(f"pod:{pod.uid}", what, path, watts / max(known.cards if known is not None else 0, len(uuids)))
        try:
            await asyncio.to_thread(self._cap, cards, snapshot, share, uuids)
        except (DriverFailed, JournalBroken) as error:
            raise BadInput(f"{what} asks for {watts} W: {error}") from error

    def _asked(self, pod: Pod, what: str) -> int:
        """The watts of a pod, by what the API server tells of it, else by its annotation. Raises BadInput."""
        known, says = self._lister.pods.get(pod.uid), pod.annotations.get(POWER, "")
        if known is not None and known.power_watts:
            return known.power_watts
        try:
            watts = parse_watts(says) if says else 0
        except ValueError as error:
            raise BadInput(f"{what}: its annotation {POWER}: {error}") from error
        if known is None and not watts and self._lister.expected and self._policy().offer:
            raise BadInput(f"{what} is not known yet, and may ask for watts: it is tried again")
        return watts

    def of_outcome(self, slowdown: float, class_: str, visible: str) -> tuple[float, str]:
        """What the GPUs of a job may draw together where it may be so much slower, and how that was found.

        Raises BadInput.
        """
        models, count = {model.name: model for model in self._policy().models}, len(named([visible]))
        if not count:
            raise BadInput("--max-slowdown: name its GPUs in CUDA_VISIBLE_DEVICES")
        if class_ not in models:
            known = ", ".join(sorted(models)) or "none"
            raise BadInput(f"--power-class {class_!r}: the policy's power.models have no such class; known: {known}")
        each = watts_for(models[class_], slowdown)
        if each is None:
            raise BadInput(f"--max-slowdown {slowdown:.3g}: the model of {class_} says that no cap keeps it")
        return float(each * count), f"{class_} at {slowdown:.3g}: {each} W of each GPU"

    def before_job(self, name: str, path: str, watts: float, visible: str) -> None:
        """The same for a job, whose caller says which cards it may see. Raises BadInput."""
        cards, snapshot = self._cards()
        if cards is None or snapshot is None:
            raise BadInput("--power-cap: this node has no GPU whose power could be limited")
        there, id_ = _by_name(snapshot), f"job:{name}"
        wanted = named([visible])
        missing = [n for n in wanted if n not in there]
        if missing:
            raise BadInput(f"--power-cap: {VISIBLE[1]} (or ROCR_, HIP_) has {missing[0]}, which is no GPU of this node")
        uuids = self._allot(cards, id_, [there[n].uuid for n in wanted], anew=True)
        try:
            self._cap(cards, snapshot, Share(id_, name, path, watts / max(len(uuids), 1)), uuids)
        except (BadInput, DriverFailed, JournalBroken) as error:
            self.ended(id_, path)
            raise BadInput(f"--power-cap: {error}") from error

    def job_known(self, name: str, visible: str) -> None:
        """A job of an agent before us."""
        cards, _ = self._cards()
        if cards is not None:
            self._allot(cards, f"job:{name}", named([visible]), anew=True)

    def _cap(self, cards: NodeCards, snapshot: NodeSnapshot, mine: Share, uuids: Iterable[str]) -> None:
        """Raises BadInput where a card may not be capped so, DriverFailed, JournalBroken."""
        wishes = []
        for uuid in uuids:
            card = snapshot.cards[uuid]
            shares, others = shares_of(card, snapshot, without=mine.workload)
            found, verdict = caps_of(card, [mine, *shares], others)
            if verdict.reason != "Capped":
                raise BadInput(f"GPU {card.index}: {verdict.message}")
            wishes += [(uuid, cap.watts) for cap in found if cap.workload == mine.workload]
        deadline = time.monotonic() + START_SECONDS
        if snapshot.power_share or self._allowed():
            cards.caps.take_back(deadline)
        with self._within_budget(cards, snapshot, mine.path, {uuid: watts or 0.0 for uuid, watts in wishes}):
            lowered = cards.caps.limits() if self._allowed() or snapshot.power_share else {}
            for uuid, watts in wishes:  # only once all of them may be, and none above what a budget leaves it by now
                wish = watts or 0.0
                cards.caps.set_now(uuid, min(wish, lowered.get(uuid, wish)), mine.path, deadline)

    @contextlib.contextmanager
    def _within_budget(
        self, cards: NodeCards, snapshot: NodeSnapshot, path: str, wishes: dict[str, float]
    ) -> Iterator[None]:
        """Raises BadInput where the node's budget has not so much left; who starts at the same time counts too."""
        budget = self._allowed()
        with self._starting_lock:
            limits = cards.caps.limits()
            for uuid, watts in (pair for others in self._starting.values() for pair in others.items()):
                limits[uuid] = min(watts, limits.get(uuid, watts))
            wanted = {**limits, **{u: min(watts, limits.get(u, watts)) for u, watts in wishes.items()}}
            left = budget - others_watts(snapshot.cards, set(wanted)) - sum(wanted.values())
            if budget and left < 0:
                raise BadInput(
                    f"the power budget of this node is {budget:g} W now, and {-left:g} W of that are not left"
                )
            self._starting[path] = wishes
        try:
            yield
        finally:
            with self._starting_lock:
                self._starting.pop(path, None)

    def _allot(self, cards: NodeCards, id_: str, uuids: Iterable[str], *, anew: bool = False) -> tuple[str, ...]:
        """All that it was given by now."""
        before = () if anew else cards.allotted.get(id_, ())
        cards.allotted[id_] = tuple(dict.fromkeys([*before, *uuids]))
        return cards.allotted[id_]

    def _path(self, uid: str) -> str | None:
        """The pod's cgroup where kubelet made it: it has the pause container until the pod ends."""
        tree, hierarchy = self._tree(), main_hierarchy(self._port)
        for level in filter(None, (tree.kubepods, tree.burstable, tree.besteffort)):
            for child in self._port.children(hierarchy, level):
                if pod_uid(child) == uid:
                    return joined(level, child)
        return None


def _by_name(snapshot: NodeSnapshot) -> Mapping[str, Card]:
    """Cards by UUID, by index, and by device file."""
    cards = snapshot.cards.values()
    by_file = {card.file: card for card in cards if card.file}
    return by_file | {str(card.index): card for card in cards} | {card.uuid: card for card in cards}
