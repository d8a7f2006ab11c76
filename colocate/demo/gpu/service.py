"""A service on a fake card, over HTTP: a vision model that answers one after the other, or a language model.

The language model works at all of its requests at once, token by token, as such servers do (continuous batching), and
sleeps while the card works; the vision model waits for the card with its CPU spinning, CUDA's default. Both tell their
latency as a Prometheus histogram, from the client's `X-Request-Start`, and how many requests they have.
"""

from __future__ import annotations

import argparse
import asyncio
import queue
import sys
import threading
import time
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest

from colocate.demo.gpu.cuda import CudaDevice
from colocate.fakecard.card import MILLISECOND
from colocate.fakecard.client import Device

METRIC, GAUGES = "request_duration_seconds", ("requests_running", "requests_waiting")
BUCKETS = tuple(round(0.005 * 1.06**i, 6) for i in range(132))
"""5 ms to 10 s, each 6 % above the one before."""
VISION_KERNELS, VISION_KERNEL_NS = 20, MILLISECOND
PREFILL_NS, TOKENS, TOKEN_NS = 20 * MILLISECOND, 48, 10 * MILLISECOND


def bucket_at(seconds: float) -> float:
    """The lowest bucket's end that is not below."""
    return next(b for b in BUCKETS if b >= seconds)


def _settle(done: asyncio.Future[None]) -> None:
    if not done.done():  # whoever asked may have gone
        done.set_result(None)


class Model(threading.Thread):
    """Has the card, and answers what is in its queue."""

    def __init__(self, device: Device | CudaDevice, kind: str) -> None:
        super().__init__(daemon=True)
        self._device, self._kind = device, kind
        self.asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.running = 0

    def run(self) -> None:
        """Until the process ends."""
        (self._vision if self._kind == "vision" else self._language)()

    def _vision(self) -> None:
        while True:
            answered = self.asked.get()
            self.running = 1
            self._device.launch(VISION_KERNELS, VISION_KERNEL_NS)
            self._device.sync(spins=True)
            self.running = 0
            answered()

    def _language(self) -> None:
        left: dict[Any, int] = {}
        while True:
            new = 0
            while not left or not self.asked.empty():
                left[self.asked.get()] = TOKENS
                new += 1
            self.running = len(left)
            self._device.graph(1, TOKEN_NS + new * PREFILL_NS)
            self._device.sync()
            for answered in list(left):
                left[answered] -= 1
                if not left[answered]:
                    del left[answered]
                    answered()
            self.running = len(left)


def application(model: Model) -> web.Application:
    """POST /infer, GET /metrics."""
    registry = CollectorRegistry()
    histogram = Histogram(METRIC, "From the client's intended start", buckets=BUCKETS, registry=registry)
    running, waiting = (Gauge(name, "Requests", registry=registry) for name in GAUGES)
    running.set_function(lambda: model.running)
    waiting.set_function(model.asked.qsize)

    async def infer(request: web.Request) -> web.Response:
        started = float(request.headers.get("X-Request-Start", "t=0").removeprefix("t=")) or time.time()
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        model.asked.put(lambda: loop.call_soon_threadsafe(_settle, done))
        await done
        histogram.observe(max(time.time() - started, 0.0))
        return web.Response(text="done\n")

    async def metrics(_request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": "text/plain; version=0.0.4"})

    app = web.Application()
    app.add_routes([web.post("/infer", infer), web.get("/metrics", metrics)])
    return app


async def serve(model: Model) -> None:
    """Listen on loopback until killed; print the port when ready."""
    runner = web.AppRunner(application(model), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


def main() -> None:
    """One service."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", default="")
    parser.add_argument("--uuid", default="", help="of a real card, in place of a folder")
    parser.add_argument("--card", type=int, default=0)
    parser.add_argument("--kind", choices=("vision", "language"), default="vision")
    options = parser.parse_args()
    sys.setswitchinterval(0.0005)
    device = CudaDevice(options.uuid) if options.uuid else Device(options.folder, options.card, kind=options.kind)
    model = Model(device, options.kind)
    model.start()
    asyncio.run(serve(model))


if __name__ == "__main__":
    main()
