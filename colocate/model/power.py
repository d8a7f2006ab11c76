"""How much longer a job takes under a power cap, from a sweep of caps; and the least cap that keeps a slowdown.

S(P) = T(P) / T(Pmax) - 1, where T is the time of the same work. Three families are fitted, and the one whose errors are
least on caps that it was not shown is used (leave-one-out):

    isotonic    what is measured, made monotone (pool adjacent violators), with a monotone cubic between the caps
    power-law   a + b (P/Pmax - p0)^-g
    quadratic   C + B u + A u^2 with u = 1 - P/Pmax and A, B >= 0: the family of the talk (`power/seed.py`), as a convex
                problem

How sure a recommendation is, is resampled: from repeats of a cap where there are some, else from how far the sweep is
from monotone; and between two caps the straight line counts, which is above the curve where that is convex.
Sources: Ayer et al., 1955 (isotonic regression); Fritsch and Carlson, 1980 (monotone cubics); Efron and Tibshirani,
An Introduction to the Bootstrap, 1993.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Kind = Literal["isotonic", "power-law", "quadratic"]
KINDS: tuple[Kind, ...] = ("isotonic", "power-law", "quadratic")
LEAST_CAPS = 3
"""With fewer nothing can be left out."""
RESAMPLES, CONFIDENCE = 400, 0.9
SAME_RATIO = 1.003
"""Caps that differ by less are one: a logged limit is a mean of readings."""
NOT_MET_RATIO = 1.02
"""A cap is met by a draw that is not higher than so many times it."""
TIE_RATIO = 1.15
"""A family must be so much better than what is measured to be used in its place."""
POWER_OFFSETS, POWER_EXPONENTS = np.linspace(0.0, 0.98, 50), (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)


class Sample(NamedTuple):
    """One run under one cap: watts, seconds of the same work, and what it drew on average of what the cap is for."""

    cap: float
    seconds: float
    watts: float | None = None
    total: float | None = None
    """What its node drew in all; None: no more than that is told."""


class Sweep(NamedTuple):
    """A sweep's caps in ascending order, with the mean time and draw at each, and all its runs."""

    caps: Floats
    seconds: Floats
    watts: Floats
    """NaN where no run told."""
    total: Floats
    """As `watts`, of the node where that is told."""
    repeats: tuple[tuple[float, ...], ...]

    @property
    def slowdowns(self) -> Floats:
        """As measured, against the mean at the greatest cap."""
        return np.asarray(self.seconds / self.seconds[-1] - 1.0)

    @property
    def floor(self) -> float:
        """The least cap that the hardware met: below it watts cannot be counted on."""
        met = np.isnan(self.watts) | (self.watts <= NOT_MET_RATIO * self.caps)
        return float(self.caps[met][0]) if met.any() else float(self.caps[-1])


class BadSweepError(ValueError):
    """A sweep that says nothing, and what it lacks."""


class Fit(msgspec.Struct, frozen=True):
    """One family, fitted. `parameters` are of shares of the greatest cap."""

    kind: Kind
    greatest: float
    """Watts."""
    parameters: tuple[float, ...]
    knots: tuple[tuple[float, float, float], ...] = ()
    """Of `isotonic`: (share of the greatest cap, slowdown, slope)."""


class Model(NamedTuple):
    """What is known of a job under caps."""

    sweep: Sweep
    fit: Fit
    errors: dict[Kind, float]
    """Median of |predicted / measured time - 1| on caps that were left out, by family; NaN: too few caps."""
    bounds: Floats
    """(resamples, caps of `grid`): upper bounds of the slowdown."""
    grid: Floats
    """Every watt of the sweep's range."""


class Recommendation(msgspec.Struct, frozen=True):
    """The least cap that keeps a slowdown, and what is expected there."""

    cap_watts: float
    slowdown: float
    low: float
    high: float
    """Between these the slowdown is with nine chances in ten."""
    sure: bool
    """Whether it keeps the target with that certainty; False: even the greatest cap of the sweep does not."""
    energy_saved_ratio: float | None
    """Against the greatest cap; None where no run told its draw."""


