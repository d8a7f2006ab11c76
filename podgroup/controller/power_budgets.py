"""What is asked of each PowerBudget: written into its status, for `kubectl get`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import msgspec
import structlog

from colocate.cluster.api import whole
from colocate.kube.client import MERGE, Api, ApiError, Unreachable, path_of
from colocate.kube.lease import Election
from podgroup.api import POWER_BUDGETS, PowerBudget, PowerBudgetStatus
from podgroup.state.ledger import Ledger

EVERY_SECONDS = 1.0
log = structlog.get_logger()


def status_of(budget: PowerBudget, ledger: Ledger) -> PowerBudgetStatus | None:
    """None of one that the ledger does not know yet."""
    spec = budget.spec
    left = next((b for b in ledger.left_of([spec.resource]) if b.name == budget.metadata.name), None)
    if left is None:
        return None
    nodes = int(left.nodes.sum())
    idle = nodes * spec.idle_watts
    requested, message = left.amount - left.left - idle, ""
    if not nodes:
        message = "no node has these labels"
    elif idle > spec.watts:
        message = f"{nodes} nodes draw {idle} W when idle, more than {spec.watts} W: no pod that asks for watts starts"
    elif left.left < 0:
        effect = "power limits of its nodes are lowered" if spec.enforce else "nothing is stopped"
        message = f"{-left.left} W too much is asked for: {effect} for that, and nothing more starts"
    return PowerBudgetStatus(
        nodes=nodes,
        requested=requested,
        left=left.left,
        message=message,
        observed_generation=budget.metadata.generation,
    )


class PowerBudgets:
    """Of one leader; `known` gives the budgets as they were seen last."""

    def __init__(
        self, api: Api, election: Election, ledger: Ledger, known: Callable[[], Iterable[PowerBudget]]
    ) -> None:
        self._api, self._election, self._ledger, self._known = api, election, ledger, known
        self._written: dict[str, PowerBudgetStatus] = {}
        """uid -> what was written last, which the watch may tell of later."""

    async def run(self) -> None:
        """Until cancelled. Raises LeadershipLost."""
        while True:
            await asyncio.sleep(EVERY_SECONDS)
            budgets = list(self._known())
            there = {budget.metadata.uid for budget in budgets}
            self._written = {uid: status for uid, status in self._written.items() if uid in there}
            for budget in budgets:
                status = status_of(budget, self._ledger)
                if status is not None and status not in (budget.status, self._written.get(budget.metadata.uid)):
                    await self._write(budget, status)

    async def _write(self, budget: PowerBudget, status: PowerBudgetStatus) -> None:
        self._election.check()
        name = budget.metadata.name
        path = path_of(POWER_BUDGETS, name=name, subresource="status")
        body = {"metadata": {"uid": budget.metadata.uid}, "status": msgspec.to_builtins(whole(status))}
        try:
            await self._api.request("PATCH", path, body, content_type=MERGE, timeout_seconds=5, patient=False)
        except (ApiError, Unreachable) as error:
            if not (isinstance(error, ApiError) and error.status in (404, 409)):
                log.warning("power_budget_status_not_written", budget=name, error=str(error))
            return
        self._written[budget.metadata.uid] = status
