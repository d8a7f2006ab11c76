"""Which policy is in force: the file's, and over it the ColocationPolicy of the same name that the cluster has.

The file has what is the node's own and what holds until the API server answers; what the object says of a field goes
first. Neither can break what is in force: what is invalid says why, and the former policy stays.
"""

from __future__ import annotations

import asyncio
import contextlib
from operator import attrgetter
from pathlib import Path
from typing import Any

import structlog

from colocate.agent.loop import Agent
from colocate.cluster.api import ColocationPolicyObject, PolicyInForce
from colocate.errors import BadInput, ColocateError
from colocate.policy.file import policy_of, read_policy

WATCH_SECONDS = 1.0
FIXED = (
    ("nodeRoot", "node_root"),
    ("http", "http"),
    ("records", "records"),
    ("memory.poll", "memory.poll"),
    ("memory.pressure", "memory.pressure"),
    ("gpu.enabled", "gpu.enabled"),
    ("gpu.nvmlLibrary", "gpu.nvml_library"),
)
"""What is read once: as the policy calls it, and the attribute."""
log = structlog.get_logger()


class Policies:
    """Of one agent."""

    def __init__(self, agent: Agent, path: Path | None) -> None:
        self._agent, self._path = agent, path
        self.name = agent.policy.metadata.name
        self._object: ColocationPolicyObject | None = None
        self.in_force = PolicyInForce(self.name)
        self.changed = asyncio.Event()
        """Set when there is something new to be said of the policy in force."""

    async def watch_file(self) -> None:
        """Put a changed file in force, until cancelled."""
        if self._path is None:
            return
        seen = (0, 0, 0)  # the file may have changed between its loading and now
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            stamp = _stamp(self._path)
            if stamp != seen:
                seen = stamp
                self._put_in_force()

    def told(self, found: ColocationPolicyObject | None) -> None:
        """The API server has told of the object of this name; None: there is none."""
        if _version(found) == _version(self._object) != ():
            return  # its status was written
        self._object = found
        self._put_in_force()

    def _put_in_force(self) -> None:
        agent, found = self._agent, self._object
        generation = found.metadata.generation if found is not None else 0
        try:
            policy = policy_of(self._merged())
            for field, attribute in FIXED:
                value = attrgetter(attribute)
                if value(policy.spec) != value(agent.policy.spec):
                    raise BadInput(f"$.spec.{field} cannot change while the agent runs: restart it")
        except ColocateError as error:
            agent.observer.extra_problems["policy"] = f"{self._source()}: {error}; the old policy stays in force"
            log.error("policy_invalid", source=self._source(), error=str(error))
            self._say(PolicyInForce(self.name, self.in_force.generation, str(error)))
            return
        agent.observer.extra_problems.pop("policy", None)
        if policy != agent.policy:
            agent.set_policy(policy)
            log.info("policy_loaded", source=self._source(), name=policy.metadata.name, generation=generation)
        self._say(PolicyInForce(self.name, generation))

    def _say(self, now: PolicyInForce) -> None:
        if now != self.in_force:
            self.in_force = now
            self.changed.set()

    def _source(self) -> str:
        where = str(self._path) if self._path is not None else "the default policy"
        return where if self._object is None else f"ColocationPolicy {self.name} over {where}"

    def _merged(self) -> dict[str, Any]:
        """The file, read anew, and over it what the object says. Raises BadInput."""
        data = read_policy(self._path) if self._path is not None else {}
        if self._object is None:
            return data
        return merged(data, {"spec": self._object.spec})


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Mappings are merged, key by key; anything else of `above` replaces what is below it."""
    both = {k: (below[k], v) for k, v in above.items() if k in below}
    inner = {k: merged(b, a) for k, (b, a) in both.items() if isinstance(b, dict) and isinstance(a, dict)}
    return {**below, **above, **inner}


def _version(found: ColocationPolicyObject | None) -> tuple[str, int] | tuple[()]:
    return (found.metadata.uid, found.metadata.generation) if found is not None else ()


def _stamp(path: Path) -> tuple[int, int, int]:
    """What changes when a file is written or exchanged; of a link, of what is behind it (a mounted ConfigMap)."""
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_ino, found.st_mtime_ns, found.st_size
    return (0, 0, 0)
