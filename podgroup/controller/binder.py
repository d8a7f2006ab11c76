"""The writes of the controller: plans, bindings, deletions, statuses. Each is refused once leadership is in doubt.

A bind is compare-and-swap: `pods/binding` with the pod's uid and resourceVersion. What an unanswered bind did is read
back before anything else is done with that pod.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

import msgspec
import structlog

from colocate.kube.client import CLAIMS, EVENTS, MERGE, PODS, STRATEGIC, VOLUMES, Api, ApiError, Unreachable, path_of
from colocate.kube.events import event_about
from colocate.kube.lease import Election, LeadershipLost
from colocate.objects import Claim, Condition, PersistentVolume, Pod
from colocate.units import time_text
from podgroup.api import PLAN_API, PLANS, GangPlan, PodGroup, PodGroupStatus
from podgroup.dialects.scheduling_sigs import DIALECT
from podgroup.state.large_plans import compact
from podgroup.state.volumes import BOUND_BY_US, SELECTED_NODE

EPOCH = "colocate.io/epoch"
PLAN = "colocate.io/plan"
COMPONENT = "colocate-controller"
log = structlog.get_logger()


def now_text() -> str:
    """The wall clock as the API server writes it."""
    return time_text(time.time())


class Binder:
    """Everything that is written, by one leader in one epoch."""

    def __init__(self, api: Api, epoch: int, election: Election) -> None:
        self._api, self.epoch, self._election = api, epoch, election
        self._token = secrets.token_hex(3)

    @property
    def mark(self) -> str:
        """What this leader writes on pods: its epoch, and what no pod's owner can have guessed."""
        return f"{self.epoch}.{self._token}"

    async def _write(self, method: str, path: str, body: Any, content_type: str = "application/json") -> bytes:
        self._election.check()
        return await self._api.request(method, path, body, content_type=content_type, patient=False)

    async def bind(self, pod: Pod, node: str, plan_id: str) -> Pod | None:
        """Bind a pod; the pod as it is now if that had to be read back, None if it is gone.

        Raises ApiError, Unreachable, and LeadershipLost if another leader has marked it since.
        """
        meta = pod.metadata
        body = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {
                "name": meta.name,
                "uid": meta.uid,
                "resourceVersion": meta.resource_version,
                "annotations": {EPOCH: self.mark, **({PLAN: plan_id} if plan_id else {})},
            },
            "target": {"apiVersion": "v1", "kind": "Node", "name": node},
        }
        try:
            await self._write("POST", path_of(PODS, meta.namespace, meta.name, "binding"), body)
        except (ApiError, Unreachable) as error:
            if isinstance(error, ApiError) and error.status not in (404, 409, 500, 503, 504):
                raise
            now = await self.read(pod)
            mark = now.metadata.annotations.get(EPOCH) if now is not None else None
            if mark not in (None, self.mark, meta.annotations.get(EPOCH)):
                await self._election.confirm()  # somebody fences us off, or the pod's owner plays with marks
            return now
        bound = msgspec.structs.replace(pod.spec, node_name=node)
        return msgspec.structs.replace(pod, spec=bound)

    async def read(self, pod: Pod) -> Pod | None:
        """The pod as it is now; None if it is gone or a namesake has taken its place."""
        try:
            now = await self._api.get(Pod, path_of(PODS, pod.metadata.namespace, pod.metadata.name))
        except ApiError as error:
            if error.status != 404:
                raise
            return None
        if now.metadata.uid != pod.metadata.uid:
            return None
        return now

    async def stamp(self, pod: Pod) -> Pod | None:
        """Mark an unbound pod with this epoch: binds of an earlier leader then fail on its resourceVersion."""
        meta = pod.metadata
        body = {"metadata": {"uid": meta.uid, "annotations": {EPOCH: self.mark}}}
        try:
            answer = await self._write("PATCH", path_of(PODS, meta.namespace, meta.name), body, MERGE)
        except ApiError as error:
            if error.status not in (404, 409):
                raise
            return await self.read(pod)
        return msgspec.json.decode(answer, type=Pod)

    async def keep_volume(self, volume: PersistentVolume, claim: Claim) -> PersistentVolume:
        """Keep a volume for a claim, as long as it is what was seen. Raises ApiError 409 if it is not."""
        meta, whose = volume.metadata, claim.metadata
        reference = {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "namespace": whose.namespace,
            "name": whose.name,
            "uid": whose.uid,
            "resourceVersion": whose.resource_version,
        }
        ours = {} if volume.spec.claim_ref is not None else {"annotations": {BOUND_BY_US: "yes"}}  # a user keeps it too
        body = {"metadata": {"resourceVersion": meta.resource_version, **ours}, "spec": {"claimRef": reference}}
        answer = await self._write("PATCH", path_of(VOLUMES, "", meta.name), body, MERGE)
        return msgspec.json.decode(answer, type=PersistentVolume)

    async def free_volume(self, volume: PersistentVolume) -> PersistentVolume:
        """Keep a volume for nobody any more, unless it has been bound meanwhile. Raises ApiError 409 then."""
        meta = {"resourceVersion": volume.metadata.resource_version, "annotations": {BOUND_BY_US: None}}
        body = {"metadata": meta, "spec": {"claimRef": None}}
        answer = await self._write("PATCH", path_of(VOLUMES, "", volume.metadata.name), body, MERGE)
        return msgspec.json.decode(answer, type=PersistentVolume)

    async def select_node(self, claim: Claim, node: str | None) -> Claim:
        """Have a claim's volume made for this node, or for none. Raises ApiError 409 if it is not what was seen."""
        meta = claim.metadata
        body = {"metadata": {"resourceVersion": meta.resource_version, "annotations": {SELECTED_NODE: node}}}
        answer = await self._write("PATCH", path_of(CLAIMS, meta.namespace, meta.name), body, MERGE)
        return msgspec.json.decode(answer, type=Claim)

    async def delete(self, pod: Pod, reason: str, message: str, *, at_once: bool = False) -> bool:
        """Ask for the end of a pod that has an owner, marked so that a Job need not count it as a failure (KEP-3329).

        False if it had gone already, or is another one.

        `at_once` without the grace period: only where no kubelet is there to end it.
        """
        meta = pod.metadata
        target = Condition(
            type="DisruptionTarget", status="True", reason=reason, message=message, last_transition_time=now_text()
        )
        try:
            await self._patch_conditions(pod, target)
            body: dict[str, Any] = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": meta.uid}}
            body |= {"gracePeriodSeconds": 0} if at_once else {}
            await self._write("DELETE", path_of(PODS, meta.namespace, meta.name), body)
        except ApiError as error:
            if error.status not in (404, 409):
                raise
            return False
        return True

    async def tell_pod(self, pod: Pod, reason: str, message: str) -> None:
        """Say on a pod why it is not bound."""
        condition = Condition(
            type="PodScheduled", status="False", reason=reason, message=message, last_transition_time=now_text()
        )
        try:
            await self._patch_conditions(pod, condition)
        except ApiError as error:
            if error.status not in (404, 409):
                raise

    async def _patch_conditions(self, pod: Pod, condition: Condition) -> None:
        meta = pod.metadata
        body = {"metadata": {"uid": meta.uid}, "status": {"conditions": [msgspec.to_builtins(condition)]}}
        await self._write("PATCH", path_of(PODS, meta.namespace, meta.name, "status"), body, STRATEGIC)

    async def save(self, plan: GangPlan) -> GangPlan:
        """Persist a plan. Raises ApiError 409 if it is not what was read, LeadershipLost if a later epoch has it."""
        meta = plan.metadata
        body = {"apiVersion": PLAN_API, "kind": "GangPlan", **msgspec.to_builtins(compact(plan))}
        try:
            if meta.resource_version:
                answer = await self._write("PUT", path_of(PLANS, meta.namespace, meta.name), body)
            else:
                answer = await self._write("POST", path_of(PLANS, meta.namespace), body)
        except ApiError as error:
            if error.status == 409:
                there = await self._api.get(GangPlan, path_of(PLANS, meta.namespace, meta.name))
                if there.spec.epoch > self.epoch:
                    raise LeadershipLost(f"plan {meta.name} is of epoch {there.spec.epoch}: another leads") from error
            raise
        return msgspec.json.decode(answer, type=GangPlan)

    async def reload(self, plan: GangPlan) -> GangPlan:
        """The plan as it is now. Raises ApiError 404 if there is none."""
        return await self._api.get(GangPlan, path_of(PLANS, plan.metadata.namespace, plan.metadata.name))

    async def forget(self, plan: GangPlan) -> None:
        """Remove this very plan, whose group is gone."""
        meta = plan.metadata
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": meta.uid}}
        try:
            await self._write("DELETE", path_of(PLANS, meta.namespace, meta.name), body)
        except ApiError as error:
            if error.status not in (404, 409):
                raise

    async def tell_group(self, group: PodGroup, status: PodGroupStatus, conditions: bool) -> None:
        """Write a PodGroup's status; conditions and observedGeneration only where its schema has them."""
        meta, fields = group.metadata, DIALECT.status_fields(status, conditions)
        try:
            path = path_of(DIALECT.groups.path, meta.namespace, meta.name, "status")
            await self._write("PATCH", path, {"status": fields}, MERGE)
        except ApiError as error:
            if error.status != 404:
                raise

    async def event(self, about: Pod | PodGroup, reason: str, message: str, warning: bool) -> None:
        """One Event; losing it is no failure."""
        meta = about.metadata
        api, kind = ("v1", "Pod") if isinstance(about, Pod) else (DIALECT.api, DIALECT.kind)
        body = event_about(api, kind, meta, reason, message, COMPONENT, warning=warning)
        try:
            await self._write("POST", path_of(EVENTS, meta.namespace), body)
        except (ApiError, Unreachable) as error:
            log.debug("event_lost", error=str(error))
