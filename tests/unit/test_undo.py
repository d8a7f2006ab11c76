"""The undo on the kernel model: a SIGKILL at every write index, and what the journal survives."""

import asyncio
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocate.actuate.journal import Entry, Journal, compacted, newest_found, read_entries
from colocate.actuate.restore import restore, thaw_below
from colocate.actuate.statedir import Lock, StateDirectory
from colocate.actuate.writer import Drift
from colocate.agent.lately import Lately
from colocate.agent.loop import Agent
from colocate.agent.registry import Job, Registry
from colocate.calibration import Calibration
from colocate.cgroup.knobfiles import read_knob, write_knob
from colocate.cgroup.layout import UNIFIED
from colocate.cgroup.port import CgroupGone
from colocate.cgroup.tree import inodes_of
from colocate.decide.law import act
from colocate.errors import AlreadyRunning, JournalBroken, StateTooNew
from colocate.kernelmodel import ModelKernel
from colocate.kernelmodel.actors import KubeletActor
from colocate.model import reference
from colocate.observe.pods import Pod
from colocate.plan import Action, CgroupTarget, Outcome, Plan
from colocate.policy.schema import BatchPolicy, ColocationPolicy, FreezePolicy, PolicySpec, Selector, ServicePolicy
from colocate.snapshot import Latency, Objective
from tests import make

GIB = 1 << 30


KNOB_FILES = (
    *("cpu.weight", "cpu.shares", "cpu.idle", "cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us", "cpuset.cpus"),
    *("memory.max", "memory.high", "memory.limit_in_bytes", "cgroup.freeze", "freezer.state"),
    "cgroup.subtree_control",
)


class Killed(BaseException):
    """The SIGKILL."""


def knobs(kernel):
    """Every file of every cgroup that is not ours: its exact text."""
    found = {}

    def walk(hierarchy, path):
        for file in KNOB_FILES:
            text = kernel.read(hierarchy, path, file)
            if text is not None:
                found[hierarchy, path, file] = text
        for child in kernel.children(hierarchy, path):
            if not child.startswith(("batch", "colocate")):
                walk(hierarchy, f"{path.rstrip('/')}/{child}")

    for hierarchy in kernel.layout.mounts:
        walk(hierarchy, "/")
    return found


def make_node(version, kubernetes):
    kernel = ModelKernel(version=version, memory_bytes=GIB)
    paths = ["/web", "/nightly"]
    if kubernetes:
        paths += ["/kubepods", "/kubepods/besteffort", "/kubepods/burstable"]
    for hierarchy in kernel.layout.mounts:
        for path in paths:
            kernel.mkdir(hierarchy, path)
            if hierarchy == "cpuset":
                kernel.write("cpuset", path, "cpuset.cpus", "0-1")
                kernel.write("cpuset", path, "cpuset.mems", "0")
    if version == 2:
        kernel.write(UNIFIED, "/", "cgroup.subtree_control", "+cpu +memory")
        kernel.write(UNIFIED, "/nightly", "cpu.weight", "37")
        kernel.write(UNIFIED, "/nightly", "cpu.max", "150000 100000")
    else:
        kernel.write("cpu", "/nightly", "cpu.shares", "777")
        kernel.write("cpu", "/nightly", "cpu.cfs_quota_us", "150000")
    kernel.spawn("queue", "/web", command="web")
    kernel.spawn("hog", "/nightly", command="nightly")
    if kubernetes:
        kernel.actors.append(KubeletActor(kernel, "/kubepods"))
    return kernel


def make_agent(kernel, directory, calibration):
    spec = PolicySpec(
        tick=1.0,
        services=(ServicePolicy(name="web", selector=Selector(cgroup="/web")),),
        batch=(BatchPolicy(name="nightly", selector=Selector(cgroup="/nightly")),),
        freeze=FreezePolicy(max_frozen=3.0),
    )
    agent = Agent(
        kernel,
        ColocationPolicy(spec=spec),
        reference,
        Journal(directory, "boot"),
        calibration=calibration,
        clock=kernel,
    )
    agent.observer.objectives["web"] = Objective(0.02, 10, 3.0)
    return agent


