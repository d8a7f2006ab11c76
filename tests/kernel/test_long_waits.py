"""Which waits for a CPU are long, told from run delays on this very kernel."""

from __future__ import annotations

import time

import pytest

from colocate.cgroup.layout import UNIFIED
from colocate.cgroup.tree import inodes_of, joined
from colocate.observe.cgroup import parse_pressure
from colocate.observe.longwaits import LongWaits
from tests.kernel.conftest import HOG, PATIENCE

pytestmark = pytest.mark.layouts

# Two processes wake each other on one CPU: each waits until the other has gone to sleep, thousands of times a second.
PING_PONG = """
import os
one, two = os.pipe(), os.pipe()
child = os.fork()
read, write, *others = (one[0], two[1], one[1], two[0]) if child else (two[0], one[1], two[1], one[0])
for end in others: os.close(end)
if child: os.write(write, b"x")
while os.read(read, 1):
    os.write(write, b"x")
"""
SECONDS = 2.0
QUIET_ROUNDS = int(6 * PATIENCE)


def _shares(node, group):
    """The share of time in waits of any length (PSI) and in long ones, over two seconds."""
    path = joined(node.path, group)
    inode = inodes_of(node.port, path).get(UNIFIED)
    if inode is None or parse_pressure(node.port.read(UNIFIED, path, "cpu.pressure", inode))[0] is None:
        pytest.skip("this kernel has no PSI for cgroups (psi=1 on its command line)")
    waits = LongWaits(node.port)
    try:
        waits.watch({"web": (path, 1.0)}, 0.1, time.monotonic())
        end = time.monotonic() + 10 * PATIENCE
        while waits.waited_us("web", time.monotonic()) is None and time.monotonic() < end:
            time.sleep(0.05)
        found = []
        for _ in range(2):
            at = time.monotonic()
            some, _ = parse_pressure(node.port.read(UNIFIED, path, "cpu.pressure", inode))
            found.append((at, some, waits.waited_us("web", at)))
            time.sleep(SECONDS if len(found) == 1 else 0.0)
    finally:
        waits.close()
    (start, *before), (end, *after) = found
    assert None not in before, "nothing was told of the long waits"
    assert None not in after, "what was told was taken back"
    every, long = ((b or 0) - (a or 0) for a, b in zip(before, after, strict=True))
    return every / 1e6 / (end - start), long / 1e6 / (end - start)


def test_who_waits_often_and_shortly_waits_much_by_psi_and_little_in_long_waits(node):
    node.make("web")
    node.start("web", PING_PONG, cpu=0)
    seen = []
    for _ in range(QUIET_ROUNDS):  # a CPU that others take away (a host's, of a virtual one) makes short waits long
        every, long = _shares(node, "web")
        assert every > 0.05
        seen.append(round(long / every, 3))
        if long < 0.25 * every:
            return
    pytest.fail(f"long waits are {seen} of all: in none of {QUIET_ROUNDS} rounds few")


def test_who_shares_a_cpu_with_a_hog_of_the_same_weight_waits_long(node):
    node.make("web")
    node.make("other")
    node.start("web", HOG, cpu=0)
    node.start("other", HOG, cpu=0)
    every, long = _shares(node, "web")
    assert long > 0.2, f"PSI says {every:.2f}"
