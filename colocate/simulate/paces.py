"""How fast jobs run by what GPUs they have, whether they are on one node, and who shares a GPU with them: measured.

A table of throughputs has, for kinds of GPUs and models (what a job trains), the steps a second alone and beside each
other model on one GPU: as Gavel's (Narayanan and others, OSDI 2020), whose columns are COLUMNS. A job's seconds of work
are those that it takes alone, on one node, on the GPUs on which its model is fastest.

What is assumed beyond what was measured: more workers than were measured are as much faster as they are more, on
several nodes as fast as on one where only that was measured; of three or more on one GPU each loses to all the others
the sum of what it would lose to each alone, so that equal ones that take turns in pairs take turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from colocate.errors import BadInput
from colocate.simulate import traces

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
COLUMNS = ("gpu_type", "consolidated", "model", "scale_factor", "co_model", "co_scale_factor", "throughput")
MOST_MODELS, MOST_WORKERS = 1000, 100_000
NO_MODEL = NO_GPU = -1


class Paces(NamedTuple):
    """Of the jobs of a workload on a fleet, as the engine wants it: times as long as their work says."""

    row: Ints
    """(jobs,) of `alone`, for as few members as are enough; those for more stand behind it. NO_MODEL: as fast
    everywhere, and nobody beside it is slower. Empty: nobody is."""
    model: Ints
    """(jobs,)."""
    alone: Floats
    """(rows, kinds of nodes' GPUs, 2): on one node, and on several."""
    pair: Floats
    """(kinds of nodes' GPUs, models, models): the first beside the second; infinite: not both fit into its memory."""

    def of(self, job: int, more: int, gpus: Ints) -> float | None:
        """Of a job with so many more members than are enough, on nodes with these kinds of GPUs, one for each node, of
        which it shares none; None: it has no model."""
        if not len(self.row) or self.row[job] == NO_MODEL:
            return None
        return float(self.alone[self.row[job] + more, gpus, int(len(gpus) > 1)].max())


NO_PACES = Paces(np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, 0, 2)), np.empty((0, 0, 0)))


class Throughputs(NamedTuple):
    """A table of them."""

    path: Path
    models: tuple[str, ...]
    gpus: tuple[str, ...]
    scales: tuple[int, ...]
    """Workers, each with a GPU."""
    alone: Floats
    """(models, scales, gpus, 2), steps a second of all workers: on one node, and on several; NaN: not measured."""
    pair: Floats
    """(gpus, models, models), steps a second of the first beside the second on one GPU; 0: not both fit."""

    def steps(self, model: int, workers: int) -> Floats:
        """(gpus, 2) a second; NaN where nothing was measured."""
        measured = [i for i, scale in enumerate(self.scales) if scale <= workers]
        found = np.full(self.alone.shape[2:], np.nan)
        for i in measured:  # from the fewest workers on
            here = self.alone[model, i] / self.scales[i] * workers
            found = np.where(np.isnan(here), found, here)
        found[:, 1] = np.where(np.isnan(found[:, 1]), found[:, 0], found[:, 1])
        return found

    def best(self, model: int, workers: int) -> float:
        """Steps a second on one node with the GPUs on which that is most. Raises BadInput where nothing is known."""
        here = self.steps(model, workers)[:, 0]
        if np.isnan(here).all():
            raise BadInput(f"{self.path}: nothing was measured of {self.models[model]!r} with {workers} workers")
        return float(np.nanmax(here))

    def number(self, model: str, place: str) -> int:
        """Of a model. Raises BadInput of one that is not in the table."""
        if model not in self.models:
            raise BadInput(f"{place}: {model!r} is no model of {self.path}, such as {self.models[0]!r}")
        return self.models.index(model)

    def paces(self, gpus: Sequence[str], model: Ints, each: Ints, least: Ints, members: Ints, part: Bools) -> Paces:
        """For nodes whose GPUs are called so, by their numbers; who is not in the table is of nodes without any.

        Of each job its model, the GPUs of each member, how many members are enough and how many are all, and whether
        they ask for parts of GPUs. Raises BadInput of what was not measured.
        """
        there = [self.gpus.index(name) if name in self.gpus else NO_GPU for name in gpus]
        jobs = np.stack([model, each, least, members], axis=1)
        asked, which = np.unique(jobs[model != NO_MODEL], axis=0, return_inverse=True)
        first, rows = [], list[Floats]()
        for m, one, fewest, most in asked:
            first.append(len(rows))
            best = self.best(m, most * one)
            for count in range(fewest, most + 1):
                rows.append(best / self.steps(m, count * one)[there])
                missing = np.isnan(rows[-1][:, 0]) & (np.array(there) != NO_GPU)
                if missing.any():
                    text = f"{self.models[m]!r} with {count * one} workers on {gpus[int(np.argmax(missing))]}"
                    raise BadInput(f"{self.path}: nothing was measured of {text}, which the fleet has")
        row = np.full(len(model), NO_MODEL)
        row[model != NO_MODEL] = np.array(first, np.int64)[which.ravel()]
        alone = np.array(rows) if rows else np.ones((0, len(there), 2))
        return Paces(row, model, alone, self._pairs(gpus, there, np.unique(model[part & (model != NO_MODEL)])))

    def _pairs(self, gpus: Sequence[str], there: Sequence[int], known: Ints) -> Floats:
        """Of the models of those that ask for parts of GPUs."""
        pair = np.full((len(there), len(self.models), len(self.models)), np.nan)
        for g, t in enumerate(there):
            for m in known if t != NO_GPU else ():
                beside = self.pair[t, m, known]
                if np.isnan(beside).any():
                    other = self.models[known[int(np.argmax(np.isnan(beside)))]]
                    text = f"{self.models[m]!r} beside {other!r} was not measured on {gpus[g]}"
                    raise BadInput(f"{self.path}: {text}, and jobs share GPUs")
                with np.errstate(divide="ignore"):
                    pair[g, m, known] = np.maximum(self.steps(m, 1)[t, 0] / beside, 1.0)
        return np.where(np.isinf(pair) | np.isinf(pair.transpose(0, 2, 1)), np.inf, pair)


