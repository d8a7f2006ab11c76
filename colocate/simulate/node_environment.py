"""`Colocate/Node-v0`: how much of a node batch may use now, learnt second by second; and many nodes in one loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from colocate.errors import BadInput
from colocate.simulate import node as world
from colocate.simulate.colocation import SLOT_SECONDS
from colocate.simulate.evaluation import Assumptions
from colocate.simulate.node import Floats, Node, Seen

HOUR = 3600
ASSUMED = Assumptions()
SLOTS = 289
"""Of a day, and the first of the next."""


def made_demand() -> Floats:
    """A day of services that is nobody's: low at night, with a peak before noon and one in the evening."""
    hours = np.linspace(0.0, 24.0, SLOTS)

    def peak(at: float, width: float) -> Floats:
        return np.exp(-(((hours - at + 12.0) % 24.0 - 12.0) ** 2) / width)

    return (0.15 + 0.3 * peak(11.0, 12.0) + 0.25 * peak(20.0, 6.0))[None, :]


def make_node(demand: Floats | None, price: float, assumed: Assumptions) -> Node:
    """Raises BadInput."""
    rows = made_demand() if demand is None else np.asarray(demand, float)
    if rows.ndim != 2 or rows.shape[0] < 1 or rows.shape[1] < 2:
        raise BadInput(f"demand: its shape is {rows.shape}: (rows, slots of five minutes), two slots at least")
    if not (np.isfinite(rows) & (rows >= 0.0)).all():
        at = tuple(map(int, np.argwhere(~(np.isfinite(rows) & (rows >= 0.0)))[0]))
        raise BadInput(f"demand{list(at)}: {rows[at]} is no share of a node")
    if not (math.isfinite(price) and price >= 0.0):
        raise BadInput(f"price: {price} is less than 0, or no number")
    facts = [assumed.saturates, assumed.noise, assumed.bursts, assumed.below, assumed.slo, price]
    return Node(np.ascontiguousarray(rows), np.array(facts))


def each(given: Any, count: int, name: str, *, counted: bool = False) -> list[int | None]:
    """One number for each environment; of a single one the same for all, or counted up. Raises BadInput."""
    if np.ndim(given) == 0:
        return [int(given) + i * counted for i in range(count)]
    values = list(given)
    if len(values) != count:
        raise BadInput(f"{name}: {len(values)} values for {count} environments")
    return [None if value is None else int(value) for value in values]


def seeded(
    seed: int | list[int | None] | None, count: int, before: Sequence[np.random.Generator]
) -> list[np.random.Generator]:
    """Of each environment; one that is given no seed goes on as before, as in Gymnasium. Raises BadInput."""
    seeds = [None] * count if seed is None else each(seed, count, "seed", counted=True)
    return [
        before[i] if its is None and before else gymnasium.utils.seeding.np_random(its)[0]
        for i, its in enumerate(seeds)
    ]


class _Nodes:
    """What one environment and many side by side have in common."""

    def __init__(self, count: int, demand: Floats | None, seconds: int, price: float, assumed: Assumptions) -> None:
        if seconds < 1:
            raise BadInput(f"episode_seconds: {seconds} is less than 1")
        self.node, self.seconds, self.assumed = make_node(demand, price, assumed), seconds, assumed
        self.state, self.streams = np.zeros((count, world.STATE)), np.zeros(count, np.uint64)
        self.seen, self.rewards = np.zeros((count, world.LOOK), np.float32), np.zeros(count)
        self.told, self.passed = np.zeros((count, 2)), np.full(count, seconds)
        self.observation_space = Box(0.0, 1.0, (world.LOOK,), np.float32)
        self.action_space = Box(0.0, 1.0, (1,), np.float32)

    def begin(self, i: int, options: dict[str, Any] | None = None) -> None:
        """A node's next episode. Raises BadInput."""
        last = (self.node.demand.shape[1] - 1) * SLOT_SECONDS
        second = (options or {}).get("second")
        if second is not None and not 0 <= second < last:
            raise BadInput(f"options, second: {second} is none of 0 to {last - 1}")
        world.begin(self.node, self.state, self.streams, i, self.assumed.shared, self.assumed.scheduler)
        if second is not None:
            self.state[i, world.WANTS_UNTIL] += second - self.state[i, world.SECOND]
            self.state[i, world.SECOND] = second
        world.look(self.state, i, self.seen)
        self.passed[i], self.told[i] = 0, 0.0

    def step(self, grants: Floats) -> None:
        """A second of all nodes. Raises BadInput of a grant that is no number."""
        if not np.isfinite(grants).all():
            raise BadInput(f"actions: {grants[~np.isfinite(grants)][0]} is no share of a node")
        world.step_all(self.node, self.state, self.streams, grants, self.rewards, self.told, self.seen)
        self.passed += grants >= 0.0