def sweep_of(samples: Sequence[Sample]) -> Sweep:
    """Runs as a sweep. Raises BadSweepError."""
    for sample in samples:
        if not (np.isfinite(sample.cap) and sample.cap > 0.0):
            raise BadSweepError(f"a cap of {sample.cap:g} W is impossible")
        if not (np.isfinite(sample.seconds) and sample.seconds > 0.0):
            raise BadSweepError(f"a run of {sample.seconds:g} s at {sample.cap:g} W is impossible")
    repeats: list[list[Sample]] = []
    for sample in sorted(samples, key=lambda s: s.cap):
        if repeats and sample.cap <= SAME_RATIO * repeats[-1][0].cap:
            repeats[-1].append(sample)
        else:
            repeats.append([sample])
    caps = [float(np.mean([s.cap for s in runs])) for runs in repeats]
    if len(caps) < 2:
        raise BadSweepError(
            f"there are runs at {len(caps)} cap(s): a sweep needs two at least, {LEAST_CAPS} to be judged"
        )
    drawn = [[s.watts for s in runs if s.watts is not None] for runs in repeats]
    told = [[s.watts if s.total is None else s.total for s in runs] for runs in repeats]
    totals = [[w for w in runs if w is not None] for runs in told]
    return Sweep(
        np.array(caps),
        np.array([np.mean([s.seconds for s in runs]) for runs in repeats]),
        np.array([np.mean(w) if w else np.nan for w in drawn]),
        np.array([np.mean(w) if w else np.nan for w in totals]),
        tuple(tuple(s.seconds for s in runs) for runs in repeats),
    )


def falling(values: Floats, weights: Floats | None = None) -> Floats:
    """The nearest sequence that never rises (pool adjacent violators), by weights where there are any."""
    blocks: list[tuple[float, float, int]] = []
    """Mean, weight, length of each."""
    for value, weight in zip(values, np.ones_like(values) if weights is None else weights, strict=True):
        mean, whole, length = float(value), float(weight), 1
        while blocks and blocks[-1][0] < mean:
            before, heavy, long = blocks.pop()
            mean = (before * heavy + mean * whole) / (heavy + whole)
            whole, length = whole + heavy, length + long
        blocks.append((mean, whole, length))
    return np.repeat([mean for mean, _, _ in blocks], [length for _, _, length in blocks])


def slopes(x: Floats, y: Floats) -> Floats:
    """Of a monotone cubic through these points (Fritsch and Carlson)."""
    gaps, rises = np.diff(x), np.diff(y) / np.diff(x)
    if x.size == 2:
        return np.array([rises[0], rises[0]])
    inner = np.zeros(x.size - 2)
    same = rises[:-1] * rises[1:] > 0.0
    left, right = 2.0 * gaps[1:] + gaps[:-1], gaps[1:] + 2.0 * gaps[:-1]
    inner[same] = (left + right)[same] / (left[same] / rises[:-1][same] + right[same] / rises[1:][same])
    first = _end(gaps[0], gaps[1], rises[0], rises[1])
    return np.concatenate(([first], inner, [_end(gaps[-1], gaps[-2], rises[-1], rises[-2])]))


def _end(near: float, far: float, rise: float, next_rise: float) -> float:
    found = ((2.0 * near + far) * rise - near * next_rise) / (near + far)
    if found * rise <= 0.0:
        return 0.0
    return 3.0 * rise if rise * next_rise <= 0.0 and abs(found) > 3.0 * abs(rise) else found


def _fit_isotonic(x: Floats, s: Floats, greatest: float) -> Fit:
    y = falling(s)
    return Fit("isotonic", greatest, (), tuple(zip(x.tolist(), y.tolist(), slopes(x, y).tolist(), strict=True)))


