"""A real HTTP inference service: one pinned worker per CPU, a small neural network, its own Prometheus histogram.

Each request looks up rows of a table of embeddings, which is mapped from a file and kept in memory by the page cache,
as serving systems map their weights. When memory is short the kernel takes those pages first, and each lookup waits for
the disk.

The latency it observes runs from the client's `X-Request-Start` (as routers set it), so the wait before the worker was
scheduled counts. Workers share one histogram through prometheus-client's multiprocess mode.
"""

from __future__ import annotations

import argparse
import asyncio
import mmap
import os
import random
import time
from pathlib import Path

import numpy as np
from aiohttp import web
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

METRIC = "inference_request_duration_seconds"
BUCKETS = (0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01, 0.012, 0.015, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.5)
WIDTH = 96
TABLE_BYTES = 160 << 20
ROW_BYTES = 4096
LOOKUPS = 48
"""Rows of the table that a request needs."""


def open_table(path: Path) -> mmap.mmap:
    """The table; made by whoever finds none, whose cgroup its pages are then charged to."""
    if not path.exists():
        unfinished = path.with_suffix(".new")
        with unfinished.open("wb") as out:
            block = os.urandom(1 << 20)
            for _ in range(TABLE_BYTES >> 20):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())  # a page that is not written yet cannot be taken
        unfinished.rename(path)
    with path.open("rb") as file:
        table = mmap.mmap(file.fileno(), TABLE_BYTES, prot=mmap.PROT_READ)
    warm(table)
    return table


def warm(table: mmap.mmap) -> None:
    """Have all of it in memory."""
    table.madvise(mmap.MADV_NORMAL)  # with read-ahead
    for row in range(0, TABLE_BYTES, ROW_BYTES):
        table[row]
    table.madvise(mmap.MADV_RANDOM)


class Network:
    """Three dense layers; as many passes a request as take the wanted CPU time."""

    def __init__(self, service_seconds: float, table: mmap.mmap | None = None) -> None:
        self._table: mmap.mmap | None = None
        self._random = random.Random(7)
        generator = np.random.Generator(np.random.PCG64(7))
        self._layers = [generator.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 10 for _ in range(3)]
        self.passes = 1
        self.infer(1.0)
        best = min(self._one_pass() for _ in range(200))
        self.passes = max(1, round(service_seconds / best))
        self._table = table

    def _one_pass(self) -> float:
        started = time.perf_counter()
        self.infer(1.0)
        return time.perf_counter() - started

    def infer(self, seed: float) -> float:
        """The score of an input."""
        if self._table is not None:
            for row in self._random.choices(range(TABLE_BYTES // ROW_BYTES), k=LOOKUPS):
                seed += self._table[row * ROW_BYTES] / 255
        x = np.full((8, WIDTH), seed, dtype=np.float32)
        for _ in range(self.passes):
            y = x
            for layer in self._layers:
                y = np.maximum(y @ layer, 0.0)
        return float(y.sum())


def application(service_seconds: float, table: mmap.mmap | None = None) -> web.Application:
    """POST /infer, POST /warm, GET /metrics, GET /healthz."""
    network = Network(service_seconds, table)
    histogram = Histogram(METRIC, "Latency from the client's intended start", buckets=BUCKETS)

    async def infer(request: web.Request) -> web.Response:
        started = float(request.headers.get("X-Request-Start", "t=0").removeprefix("t=")) or time.time()
        score = network.infer(float(len(await request.read())))
        histogram.observe(max(time.time() - started, 0.0))
        return web.json_response({"score": score})

    async def warmed(_request: web.Request) -> web.Response:
        if table is not None:
            warm(table)
        return web.Response(text="warm\n")

    async def metrics(_request: web.Request) -> web.Response:
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return web.Response(body=generate_latest(registry), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def healthz(_request: web.Request) -> web.Response:
        return web.Response(text=f"{network.passes} passes\n")

    app = web.Application()
    app.add_routes(
        [
            web.post("/warm", warmed),
            web.post("/infer", infer),
            web.get("/metrics", metrics),
            web.get("/healthz", healthz),
        ]
    )
    app.add_routes([web.get("/metrics", metrics), web.get("/healthz", healthz)])
    return app


async def serve(port: int, service_seconds: float, table: mmap.mmap | None) -> None:
    """Listen on loopback until killed; print the port when ready."""
    runner = web.AppRunner(application(service_seconds, table), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    assert runner.addresses
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


def main() -> None:
    """One worker."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cpu", type=int, required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--service-seconds", type=float, default=0.002)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    os.sched_setaffinity(0, {options.cpu})
    table = open_table(options.table) if options.table is not None else None
    asyncio.run(serve(options.port, options.service_seconds, table))


if __name__ == "__main__":
    main()
