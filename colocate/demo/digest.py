"""What every cgroup hierarchy looks like, found by a process of its own: the knobs of every cgroup that is not ours.

Run before and after the demo; `compare` says what changed. Counters are left out, and so are cgroups that come or go
while it runs unless they bear our name.
"""

from __future__ import annotations

import asyncio
import os
import sys

import msgspec

KNOBS = {
    "cpu.shares", "cpu.cfs_quota_us", "cpu.cfs_period_us", "cpu.cfs_burst_us", "cpu.idle", "cpu.weight", "cpu.max",
    "cpuset.cpus", "cpuset.mems", "memory.limit_in_bytes", "memory.soft_limit_in_bytes", "memory.max", "memory.high",
    "memory.low", "memory.min", "memory.oom_control", "freezer.state", "cgroup.freeze", "cgroup.subtree_control",
    "pids.max", "io.weight", "io.max", "blkio.throttle.write_bps_device", "cgroup.max.depth", "notify_on_release",
}  # fmt: skip
MARK = "colocate"

Digest = dict[str, dict[str, str]]


def digest(mounts: dict[str, str]) -> Digest:
    """`hierarchy:path` -> knob -> value, for every cgroup."""
    found: Digest = {}
    for hierarchy, mount in sorted(mounts.items()):
        for directory, names, files in os.walk(mount):
            names.sort()
            values = {}
            for file in sorted(KNOBS.intersection(files)):
                try:
                    with open(os.path.join(directory, file)) as handle:
                        lines = handle.read().splitlines()
                        values[file] = "\n".join(v for v in lines if not v.startswith(("under_oom", "oom_kill ")))
                except OSError:
                    continue
            found[f"{hierarchy}:{directory[len(mount) :] or '/'}"] = values
    return found


def compare(before: Digest, after: Digest) -> list[str]:
    """What differs and may be ours: changed knobs of cgroups that were there before, and what is left with our name."""
    changes = []
    for where, values in before.items():
        now = after.get(where)
        if now is None:
            continue  # a cgroup of somebody else ended; we never remove what is not ours
        for knob, value in values.items():
            if knob in now and now[knob] != value:
                changes.append(f"{where}/{knob}: {value!r} -> {now[knob]!r}")
    changes += [f"{where}: left behind" for where in after if where not in before and MARK in where]
    return changes


async def taken(mounts: dict[str, str]) -> Digest:
    """The same, by a process of its own."""
    said = msgspec.json.encode(mounts).decode()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "colocate.demo.digest", said, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    return msgspec.json.decode(out, type=Digest)


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(digest(msgspec.json.decode(sys.argv[1]))))
