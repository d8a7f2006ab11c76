"""By what a service is seen to have a request: its CPU use, and that a thread of its has just woken."""

from __future__ import annotations

import subprocess
import sys
import time
from itertools import pairwise

import pytest

from colocate.observe.busy import LEAST_LOOKS, MOST_THREADS, Sensor, _Threads

LOOK = 0.0045


class Service:
    """A service as its sensor sees it: looks with and without use, and threads that wake."""

    def __init__(self):
        self.sensor, self.now, self.usage, self.wakes = Sensor(), 0.0, 0, 0

    def look(self, *, busy=False, wakes=0):
        self.now += LOOK
        self.usage += round(LOOK * 1e6 * (0.9 if busy else 0.0))
        self.wakes += wakes
        self.sensor.look(self.now, self.usage)
        self.sensor.woken(self.now, self.wakes)
        return self.sensor.cpu_busy or self.sensor.awake

    def idle(self, looks=30):
        return [self.look() for _ in range(looks)]

    def request(self):
        """A thread wakes, and its CPU use shows a look later."""
        return [self.look(wakes=1), *(self.look(busy=True) for _ in range(5))]


@pytest.fixture
def known():
    service = Service()
    for _ in range(LEAST_LOOKS // 20):
        service.idle()
        service.request()
    return service


def test_a_request_is_seen_when_a_thread_wakes_and_not_only_when_it_has_used_cpu(known):
    known.idle()
    assert known.request()[0]
    assert not any(known.idle()[3:])


def test_until_wakings_have_been_followed_by_work_they_say_nothing():
    service = Service()
    for _ in range(LEAST_LOOKS // 6 + 1):  # no thread is looked at
        service.idle()
        for _ in range(6):
            service.look(busy=True)
    assert not any(service.idle())
    assert not service.request()[0]


def test_a_service_whose_threads_wake_for_nothing_all_the_time_is_not_judged_by_that(known):
    for _ in range(200):
        known.idle(10)
        known.look(wakes=1)
    known.idle(10)
    assert not known.look(wakes=1), "seen some twenty times a second"
    assert known.look(busy=True), "its CPU use is the sensor as before"


def test_a_waking_for_nothing_now_and_then_stops_batch_for_a_moment_only(known):
    known.idle()
    assert known.look(wakes=1)
    assert known.idle(5)[-1] is False


def test_wakings_of_real_threads_are_counted_and_never_fall():
    code = (
        "import sys, time, threading\nfor line in sys.stdin: threading.Thread(target=time.sleep, args=(0.2,)).start()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True)
    threads = _Threads()
    assert process.stdin is not None
    try:
        time.sleep(0.3)
        threads.watch([process.pid])
        counts = [threads.total() or 0]
        for _ in range(10):
            process.stdin.write("\n")
            process.stdin.flush()
            time.sleep(0.05)
            threads.watch([process.pid])
            counts.append(threads.total() or 0)
        assert all(b > a for a, b in pairwise(counts)), counts
    finally:
        process.kill()
        process.communicate()
    assert threads.total() is None, "it has ended"
    threads.close()


def test_a_service_of_many_threads_is_not_looked_at_so():
    code = f"""
import threading, time
for _ in range({MOST_THREADS}): threading.Thread(target=time.sleep, args=(60,)).start()
print("ready", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        threads = _Threads()
        threads.watch([process.pid])
        assert threads.total() is None
    finally:
        process.kill()
        process.communicate()
