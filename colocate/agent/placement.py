"""Pods that say that they are batch go into the tier when they start, by the container runtime's plugin protocol.

kubelet has already chosen where a container goes; the runtime asks before it makes it (NRI, CreateContainer). The
pause container stays where it is, so kubelet finds its own directory; the pod's directory in the tier is nobody's
business but ours, and goes when the pod goes. What cannot be understood starts as plain BestEffort, and that is said.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable

import structlog

from colocate.agent.watts import Watts, files_of, given
from colocate.cgroup.port import FilePort
from colocate.cgroup.tree import Tree, inodes_of, joined, rmdir_tree
from colocate.cluster.api import GPU_BORROW, is_batch
from colocate.errors import BadInput, ColocateError
from colocate.nri import Adjustment, Container, Limits, Pod, Refused, Update
from colocate.observe.pods import BatchRequest, PodLister
from colocate.observe.workloads import pod_uid

LEAST_SHARES, MOST_SHARES, LEAST_QUOTA_US = 2, 262_144, 1000
"""The kernel refuses less, and more."""
GPU_DRAIN = "colocate.io/gpu-drain"
SHORTER = {
    "blocking": {"CUDA_LAUNCH_BLOCKING": "1", "HIP_LAUNCH_BLOCKING": "1"},
    "short-queue": {"CUDA_SCALE_LAUNCH_QUEUES": "0.25x"},
}
"""By the label or annotation of a batch pod: each launch waits for the one before; a quarter of them may queue."""
log = structlog.get_logger()


def in_tier(path: str, uid: str, tree: Tree) -> str | None:
    """A container's cgroup in the tier, in the form of the runtime's driver, from where kubelet would have it.

    `…/kubepods/besteffort/pod<uid>/<id>`, or with the systemd driver `kubepods-besteffort-pod<uid>.slice:<prefix>:<id>`
    with underscores in the uid. None for a Guaranteed pod, which may have CPUs of its own, and for what is neither.
    """
    if tree.kubepods is None:
        return None
    base = re.escape(tree.kubepods.rpartition("/")[2].removesuffix(".slice"))
    if tree.systemd_driver:
        told = re.escape(uid.replace("-", "_"))
        found = re.fullmatch(rf"({base})-(?:besteffort|burstable)(-pod{told}\.slice:.+)", path)
        return found and f"{found[1]}-batch{found[2]}"
    found = re.fullmatch(rf"((?:/.*)?/{base})/(?:besteffort|burstable)(/pod{re.escape(uid)}/[^/]+)", path)
    return found and f"{found[1]}/batch{found[2]}"


def shorter_drain(pod: Pod) -> dict[str, str]:
    """What makes a pod's GPU work stop sooner once it is stopped, if its owner asks for that; it costs it some speed.

    CUDA C++ Programming Guide, environment variables; ROCm's HIP has its own word. What it costs: benchmarks/gpu.
    """
    wanted = pod.labels.get(GPU_DRAIN) or pod.annotations.get(GPU_DRAIN)
    if wanted and wanted not in SHORTER:
        known = ", ".join(SHORTER)
        log.warning("gpu_drain_unknown", pod=f"{pod.namespace}/{pod.name}", value=wanted, mend=f"write one of {known}")
    return dict(SHORTER.get(wanted or "", {}))


def limits_of(asked: BatchRequest) -> Limits:
    """What a container gets that asks for batch resources: kubelet knows nothing of them, and would give it none."""
    shares = None
    if asked.cpu_milli is not None:
        shares = min(max(asked.cpu_milli * 1024 // 1000, LEAST_SHARES), MOST_SHARES)
    return Limits(
        cpu_shares=shares,
        cpu_quota_us=None if asked.cpu_limit_milli is None else max(asked.cpu_limit_milli * 100, LEAST_QUOTA_US),
        cpu_period_us=None if asked.cpu_limit_milli is None else 100_000,
        memory_bytes=asked.memory_limit_bytes,
    )


class Placement:
    """A handler of the protocol (`colocate.nri.Handler`)."""

    def __init__(
        self,
        port: FilePort,
        tree: Callable[[], Tree],
        lister: PodLister,
        ensure_tier: Callable[[], object],
        *,
        shadow: bool,
        lend: Callable[[str], str] = lambda _uid: "",
        watts: Watts | None = None,
    ) -> None:
        """The `lister` has what the API server says of this node's pods; `lend` gives a pod the name of a card; `watts`
        has the power of its cards limited."""
        self._port, self._tree, self._lister, self._shadow = port, tree, lister, shadow
        self._ensure_tier, self._lend, self._watts = ensure_tier, lend, watts

    def synchronize(self, pods: list[Pod], containers: list[Container]) -> Iterable[Update]:
        """The runtime is there: what pods that have gone meanwhile left in the tier goes too."""
        log.info("runtime_connected", pods=len(pods), containers=len(containers))
        known = {pod.uid for pod in pods}
        self._remove(lambda uid: uid not in known)
        if self._watts is not None:
            by_id = {pod.id: pod for pod in pods}
            self._watts.known((by_id[c.pod_id], c) for c in containers if c.pod_id in by_id)
        return ()

    def create_container(self, pod: Pod, container: Container) -> Adjustment | Awaitable[Adjustment | None] | None:
        """Into the tier, if its pod says that it is batch, or asks for batch resources, and the tier is there; and
        whatever pod it is of, with the power of its cards limited as it asks.

        Raises Refused of one that borrows a card where none is lent just now, or whose cards cannot be limited: kubelet
        tries again.
        """
        adjustment = self._place(pod, container)
        borrowed = adjustment.devices if adjustment is not None else ()
        made = container._replace(devices=(*container.devices, *borrowed))
        if self._watts is None or self._shadow or not (given(made) or files_of(made)):
            return adjustment
        return self._with_watts(self._watts, pod, made, adjustment)

    async def _with_watts(
        self, watts: Watts, pod: Pod, container: Container, adjustment: Adjustment | None
    ) -> Adjustment | None:
        """The same, once its cards' limits are in force: a driver is waited for beside everything else."""
        try:
            await watts.before_start(pod, container)
        except Exception as error:  # whoever asks for watts starts with them, or not at all
            known = isinstance(error, BadInput)
            said = str(error) if known else f"{pod.namespace}/{pod.name}: {type(error).__name__}: {error}"
            if not known:
                log.exception("pod_refused")
            log.warning("pod_refused", pod=f"{pod.namespace}/{pod.name}", container=container.name, why=said)
            raise Refused(said) from error
        return adjustment

    def _place(self, pod: Pod, container: Container) -> Adjustment | None:
        known = self._lister.pods.get(pod.uid)
        requests = known.batch if known is not None else {}
        if known is None and self._lister.expected and not is_batch(pod.labels, pod.annotations):
            log.warning("pod_not_known", pod=f"{pod.namespace}/{pod.name}", effect="its batch requests are not known")
        if self._shadow or not (requests or is_batch(pod.labels, pod.annotations)):
            return None
        tree = self._tree()
        path = in_tier(container.cgroups_path, pod.uid, tree)
        if path is not None and not inodes_of(self._port, tree.tier_path):
            self._have_tier()
        if path is None or not inodes_of(self._port, tree.tier_path):
            why = "there is no tier yet" if path is not None else f"its cgroup is {container.cgroups_path}"
            log.warning("pod_not_placed", pod=f"{pod.namespace}/{pod.name}", container=container.name, reason=why)
            return None
        asked = requests.get(container.name)
        limits = limits_of(asked) if asked is not None else Limits()
        devices = (self._borrowed(pod),) if asked is not None and asked.borrows else ()
        return Adjustment(path, limits, env=shorter_drain(pod), devices=devices)

    def _borrowed(self, pod: Pod) -> str:
        card = self._lend(pod.uid)
        if not card:
            raise Refused(f"{pod.namespace}/{pod.name} asks for {GPU_BORROW}, and no service lends a card just now")
        return card

    def _have_tier(self) -> None:
        """systemd took it away with its last pod, and the next tick, which makes it anew, is yet to come."""
        try:
            self._ensure_tier()
        except (ColocateError, OSError) as error:
            log.warning("tier_not_made", error=str(error))

    def container_removed(self, pod: Pod, container: Container) -> None:
        """The runtime removes the container's own directory."""

    def pod_removed(self, pod: Pod) -> None:
        """Its directory in the tier is empty now; neither kubelet nor the runtime knows of it."""
        self._remove(lambda uid: uid == pod.uid)
        if self._watts is not None:
            self._watts.pod_removed(pod.uid)

    def _remove(self, gone: Callable[[str], bool]) -> None:
        """What pods that have gone left in the tier; what is occupied stays."""
        tier = self._tree().tier_path
        for hierarchy in self._port.layout.mounts if not self._shadow else ():
            for child in self._port.children(hierarchy, tier):
                uid = pod_uid(child)
                if uid is not None and gone(uid):
                    rmdir_tree(self._port, hierarchy, joined(tier, child))

    def away(self) -> None:
        """Batch pods start as plain BestEffort until it is back."""
        log.warning("runtime_gone", effect="batch pods start as plain BestEffort until it is back")
