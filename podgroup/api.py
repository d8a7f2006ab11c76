"""The kinds of gang scheduling: upstream's PodGroup, and our GangPlan beside each; where they are in the API."""

from __future__ import annotations

from typing import Literal

import msgspec

from colocate.cluster.api import POWER
from colocate.objects import Condition, LabelSelector, Lean, ObjectMeta, Quantities

POD_GROUP_LABEL = "scheduling.x-k8s.io/pod-group"
POD_GROUP_API = "scheduling.x-k8s.io/v1alpha1"
PLAN_API = "colocate.io/v1alpha1"
POD_GROUPS = f"/apis/{POD_GROUP_API}/podgroups"
SCHEDULERS = "colocate.io/schedulers"
"""Annotation of the controller's lease: the `schedulerName`s that it answers to."""
ORDER = "colocate.io/order"
"""Annotation of that lease too: the policy by which gangs and nodes are ordered."""
LEASE = ("colocate-system", "colocate-controller")
"""Namespace and name of that lease, unless the controller was told otherwise."""
PLANS = f"/apis/{PLAN_API}/gangplans"
POWER_BUDGETS = f"/apis/{PLAN_API}/powerbudgets"


class PodGroupSpec(Lean, frozen=True):
    """scheduling.x-k8s.io/v1alpha1; a timeout of 0 means the default, as None does."""

    min_member: int = 1
    min_resources: Quantities = {}
    schedule_timeout_seconds: int | None = None


class PodGroupStatus(Lean, frozen=True):
    """Phases and counters as upstream's controller writes them; conditions where the installed schema has them."""

    phase: str = ""
    occupied_by: str = ""
    running: int = 0
    succeeded: int = 0
    failed: int = 0
    schedule_start_time: str | None = None
    observed_generation: int = 0
    conditions: list[Condition] = []


class PodGroup(Lean, frozen=True):
    """A group of pods that start all or none."""

    metadata: ObjectMeta
    spec: PodGroupSpec = PodGroupSpec()
    status: PodGroupStatus = PodGroupStatus()


class PlannedMember(Lean, frozen=True):
    """One pod and the node it is bound to by the plan."""

    name: str
    uid: str
    node: str = ""
    volumes: dict[str, str] = {}
    """Claim (namespace/name) -> the volume that it is to have; claims whose volumes are made are not here."""
    at: int | None = None
    """Instead of the node's name its number in the plan's `nodes`, where there are many members."""


PlanPhase = Literal["Waiting", "Provisioning", "Binding", "Confirming", "Repairing", "RollingBack", "Running"]


class GangPlanSpec(Lean, frozen=True):
    """The intent, written before the first bind: what a crash leaves to be resumed or rolled back."""

    pod_group: str = ""
    pod_group_uid: str = ""
    plan_id: str = ""
    """Names one intent; stamped on each pod that is bound by it. Empty while nothing is planned."""
    epoch: int = 0
    """The leader's: how often leadership had changed hands when it began."""
    created: str | None = None
    began: str | None = None
    """When the first plan of this run of the group was made: for a while from then on it is owed its minResources."""
    timeout_seconds: int = 0
    min_member: int = 1
    """The group's quorum when it was planned: it stands although the PodGroup may have gone since."""
    note: str = ""
    """What was unusual about this start."""
    prefix: str = ""
    """How the names of all members begin, where there are many: they have the rest."""
    nodes: list[str] = []
    members: list[PlannedMember] = []


class KeptPlace(Lean, frozen=True):
    """The place of a lost member, kept for the one that replaces it."""

    node: str
    requests: Quantities = {}
    until: str = ""
    count: int = 1
    failed: bool = False
    """Whether it is kept though no member lives: one failed, or the owner makes all anew when one has gone."""


class Counterfactual(Lean, frozen=True):
    """A change with which the solver places the group."""

    change: str
    proven: bool = True


class Advice(Lean, frozen=True):
    """What would let a gang start that does not fit, and when it may."""

    given: str | None = None
    counterfactuals: list[Counterfactual] = []
    estimate_seconds: tuple[float, float] | None = None
    """From when it was given to the gang's start: (earliest, latest); None if that is not known."""
    fits_when_empty: bool = True
    """Whether it could start if everything else ended."""


class GangPlanStatus(Lean, frozen=True):
    """Why the group waits, or how far its start has come."""

    phase: PlanPhase = msgspec.field(default_factory=lambda: "Waiting")
    """Always written: a default that msgspec leaves out would show as nothing."""
    reason: str = ""
    message: str = ""
    position: int = 0
    """In the queue, from 1; 0 while it does not wait."""
    waiting_since: str | None = None
    advice: Advice | None = None
    kept_places: list[KeptPlace] = []
    """So that they outlive the controller that keeps them, as what follows does."""
    taken_back: int = 0
    """How often in a row its start has been taken back."""
    backing_off_until: str | None = None
    reserved_since: str | None = None
    """Since when what it claims as the head of the queue has not grown."""
    reserved_members: int = 0
    """The places of how many members that claim had at most."""
    conditions: list[Condition] = []
    observed_generation: int = 0

    @property
    def waits(self) -> bool:
        """Whether it says why somebody waits: the gang, or its members beyond a quorum that runs."""
        return bool(self.reason) and (self.phase == "Waiting" or self.reason == "SurplusWaits")


class GangPlan(Lean, frozen=True):
    """colocate.io/v1alpha1 GangPlan: our own object beside each PodGroup, of the same name."""

    metadata: ObjectMeta
    spec: GangPlanSpec = GangPlanSpec()
    status: GangPlanStatus = GangPlanStatus()


class PowerBudgetSpec(Lean, frozen=True):
    """How many watts the pods on a set of nodes may ask for together: on a rack, a row, or in the whole cluster."""

    watts: int = 0
    """What these nodes may draw, all together."""
    node_selector: LabelSelector = LabelSelector()
    """Of the labels of nodes; an empty one selects all."""
    idle_watts: int = 0
    """What each of these nodes draws that no pod asks for; set aside."""
    resource: str = POWER
    """What pods ask for their watts by: `colocate.io/power`, or `intel.com/power`."""
    enforce: bool = False
    """Where pods ask for more than this, a budget that was cut, the power limits of its nodes are lowered."""


class PowerBudgetStatus(Lean, frozen=True):
    """What is asked of it."""

    nodes: int = 0
    """How many nodes it is of."""
    requested: int = 0
    """Watts that pods on these nodes ask for."""
    left: int = 0
    """Watts that more pods may ask for; below 0 where more is asked for already than there is."""
    message: str = ""
    """What is wrong; empty: nothing."""
    observed_generation: int = 0


class PowerBudget(Lean, frozen=True):
    """colocate.io/v1alpha1 PowerBudget, of no namespace."""

    metadata: ObjectMeta
    spec: PowerBudgetSpec = PowerBudgetSpec()
    status: PowerBudgetStatus = PowerBudgetStatus()
