"""controller, queue, explain podgroup, what-if, snapshot, demo gang: the commands about a cluster."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
import tempfile
import uuid
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import structlog
import yaml
from aiohttp import web

from colocate.cli.logs import configure_logs
from colocate.cli.output import DATA_FORMS, check_file, print_data, print_table
from colocate.errors import BadInput
from colocate.kube.client import (
    ATTACHMENTS,
    BUDGETS,
    CLAIMS,
    CLASSES,
    CSI_DRIVERS,
    CSI_NODES,
    LEASES,
    NAMESPACES,
    NODES,
    PODS,
    STORAGE_CAPACITIES,
    STORAGE_CLASSES,
    VOLUMES,
    Api,
    ApiError,
    Unreachable,
    path_of,
)
from colocate.kube.lease import Election, LeadershipLost
from colocate.objects import (
    Claim,
    CsiDriver,
    CsiNode,
    CsiStorageCapacity,
    DisruptionBudget,
    Lease,
    Namespace,
    Node,
    PersistentVolume,
    Pod,
    PriorityClass,
    StorageClass,
    VolumeAttachment,
)
from colocate.units import format_duration
from podgroup.api import PLANS, POD_GROUPS, GangPlan, PodGroup
from podgroup.controller.binder import now_text
from podgroup.controller.loop import Controller
from podgroup.controller.watches import now_seconds
from podgroup.explain.manifests import pods_of
from podgroup.explain.snapshot import KIND, VERSION, ClusterSnapshot, Explanation, Verdict, decide, explain, load
from podgroup.explain.snapshot import what_if as ask
from podgroup.queue.entry import Settings
from podgroup.queue.queue import PlaceInTurn, Queue

SILENT_SECONDS = 120.0
NOT_YAML = (yaml.YAMLError, ValueError, AttributeError, RecursionError)
"""What the parser raises for a text that is none."""
UPSTREAM = "scheduler-plugins-scheduler"
UPSTREAM_LEASES = (UPSTREAM, "sig-scheduling")
log = structlog.get_logger()
T = TypeVar("T")


def controller(options: argparse.Namespace) -> int:
    """Lead, or wait to; until SIGTERM."""
    configure_logs()
    return asyncio.run(_controller(options))


async def _controller(options: argparse.Namespace) -> int:
    if options.lease_duration < 1:
        raise BadInput(f"--lease-duration: {options.lease_duration:g} s is too short: at least 1 s")
    names = {options.scheduler_name, *options.also_answer_to}
    settings = Settings(
        schedulers=tuple(sorted(names)),
        timeout_seconds=options.timeout,
        node_loss_grace_seconds=options.node_loss_grace,
    )
    identity = f"{os.environ.get('POD_NAME') or socket.gethostname()}_{uuid.uuid4().hex[:8]}"
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    compiling = asyncio.ensure_future(asyncio.to_thread(_compiled))  # it leads meanwhile, and decides one by one
    async with Api.connect(options.kubeconfig, options.context) as api:
        if UPSTREAM in names:
            await _refuse_beside_upstream(api)
        health = Health()
        runner = await health.serve(options.http)
        while not stop.is_set():
            election = Election(api, options.lease_namespace, options.lease_name, identity, options.lease_duration)
            health.controller = Controller(api, settings, election, compiling.result() if compiling.done() else None)
            compiling.add_done_callback(partial(_use, health.controller.queue))
            leading = asyncio.ensure_future(election.lead(health.controller.run))
            stopped = asyncio.ensure_future(stop.wait())
            await asyncio.wait([leading, stopped], return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            leading.cancel()
            try:
                await leading
            except asyncio.CancelledError:
                continue
            except (LeadershipLost, ApiError, Unreachable) as lost:
                log.warning("leadership_lost", error=str(lost))
                await asyncio.sleep(1.0)
        if runner is not None:
            await runner.cleanup()
    return 0


def _compiled() -> PlaceInTurn | None:
    """The compiled solver of simple gangs; None where numba is not usable, and they are decided one by one."""
    try:
        from podgroup.solve import sequence

        sequence.compile_all()
    except (ImportError, RuntimeError, OSError) as error:
        log.warning("kernels_not_compiled", error=str(error))
        return None
    return sequence.place_in_turn


def _use(queue: Queue, compiled: asyncio.Future[PlaceInTurn | None]) -> None:
    if not compiled.cancelled() and compiled.exception() is None:
        queue.place_in_turn = compiled.result()


class Health:
    """/metrics, /healthz and /readyz of a controller that leads or stands by."""

    def __init__(self) -> None:
        self.controller: Controller | None = None

    async def serve(self, address: str) -> web.AppRunner | None:
        """Listen on `HOST:PORT`; nothing if that is empty. Raises BadInput."""
        if not address:
            return None
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            raise BadInput(f"--http: {address!r} is not HOST:PORT")
        app = web.Application()
        for path, handler in (("/metrics", self._metrics), ("/healthz", self._healthz), ("/readyz", self._readyz)):
            app.router.add_get(path, handler)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, int(port)).start()
        except OSError as error:
            await runner.cleanup()
            raise BadInput(f"--http: {address} cannot be listened on: {os.strerror(error.errno or 0)}") from error
        return runner

    async def _metrics(self, _: web.Request) -> web.Response:
        text = self.controller.metrics.text(self.controller.queue) if self.controller is not None else b""
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _healthz(self, _: web.Request) -> web.Response:
        """A leader that decides, or somebody who stands by."""
        alive = self.controller.alive_at if self.controller is not None else None
        silent = 0.0 if alive is None else now_seconds() - alive
        return web.Response(status=200 if silent < SILENT_SECONDS else 500, text=f"last decision {silent:.1f} s ago\n")

    async def _readyz(self, _: web.Request) -> web.Response:
        leads = self.controller is not None and self.controller.synced
        return web.Response(text="leading\n" if leads else "standing by\n")


async def _refuse_beside_upstream(api: Api) -> None:
    """Two schedulers of one name would split gangs between them."""
    for lease in await api.all(Lease, LEASES):
        meta, spec = lease.metadata, lease.spec
        alive = bool(spec.holder_identity) and _age(spec.renew_time) < (spec.lease_duration_seconds or 15)
        if meta.name in UPSTREAM_LEASES and alive:
            raise BadInput(
                f"--also-answer-to {UPSTREAM}: that scheduler is alive (lease {meta.namespace}/{meta.name}, held by "
                f"{spec.holder_identity}); stop it first"
            )


def _age(text: str | None) -> float:
    """Seconds since a time of the API server; for ever if it is not known."""
    return (datetime.now(UTC) - datetime.fromisoformat(text)).total_seconds() if text else float("inf")


def queue(options: argparse.Namespace) -> int:
    """The gangs that wait, in their order."""
    return asyncio.run(_queue(options))


async def _queue(options: argparse.Namespace) -> int:
    async with Api.connect(options.kubeconfig, options.context) as api:
        path = path_of(PLANS, options.namespace) if options.namespace else PLANS
        plans = await api.all(GangPlan, path)
    waiting = [p for p in plans if p.status.waits]
    waiting.sort(key=lambda p: (p.status.position or 1 << 30, p.status.waiting_since or "", p.metadata.name))
    if options.output in DATA_FORMS:
        print_data([_row(p) for p in waiting], options.output)
        return 0
    rows = [
        (
            str(p.status.position or "-"),
            p.metadata.namespace,
            p.metadata.name,
            format_duration(_age(p.status.waiting_since)),
            p.status.reason,
            p.status.message,
        )
        for p in waiting
    ]
    print_table(("position", "namespace", "podgroup", "waiting", "reason", "message"), rows)
    return 0


def _row(plan: GangPlan) -> dict[str, Any]:
    status = plan.status
    return {
        "position": status.position,
        "namespace": plan.metadata.namespace,
        "podgroup": plan.metadata.name,
        "waitingSince": status.waiting_since,
        "reason": status.reason,
        "message": status.message,
    }


async def _take(api: Api, settings: Settings) -> ClusterSnapshot:
    """The cluster as it is now, and what the next cycle decides on it."""
    taken = now_text()

    async def every(kind: type[T], path: str) -> list[T]:
        try:
            return await api.all(kind, path)
        except ApiError as error:
            if error.status == 404 and path in (POD_GROUPS, PLANS):
                return []  # the custom resources are not installed
            raise

    nodes, pods, groups, plans = (
        await every(Node, NODES),
        await every(Pod, PODS),
        await every(PodGroup, POD_GROUPS),
        await every(GangPlan, PLANS),
    )
    snapshot = ClusterSnapshot(
        taken=taken,
        kind=KIND,
        version=VERSION,
        settings=settings,
        nodes=nodes,
        pods=pods,
        groups=groups,
        plans=plans,
        claims=await every(Claim, CLAIMS),
        volumes=await every(PersistentVolume, VOLUMES),
        storage_classes=await every(StorageClass, STORAGE_CLASSES),
        csi_drivers=await every(CsiDriver, CSI_DRIVERS),
        csi_nodes=await every(CsiNode, CSI_NODES),
        storage_capacities=await every(CsiStorageCapacity, STORAGE_CAPACITIES),
        attachments=await every(VolumeAttachment, ATTACHMENTS),
        namespaces=await every(Namespace, NAMESPACES),
        budgets=await every(DisruptionBudget, BUDGETS),
        classes=await every(PriorityClass, CLASSES),
    )
    return msgspec.structs.replace(snapshot, verdicts=decide(snapshot))


def _read(options: argparse.Namespace) -> ClusterSnapshot:
    """--snapshot, or the live cluster."""
    if options.snapshot:
        return _load(_file(options.snapshot))

    async def live() -> ClusterSnapshot:
        async with Api.connect(options.kubeconfig, options.context) as api:
            return await _take(api, Settings(schedulers=(options.scheduler_name,)))

    return asyncio.run(live())


def _load(path: Path) -> ClusterSnapshot:
    try:
        return load(_bytes(path))
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error


def _file(given: str) -> Path:
    path = Path(given)
    if path.is_dir() or not path.exists():
        raise BadInput(f"{given}: no such file")
    return path


def snapshot(options: argparse.Namespace) -> int:
    """Write the cluster as it is to a file."""
    path = check_file("--file", options.file)
    taken = _read(options)
    try:
        path.write_bytes(msgspec.json.encode(taken) + b"\n")
    except OSError as error:
        raise BadInput(f"--file: {path} cannot be written: {error.strerror}") from error
    print(f"{path}: {len(taken.nodes)} nodes, {len(taken.pods)} pods, {len(taken.groups)} groups")
    return 0


def replay(path: Path, options: argparse.Namespace) -> int:
    """Decide a snapshot again; exit 1 if it is decided otherwise than when it was taken."""
    if options.config:
        raise BadInput("--config is for records of a node; a cluster snapshot has its own settings")
    taken = _load(path)
    again = decide(taken)
    same = msgspec.json.encode(again) == msgspec.json.encode(taken.verdicts)
    if options.output in DATA_FORMS:
        print_data({"same": same, "recorded": taken.verdicts, "decided": again}, options.output)
        return 0 if same else 1
    recorded = {v.gang: v for v in taken.verdicts}
    shown = [v for v in again if not options.diff or recorded.get(v.gang) != v]
    if shown:
        print_table(("gang", "outcome", "reason", "message"), [_verdict(v) for v in shown])
    print("decided as recorded" if same else "decided otherwise than recorded")
    return 0 if same else 1


def _verdict(verdict: Verdict) -> tuple[str, str, str, str]:
    text = verdict.message or ", ".join(f"{m.name} on {m.node}" for m in verdict.members)
    if verdict.victims:
        text = f"in place of {', '.join(verdict.victims)}"
    if verdict.surplus > 0:
        text += f"; {verdict.surplus} more members wait"
    return verdict.gang.replace("pod:", ""), verdict.outcome, verdict.reason, text


class _Loader(yaml.SafeLoader):
    """Times stay text, as Kubernetes has them."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def what_if(options: argparse.Namespace) -> int:
    """Exit 0 if everything asked about would start at once, 1 if not."""
    try:
        text = sys.stdin.read() if options.file == "-" else _bytes(_file(options.file)).decode()
        manifests = list(yaml.load_all(text, Loader=_Loader))
    except NOT_YAML as error:
        raise BadInput(f"{options.file}: not YAML: {' '.join(str(error).split())}") from error
    taken = _read(options)
    try:
        schedulers = taken.settings.schedulers
        pods, groups = pods_of(manifests, options.namespace or "default", schedulers, taken.taken, taken.classes)
    except BadInput as error:
        raise BadInput(f"{options.file}: {error}") from error
    verdicts = ask(taken, pods, groups)
    if options.output in DATA_FORMS:
        print_data(verdicts, options.output)
    else:
        print_table(("gang", "outcome", "reason", "message"), [_verdict(v) for v in verdicts])
    return 0 if all(v.outcome == "Start" and v.surplus <= 0 for v in verdicts) else 1