def read_throughputs(path: Path) -> Throughputs:
    """A CSV (.gz, .parquet) with COLUMNS. Raises BadInput."""
    alone: dict[tuple[str, int, str, int], float] = {}
    pair: dict[tuple[str, str, str], float] = {}
    places: dict[tuple[object, ...], str] = {}
    for row in traces.table(path, COLUMNS):
        gpu, model, other = (row.text(name).strip() for name in ("gpu_type", "model", "co_model"))
        for name, value in (("gpu_type", gpu), ("model", model)):
            if not value:
                raise BadInput(f"{row.place}, {name}: it is empty")
        together, workers = row.whole("consolidated", most=1), row.whole("scale_factor", least=1, most=MOST_WORKERS)
        steps = row.number("throughput", least=0.0, most=traces.MOST)
        before = places.setdefault((gpu, model, other, together, workers), row.place)
        if before != row.place:
            raise BadInput(f"{row.place}: the same was measured as in {before}")
        if not other and steps > 0.0:  # none: it does not fit there, as if it had not been measured
            alone[model, workers, gpu, 1 - together] = steps
        elif other and together and workers == 1:
            pair[gpu, model, other] = steps
    models, gpus = sorted({key[0] for key in alone}), sorted({key[2] for key in alone})
    scales = sorted({key[1] for key in alone})
    if not models:
        raise BadInput(f"{path}: nobody runs alone: rows without co_model are needed, with a throughput above 0")
    if len(models) > MOST_MODELS:
        raise BadInput(f"{path}: {len(models)} models, at most {MOST_MODELS}")
    steps_of = np.full((len(models), len(scales), len(gpus), 2), np.nan)
    for (model, workers, gpu, spread), steps in alone.items():
        steps_of[models.index(model), scales.index(workers), gpus.index(gpu), spread] = steps
    beside = np.full((len(gpus), len(models), len(models)), np.nan)
    for (gpu, model, other), steps in pair.items():
        if gpu in gpus and model in models and other in models:
            beside[gpus.index(gpu), models.index(model), models.index(other)] = steps
    return Throughputs(path, tuple(models), tuple(gpus), tuple(scales), steps_of, beside)
