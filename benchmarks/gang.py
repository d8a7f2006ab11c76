"""Gang scheduling: how fast it decides, binds and drains, beside kube-scheduler and coscheduling.

What needs no API server is in `gang_decide`; each run on one is in `gang_live`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from math import ceil
from statistics import median
from typing import Any

from benchmarks import gang_decide, gang_live
from benchmarks.common import Runs, bar, reference_loop
from colocate.errors import HostUnfit
from colocate.localcluster.controlplane import ControlPlane
from colocate.model.statistics import ratio_interval

ROUNDS = 4
OURS, KUBE, COSCHEDULING = gang_live.OURS, "kube-scheduler", "coscheduling"
BARS = {
    "queue_share": 0.10,
    "memory_mib": 400.0,
    "capacity_seconds": 1.0,
    "drain_seconds": 16.5,
}
RATIOS = (("binds_per_second", 1.5, True), ("cpu_per_pod_ms", 1.0, False), ("api_cpu_per_pod_ms", 1.0, False))
"""What is compared with kube-scheduler's, the bound, and whether it is the least."""
QUEUE_PODS, MANY_NODES, MANY_PODS = 15_000, 5000, 20_000
SHAPES = {"10000x1": (10_000, 1), "500x20": (500, 20), "20x500": (20, 500), "1x10000": (1, 10_000)}
"""How many gangs, of how many pods each."""
Measure = Callable[[gang_live.Live, ControlPlane], Awaitable[dict[str, Any]]]


