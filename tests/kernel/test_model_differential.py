"""The kernel model against this very kernel: the same writes, the same errno, the same text read back."""

from __future__ import annotations

import contextlib
import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from colocate.cgroup.layout import UNIFIED
from colocate.cgroup.tree import joined
from colocate.kernelmodel import ModelKernel

pytestmark = pytest.mark.layouts

WRITES_V1 = [
    *(("cpu", "cpu.shares", v) for v in ("2", "1", "0", "1024", "777", "262144", "999999", "x", "")),
    *(("cpu", "cpu.idle", v) for v in ("0", "1", "2", "-1")),
    *(("cpu", "cpu.cfs_quota_us", v) for v in ("-1", "1000", "999", "50000", "100000", "40000", "0")),
    *(("cpu", "cpu.cfs_period_us", v) for v in ("100000", "999", "1000", "1000000", "1000001", "50000")),
    *(("freezer", "freezer.state", v) for v in ("FROZEN", "THAWED", "frozen", "")),
    *(("cpuset", "cpuset.cpus", v) for v in ("0", "0-0", "99", "x", "", "\n")),
    *(("memory", "memory.limit_in_bytes", v) for v in ("-1", "8388608", "8388609", "x")),
    *((UNIFIED, "cgroup.freeze", v) for v in ("0", "1", "2", "x")),
]
WRITES_V2 = [
    *((UNIFIED, "cpu.weight", v) for v in ("1", "100", "10000", "0", "10001", "x", "")),
    *((UNIFIED, "cpu.idle", v) for v in ("0", "1", "2")),
    *(
        (UNIFIED, "cpu.max", v)
        for v in ("max", "max 100000", "50000", "999", "1000 1000", "5000 999", "x", "1 2 3", "")
    ),
    *((UNIFIED, "cpuset.cpus", v) for v in ("0", "0-0", "99", "x", "", "\n")),
    *((UNIFIED, "memory.max", v) for v in ("max", "8388608", "8388609", "x")),
    *((UNIFIED, "memory.high", v) for v in ("max", "8388608", "x")),
    *((UNIFIED, "cgroup.freeze", v) for v in ("0", "1", "2", "x")),
    *((UNIFIED, "cgroup.subtree_control", v) for v in ("+cpu", "-cpu", "+nonsense", "cpu")),
]
STEPS = st.lists(st.tuples(st.sampled_from(["/a", "/a/b"]), st.integers(0, 10_000)), min_size=1, max_size=12)


def outcome(port, hierarchy, path, file, value):
    """The errno of a write (0 for success), and what is read back."""
    try:
        port.write(hierarchy, path, file, value)
    except OSError as error:
        return error.errno, port.read(hierarchy, path, file)
    return 0, port.read(hierarchy, path, file)


def make_model(version, cpus):
    model = ModelKernel(version=version, cpus=cpus)
    for hierarchy in model.layout.mounts:
        for path in ("/a", "/a/b"):
            if hierarchy == UNIFIED and version == 2:
                parent = path.rpartition("/")[0] or "/"
                model.write(hierarchy, parent, "cgroup.subtree_control", "+cpu +cpuset +memory")
            model.mkdir(hierarchy, path)
            if hierarchy == "cpuset":
                model.write(hierarchy, path, "cpuset.cpus", "0" if cpus == 1 else f"0-{cpus - 1}")
                model.write(hierarchy, path, "cpuset.mems", "0")
    return model


@settings(
    deadline=None, max_examples=400, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=STEPS)
def test_the_model_answers_as_the_kernel_does(node, steps):
    port = node.port
    version = port.layout.version
    writes = WRITES_V1 if version == 1 else WRITES_V2
    cpus = len((port.proc("/proc/stat") or "").split("\ncpu")) - 1
    model = make_model(version, cpus)
    for path in ("a", "a/b"):
        node.make(path)
    if version == 2:
        for path in ("/", "/a"):
            port.write(UNIFIED, joined(node.path, path), "cgroup.subtree_control", "+cpu +cpuset +memory")
    try:
        for path, choice in steps:
            hierarchy, file, value = writes[choice % len(writes)]
            expected = outcome(model, hierarchy, path, file, value)
            found = outcome(port, hierarchy, joined(node.path, path), file, value)
            if file == "freezer.state" and found[1] == "FREEZING\n":
                found = (found[0], "FROZEN\n")
            assert expected == found, f"{path} {file} <- {value!r}"
    finally:
        for path, hierarchy in itertools.product(("/a/b", "/a"), port.layout.mounts):
            with contextlib.suppress(OSError):
                port.rmdir(hierarchy, joined(node.path, path))


@pytest.mark.parametrize("file", ["cgroup.procs", "cgroup.freeze"])
def test_a_removed_cgroup_is_gone_in_both(node, file):
    model = make_model(node.port.layout.version, 2)
    path = node.make("gone")
    inode = node.port.inode(UNIFIED, path)
    node.port.read(UNIFIED, path, file, inode)
    assert node.port.rmdir(UNIFIED, path)
    model_inode = model.inode(UNIFIED, "/a/b")
    assert model.rmdir(UNIFIED, "/a/b")
    assert node.port.read(UNIFIED, path, file, inode) is None
    assert model.read(UNIFIED, "/a/b", file, model_inode) is None
    for port, where, known in ((node.port, path, inode), (model, "/a/b", model_inode)):
        with pytest.raises(OSError, match=r"gone|no cgroup"):
            port.write(UNIFIED, where, file, "0", known)
