"""Quantities as people write them, CPU lists as the kernel writes them, and the two shares-to-weight formulas.

Sources: Kubernetes resource.Quantity (`500m`, `2Gi`), Go durations (`20ms`, `1m30s`), cpuset(7) lists (`0-3,8`),
KEP-2254 (the linear conversion) and opencontainers/cgroups ConvertCPUSharesToCgroupV2Value (the logarithmic one).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction
from functools import lru_cache
from typing import Annotated

import msgspec

_BINARY = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "Pi": 1 << 50, "Ei": 1 << 60}
_DECIMAL = {"k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_SECONDS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(us|µs|ms|s|m|h|d)")

_SI = {"n": Fraction(1, 10**9), "u": Fraction(1, 10**6), "m": Fraction(1, 1000), "E": Fraction(10**18)}
_QUANTITY = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))(?:([KMGTPE]i|[numkMGTPE])|[eE]([+-]?\d{1,2}))?")

MOST_CORES, MOST_BYTES, MOST_WATTS, MOST_SLOWDOWN = 65536, 1 << 60, 100_000, 10.0
"""More than any node has; what is beyond is a slip of the pen."""

CPU_PERIOD_US = 100_000
"""The CFS bandwidth period we always use; kubelet's default."""

CPU_QUOTA_MIN_US = 1_000
"""`cpu.max` and `cpu.cfs_quota_us` below this are EINVAL (kernel/sched/core.c, min_cfs_quota_period)."""


Duration = Annotated[float, msgspec.Meta(extra={"quantity": "duration"})]
"""Seconds; written `20ms`, `1.5s`, `1m30s` in a policy."""

Bytes = Annotated[int, msgspec.Meta(extra={"quantity": "bytes"})]
"""Bytes; written `512Mi`, `2G` or a plain number in a policy."""

Cores = Annotated[float, msgspec.Meta(extra={"quantity": "cores"})]
"""CPU cores; written `2`, `0.5` or `500m` in a policy."""

Percent = Annotated[float, msgspec.Meta(extra={"quantity": "percent"})]
"""A percentage of 0 to 100; written `65` or `65%` in a policy."""


def parse_watts(text: str) -> int:
    """Whole watts: `300`, `300W`. Raises ValueError."""
    number = text.strip().removesuffix("W").rstrip()
    if not number.isascii() or not number.isdigit() or not 1 <= int(number) <= MOST_WATTS:
        raise ValueError(f"{text[:40]!r}: write whole watts from 1 to {MOST_WATTS}, e.g. 300")
    return int(number)


def parse_duration(text: str | float) -> float:
    """Seconds of a duration; a bare number is seconds. Raises ValueError."""
    if isinstance(text, int | float):
        value = float(text)
    else:
        parts = _DURATION.findall(text.strip())
        if not parts or "".join(n + u for n, u in parts) != text.strip():
            raise ValueError(f"{text!r} is not a duration: write it like 20ms, 1.5s or 1m30s")
        value = sum(float(n) * _SECONDS[u] for n, u in parts)
    if not 0 <= value < 10**9:
        raise ValueError(f"{text!r} is not a duration between 0 and 30 years")
    return value


def parse_bytes(text: str | float) -> int:
    """Bytes of a Kubernetes quantity. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]{0,2})", str(text).strip())
    factor = {**_BINARY, **_DECIMAL, "": 1}.get(match[2]) if match else None
    if not match or factor is None:
        raise ValueError(f"{text!r} is not a quantity of bytes: write it like 512Mi, 2Gi or 1500000000")
    value = float(match[1]) * factor
    if value > MOST_BYTES:
        raise ValueError(f"{str(text)[:40]!r} is more than 1Ei")
    return round(value)


def parse_cores(text: str | float) -> float:
    """Cores of a Kubernetes CPU quantity. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(m?)", str(text).strip())
    if not match:
        raise ValueError(f"{text!r} is not a CPU quantity: write it like 2, 0.5 or 500m")
    value = float(match[1]) / (1000 if match[2] else 1)
    if value > MOST_CORES:
        raise ValueError(f"{str(text)[:40]!r} is more than {MOST_CORES} CPUs")
    return value


@lru_cache(maxsize=4096)
def parse_quantity(text: str | float) -> Fraction:
    """The exact value of a Kubernetes quantity (apimachinery, resource.Quantity): `250m`, `1.5Gi`, `1e3`, `4`.

    Raises ValueError.
    """
    match = _QUANTITY.fullmatch(str(text))
    if not match:
        raise ValueError(f"{text!r} is not a quantity: write it like 500m, 2, 1.5Gi or 1e3")
    if match[3]:
        return Fraction(match[1]) * Fraction(10) ** int(match[3])
    suffix = match[2] or ""
    return Fraction(match[1]) * (_SI.get(suffix) or {**_DECIMAL, **_BINARY, "": 1}[suffix])


