"""What the demonstration of power found, and how it is said."""

from __future__ import annotations

import msgspec

MARK = "SIMULATED CARD"


CPU_TOLERANCE = 1.05
"""The CPUs' draw is what it is for a second or two before batch gives way."""


class Cut(msgspec.Struct, kw_only=True):
    """A job while the budget was cut."""

    job: str
    asked_watts: float
    cap_watts: float


class PowerResult(msgspec.Struct, kw_only=True):
    """The whole demonstration."""

    gangs_started: int = 0
    gangs_waiting: dict[str, str] = {}
    """Why each waits."""
    sweep: list[tuple[int, float, float]] = []
    """Watts, seconds, watts drawn of each run."""
    asked_slowdown: float = 0.0
    recommended_cap_watts: float = 0.0
    predicted_slowdown: float = 0.0
    measured_slowdown: float = 0.0
    energy_saved_ratio: float | None = None
    budget_watts: int = 0
    cut_to_watts: int = 0
    cuts: list[Cut] = []
    worst_slowdown: float = 0.0
    """That the model expects of the job that loses most after the cut."""
    equal_slowdown: float = 0.0
    """The same, had all been cut alike."""
    samples: int = 0
    """How often the sum of the limits in force was looked at after the cut."""
    budget_exceeded_samples: int = 0
    cpu_watts: float = 0.0
    """What the simulated package drew while batch had the CPUs."""
    cpu_budget_watts: int = 0
    cpu_watts_within: float = 0.0
    """What it drew under that budget."""
    kept_without_agent: bool = False
    """Whether the caps of jobs that ran stayed when the agent was killed."""
    restored: bool = False
    """Whether every card had the limit that was found, once the jobs had ended."""
    host_unchanged: bool = False
    changes: list[str] = []
    machine: dict[str, str] = {}
    seconds: float = 0.0

    @property
    def kept(self) -> bool:
        """Whether all that is promised was so."""
        held = self.gangs_started == 2 and len(self.gangs_waiting) == 1 and not self.budget_exceeded_samples
        held = held and self.cpu_watts_within <= CPU_TOLERANCE * self.cpu_budget_watts
        return held and self.kept_without_agent and self.restored and self.host_unchanged


def rows(result: PowerResult) -> list[tuple[str, str]]:
    """A line a promise."""
    waits = "; ".join(f"{gang} waits: {why}" for gang, why in result.gangs_waiting.items())
    cuts = ", ".join(f"{c.job} {c.asked_watts:g} to {c.cap_watts:g} W" for c in result.cuts)
    saved = (
        ""
        if result.energy_saved_ratio is None
        else f", {result.energy_saved_ratio:.0%} of the energy saved, by the sweep"
    )
    over = ": more than asked, in these few runs" if result.measured_slowdown > result.asked_slowdown else ""
    return [
        ("gangs under a budget of the cluster", f"{result.gangs_started} start, {waits or 'none waits'}"),
        (
            f"a cap for {result.asked_slowdown:.0%} longer",
            f"{result.recommended_cap_watts:g} W of {result.sweep[-1][0] if result.sweep else 0}{saved}",
        ),
        (
            "slowdown under it",
            f"{result.predicted_slowdown:.1%} expected, {result.measured_slowdown:.1%} measured{over}",
        ),
        (f"the node's budget, {result.budget_watts} to {result.cut_to_watts} W", cuts),
        (
            "the job that loses most",
            f"{result.worst_slowdown:.0%} slower by its model; {result.equal_slowdown:.0%} if all had been cut alike",
        ),
        ("the node's budget exceeded", f"in {result.budget_exceeded_samples} of {result.samples} looks"),
        (
            f"the CPUs' budget, {result.cpu_budget_watts} W",
            f"the package falls from {result.cpu_watts:.0f} to {result.cpu_watts_within:.0f} W as batch gives way",
        ),
        ("caps while their agent is dead", "kept" if result.kept_without_agent else "NOT kept"),
        ("limits after the jobs", "as they were before" if result.restored else "NOT as they were before"),
    ]


def sentence(result: PowerResult) -> str:
    """The outcome in one."""
    if result.kept:
        return "Two gangs ran within the cluster's and the node's budgets, and every limit that was found is back."
    return "NOT all of this was so: see the table."