async def settled(agent):
    """One tick, and what workers do beside it."""
    tick = await agent.tick()
    await agent.writer.settle()
    return tick


async def live(kernel, agent, ticks=16):
    """A life with a violation, a trial of every rung, a job, and an end in order."""
    agent.open()
    placement = agent.tier.ensure_job("train")
    task = kernel.spawn("hog", command="train")
    agent.tier.move(task.pid, placement)
    good = bad = 0.0
    for i in range(ticks):
        bad += 100.0 if i == 2 or i % 5 == 4 else 0.0
        good += 200.0
        agent.scraper.readings["web"] = Latency((0.01, 0.05), (good, good + bad, good + bad), kernel.monotonic())
        await agent.tick()
        await agent.writer.settle()  # what workers do beside the loop belongs to this life too
        kernel.advance(1.0) if i % 4 == 0 else setattr(kernel.machine, "now", kernel.machine.now + 1.0)
    kernel.kill(task.pid, 9)
    await agent.close()


SCENARIOS = [
    pytest.param(2, False, Calibration(rungs=("freeze", "cpuset", "quota")), id="v2 plain host"),
    pytest.param(1, False, Calibration(rungs=("cpuset", "freeze", "quota")), id="v1 plain host"),
    pytest.param(
        2, True, Calibration(lever="idle", rungs=("cpuset", "freeze")), id="v2 Kubernetes with the idle class"
    ),
    pytest.param(1, True, Calibration(lever="idle", rungs=("freeze",)), id="v1 Kubernetes with the idle class"),
]


@pytest.mark.parametrize(("version", "kubernetes", "calibration"), SCENARIOS)
def test_an_end_in_order_leaves_every_knob_as_it_was_found(version, kubernetes, calibration, tmp_path):
    kernel = make_node(version, kubernetes)
    before = knobs(kernel)
    asyncio.run(live(kernel, make_agent(kernel, tmp_path, calibration)))
    assert knobs(kernel) == before
    assert kernel.writes > 20
    assert not any("batch" in name for h in kernel.layout.mounts for name in kernel.children(h, "/"))


@pytest.mark.parametrize(("version", "kubernetes", "calibration"), SCENARIOS)
def test_a_sigkill_at_every_write_index_is_undone_by_the_next_start(version, kubernetes, calibration, tmp_path):
    dry = make_node(version, kubernetes)
    (tmp_path / "dry").mkdir()
    start = dry.writes
    asyncio.run(live(dry, make_agent(dry, tmp_path / "dry", calibration)))
    indices = range(start + 1, dry.writes + 1)
    assert len(indices) > 20
    for index in indices:
        kernel = make_node(version, kubernetes)
        before = knobs(kernel)

        def kill_here(number, *_, at=index):
            if number == at:
                raise Killed

        kernel.hook = kill_here
        directory = tmp_path / str(index)
        directory.mkdir()
        with pytest.raises(Killed):
            asyncio.run(live(kernel, make_agent(kernel, directory, calibration)))
        kernel.hook = lambda *_: None
        for task in [t for t in kernel.machine.tasks.values() if t.command == "train"]:
            kernel.kill(task.pid, 9)
        restore(kernel, Journal(directory, "boot"))
        assert knobs(kernel) == before, f"killed at write {index}"
        assert not any(kernel.frozen(t) for t in kernel.machine.tasks.values())


def test_an_occupied_tier_stays_at_the_least_weight_without_limits_and_thawed(tmp_path):
    kernel = make_node(2, False)
    agent = make_agent(kernel, tmp_path, Calibration())
    agent.open()
    placement = agent.tier.ensure_job("train")
    task = kernel.spawn("hog", command="train")
    agent.tier.move(task.pid, placement)
    kernel.write(UNIFIED, "/colocate-batch", "cpu.max", "1000 100000")
    kernel.write(UNIFIED, placement.path, "cgroup.freeze", "1")
    report = restore(kernel, agent.journal)
    assert not report.clean
    assert kernel.read(UNIFIED, "/colocate-batch", "cpu.weight") == "1\n"
    assert kernel.read(UNIFIED, "/colocate-batch", "cpu.max") == "max 100000\n"
    assert not kernel.frozen(task)
    kernel.kill(task.pid, 9)
    assert restore(kernel, agent.journal).clean
    assert list(kernel.children(UNIFIED, "/")) == ["nightly", "web"]


