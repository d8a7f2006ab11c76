"""S2.3: whoever dies at whatever write, nobody who runs draws more than he asked for, and what was found comes back."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocate.actuate import caps as under_test
from colocate.actuate.caps import Caps, put_back_caps
from colocate.actuate.driver import DriverFailed
from colocate.actuate.journal import Entry, Journal, read_entries
from colocate.plan import GpuTarget, Plan, PowerCap
from colocate.snapshot import Card, NodeSnapshot

FOUND = 300_000
SCRIPT = (
    ("start", "a", 250), ("start", "b", 150), ("tick",), ("end", "b"), ("tick",), ("start", "c", 200), ("end", "a"),
    ("tick",), ("end", "c"), ("tick",),
)  # fmt: skip


class Death(BaseException):
    """The agent is killed."""


class Machine:
    """A card, who is there, and an agent that may die before or after any of its writes."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.limit = folder, FOUND
        self.running: dict[str, int] = {}
        """Cgroup -> milliwatts, of whoever has been let start."""
        self.writes = 0
        self.dies: tuple[int, bool] | None = None
        monkeypatch.setattr(under_test, "processes_anywhere", lambda _port, path: {path} & self.running.keys())
        monkeypatch.setattr(under_test, "Driver", lambda _library: self)
        monkeypatch.setattr(under_test, "COMES_SECONDS", 0.0)
        self.begin()

    def begin(self) -> None:
        """An agent starts: what one before it left is put back, and gone on with."""
        self.journal = Journal(self.folder, "boot")
        entries = [e for e in self.journal.entries if e.kind == "cap"]
        stay, failed = put_back_caps(self.anything, entries)
        assert not failed
        self.journal.replace(stay)
        self.caps = Caps(self.anything, self.journal, self.anything)
        add, keep, wrapped = self.journal.add, self.journal.keep, self.anything.journal
        wrapped.add = lambda *entries: self.write(lambda: add(*entries))
        wrapped.keep = lambda kept, *more: self.write(lambda: keep(kept, *more))
        self.look()

    @property
    def anything(self) -> Any:
        return self

    def write(self, do: Callable[[], object]) -> None:
        """One write to the disk or the driver: the agent may die before it, or after it."""
        self.writes += 1
        if self.dies == (self.writes, False):
            raise Death
        do()
        self.look()
        if self.dies == (self.writes, True):
            raise Death

    # the driver

    def setting(self, call: str, uuid: str, value: str = "", **_more: object) -> str:
        assert uuid == "GPU-0"
        if call == "set_power_limit":
            self.write(lambda: setattr(self, "limit", int(value)))
        return str(self.limit)

    def close(self) -> bool:
        return True

    def look(self) -> None:
        """At every instant."""
        if self.running:
            assert self.limit <= min(self.running.values())

    # what happens

    def step(self, kind: str, name: str = "", watts: int = 0) -> None:
        path = f"/{name}"
        if kind == "start" and path not in self.running:
            self.caps.set_now("GPU-0", watts, path, time.monotonic() + 60.0)
            self.running[path] = 1000 * watts
        elif kind == "end":
            self.running.pop(path, None)
        elif kind == "tick":
            for uuid, limit in list(self.caps._limits.items()):
                if not all(self.caps._needed(p, o) for p, o in limit.owners.items()):
                    self.caps._settle(uuid, {})
        self.look()

    def play(self, script: tuple[Any, ...], dies: tuple[int, bool] | None) -> int:
        """All of it, by an agent that dies there and its successor; how many writes there were."""
        self.dies, self.writes = dies, 0
        for step in (*script, *(("end", name) for name in "abc"), ("tick",)):
            while True:
                try:
                    self.step(*step)
                    break
                except Death:  # whoever waited for its answer did not start; kubelet tries again
                    self.dies = None
                    self.begin()
        assert self.limit == FOUND
        assert [e for e in self.journal.entries if e.kind == "cap"] == []
        return self.writes


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Machine]:
    made = iter(range(10_000))

    def fresh() -> Machine:
        folder = tmp_path / str(next(made))
        folder.mkdir()
        return Machine(folder, monkeypatch)

    return fresh


def test_s2_3_whoever_dies_at_whatever_write_no_cap_leaks(machine: Callable[[], Machine]) -> None:
    writes = machine().play(SCRIPT, None)
    assert writes >= 10
    for index in range(1, writes + 1):
        for after in (False, True):
            machine().play(SCRIPT, (index, after))


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("start"), st.sampled_from("abc"), st.integers(100, 300)),
        st.tuples(st.just("end"), st.sampled_from("abc")),
        st.tuples(st.just("tick")),
    ),
    max_size=12,
)


@settings(max_examples=60)
@given(STEPS, st.integers(1, 30), st.booleans())
def test_s2_3_nor_in_any_other_order(script: list[Any], index: int, after: bool) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        Machine(Path(folder), patch).play(tuple(script), (index, after))