def _fit_quadratic(x: Floats, s: Floats, greatest: float) -> Fit:
    """Least squares with A, B >= 0: the best of the four cases in which each is free or nothing."""
    u = 1.0 - x
    best: tuple[float, tuple[float, float, float]] | None = None
    for free in ((), (0,), (1,), (0, 1)):
        columns = [np.ones_like(u), *((u, u**2)[i] for i in free)]
        found, *_ = np.linalg.lstsq(np.stack(columns, axis=1), s, rcond=None)
        c, ab = float(found[0]), [0.0, 0.0]
        for i, value in zip(free, found[1:], strict=True):
            ab[i] = float(value)
        if min(ab) < 0.0:
            continue
        error = float(np.sum((c + ab[0] * u + ab[1] * u**2 - s) ** 2))
        if best is None or error < best[0] - 1e-15:
            best = error, (c, ab[0], ab[1])
    assert best is not None
    return Fit("quadratic", greatest, best[1])


def _fit_power_law(x: Floats, s: Floats, greatest: float) -> Fit:
    """For each offset and exponent a and b >= 0 by least squares; the best of them."""
    p0, g = (np.ravel(m) for m in np.meshgrid(POWER_OFFSETS * x[0], POWER_EXPONENTS))
    basis = (x[None, :] - p0[:, None]) ** -g[:, None]
    centred = basis - basis.mean(axis=1, keepdims=True)
    b = np.maximum(centred @ (s - s.mean()) / np.sum(centred**2, axis=1), 0.0)
    a = s.mean() - b * basis.mean(axis=1)
    best = int(np.argmin(np.sum((a[:, None] + b[:, None] * basis - s) ** 2, axis=1)))
    return Fit("power-law", greatest, (float(a[best]), float(b[best]), float(p0[best]), float(g[best])))


_FITS: dict[Kind, Callable[[Floats, Floats, float], Fit]] = {
    "isotonic": _fit_isotonic,
    "power-law": _fit_power_law,
    "quadratic": _fit_quadratic,
}


def predict(fit: Fit, caps: Floats | float) -> Floats:
    """Slowdowns at these caps, watts. Beyond the caps that were seen `isotonic` stays what it was at the last one."""
    x = np.atleast_1d(np.asarray(caps, dtype=float)) / fit.greatest
    if fit.kind == "quadratic":
        c, b, a = fit.parameters
        return c + b * (1.0 - x) + a * (1.0 - x) ** 2
    if fit.kind == "power-law":
        a, b, p0, g = fit.parameters
        return a + b * np.maximum(x - p0, 1e-6) ** -g
    at, y, d = (np.array(column) for column in zip(*fit.knots, strict=True))
    x = np.clip(x, at[0], at[-1])
    i = np.clip(np.searchsorted(at, x, side="right") - 1, 0, at.size - 2)
    h = at[i + 1] - at[i]
    t = (x - at[i]) / h
    h00, h10 = (1 + 2 * t) * (1 - t) ** 2, t * (1 - t) ** 2
    h01, h11 = t**2 * (3 - 2 * t), t**2 * (t - 1)
    return np.asarray(h00 * y[i] + h10 * h * d[i] + h01 * y[i + 1] + h11 * h * d[i + 1])


def fit(sweep: Sweep, kind: Kind) -> Fit:
    """One family on all caps of a sweep."""
    greatest = float(sweep.caps[-1])
    return _FITS[kind](sweep.caps / greatest, sweep.slowdowns, greatest)


def left_out(sweep: Sweep, kind: Kind) -> Floats:
    """Predicted over measured time less 1 at each inner cap, by a fit that was not shown it."""
    greatest, found = float(sweep.caps[-1]), []
    for i in range(1, sweep.caps.size - 1):
        kept = np.arange(sweep.caps.size) != i
        without = _FITS[kind](sweep.caps[kept] / greatest, sweep.slowdowns[kept], greatest)
        found.append((1.0 + predict(without, sweep.caps[i])[0]) / (1.0 + sweep.slowdowns[i]) - 1.0)
    return np.array(found)


