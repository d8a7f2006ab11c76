"""Environments of Gymnasium: `Colocate/Queue-v0`, with a twin of many pools in one loop, `Colocate/Placement-v0`, and
`Colocate/Node-v0` (see node_environment), also with a twin.

Importing this module registers them (gymnasium.make, gymnasium.make_vec). They need the extra `sim`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from colocate.errors import BadInput
from colocate.simulate import traces
from colocate.simulate.episodes import FEATURES, QUEUED, STARTED, begin, choose, looks, new_pools, observe, step_all
from colocate.simulate.node_environment import NodeEnv, NodeVectorEnv, each, seeded
from colocate.simulate.placement import OFFER, Nodes, arrivals, ask_of, empty, offers, take
from colocate.simulate.queue import Jobs
from colocate.simulate.scores import BEST_FIT, WHOLE

QUEUE, PLACEMENT, NODE = "Colocate/Queue-v0", "Colocate/Placement-v0", "Colocate/Node-v0"
SLOTS, EPISODE_JOBS, SIZE = 128, 256, 256
Seen = NDArray[np.float32]


def _jobs(given: Jobs | str | Path, size: int, episode: int) -> Jobs:
    jobs = given if isinstance(given, Jobs) else traces.swf(Path(given))
    for name, value in (("size", size), ("episode_jobs", episode)):
        if value < 1:
            raise BadInput(f"{name}: {value} is less than 1")
    for name, column in jobs._asdict().items():
        least = 1 if name == "procs" else -np.inf if name == "submit" else 0
        wrong = np.flatnonzero(~(np.isfinite(column) & (column >= least)))
        if len(wrong):
            raise BadInput(f"jobs, {name}: job {wrong[0]} has {column[wrong[0]]}")
    if (np.diff(jobs.submit) < 0).any():
        raise BadInput("jobs, submit: they are not in the order of their arrival")
    if len(jobs.submit) < episode:
        raise BadInput(f"episode_jobs: {episode} are more than the {len(jobs.submit)} jobs of the trace")
    if int(jobs.procs.max()) > size:
        at = int(np.argmax(jobs.procs))
        raise BadInput(f"size: job {at} of the trace asks for {jobs.procs[at]} processors, of {size}")
    return jobs


class _Queue:
    """What one environment and many side by side have in common: the trace, the pools, and how they are looked at."""

    def __init__(
        self, pools: int, jobs: Jobs | str | Path, size: int, episode_jobs: int, slots: int, *, backfill: bool
    ) -> None:
        self.jobs, self.size, self.backfill, self.episode_jobs = (
            _jobs(jobs, size, episode_jobs),
            size,
            backfill,
            episode_jobs,
        )
        self.pools, self.look, self.slots = new_pools(pools, episode_jobs), looks(self.jobs, size), np.arange(slots)
        self.observation_space = Box(0.0, 1.0, (slots, FEATURES), np.float32)
        self.action_space = Discrete(slots)

    def begin(self, i: int, first: int | None, draws: np.random.Generator) -> None:
        """A pool's episode with that job, or one that is drawn. Raises BadInput."""
        last = len(self.jobs.submit) - self.episode_jobs
        first = int(draws.integers(last + 1)) if first is None else int(first)
        if not 0 <= first <= last:
            raise BadInput(f"options, first: {first} is none of 0 to {last}")
        begin(self.pools, self.jobs, self.size, i, first)

    def observe(self, i: int, seen: Seen) -> None:
        """One pool."""
        observe(self.pools, self.jobs, self.look, self.size, i, seen)

    def mask(self) -> NDArray[np.int8]:
        """(pools, slots) which rows are somebody's."""
        return (self.slots < self.pools.counts[:, QUEUED, None]).astype(np.int8)


