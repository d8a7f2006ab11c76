"""What a node's other work will need while a batch pod runs, at a risk that is kept: CPU and memory.

Of each slot of five minutes the largest need is remembered: all that the node uses but batch, CPU smoothed over
seconds. The base for the coming `runtime` is mixed from the need now, its peak in the last so many slots, and its peak
in the same hours of yesterday. By how much the need then exceeded its base is remembered for four days; the bound is
the base plus the quantile of that at 1 - risk, moved by how often former bounds were too low: conformal quantile
tracking (Angelopoulos, Candes, Tibshirani: Conformal PID Control for Time Series Prediction, NeurIPS 2023), with which
that share tends to what is aimed at whatever the load does. `benchmarks publication` measures it on recorded loads.
"""

from __future__ import annotations

from math import ceil, exp, nan
from typing import Any

import msgspec
import numpy as np

from colocate.model.reference import Floats

SLOT_SECONDS, DAY_SLOTS = 300.0, 288
MOST_SLOTS = DAY_SLOTS
"""The longest runtime that can be promised anything for: a day."""
KEPT_RESIDUALS, LEAST_RESIDUALS = 1152, 48
RISE_SECONDS, FALL_SECONDS = 3.0, 30.0
"""Time constants of the CPU need: a stall of a second is no need, a rise is seen within seconds."""
DIGITS = 4
UNKNOWN = (nan, nan)
PEAK_WEIGHT, DAY_WEIGHT = 0.5, 0.4
"""Of the last slots' peak beside the need now, and of yesterday's peak beside both."""
STEP = 0.2
"""By how much a bound that was too low moves the next ones, in standard deviations of the residuals."""
AIM = 0.7
"""Of the risk that is promised: there is a little to spare for a load that changes its ways."""


def _rows(fill: float = np.nan, count: int = 0) -> Any:
    return msgspec.field(default_factory=lambda: np.full((count, 2), fill))


class Needs(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered of a node's needs; columns are cores and bytes, the newest row is the last."""

    slot: int = -1
    """Index of the slot that is under way: seconds since the epoch / 300."""
    runtime_slots: int = 0
    """For how many slots the bounds are meant."""
    now: tuple[float, ...] = ()
    """The need now: cores and bytes; empty before the first reading."""
    largest: tuple[float, ...] = ()
    """Its largest values in the slot that is under way."""
    ended: Floats = _rows()
    """Of the slots that have ended, at most two days, shape (slots, 2); NaN where nobody looked."""
    bases: Floats = _rows()
    bounds: Floats = _rows()
    """What was foreseen at the end of each of the last `runtime_slots` slots."""
    residuals: Floats = _rows()
    """By how much the need then exceeded its base, shape (n, 2)."""
    offset: Floats = _rows(0.0, 1)
    """What has been learnt from bounds that were too low, or never reached, shape (1, 2)."""

    @property
    def bound(self) -> tuple[float, float] | None:
        """Cores and bytes that the need stays within for the runtime, at the risk; None while that is being learnt."""
        if not len(self.bounds) or np.isnan(self.bounds[-1]).any():
            return None
        cores, size = self.bounds[-1].tolist()
        return max(cores, self.largest[0]), max(size, self.largest[1])


def slots_of(runtime_seconds: float) -> int:
    """How many slots a runtime is, at least one."""
    return min(max(ceil(runtime_seconds / SLOT_SECONDS), 1), MOST_SLOTS)


def look(
    needs: Needs, time_seconds: float, seconds: float, cores: float, size: float, runtime_slots: int, risk: float
) -> Needs:
    """What is remembered after a reading of the need, `seconds` after the one before.

    A clock that goes back a little stays in its slot; slots in which nobody looked are unknown, and say nothing of the
    bounds.
    """
    if needs.runtime_slots != runtime_slots:  # what was learnt is of another question
        needs = Needs(slot=needs.slot, runtime_slots=runtime_slots, largest=needs.largest, ended=needs.ended)
    if needs.now:
        before = needs.now[0]
        constant = RISE_SECONDS if cores > before else FALL_SECONDS
        cores = before + (cores - before) * (1.0 - exp(-max(seconds, 0.0) / constant))
    reading = round(cores, DIGITS), round(size, DIGITS)
    slot, largest = int(time_seconds // SLOT_SECONDS), needs.largest
    if slot < needs.slot - 1:  # the clock was ahead, or is behind: what it says now counts
        needs, largest = msgspec.structs.replace(needs, slot=slot), ()
    if needs.slot >= 0:
        for i in range(min(max(slot - needs.slot, 0), 2 * DAY_SLOTS)):
            needs = _ended(needs, largest if i == 0 else UNKNOWN, risk)
    if slot > needs.slot or not largest:
        largest = reading
    largest = max(largest[0], reading[0]), max(largest[1], reading[1])
    return msgspec.structs.replace(needs, slot=max(slot, needs.slot), now=reading, largest=largest)


def _ended(needs: Needs, largest: tuple[float, ...], risk: float) -> Needs:
    """A slot has ended: the bound of a runtime ago is judged, and the next one made."""
    many, aim = needs.runtime_slots, AIM * risk
    ended = np.concatenate([needs.ended, [largest or UNKNOWN]])[-2 * DAY_SLOTS :]
    residuals, offset = needs.residuals, needs.offset
    if len(needs.bases) >= many and len(ended) >= many and not np.isnan(ended[-many:]).any():
        peak, base, bound = ended[-many:].max(axis=0), needs.bases[-many], needs.bounds[-many]
        if not np.isnan(base).any():
            residuals = np.concatenate([residuals, [np.round(peak - base, DIGITS)]])[-KEPT_RESIDUALS:]
            moved = STEP * residuals.std(axis=0) * ((peak > bound) - aim)
            offset = offset + np.where(np.isnan(bound), 0.0, moved)
    base = _base(ended, many)
    bound = np.full((1, 2), np.nan)
    if len(residuals) >= LEAST_RESIDUALS:
        rank = min(ceil((len(residuals) + 1) * (1 - aim)), len(residuals)) - 1
        bound = base + np.partition(residuals, rank, axis=0)[rank] + offset
    return msgspec.structs.replace(
        needs,
        ended=ended,
        bases=np.concatenate([needs.bases, base])[-many:],
        bounds=np.concatenate([needs.bounds, bound])[-many:],
        residuals=residuals,
        offset=offset,
    )


def _base(ended: Floats, many: int) -> Floats:
    """Shape (1, 2)."""
    recent = np.fmax.reduce(ended[-many:])
    base = PEAK_WEIGHT * recent + (1 - PEAK_WEIGHT) * ended[-1]
    begin = len(ended) - DAY_SLOTS
    if begin >= 0:
        yesterday = np.fmax.reduce(ended[begin : begin + many])
        base = np.where(np.isnan(yesterday), base, (1 - DAY_WEIGHT) * base + DAY_WEIGHT * yesterday)
    rounded: Floats = np.round(base, DIGITS).reshape(1, 2)
    return rounded
