"""Truth checks of the fake card: before any law is believed that was tried on it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocate.fakecard.card import MILLISECOND, SECOND, Card, CardSpec
from colocate.fakecard.process import Cpu, Launch, Process, Sync
from colocate.fakecard.workloads import Arrivals, Service, asynchronous, blocking, graphs, grower, trainer

PROGRAMS = {
    "steps": lambda: trainer(kernels=50),
    "a queue that is always full": asynchronous,
    "one kernel at a time": blocking,
    "graphs": lambda: graphs(50 * MILLISECOND),
}
WARM = CardSpec(cold=0.0)


def ms(nanoseconds: float) -> float:
    return nanoseconds / MILLISECOND


def alone(program: Any) -> float:
    card = Card(WARM)
    Process(card, 1, program)
    card.run_until(60 * SECOND)
    return card.clients[1].busy_ns


@pytest.mark.parametrize("clients", [2, 3, 7])
def test_busy_clients_share_a_card_equally_less_what_switching_costs(clients: int):
    """nos' table: three always-busy pods 3.3 x, seven 7.8 x."""
    card = Card(WARM)
    for pid in range(clients):
        Process(card, pid, asynchronous())
    card.run_until(60 * SECOND)
    shares = [c.busy_ns / card.now for c in card.clients.values()]
    slice_, switch = card.spec.slice_ns, card.spec.switch_ns
    assert shares == pytest.approx([slice_ / (slice_ + switch) / clients] * clients, rel=0.02)
    assert card.busy_ns == pytest.approx(sum(c.busy_ns for c in card.clients.values()))
    assert 1.0 <= 1.0 / (shares[0] * clients) <= 1.12


@pytest.mark.parametrize(("clients", "measured"), [(1, 1001.1), (2, 460.0), (3, 306.6)])
def test_kernels_a_second_are_as_on_an_h100(clients: int, measured: float):
    """benchmarks/results/gpu-real-card.jsonl, part `share`: kernels of a millisecond."""
    card = Card()
    for pid in range(clients):
        Process(card, pid, asynchronous())
    card.run_until(60 * SECOND)
    assert [c.ring().finished / 60 for c in card.clients.values()] == pytest.approx([measured] * clients, rel=0.01)


@pytest.mark.parametrize(
    ("share", "measured"), [(0.0, 1.0), (0.1, 1.076), (0.25, 1.165), (0.5, 1.388), (0.75, 1.722), (1.0, 2.128)]
)
def test_a_request_beside_a_share_of_batch_takes_as_long_as_on_an_h100(share: float, measured: float):
    """The same, part `dial`: requests of half a second, batch that waits for every kernel, a period of 200 ms."""
    card, latencies, period = Card(), list[int](), 200 * MILLISECOND

    def program():
        while True:
            began = card.now
            yield Launch(500, MILLISECOND)
            yield Sync()
            latencies.append(card.now - began)

    Process(card, 1, program())
    batch = Process(card, 2, blocking())
    for _ in range(300):
        if share > 0.0:
            batch.thaw()
            card.run_until(card.now + round(share * period))
        if share < 1.0:
            batch.freeze()
            card.run_until(card.now + round((1.0 - share) * period))
    median = sorted(latencies)[len(latencies) // 2]
    assert ms(median) / 500 == pytest.approx(measured, rel=0.07)


@settings(deadline=None)
@given(st.integers(1, 100), st.integers(20, 4000), st.integers(1, 3000), st.booleans())
def test_a_frozen_process_drains_exactly_what_it_has_launched(at_ms: int, kernel_us: int, kernels: int, sync: bool):
    def program():
        while True:
            yield Launch(kernels, kernel_us * 1000)
            if sync:
                yield Sync()

    card = Card(WARM)
    process = Process(card, 1, program())
    card.run_until(at_ms * MILLISECOND)
    process.freeze()
    ring = process.client.ring()
    queued, drain = ring.queued, ring.work
    assert ring.launched == ring.finished + queued
    assert queued <= card.spec.depth
    before = process.client.busy_ns
    card.run_until(card.now + round(drain) - 2)
    if drain > 4:
        assert ring.queued, "the last kernel has not ended before its time"
    card.run_until(card.now + 10 * SECOND)
    assert process.client.busy_ns - before == pytest.approx(drain, abs=4)
    assert not ring.queued
    launched = ring.launched
    process.thaw()
    card.run_until(card.now + 20 * MILLISECOND)
    assert ring.launched > launched, "it goes on"


def test_how_much_is_launched_when_a_process_is_frozen_is_known_to_the_launch():
    card = Card(WARM)
    process = Process(card, 1, trainer(kernels=300))
    card.run_until(1_234_567)  # 123 launches of 10 us, and the first kernel has run for as long
    process.freeze()
    assert process.client.ring().launched == 123
    card.run_until(SECOND)
    assert process.client.busy_ns == pytest.approx(123 * MILLISECOND)
    assert process.cpu_ns == pytest.approx(1_234_567, abs=1)


def test_a_process_whose_queue_is_full_has_a_full_queue_when_it_is_frozen():
    card = Card(WARM)
    process = Process(card, 1, asynchronous())
    card.run_until(3 * SECOND + 123_456)
    process.freeze()
    assert process.client.ring().queued == card.spec.depth
    assert ms(process.client.work) == pytest.approx(1022, abs=1)


actions = st.lists(
    st.tuples(st.sampled_from(["freeze", "thaw", "lock", "unlock", "suspend", "resume", "pass"]), st.integers(0, 300)),
    max_size=30,
)


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS.keys())
@settings(max_examples=40, deadline=None)
@given(actions=actions, sharing=st.sampled_from(["timeslice", "mps", "mig"]))
def test_nothing_launched_is_lost_or_run_twice(program: Any, actions: list[tuple[str, int]], sharing: Any):
    card = Card(WARM, sharing)
    process, other = Process(card, 1, program()), Process(card, 2, trainer(kernels=20))
    locked = 0
    for action, tens in actions:
        match action:
            case "freeze":
                process.freeze()
            case "thaw":
                process.thaw()
            case "lock":
                process.lock(lambda: None)
            case "unlock":
                card.unlock(process.client)
            case "suspend":
                card.suspend(process.client)
            case "resume":
                card.resume(process.client)
        card.run_until(card.now + tens * 10 * MILLISECOND + 7)
        for one in (process, other):
            ring = one.client.ring()
            assert ring.launched == ring.finished + sum(run.kernels for run in ring.runs)
            assert 0 <= ring.queued <= card.spec.depth
        if process.client.state == "locked":
            assert not process.client.work
            locked += 1
        assert process.cpu_ns <= card.now
        assert process.client.busy_ns <= card.now + 1
        assert card.busy_ns <= card.now + 1
    process.thaw()
    card.unlock(process.client)
    card.resume(process.client)
    card.run_until(card.now + 2 * MILLISECOND)
    before = process.client.ring().finished
    card.run_until(card.now + 10 * SECOND)
    assert process.client.ring().finished > before, "whatever was done is undone"