def test_what_somebody_else_wrote_since_is_left_to_them(tmp_path):
    kernel = make_node(2, False)
    agent = make_agent(kernel, tmp_path, Calibration())
    agent.open()
    asyncio.run(settled(agent))
    assert kernel.read(UNIFIED, "/nightly", "cpu.weight") == "1\n"
    kernel.write(UNIFIED, "/nightly", "cpu.weight", "55")
    report = asyncio.run(agent.close())
    assert kernel.read(UNIFIED, "/nightly", "cpu.weight") == "55\n"
    assert len(report.left_to_others) == 1


def test_what_was_asserted_again_over_an_administrator_goes_back_to_the_administrators_value(tmp_path):
    kernel = make_node(2, False)
    agent = make_agent(kernel, tmp_path, Calibration())
    agent.open()
    asyncio.run(settled(agent))
    kernel.write(UNIFIED, "/nightly", "cpu.weight", "55")
    kernel.machine.now += 1
    asyncio.run(settled(agent))
    assert kernel.read(UNIFIED, "/nightly", "cpu.weight") == "1\n"
    asyncio.run(agent.close())
    assert kernel.read(UNIFIED, "/nightly", "cpu.weight") == "55\n"


def test_drift_is_noticed_and_asserted_again_or_yielded(tmp_path):
    async def drifted(policy, directory):
        directory.mkdir()
        kernel = make_node(2, False)
        agent = make_agent(kernel, directory, Calibration())
        agent.set_policy(ColocationPolicy(spec=PolicySpec(batch=agent.policy.spec.batch, drift=policy)))
        agent.open()
        await agent.tick()
        await agent.writer.settle()
        kernel.write(UNIFIED, "/nightly", "cpu.weight", "55")
        kernel.machine.now += 1
        tick = await agent.tick()
        await agent.writer.settle()
        return kernel.read(UNIFIED, "/nightly", "cpu.weight"), tick.drifts

    again, drifts = asyncio.run(drifted("reassert", tmp_path / "a"))
    assert again == "1\n"
    assert [(d.knob, d.ours, d.found) for d in drifts] == [("cpu.weight", "1", "55")]
    assert asyncio.run(drifted("yield", tmp_path / "b"))[0] == "55\n"


def test_without_a_journal_only_our_own_directories_are_touched(tmp_path):
    kernel = make_node(2, False)
    agent = make_agent(kernel, tmp_path, Calibration())

    def refuse(*_):
        raise JournalBroken("no space")

    agent.journal.add = refuse
    kernel.write(UNIFIED, "/", "cgroup.subtree_control", "+cpuset +io +pids")
    agent.open()

    async def ticks():
        await agent.tick()
        await agent.writer.settle()
        kernel.machine.now += 1
        return (await agent.tick()).outcomes

    outcomes = asyncio.run(ticks())
    assert kernel.read(UNIFIED, "/nightly", "cpu.weight") == "37\n"
    assert kernel.read(UNIFIED, "/colocate-batch", "cpu.weight") == "1\n"
    assert "skipped" in {o.status for o in outcomes}


def test_shadow_writes_nothing(tmp_path):
    kernel = make_node(2, False)
    agent = make_agent(kernel, tmp_path, Calibration())
    agent.shadow = agent.writer._shadow = True
    before, writes = knobs(kernel), kernel.writes
    agent.open()
    tick = asyncio.run(settled(agent))
    asyncio.run(agent.close())
    assert kernel.writes == writes
    assert knobs(kernel) == before
    assert {o.status for o in tick.outcomes} == {"shadow"}


def test_a_cgroup_that_leaves_the_policy_gets_its_values_back_at_once(tmp_path):
    kernel = make_node(2, False)
    before = knobs(kernel)
    agent = make_agent(kernel, tmp_path, Calibration())
    agent.open()
    asyncio.run(settled(agent))
    assert kernel.read(UNIFIED, "/nightly", "cpu.weight") == "1\n"
    agent.set_policy(ColocationPolicy(spec=PolicySpec(services=agent.policy.spec.services)))
    kernel.machine.now += 1
    asyncio.run(settled(agent))
    found = knobs(kernel)
    assert {k: v for k, v in found.items() if k[1] == "/nightly" and k in before} == {
        k: v for k, v in before.items() if k[1] == "/nightly"
    }


