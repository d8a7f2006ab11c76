"""An open-loop load: Poisson arrivals whose rate follows a day-like curve, latencies from the intended start.

A closed loop would wait for a slow service and so hide its slowness (coordinated omission). Prints one JSON object.
With --closed N it saturates the service with N connections instead, to find its peak.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import sys
import time

import aiohttp
import msgspec

DAY_AMPLITUDE = 0.5
OVERLOAD_IN_FLIGHT = 2000
TIMEOUT_SECONDS = 10.0


class Sample(msgspec.Struct, array_like=True):
    """One request: intended start since the beginning, latency, whether it succeeded. Seconds."""

    start: float
    latency: float
    ok: bool


def day_rate(mean: float, fraction: float) -> float:
    """The rate at a fraction of the day: low at both ends, the peak in the middle."""
    return mean * (1 - DAY_AMPLITUDE * math.cos(2 * math.pi * fraction))


async def _request(
    session: aiohttp.ClientSession, url: str, start: float, due: float, body: bytes, out: list[Sample]
) -> None:
    wall = time.time() - (time.perf_counter() - due)
    try:
        async with session.post(f"{url}/infer", data=body, headers={"X-Request-Start": f"t={wall:.6f}"}) as response:
            await response.read()
            ok = response.status == 200
    except (aiohttp.ClientError, TimeoutError):
        ok = False
    out.append(Sample(due - start, time.perf_counter() - due, ok))


async def open_loop(urls: list[str], rate: float, seconds: float, seed: int, *, steady: bool = False) -> list[Sample]:
    """Send requests at their due times whatever becomes of the earlier ones; all are waited for.

    `steady`: at the mean rate all the time.
    """
    generator = random.Random(seed)
    samples: list[Sample] = []
    tasks: set[asyncio.Task[None]] = set()
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        start = time.perf_counter()
        due = start
        number = 0
        while True:
            due += generator.expovariate(rate if steady else day_rate(rate, (due - start) / seconds))
            if due - start >= seconds:
                break
            delay = due - time.perf_counter()
            if delay > 0:
                await asyncio.sleep(delay)
            if len(tasks) < OVERLOAD_IN_FLIGHT:
                body = b"x" * generator.randrange(64, 256)
                task = asyncio.create_task(_request(session, urls[number % len(urls)], start, due, body, samples))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            else:
                samples.append(Sample(due - start, TIMEOUT_SECONDS, False))
            number += 1
        if tasks:
            await asyncio.wait(tasks)
    return samples


async def closed_loop(urls: list[str], connections: int, seconds: float) -> list[Sample]:
    """Keep every worker busy; what is answered a second is the peak."""
    samples: list[Sample] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        start = time.perf_counter()

        async def client(url: str) -> None:
            while time.perf_counter() - start < seconds:
                await _request(session, url, start, time.perf_counter(), b"x" * 128, samples)

        await asyncio.gather(*(client(urls[i % len(urls)]) for i in range(connections)))
    return samples


def main() -> None:
    """Wait for a line on stdin, then load."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--closed", type=int, default=0)
    parser.add_argument("--steady", action="store_true")
    parser.add_argument("urls", nargs="+")
    options = parser.parse_args()
    sys.stdin.readline()
    if options.closed:
        samples = asyncio.run(closed_loop(options.urls, options.closed, options.seconds))
    else:
        load = open_loop(options.urls, options.rate, options.seconds, options.seed, steady=options.steady)
        samples = asyncio.run(load)
    sys.stdout.buffer.write(msgspec.json.encode(samples))


if __name__ == "__main__":
    main()
