"""The local copy of a collection, against a server and a network that make it hard."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest

from colocate.kube.client import PODS, Api, Unreachable, path_of, pause
from colocate.kube.reflector import Reflector
from colocate.objects import Pod
from tests.cluster.conftest import World
from tests.cluster.proxy import Proxy, Request, healthy


class Seen:
    """What a reflector has told, as `+name` and `-name`."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def change(self, before: Pod | None, now: Pod | None) -> None:
        if now is None and before is not None:
            self.told.append(f"-{before.metadata.name}")
        elif before is None and now is not None:
            self.told.append(f"+{now.metadata.name}")


@contextlib.asynccontextmanager
async def reflecting(proxy: Proxy, world: World, seen: Seen) -> AsyncIterator[Reflector[Pod]]:
    async with Api.connect(str(proxy.kubeconfig())) as api:
        reflector = Reflector(api, path_of(PODS, world.namespace), Pod, seen.change)
        task = asyncio.create_task(reflector.run())
        try:
            yield reflector
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def until_told(world: World, seen: Seen, what: Callable[[list[str]], bool]) -> None:
    async def told() -> bool:
        return what(seen.told)

    await world.until(told, f"told {seen.told}")


async def three_pods(world: World) -> None:
    for name in ("a", "b", "c"):
        await world.pod(name, cpu=1)


async def test_a_server_that_streams_no_list_is_listed_page_by_page(
    world: World, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("colocate.kube.client.PAGE", 2)
    await three_pods(world)
    pages = []

    async def no_streams(request: Request) -> str:
        if "sendInitialEvents" in request.query:
            return "400"
        if "limit=" in request.query:
            pages.append(request.query)
        return "pass"

    proxy.fault = no_streams
    seen = Seen()
    async with reflecting(proxy, world, seen) as reflector:
        await asyncio.wait_for(reflector.synced.wait(), 20)
        assert sorted(seen.told) == ["+a", "+b", "+c"]
        assert len(pages) == 2
        await world.pod("d", cpu=1)
        await until_told(world, seen, lambda told: told[-1] == "+d")


async def test_a_deletion_while_the_watch_was_gone_and_expired_is_seen(world: World, proxy: Proxy) -> None:
    await three_pods(world)
    seen = Seen()
    async with reflecting(proxy, world, seen) as reflector:
        await asyncio.wait_for(reflector.synced.wait(), 20)
        expired = []

        async def gone(request: Request) -> str:
            if "watch=true" in request.query and "sendInitialEvents" not in request.query:
                expired.append(request)
                return "410"
            return "pass"

        proxy.fault = gone
        proxy.cut_streams()
        await world.delete(PODS, "b", 0)
        await until_told(world, seen, lambda told: "-b" in told)
        assert expired
        assert reflector.relists >= 2
        proxy.fault = healthy
        await world.pod("d", cpu=1)
        await until_told(world, seen, lambda told: "+d" in told)
        assert sorted(p.metadata.name for p in reflector.objects.values()) == ["a", "c", "d"]


async def test_a_silent_stream_is_torn_down(world: World, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("colocate.kube.reflector.IDLE_SECONDS", 0.5)
    await three_pods(world)
    watches = []

    async def count(request: Request) -> str:
        watches.append(request.query)
        return "pass"

    proxy.fault = count
    seen = Seen()
    async with reflecting(proxy, world, seen) as reflector:
        await asyncio.wait_for(reflector.synced.wait(), 20)

        async def again() -> bool:
            return sum("resourceVersion=" in q and "sendInitialEvents" not in q for q in watches) >= 3

        await world.until(again, "the watch is asked for again and again")
        await world.pod("d", cpu=1)
        await until_told(world, seen, lambda told: "+d" in told)
        assert reflector.relists == 1, "nothing was lost, so nothing is listed again"


async def test_an_object_that_no_line_holds_is_listed_by_pages(world: World) -> None:
    """The API server writes `<` with six bytes: a pod below its limit is a line of a watch that is above ours."""
    env = [{"name": "LARGE", "value": "<" * 800_000}]
    seen = Seen()
    reflector = Reflector(world.api, path_of(PODS, world.namespace), Pod, seen.change)
    task = asyncio.create_task(reflector.run())
    try:
        await reflector.synced.wait()
        await world.pod("large", spec={"containers": [{"name": "c", "image": "i", "env": env}]})
        await world.pod("small", cpu=1)
        await until_told(world, seen, lambda told: {"+large", "+small"} <= set(told))
        assert reflector.relists > 1
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_the_pause_after_failures_grows_to_its_most_and_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after hours in which everything fails."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr("colocate.kube.client.asyncio.sleep", sleep)
    for attempt in (0, 1, 7, 2000):
        await pause(Unreachable("no answer"), attempt, 0.5)
    assert slept == pytest.approx([0.1, 0.2, 10.0, 10.0])
