"""A card in the kernel model: what is done to a cgroup is done to its processes on the card."""

from __future__ import annotations

import pytest

from colocate.cgroup.layout import UNIFIED
from colocate.fakecard.card import MILLISECOND, SECOND, Card, CardSpec
from colocate.fakecard.workloads import Arrivals, Service, asynchronous, trainer
from colocate.kernelmodel import ModelKernel
from colocate.kernelmodel.gpu import ModelCard

BATCH = "/kubepods/batch"


@pytest.fixture(params=[1, 2], ids=["v1", "v2"])
def node(request):
    kernel = ModelKernel(version=request.param)
    for path in ("/kubepods", BATCH, "/kubepods/burstable"):
        for hierarchy in kernel.layout.mounts:
            kernel.mkdir(hierarchy, path)
    return kernel, ModelCard(kernel, Card(CardSpec(cold=0.0)))


def freeze(kernel, path, value):
    if "freezer" in kernel.layout.mounts:
        kernel.write("freezer", path, "freezer.state", "FROZEN" if value else "THAWED")
    else:
        kernel.write(UNIFIED, path, "cgroup.freeze", str(int(value)))


def test_a_frozen_cgroup_drains_and_goes_on_when_it_is_thawed(node):
    kernel, model = node
    task = model.run(asynchronous(), BATCH)
    kernel.advance(2.0)
    freeze(kernel, BATCH, True)
    kernel.advance(0.5)
    process = model.process(task.pid)
    assert process.frozen
    assert process.client.work / MILLISECOND == pytest.approx(1022 - 500, abs=3)
    kernel.advance(1.0)
    busy = process.client.busy_ns
    kernel.advance(1.0)
    assert (process.client.work, process.client.busy_ns) == (0.0, busy)
    freeze(kernel, BATCH, False)
    kernel.advance(0.5)
    assert process.client.busy_ns - busy == pytest.approx(0.5 * SECOND, rel=0.02)


def test_a_killed_task_takes_its_context_along(node):
    kernel, model = node
    task = model.run(trainer(), BATCH)
    kernel.advance(1.0)
    kernel.machine.kill(task.pid, 9)
    kernel.advance(0.1)
    assert not model.card.clients
    with pytest.raises(KeyError):
        model.process(task.pid)


def test_what_a_process_spends_on_launches_and_waits_is_its_cgroup_s(node):
    """So that a service's CPU time shows within milliseconds whether it is busy."""
    kernel, model = node
    arrivals = Arrivals(model.card, 10.0, seed=1)
    service = Service(model.card, arrivals, lambda _: None)
    task = model.run(service.vision(), "/kubepods/burstable")
    kernel.advance(10.0)
    busy = arrivals.count * 0.0202
    assert task.usage_seconds == pytest.approx(busy, rel=0.05)
    if "cpuacct" in kernel.layout.controllers.values():
        used = int(kernel.read("cpuacct", "/kubepods/burstable", "cpuacct.usage")) / 1e9
    else:
        fields = dict(line.split() for line in kernel.read(UNIFIED, "/kubepods/burstable", "cpu.stat").splitlines())
        used = int(fields["usage_usec"]) / 1e6
    assert used == pytest.approx(busy, rel=0.05)
