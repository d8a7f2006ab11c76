"""queue, explain podgroup, what-if, snapshot, replay, demo gang: the commands about a cluster."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import msgspec
import yaml

from colocate.cli.output import DATA_FORMS, check_file, print_data, print_table
from colocate.errors import BadInput
from colocate.kube.client import (
    ATTACHMENTS,
    BUDGETS,
    CLAIMS,
    CLASSES,
    CSI_DRIVERS,
    CSI_NODES,
    EVENTS,
    LEASES,
    NAMESPACES,
    NODES,
    PODS,
    STORAGE_CAPACITIES,
    STORAGE_CLASSES,
    VOLUMES,
    Api,
    ApiError,
    age_of,
    path_of,
)
from colocate.objects import (
    EVICTED,
    Claim,
    CsiDriver,
    CsiNode,
    CsiStorageCapacity,
    DisruptionBudget,
    Event,
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
from podgroup.api import LEASE, ORDER, PLANS, POWER_BUDGETS, SCHEDULERS, Advice, GangPlan, PowerBudget
from podgroup.controller.binder import now_text
from podgroup.dialects.scheduling_sigs import DIALECT
from podgroup.explain.losses import EvictedMember, evicted, held_back
from podgroup.explain.manifests import Manifest, pods_of
from podgroup.explain.snapshot import (
    KIND,
    VERSION,
    ClusterSnapshot,
    Explanation,
    Outcome,
    Verdict,
    decide,
    explain,
    load,
)
from podgroup.explain.snapshot import what_if as ask
from podgroup.policy import POLICIES
from podgroup.queue.entry import Settings
from podgroup.state.gangs import gang_key
from podgroup.state.node_budgets import of_power_budget

ADVICE_ATTEMPTS = 25
"""Of a fifth of a second: who has just begun to wait is advised soon."""
NOT_YAML = (yaml.YAMLError, ValueError, AttributeError, RecursionError)
"""What the parser raises for a text that is none."""
MOST_EVICTED = 5
T = TypeVar("T")


def queue(options: argparse.Namespace) -> int:
    """The gangs that wait, in their order."""
    return asyncio.run(_queue(options))


async def _queue(options: argparse.Namespace) -> int:
    async with Api.connect(options.kubeconfig, options.context) as api:
        namespace = "" if options.all_namespaces else options.namespace or api.namespace
        plans = await api.all(GangPlan, path_of(PLANS, namespace) if namespace else PLANS)
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
            format_duration(age_of(p.status.waiting_since)) if p.status.waiting_since else "-",
            _starts(p.status.advice),
            p.status.reason,
            p.status.message,
        )
        for p in waiting
    ]
    print_table(("position", "namespace", "podgroup", "waiting", "starts", "reason", "message"), rows)
    if not rows and namespace:
        print(f"no gang waits in namespace {namespace}; -A asks about all", file=sys.stderr)
    return 0


def _starts(advice: Advice | None) -> str:
    """When a gang may start, as of now."""
    if advice is not None and not advice.fits_when_empty:
        return "never"
    if advice is None or advice.estimate_seconds is None:
        return "-"
    age = age_of(advice.given) if advice.given else 0.0
    low, high = (format_duration(max(seconds - age, 0.0)) for seconds in advice.estimate_seconds)
    return high if low == high else f"{low} to {high}"


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


async def _settings(api: Api, options: argparse.Namespace) -> Settings:
    """The names whose pods are decided, and by which policy: what was said, or what the controller's lease says."""
    try:
        said = (await api.get(Lease, path_of(LEASES, *LEASE))).metadata.annotations
    except ApiError:  # it has none yet, or one may not look
        said = {}
    names = (options.scheduler_name,) if options.scheduler_name else said.get(SCHEDULERS, "").split(",")
    policy = said.get(ORDER, "")
    return Settings(
        schedulers=tuple(filter(None, names)) or Settings().schedulers,
        policy=policy if policy in POLICIES else Settings().policy,  # of a newer controller: as near as we come
    )


async def _take(api: Api, settings: Settings) -> ClusterSnapshot:
    """The cluster as it is now, and what the next cycle decides on it."""
    taken = now_text()

    async def every(kind: type[T], path: str) -> list[T]:
        try:
            return await api.all(kind, path)
        except ApiError as error:
            if error.status == 404 and path in (DIALECT.groups.path, PLANS, POWER_BUDGETS):
                return []  # the custom resources are not installed
            raise

    nodes, pods, groups, plans = (
        await every(Node, NODES),
        await every(Pod, PODS),
        [DIALECT.group(written) for written in await every(DIALECT.groups.kind, DIALECT.groups.path)],
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
        node_budgets=[of_power_budget(budget) for budget in await every(PowerBudget, POWER_BUDGETS)],
        classes=await every(PriorityClass, CLASSES),
    )
    return msgspec.structs.replace(snapshot, verdicts=decide(snapshot))


