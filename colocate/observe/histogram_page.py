"""One service's latency histogram out of a page of Prometheus text: exact, line by line, in milliseconds for megabytes.

The format is prometheus.io/docs/instrumenting/exposition_formats: only a line feed ends a line, label values may hold
any other character. One bad line costs one line. prometheus-client's parser goes character by character in Python and
takes seconds for a page of megabytes, so the few kinds of lines that are wanted are read here; what stands before the
value of a line is the same on every page, so it is taken apart once and remembered.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from typing import Literal

from colocate.snapshot import Latency

Unit = Literal["seconds", "milliseconds", "microseconds"]
SECONDS: dict[str, float] = {"seconds": 1.0, "milliseconds": 1e-3, "microseconds": 1e-6}
_SUFFIXES = {
    "_milliseconds": 1e-3, "_millis": 1e-3, "_ms": 1e-3, "_microseconds": 1e-6, "_us": 1e-6, "_seconds": 1.0,
}  # fmt: skip
_UNITS = {"milliseconds": 1e-3, "ms": 1e-3, "microseconds": 1e-6, "us": 1e-6, "seconds": 1.0, "s": 1.0}
_LABEL = re.compile(r'\s*([a-zA-Z_][\w.]*|"(?:[^"\\]|\\.)*")\s*=\s*"((?:[^"\\]|\\.)*)"\s*(?:,|$)')
_LINE = re.compile(r'\{((?:[^"}]|"(?:[^"\\]|\\.)*")*)\}\s+(\S+)')
_ESCAPES = {r"\\": "\\", r"\"": '"', r"\n": "\n"}
LOOKS_LIKE_MILLISECONDS = 100.0
MOST_REMEMBERED = 200_000


class ScrapeFailed(Exception):  # noqa: N818 - an expected event of a loop, shown as a problem
    """The endpoint is down, slow, or does not expose the histogram."""


def labels_of(text: str) -> dict[str, str] | None:
    """The labels between the braces of a line; None if they are none."""
    found, at = {}, 0
    text = text.strip()
    while at < len(text):
        match = _LABEL.match(text, at)
        if match is None:
            return None
        value = re.sub(r"\\.", lambda m: _ESCAPES.get(m[0], m[0]), match[2])
        found[match[1].strip('"')] = value
        at = match.end()
    return found


class HistogramReader:
    """Reads one histogram from page after page of one service."""

    def __init__(self, metric: str, labels: Mapping[str, str], unit: Unit | None, target_seconds: float) -> None:
        self.metric, self.labels, self._target = metric, dict(labels), target_seconds
        self._given = SECONDS[unit] if unit is not None else None
        self._remembered: dict[str, tuple[str, float] | None] = {}
        self.prefixes = tuple(
            f"{name}".encode() for name in (f"{metric}_bucket", f"# UNIT {metric} ", "process_start_time_seconds ")
        )
        """How the lines begin that `read` wants; all others may be left out."""

    def _series(self, text: str) -> tuple[str, float] | None:
        """(its labels without le, the bound) of what stands between the braces; None if it is not wanted."""
        labels = labels_of(text)
        if labels is None:
            raise ValueError("labels")
        if not self.labels.items() <= labels.items():
            return None
        le = labels.pop("le", None)
        if le is None:
            kind = "vmrange buckets (VictoriaMetrics)" if "vmrange" in labels else "no le label"
            raise ScrapeFailed(f"the buckets of {self.metric} have {kind}: expose a histogram with le")
        bound = float(le)
        if not bound >= 0:
            raise ScrapeFailed(f"a bucket of {self.metric} has le={le!r}, which is no upper bound")
        return ",".join(f"{k}={v}" for k, v in sorted(labels.items())), bound

    def _line(self, line: str) -> tuple[tuple[str, float] | None, float]:
        """What a bucket's line says. Raises ValueError for a bad one."""
        inside, closed, rest = line[len(self.metric) + len("_bucket") :].rpartition("} ")
        if not closed or "#" in rest or not inside.startswith("{") or " # {" in inside:
            match = _LINE.match(line, len(self.metric) + len("_bucket"))
            if match is None:
                raise ValueError("line")
            inside, rest = f"{{{match[1]}", match[2]
        key = inside[1:]
        if key not in self._remembered:
            if len(self._remembered) > MOST_REMEMBERED:
                self._remembered.clear()
            self._remembered[key] = self._series(key)
        return self._remembered[key], float(rest.split()[0])

    def read(self, page: bytes, at_seconds: float) -> tuple[Latency, float | None]:
        """The sum of the matching series, and the start time of the process that answered. Raises ScrapeFailed."""
        series: dict[str, dict[float, float]] = {}
        bad, start, told = "", None, None
        for line in page.decode(errors="replace").split("\n"):
            if line.startswith(f"{self.metric}_bucket"):
                try:
                    known, value = self._line(line.rstrip("\r"))
                except ValueError:
                    bad = bad or line
                    continue
                if known is not None:
                    buckets = series.setdefault(known[0], {})
                    buckets[known[1]] = buckets.get(known[1], 0.0) + value
            elif line.startswith("process_start_time_seconds "):
                start = _number(line.split()[1])
            elif line.startswith(f"# UNIT {self.metric} "):
                told = _UNITS.get(line.split()[3])
        if not series:
            why = f"; not Prometheus text: {bad[:80]}" if bad else ""
            raise ScrapeFailed(
                f"no histogram {self.metric} with labels {self.labels} (series {self.metric}_bucket with le){why}"
            )
        bounds, counts = self._added_up(series)
        return Latency(self._in_seconds(bounds, told), counts, round(at_seconds, 6)), start

    def _added_up(self, series: Mapping[str, Mapping[float, float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The sum over the bounds that all series have."""
        common = set.intersection(*(set(buckets) for buckets in series.values()))
        if math.inf not in common:
            raise ScrapeFailed(f"a series of {self.metric} has no bucket with le=+Inf")
        bounds = sorted(common)
        if len(bounds) < 2:
            groups: dict[tuple[float, ...], list[str]] = {}
            for name, buckets in series.items():
                groups.setdefault(tuple(sorted(buckets)), []).append(name)
            kinds = ", ".join(f"{names[0] or 'without labels'}: {len(names)}" for names in groups.values())
            raise ScrapeFailed(f"series of {self.metric} have different buckets ({kinds}): choose one by `labels`")
        counts = tuple(sum(buckets[b] for buckets in series.values()) for b in bounds)
        falls = any(b < a for a, b in itertools.pairwise((0.0, *counts)))
        if falls or not all(math.isfinite(c) for c in counts):
            raise ScrapeFailed(f"the buckets of {self.metric} are not cumulative counts")
        return tuple(bounds[:-1]), counts

    def _in_seconds(self, bounds: tuple[float, ...], told: float | None) -> tuple[float, ...]:
        factor = self._given or told
        if factor is None:
            factor = next((f for suffix, f in _SUFFIXES.items() if self.metric.endswith(suffix)), None)
        if factor is None:
            least = next((b for b in bounds if b > 0), math.inf)
            if self._target < least and bounds[-1] >= LOOKS_LIKE_MILLISECONDS:
                raise ScrapeFailed(
                    f"the bounds of {self.metric} ({least:g} to {bounds[-1]:g}) look like milliseconds, and the target "
                    f"of {self._target:g} s is below all of them: write slo.unit: milliseconds (or seconds)"
                )
            factor = 1.0
        return tuple(round(b * factor, 12) for b in bounds)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