_TIME = re.compile(r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d(?:\.\d+)?)(?:Z|([+-])(\d\d):(\d\d))")


def parse_time(text: str) -> float:
    """Seconds since the epoch of an RFC 3339 time. Raises ValueError."""
    match = _TIME.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is not a time: write it like 2026-01-31T12:00:00Z")
    year, month, day = int(match[1]), int(match[2]), int(match[3])
    # days since 1970-01-01, with years that begin in March (Howard Hinnant, days_from_civil)
    year -= month <= 2
    era, of_year = year // 400, (153 * (month + (-3 if month > 2 else 9)) + 2) // 5 + day - 1
    of_era = (year % 400) * 365 + (year % 400) // 4 - (year % 400) // 100 + of_year
    seconds = (era * 146097 + of_era - 719468) * 86400 + int(match[4]) * 3600 + int(match[5]) * 60 + float(match[6])
    if match[7]:
        seconds -= (1 if match[7] == "+" else -1) * (int(match[8]) * 3600 + int(match[9]) * 60)
    return seconds


def seconds_of(text: str | None) -> float | None:
    """Seconds since the epoch; None if it is no time. For what anybody may have written into an object."""
    try:
        return parse_time(text) if text else None
    except ValueError:
        return None


def time_text(seconds: float) -> str:
    """Seconds since the epoch as RFC 3339 in UTC, to the second, as the API server writes it."""
    days, second = divmod(int(seconds // 1), 86400)
    era, of_era = divmod(days + 719468, 146097)  # years that begin in March (Howard Hinnant, civil_from_days)
    year = (of_era - of_era // 1460 + of_era // 36524 - of_era // 146096) // 365
    of_year = of_era - (365 * year + year // 4 - year // 100)
    month = (5 * of_year + 2) // 153
    day, month = of_year - (153 * month + 2) // 5 + 1, month + (3 if month < 10 else -9)
    year += era * 400 + (month <= 2)
    return f"{year:04}-{month:02}-{day:02}T{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}Z"


def parse_percent(text: str | float) -> float:
    """A percentage between 0 and 100. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%?", str(text).strip())
    if not match or float(match[1]) > 100:
        raise ValueError(f"{text!r} is not a percentage between 0 and 100")
    return float(match[1])


def format_duration(seconds: float) -> str:
    """The shortest exact-enough reading: `850 us`, `4.2 ms`, `31.0 s`, `12 min`."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def format_bytes(value: float) -> str:
    """A binary quantity with one decimal: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def parse_cpulist(text: str) -> tuple[int, ...]:
    """CPUs of a cpuset(7) list, sorted and unique. Raises ValueError."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, dash, last = part.partition("-")
        cpus.update(range(int(first), int(last if dash else first) + 1))
    return tuple(sorted(cpus))


def format_cpulist(cpus: Iterable[int]) -> str:
    """The kernel's own spelling of a set of CPUs: `0-2,5`."""
    ordered = sorted(set(cpus))
    parts: list[str] = []
    start = 0
    for i, cpu in enumerate(ordered):
        if i + 1 == len(ordered) or ordered[i + 1] != cpu + 1:
            parts.append(str(cpu) if i == start else f"{ordered[start]}-{cpu}")
            start = i + 1
    return ",".join(parts)


def weight_of_shares(shares: int) -> int:
    """cgroup v2 weight that the kernel's scheduler treats like these v1 shares (1024 is 100), the way back.

    runc and kubelet convert by other curves, for other ends.
    """
    return min(max(round(shares * 100 / 1024), 1), 10_000)


def shares_of_weight(weight: int) -> int:
    """cgroup v1 shares that the kernel's scheduler treats like this v2 weight (100 is 1024), at least 2."""
    return max(2, weight * 1024 // 100)


def cpu_max(cores: float | None) -> str:
    """The content of `cpu.max` for a grant in cores; None is no quota. Never below the kernel's minimum."""
    if cores is None:
        return f"max {CPU_PERIOD_US}"
    return f"{max(round(cores * CPU_PERIOD_US), CPU_QUOTA_MIN_US)} {CPU_PERIOD_US}"


def cores_of_cpu_max(text: str) -> float | None:
    """The grant in cores that a `cpu.max` content means; None is no quota."""
    quota, _, period = text.strip().partition(" ")
    return None if quota == "max" else int(quota) / int(period or CPU_PERIOD_US)