def _read(options: argparse.Namespace) -> tuple[ClusterSnapshot, str]:
    """--snapshot, or the live cluster; and the namespace that is meant."""
    if options.snapshot:
        return _load(_file(options.snapshot)), options.namespace or "default"

    async def live() -> tuple[ClusterSnapshot, str]:
        async with Api.connect(options.kubeconfig, options.context) as api:
            return await _take(api, await _settings(api, options)), options.namespace or api.namespace

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
    taken = _of_controller(options.controller) if options.controller else _read(options)[0]
    try:
        path.write_bytes(msgspec.json.encode(taken) + b"\n")
    except OSError as error:
        raise BadInput(f"--file: {path} cannot be written: {error.strerror}") from error
    print(f"{path}: {len(taken.nodes)} nodes, {len(taken.pods)} pods, {len(taken.groups)} groups")
    return 0


def _of_controller(url: str) -> ClusterSnapshot:
    async def fetch() -> bytes:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60.0)) as session:
            answer = await session.get(f"{url.rstrip('/')}/snapshot")
            content = await answer.read()
            if answer.status != 200:
                raise BadInput(f"--from {url}: {answer.status} {content.decode(errors='replace').strip()}")
            return content

    try:
        return load(asyncio.run(fetch()))
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise BadInput(f"--from {url} does not answer: {error or type(error).__name__}") from error


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
    manifests = [one for file in options.file for one in _manifests(file)]
    taken, namespace = _read(options)
    asked = pods_of(manifests, namespace, taken.settings.schedulers, taken.taken, taken.classes)
    for text in asked.passed_over:
        print(text, file=sys.stderr)
    verdicts = ask(taken, asked.pods, asked.groups, asked.claims)
    if options.output in DATA_FORMS:
        print_data(verdicts, options.output)
    else:
        print_table(("gang", "outcome", "reason", "message"), [_verdict(v) for v in verdicts])
    return 0 if all(v.outcome == "Start" and v.surplus <= 0 for v in verdicts) else 1


def _manifests(given: str) -> list[Manifest]:
    """The documents of a file, of standard input, or of the YAML files of a folder, as kubectl reads them."""
    if given == "-":
        return _documents("standard input", sys.stdin.read())
    if Path(given).is_dir():
        files = sorted(f for f in Path(given).iterdir() if f.suffix in (".yaml", ".yml", ".json"))
        if not files:
            raise BadInput(f"{given}: no .yaml, .yml or .json file is in this folder")
        return [one for file in files for one in _manifests(str(file))]
    try:
        text = _bytes(_file(given)).decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"{given}: not YAML: {error}") from error
    return _documents(given, text)


def _documents(where: str, text: str) -> list[Manifest]:
    try:
        return [Manifest(where, i + 1, one) for i, one in enumerate(yaml.load_all(text, Loader=_Loader))]
    except NOT_YAML as error:
        raise BadInput(f"{where}: not YAML: {' '.join(str(error).split())}") from error


def explain_group(options: argparse.Namespace) -> int:
    """Why a PodGroup waits, and what would change that: as the controller says, or decided anew."""
    if len(options.workload) != 2:
        raise BadInput("explain podgroup: name one: colocate explain podgroup NAME [-n NAMESPACE]")
    name = options.workload[1]
    said = None if options.snapshot or options.anew else asyncio.run(_said(options, name))
    key, found = said if said is not None else _decided_anew(options, name)
    if not options.snapshot:
        found = msgspec.structs.replace(found, evicted=asyncio.run(_evicted(options, key)))
    if options.output in DATA_FORMS:
        print_data(found, options.output)
    else:
        if found.verdict.outcome == "Rest":
            print(f"{key} does not wait: {found.verdict.message}")
        else:
            _print_explanation(found)
        _print_losses(found)
    return 0


async def _evicted(options: argparse.Namespace, key: str) -> list[EvictedMember]:
    """The members that had to go for services, by one's own namespace; who may not see its Events is told that."""
    namespace, _, name = key.partition("/")
    async with Api.connect(options.kubeconfig, options.context) as api:
        try:
            group = await api.get(DIALECT.groups.kind, path_of(DIALECT.groups.path, namespace, name))
            about = {"fieldSelector": f"involvedObject.uid={group.metadata.uid},reason={EVICTED}"}
            return evicted(await api.all(Event, path_of(EVENTS, namespace), about))
        except ApiError as error:
            if error.status not in (403, 404):
                raise
            if error.status == 403:
                print(f"who had to go is not known: {error}", file=sys.stderr)
            return []