V1 = "freezer.state"


def frozen_in_both():
    kernel = ModelKernel(version=1)
    for hierarchy in kernel.layout.mounts:
        kernel.mkdir(hierarchy, "/train")
    kernel.write("freezer", "/train", V1, "FROZEN")
    kernel.write(UNIFIED, "/train", "cgroup.freeze", "1")
    return kernel, inodes_of(kernel, "/train")


def test_frozen_is_what_is_frozen_in_either_freezer():
    """Docker pauses with that of v1; and we freeze there what is not in the unified hierarchy yet."""
    kernel, inodes = frozen_in_both()
    kernel.write(UNIFIED, "/train", "cgroup.freeze", "0")
    assert read_knob(kernel, "/train", "cgroup.freeze", inodes) == "1"
    kernel.write("freezer", "/train", V1, "THAWED")
    assert read_knob(kernel, "/train", "cgroup.freeze", inodes) == "0"


def test_one_thaw_undoes_one_freeze_ours_first():
    kernel, inodes = frozen_in_both()
    assert write_knob(kernel, "/train", "cgroup.freeze", "0", inodes)
    assert (kernel.read(UNIFIED, "/train", "cgroup.freeze") or "").strip() == "0"
    assert read_knob(kernel, "/train", "cgroup.freeze", inodes) == "1", "the other one is Docker's"
    assert write_knob(kernel, "/train", "cgroup.freeze", "0", inodes)
    assert read_knob(kernel, "/train", "cgroup.freeze", inodes) == "0"


def test_a_directory_of_ours_is_thawed_in_both_freezers_at_the_end():
    kernel, inodes = frozen_in_both()
    thaw_below(kernel, "/train")
    assert read_knob(kernel, "/train", "cgroup.freeze", inodes) == "0"


def test_a_knob_of_no_hierarchy_is_not_said_to_be_written():
    kernel, _ = frozen_in_both()
    assert not write_knob(kernel, "/train", "cgroup.freeze", "1", {})


def test_the_undo_never_freezes(tmp_path):
    kernel = make_node(2, False)
    kernel.write(UNIFIED, "/nightly", "cgroup.freeze", "1")  # paused by its owner before us
    journal = Journal(tmp_path, "boot")
    inode = kernel.inode(UNIFIED, "/nightly")
    found = {"hierarchy": UNIFIED, "path": "/nightly", "inode": inode, "file": "cgroup.freeze"}
    journal.add(Entry(kind="value", boot_id="boot", found="1", wanted="0", **found))
    kernel.write(UNIFIED, "/nightly", "cgroup.freeze", "0")  # and resumed
    assert restore(kernel, journal).clean
    assert kernel.read(UNIFIED, "/nightly", "cgroup.freeze") == "0\n"


def test_a_full_disk_does_not_keep_the_undo_from_its_end(tmp_path, monkeypatch):
    kernel = make_node(2, False)
    before = knobs(kernel)
    agent = make_agent(kernel, tmp_path, Calibration())
    agent.open()
    asyncio.run(settled(agent))

    def full(*_arguments):
        raise OSError(28, "No space left on device")

    successor = make_agent(kernel, tmp_path, Calibration())
    monkeypatch.setattr("os.posix_fallocate", full)
    assert restore(kernel, successor.journal).clean
    assert knobs(kernel) == before


def test_a_handover_thaws_for_nobody_may_come(tmp_path):
    kernel = make_node(2, False)
    agent = make_agent(kernel, tmp_path, Calibration())
    agent.open()
    placement = agent.tier.ensure_job("train")
    agent.tier.move(kernel.spawn("hog").pid, placement)
    agent.recorder.arm = "off-frozen"
    asyncio.run(settled(agent))
    frozen = ("/nightly", placement.path)
    assert [kernel.read(UNIFIED, path, "cgroup.freeze") for path in frozen] == ["1\n", "1\n"]
    asyncio.run(agent.close(handover=True))
    assert [kernel.read(UNIFIED, path, "cgroup.freeze") for path in frozen] == ["0\n", "0\n"]
    assert kernel.read(UNIFIED, "/nightly", "cpu.weight") == "1\n", "the rest is the successor's"


