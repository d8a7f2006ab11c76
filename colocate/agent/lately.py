"""What was done to whom of late, for who asks afterwards: signals, kills, and knobs that somebody else wrote."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import msgspec

from colocate.actuate.writer import Drift
from colocate.plan import Outcome, Plan
from colocate.snapshot import NodeSnapshot

MOST = 20
ACTS = ("signal", "cgroup.kill")


class Note(msgspec.Struct, frozen=True):
    """One of them. `time_seconds` is the wall clock's."""

    time_seconds: float
    workload: str
    what: str
    why: str


class Lately:
    """The last ones, oldest first; what is repeated tick by tick stands once."""

    def __init__(self) -> None:
        self.notes: deque[Note] = deque(maxlen=MOST)

    def add(self, snapshot: NodeSnapshot, plan: Plan, outcomes: Sequence[Outcome], drifts: Sequence[Drift]) -> None:
        """What a tick did and met."""
        messages = {(a.workload, a.knob): a.message for a in plan.actions}
        for outcome in outcomes:
            if outcome.knob in ACTS:
                done = "" if outcome.status == "applied" else f" ({outcome.status})"
                what = f"{outcome.value if outcome.knob == 'signal' else 'killed'}{done}, {outcome.reason}"
                self._note(snapshot, outcome.workload, what, messages.get((outcome.workload, outcome.knob), ""))
        for drift in drifts:
            what = f"{drift.knob} was {drift.found}, not {drift.ours}"
            self._note(snapshot, drift.workload, what, f"probably by {drift.probably}")

    def _note(self, snapshot: NodeSnapshot, workload: str, what: str, why: str) -> None:
        if not any((n.workload, n.what) == (workload, what) for n in list(self.notes)[-3:]):
            self.notes.append(Note(round(snapshot.time_seconds, 3), workload, what, why))
