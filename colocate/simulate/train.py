"""A linear queue priority by evolution strategies: eight numbers, trained on a part of a trace in a minute.

Each generation draws candidates around the mean, rates all of them on the same random windows, and takes the mean of
the best; the spread shrinks (Beyer and Schwefel, 2002, with a fixed schedule). What is kept is the mean that was best
on windows of its own, which are drawn once. Nothing of the trace beyond what it is given is looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from colocate.errors import BadInput
from colocate.simulate.episodes import WEIGHTS, new_pools, rated
from colocate.simulate.queue import Jobs

Floats = NDArray[np.float64]
CANDIDATES, ELITE = 24, 6
SPREAD, SHRINKS = 0.5, 0.97
WINDOWS, CHECKED = 12, 48
"""In each generation, and to choose by."""
GENERATIONS = 60
SHORTEST_FIRST = np.array([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
"""Where it begins."""


class Generation(NamedTuple):
    """What one came to: bounded slowdowns, geometric means over windows."""

    trained: float
    """Of its best candidate, on the windows of this generation."""
    checked: float
    """Of its mean, on the windows that all are chosen by."""


class Learned(NamedTuple):
    """A priority: who has the least score is first."""

    weights: Floats
    """By WEIGHTS."""
    curve: tuple[Generation, ...]

    def as_text(self) -> str:
        """As a sum."""
        return " ".join(f"{weight:+.3f} {name}" for weight, name in zip(self.weights, WEIGHTS, strict=True))


def evolve(
    jobs: Jobs,
    size: int,
    episode_jobs: int,
    *,
    backfill: bool,
    seed: int,
    generations: int = GENERATIONS,
    say: Callable[[int, Generation], None] = lambda _number, _generation: None,
) -> Learned:
    """Train on these jobs alone. Deterministic by seed. Raises BadInput of a trace that is too short."""
    last = len(jobs.submit) - episode_jobs
    if last < 1:
        raise BadInput(f"{len(jobs.submit)} jobs are too few to train on windows of {episode_jobs}")
    rng, pools = np.random.default_rng(seed), new_pools(1, episode_jobs)

    def rate(weights: Floats, firsts: NDArray[np.int64]) -> float:
        return float(np.log(rated(pools, jobs, size, firsts, weights, backfill)).mean())

    chosen_by = rng.integers(last + 1, size=CHECKED)
    mean, spread = SHORTEST_FIRST.copy(), SPREAD
    best, best_rate = mean, rate(mean, chosen_by)
    curve = [Generation(float(np.exp(best_rate)), float(np.exp(best_rate)))]
    for number in range(generations):
        windows = rng.integers(last + 1, size=WINDOWS)
        candidates = [mean, *(mean + spread * rng.standard_normal(len(mean)) for _ in range(CANDIDATES))]
        rates = [rate(candidate, windows) for candidate in candidates]
        order = np.argsort(rates, kind="stable")
        mean = np.mean([candidates[i] for i in order[:ELITE]], axis=0)
        spread *= SHRINKS
        checked = rate(mean, chosen_by)
        if checked < best_rate:
            best, best_rate = mean, checked
        curve.append(Generation(float(np.exp(rates[int(order[0])])), float(np.exp(checked))))
        say(number + 1, curve[-1])
    return Learned(best, tuple(curve))