def test_a_pid_that_was_given_away_is_not_moved(tmp_path):
    kernel = make_node(2, False)
    agent = make_agent(kernel, tmp_path, Calibration())
    agent.open()
    placement = agent.tier.ensure_job("train")
    stranger = kernel.spawn("hog", "/web")
    with pytest.raises(CgroupGone):
        agent.tier.move(stranger.pid, placement, expected_start=1)
    assert stranger.where[UNIFIED] == "/web"


def test_a_handover_of_another_boot_is_ignored(tmp_path):
    kernel = make_node(2, False)
    state = StateDirectory(tmp_path)
    state.save("handover.json", {"boot_id": "another", "laws": {"cpu": {"mode": "floor", "hold_until": 1e9}}})
    agent = make_agent(kernel, tmp_path, Calibration())
    agent.state = state
    agent.open()
    assert agent.laws.cpu.mode == "open"


def test_a_handover_leaves_the_grants_and_the_laws_memory_to_the_successor(tmp_path):
    async def first():
        agent = make_agent(kernel, tmp_path, Calibration())
        agent.state = StateDirectory(tmp_path)
        agent.open()
        for i in range(3):
            agent.scraper.readings["web"] = Latency((0.01, 0.05), (0.0, 900.0 * i, 900.0 * i), kernel.monotonic())
            await agent.tick()
            kernel.advance(1.0)
        await agent.close(handover=True)
        return agent.laws

    kernel = make_node(2, False)
    laws = asyncio.run(first())
    assert laws.cpu.mode == "asking, at the floor"
    assert kernel.read(UNIFIED, "/colocate-batch", "cpu.max") != "max 100000\n"
    successor = make_agent(kernel, tmp_path, Calibration())
    successor.state = StateDirectory(tmp_path)
    successor.open()
    assert successor.laws == laws
    assert kernel.read(UNIFIED, "/colocate-batch", "cpu.max") != "max 100000\n"
    asyncio.run(successor.close())
    assert list(kernel.children(UNIFIED, "/")) == ["nightly", "web"]


def test_waking_early_does_not_put_off_the_next_ticks(tmp_path):
    kernel = make_node(2, False)
    agent = make_agent(kernel, tmp_path, Calibration())
    agent.policy = agent.observer.policy = ColocationPolicy(spec=PolicySpec(tick=0.2))
    agent.clock = time
    ticks = []
    agent.on_tick.append(lambda _: ticks.append(time.monotonic()))

    async def live_shortly():
        agent.open()
        stop = asyncio.Event()
        running = asyncio.create_task(agent.run(stop))
        for _ in range(20):
            agent.wake("test")
            await asyncio.sleep(0.01)
        woken = len(ticks)
        await asyncio.sleep(0.7)
        stop.set()
        await running
        await agent.close()
        return len(ticks) - woken

    assert asyncio.run(live_shortly()) >= 2


# -- the journal itself -------------------------------------------------------------------------------------------


def entry(i=0):
    return Entry(kind="value", boot_id="boot", hierarchy="cpu", path=f"/x{i}", inode=i, file="cpu.shares", found="1024")


def test_a_journal_reads_back_what_was_added(tmp_path):
    journal = Journal(tmp_path, "boot")
    for i in range(50):
        journal.add(entry(i))
    assert Journal(tmp_path, "boot").entries == [entry(i) for i in range(50)]


@settings(deadline=None, max_examples=40)
@given(cut=st.integers(1, 400), noise=st.binary(max_size=30))
def test_a_torn_end_loses_only_the_entries_that_were_torn(tmp_path_factory, cut, noise):
    directory = tmp_path_factory.mktemp("journal")
    journal = Journal(directory, "boot")
    for i in range(5):
        journal.add(entry(i))
    _, size = read_entries(journal.path)
    whole = journal.path.read_bytes()[:size]
    journal.path.write_bytes(whole[: max(size - cut, 0)] + noise.replace(b"\n", b""))
    entries, _ = read_entries(journal.path)
    assert entries == [entry(i) for i in range(5)][: len(entries)]
    assert len(entries) >= 5 - 1 - cut // 100