class NodeEnv(gymnasium.Env[Seen, NDArray[np.float32]]):
    """One node with a service; a step is a second.

    Observation: 9 float32 of 0 to 1: what services use of the node; the most of it lately (fading in five minutes);
    what batch uses; what it was granted; the share of time that the service waited for a CPU in the last second; the
    same in the last minute, smoothed; what batch wants; and the time of day as (1 + sin) / 2 and (1 + cos) / 2.
    Action: (1,) the share of the node that batch may use in the next second.
    Reward: the share that batch used, less `price` times what the service waited beyond its own usual and `slo` (0.2 of
    the time); neither what is usual for it nor how much batch makes it feel is shown. An episode is `episode_seconds`
    of a service that is drawn, and then truncated; it never terminates. `info` has `batch` and `too_much`.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - an instance variable of the base class

    def __init__(
        self,
        demand: Floats | None = None,
        *,
        episode_seconds: int = HOUR,
        price: float = 20.0,
        assumed: Assumptions = ASSUMED,
        render_mode: None = None,
    ) -> None:
        """`demand`: services' use, (rows, slots of five minutes), shares of a node; else a made-up day. BadInput."""
        self.render_mode = render_mode
        self._nodes = _Nodes(1, demand, episode_seconds, price, assumed)
        self.observation_space, self.action_space = self._nodes.observation_space, self._nodes.action_space

    def _info(self) -> dict[str, Any]:
        batch, too_much = self._nodes.told[0]
        return {"batch": float(batch), "too_much": float(too_much)}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Seen, dict[str, Any]]:
        """See gymnasium.Env; `options={"second": n}` begins it at that second of the demand, not one that is drawn."""
        super().reset(seed=seed)
        self._nodes.streams[0] = _stream(self.np_random)
        self._nodes.begin(0, options)
        return self._nodes.seen[0].copy(), self._info()

    def step(self, action: NDArray[np.float32]) -> tuple[Seen, float, bool, bool, dict[str, Any]]:
        """See gymnasium.Env."""
        nodes = self._nodes
        if nodes.passed[0] >= nodes.seconds:
            raise gymnasium.error.ResetNeeded("step after the last second, or before reset")
        nodes.step(np.clip(np.asarray(action, float).reshape(1), 0.0, 1.0))
        over = bool(nodes.passed[0] >= nodes.seconds)
        return nodes.seen[0].copy(), float(nodes.rewards[0]), False, over, self._info()


def _stream(draws: np.random.Generator) -> np.uint64:
    return np.uint64(draws.integers(1 << 63))


class NodeVectorEnv(VectorEnv[Seen, NDArray[np.float32], NDArray[Any]]):
    """Many of them in one compiled loop; what each observes and gets is what the single one does. See NodeEnv.

    An episode that has ended begins anew in the step after (Gymnasium's NEXT_STEP), its action then counts for nothing.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP, "render_modes": []}  # noqa: RUF012 - the same

    def __init__(
        self,
        num_envs: int,
        demand: Floats | None = None,
        *,
        episode_seconds: int = HOUR,
        price: float = 20.0,
        assumed: Assumptions = ASSUMED,
        render_mode: None = None,
    ) -> None:
        """Raises BadInput."""
        self.num_envs, self.render_mode = num_envs, render_mode
        self._nodes = _Nodes(num_envs, demand, episode_seconds, price, assumed)
        self.single_observation_space = self._nodes.observation_space
        self.single_action_space = self._nodes.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._draws: list[np.random.Generator] = []
        self._over = np.zeros(num_envs, np.bool_)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Seen, dict[str, Any]]:
        """See gymnasium.vector.VectorEnv; one seed gives the i-th node that seed plus i."""
        if seed is not None or not self._draws:
            self._draws = seeded(seed, self.num_envs, self._draws)
        for i in range(self.num_envs):
            self._begin(i, options)
        self._over[:] = False
        return self._nodes.seen.copy(), self._info()

    def _begin(self, i: int, options: dict[str, Any] | None = None) -> None:
        self._nodes.streams[i] = _stream(self._draws[i])
        self._nodes.begin(i, options)

    def _info(self) -> dict[str, Any]:
        every = np.ones(self.num_envs, np.bool_)
        batch, too_much = self._nodes.told.T.copy()
        return {"batch": batch, "_batch": every, "too_much": too_much, "_too_much": every}

    def step(
        self, actions: NDArray[np.float32]
    ) -> tuple[Seen, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """See gymnasium.vector.VectorEnv."""
        nodes = self._nodes
        if not self._draws:
            raise gymnasium.error.ResetNeeded("step before reset")
        if np.shape(actions) != (self.num_envs, 1):
            raise ValueError(f"actions of shape {np.shape(actions)} for {self.num_envs} environments")
        grants = np.clip(np.asarray(actions, float)[:, 0], 0.0, 1.0)
        grants[self._over] = -1.0
        nodes.step(grants)
        for i in np.flatnonzero(self._over):
            self._begin(int(i))
            nodes.rewards[i] = 0.0
        self._over = (nodes.passed >= nodes.seconds) & (grants >= 0.0)
        never = np.zeros(self.num_envs, np.bool_)
        return nodes.seen.copy(), nodes.rewards.copy(), never, self._over.copy(), self._info()