def _plan(full: bool) -> Iterator[tuple[dict[str, Any], Measure]]:
    """Every run on an API server: what it is called, and what is done; the order of the two alternates.

    In full two or three hours; else a fifth of the pods, and no runs from a scheduler's start, half an hour.
    """
    scale, rounds, kinds = (1, ROUNDS, ("waiting", "burst")) if full else (5, 3, ("burst",))
    measures = {"waiting": gang_live.waiting, "burst": gang_live.burst}
    one = {"round": 0, "scale": scale}
    yield {"kind": "queue", **one}, partial(gang_live.long_queue, count=QUEUE_PODS // scale)
    yield {"kind": "memory", **one}, partial(gang_live.memory, nodes=MANY_NODES // scale, pods=MANY_PODS // scale)
    for round_ in range(rounds):
        turn = 1 if round_ % 2 == 0 else -1
        for by in (OURS, COSCHEDULING)[::turn]:
            yield {"kind": "capacity", "by": by, "round": round_}, partial(gang_live.capacity, kind=by)
            yield {"kind": "drain", "by": by, "round": round_}, partial(gang_live.drain, kind=by)
        for shape, (many, size) in SHAPES.items():
            jobs = [(f"j{i}", size if many >= scale else size // scale) for i in range(max(many // scale, 1))]
            for kind, measure in ((kind, measures[kind]) for kind in kinds):
                for by in (OURS, KUBE)[::turn]:
                    key = {"kind": kind, "shape": shape, "by": by, "round": round_, "scale": scale}
                    yield key, partial(measure, kind=by, jobs=jobs)


async def _on_api_server(runs: Runs, full: bool) -> None:
    for key, measure in _plan(full):
        if not runs.has(**key):
            print("gang:", *key.values(), file=sys.stderr, flush=True)
            async with gang_live.fresh() as (live, plane):
                try:
                    found = await measure(live, plane)
                except HostUnfit as error:
                    if not error.mend:
                        found = {"failed": str(error)}  # a finding, of whichever scheduler
                    else:
                        raise
            runs.add(**key, reference=reference_loop(), **found)


def decided() -> Runs:
    """The rounds of the part that needs no API server; those that are missing are run."""
    runs = Runs("gang-decide")
    for round_ in range(ROUNDS):
        if not runs.has(round=round_):
            print("gang: decide, round", round_ + 1, file=sys.stderr, flush=True)
            runs.add(round=round_, reference=reference_loop(), **gang_decide.measure(round_))
    return runs


def worst_decided() -> dict[str, float]:
    """Each figure, the worst of all rounds."""
    rounds = [r for r in decided().runs if "round" in r]
    return {
        name: (min if name in gang_decide.MORE_IS_BETTER else max)(r[name] for r in rounds) for name in gang_decide.BARS
    }


def summary_decided() -> list[str]:
    """A line a figure."""
    return [
        _line(f"gang, decide: {name}", value, gang_decide.BARS[name], "", least=name in gang_decide.MORE_IS_BETTER)
        for name, value in worst_decided().items()
    ]


def run(full: bool) -> list[str]:
    """Run what is missing; the summary."""
    lines = summary_decided()
    runs = Runs("gang")
    try:
        asyncio.run(_on_api_server(runs, full))
    except HostUnfit as error:
        lines.append(f"          gang, on an API server: did not run to its end: {str(error).splitlines()[0]}")
    return lines + summary(runs)


def summary(runs: Runs) -> list[str]:
    """Medians and ratios round by round, ours beside another scheduler in the same run."""
    lines = _summary_of_ours(runs)
    for kind in ("capacity", "drain"):
        for by in (OURS, COSCHEDULING):
            lines += _beside_coscheduling(runs, kind, by)
    for kind in ("waiting", "burst"):
        for shape in SHAPES:
            for scale in sorted({r["scale"] for r in runs.runs if r.get("kind") == kind}):
                lines += _beside_kube(runs, {"kind": kind, "shape": shape, "scale": scale})
    return lines


def _summary_of_ours(runs: Runs) -> list[str]:
    lines = []
    waits = sorted(s for r in runs.runs if _is(r, kind="capacity", by=OURS) for s in r.get("seconds", ()))
    if waits:
        name = f"gang, capacity free to last bind of {gang_live.CAPACITY_GANG}: p99 of {len(waits)}"
        lines.append(_line(name, waits[max(ceil(0.99 * len(waits)) - 1, 0)], BARS["capacity_seconds"], "s"))
    for run in (r for r in runs.runs if r.get("kind") == "queue" and "seconds" in r):
        count = QUEUE_PODS // run["scale"]
        name = f"gang, {count} one-pod workloads at {count / run['seconds']:.0f}/s: share of deciding"
        lines.append(_line(name, run["share"], BARS["queue_share"], ""))
    for run in (r for r in runs.runs if r.get("kind") == "memory" and "rss_mib" in r):
        name = f"gang, {MANY_NODES // run['scale']} nodes and {MANY_PODS // run['scale']} pods: resident memory"
        lines.append(_line(name, run["rss_mib"], BARS["memory_mib"], "MiB"))
    drains = [r["seconds"] for r in runs.runs if _is(r, kind="drain", by=OURS) and "seconds" in r]
    if drains:
        name = f"gang, {gang_live.DRAINED} gangs of {gang_live.DRAINED_SIZE} that compete: all have run, worst round"
        lines.append(_line(name, max(drains), BARS["drain_seconds"], "s"))
    failed = [r for r in runs.runs if "failed" in r and r.get("by", OURS) == OURS]
    return [*lines, *(f"fail      gang, {r['kind']} {r.get('shape', '')}: {r['failed']}" for r in failed)]


def _beside_coscheduling(runs: Runs, kind: str, by: str) -> list[str]:
    rows = [r for r in runs.runs if _is(r, kind=kind, by=by)]
    failed = sum("failed" in r for r in rows)
    rows = [r for r in rows if "failed" not in r]
    lost = f", {failed} rounds did not end" if failed else ""
    if kind == "capacity":
        waits = sorted(s for r in rows for s in r["seconds"])
        spread = [s for r in rows for s in r["spread_seconds"]]
        if not waits:
            return []
        said = f"median {median(waits) * 1e3:.0f} ms, worst {waits[-1] * 1e3:.0f} ms"
        said += f", first to last bind {median(spread) * 1e3:.0f} ms"
    elif rows:
        said = f"{', '.join(format(r['seconds'], '.1f') for r in rows)} s"
        said += f", in vain free for {median(r['idle_gang_seconds'] for r in rows):.1f} gang-seconds"
    else:
        said = "nothing ended"
    return [f"          gang, {kind}: {by}: {said}{lost}"]


def _beside_kube(runs: Runs, key: dict[str, Any]) -> list[str]:
    found = {(r["by"], r["round"]): r for r in runs.runs if _is(r, **key) and "failed" not in r}
    pairs = [(r, found[KUBE, round_]) for (by, round_), r in found.items() if by == OURS and (KUBE, round_) in found]
    name, lines = f"gang, {key['kind']} {key['shape']}, 1/{key['scale']}", []
    lost = sum(_is(r, by=OURS, **key) and "failed" in r for r in runs.runs)
    for kind in (OURS, KUBE):
        mine = [r for (by, _), r in found.items() if by == kind]
        if mine:
            said = f"{median(r['binds_per_second'] for r in mine):.0f} binds/s"
            said += f", CPU of a pod {median(r['cpu_per_pod_ms'] for r in mine):.2f} ms, the API server's "
            said += f"{median(r['api_cpu_per_pod_ms'] for r in mine):.2f} ms, "
            said += f"{median(r['events'] for r in mine):.0f} Events"
            lines.append(f"          {name}: {kind}: {said}")
    if len(pairs) > 2:  # two rounds have no interval worth the name
        for field, bound, least in RATIOS:
            ratio = ratio_interval([ours[field] for ours, _ in pairs], [theirs[field] for _, theirs in pairs])
            good, bad = ratio.low >= bound, ratio.high < bound
            if not least:
                good, bad = ratio.high <= bound, ratio.low > bound
            judged = "fail" if bad or lost else "pass" if good else "undecided"
            lines.append(bar(f"{name}: {field} to kube-scheduler's", judged, ratio, bound))
    return lines


def _is(run: dict[str, Any], **key: Any) -> bool:
    return all(run.get(k) == v for k, v in key.items())


def _line(name: str, value: float, bound: float, unit: str, *, least: bool = False) -> str:
    good = value >= bound if least else value <= bound
    return bar(name, "pass" if good else "fail", value, bound, unit)
