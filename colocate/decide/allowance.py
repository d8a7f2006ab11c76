"""How many watts the power limits of a node's GPUs may add up to.

By default its budget. Less while a signal (carbon intensity, a price) is high. More, where the operator lets limits be
promised beyond it: they may as long as what is drawn leaves room, in three bands as Dynamo's leaf controllers have them
(Wu et al., ISCA 2016): at 99 % of the budget the limits fall at once to 95 %, so that nobody can draw more; below 90 %
they rise again, a step at a time. Readings that are missing let nothing rise, and too many of them bring the limits
back to the budget itself.
"""

from __future__ import annotations

import msgspec

from colocate.policy.schema import PowerPolicy
from colocate.snapshot import NodeSnapshot

ACT, TO, RELEASE = 0.99, 0.95, 0.90
"""Shares of the budget: drawn, limits fall; to which they fall; drawn, they may rise."""
STEP, DWELL_SECONDS = 0.05, 30.0
"""By such a share of the budget limits rise at once, and so long after their last change at the earliest."""
MOST_MISSING, FRESH_SECONDS = 0.2, 5.0


class PowerState(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What the limits may add up to, and since when."""

    budget: int = 0
    """The policy's, of which the rest is."""
    within: float = 0.0
    """What may be drawn: the budget, or what a signal leaves of it."""
    watts: float = 0.0
    """What the limits may add up to."""
    changed_seconds: float = 0.0
    why: str = ""
    """Why that is not the budget."""


def allowance(state: PowerState, snapshot: NodeSnapshot, policy: PowerPolicy) -> PowerState:
    """What the limits may add up to now."""
    if not policy.budget:
        return PowerState()
    within, why = by_signal(snapshot, policy)
    if not policy.oversubscribe:
        return PowerState(budget=policy.budget, within=within, watts=within, why=why)
    now, most = snapshot.monotonic_seconds, within * (1.0 + policy.oversubscribe / 100.0)
    known = state.budget == policy.budget and state.watts > 0.0
    before = min(state.watts, most) if known else within
    if known and within < state.within:
        before = min(before, within)  # it was cut: what was drawn under the old one says little
    drawn = drawn_watts(snapshot)
    watts = before
    if drawn is None:
        watts, told = min(before, within), "too many readings are missing"
    elif drawn >= ACT * within and before > within:
        watts, told = TO * within, f"{drawn:g} W are drawn of {within:g} W"
    elif before < within and now - state.changed_seconds >= DWELL_SECONDS:
        watts, told = within, ""  # limits that add up to it keep it by themselves
    elif drawn < RELEASE * within and now - state.changed_seconds >= DWELL_SECONDS:
        watts, told = min(before + STEP * within, most), f"only {drawn:g} W are drawn of {within:g} W"
    else:
        told = f"{drawn:g} W are drawn of {within:g} W"
    changed = now if not known or watts != state.watts else state.changed_seconds
    why = "; ".join(filter(None, (why, told if watts != within else "")))
    return PowerState(budget=policy.budget, within=within, watts=round(watts, 3), changed_seconds=changed, why=why)


def by_signal(snapshot: NodeSnapshot, policy: PowerPolicy) -> tuple[float, str]:
    """What may be drawn as the signal is, and why that is less than the budget. An unknown signal changes nothing."""
    value = snapshot.power_signal
    if value is None:
        return float(policy.budget), ""
    above = [step for step in policy.signal.steps if value > step.above]
    if not above or above[-1].budget >= policy.budget:
        return float(policy.budget), ""
    return float(above[-1].budget), f"the signal is {value:g}, above {above[-1].above:g}"


def drawn_watts(snapshot: NodeSnapshot) -> float | None:
    """What all cards draw; of one without a fresh reading its limit counts. None where that is so of too many."""
    found, missing = 0.0, 0
    for card in snapshot.cards.values():
        fresh = not card.problem and snapshot.monotonic_seconds - card.at_seconds <= FRESH_SECONDS
        if card.watts is not None and fresh:
            found += card.watts
        else:
            missing += 1
            found += card.limit_watts or card.most_watts or 0.0
    return found if missing <= MOST_MISSING * len(snapshot.cards) else None
