"""What an agent may say of a pod: of batch pods of its own node only, whatever it names is looked at first."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from colocate.cluster.api import SHADOW, STOPPED, NodeColocation, PodHeldBack, PodToEvict, asks_batch, is_batch
from colocate.kube.client import PODS, STRATEGIC, SUBDOMAIN, Api, ApiError, path_of
from colocate.objects import Pod

ASK_SECONDS = 5.0


class NotItsBusiness(ApiError):  # noqa: N818
    """An agent has no say in that pod."""


def speaks(now: NodeColocation | None, *, silent: bool) -> bool:
    """Whether what a node's agent has said last is in force."""
    return now is not None and not silent and now.status.reason not in (SHADOW, STOPPED)


async def write_condition(api: Api, namespace: str, name: str, uid: str, condition: Mapping[str, str | None]) -> None:
    """Have a condition of a pod, if it still is the one that is meant. Raises ApiError, Unreachable."""
    body = {"metadata": {"uid": uid}, "status": {"conditions": [condition]}}
    path = path_of(PODS, namespace, name, "status")
    await api.request("PATCH", path, body, content_type=STRATEGIC, timeout_seconds=ASK_SECONDS, patient=False)


async def pod_meant(api: Api, node: str, named: PodToEvict | PodHeldBack, *, batch_only: bool = True) -> Pod | None:
    """The pod that the agent of a node names; None if it has gone, or is going.

    Raises NotItsBusiness, and what asking raises. `batch_only` is for what harms it.
    """
    if not (SUBDOMAIN.fullmatch(named.namespace) and SUBDOMAIN.fullmatch(named.name)):
        raise NotItsBusiness(400, "BadRequest", f"{named.namespace}/{named.name} is no pod's name")
    path = path_of(PODS, named.namespace, named.name)
    try:
        answer = await api.request("GET", path, timeout_seconds=ASK_SECONDS, patient=False)
    except ApiError as error:
        if error.status == 404:
            return None
        raise
    pod = msgspec.json.decode(answer, type=Pod)
    if pod.metadata.uid != named.uid or pod.deleting:
        return None
    batch = not batch_only or is_batch(pod.metadata.labels, pod.metadata.annotations) or asks_batch(pod)
    if pod.spec.node_name != node or not batch:
        raise NotItsBusiness(403, "Forbidden", f"{node}'s agent has no say in it: it is no batch pod of that node")
    return pod
