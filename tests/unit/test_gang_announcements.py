"""When Events about pods are told."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from podgroup.controller import announcements
from podgroup.controller.announcements import Announcements
from tests.unit.test_gang_placement import pod


class Told:
    """A binder that keeps what it was to tell."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str, str]] = []

    async def event(self, about: Any, reason: str, message: str, warning: bool) -> None:
        assert not warning
        self.told.append((about.metadata.name, reason, message))


async def test_what_was_bound_is_told_once_no_bind_waits_and_in_order(monkeypatch):
    monkeypatch.setattr(announcements, "LOOK_SECONDS", 0.001)
    busy, told = {"a pod": 0.0}, Told()
    made = Announcements(lambda: bool(busy))
    running = asyncio.create_task(made.run(cast("Any", told)))
    for i in range(3):
        made.add(pod(f"p{i}"), "Scheduled", f"assigned ns/p{i} to n")
    await asyncio.sleep(0.02)
    assert told.told == []
    busy.clear()
    while len(told.told) < 3:
        await asyncio.sleep(0.001)
    assert told.told == [(f"p{i}", "Scheduled", f"assigned ns/p{i} to n") for i in range(3)]
    running.cancel()


async def test_binds_without_end_do_not_keep_it_untold(monkeypatch):
    monkeypatch.setattr(announcements, "LATEST_SECONDS", 0.02)
    monkeypatch.setattr(announcements, "LOOK_SECONDS", 0.001)
    told, made = Told(), Announcements(lambda: True)
    running = asyncio.create_task(made.run(cast("Any", told)))
    made.add(pod("p"), "Preempted", "made room for ns/g, which is more important")
    while not told.told:
        await asyncio.sleep(0.001)
    running.cancel()


async def test_the_oldest_is_not_told_where_too_many_wait(monkeypatch):
    monkeypatch.setattr(announcements, "MOST", 2)
    told, made = Told(), Announcements(lambda: False)
    for i in range(3):
        made.add(pod(f"p{i}"), "Scheduled", "")
    running = asyncio.create_task(made.run(cast("Any", told)))
    while len(told.told) < 2:
        await asyncio.sleep(0.001)
    assert [name for name, _, _ in told.told] == ["p1", "p2"]
    running.cancel()
