"""Which pods run on this node: told by the API server (agent/publisher.py), else asked of the kubelet for their labels.

GET /pods of the kubelet itself (port 10250, authorised by `nodes/proxy` or, fine-grained, `nodes/pods`)
answers a PodList from the kubelet's memory, so it costs the API server nothing and works while that one is away.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from colocate.observe.http import read_body
from colocate.policy.schema import KubeletPolicy

MAX_BODY_BYTES = 32 << 20


class _Meta(msgspec.Struct, rename="camel"):
    name: str
    namespace: str
    uid: str
    labels: dict[str, str] = {}


class _Container(msgspec.Struct):
    name: str = ""
    id: str = msgspec.field(default="", name="containerID")


class _Status(msgspec.Struct, rename="camel"):
    container_statuses: list[_Container] | None = None


class _Pod(msgspec.Struct):
    metadata: _Meta
    status: _Status = msgspec.field(default_factory=_Status)


class _PodList(msgspec.Struct):
    items: list[_Pod] | None = None


CPU_WEIGHT, MOST_WEIGHT = 100, 10_000
"""The weight of a pod that requests one CPU, as of a new cgroup; and the largest that there is (cgroup-v2.rst)."""


class BatchRequest(msgspec.Struct, frozen=True):
    """What one container asks for of `kubernetes.io/batch-cpu` (thousandths of a CPU) and `batch-memory` (bytes), and
    whether it borrows a card."""

    cpu_milli: int | None = None
    cpu_limit_milli: int | None = None
    memory_limit_bytes: int | None = None
    passing: bool = False
    """An init container, which ends before the others begin."""
    borrows: bool = False


class Pod(msgspec.Struct, frozen=True):
    """A pod of this node."""

    uid: str
    name: str
    namespace: str
    labels: dict[str, str]
    asked_cores: float | None = None
    """What its containers request; None where that was not asked for."""
    asked_bytes: int | None = None
    started_seconds: float = 0.0
    """Monotonic time at which it was made."""
    leaving: bool = False
    """Whether its end has begun."""
    batch: dict[str, BatchRequest] = {}
    """Its containers that request batch resources, by name."""
    gang: str = ""
    """That it is in: `namespace/name`."""
    gang_held: str = ""
    """Which member of it is frozen on another node, and why; empty: none."""
    gpu_memory_bytes: int | None = None
    """What it says that it will use of a card."""
    power_watts: int | None = None
    """What it asks for that its devices draw at most, all together."""
    power_class: str = ""
    """Of jobs that feel a cap alike."""
    cards: int = 0
    """How many GPUs it asks for."""
    due_seconds: float | None = None
    """By when its work is to be done, monotonic."""
    work_seconds: float | None = None
    """How long that takes with all the watts that it asks for."""
    containers: dict[str, str] = {}
    """By id, their names."""

    @property
    def _watts(self) -> dict[str, str | int | float]:
        if not self.power_watts:
            return {}
        asked: dict[str, str | int | float] = {"power_watts": self.power_watts, "power_class": self.power_class}
        asked["power_cards"] = self.cards
        if self.due_seconds is not None and self.work_seconds is not None:
            asked |= {"due_seconds": round(self.due_seconds, 3), "work_seconds": self.work_seconds}
        return asked

    @property
    def as_batch(self) -> dict[str, str | bool | int | float]:
        """What a snapshot says of it as batch, where the API server tells of it."""
        if self.asked_cores is None:
            return {}
        stay = sum(r.cpu_milli or 0 for r in self.batch.values() if not r.passing)
        asked = max(stay, round(1000 * self.asked_cores))
        weight = min(max(round(asked * CPU_WEIGHT / 1000), 1), MOST_WEIGHT)
        known: dict[str, str | bool | int | float] = {
            "pod": f"{self.namespace}/{self.name}",
            "leaving": self.leaving,
            "weight": weight,
        }
        known |= {"gpu_memory_bytes": self.gpu_memory_bytes} if self.gpu_memory_bytes is not None else {}
        known |= self._watts
        return known | ({"gang": f"pods/{self.gang}", "gang_held": self.gang_held} if self.gang else {})

    @property
    def asks(self) -> dict[str, float | int | str | None]:
        """What a snapshot says of it as a service."""
        if self.asked_cores is None:
            return {}
        asked: dict[str, float | int | str | None] = {"asked_cores": self.asked_cores, "asked_bytes": self.asked_bytes}
        asked |= self._watts
        return {**asked, "started_seconds": round(self.started_seconds, 3)}

    def matches(self, labels: dict[str, str], namespace: str | None) -> bool:
        """Whether it has all of these labels, in this namespace (None: in any)."""
        return namespace in (None, self.namespace) and labels.items() <= self.labels.items()


def parse_pods(body: bytes) -> dict[str, Pod]:
    """uid -> Pod of a PodList. Raises msgspec.MsgspecError."""
    items = msgspec.json.decode(body, type=_PodList).items or []
    return {p.metadata.uid: _pod(p) for p in items}


def _pod(found: _Pod) -> Pod:
    meta, status = found.metadata, found.status
    names = by_id((c.id, c.name) for c in status.container_statuses or ())
    return Pod(meta.uid, meta.name, meta.namespace, meta.labels, containers=names)


def by_id(said: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Names of containers by their ids, of which the API has `RUNTIME://ID`, and nothing before they are made."""
    return {id_.rpartition("/")[2]: name for id_, name in said if id_}


