"""scheduling.x-k8s.io/v1alpha1, the PodGroup of scheduler-plugins (coscheduling).

Source: scheduler-plugins, pkg/controllers/podgroup_controller.go (phases and counters), with its known defects left
out: members are counted within their namespace, no phase is terminal, and a group whose quorum runs is not Failed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from colocate.objects import Pod
from podgroup.api import POD_GROUP_API, POD_GROUP_LABEL, POD_GROUPS, PodGroup, PodGroupStatus
from podgroup.dialects.dialect import Collection, Dialect


class SchedulingSigs:
    """A label on the pod names its group; quota and owners hold members back by scheduling gates."""

    api, kind = POD_GROUP_API, "PodGroup"
    groups = Collection(POD_GROUPS, PodGroup)

    def group_of(self, pod: Pod) -> str:
        """See Dialect."""
        return pod.metadata.labels.get(POD_GROUP_LABEL, "")

    def group(self, written: PodGroup) -> PodGroup:
        """See Dialect: these are the words that we use ourselves."""
        return written

    def admitted(self, pod: Pod) -> bool:
        """See Dialect. Source: KEP-3521, pod scheduling readiness."""
        return not pod.spec.scheduling_gates

    def status(self, group: PodGroup, pods: Sequence[Pod]) -> PodGroupStatus:
        """Phase and counters as upstream computes them, from the pods as they are; completed groups may come back."""
        running = sum(p.status.phase == "Running" for p in pods)
        succeeded = sum(p.status.phase == "Succeeded" for p in pods)
        failed = sum(p.status.phase == "Failed" for p in pods)
        least = group.spec.min_member
        phase = "Pending"
        if len(pods) >= least and pods:
            phase = "Scheduling"
            if succeeded + running >= least:
                phase = "Running"
            if failed and succeeded + running < least <= failed + running + succeeded:
                phase = "Failed"
            if succeeded >= least:
                phase = "Finished"
        return PodGroupStatus(
            phase=phase,
            occupied_by=",".join(
                sorted({f"{p.metadata.namespace}/{o.name}" for p in pods for o in p.metadata.owner_references[:1]})
            ),
            running=running,
            succeeded=succeeded,
            failed=failed,
            schedule_start_time=group.status.schedule_start_time,
            observed_generation=group.metadata.generation,
        )

    def status_fields(self, status: PodGroupStatus, conditions: bool) -> Mapping[str, Any]:
        """See Dialect."""
        fields: dict[str, Any] = {
            "phase": status.phase,
            "occupiedBy": status.occupied_by or None,
            "running": status.running,
            "succeeded": status.succeeded,
            "failed": status.failed,
        }
        if conditions:
            fields["conditions"] = [msgspec.to_builtins(c) for c in status.conditions]
            fields["observedGeneration"] = status.observed_generation
        return fields


DIALECT: Dialect = SchedulingSigs()
"""The one that is spoken."""
