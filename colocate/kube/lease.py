"""Leadership by a Lease (coordination.k8s.io/v1), as client-go's leaderelection does it, without its wall clocks.

Another's lease is judged by when this process last saw it change, on the monotonic clock, so skewed clocks cannot take
leadership away. What is led ends before the lease is given up, and its death gives the lease up. `holds()` is asked
before every write: no write after the deadline by which the lease had to be renewed.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from types import MappingProxyType

import msgspec
import structlog

from colocate.errors import ColocateError
from colocate.kube.client import LEASES, MERGE, Api, ApiError, Unreachable, path_of
from colocate.objects import Lease, LeaseSpec, ObjectMeta

SAY_SECONDS = 60.0
log = structlog.get_logger()


class LeadershipLost(ColocateError):  # noqa: N818
    """The lease could not be renewed in time, or another holds it."""


class Election:
    """One candidate."""

    def __init__(
        self,
        api: Api,
        namespace: str,
        name: str,
        identity: str,
        lease_seconds: float = 15.0,
        says: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`says` are annotations of the lease while it is this candidate's."""
        self._says = says
        self._api, self._namespace, self._name, self.identity = api, namespace, name, identity
        self.lease_seconds = lease_seconds
        self.renew_within_seconds = lease_seconds * 2 / 3
        self.retry_seconds = lease_seconds * 2 / 15
        self.predecessor = ""
        """Who held the lease before and did not give it up: its late writes are to be fenced off."""
        self.made = False
        """Whether there was no lease at all: nobody has led, or somebody deleted it."""
        self.refused = ""
        """Why the lease can be neither read nor written; empty while another simply holds it."""
        self.settled = True
        """False while a predecessor is being fenced off: a lease given up before would hide it from the next."""
        self._renewed = float("-inf")
        self._seen: tuple[str, float] = ("", 0.0)
        self._lease: Lease | None = None

    def holds(self) -> bool:
        """Whether this candidate may write: it leads, and the deadline to renew has not passed."""
        return time.monotonic() < self._renewed + self.renew_within_seconds

    def check(self) -> None:
        """Raises LeadershipLost unless it holds: to be asked just before every write."""
        if not self.holds():
            raise LeadershipLost("the lease was not renewed in time: nothing is written any more")

    async def lead(self, led: Callable[[int], Awaitable[None]]) -> None:
        """Wait for leadership, then run `led(epoch)`; returns when that returns. Raises LeadershipLost, and what it
        raises.
        """
        refused, said_at = "", float("-inf")
        while not await self._try_to_acquire():
            if self.refused and (self.refused != refused or time.monotonic() - said_at > SAY_SECONDS):
                refused, said_at = self.refused, time.monotonic()
                log.warning("lease_not_acquired", namespace=self._namespace, lease=self._name, error=refused)
            await asyncio.sleep(self.retry_seconds * (0.8 + 0.4 * random.random()))
        assert self._lease is not None
        epoch = self._lease.spec.lease_transitions or 0
        log.info("leading", lease=self._name, identity=self.identity, epoch=epoch)
        work = asyncio.ensure_future(led(epoch))
        renewal = asyncio.create_task(self._keep())
        try:
            await asyncio.wait([work, renewal], return_when=asyncio.FIRST_COMPLETED)
            if renewal.done() and not work.done():
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
                renewal.result()
            work.result()
        finally:
            for task in (work, renewal):
                task.cancel()
            await asyncio.gather(work, renewal, return_exceptions=True)
            await self._give_up()

    async def _try_to_acquire(self) -> bool:
        try:
            try:
                lease = await self._api.get(Lease, self._path(self._name))
            except ApiError as error:
                if error.status != 404:
                    raise
                self._lease = await self._write("POST", self._path(), None, 0)
                self.made, self.settled = True, False
                return True
            if self._expired(lease):
                holder = lease.spec.holder_identity or ""
                transitions = (lease.spec.lease_transitions or 0) + 1
                self._lease = await self._write("PUT", self._path(self._name), lease, transitions)
                self.predecessor, self.settled = holder, not holder
                return True
        except (ApiError, Unreachable) as error:
            self.refused = str(error)
            return False
        self.refused = ""
        return False

    def _expired(self, lease: Lease) -> bool:
        if not lease.spec.holder_identity:
            return True
        now = time.monotonic()
        if lease.metadata.resource_version != self._seen[0]:
            self._seen = (lease.metadata.resource_version, now)
        return now - self._seen[1] >= (lease.spec.lease_duration_seconds or self.lease_seconds)

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(self.retry_seconds)
            try:
                assert self._lease is not None
                transitions = self._lease.spec.lease_transitions or 0
                self._lease = await self._write("PUT", self._path(self._name), self._lease, transitions)
            except ApiError as error:
                if error.status == 409 and await self._still_ours():
                    continue  # a renewal acted that was not answered
                if error.status in (404, 409):
                    self._renewed = float("-inf")
                    raise LeadershipLost(f"the lease {self._name} was taken: {error}") from error
            except Unreachable as error:
                log.warning("lease_not_renewed", error=str(error))
            if not self.holds():
                raise LeadershipLost(f"the lease {self._name} could not be renewed in {self.renew_within_seconds:g} s")

    async def confirm(self) -> None:
        """Look whether the lease is still ours. Raises LeadershipLost if not, or if that cannot be said."""
        if not await self._still_ours():
            self._renewed = float("-inf")
            raise LeadershipLost(f"the lease {self._name} is not {self.identity}'s any more")

    async def _still_ours(self) -> bool:
        try:
            lease = await self._api.get(Lease, self._path(self._name))
        except (ApiError, Unreachable):
            return False
        if lease.spec.holder_identity == self.identity:
            self._lease = lease
        return lease.spec.holder_identity == self.identity

    async def _write(self, method: str, path: str, before: Lease | None, transitions: int) -> Lease:
        asked = time.monotonic()
        now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        kept = before is not None and before.spec.holder_identity == self.identity
        spec = LeaseSpec(
            holder_identity=self.identity,
            lease_duration_seconds=max(round(self.lease_seconds), 1),
            acquire_time=before.spec.acquire_time if before is not None and kept else now,
            renew_time=now,
            lease_transitions=transitions,
        )
        version = before.metadata.resource_version if before is not None else ""
        meta = ObjectMeta(
            name=self._name, namespace=self._namespace, resource_version=version, annotations=dict(self._says)
        )
        body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease"}
        body |= msgspec.to_builtins(Lease(metadata=meta, spec=spec))
        timeout = self.renew_within_seconds / 2
        written = await self._api.request(method, path, body, timeout_seconds=timeout)
        self._renewed = asked  # what the server did may have been done the moment it was asked
        return msgspec.json.decode(written, type=Lease)

    async def _give_up(self) -> None:
        """The next candidate need not wait for the lease to run out."""
        if not self.holds() or self._lease is None or not self.settled:
            return
        self._renewed = float("-inf")
        try:
            lease = await self._api.get(Lease, self._path(self._name))  # a renewal may have been under way
            if lease.spec.holder_identity != self.identity:
                return
            patch = {"metadata": {"resourceVersion": lease.metadata.resource_version}, "spec": {"holderIdentity": ""}}
            await self._api.request("PATCH", self._path(self._name), patch, content_type=MERGE)
        except (ApiError, Unreachable) as error:
            log.info("lease_not_given_up", error=str(error))

    def _path(self, name: str = "") -> str:
        return path_of(LEASES, self._namespace, name)


def identity_of() -> str:
    """What a replica calls itself in a lease: its pod, else its host, and this start of it."""
    return f"{os.environ.get('POD_NAME') or socket.gethostname()}_{uuid.uuid4().hex[:8]}"


def stop_on_signals() -> asyncio.Event:
    """Set once SIGTERM or SIGINT has come."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


Candidate = tuple[Election, Callable[[int], Awaitable[None]]]
"""An election, and what is led once it is won."""


async def lead_until(stop: asyncio.Event, candidate: Callable[[], Candidate]) -> None:
    """Lead, or wait to, until told to stop; there is another `candidate` for each time."""
    while not stop.is_set():
        election, led = candidate()
        leading = asyncio.ensure_future(election.lead(led))
        stopped = asyncio.ensure_future(stop.wait())
        await asyncio.wait([leading, stopped], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        leading.cancel()
        try:
            await leading
        except asyncio.CancelledError:
            continue
        except (LeadershipLost, ApiError, Unreachable) as lost:
            log.warning("leadership_lost", error=str(lost))
            await asyncio.sleep(1.0)
