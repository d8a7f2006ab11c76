"""Nodes that fail: when, and what of a job's work a checkpoint saves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from colocate.errors import BadInput
from colocate.simulate.scores import kernel

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MOST_FAILURES, FAILURES_AT_A_TIME = 100_000, 8


class Outages(NamedTuple):
    """Nodes that fail and are repaired, in the order of time, and what that costs jobs."""

    at: Floats
    """Seconds, as of Work.submit."""
    node: Ints
    down: NDArray[np.bool_]
    """It fails; else it is back."""
    checkpoint: float
    """Seconds of work between two of a job; infinite: it has none."""
    restart: float
    """Seconds until a job that begins again works."""
    until: float
    """What fails later is not known: there the simulation ends."""

    def saved(self, worked: float, left: float) -> float:
        """See `saved`."""
        return float(saved(self, worked, left))


NO_OUTAGES = Outages(np.empty(0), np.empty(0, np.int64), np.empty(0, np.bool_), np.inf, 0.0, np.inf)


@kernel()
def saved(outages: Outages, worked: float, left: float) -> float:
    """Of so many seconds of work of a job that had so many left, those that are not lost when it is stopped."""
    return min(worked // outages.checkpoint * outages.checkpoint, left) if outages.checkpoint < np.inf else 0.0


class Trouble(NamedTuple):
    """How often nodes fail, and what it costs jobs to be stopped; seconds."""

    mtbf: float = np.inf
    """Of a node, the mean time from its repair to its next failure; infinite: none fails."""
    repair: float = 3600.0
    checkpoint: float = np.inf
    restart: float = 0.0

    def drawn(self, nodes: int, submit: Floats, run: Floats, seed: int) -> Iterator[Outages]:
        """Exponential times between failures, for longer and longer, until MOST_FAILURES are known.

        `submit` and `run` are those of the jobs (see fleet.Work).

        First for as long as the jobs arrive and the longest of them runs. The same for the same seed, whatever the
        policy; what is known for longer begins alike. Raises BadInput where there are too many at once.
        """
        first = float(submit[0])
        seconds = max(float(submit[-1]) - first + float(run.max()), 1.0)
        if self.mtbf == np.inf:
            yield NO_OUTAGES._replace(checkpoint=self.checkpoint, restart=self.restart)
            return
        each = nodes / (self.mtbf + self.repair)
        if seconds * each > MOST_FAILURES:
            text = f"{nodes} nodes fail {seconds * each:,.0f} times while the jobs arrive and the longest of them runs"
            raise BadInput(f"--mtbf: {text}; at most {MOST_FAILURES:,}")
        while True:
            yield self._until(nodes, first, seconds, seed)
            if seconds * each >= MOST_FAILURES:
                return
            seconds = min(4.0 * seconds, MOST_FAILURES / each)

    def _until(self, nodes: int, first: float, seconds: float, seed: int) -> Outages:
        times, which = [], []
        for node in range(nodes):
            rng, at, mine = np.random.default_rng((seed, node)), 0.0, [np.empty(0)]
            while at < seconds:  # as many at a time, so that what is known for longer begins alike
                down = at + np.cumsum(rng.exponential(self.mtbf, FAILURES_AT_A_TIME) + self.repair) - self.repair
                mine.append(down)
                at = float(down[-1]) + self.repair
            fails = np.concatenate(mine)
            fails = fails[fails < seconds]
            times.append(np.stack([fails, fails + self.repair], axis=1).ravel())
            which.append(np.full(2 * len(fails), node))
        at_all, of = np.concatenate(times), np.concatenate(which).astype(np.int64)
        order = np.argsort(at_all, kind="stable")  # of one node and moment it fails first, and is back then
        down_all = np.arange(len(at_all)) % 2 == 0
        return Outages(
            first + at_all[order], of[order], down_all[order], self.checkpoint, self.restart, first + seconds
        )