def _print_losses(found: Explanation) -> None:
    for member in found.held_back:
        since = f" since {member.since}" if member.since else ""
        print(f"  {member.pod} on {member.node} is held back{since} ({member.reason}): {member.message}")
    for gone in found.evicted[:MOST_EVICTED]:
        print(f"  {gone.at or 'some time ago'} evicted: {gone.message}")
    if len(found.evicted) > MOST_EVICTED:
        print(f"  and {len(found.evicted) - MOST_EVICTED} evictions before")


async def _said(options: argparse.Namespace, name: str) -> tuple[str, Explanation] | None:
    """What the controller says in the gang's plan, for which one's own namespace is enough; None if it says nothing."""
    async with Api.connect(options.kubeconfig, options.context) as api:
        namespace = options.namespace or api.namespace
        groups = {g.metadata.name for g in await api.all(DIALECT.groups.kind, path_of(DIALECT.groups.path, namespace))}
        if name not in groups:
            raise BadInput(f"no PodGroup {namespace}/{name}; known: {', '.join(sorted(groups)) or 'none'}")
        status = None
        for _ in range(ADVICE_ATTEMPTS):
            try:
                status = (await api.get(GangPlan, path_of(PLANS, namespace, name))).status
            except ApiError as error:
                if error.status != 404:
                    raise
            if status is not None and (status.reason != "Unschedulable" or status.advice is not None):
                break
            await asyncio.sleep(0.2)
        key = f"{namespace}/{name}"
        pods = [p for p in await api.all(Pod, path_of(PODS, namespace)) if gang_key(p) == key]
        if status is None or not status.reason:
            foreign = await _foreign(api, options, pods)
            rest = Verdict(gang=key, outcome="Rest", message=foreign)
            found = Explanation(verdict=rest, position=0, advice=None, held_back=held_back(pods, key))
            return (key, found) if foreign else None
    outcome: Outcome = "Preempt" if status.reason == "WaitingForPreemption" else "Wait" if status.waits else "Rest"
    verdict = Verdict(gang=key, outcome=outcome, reason=status.reason, message=status.message)
    held = held_back(pods, key)
    return key, Explanation(verdict=verdict, position=status.position, advice=status.advice, held_back=held)


async def _foreign(api: Api, options: argparse.Namespace, pods: list[Pod]) -> str:
    """Whose the pods of a gang are, if they all are another scheduler's."""
    names, ours = {p.spec.scheduler_name for p in pods}, (await _settings(api, options)).schedulers
    if not names or names & set(ours):
        return ""
    return f"its pods have schedulerName {', '.join(sorted(names))}; ours: {', '.join(ours)}"


def _decided_anew(options: argparse.Namespace, name: str) -> tuple[str, Explanation]:
    taken, namespace = _read(options)
    key = f"{namespace}/{name}"
    found = explain(taken, key)
    groups = {f"{g.metadata.namespace}/{g.metadata.name}": g for g in taken.groups}
    if found is None and key not in groups:
        raise BadInput(f"no PodGroup {key}; known: {', '.join(sorted(groups)) or 'none'}")
    if found is None:
        plan = next((p for p in taken.plans if f"{p.metadata.namespace}/{p.metadata.name}" == key), None)
        text = plan.status.message if plan is not None else groups[key].status.phase
        found = Explanation(verdict=Verdict(gang=key, outcome="Rest", message=text), position=0, advice=None)
    return key, msgspec.structs.replace(found, held_back=held_back(taken.pods, key))


def _print_explanation(found: Explanation) -> None:
    verdict, advice = found.verdict, found.advice
    reason = f" ({verdict.reason})" if verdict.reason else ""
    print(f"{verdict.gang}: {verdict.outcome}{reason}" + (f", position {found.position}" if found.position else ""))
    print(f"  {_verdict(verdict)[3]}")
    if advice is None:
        if verdict.reason == "Unschedulable":
            print("  what would let it start has not been worked out yet: --anew does that from the whole cluster")
        return
    for change in advice.counterfactuals:
        print(f"  it would start if {change.change}")
    if not advice.fits_when_empty:
        print("  it would not fit even if everything else ended")
    elif advice.estimate_seconds is None:
        print("  when it starts is not known: too little is known of how long the others run")
    elif not advice.estimate_seconds[0]:  # of the least nothing is known
        print(f"  as others end, it starts within {format_duration(advice.estimate_seconds[1])}")
    else:
        print(f"  as others end, it starts in {_starts(advice)}")


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
