"""What the demonstration of the cards found: as it is printed, reported, and given out as JSON."""

from __future__ import annotations

from typing import Any

import msgspec

from colocate.demo.result import Detail, Event

TITLES = {
    "alone": "without batch",
    "timeslicing": "stock time slicing",
    "gate": "gated by colocate",
    "dial": "dialled by colocate",
    "off": "a job that is held",
}


class Arm(msgspec.Struct, kw_only=True):
    """One service beside one way of batch."""

    service: str
    p50_ms: float
    p99_ms: float
    target_ms: float
    requests: int
    batch_share: float
    """Of the card's time."""
    p99_to_alone: float | None = None
    verdict: str = ""

    @property
    def kept(self) -> bool:
        """Whether its p99 was within its target."""
        return self.p99_ms <= self.target_ms


class GpuResult(msgspec.Struct, kw_only=True):
    """The whole demonstration."""

    simulated_card: bool = True
    cards: list[str] = []
    """What each is."""
    arms: dict[str, Arm] = {}
    """`alone`, `timeslicing`, `gate` and `off` are of the service with short requests, `dial` of the other one."""
    beside: dict[str, Arm] = {}
    """`alone` and `timeslicing` of the other one."""
    refused: dict[str, Any] = {}
    idle_harvested: float = 0.0
    """Of the time in which the first service leaves its card idle, what batch used in the gate."""
    reaction_p95_ms: float | None = None
    """From a request to batch stopped."""
    host_unchanged: bool = False
    changes: list[str] = []
    machine: dict[str, str] = {}
    seconds: dict[str, float] = {}
    details: dict[str, Detail] = {}
    decisions: list[Event] = []

    @property
    def mark(self) -> str:
        """What stands at each number."""
        return "SIMULATED CARD" if self.simulated_card else "REAL CARD"

    def of(self, service: str) -> dict[str, Arm]:
        """All arms of one service, in their order."""
        found = {n: a for n, a in [*self.beside.items(), *self.arms.items()] if a.service == service}
        return {name: found[name] for name in TITLES if name in found}


def sum_up(result: GpuResult, busy_alone: float) -> None:
    """The figures that compare arms. `busy_alone`: the share of its card that the first service uses alone."""
    for name in {a.service for a in result.arms.values()}:
        arms = result.of(name)
        for arm in arms.values():
            if "alone" in arms and arms["alone"].p99_ms:
                arm.p99_to_alone = round(arm.p99_ms / arms["alone"].p99_ms, 3)
    if "gate" in result.arms:
        result.idle_harvested = round(result.arms["gate"].batch_share / max(1.0 - busy_alone, 1e-9), 4)


def rows(result: GpuResult, service: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A column an arm, a line a figure."""
    arms = result.of(service)
    figures = [
        ("p50 ms", [f"{a.p50_ms:.1f}" for a in arms.values()]),
        ("p99 ms", [f"{a.p99_ms:.1f}" for a in arms.values()]),
        ("p99 to alone", ["n/a" if a.p99_to_alone is None else f"{a.p99_to_alone:.2f}" for a in arms.values()]),
        ("requests", [str(a.requests) for a in arms.values()]),
        ("target kept", ["yes" if a.kept else "NO" for a in arms.values()]),
        ("batch's share of the card", [f"{a.batch_share:.0%}" for a in arms.values()]),
    ]
    return ("", *(TITLES[a] for a in arms)), [(f"{result.mark} {name}", *values) for name, values in figures]


def sentence(result: GpuResult) -> str:
    """What the run showed, and that it is one run."""
    arms, said = result.arms, []
    if {"gate", "timeslicing"} <= arms.keys():
        gate, sliced = arms["gate"], arms["timeslicing"]
        said.append(
            f"beside short requests batch had {gate.batch_share:.0%} of the card ({result.idle_harvested:.0%} of its "
            f"idle time) at p99 {gate.p99_to_alone:.2f} x alone, where time slicing gives {sliced.batch_share:.0%} at "
            f"{sliced.p99_to_alone:.2f} x"
        )
    if "dial" in arms and "timeslicing" in result.beside:
        dial, sliced = arms["dial"], result.beside["timeslicing"]
        said.append(
            f"beside long ones {dial.batch_share:.0%} at {dial.p99_to_alone:.2f} x, where time slicing gives "
            f"{sliced.batch_share:.0%} at {sliced.p99_to_alone:.2f} x"
        )
    targets = {name: result.of(name) for name in dict.fromkeys(a.service for a in arms.values())}
    broken = [name for name, of in targets.items() if "timeslicing" in of and not of["timeslicing"].kept]
    kept = [name for name, of in targets.items() if all(a.kept for n, a in of.items() if n in ("gate", "dial", "off"))]
    said.append(f"time slicing broke the target of {_names(broken)}, colocate kept that of {_names(kept)}")
    noise = "One run, no interval: a tenth more or less is noise, and of fewer than 100 requests p99 is the slowest."
    text = "; ".join(said)
    return f"{text[0].upper()}{text[1:]}. {noise}"


def _names(services: list[str]) -> str:
    return " and ".join(services) or "none"


def refusal(result: GpuResult) -> str:
    """Why one job was held, in words; empty if it was not."""
    found = result.refused
    if not found:
        return ""
    return (
        f"{found['job']} was let run for moments to be measured, and is held since: {found['reason']}: "
        f"{found['message']}. It is evicted after freeze.maxFrozen"
    )


def legend(result: GpuResult) -> str:
    """What the words and numbers mean."""
    if result.simulated_card:
        return f"{WORDS}; {LANGUAGE}. {MODEL}"
    return f"{WORDS}. Kernels are calibrated multiply-adds on {', '.join(result.cards)}; shares are by NVML's samples"


WORDS = (
    "gate: batch runs while the service is idle; dial: it runs for a share of each period; held: it does not run. "
    "vision answers requests of 20 ms, 12 a second, beside kernels of 4 ms"
)
LANGUAGE = "language works at several requests of half a second at once, two a second, beside kernels of 2 ms"
MODEL = (
    "Kernel times, time slices and NVML's counters come from a model of an H100; latencies are of real HTTP requests"
)
