"""colocate beside koordlet on one node: what the service feels, what batch gets done, and what the agents cost.

The demonstration's Kubernetes node, with training jobs that are hungry for CPU alone: koordlet takes its node's memory
for the machine's, and would not see a small node short of it. koordlet runs as it is shipped (v1.7.0), by a NodeSLO
with its default of 65 % for all; not by its default of a cpuset, for that has two CPUs at least, which may be all there
are, but by a CFS quota. Its BE pods are kubelet's BestEffort. Arms are interleaved, ABBA.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import Runs, bar, cpu_seconds, memory_mib, reference_loop
from colocate.calibration import Calibration
from colocate.cgroup.port import KernelPort
from colocate.cgroup.tree import joined, main_hierarchy, processes_below
from colocate.cluster.api import SYSTEM
from colocate.demo.kubernetes import KubernetesDemo
from colocate.errors import HostUnfit
from colocate.kube.client import DEFINITIONS, PODS, ApiError, path_of
from colocate.localcluster.controlplane import free_ports, with_parent
from colocate.localcluster.image import fresh_image
from colocate.localcluster.realnode import NAME
from colocate.model import kernels
from colocate.model.statistics import Interval, ratio_interval
from colocate.objects import Pod
from tools import operators

ORDER = ("koordlet", "colocate", "colocate", "koordlet")
ROUNDS, SECONDS, SERVICE_SECONDS = 2, 16.0, 0.002
SLOS = "/apis/slo.koordinator.sh/v1alpha1/nodeslos"
STRATEGY = {"enable": True, "cpuSuppressThresholdPercent": 65, "cpuSuppressPolicy": "cfsQuota"}
START = """
set -eu
mount --make-rprivate /
for hierarchy in /sys/fs/cgroup/*/; do
  name=$(basename $hierarchy); mkdir -p {home}/cgroup/$name
  if [ -d $hierarchy/{node} ]; then mount --bind $hierarchy/{node} {home}/cgroup/$name; fi
done
for folder in /run /etc/runtime; do mkdir -p $folder; mount -t tmpfs tmpfs $folder; done
mkdir -p /etc/runtime/hookserver.d /run/koordlet /run/nri
mount --bind {nri} /run/nri
exec {program} --kubeconfig {kubeconfig} --cgroup-root-dir {home}/cgroup/ --kubelet-preferred-address-type Hostname \\
  --runtime-hooks-addr /run/koordlet/koordlet.sock --logtostderr=true --addr 127.0.0.1:{port}
"""


class Comparison(KubernetesDemo):
    """One round on a node of its own: each agent twice."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.batch_pods = {
            **KubernetesDemo.batch_pods,
            "koordlet": ({"koordinator.sh/qosClass": "BE"}, {}, "kubepods/besteffort"),
        }
        self.found: list[dict[str, Any]] = []
        self._koordlet_pid = 0

    def _growing(self, _bytes_per_second: int, most_bytes: int) -> list[str]:
        return super()._growing(0, most_bytes)

    async def _arms(self, calibration: Calibration) -> None:
        for arm in ("alone", "besteffort"):
            await self._arm(arm, calibration)
            self._keep(arm)
        for arm in ORDER:
            assert self._service is not None
            await self._service.warm()
            if arm == "koordlet":
                async with self._koordlet(), self._batch_in(arm):
                    await self._until(self._suppressed, "koordlet limits BestEffort", 90.0)
                    await self._measure(arm)
            else:
                await self._colocate(calibration)

    async def _measure(self, arm: str) -> None:
        port = KernelPort()
        if arm == "koordlet":
            pids = [self._koordlet_pid]
        elif arm == "colocate":
            pods = await self._api.all(Pod, path_of(PODS, SYSTEM))
            mine = [p.metadata.uid for p in pods if p.metadata.name.startswith("colocate-agent")]
            groups = [joined(self._node.path, f"kubepods/burstable/pod{uid}") for uid in mine]
            pids = [pid for group in groups for pid in processes_below(port, main_hierarchy(port), group)]
            pids = sorted({*pids, *(child for pid in pids for child in _children(pid))})  # the guardian has left it
        else:
            pids = []
        before, started = _of_all(pids, cpu_seconds), asyncio.get_running_loop().time()
        await super()._measure(arm)
        elapsed = asyncio.get_running_loop().time() - started
        if arm in ORDER:
            cores, mib = _of_all(pids, cpu_seconds) - before, _of_all(pids, lambda pid: memory_mib(pid, "Pss"))
            self._keep(arm, agent_cores=cores / elapsed, agent_mib=mib)

    def _keep(self, arm: str, **more: float) -> None:
        found = self._result.arms[arm]
        self.found.append({"arm": arm, "p99_ms": found.p99_ms, "work": found.batch_work_per_second,
                           "failed": found.failed_requests, **more})  # fmt: skip

    async def _suppressed(self) -> bool:
        text = self._port.read("cpu", joined(self._node.path, "kubepods/besteffort"), "cpu.cfs_quota_us")
        return text is not None and int(text) > 0

    @contextlib.asynccontextmanager
    async def _koordlet(self) -> AsyncIterator[None]:
        folder = operators.built("koordlet")
        assert folder is not None
        await self._kinds(folder)
        home = self._directory / "koordlet"
        home.mkdir(exist_ok=True)
        config = json.loads(self._plane.kubeconfig().read_text())
        key = self._plane.kubelet_client.with_suffix(".key")
        config["users"][0]["user"] |= {"client-certificate": str(self._plane.kubelet_client), "client-key": str(key)}
        (home / "kubeconfig").write_text(json.dumps(config))
        program, kubeconfig, node = folder / "operator", home / "kubeconfig", self._node.path.strip("/")
        (port,) = free_ports(1)
        nri = Path(self._kubelet.nri_socket).parent
        script = START.format(home=home, node=node, program=program, kubeconfig=kubeconfig, port=port, nri=nri)
        isolated = ["/usr/bin/unshare", "--mount", "sh", "-c", script]
        with (home / "log").open("ab") as log:
            process = subprocess.Popen(
                with_parent(*isolated), env={**os.environ, "NODE_NAME": NAME, "agent_mode": "hostMode"},
                stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        self._koordlet_pid = process.pid
        try:
            yield
        except HostUnfit as error:
            raise HostUnfit(str(error), (home / "log").read_text(errors="replace")[-4000:]) from error
        finally:
            process.terminate()
            process.wait()
            self._knob("kubepods/besteffort", "cpu.max", "max 100000")

    async def _kinds(self, folder: Path) -> None:
        for file in sorted((folder / "crds").glob("*.yaml")):
            with contextlib.suppress(ApiError):
                await self._api.request("POST", DEFINITIONS, yaml.safe_load(file.read_text()))
        slo: dict[str, Any] = {
            "apiVersion": "slo.koordinator.sh/v1alpha1",
            "kind": "NodeSLO",
            "metadata": {"name": NAME},
            "spec": {"resourceUsedThresholdWithBE": STRATEGY},
        }

        async def there() -> bool:
            try:
                await self._api.request("POST", SLOS, slo)
            except ApiError as error:
                if error.status not in (404, 409, 429):
                    raise
                return error.status == 409
            return True

        await self._until(there, "the NodeSLO is there")


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(child) for child in file.read_text().split()]
    return found


def _of_all(pids: list[int], of: Callable[[int], float]) -> float:
    """The sum over processes; who has ended counts no more."""
    found = 0.0
    for pid in pids:
        with contextlib.suppress(OSError):
            found += of(pid)
    return found


def _round(seed: int) -> list[dict[str, Any]]:
    demo = Comparison(KernelPort(), fresh_image(), SECONDS, seed, SERVICE_SECONDS, lambda _text, _done: None)
    asyncio.run(demo.run(None, kernels.load(jit=False)))
    return demo.found


def run(full: bool) -> list[str]:
    """Measure what is missing; both beside each other. Raises HostUnfit."""
    runs = Runs("node")
    if operators.built("koordlet") is None:
        raise HostUnfit("koordlet is not built", "python -m tools.operators koordlet")
    for i in range(2 * ROUNDS if full else ROUNDS):
        if not runs.has(round=i):
            runs.add(round=i, reference_seconds=reference_loop(), arms=_round(i))
    rounds = [r["arms"] for r in runs.runs if "round" in r]
    return _summary(rounds)


def _summary(rounds: list[list[dict[str, Any]]]) -> list[str]:
    def of(arm: str, what: str) -> list[float]:
        return [float(one[what]) for found in rounds for one in found if one["arm"] == arm]

    def line(name: str, what: str, less: bool) -> str:
        found: Interval = ratio_interval(of("colocate", what), of("koordlet", what))
        wins = found.high < 1 if less else found.low > 1
        loses = found.low > 1 if less else found.high < 1
        return bar(f"colocate / koordlet: {name}", "PASS" if wins else "FAIL" if loses else "undecided", found, 1)

    def middles(what: str, form: str) -> str:
        arms = ("alone", "besteffort", "koordlet", "colocate")
        return ", ".join(f"{arm} {statistics.median(of(arm, what)):{form}}" for arm in arms)

    return [
        line("service's p99", "p99_ms", less=True),
        line("batch work", "work", less=False),
        line("agent's CPU", "agent_cores", less=True),
        line("agent's memory", "agent_mib", less=True),
        f"          p99 ms: {middles('p99_ms', '.1f')}",
        f"          work/s: {middles('work', '.0f')}",
    ]