class PodLister:
    """Keeps the latest answer; a slow or absent kubelet delays no tick, and what was known stays known."""

    def __init__(self) -> None:
        self.pods: dict[str, Pod] = {}
        self.problem = ""
        self.expected = False
        """Whether the API server is to tell of them: pods that it has not told of yet are its all the same."""
        self.watched = False
        """Whether the API server tells of them, so that nobody need be asked."""
        self._task: asyncio.Task[None] | None = None
        self._asked = float("-inf")

    def told(self, pods: dict[str, Pod]) -> None:
        """The API server has told of these, all of this node's, by uid; it will tell of changes."""
        self.pods, self.watched, self.problem = pods, True, ""

    def refresh(self, kubelet: KubeletPolicy) -> None:
        """Ask anew, in the background, if the last answer is old."""
        now = time.monotonic()
        if now - self._asked >= kubelet.every and (self._task is None or self._task.done()):
            self._asked = now
            self._task = asyncio.create_task(self._ask(kubelet))

    async def _ask(self, kubelet: KubeletPolicy) -> None:
        import aiohttp  # late: a plain host never needs it for this

        url = f"{kubelet.url.rstrip('/')}/pods"
        try:
            headers = {}
            if kubelet.token_file and (token := Path(kubelet.token_file)).exists():
                headers["Authorization"] = f"Bearer {token.read_text().strip()}"
            options: dict[str, Any] = {"headers": headers, "ssl": _tls(kubelet)}
            timeout = aiohttp.ClientTimeout(total=5)
            async with (
                aiohttp.ClientSession(timeout=timeout, trust_env=False) as session,
                session.get(url, **options) as response,
            ):
                if response.status in (401, 403):
                    raise OSError(f"HTTP {response.status}: its token may not read nodes/pods (or nodes/proxy)")
                if response.status != 200:
                    raise OSError(f"HTTP {response.status}")
                self.pods = parse_pods(await read_body(response, MAX_BODY_BYTES))
                self.problem = ""
        except TimeoutError:
            self.problem = f"{url} did not answer within 5 s"
        except (aiohttp.ClientError, ValueError, OSError) as error:  # ValueError also: no JSON, a token of two lines
            self.problem = f"{url}: {error}"

    def forget(self) -> None:
        """No selector needs them any more."""
        self.pods, self.problem = {}, ""

    async def close(self) -> None:
        """Cancel what is under way."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


def _tls(kubelet: KubeletPolicy) -> ssl.SSLContext | bool:
    """How the kubelet's certificate is checked; it is often signed by itself, so that may be switched off by name."""
    if kubelet.insecure_skip_tls_verify:
        return False
    return ssl.create_default_context(cafile=kubelet.ca_file) if kubelet.ca_file else True