def test_entries_of_another_boot_are_dropped(tmp_path):
    Journal(tmp_path, "boot").add(entry())
    assert Journal(tmp_path, "another boot").entries == []


def test_a_journal_of_a_newer_version_is_refused(tmp_path):
    import msgspec

    Journal(tmp_path, "boot").add(msgspec.structs.replace(entry(), version=99))
    with pytest.raises(StateTooNew, match="newer"):
        Journal(tmp_path, "boot")


def test_a_journal_that_cannot_be_written_says_so(tmp_path):
    journal = Journal(tmp_path / "missing", "boot")
    with pytest.raises(JournalBroken, match="cannot be written"):
        journal.add(entry())
    assert journal.broken


def test_a_half_written_state_file_is_set_aside(tmp_path):
    state = StateDirectory(tmp_path)
    (tmp_path / "model.json").write_text('{"version": 1, "ids": [')
    assert state.load("model.json") is None
    assert (tmp_path / "model.broken").exists()


def test_state_of_a_newer_version_is_refused_by_name(tmp_path):
    (tmp_path / "jobs.json").write_text('{"stateVersion": 99}')
    with pytest.raises(StateTooNew, match=r"jobs\.json"):
        StateDirectory(tmp_path).load("jobs.json")


def test_a_second_agent_is_refused_with_the_pid_of_the_first(tmp_path):
    import os

    lock = Lock(tmp_path, "/")
    with pytest.raises(AlreadyRunning, match=str(os.getpid())):
        Lock(tmp_path, "/")
    lock.release()
    Lock(tmp_path, "/").release()


def written(file, found, wanted):
    return Entry(
        kind="value", boot_id="boot", hierarchy=UNIFIED, path="/x", inode=7, file=file, found=found, wanted=wanted
    )


@given(
    st.lists(
        st.tuples(st.sampled_from(["cpu.weight", "cpu.max"]), st.sampled_from("abc"), st.sampled_from("1234567")),
        max_size=60,
    )
)
def test_compacting_a_journal_changes_neither_what_goes_back_nor_what_we_wrote_last(steps):
    entries: list[Entry] = []
    now: dict[str, str] = {}
    for file, foreign, wanted in steps:
        # Every third time somebody else has written since.
        found = foreign if len(entries) % 3 == 0 else now.get(file, foreign)
        entries.append(written(file, found, wanted))
        now[file] = wanted
    fewer = compacted(entries)
    before, after = newest_found(entries), newest_found(fewer)
    assert {k: e.found for k, e in after[0].items()} == {k: e.found for k, e in before[0].items()}
    assert all(now[key[3]] in wanted for key, wanted in after[1].items())
    assert len(fewer) <= 2 * 4


def test_a_journal_of_a_long_day_stays_small(tmp_path):
    journal = Journal(tmp_path, "boot")
    for i in range(2500):
        journal.add(written("cpu.max", str(i), str(i + 1)))
    assert len(journal.entries) < 1100
    assert newest_found(journal.entries)[0]["unified", "/x", 7, "cpu.max"].found == "0"
    journal.close()
    assert len(Journal(tmp_path, "boot").entries) == len(journal.entries)


@pytest.mark.parametrize("version", [1, 2])
def test_with_the_idle_class_a_job_can_start_and_a_successor_can_take_over(version, tmp_path):
    """While cpu.idle is 1 the kernel refuses a weight."""

    async def life():
        kernel = make_node(version, False)
        first = make_agent(kernel, tmp_path, Calibration(lever="idle"))
        first.open()
        for _ in range(2):
            await settled(first)
            kernel.machine.now += 1
        hierarchy = UNIFIED if version == 2 else "cpu"
        assert kernel.read(hierarchy, "/colocate-batch", "cpu.idle") == "1\n"
        assert first.tier.ensure_job("train").path == "/colocate-batch/train"
        await first.close(handover=True)
        successor = make_agent(kernel, tmp_path, Calibration(lever="idle"))
        successor.state = None
        assert successor.tier.ensure_tier().path == "/colocate-batch"
        await successor.close()

    asyncio.run(life())


