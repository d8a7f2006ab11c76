"""Seeds x policies x workloads: many simulations that know nothing of each other, in threads here or over Ray.

A point's card is the same wherever it is worked out, and cards are told in the order of their points: the bytes are the
same with one process, many, and Ray.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from colocate.errors import BadInput, HostUnfit
from colocate.simulate.compare import USUAL, Conditions, one_run, windows
from colocate.simulate.placement import Nodes
from colocate.simulate.threads import side_by_side
from colocate.simulate.workloads import Workload

LOCAL, AUTO = "local", "auto"
REACH_SECONDS = 5.0
REPLY_SECONDS = 20
MOST_PATH = 45
"""Of Ray's own folder: what it puts below it takes 62 of a socket's 107 characters."""


class World(NamedTuple):
    """Jobs on a fleet."""

    names: tuple[str, str]
    """Of the fleet and of the jobs, as they were given."""
    nodes: Nodes
    workload: Workload
    conditions: Conditions = USUAL


class Point(NamedTuple):
    """One simulation."""

    world: int
    policy: str
    seed: int
    """Of the window, and of ties."""


def points(worlds: int, policies: Sequence[str], seeds: Sequence[int]) -> list[Point]:
    """All of them, those of a world in a row."""
    return [Point(w, policy, seed) for w in range(worlds) for policy in policies for seed in seeds]


def card(world: World, point: Point, window_jobs: int | None) -> dict[str, Any]:
    """What became of one."""
    [part] = windows(len(world.workload.where), 1, window_jobs, point.seed)
    outcome = one_run(world.nodes, world.workload, point.policy, part, point.seed, world.conditions)
    fleet, jobs = world.names
    return {
        "nodes": fleet,
        "jobs": jobs,
        "seed": point.seed,
        "first_job": part.first,
        "card": outcome.card(world.nodes),
    }


def here(
    worlds: Sequence[World], todo: Sequence[Point], window_jobs: int | None, workers: int | None
) -> Iterator[dict[str, Any]]:
    """In threads."""
    yield from side_by_side(lambda point: card(worlds[point.world], point, window_jobs), todo, workers)


def over_ray(
    address: str, worlds: Sequence[World], todo: Sequence[Point], window_jobs: int | None, workers: int | None
) -> Iterator[dict[str, Any]]:
    """On a Ray cluster (`auto`: that of this machine or job; HOST:PORT), or one that is started here.

    Raises BadInput where Ray is not installed or not there.
    """
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        ray = _connected(address, workers, folder)
        try:
            yield from on_ray(ray, worlds, todo, window_jobs)
        finally:
            ray.shutdown()


def on_ray(
    ray: Any, worlds: Sequence[World], todo: Sequence[Point], window_jobs: int | None
) -> Iterator[dict[str, Any]]:
    """The same on a Ray that this process is connected with."""
    run = ray.remote(max_retries=3)(_of_bytes)
    # As bytes: arrays in Ray's store are read-only, and each other kind of array would be compiled anew.
    stored = [ray.put(pickle.dumps(world)) for world in worlds]
    yield from _in_turn(ray, [run.remote(stored[p.world], p, window_jobs) for p in todo])


def _of_bytes(world: bytes, point: Point, window_jobs: int | None) -> dict[str, Any]:
    return card(pickle.loads(world), point, window_jobs)


def _in_turn(ray: Any, promised: list[Any]) -> Iterator[dict[str, Any]]:
    for one in promised:
        try:
            yield ray.get(one)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            raise HostUnfit(f"--ray: a simulation was lost: {str(error).splitlines()[0]}") from error


def _connected(address: str, workers: int | None, folder: str) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody agreed to tell Ray's makers
    try:
        import ray
    except ImportError as error:
        raise BadInput("--ray needs Ray: pip install 'colocate[ray]'") from error
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address == LOCAL:
        if len(folder) > MOST_PATH:
            raise BadInput(
                f"TMPDIR: {os.path.dirname(folder)} is too long for Ray's sockets: at most {MOST_PATH - 13} characters"
            )
        with _our_signals():
            ray.init("local", num_cpus=workers or os.cpu_count(), include_dashboard=False, _temp_dir=folder, **quiet)
        return ray
    if workers is not None:
        raise BadInput("--workers: a Ray cluster has its own; with --ray it is for `local` only")
    if address != AUTO:
        _reach(address)
    try:
        with _our_signals():
            ray.init(address, **quiet)
    except Exception as error:
        raise BadInput(
            f"--ray: no Ray at {address}: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error
    return ray


@contextlib.contextmanager
def _our_signals() -> Iterator[None]:
    """Ray ends a process at SIGTERM itself, with the number of the signal as its exit code."""
    ours = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, ours)


def _reach(address: str) -> None:
    """Ray waits for minutes for a cluster that is not there."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise BadInput(f"--ray: {address!r} is none of local, auto and HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()
    except OSError as error:
        raise BadInput(f"--ray: nobody answers at {address}: {error.strerror or error}") from error
    asked = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        subprocess.run(asked, check=True, capture_output=True, timeout=REPLY_SECONDS)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        mend = "is that the port of its GCS (6379), and has this process its token (RAY_AUTH_TOKEN)?"
        raise BadInput(f"--ray: who answers at {address} is no Ray, or does not let us in: {mend}") from error


def sweep(
    worlds: Sequence[World],
    policies: Sequence[str],
    seeds: Sequence[int],
    window_jobs: int | None,
    say: Callable[[int, int], None],
    *,
    ray: str | None = None,
    workers: int | None = None,
) -> list[dict[str, Any]]:
    """The cards of all points, in their order. Raises BadInput."""
    todo, found = points(len(worlds), policies, seeds), list[dict[str, Any]]()
    cards = over_ray(ray, worlds, todo, window_jobs, workers) if ray else here(worlds, todo, window_jobs, workers)
    for one in cards:
        found.append(one)
        say(len(found), len(todo))
    return found
