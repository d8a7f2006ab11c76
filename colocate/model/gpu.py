"""What one card costs a service when batch has a share of it, and how long batch goes on after it was stopped.

Under time slices a request that meets batch runs at a share of its speed. With batch on the card for a share u of the
time, and for the drain D of every period P besides, its median grows to 1 / (1 - sigma (u + D/P)); sigma is about a
half and is learnt (recursive least squares with forgetting; Ljung, System Identification, 11.2). A queue makes that
worse: (1 - rho) / (1 - rho x), as of a server that is busy for a share rho of the time alone.
"""

from __future__ import annotations

import math

import msgspec

SIGMA = 0.56
"""Half, and what switching costs; measured on an H100 (benchmarks/gpu)."""
FORGETTING, NOISE = 0.98, 0.01
"""What an older observation counts for beside a new one; the variance of 1 - alone / now."""
DRAIN_HALF_LIFE_SECONDS, MOST_DRAINS = 60.0, 64
UNKNOWN_DRAIN_SECONDS = 1.0
"""A full queue of kernels of a millisecond."""


class Slowdown(msgspec.Struct, frozen=True, omit_defaults=True):
    """sigma, how certain that is, and how far its last predictions were off (a mean of absolute ratios)."""

    sigma: float = SIGMA
    uncertainty: float = 1.0
    error: float = 0.0
    seen: int = 0


def learn(slowdown: Slowdown, share: float, alone_seconds: float, now_seconds: float) -> Slowdown:
    """One observation: the median alone, and beside batch that had this share of the card."""
    if share <= 0.0 or alone_seconds <= 0.0 or now_seconds <= 0.0:
        return slowdown
    predicted = alone_seconds * stretch(slowdown.sigma, share)
    y = 1.0 - alone_seconds / max(now_seconds, alone_seconds)
    gain = slowdown.uncertainty * share / (FORGETTING * NOISE + share * slowdown.uncertainty * share)
    sigma = min(max(slowdown.sigma + gain * (y - slowdown.sigma * share), 0.0), 0.95)
    uncertainty = min((slowdown.uncertainty - gain * share * slowdown.uncertainty) / FORGETTING, 1.0)
    off = abs(now_seconds / predicted - 1.0)
    error = off if not slowdown.seen else 0.9 * slowdown.error + 0.1 * off
    return Slowdown(sigma, uncertainty, error, slowdown.seen + 1)


def stretch(sigma: float, share: float) -> float:
    """By how much a request takes longer while batch has this share; infinite where nothing would be left for it."""
    left = 1.0 - sigma * min(share, 1.0)
    return 1.0 / left if left > 0.0 else math.inf


def queueing(busy: float, longer: float) -> float:
    """By how much waiting makes that worse; `busy` is the share of time in which the service works alone."""
    left = 1.0 - busy * longer
    return (1.0 - busy) / left if left > 0.0 else math.inf


class Drains(msgspec.Struct, frozen=True, omit_defaults=True):
    """(when, how long) a job went on after it was stopped, the last ones. Monotonic seconds, seconds."""

    samples: tuple[tuple[float, float], ...] = ()

    def add(self, at: float, seconds: float) -> Drains:
        """One more."""
        return Drains((*self.samples, (at, seconds))[-MOST_DRAINS:])

    def bound(self, q: float = 0.95) -> float:
        """The quantile, older ones counting less; a second as long as nothing is known."""
        if not self.samples:
            return UNKNOWN_DRAIN_SECONDS
        newest = max(at for at, _ in self.samples)  # however long ago that was
        weighed = sorted((d, 0.5 ** ((newest - at) / DRAIN_HALF_LIFE_SECONDS)) for at, d in self.samples)
        total, running = sum(weight for _, weight in weighed), 0.0
        for seconds, weight in weighed:
            running += weight
            if running >= q * total:
                return seconds
        return weighed[-1][0]
