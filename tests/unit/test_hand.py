"""The hand: grants are leases, what is stopped is let go, and one that cannot be carried out harms nobody else."""

from __future__ import annotations

import threading
import time

import pytest

from colocate.actuate.gates import FreezeGate
from colocate.actuate.hand import Grant, Hand, Probe
from colocate.cgroup.knobfiles import read_knob, write_knob
from colocate.cgroup.tree import inodes_of
from colocate.kernelmodel.port import ModelKernel
from colocate.plan import Pulse


class Senses:
    """Who is busy, as a test says."""

    def __init__(self):
        self.now_busy, self.fails = set(), False

    def look(self, now):
        if self.fails:
            raise RuntimeError("a sensor fell over")

    def busy(self, id_, now):
        return id_ in self.now_busy


class World:
    def __init__(self, *paths, measure=None):
        self.port, self.senses = ModelKernel(version=2), Senses()
        for path in paths:
            self.port.mkdir("unified", path)
        self.probes: list[Probe] = []
        self.hand = Hand(self.senses, measure or self.probes.append)

    def grant(self, *ids, seconds=10.0, stay=(), **pulse):
        until = time.monotonic() + seconds
        chosen = {"card": "GPU-0", "mode": "gate", "services": ("web",)} | pulse
        self.hand.grant({id_: Grant(self.gate(id_), (Pulse(**chosen),), until) for id_ in ids}, frozenset(stay))

    def gate(self, id_):
        return FreezeGate(self.port, f"/{id_}", inodes_of(self.port, f"/{id_}"))

    def frozen(self, id_):
        return read_knob(self.port, f"/{id_}", "cgroup.freeze", inodes_of(self.port, f"/{id_}")) == "1"

    def becomes(self, id_, frozen, seconds=5.0):
        deadline = time.monotonic() + seconds
        while self.frozen(id_) != frozen and time.monotonic() < deadline:
            time.sleep(0.002)
        return self.frozen(id_) == frozen

    def freeze(self, id_, value="1"):
        write_knob(self.port, f"/{id_}", "cgroup.freeze", value, inodes_of(self.port, f"/{id_}"))


@pytest.fixture
def world():
    made = []

    def make(*paths, **options):
        made.append(World(*(paths or ("/a",)), **options))
        made[-1].hand._next_probe["GPU-0"] = float("inf")  # no probes but where a test wants them
        return made[-1]

    yield make
    for one in made:
        one.hand.close()


def test_a_gate_stops_batch_while_a_service_is_busy(world):
    here = world()
    here.grant("a")
    assert here.becomes("a", False)
    here.senses.now_busy.add("web")
    assert here.becomes("a", True)
    here.senses.now_busy.clear()
    assert here.becomes("a", False)


def test_26_a_lease_that_nobody_renews_ends_with_batch_let_go(world):
    here = world()
    here.senses.now_busy.add("web")
    here.grant("a", seconds=1.5)
    assert here.becomes("a", True)
    assert here.becomes("a", False), "although the service is busy: whoever granted it is gone"
    time.sleep(0.1)
    assert not here.frozen("a")


def test_what_is_no_longer_granted_is_let_go_unless_it_is_to_stay(world):
    here = world("/a", "/b")
    here.senses.now_busy.add("web")
    here.grant("a", "b")
    assert here.becomes("a", True)
    assert here.becomes("b", True)
    here.grant(stay=("b",))
    assert (here.frozen("a"), here.frozen("b")) == (False, True)


def test_what_a_law_had_stopped_is_let_go_by_the_grant(world):
    here = world()
    here.freeze("a")
    here.grant("a")
    assert here.becomes("a", False)


def test_25_what_somebody_else_stops_meanwhile_is_theirs(world):
    here = world()
    here.grant("a")
    assert here.becomes("a", False)
    time.sleep(0.05)
    here.freeze("a")  # docker pause
    here.senses.now_busy.add("web")
    time.sleep(0.05)
    here.senses.now_busy.clear()
    time.sleep(0.05)
    assert here.frozen("a")
    here.grant()
    assert here.frozen("a"), "nor when the grant ends"


def test_what_cannot_be_stopped_is_not_taken_for_stopped(world):
    here = world()
    gate = FreezeGate(here.port, "/a", {})  # as of a cgroup that was seen in no hierarchy with a freezer
    here.senses.now_busy.add("web")
    here.hand.grant({"a": Grant(gate, (Pulse(card="GPU-0", mode="gate", services=("web",)),), time.monotonic() + 10)})
    deadline = time.monotonic() + 5
    while not here.hand.problems() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert "no hierarchy with a freezer" in here.hand.problems()["a"]
    here.grant("a")
    assert here.becomes("a", True)
    assert not here.hand.problems()


