"""A local copy of a collection, kept up to date by a watch.

    listing | streaming the list -> synced -> watching -> (410, a torn or silent stream) -> ...

First the list is asked for as a stream (KEP-3157 WatchList), object by object; a server that does not offer it is
listed page by page. A list is compared with what is held by uid, so that a deletion during a gap is seen. Bookmarks
keep the resourceVersion young; a stream that is silent for too long is torn down (kubernetes/kubernetes#65012 and the
like).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar

import msgspec
import structlog

from colocate.errors import ColocateError
from colocate.kube.client import Api, ApiError, Page, TooLong, Unreachable, page_query, pause
from colocate.objects import Lean, ObjectMeta

IDLE_SECONDS = 150.0
"""A server sends a bookmark about once a minute."""
STEADY_SECONDS = 30.0
"""A watch that has held so long was in order: its end is no repeated failure."""
INITIAL_END = "k8s.io/initial-events-end"
log = structlog.get_logger()


class Object(Protocol):
    """Whatever has metadata."""

    @property
    def metadata(self) -> ObjectMeta:
        """Of the object."""


O = TypeVar("O", bound=Object)  # noqa: E741
OnChange = Callable[[O | None, O | None], None]
"""(before, now); None where there is none."""


class _Event(Lean, frozen=True):
    type: str
    object: msgspec.Raw


class _Metadata(Lean, frozen=True):
    metadata: ObjectMeta = ObjectMeta()
    code: int = 0
    reason: str = ""
    message: str = ""


def either(before: O | None, now: O | None) -> O:
    """What a change is about: the object as it is, or as it was before it went."""
    found = now or before
    assert found is not None
    return found


class Reflector(Generic[O]):
    """All objects of one kind."""

    def __init__(
        self, api: Api, path: str, kind: type[O], on_change: OnChange[O], query: Mapping[str, str] | None = None
    ) -> None:
        self._api, self._path, self._on_change, self._query = api, path, on_change, dict(query or {})
        self._decode = msgspec.json.Decoder(kind).decode
        self.objects: dict[str, O] = {}
        """uid -> object, as last seen."""
        self.synced = asyncio.Event()
        self.last_heard = 0.0
        """When the server last said something; the loop's clock."""
        self.relists = 0
        self.undecodable = 0
        self.problem = ""
        """Why it is not up to date, while two attempts or more in a row have failed."""
        self._answered: float | None = None
        """When the server began to answer in this attempt."""
        self._version = ""
        self._streams = True

    async def run(self) -> None:
        """Keep the copy up to date until cancelled. A collection that does not exist (404) is empty, and asked for
        again.
        """
        attempt = 0
        while True:
            self._answered = None
            try:
                if not self._version:
                    await self._list()
                await self._watch({"resourceVersion": self._version})
                attempt = 0
            except (ApiError, Unreachable) as error:
                now = asyncio.get_running_loop().time()
                held = self._answered is not None and now - self._answered > STEADY_SECONDS
                attempt = self._failed(error, 0 if held else attempt)
                await pause(error, attempt, random.random())

    def _failed(self, error: ColocateError, attempt: int) -> int:
        if isinstance(error, TooLong):
            self._streams, self._version = False, ""
        if isinstance(error, ApiError) and error.status == 410:
            self._version = ""
            return 0
        self.problem = str(error) if attempt else ""
        if isinstance(error, ApiError) and error.status == 404 and not self.synced.is_set():
            self._replace({}, "")
        level = log.warning if attempt in (3, 10) else log.debug
        level("watch_failed", path=self._path, error=str(error), attempt=attempt)
        return attempt + 1

    async def _list(self) -> None:
        self.relists += 1
        if self._streams:
            try:
                query = {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan", "resourceVersion": ""}
                await self._watch(query, fresh={})
            except ApiError as error:
                if error.status not in (400, 403, 405, 422):
                    raise
                self._streams = False
            else:
                return
        fresh: dict[str, O] = {}
        more: str | None = ""
        while more is not None:
            answer = await self._api.request("GET", self._path, query={**self._query, **page_query(more)})
            page = msgspec.json.decode(answer, type=Page)
            for raw in page.items or []:
                self._take(raw, fresh)
            self._heard()
            more = page.metadata.continue_ or None
        self._replace(fresh, page.metadata.resource_version)

    async def _watch(self, query: dict[str, str], fresh: dict[str, O] | None = None) -> None:
        """Follow a watch until it ends; with `fresh`, until the initial list is complete and on."""
        seconds = str(random.randint(240, 300))
        query = {**self._query, "watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": seconds, **query}
        async for line in self._api.lines(self._path, query, IDLE_SECONDS):
            self._heard()
            if not line:
                continue
            event = msgspec.json.decode(line, type=_Event)
            if event.type == "ERROR":
                status = msgspec.json.decode(event.object, type=_Metadata)
                raise ApiError(status.code, status.reason, status.message)
            if event.type == "BOOKMARK":
                meta = msgspec.json.decode(event.object, type=_Metadata).metadata
                if fresh is not None and meta.annotations.get(INITIAL_END) == "true":
                    self._replace(fresh, meta.resource_version)
                    fresh = None
                elif fresh is None:
                    self._version = meta.resource_version
            elif fresh is not None:
                self._take(event.object, fresh)
            else:
                self._apply(event)
        if fresh is not None:
            raise Unreachable(f"the list of {self._path} ended before it was complete")

    def _apply(self, event: _Event) -> None:
        one: dict[str, O] = {}
        self._take(event.object, one)
        for uid, now in one.items():
            self._version = now.metadata.resource_version
            before = self.objects.get(uid)
            if event.type == "DELETED":
                if self.objects.pop(uid, None) is not None:
                    self._on_change(before, None)
            else:
                self.objects[uid] = now
                self._on_change(before, now)

    def _take(self, raw: msgspec.Raw, into: dict[str, O]) -> None:
        try:
            found = self._decode(raw)
        except msgspec.DecodeError as error:
            self.undecodable += 1
            log.error("object_undecodable", path=self._path, error=str(error))
            return
        into[found.metadata.uid] = found

    def _replace(self, fresh: dict[str, O], version: str) -> None:
        """What is gone first: a namesake that was made anew must not be removed by the old one's end."""
        before, self.objects, self._version = self.objects, fresh, version
        for uid in before.keys() - fresh.keys():
            self._on_change(before[uid], None)
        for uid, now in fresh.items():
            known = before.get(uid)
            if known is None or known.metadata.resource_version != now.metadata.resource_version:
                self._on_change(known, now)
        self.synced.set()

    def _heard(self) -> None:
        self.last_heard, self.problem = asyncio.get_running_loop().time(), ""
        if self._answered is None:
            self._answered = self.last_heard
