"""The agent as the DaemonSet runs it, with 110 pods: how soon it answers the runtime, and what its API client costs.

A real API server has the pods, a played runtime asks for a container each, as containerd asks, while the agent ticks.
The same agent without a node's name is measured beside it, on the same cgroups.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import Runs, at_most, cpu_seconds, memory_mib, reference_loop
from colocate.actuate.scratch import ScratchNode, sweep
from colocate.cgroup.port import KernelPort
from colocate.kube.client import NODES, PODS, Api, path_of
from colocate.localcluster.controlplane import ControlPlane, install
from colocate.nri.framing import FROM_RUNTIME, REQUEST, RESPONSE, TO_RUNTIME, Decoder, Frame, encode

POD_COUNT, ASKED, SECONDS, ROUNDS = 110, 1000, 20.0, 3
COMPILE_SECONDS, PAUSE_SECONDS = 25.0, 0.013
"""Until the model is compiled; and between two questions, which so meet every part of a tick."""
ANSWER_MS, CLIENT_MIB = 20.0, 20.0
"""The bars: an answer at p99, and resident memory more than without the API server."""


AS_ITS_POD = """
mount --make-rprivate / && mount -t tmpfs tmpfs /run && mkdir -p /run/secrets/kubernetes.io || exit 9
cp -r $ACCOUNT /run/secrets/kubernetes.io/serviceaccount && exec "$@"
"""


def _field(number: int, value: str | int | bytes) -> bytes:
    """A protobuf field."""

    def varint(n: int) -> bytes:
        out = b""
        while n >= 128:
            out, n = out + bytes([n & 127 | 128]), n >> 7
        return out + bytes([n])

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


class Runtime:
    """The side of NRI that containerd plays, for one plugin."""

    def __init__(self) -> None:
        self._stream, self._decoder = 1, Decoder()
        self._answers: dict[int, asyncio.Future[bytes]] = {}
        self.connected = asyncio.Event()
        self._writer: asyncio.StreamWriter
        self._reading: asyncio.Task[None]

    def came(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """For `asyncio.start_unix_server`."""
        self._writer = writer
        self._reading = asyncio.create_task(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        greeting: asyncio.Task[None] | None = None
        while data := await reader.read(65536):
            for frame in self._decoder.feed(data):
                if frame.connection == TO_RUNTIME:  # it registers
                    self._writer.write(encode(Frame(TO_RUNTIME, frame.stream, RESPONSE, b"")))
                    greeting = greeting or asyncio.create_task(self._greet())
                elif (waits := self._answers.pop(frame.stream, None)) is not None:
                    waits.set_result(frame.payload)

    async def _greet(self) -> None:
        said = _field(2, "containerd") + _field(3, "v2.4.2") + _field(4, 5000) + _field(5, 2000) + _field(6, "v0.12.3")
        await self.ask("Configure", said)
        await self.ask("Synchronize", b"")
        self.connected.set()

    async def ask(self, method: str, payload: bytes) -> bytes:
        """Call the plugin; its answer."""
        stream, self._stream = self._stream, self._stream + 2
        waits = self._answers[stream] = asyncio.get_running_loop().create_future()
        whole = _field(1, "nri.pkg.api.v1alpha1.Plugin") + _field(2, method) + _field(3, payload)
        self._writer.write(encode(Frame(FROM_RUNTIME, stream, REQUEST, whole)))
        return await asyncio.wait_for(waits, 5)

    async def create(self, uid: str, number: int) -> float:
        """Seconds until the plugin has said where a container of this batch pod goes."""
        label = _field(5, _field(1, "colocate.io/qos") + _field(2, "batch"))
        pod = _field(1, "sandbox") + _field(2, "train") + _field(3, uid) + _field(4, "default") + label
        where = f"/kubepods/besteffort/pod{uid}/{number:064x}"
        container = (
            _field(1, f"{number:064x}") + _field(2, "sandbox") + _field(3, "main") + _field(11, _field(5, where))
        )
        started = time.perf_counter()
        answer = await self.ask("CreateContainer", _field(1, pod) + _field(2, container))
        took = time.perf_counter() - started
        assert f"/kubepods/batch/pod{uid}/".encode() in answer, answer
        return took


async def _make_pods(api: Api) -> list[str]:
    await api.request("POST", NODES, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n0"}})
    await install(api, "colocationpolicies", "nodecolocations")
    uids = []
    for i in range(POD_COUNT):
        containers = [{"name": f"c{c}", "image": "i"} for c in range(3)]
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"p{i}", "labels": {"app": f"a{i}"}}}
        body["spec"] = {"nodeName": "n0", "containers": containers, "automountServiceAccountToken": False}
        made = json.loads(await api.request("POST", path_of(PODS, "default"), body))
        uids.append(made["metadata"]["uid"])
    return uids


async def _measure(node: ScratchNode, plane: ControlPlane, uids: list[str], told: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="colocate-bench-") as name:
        directory, runtime = Path(name), Runtime()
        (directory / "policy.yaml").write_text(
            f"spec: {{nodeRoot: {node.path}, calibrate: false, http: {{enabled: false}}}}"
        )
        server = await asyncio.start_unix_server(runtime.came, directory / "nri.sock")
        account = directory / "account"
        account.mkdir()
        token = json.loads(plane.kubeconfig().read_text())["users"][0]["user"]["token"]
        certificate = (plane.directory / "certs" / "apiserver.crt").read_text()
        for file, text in {"token": token, "ca.crt": certificate, "namespace": "colocate-system"}.items():
            (account / file).write_text(text)
        places = {"COLOCATE_STATE_DIR": f"{name}/state", "COLOCATE_RUNTIME_DIR": f"{name}/run"}
        command = [sys.executable, "-P", "-m", "colocate.cli.main", "agent", "--config", str(directory / "policy.yaml")]
        command += ["--nri", str(directory / "nri.sock"), *(["--node", "n0"] if told else [])]
        reaches = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(plane.port)}
        with (directory / "log").open("wb") as log:
            environment = {**os.environ, **places, **reaches, "ACCOUNT": str(account)}
            in_pod = ["unshare", "--mount", "sh", "-c", AS_ITS_POD, "sh", *command]
            process = subprocess.Popen(in_pod, env=environment, stderr=log, cwd=directory)
        try:
            await asyncio.wait_for(runtime.connected.wait(), 60)
            await asyncio.sleep(COMPILE_SECONDS)
            before, started = cpu_seconds(process.pid), time.perf_counter()
            await asyncio.sleep(SECONDS)
            cpu = (cpu_seconds(process.pid) - before) / (time.perf_counter() - started)
            answers = []
            for i in range(ASKED if told else 0):
                answers.append(await runtime.create(uids[i % len(uids)], i))
                await asyncio.sleep(PAUSE_SECONDS)
            rss = memory_mib(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
            server.close()
    return {"cpu_ms": 1e3 * cpu, "rss_mib": rss, "answers_ms": [round(1e3 * a, 3) for a in sorted(answers)]}


async def _round(node: ScratchNode, plane: ControlPlane, uids: list[str], order: tuple[bool, bool]) -> dict[str, Any]:
    return {"with" if told else "without": await _measure(node, plane, uids, told) for told in order}


async def _all(runs: Runs) -> None:
    port = KernelPort()
    sweep(port)
    with (
        tempfile.TemporaryDirectory(prefix="colocate-bench-") as name,
        ScratchNode(port, "bench") as node,
        ControlPlane(Path(name) / "plane", kwok=False) as plane,
    ):
        async with Api.connect(str(plane.kubeconfig())) as api:
            uids = await _make_pods(api)
        for inner in ("kubepods", "kubepods/burstable", "kubepods/besteffort"):
            node.make_inner(inner)
        for uid in uids:
            node.make_inner(f"kubepods/burstable/pod{uid}")
            for c in range(3):
                node.make(f"kubepods/burstable/pod{uid}/c{c}")
        for i in range(ROUNDS):
            if not runs.has(round=i):
                reference = reference_loop()
                found = await _round(node, plane, uids, (True, False) if i % 2 else (False, True))
                runs.add(round=i, reference_seconds=reference, **found)


def run(_full: bool) -> list[str]:
    """Measure what is missing; the bars. Raises HostUnfit."""
    runs = Runs("placement")
    if not all(runs.has(round=i) for i in range(ROUNDS)):
        asyncio.run(_all(runs))
    rounds = [r for r in runs.runs if "round" in r]
    p99 = max(r["with"]["answers_ms"][int(0.99 * ASKED)] for r in rounds)
    more = statistics.median(r["with"]["rss_mib"] - r["without"]["rss_mib"] for r in rounds)
    cpu, alone = (statistics.median(r[which]["cpu_ms"] for r in rounds) for which in ("with", "without"))
    middle = statistics.median(r["with"]["answers_ms"][ASKED // 2] for r in rounds)

    return [
        at_most(f"NRI, {POD_COUNT} pods: p99 of {ASKED} answers, worst of {len(rounds)} rounds", p99, ANSWER_MS, "ms"),
        at_most(f"agent, {POD_COUNT} pods: resident memory of the API client", more, CLIENT_MIB, "MiB"),
        f"          median answer {middle:.2f} ms; CPU a second {cpu:.1f} ms with the API server, {alone:.1f} without",
    ]
