"""Whatever is asked in whatever order, and whenever the agent dies: nothing is frozen in the middle of a driver's call,
no call is made of what is frozen, and in the end everybody runs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from colocate.actuate.driver import Driver
from colocate.actuate.driver_worker import next_step
from colocate.actuate.holds import Holds
from colocate.actuate.journal import Journal
from colocate.kernelmodel.port import ModelKernel
from colocate.plan import Action, CgroupTarget, Plan, Pulse
from colocate.snapshot import Card, CardUser
from tests import make

AFTER = {"lock": "locked", "checkpoint": "checkpointed", "restore": "locked", "unlock": "running"}
JOBS = {"a": {11: 1}, "b": {12: 1, 13: 1}}
"""Job -> its processes on the card, and when they started."""


class Simulated(Driver):
    """The agent's end of the driver with a worker that takes its steps when the test says so."""

    def __init__(self, world):
        super().__init__()
        self._world = world
        self.wants: dict[int, tuple[str, int]] = {}
        self.under_way: dict[int, str] = {}
        self.is_: dict[int, str] = {}

    def _send(self, **wish):
        self.wants[wish["pid"]] = wish["want"], wish["wish"]

    def step(self, pid):
        """Begin the next step, or end the one that is under way."""
        if pid in self.under_way:
            assert not self._world.frozen(pid), "it was frozen in the middle of a call"
            did = self.under_way.pop(pid)
            self.is_[pid] = AFTER[did]
            self._hear({"pid": pid, "state": self.is_[pid], "did": did})
            return
        wanted, wish = self.wants.get(pid, ("running", 0))
        state = self.is_.get(pid, "running")
        step = next_step(state, wanted)
        if self._world.frozen(pid):
            return  # the worker waits
        if not step:
            self._hear({"pid": pid, "state": state, "wish": wish})
            return
        self.under_way[pid] = step
        self._hear({"pid": pid, "state": state, "doing": step})

    def fail(self, pid):
        """The call that is under way fails, and changes nothing."""
        if self.under_way.pop(pid, ""):
            self._hear({"pid": pid, "state": self.is_.get(pid, "running"), "error": "it failed"})


class Now:
    """Workers that do it at once."""

    def submit(self, _key, work):
        work()

    def arrived(self):
        return []


class World:
    def __init__(self, folder):
        self.port = ModelKernel(version=2)
        self.journal = Journal(Path(folder), "boot")
        self.stopped: set[str] = set()
        self.begin()

    def begin(self):
        self.driver = Simulated(self)
        self.holds = Holds(self.port, self.journal, None)
        self.holds.driver = self.driver
        self.holds._workers = Now()  # type: ignore[assignment]
        self.holds._alive = lambda pid, started: True  # type: ignore[method-assign]

    def frozen(self, pid):
        return any(pid in pids and job in self.stopped for job, pids in JOBS.items())

    def tick(self, wishes):
        """`wishes`: job -> freeze, lock, suspend or run."""
        jobs = {j: make.job(j, frozen=j in self.stopped) for j in JOBS}
        ids = {j: w.id for j, w in jobs.items()}
        card = Card(uuid="GPU-0", users={ids[j]: CardUser() for j in JOBS})
        snapshot = make.snapshot(*jobs.values(), cards={"GPU-0": card})
        on_card = {ids[j]: dict(p) for j, p in JOBS.items()}
        pulse = Pulse(card="GPU-0", mode="gate", by="lock")
        values = {j: "1" if wishes.get(j) == "freeze" else "0" for j in JOBS}
        changed = {j: v for j, v in values.items() if (v == "1") != (j in self.stopped)}
        actions = [self.freezes(ids[j], j, v) for j, v in changed.items()]
        plan = Plan(
            sequence=1,
            actions=tuple(actions),
            pulses={ids[j]: (pulse,) for j, w in wishes.items() if w == "lock"},
            suspended=tuple(ids[j] for j, w in wishes.items() if w == "suspend"),
        )
        for job, wish in wishes.items():
            if wish == "lock" and self.holds.may_hold(f"/{job}", JOBS[job]):
                for pid, started in JOBS[job].items():  # as the hand does, between ticks
                    self.driver.want(pid, started, "locked")
        self.holds.act(plan, snapshot, on_card)
        waiting = self.holds.waiting(plan, on_card)
        for action in actions:
            job = action.path[1:]
            if action.value == "0":
                self.stopped.discard(job)
            elif action.workload not in waiting:
                assert not self.driver.under_way.keys() & JOBS[job].keys(), "a call is under way"
                self.stopped.add(job)

    def freezes(self, id_, job, value):
        target = CgroupTarget(f"/{job}")
        return Action(workload=id_, target=target, knob="cgroup.freeze", value=value, reason="T", message="", law="t")

    def held(self):
        return {pid for pid, state in self.driver.is_.items() if state != "running"} | set(self.driver.under_way)

    def crash(self):
        """The agent and its worker die; the guardian thaws, and lets go whom the journal names."""
        named = {e.pid for e in self.journal.entries if e.kind == "process"}
        assert self.held() <= named, "held without a word in the journal"
        states, calls = self.driver.is_, self.driver.under_way
        self.stopped.clear()
        self.begin()
        self.driver.is_ = {**states, **{pid: AFTER[step] for pid, step in calls.items()}}
        for pid in named:
            self.driver.release(pid, 1)
        self.settle()
        assert self.held() == set()

    def settle(self):
        for _ in range(12):
            for pid in (p for pids in JOBS.values() for p in pids):
                self.driver.step(pid)


WISH = st.sampled_from(["run", "freeze", "lock", "suspend"])
EVENT = st.one_of(
    st.tuples(st.just("tick"), st.fixed_dictionaries({"a": WISH, "b": WISH})),
    st.tuples(st.just("step"), st.sampled_from([11, 12, 13])),
    st.tuples(st.just("fail"), st.sampled_from([11, 12, 13])),
    st.tuples(st.just("crash"), st.none()),
)


@settings(deadline=None, max_examples=200)
@given(st.lists(EVENT, max_size=40))
def test_31_never_frozen_in_a_call_never_called_while_frozen_and_all_run_in_the_end(events):
    with tempfile.TemporaryDirectory() as folder:
        world = World(folder)
        for kind, what in events:
            if kind == "tick":
                world.tick(what)
            elif kind == "step":
                world.driver.step(what)
            elif kind == "fail":
                world.driver.fail(what)
            else:
                world.crash()
        for _ in range(3):  # nobody wants anything any more
            world.tick({})
            world.settle()
        assert world.stopped == set()
        assert world.held() == set()
        world.journal.close()
