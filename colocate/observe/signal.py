"""A signal of how dear or how dirty power is now, from a file that somebody else writes (a CronJob, a ConfigMap).

Formats: Electricity Maps (`/v3/carbon-intensity/latest`, `history`, `forecast`: `carbonIntensity`, `datetime`), the
Carbon Aware SDK (`/emissions/bylocation`: `rating`, `time`, `duration`; forecasts: `forecastData` of `value`,
`timestamp`, `duration`; also what the carbon-aware KEDA operator keeps in its ConfigMap), `{"value", "time"}` for
prices, or one number, which is of the time at which the file was written.
"""

from __future__ import annotations

import math
import os
import stat
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from colocate.policy.schema import SignalPolicy
from colocate.units import parse_time

READ_SECONDS = 10.0
MOST_BYTES = 4 << 20
AHEAD_SECONDS, MOST_AHEAD = 7 * 86400.0, 200
"""So much of a forecast is looked at; denser ones by the means of so many parts."""
MOST = 1e5
"""A carbon intensity (g/kWh) or a price beyond it is a mistake."""
UNREADABLE = (ValueError, ArithmeticError, RecursionError)
"""What content can lead to: whoever writes the file must not be able to end the agent by it."""
VALUES, TIMES = ("carbonintensity", "rating", "value"), ("datetime", "time", "timestamp")
LISTS = ("history", "forecast", "forecastdata", "data", "emissions")


class Point(NamedTuple):
    """What counts from a time on."""

    at: float
    """Seconds since the epoch."""
    value: float
    seconds: float
    """For how long it is said to count; infinite where that is not said."""


class SignalFile:
    """What the file of a policy says now."""

    def __init__(self) -> None:
        self.problem = ""
        self._looked = float("-inf")
        self._of: SignalPolicy | None = None
        self._points: list[Point] = []

    def value(self, policy: SignalPolicy, time_seconds: float, monotonic_seconds: float) -> float | None:
        """The signal at a time; None where there is none, or none that can be believed: then `problem` says why."""
        if not policy.file:
            self._of, self.problem = None, ""
            return None
        if policy != self._of or monotonic_seconds - self._looked >= READ_SECONDS:
            self._of, self._looked, self.problem = policy, monotonic_seconds, ""
            try:
                self._points = points_of(*_content(Path(policy.file)))
            except OSError as error:
                self._points, self.problem = [], f"{policy.file}: {error.strerror}"
            except UNREADABLE as error:
                self._points, self.problem = [], f"{policy.file}: {error or type(error).__name__}"
        if not self._points:
            return None
        now = at_time(self._points, time_seconds)
        if now is None:
            self.problem = f"{policy.file}: says nothing of now, only of later"
            return None
        if time_seconds > now.at + min(now.seconds, policy.max_age):
            self.problem = f"{policy.file}: what it said last was for {policy.max_age:g} s at most, and is older"
            return None
        self.problem = ""
        return now.value

    def ahead(self, policy: SignalPolicy, time_seconds: float) -> tuple[tuple[float, float], ...]:
        """What is foretold, (seconds since the epoch, value) each, from what counts at a time on; after `value`."""
        now = at_time(self._points, time_seconds)
        if not policy.elastic or self.problem or now is None:
            return ()
        latest = {p.at: max(p.value, 0.0) for p in self._points if now.at <= p.at <= time_seconds + AHEAD_SECONDS}
        points = sorted(latest.items())
        every = -(-len(points) // MOST_AHEAD)
        return tuple((points[i][0], _mean(points[i : i + every])) for i in range(0, len(points), every))


def _mean(points: list[tuple[float, float]]) -> float:
    return sum(value for _, value in points) / len(points)


def _content(path: Path) -> tuple[bytes, float]:
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("is no regular file")
    with open(path, "rb", opener=_at_once) as file:
        content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"is larger than {MOST_BYTES >> 20} MiB")
        return content, os.fstat(file.fileno()).st_mtime


def _at_once(path: str, flags: int) -> int:
    """A pipe would hold up the agent's tick."""
    return os.open(path, flags | os.O_NONBLOCK)


def points_of(content: bytes, written: float) -> list[Point]:
    """In the order of time. Raises ValueError that says what is wrong."""
    try:
        data = msgspec.json.decode(content)
    except msgspec.DecodeError as error:
        raise ValueError(f"is no JSON: {error}") from error
    if isinstance(data, int | float):
        data = [{"value": data, "timestamp": written}]
    found = sorted(_points(data))
    if not found:
        raise ValueError("has no point with a time (datetime, time, timestamp) and a carbonIntensity, rating or value")
    return found


def _points(data: Any) -> list[Point]:
    if isinstance(data, list):
        return [point for each in data for point in _points(each)]
    if not isinstance(data, dict):
        return []
    fields = {str(key).lower(): value for key, value in data.items()}
    value = next((fields[name] for name in VALUES if isinstance(fields.get(name), int | float)), None)
    at = next((fields[name] for name in TIMES if isinstance(fields.get(name), str | int | float)), None)
    if value is None or at is None:
        return [point for name in LISTS for point in _points(fields.get(name))]
    if isinstance(value, bool) or not -MOST <= value <= MOST:
        raise ValueError(f"{value!r} at {at} is no carbon intensity or price: -{MOST:g} to {MOST:g}")
    return [Point(_time(at), float(value), _duration(fields.get("duration")))]


def _time(at: str | float) -> float:
    return parse_time(at) if isinstance(at, str) else float(at)


def _duration(said: Any) -> float:
    """Seconds: minutes where it is a number (forecasts), `HH:MM:SS` where it is text (emissions)."""
    if isinstance(said, int | float) and not isinstance(said, bool) and said > 0:
        return 60.0 * said
    parts = said.split(":") if isinstance(said, str) else []
    if len(parts) == 3 and all(part.isdecimal() for part in parts):
        hours, minutes, seconds = map(int, parts)
        return 3600.0 * hours + 60.0 * minutes + seconds or math.inf
    return math.inf


def at_time(points: list[Point], time_seconds: float) -> Point | None:
    """The latest that has begun; None where none has."""
    begun = [point for point in points if point.at <= time_seconds]
    return begun[-1] if begun else None