def test_what_somebody_let_go_is_stopped_again_with_the_next_grant(world):
    here = world()
    here.senses.now_busy.add("web")
    here.grant("a")
    assert here.becomes("a", True)
    here.freeze("a", "0")
    here.grant("a")
    assert here.becomes("a", True)


def test_a_job_that_cannot_be_stopped_gives_no_drain(world):
    here = world("/a", "/b")
    here.hand._next_probe["GPU-0"] = 0.0
    pulse, until = Pulse(card="GPU-0", mode="gate", services=("web",)), time.monotonic() + 10.0
    gates = {"a": here.gate("a"), "b": FreezeGate(here.port, "/b", {})}
    here.hand.grant({id_: Grant(gate, (pulse,), until) for id_, gate in gates.items()})
    deadline = time.monotonic() + 5
    while not here.probes and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(0.05)
    assert here.probes[0].stopped_at is None


def test_a_dial_runs_for_its_share(world):
    here = world()
    here.grant("a", mode="dial", services=(), period_seconds=0.1, on_seconds=0.03)
    time.sleep(0.2)
    running = 0
    for _ in range(500):
        running += not here.frozen("a")
        time.sleep(0.002)
    assert 0.15 <= running / 500 <= 0.6


def test_a_pulse_that_makes_no_sense_harms_no_other(world):
    here = world("/a", "/b")
    until = time.monotonic() + 10.0
    bad = Pulse(card="GPU-0", mode="dial", services=(), period_seconds=0.0, on_seconds=0.0)
    good = Pulse(card="GPU-1", mode="gate", services=("web",))
    here.senses.now_busy.add("web")
    grants = {i: Grant(here.gate(i), (p,), until) for i, p in (("a", bad), ("b", good))}
    here.hand.grant(grants)
    assert here.becomes("b", True)
    here.senses.now_busy.clear()
    assert here.becomes("b", False)


def test_a_sensor_that_falls_over_stops_the_hand_for_a_moment_only(world):
    here = world()
    here.grant("a")
    here.senses.fails = True
    time.sleep(0.2)
    here.senses.fails = False
    here.senses.now_busy.add("web")
    assert here.becomes("a", True)


def test_how_long_a_job_goes_on_is_seen_in_a_moment_without_requests(world):
    here = world()
    del here.hand._next_probe["GPU-0"]
    here.grant("a", mode="probe", hold_off_seconds=0.01)
    for expected in range(1, 4):
        deadline = time.monotonic() + 5.0
        while len(here.probes) < expected and time.monotonic() < deadline:
            time.sleep(0.002)
        [*_, probe] = here.probes
        probe.marked.set()
        assert here.becomes("a", True), "it is stopped while that is seen"
        probe.finish(0.004)
        while len(here.hand.drains().get(("a", "GPU-0"), ())) < expected and time.monotonic() < deadline:
            time.sleep(0.002)
    assert [d for _, d in here.hand.drains()["a", "GPU-0"]] == [0.004] * 3


def test_a_request_in_between_spoils_it(world):
    here = world()
    del here.hand._next_probe["GPU-0"]
    here.grant("a", mode="probe", hold_off_seconds=0.01)
    while not here.probes:
        time.sleep(0.002)
    here.senses.now_busy.add("web")
    deadline = time.monotonic() + 5.0
    while not here.probes[0].spoiled and time.monotonic() < deadline:
        time.sleep(0.002)
    assert here.probes[0].spoiled
    here.probes[0].finish(None)
    assert ("a", "GPU-0") not in here.hand.drains()


def test_a_probe_that_cannot_begin_keeps_no_job_stopped(world):
    def nothing(probe):
        raise RuntimeError("can't start new thread")

    here = world(measure=nothing)
    del here.hand._next_probe["GPU-0"]
    here.grant("a")
    time.sleep(0.3)
    assert here.becomes("a", False)


def test_a_job_that_ends_in_the_middle_of_a_probe_ends_nothing_else(world):
    here = world("/a", "/b")
    del here.hand._next_probe["GPU-0"]
    here.grant("a", "b", mode="probe", hold_off_seconds=0.01)
    while not here.probes:
        time.sleep(0.002)
    here.grant("b", mode="probe", hold_off_seconds=0.01)
    here.probes[0].finish(0.001)
    deadline = time.monotonic() + 5.0
    while ("b", "GPU-0") not in here.hand.drains() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert len(here.hand.drains()["b", "GPU-0"]) == 1


def test_it_leaves_nothing_stopped_at_its_end():
    here = World("/a")
    here.senses.now_busy.add("web")
    here.grant("a")
    assert here.becomes("a", True)
    here.hand.close()
    assert not here.frozen("a")
    assert "hand" not in {t.name for t in threading.enumerate() if t is here.hand._thread and t.is_alive()}
