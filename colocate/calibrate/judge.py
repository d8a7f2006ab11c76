"""What the rounds of a calibration support: numbers in, a calibration out."""

from __future__ import annotations

import msgspec

from colocate.calibration import Calibration
from colocate.model.statistics import ratio_interval


def judge(results: dict[str, list[tuple[float, float]]], facts: dict[str, str], now_seconds: float) -> Calibration:
    """The calibration that the rounds support: paired ratios to weight 1, round by round."""
    base = results["weight"]
    evidence = {}
    for arm, rounds in results.items():
        p99 = ratio_interval([p for p, _ in rounds], [p for p, _ in base])
        entry = {
            "p99_ms": round(1e3 * sorted(p for p, _ in rounds)[len(rounds) // 2], 3),
            "work": round(sorted(w for _, w in rounds)[len(rounds) // 2], 1),
            "p99_ratio": round(p99.value, 3),
            "p99_ratio_low": round(p99.low, 3),
            "p99_ratio_high": round(p99.high, 3),
        }
        if all(w > 0 for _, w in (*rounds, *base)):  # a slow machine may do no whole unit of work in a round
            work = ratio_interval([w for _, w in rounds], [w for _, w in base])
            entry |= {"work_ratio": round(work.value, 3), "work_ratio_low": round(work.low, 3)}
        evidence[arm] = entry
    idle = evidence.get("idle")
    wins = idle is not None and idle["p99_ratio_high"] < 1.0 and idle.get("work_ratio_low", 0.0) >= 0.9
    order = sorted((a for a in ("cpuset", "quota") if a in evidence), key=lambda a: evidence[a]["p99_ratio"])
    rungs = msgspec.convert([*order, "freeze"], tuple)
    return msgspec.convert(
        {
            "lever": "idle" if wins else "weight",
            "rungs": rungs,
            "kernel": facts["kernel"],
            "machine": facts,
            "measured_seconds": round(now_seconds, 3),
            "evidence": evidence,
        },
        Calibration,
    )