class QueueEnv(gymnasium.Env[Seen, np.int64]):
    """One pool of processors whose queue is decided job by job (RLScheduler, SC 2020).

    Observation: (slots, 8) float32 of 0 to 1, the first jobs that wait, as they arrived. Of each: 1 (there is one); its
    wait w, w / (w + 12 h); the log of what it asks for over that of a day; its processors over all; the log of that;
    1 if it fits now; free processors over all; who waits over the episode's jobs.
    Action: which of them has the next processors. One of nobody is the first one's, and counts in `info["invalid"]`.
    Reward: less the bounded slowdowns of the jobs that were started by the next decision, over the episode's jobs: the
    sum is less their average. An episode ends with its last job; it is never truncated.
    `reset(options={"first": n})` begins it with the n-th job of the trace; else one is drawn.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - an instance variable of the base class

    def __init__(
        self,
        jobs: Jobs | str | Path,
        *,
        size: int = SIZE,
        episode_jobs: int = EPISODE_JOBS,
        slots: int = SLOTS,
        backfill: bool = False,
        render_mode: None = None,
    ) -> None:
        """`jobs`: or the path of an SWF file. Raises BadInput."""
        self.render_mode = render_mode
        self._queue = _Queue(1, jobs, size, episode_jobs, slots, backfill=backfill)
        self.observation_space, self.action_space = self._queue.observation_space, self._queue.action_space
        self._invalid = 0

    def _seen(self) -> Seen:
        seen = np.zeros(self.observation_space.shape or (), np.float32)
        self._queue.observe(0, seen)
        return seen

    def _info(self) -> dict[str, Any]:
        return {"action_mask": self._queue.mask()[0], "invalid": self._invalid}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Seen, dict[str, Any]]:
        """See gymnasium.Env. Raises BadInput of an option `first` beyond the trace."""
        super().reset(seed=seed)
        self._queue.begin(0, (options or {}).get("first"), self.np_random)
        self._invalid = 0
        return self._seen(), self._info()

    def step(self, action: np.int64) -> tuple[Seen, float, bool, bool, dict[str, Any]]:
        """See gymnasium.Env."""
        queue, at = self._queue, int(action)
        if not 0 <= at < queue.pools.counts[0, QUEUED]:
            self._invalid += 1
            at = 0
        slowdowns, n = choose(queue.pools, queue.jobs, 0, at, queue.backfill), queue.episode_jobs
        ended = bool(queue.pools.counts[0, STARTED] == n)
        return self._seen(), -slowdowns / n, ended, False, self._info()


class QueueVectorEnv(VectorEnv[Seen, NDArray[np.int64], NDArray[Any]]):
    """Many of them; what each observes and gets is what the single one does. See QueueEnv.

    An episode that has ended begins anew in the step after (Gymnasium's NEXT_STEP), its action then counts for nothing.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP, "render_modes": []}  # noqa: RUF012 - the same

    def __init__(
        self,
        num_envs: int,
        jobs: Jobs | str | Path,
        *,
        size: int = SIZE,
        episode_jobs: int = EPISODE_JOBS,
        slots: int = SLOTS,
        backfill: bool = False,
        render_mode: None = None,
    ) -> None:
        """Raises BadInput."""
        self.num_envs, self.render_mode = num_envs, render_mode
        self._queue = _Queue(num_envs, jobs, size, episode_jobs, slots, backfill=backfill)
        self.single_observation_space = self._queue.observation_space
        self.single_action_space = self._queue.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._seen = np.zeros((num_envs, slots, FEATURES), np.float32)
        self._ended = np.zeros(num_envs, np.bool_)
        self._invalid = np.zeros(num_envs, np.int64)
        self._draws: list[np.random.Generator] = []

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Seen, dict[str, Any]]:
        """See gymnasium.vector.VectorEnv; one seed gives the i-th pool that seed plus i.

        `options={"first": [...]}` begins each pool's episode with that job. Raises BadInput of another number of them.
        """
        if seed is not None or not self._draws:
            self._draws = seeded(seed, self.num_envs, self._draws)
        given = (options or {}).get("first")
        firsts = [None] * self.num_envs if given is None else each(given, self.num_envs, "options, first")
        for i, first in enumerate(firsts):
            self._begin(i, first)
        self._ended[:] = False
        return self._seen.copy(), self._info()

    def _begin(self, i: int, first: int | None) -> None:
        self._queue.begin(i, first, self._draws[i])
        self._invalid[i] = 0
        self._queue.observe(i, self._seen[i])

    def _info(self) -> dict[str, Any]:
        found: dict[str, Any] = {"action_mask": self._queue.mask(), "invalid": self._invalid.copy()}
        return found | {f"_{name}": np.ones(self.num_envs, np.bool_) for name in found}

    def step(self, actions: NDArray[np.int64]) -> tuple[Seen, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """See gymnasium.vector.VectorEnv."""
        queue, at = self._queue, np.array(actions, np.int64)
        pools, n = queue.pools, queue.episode_jobs
        if not self._draws:
            raise gymnasium.error.ResetNeeded("step before reset")
        if at.shape != (self.num_envs,):
            raise ValueError(f"actions of shape {at.shape} for {self.num_envs} environments")
        nobody = ((at < 0) | (at >= pools.counts[:, QUEUED])) & ~self._ended
        self._invalid += nobody
        at[nobody] = 0
        at[self._ended] = -1
        slowdowns = np.zeros(self.num_envs)
        step_all(pools, queue.jobs, queue.look, queue.size, at, queue.backfill, slowdowns, self._seen)
        for i in np.flatnonzero(self._ended):
            self._begin(int(i), None)
        self._ended = (pools.counts[:, STARTED] == n) & (at >= 0)
        return self._seen.copy(), -slowdowns / n, self._ended.copy(), np.zeros(self.num_envs, np.bool_), self._info()


class PlacementEnv(gymnasium.Env[Seen, np.int64]):
    """Pods onto nodes with shared GPUs, one after the other; none departs (FGD, USENIX ATC 2023).

    Observation: (nodes, 8) float32 of 0 to 1, what the next pod would make of each node (placement.offers); rows of
    nodes on which it does not fit are 0. Action: its node; one on which it does not fit, where there are others, leaves
    it out and counts in `info["invalid"]`. Pods that fit nowhere are left out before they are seen. Reward: the share
    of all GPUs that the pod was given, so that the sum is the allocation ratio. An episode ends with its last pod. Each
    draws its pods from the list, with GPUs of `arrived` times what there is.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - an instance variable of the base class

    def __init__(self, nodes: Nodes, pods: traces.Pods, *, arrived: float = 1.3, render_mode: None = None) -> None:
        """Raises BadInput of nodes without GPUs, and of pods of which none asks for one."""
        self.render_mode, self._nodes, self._pods, self._arrived = render_mode, nodes, pods, arrived
        self._milli = pods.kinds.gpus * pods.kinds.gpu_milli
        self._capacity = int(nodes.gpus.sum()) * WHOLE
        if not self._capacity or not self._milli[pods.kind_of].any():
            raise BadInput("nodes, pods: an allocation of GPUs needs nodes that have some and pods that ask for some")
        count = len(nodes.gpus)
        self.observation_space, self.action_space = Box(0.0, 1.0, (count, OFFER), np.float32), Discrete(count)
        self._state, self._seen = empty(nodes), np.zeros((count, OFFER), np.float32)
        self._come, self._next, self._invalid = np.empty(0, np.int64), 0, 0

    def _advance(self) -> bool:
        """To the next pod that fits somewhere; False: there is none."""
        while self._next < len(self._come):
            offers(self._state, ask_of(self._pods.kinds, self._come[self._next]), self._seen)
            if self._seen[:, 0].any():
                return True
            self._next += 1
        self._seen[:] = 0.0
        return False

    @property
    def about(self) -> dict[str, Any]:
        """Which nodes the next pod fits on, and how many actions were none of them."""
        return {"action_mask": self._seen[:, 0].astype(np.int8), "invalid": self._invalid}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Seen, dict[str, Any]]:
        """See gymnasium.Env; `options={"pods": [...]}` places these kinds instead of drawn ones."""
        super().reset(seed=seed)
        given = (options or {}).get("pods")
        if given is None:
            drawn = int(self.np_random.integers(1 << 31))
            self._come = arrivals(self._pods.kinds, self._pods.kind_of, self._arrived * self._capacity, drawn)
        else:
            self._come = np.array(given, np.int64)
            if len(self._come) and not 0 <= self._come.min() <= self._come.max() < len(self._pods.kinds.gpus):
                raise BadInput(f"options, pods: kinds are 0 to {len(self._pods.kinds.gpus) - 1}")
        self._state, self._next, self._invalid = empty(self._nodes), 0, 0
        self._advance()
        return self._seen.copy(), self.about

    def step(self, action: np.int64) -> tuple[Seen, float, bool, bool, dict[str, Any]]:
        """See gymnasium.Env."""
        if self._next >= len(self._come):
            raise gymnasium.error.ResetNeeded("step after the last pod, or before reset")
        i, k, reward = int(action), self._come[self._next], 0.0
        if 0 <= i < len(self._seen) and self._seen[i, 0]:
            take(self._state, i, ask_of(self._pods.kinds, k), -1, BEST_FIT, 0)
            reward = float(self._milli[k]) / self._capacity
        else:
            self._invalid += 1
        self._next += 1
        left = self._advance()
        return self._seen.copy(), reward, not left, False, self.about


class PlacementVectorEnv(VectorEnv[Seen, NDArray[np.int64], NDArray[Any]]):
    """Many fleets, each with pods of its own; each observes and gets what the single one does. See PlacementEnv.

    An episode that has ended begins anew in the step after (Gymnasium's NEXT_STEP); its action counts for nothing.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP, "render_modes": []}  # noqa: RUF012 - the same

    def __init__(
        self, num_envs: int, nodes: Nodes, pods: traces.Pods, *, arrived: float = 1.3, render_mode: None = None
    ) -> None:
        """Raises BadInput, as PlacementEnv."""
        self.num_envs, self.render_mode = num_envs, render_mode
        self._each = [PlacementEnv(nodes, pods, arrived=arrived) for _ in range(num_envs)]
        self.single_observation_space = self._each[0].observation_space
        self.single_action_space = self._each[0].action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._seen = np.zeros((num_envs, len(nodes.gpus), OFFER), np.float32)
        self._ended, self._begun = np.zeros(num_envs, np.bool_), False

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Seen, dict[str, Any]]:
        """See gymnasium.vector.VectorEnv; one seed gives the i-th fleet that seed plus i. Options go to all."""
        seeds = [None] * self.num_envs if seed is None else each(seed, self.num_envs, "seed", counted=True)
        for i, (env, its) in enumerate(zip(self._each, seeds, strict=True)):
            self._seen[i], _ = env.reset(seed=its, options=options)
        self._ended[:], self._begun = False, True
        return self._seen.copy(), self._info()

    def _info(self) -> dict[str, Any]:
        about = [env.about for env in self._each]
        found: dict[str, Any] = {name: np.array([one[name] for one in about]) for name in about[0]}
        return found | {f"_{name}": np.ones(self.num_envs, np.bool_) for name in found}

    def step(self, actions: NDArray[np.int64]) -> tuple[Seen, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """See gymnasium.vector.VectorEnv."""
        if not self._begun:
            raise gymnasium.error.ResetNeeded("step before reset")
        if np.shape(actions) != (self.num_envs,):
            raise ValueError(f"actions of shape {np.shape(actions)} for {self.num_envs} environments")
        rewards, ended = np.zeros(self.num_envs), np.zeros(self.num_envs, np.bool_)
        for i, env in enumerate(self._each):
            if self._ended[i]:
                self._seen[i], _ = env.reset()
            else:
                self._seen[i], rewards[i], ended[i], _, _ = env.step(actions[i])
        self._ended = ended
        return self._seen.copy(), rewards, ended.copy(), np.zeros(self.num_envs, np.bool_), self._info()


gymnasium.register(
    PLACEMENT,
    entry_point=f"{__name__}:{PlacementEnv.__name__}",
    vector_entry_point=f"{__name__}:{PlacementVectorEnv.__name__}",
)
gymnasium.register(
    QUEUE, entry_point=f"{__name__}:{QueueEnv.__name__}", vector_entry_point=f"{__name__}:{QueueVectorEnv.__name__}"
)
gymnasium.register(
    NODE,
    entry_point=f"{NodeEnv.__module__}:{NodeEnv.__name__}",
    vector_entry_point=f"{NodeVectorEnv.__module__}:{NodeVectorEnv.__name__}",
)
