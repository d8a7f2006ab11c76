"""How fast jobs run by what GPUs they have, whether they are on one node, and who shares a GPU with them: measured.

A table of throughputs has, for kinds of GPUs and models (what a job trains), the steps a second alone and beside each
other model on one GPU: as Gavel's (Narayanan and others, OSDI 2020), whose columns are COLUMNS. A job's seconds of work
are those that it takes alone, on one node, on the GPUs on which its model is fastest.

What is assumed beyond what was measured: more workers than were measured are as much faster as they are more; of three
or more on one GPU each is slowed down as by each of the others alone.
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
COLUMNS = ("gpu_type", "consolidated", "model", "scale_factor", "co_model", "co_scale_factor", "throughput")
MOST_MODELS, MOST_WORKERS = 1000, 100_000
NO_MODEL = NO_GPU = -1


class Paces(NamedTuple):
    """Of the jobs of a workload on a fleet, as the engine wants it: times as long as their work says."""

    row: Ints
    """(jobs,) of `alone`; NO_MODEL: as fast everywhere, and nobody beside it is slower. Empty: nobody is."""
    model: Ints
    """(jobs,)."""
    alone: Floats
    """(rows, kinds of nodes' GPUs, 2): on one node, and on several."""
    pair: Floats
    """(kinds of nodes' GPUs, models, models): the first beside the second; infinite: not both fit into its memory."""

    def of(self, job: int, gpus: Ints) -> float:
        """Of a job whose members are on nodes with these kinds of GPUs, one for each node, and shares none."""
        if not len(self.row) or self.row[job] == NO_MODEL:
            return 1.0
        return float(self.alone[self.row[job], gpus, int(len(gpus) > 1)].max())


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

    def paces(self, gpus: Sequence[str], model: Ints, workers: Ints, shares: NDArray[np.bool_]) -> Paces:
        """For nodes whose GPUs are called so, by their numbers; who is not in the table is of nodes without any.

        Of each job its model, its workers, and whether it asks for parts of GPUs. Raises BadInput of what was not
        measured.
        """
        there = [self.gpus.index(name) if name in self.gpus else NO_GPU for name in gpus]
        asked, row = np.unique(np.stack([model, workers], axis=1), axis=0, return_inverse=True)
        alone = np.ones((len(asked), len(there), 2))
        for i, (m, count) in enumerate(asked):
            if m != NO_MODEL:
                alone[i] = self.best(m, count) / self.steps(m, count)[there]
                missing = np.isnan(alone[i, :, 0]) & (np.array(there) != NO_GPU)
                if missing.any():
                    name = gpus[int(np.argmax(missing))]
                    text = f"nothing was measured of {self.models[m]!r} with {count} workers on {name}"
                    raise BadInput(f"{self.path}: {text}, which the fleet has")
        known = np.unique(model[shares & (model != NO_MODEL)])
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
        row = np.where(model == NO_MODEL, NO_MODEL, row.ravel())
        return Paces(row.astype(np.int64), model, alone, pair)


def read_throughputs(path: Path) -> Throughputs:
    """A CSV (.gz, .parquet) with COLUMNS. Raises BadInput."""
    alone: dict[tuple[str, int, str, int], float] = {}
    pair: dict[tuple[str, str, str], float] = {}
    for row in traces.table(path, COLUMNS):
        gpu, model, other = (row.text(name).strip() for name in ("gpu_type", "model", "co_model"))
        for name, value in (("gpu_type", gpu), ("model", model)):
            if not value:
                raise BadInput(f"{row.place}, {name}: it is empty")
        together, workers = row.whole("consolidated", most=1), row.whole("scale_factor", least=1, most=MOST_WORKERS)
        steps = row.number("throughput", least=0.0, most=traces.MOST)
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