def learn(samples: Sequence[Sample], *, kind: Kind | None = None, seed: int = 0) -> Model:
    """The model of a sweep; `kind` where it is not to be chosen. Raises BadSweepError."""
    sweep = sweep_of(samples)
    missed = {k: left_out(sweep, k) for k in KINDS} if sweep.caps.size >= LEAST_CAPS else {}
    errors: dict[Kind, float] = {k: float(np.median(np.abs(missed[k]))) if k in missed else np.nan for k in KINDS}
    chosen: Kind = kind or "isotonic"
    if kind is None and missed:
        best = min(KINDS, key=lambda k: errors[k])
        chosen = best if errors["isotonic"] > TIE_RATIO * errors[best] else "isotonic"
    found = fit(sweep, chosen)
    grid = np.unique(np.concatenate((np.arange(np.ceil(sweep.caps[0]), sweep.caps[-1]), sweep.caps)))
    return Model(sweep, found, errors, _resample(sweep, grid, seed), grid)


def _resample(sweep: Sweep, grid: Floats, seed: int) -> Floats:
    """Upper bounds that other runs of the same sweep might have given: straight lines between what they measure, above
    the curve where that is convex, as such curves are.

    How runs differ is seen in repeats of a cap, or else in how far what was measured is from monotone.
    """
    generator: Any = np.random.default_rng(seed)
    repeated = all(len(runs) > 1 for runs in sweep.repeats)
    expected = (1.0 + falling(sweep.slowdowns)) * sweep.seconds[-1]
    errors = sweep.seconds / expected - 1.0
    rows = []
    for _ in range(RESAMPLES):
        if repeated:
            seconds = np.array([np.mean(generator.choice(runs, len(runs))) for runs in sweep.repeats])
        else:
            seconds = expected * (1.0 + generator.choice(errors, sweep.caps.size))
        rows.append(np.interp(grid, sweep.caps, falling(seconds / seconds[-1] - 1.0)))
    return np.array(rows)


def recommend(model: Model, slowdown: float, confidence: float = CONFIDENCE) -> Recommendation:
    """The least cap within the sweep, and not below the floor of the hardware, that keeps a slowdown so surely."""
    grid, least = model.grid, max(model.sweep.floor, float(model.sweep.caps[0]))
    keeps = np.mean(model.bounds <= slowdown, axis=0) >= confidence
    allowed = keeps & (grid >= least)
    stays = np.flip(np.logical_and.accumulate(np.flip(allowed | (grid < least))))  # and so do all above it
    fine = allowed & stays
    at = int(np.argmax(fine)) if fine.any() else grid.size - 1
    here, top = (1.0 + float(predict(model.fit, cap)[0]) for cap in (grid[at], model.fit.greatest))
    expected = here / top - 1.0  # a model need not be 0 at the greatest cap, and a slowdown is
    return Recommendation(
        cap_watts=float(grid[at]),
        slowdown=expected,
        low=min(float(np.quantile(model.bounds[:, at], (1.0 - confidence) / 2.0)), expected),
        high=max(float(np.quantile(model.bounds[:, at], (1.0 + confidence) / 2.0)), expected),
        sure=bool(fine.any()),
        energy_saved_ratio=saved(model, float(grid[at])),
    )


def saved(model: Model, cap: float) -> float | None:
    """Of the energy at the greatest cap, what the same work needs less at this one."""
    known = ~np.isnan(model.sweep.total)
    if not known[-1] or known.sum() < 2:
        return None
    watts = float(np.interp(cap, model.sweep.caps[known], model.sweep.total[known]))
    longer = 1.0 + max(float(predict(model.fit, cap)[0]), 0.0)
    return 1.0 - watts * longer / float(model.sweep.total[-1])