def test_a_lock_returns_when_the_last_launch_has_finished_and_the_cpu_goes_on():
    ticks: list[int] = []

    def program():
        yield Launch(100, MILLISECOND)
        while True:
            yield Cpu(10 * MILLISECOND)
            ticks.append(card.now)

    card, done = Card(WARM), []
    process = Process(card, 1, program())
    card.run_until(20 * MILLISECOND)
    process.lock(lambda: done.append(card.now))
    card.run_until(SECOND)
    assert process.client.state == "locked"
    assert [ms(at) for at in done] == pytest.approx([100.0])
    assert all(b - a == 10 * MILLISECOND for a, b in pairwise(ticks))
    assert len(ticks) == 99


def test_a_frozen_process_never_answers_a_lock_until_it_is_thawed():
    """cuda-checkpoint hangs on a frozen task (criu#2458 and others)."""
    card, done = Card(WARM), []
    process = Process(card, 1, trainer())
    card.run_until(SECOND)
    process.freeze()
    process.lock(lambda: done.append(card.now))
    card.run_until(60 * SECOND)
    assert not done
    process.thaw()
    card.run_until(61 * SECOND)
    assert done


def test_a_checkpoint_moves_memory_to_the_host_at_its_bandwidth_and_back():
    card, done = Card(), []
    process = Process(card, 1, grower(10 << 30, SECOND))
    card.run_until(SECOND // 2)
    client = process.client
    assert client.memory == 10 << 30
    process.lock(lambda: card.checkpoint(client, lambda: done.append(card.now)))
    began = card.now
    card.run_until(began + 10 * SECOND)
    assert (done[0] - began) / SECOND == pytest.approx((10 << 30) / 20e9, rel=0.01)
    assert (client.state, client.memory, client.on_host) == ("checkpointed", 0, 10 << 30)
    assert card.memory_free == card.spec.memory_bytes
    assert card.restore(client, lambda: None)
    card.run_until(card.now + 10 * SECOND)
    assert (client.state, client.memory) == ("locked", 10 << 30)


def test_under_mps_kernels_run_together_and_slow_each_other():
    card = Card(WARM, "mps", {("a", "b"): 1.25})
    for pid, (kind, share) in enumerate((("a", 0.6), ("b", 0.9))):
        Process(card, pid, asynchronous(), kind=kind, share=share)
    card.run_until(60 * SECOND)
    finished = [c.ring().finished * MILLISECOND / card.now for c in card.clients.values()]
    assert finished == pytest.approx([1 / 1.5 / 1.25, 1 / 1.5], rel=0.01)
    assert [c.busy_ns for c in card.clients.values()] == [card.now] * 2


def test_under_mps_a_fault_of_one_is_a_fault_of_all_and_by_slices_it_is_his_own():
    for sharing, met in (("mps", 2), ("timeslice", 1)):
        card = Card(WARM, sharing)  # type: ignore[arg-type]
        processes = [Process(card, pid, trainer()) for pid in (1, 2)]
        card.run_until(SECOND)
        assert len(card.fault(processes[0].client)) == met
        card.run_until(2 * SECOND)
        assert sum(not p.ended for p in processes) == 2 - met


def test_mig_instances_do_not_meet():
    card = Card(WARM, "mig")
    for pid in (1, 2, 3):
        Process(card, pid, trainer())
    card.run_until(60 * SECOND)
    assert [c.busy_ns for c in card.clients.values()] == [alone(trainer())] * 3


def test_memory_ends_at_the_card_and_at_the_limit_of_a_group():
    card = Card()
    card.limits["/batch"] = 4 << 30
    first, second = (card.open(pid, group="/batch") for pid in (1, 2))
    service = card.open(3, group="/service")
    assert card.allocate(first, 3 << 30)
    assert not card.allocate(second, 2 << 30), "the group's limit"
    assert card.allocate(service, 20 << 30)
    assert not card.allocate(second, 2 << 30)
    card.close(first)
    assert card.allocate(second, 4 << 30)
    assert not card.allocate(service, 1), "the card is full"


def test_suspended_queues_stop_in_the_middle_of_a_kernel_and_go_on_from_there():
    card = Card(WARM)
    process = Process(card, 1, graphs(500 * MILLISECOND))
    card.run_until(100 * MILLISECOND)
    card.suspend(process.client)
    card.run_until(SECOND)
    assert ms(process.client.busy_ns) == pytest.approx(101)
    assert ms(process.client.work) == pytest.approx(399, abs=0.1)
    card.resume(process.client)
    card.run_until(SECOND + 400 * MILLISECOND)
    assert ms(process.client.busy_ns) >= 499


def test_the_same_seed_is_the_same_life():
    def life() -> tuple[Any, ...]:
        card, latencies = Card(), list[int]()
        service = Service(card, Arrivals(card, 20.0, seed=7), latencies.append)
        Process(card, 1, service.vision())
        Process(card, 2, trainer())
        card.run_until(30 * SECOND)
        return latencies, [c.busy_ns for c in card.clients.values()]

    assert life() == life()


@pytest.mark.parametrize(
    ("kind", "cap", "expected"),
    [
        pytest.param("bert", 300, 1.0, id="no cap"),
        pytest.param("bert", 210, 1.135, id="a point of the sweep"),
        pytest.param("bert", 195, (1.317 + 1.135) / 2, id="between two"),
        pytest.param("bert", 100, 2.134, id="below the sweep nothing gets slower any more"),
        pytest.param("ncf", 150, 1.016, id="a job that hardly feels it"),
    ],
)
def test_work_takes_longer_under_a_cap_as_it_was_measured(kind: str, cap: float, expected: float):
    card = Card(WARM)
    Process(card, 1, asynchronous(), kind=kind)
    assert card.limit(cap)
    card.run_until(20 * SECOND)
    assert 20_000 / card.clients[1].ring().finished == pytest.approx(expected, rel=0.001)


def test_a_limit_that_its_driver_does_not_take_changes_nothing():
    card = Card()
    assert [card.limit(99.9), card.limit(300.1), card.limit_watts] == [False, False, 300.0]


@given(
    caps=st.lists(st.integers(100, 300), min_size=1, max_size=6),
    programs=st.lists(st.sampled_from(sorted(PROGRAMS)), min_size=0, max_size=3),
)
@settings(deadline=None, max_examples=30)
def test_energy_is_power_over_time_and_between_idle_and_the_cap_or_the_floor(caps: list[int], programs: list[str]):
    card, drawn = Card(), 0.0
    for pid, name in enumerate(programs):
        Process(card, pid, PROGRAMS[name]())
    for cap in caps:
        card.limit(cap)
        before, busy = card.energy_joules, card.busy_ns
        card.run_until(card.now + SECOND)
        used, worked = card.energy_joules - before, (card.busy_ns - busy) / SECOND
        spec = card.spec.power
        most = min(spec.natural, max(cap, spec.floor))
        assert used == pytest.approx(spec.idle * (1 - worked) + most * worked, rel=1e-6)
        drawn += used
    assert drawn == pytest.approx(card.energy_joules)