def test_batch_in_place_keeps_its_owners_quota_and_idle_class(tmp_path):
    kernel = make_node(2, False)
    kernel.write(UNIFIED, "/nightly", "cpu.max", "50000 100000")
    kernel.write(UNIFIED, "/nightly", "cpu.idle", "1")
    agent = make_agent(kernel, tmp_path, Calibration())
    agent.open()

    async def ticks():
        for _ in range(3):
            await settled(agent)
            kernel.advance(0.5)
            assert kernel.read(UNIFIED, "/nightly", "cpu.max") == "50000 100000\n"
            assert kernel.read(UNIFIED, "/nightly", "cpu.idle") == "1\n"
        await agent.close()

    asyncio.run(ticks())


def test_what_an_owner_gives_less_later_is_respected(tmp_path):
    kernel = make_node(2, False)
    agent = make_agent(kernel, tmp_path, Calibration())
    agent.open()

    async def ticks():
        await settled(agent)
        kernel.write(UNIFIED, "/nightly", "cpu.max", "30000 100000")
        for _ in range(3):
            kernel.machine.now += 1
            await settled(agent)
        assert kernel.read(UNIFIED, "/nightly", "cpu.max") == "30000 100000\n"
        await agent.close()
        assert kernel.read(UNIFIED, "/nightly", "cpu.max") == "30000 100000\n"

    asyncio.run(ticks())


def test_a_slow_write_of_ours_is_no_drift_and_keeps_no_tick_waiting(tmp_path):
    """memory.high takes its value first and reclaims then."""
    kernel = make_node(2, False)
    agent = make_agent(kernel, tmp_path, Calibration())
    agent.open()
    plain = kernel.write

    def slow(hierarchy, path, file, value, inode=None):
        plain(hierarchy, path, file, value, inode)
        if file == "memory.high":
            time.sleep(0.4)

    async def ticks():
        await settled(agent)
        kernel.write = slow
        kernel.machine.memory_bytes //= 2
        agent.observer._tree_at = float("-inf")
        drifts = []
        for _ in range(6):
            kernel.machine.now += 0.05
            started = time.perf_counter()
            drifts += (await agent.tick()).drifts
            assert time.perf_counter() - started < 0.3
            await asyncio.sleep(0.02)
        await agent.writer.settle()
        outcomes = (await agent.tick()).outcomes
        assert drifts == []
        assert agent.writer._yielded == {}
        assert [o.status for o in outcomes if o.knob == "memory.high"] == ["applied"]
        await agent.close()

    asyncio.run(ticks())


def test_a_checkpoint_signal_goes_to_those_who_handle_it(tmp_path):
    kernel = make_node(2, False)
    agent = make_agent(kernel, tmp_path, Calibration())
    agent.open()
    placement = agent.tier.ensure_job("train")
    saved = []
    shell, trainer, helper = (kernel.spawn("sleep", command=c) for c in ("sh", "trainer", "loader"))
    trainer.handlers[10] = lambda: saved.append("state")
    for task in (shell, trainer, helper):
        agent.tier.move(task.pid, placement)

    async def signalled(name):
        tick = await settled(agent)
        job = tick.snapshot.workloads["job:train"]
        return agent.writer._signal(act("memory", job, "signal", name, "CheckpointSignal", "because"), job)

    assert asyncio.run(signalled("SIGUSR1")).found == "1"
    assert saved == ["state"]
    assert {shell.pid, trainer.pid, helper.pid} <= set(kernel.machine.tasks), "nobody died of it"
    refused = asyncio.run(signalled("SIGUSR2"))
    assert (refused.status, refused.error) == ("skipped", "no process of train handles SIGUSR2")
    assert {shell.pid, trainer.pid, helper.pid} <= set(kernel.machine.tasks)


def test_a_journal_whose_file_is_gone_is_written_anew(tmp_path):
    journal = Journal(tmp_path, "boot")
    journal.add(written("cpu.weight", "37", "1"))
    assert not journal.astray()
    journal.path.unlink()
    assert journal.astray()
    journal.rewrite()
    assert not journal.astray()
    assert [e.found for e in Journal(tmp_path, "boot").entries] == ["37"]