def test_what_others_add_while_the_journal_is_thinned_out_stays(tmp_path: Path) -> None:
    """Workers of several targets do both at once: a list that was taken before is no longer the journal."""
    journal = Journal(tmp_path, "boot")

    def entry(name: str) -> Entry:
        return Entry(kind="cap", boot_id="boot", hierarchy="nvml", path="/", file=name)

    def come_and_go(name: str) -> None:
        for i in range(40):
            journal.add(entry(f"{name} {i}"), entry(f"{name} stays {i}"))
            journal.keep(lambda e, gone=f"{name} {i}": e.file != gone)  # type: ignore[misc]

    threads = [threading.Thread(target=come_and_go, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {f"{name} stays {i}" for name in "abc" for i in range(40)}
    assert {e.file for e in journal.entries} == expected
    assert {e.file for e in read_entries(journal.path)[0]} == expected


class Several:
    """A driver of several cards, of which one may refuse to be set."""

    def __init__(self) -> None:
        self.limits: dict[str, int] = {}
        self.refuses = ""

    def setting(self, call: str, uuid: str, value: str = "", **_more: object) -> str:
        if call == "set_power_limit":
            if uuid == self.refuses:
                raise DriverFailed("NO_PERMISSION")
            self.limits[uuid] = int(value)
        return str(self.limits.setdefault(uuid, FOUND))


async def test_s2_8_within_a_budget_nothing_rises_before_all_that_fall_have_but_for_who_is_slowed_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(under_test, "processes_anywhere", lambda _port, path: {path})
    driver = Several()
    anything: Any = driver
    caps = Caps(anything, Journal(tmp_path, "boot"), anything)
    snapshot: Any = NodeSnapshot(
        sequence=1, time_seconds=1.0, monotonic_seconds=1.0, cgroup_version=2, cpus=(0,), cores=((0,),), memory_bytes=1
    )

    async def ticks(**watts: float | None) -> dict[str, int]:
        asked = [
            PowerCap(target=GpuTarget(uuid), watts=value, workload=uuid, path=f"/{uuid}")
            for uuid, value in watts.items()
        ]
        for _ in range(3):
            caps.act(Plan(sequence=1, caps=tuple(asked), power_budget=True), snapshot)
            await caps._workers.settle(5.0)
        return {uuid: limit // 1000 for uuid, limit in driver.limits.items()}

    assert await ticks(a=200.0, b=150.0, c=150.0) == {"a": 200, "b": 150, "c": 150}
    driver.refuses = "a"
    assert await ticks(a=120.0, b=230.0, c=None) == {"a": 200, "b": 150, "c": 300}
    driver.refuses = ""
    caps._refused.clear()  # a minute later
    assert await ticks(a=120.0, b=230.0, c=None) == {"a": 120, "b": 230, "c": 300}


class Refuses:
    """A driver that takes a limit and does not enforce it."""

    def setting(self, call: str, value: str = "", **_more: object) -> str:
        return {"get_power_limit": "300000", "set_power_limit": value}.get(call, "300000")


def test_s2_3_a_limit_that_is_not_in_force_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "IN_FORCE_SECONDS", 0.0)
    port: Any = None
    driver: Any = Refuses()
    caps = Caps(port, Journal(tmp_path, "boot"), driver)
    with pytest.raises(DriverFailed, match="set to 180000 mW, but 300000 mW are in force"):
        caps.set_now("GPU-0", 180.0, "/a", time.monotonic() + 60.0)


async def test_s2_3_what_is_asked_for_is_set_once_and_a_refusal_is_not_repeated_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tmp_path, monkeypatch)
    machine.running["/a"] = FOUND
    snapshot: Any = NodeSnapshot(
        sequence=1, time_seconds=1.0, monotonic_seconds=1.0, cgroup_version=2, cpus=(0,), cores=((0,),), memory_bytes=1,
        cards={"GPU-0": Card(uuid="GPU-0")},
    )  # fmt: skip

    async def ticks(watts: float | None) -> None:
        cap = PowerCap(target=GpuTarget("GPU-0"), watts=watts, workload="a", path="/a")
        for _ in range(3):
            machine.caps.act(Plan(sequence=1, caps=(cap,)), snapshot)
            await machine.caps._workers.settle(5.0)

    written: list[str] = []
    setting = machine.setting

    def noted(call: str, **more: Any) -> str:
        written.append(call)
        return setting(call, **more)

    monkeypatch.setattr(machine, "setting", noted)
    await ticks(180.0)
    assert written.count("set_power_limit") == 1
    assert machine.limit == 180_000
    await ticks(None)
    assert machine.limit == FOUND
    written.clear()

    def fails(call: str, **_more: object) -> str:
        written.append(call)
        raise DriverFailed("NO_PERMISSION")

    monkeypatch.setattr(machine, "setting", fails)
    await ticks(180.0)
    assert written == ["get_power_limit"]
    assert machine.caps.problems() == {"power GPU-0": "GPU-0 is not capped: NO_PERMISSION"}