def explain_group(options: argparse.Namespace) -> int:
    """Why a PodGroup waits, and what would change that."""
    if len(options.workload) != 2:
        raise BadInput("explain podgroup: name one: colocate explain podgroup NAME [-n NAMESPACE]")
    key = f"{options.namespace or 'default'}/{options.workload[1]}"
    taken = _read(options)
    found = explain(taken, key)
    groups = {f"{g.metadata.namespace}/{g.metadata.name}": g for g in taken.groups}
    if found is None and key not in groups:
        raise BadInput(f"no PodGroup {key}; known: {', '.join(sorted(groups)) or 'none'}")
    if found is None:
        plan = next((p for p in taken.plans if f"{p.metadata.namespace}/{p.metadata.name}" == key), None)
        text = plan.status.message if plan is not None else groups[key].status.phase
        found = Explanation(Verdict(gang=key, outcome="Rest", message=text), 0, [], None)
    if options.output in DATA_FORMS:
        print_data(found, options.output)
    elif found.verdict.outcome == "Rest":
        print(f"{key} does not wait: {found.verdict.message}")
    else:
        _print_explanation(found, len(taken.verdicts))
    return 0


def _print_explanation(found: Explanation, waiting: int) -> None:
    verdict = found.verdict
    reason = f" ({verdict.reason})" if verdict.reason else ""
    print(f"{verdict.gang}: {verdict.outcome}{reason}, {found.position} of {waiting}")
    print(f"  {_verdict(verdict)[3]}")
    for change in found.counterfactuals:
        print(f"  it would start if {change.change}")
    if not found.fits_when_empty:
        print("  it would not fit even if everything else ended")
    elif found.estimate_seconds is not None:
        low, high = (format_duration(s) for s in found.estimate_seconds)
        if not found.estimate_seconds[0]:  # of the least nothing is known
            print(f"  as others end, it starts within {high}")
        else:
            print(f"  as others end, it starts in {low}" + (f" to {high}" if high != low else ""))
    elif verdict.outcome == "Wait" and verdict.reason == "Unschedulable":
        print("  when it starts is not known: too little is known of how long the others run")


def demo_gang(options: argparse.Namespace) -> int:
    """Exit 1 if a gang was started in part or a node was overcommitted."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    from podgroup.demo.gangs import GangDemo

    console, said = Console(stderr=True), ""
    with (
        tempfile.TemporaryDirectory(prefix="colocate-gang-") as directory,
        Live(console=console, transient=True) as live,
    ):

        def show(text: str, rows: list[tuple[str, str, str]]) -> None:
            nonlocal said
            if text != said:
                said = text
                console.print(f"* {text}")
            if console.is_terminal and rows:
                table = Table("gang", "nodes of its members", "where it stands")
                for row in rows:
                    table.add_row(*row)
                live.update(table)

        counted = GangDemo(Path(directory), show).run()
    if options.output in DATA_FORMS:
        print_data(counted, options.output)
    else:
        took = counted.pop("capacity_to_start_seconds")
        rows = [(name.replace("_", " "), str(value)) for name, value in counted.items()]
        rows += [(f"{gang}: from room to its last bind", f"{seconds:g} s") for gang, seconds in took.items()]
        print_table(("counted by an observer of its own", ""), rows)
    return 1 if counted["partial_gangs"] or counted["overcommitted_nodes"] else 0
