"""The kernel model's rules, its actors, and the agent on it."""

import errno

import pytest

from colocate.cgroup.layout import UNIFIED
from colocate.cgroup.port import CgroupGone
from colocate.kernelmodel import ModelKernel
from colocate.kernelmodel.actors import KubeletActor, SystemdActor


def v1():
    kernel = ModelKernel(version=1)
    for hierarchy in kernel.layout.mounts:
        kernel.mkdir(hierarchy, "/a")
        kernel.mkdir(hierarchy, "/a/b")
    return kernel


def v2():
    kernel = ModelKernel(version=2)
    kernel.write(UNIFIED, "/", "cgroup.subtree_control", "+cpu +cpuset +memory")
    kernel.mkdir(UNIFIED, "/a")
    return kernel


@pytest.mark.parametrize(
    ("make", "writes", "code"),
    [
        pytest.param(
            v2, [(UNIFIED, "cpu.idle", "1"), (UNIFIED, "cpu.weight", "5")], errno.EINVAL, id="v2 weight while idle"
        ),
        pytest.param(v2, [(UNIFIED, "cpu.weight", "0")], errno.ERANGE, id="v2 weight 0"),
        pytest.param(v2, [(UNIFIED, "cpu.max", "999 100000")], errno.EINVAL, id="v2 quota below 1 ms"),
        pytest.param(v2, [(UNIFIED, "cpuset.cpus", "9")], errno.ERANGE, id="v2 no such CPU"),
        pytest.param(v2, [(UNIFIED, "cgroup.freeze", "2")], errno.ERANGE, id="v2 freeze 2"),
        pytest.param(v2, [(UNIFIED, "cgroup.subtree_control", "+rdma")], errno.ENOENT, id="v2 a controller it has not"),
        pytest.param(
            v1, [("cpu", "cpu.idle", "1"), ("cpu", "cpu.shares", "5")], errno.EINVAL, id="v1 shares while idle"
        ),
        pytest.param(v1, [("cpuset", "cpuset.cpus", "7")], errno.ERANGE, id="v1 no such CPU"),
        pytest.param(v1, [("freezer", "freezer.state", "COLD")], errno.EINVAL, id="v1 an unknown freezer state"),
    ],
)
def test_the_model_refuses_what_the_kernel_refuses(make, writes, code):
    kernel = make()
    *before, last = writes
    for hierarchy, file, value in before:
        kernel.write(hierarchy, "/a", file, value)
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is what matters
        kernel.write(last[0], "/a", last[1], last[2])
    assert caught.value.errno == code


def test_v1_refuses_a_childs_quota_above_its_parents_and_a_parents_below_its_childs():
    kernel = v1()
    kernel.write("cpu", "/a", "cpu.cfs_quota_us", "50000")
    with pytest.raises(OSError, match="parent"):
        kernel.write("cpu", "/a/b", "cpu.cfs_quota_us", "60000")
    kernel.write("cpu", "/a/b", "cpu.cfs_quota_us", "40000")
    with pytest.raises(OSError, match="child"):
        kernel.write("cpu", "/a", "cpu.cfs_quota_us", "30000")


@pytest.mark.parametrize(("make", "file", "value"), [(v2, "cpu.weight", "100"), (v1, "cpu.shares", "1024")])
def test_clearing_idle_leaves_the_default_weight_not_the_old_one(make, file, value):
    kernel = make()
    hierarchy = kernel.layout.controllers["cpu"]
    kernel.write(hierarchy, "/a", file, "2")
    kernel.write(hierarchy, "/a", "cpu.idle", "1")
    kernel.write(hierarchy, "/a", "cpu.idle", "0")
    assert kernel.read(hierarchy, "/a", file) == f"{value}\n"


def test_a_removed_cgroup_is_gone_and_its_name_anew_is_another():
    kernel = v2()
    inode = kernel.inode(UNIFIED, "/a")
    assert kernel.rmdir(UNIFIED, "/a")
    kernel.mkdir(UNIFIED, "/a")
    assert kernel.read(UNIFIED, "/a", "cpu.max", inode) is None
    with pytest.raises(CgroupGone):
        kernel.write(UNIFIED, "/a", "cpu.max", "max", inode)


def test_an_occupied_cgroup_is_not_removed():
    kernel = v2()
    task = kernel.spawn("hog", "/a")
    assert not kernel.rmdir(UNIFIED, "/a")
    kernel.kill(task.pid, 9)
    assert kernel.rmdir(UNIFIED, "/a")


@pytest.mark.parametrize(("weight", "share"), [(100, 0.5), (1, 0.0099), (300, 0.75)])
def test_siblings_share_a_cpu_by_weight(weight, share):
    kernel = v2()
    kernel.mkdir(UNIFIED, "/b")
    kernel.write(UNIFIED, "/b", "cpu.weight", str(weight))
    kernel.spawn("hog", "/a", cpu=0)
    hog = kernel.spawn("hog", "/b", cpu=0)
    kernel.advance(2.0)
    assert hog.usage_seconds / 2 == pytest.approx(share, abs=0.01)


def test_a_quota_bounds_a_hog_and_a_freeze_stops_it():
    kernel = v2()
    hog = kernel.spawn("hog", "/a")
    kernel.write(UNIFIED, "/a", "cpu.max", "25000 100000")
    kernel.advance(2.0)
    assert hog.usage_seconds == pytest.approx(0.5, abs=0.03)
    kernel.write(UNIFIED, "/a", "cgroup.freeze", "1")
    kernel.advance(1.0)
    assert hog.usage_seconds == pytest.approx(0.5, abs=0.03)


def test_the_largest_task_of_a_full_group_is_killed():
    kernel = v2()
    small, large = kernel.spawn("sleep", "/a"), kernel.spawn("sleep", "/a")
    large.memory_bytes = 64 << 20
    kernel.write(UNIFIED, "/a", "memory.max", str(32 << 20))
    assert set(kernel.machine.tasks) == {small.pid}


@pytest.mark.parametrize("version", [1, 2])
def test_kubelet_rewrites_its_groups_every_minute_and_systemd_the_whole_controller(version):
    kernel = ModelKernel(version=version)
    if version == 2:
        kernel.write(UNIFIED, "/", "cgroup.subtree_control", "+cpu")
    hierarchy = kernel.layout.controllers["cpu"]
    root = "/kubepods.slice"
    kernel.mkdir(hierarchy, root)
    if version == 2:
        kernel.write(UNIFIED, root, "cgroup.subtree_control", "+cpu")
    for name in ("besteffort", "burstable"):
        kernel.mkdir(hierarchy, f"{root}/kubepods-{name}.slice")
    path, quota = f"{root}/kubepods-besteffort.slice", "cpu.max" if version == 2 else "cpu.cfs_quota_us"
    kernel.write(hierarchy, path, quota, "50000")
    kernel.actors.append(KubeletActor(kernel, root, SystemdActor(kernel)))
    kernel.advance(61.0)
    assert kernel.read(hierarchy, path, quota) in ("max 100000\n", "-1\n")