def told(job, status, reason="CheckpointSignal"):
    return Outcome(workload=f"job:{job}", knob="signal", value="SIGUSR1", status=status, reason=reason)


@pytest.mark.parametrize(
    ("acknowledges", "status", "saved"),
    [
        pytest.param(False, "applied", 200.0, id="delivered to a job that never answers: it has to do"),
        pytest.param(False, "skipped", None, id="no process handles it: nothing is saved"),
        pytest.param(True, "applied", None, id="a job that answers is believed when it does"),
    ],
)
def test_a_checkpoint_signal_that_was_sent_is_not_yet_a_checkpoint(acknowledges, status, saved):
    registry = Registry(None)
    registry.add(Job(name="a", path="/a", uid=0, pid=1, start_time=1, started_seconds=1.0, acknowledges=acknowledges))
    now = make.snapshot(make.job("a", cpu_usage_us=7), at=200.0)
    registry.delivered([told("a", status)], now)
    assert registry.jobs["a"].checkpointed_seconds == saved
    registry.checkpointed(registry.jobs["a"], 201.0, now.workloads["job:a"])
    registry.delivered([told("a", "applied")], now)
    assert (registry.jobs["a"].checkpointed_seconds, registry.jobs["a"].checkpointed_cpu_us) == (201.0, 7)


def test_what_was_done_of_late_can_be_asked_for_afterwards():
    lately, job = Lately(), make.job("a")
    why = "a service stalls"
    sent = Action(
        workload="job:a", target=CgroupTarget("/a"), knob="signal", value="SIGTERM", reason="MemoryPressure",
        message=why, law="eviction",
    )  # fmt: skip
    now = make.snapshot(job, at=200.0)
    outcome = Outcome(workload="job:a", knob="signal", value="SIGTERM", status="applied", reason="MemoryPressure")
    held = Outcome(workload="tier", knob="cpu.max", value="max", status="applied", reason="NothingSuffers")
    for _ in range(3):
        lately.add(now, Plan(sequence=1, actions=(sent,)), [outcome, held], [])
    lately.add(now, Plan(sequence=2), [], [Drift("tier", "cpu.weight", "1", "100", "kubelet")])
    assert [(n.workload, n.what, n.why) for n in lately.notes] == [
        ("job:a", "SIGTERM, MemoryPressure", why),
        ("tier", "cpu.weight was 100, not 1", "probably by kubelet"),
    ]


@pytest.mark.parametrize("version", [1, 2])
def test_a_pods_weight_is_written_once_and_reads_back_as_it_was_written(version, tmp_path):
    """Whoever reads another value than was written would say every tick that somebody else writes it."""
    kernel = ModelKernel(version=version)
    for path in ("/kubepods", "/kubepods/besteffort", "/kubepods/burstable"):
        for hierarchy in kernel.layout.mounts:
            kernel.mkdir(hierarchy, path)
    agent = Agent(kernel, ColocationPolicy(), reference, Journal(tmp_path, "boot"), clock=kernel)
    agent.open()
    uids = {f"0a1b000{i}-0000-4000-8000-000000000000": cores for i, cores in enumerate((0.0, 0.5, 1.0, 4.0))}
    for uid in uids:
        for hierarchy in kernel.layout.mounts:
            kernel.mkdir(hierarchy, f"{agent.tier.tree.tier_path}/pod{uid}")
    agent.observer.lister.expected = True
    agent.observer.lister.told(
        {uid: Pod(uid, uid[:8], "ml", {}, asked_cores=cores, asked_bytes=0) for uid, cores in uids.items()}
    )

    async def live():
        found = []
        for _ in range(4):
            tick = await agent.tick()
            await agent.writer.settle()
            found.append((tick.drifts, [o for o in tick.outcomes if o.knob == "cpu.weight" and o.status == "applied"]))
            kernel.advance(1.0)
        await agent.close()
        return found

    (drifts, wrote), *later = asyncio.run(live())
    assert len(wrote) >= len(uids) - 1
    assert not drifts
    assert later == [([], [])] * 3
