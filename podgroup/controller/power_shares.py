"""What each node may draw of a PowerBudget that is enforced, where more is asked for on its nodes than it has.

The leader writes it into the nodes' NodeColocations, and their agents lower caps. Each has what makes the worst
slowdown least, by what its agent says that its pods need (GEOPM's split of a job's budget among its nodes, here of all
jobs); of what no agent tells of the time is taken to grow as the watts fall: then every node keeps the same share. What
rises waits until what falls is in force, as the agents say, so that what is in force stays within the budget on the
way; a node whose agent does not answer counts with what it said last, and one without an agent with all that is asked
for. What was written counts on a node until it is written anew, whoever leads.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import structlog

from colocate.cluster.api import ANOTHER, NODE_COLOCATIONS, SHADOW, STOPPED, NodeColocation, PowerNeeds
from colocate.kube.client import MERGE, Api, ApiError, Unreachable, path_of
from colocate.kube.lease import Election
from colocate.kube.reflector import Reflector, either
from podgroup.api import PowerBudget
from podgroup.controller.watches import older
from podgroup.state.ledger import Ledger

EVERY_SECONDS, AGAIN_SECONDS = 0.5, 10.0
STUCK_SECONDS = 10.0
"""An agent that has not met its share by then does not: its cards take no less, or it is dead."""
WRITES_AT_ONCE = 16
Floats = npt.NDArray[np.float64]
SLOWDOWNS: Floats = np.concatenate(([0.0], np.geomspace(0.001, 10.0, 121)))
"""At which needs are compared; straight lines between them."""
ROUND = 1e-6
NEAR = 0.02
"""Of what is asked for on a node: so much more or less is as good."""
log = structlog.get_logger()
decode = msgspec.json.Decoder(NodeColocation).decode


class Enforced(NamedTuple):
    """A budget that is enforced, as its nodes are now."""

    watts: int
    """What is left of it for pods: without what its nodes draw when idle."""
    asked: dict[str, int]
    """Node -> watts that its pods ask for, where they do."""
    needs: Mapping[str, PowerNeeds] = {}
    """Node -> how much its pods would feel less, where its agent says that."""

    def shares(self, stuck: Mapping[str, int]) -> dict[str, int]:
        """Node -> what it may have; empty where there is enough for all.

        Those that are `stuck` at more than their share (their cards take no less) have it at the others' cost.
        """
        if sum(self.asked.values()) <= self.watts:
            return {}
        found = self._split(self.watts, list(self.asked))
        above = {node: stuck[node] for node in found if stuck.get(node, 0) > found[node]}
        rest = [node for node in self.asked if node not in above]
        return found | self._split(self.watts - sum(above.values()), rest)

    def _split(self, watts: int, nodes: list[str]) -> dict[str, int]:
        asked = np.array([self.asked[node] for node in nodes], dtype=np.float64)
        if watts <= 0 or not nodes:
            return dict.fromkeys(nodes, 1)
        known = np.array([enough(self.asked[node], self.needs.get(node)) for node in nodes])
        if known[:, 0].sum() <= watts:  # nobody is slowed: what is left goes where it is asked for
            room = asked - known[:, 0]
            found = known[:, 0] + room * min((watts - known[:, 0].sum()) / max(room.sum(), 1.0), 1.0)
        else:
            found = _within(known, float(watts))
        return {node: max(int(w + ROUND), 1) for node, w in zip(nodes, found, strict=True)}


def enough(asked: int, needs: PowerNeeds | None) -> Floats:
    """Watts of a node that asks for so many, at each of SLOWDOWNS: what its agent tells of, and the rest as if the time
    grew as the watts fall."""
    longer = 1.0 + SLOWDOWNS
    if needs is None or not needs.least or needs.asked <= 0:
        return np.asarray(asked / longer)
    slowdowns, watts = np.array([(n.slowdown, n.watts) for n in needs.least], dtype=np.float64).T
    if (np.diff(slowdowns) <= 0.0).any():
        return np.asarray(asked / longer)  # that says nothing
    told = np.interp(SLOWDOWNS, slowdowns, np.minimum.accumulate(watts))
    told = np.where(slowdowns[-1] < SLOWDOWNS, told * (1.0 + slowdowns[-1]) / longer, told)
    scale = min(asked / needs.asked, 1.0)  # some of them are no pods, or have gone since
    return np.asarray(told * scale + max(asked - needs.asked, 0) / longer)


def _within(known: Floats, watts: float) -> Floats:
    """Of each row what it has at the least slowdown at which all of them fit; beyond the last the time grows as the
    watts fall."""
    sums = known.sum(axis=0)
    after = int(np.searchsorted(-sums, -watts))  # they fall
    if after == len(sums):
        return np.asarray(known[:, -1] * watts / sums[-1])
    before, at = known[:, after - 1], known[:, after]
    part = (sums[after - 1] - watts) / (sums[after - 1] - sums[after])
    return np.asarray(before + part * (at - before))


def enforced(budget: PowerBudget, ledger: Ledger, needs: Mapping[str, PowerNeeds]) -> Enforced | None:
    """None of one that is not, or that the ledger does not know yet."""
    spec = budget.spec
    every = ledger.left_of([spec.resource]) if spec.enforce else []
    left = next((b for b in every if b.name == budget.metadata.name), None)
    if left is None:
        return None
    used = ledger.used[:, ledger.columns[spec.resource]]
    asked = {name: int(used[row]) for row, name in enumerate(ledger.names) if left.nodes[row] and used[row] > 0}
    return Enforced(left.amount - int(left.nodes.sum()) * spec.idle_watts, asked, needs)


def wanted(budgets: Iterable[Enforced], stuck: Mapping[str, int]) -> dict[str, int]:
    """Node -> the strictest of its shares."""
    found: dict[str, int] = {}
    for budget in budgets:
        for node, watts in budget.shares(stuck).items():
            found[node] = min(watts, found.get(node, watts))
    return found


def _calm(budgets: Sequence[Enforced], should: dict[str, int], written: Mapping[str, int]) -> dict[str, int]:
    """The same, but what stands there already where that is near enough and fits: needs change all the while, and a
    watt more or less on every node is not worth a write on each."""
    asked: dict[str, int] = {}
    for budget in budgets:
        asked |= budget.asked
    found = dict(should)
    for node, watts in should.items():
        known = written.get(node, 0)
        if known and abs(known - watts) <= max(NEAR * asked.get(node, 0), 1):
            found[node] = known
    for budget in budgets:
        over = sum(found[n] for n in budget.asked if n in found) - max(budget.watts, 0)
        for node in sorted(budget.asked.keys() & found.keys(), key=lambda n: should[n] - found[n]):
            if over <= 0 or found[node] <= should[node]:
                break
            over -= found[node] - should[node]
            found[node] = should[node]
    return found


def to_write(
    budgets: Sequence[Enforced], written: Mapping[str, int], in_force: Mapping[str, int], stuck: Mapping[str, int]
) -> dict[str, int]:
    """Node -> what is to be written now, 0 for no limit; `written` is what stands there, `in_force` what agents say.

    All that falls at once; what rises only as far as each budget keeps to its watts whatever is in force until then.
    """
    should = _calm(budgets, wanted(budgets, stuck), written)
    every = {node: should.get(node, 0) for node in {*should, *(n for n, watts in written.items() if watts)}}
    changes = {node: watts for node, watts in every.items() if watts != written.get(node, 0)}
    found = {n: w for n, w in changes.items() if w and (not written.get(n, 0) or w < written[n])}

    def draws(budget: Enforced, node: str, limit: int) -> int:
        asked = budget.asked[node]
        return max(in_force[node], min(limit or asked, asked)) if node in in_force else asked

    limits = {**written, **found}
    for node in sorted(changes.keys() - found.keys()):
        limit, most = changes[node], math.inf
        for budget in (b for b in budgets if node in b.asked):
            spare = budget.watts - sum(draws(budget, n, limits.get(n, 0)) for n in budget.asked if n != node)
            if draws(budget, node, limit) > spare:
                most = min(most, spare)
        if most < math.inf:
            limit = int(min(limit or most, most))
            if limit <= written.get(node, 0):
                continue  # there is no room for it yet
        found[node] = limits[node] = limit
    return found


class PowerShares:
    """Of one leader; `known` gives the budgets as they were seen last."""

    def __init__(
        self, api: Api, election: Election, ledger: Ledger, known: Callable[[], Iterable[PowerBudget]]
    ) -> None:
        self._api, self._election, self._ledger, self._known = api, election, ledger, known
        self._nodes: dict[str, NodeColocation] = {}
        self._above: dict[str, float] = {}
        """Node -> since when it has more in force than it may, monotonic."""
        self._failed: dict[str, float] = {}
        """Node -> when a write failed, monotonic."""

    async def run(self) -> None:
        """Until cancelled. Raises LeadershipLost."""
        nodes: Reflector[NodeColocation] = Reflector(self._api, NODE_COLOCATIONS, NodeColocation, self._on_node)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(nodes.run())
            await nodes.synced.wait()
            while True:
                await asyncio.sleep(EVERY_SECONDS)
                needs = {name: node.status.power_needs for name, node in self._nodes.items()}
                told = {name: said for name, said in needs.items() if said is not None}
                every = (enforced(each, self._ledger, told) for each in self._known())
                budgets = [budget for budget in every if budget is not None]
                if budgets or any(node.spec.power_watts for node in self._nodes.values()):
                    await self._settle(budgets)

    def _on_node(self, before: NodeColocation | None, now: NodeColocation | None) -> None:
        name = either(before, now).metadata.name
        known = self._nodes.get(name)
        if now is None:
            self._nodes.pop(name, None)
        elif known is None or not older(now.metadata, known.metadata):  # a write's answer is faster than the watch
            self._nodes[name] = now

    async def _settle(self, budgets: list[Enforced]) -> None:
        now, nodes = time.monotonic(), self._nodes.items()
        written = {name: node.spec.power_watts for name, node in nodes}
        in_force = {name: said for name, node in nodes if (said := _in_force(node)) is not None}
        above = {n: w for n, w in in_force.items() if 0 < written[n] < w}
        self._above = {name: self._above.get(name, now) for name in above}
        stuck = {name: w for name, w in above.items() if now - self._above[name] >= STUCK_SECONDS}
        self._failed = {name: at for name, at in self._failed.items() if now - at < AGAIN_SECONDS}
        may = self._nodes.keys() - self._failed.keys()
        changes = {n: w for n, w in to_write(budgets, written, in_force, stuck).items() if n in may}
        names = sorted(changes)
        for first in range(0, len(names), WRITES_AT_ONCE):
            await asyncio.gather(*(self._write(n, changes[n]) for n in names[first : first + WRITES_AT_ONCE]))

    async def _write(self, name: str, watts: int) -> None:
        self._election.check()
        body = {"spec": {"powerWatts": watts}}
        path = path_of(NODE_COLOCATIONS, name=name)
        try:
            answer = await self._api.request("PATCH", path, body, content_type=MERGE, timeout_seconds=5, patient=False)
        except (ApiError, Unreachable) as error:
            if not (isinstance(error, ApiError) and error.status == 404):
                log.warning("power_share_not_written", node=name, watts=watts, error=str(error))
            self._failed[name] = time.monotonic()
            return
        log.info("power_share", node=name, watts=watts or None)
        if name in self._nodes:
            self._on_node(None, decode(answer))


def _in_force(node: NodeColocation) -> int | None:
    """What an agent that keeps limits says; None of one that keeps none, or says nothing of that."""
    return node.status.power_watts if node.status.reason not in ("", SHADOW, ANOTHER, STOPPED) else None
