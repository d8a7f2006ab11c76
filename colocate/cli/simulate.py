"""colocate simulate and colocate reproduce: jobs on a simulated fleet, and other people's tables by our engines."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from colocate.cli.output import DATA_FORMS, check_file, end_status, print_data, print_table, status
from colocate.errors import BadInput
from colocate.simulate.compare import Conditions, Measured, Outcome, comparisons, known_policies, run_all, windows
from colocate.simulate.day import made_day
from colocate.simulate.fleet import too_large
from colocate.simulate.formats import MOST_ACROSS
from colocate.simulate.outages import Trouble
from colocate.simulate.paces import NO_MODEL, read_throughputs
from colocate.simulate.placement import Kinds, Nodes
from colocate.simulate.reproduce import TABLES, Table, reproduce
from colocate.simulate.scores import WHOLE
from colocate.simulate.traces import folder
from colocate.simulate.workloads import Fleet, Workload, check, read_fleet, read_jobs, read_nodes

HOUR = 3600.0
DEMO_NODES, DEMO_POLICIES = "100x8", ("native", "coscheduling", "packing", "shortest-first")


def reproduce_command(options: argparse.Namespace) -> int:
    """Exit 1 where a cell is not as it was published. Raises BadInput."""
    unknown = [name for name in options.tables if name not in TABLES]
    if unknown:
        raise BadInput(f"{unknown[0]!r} is no table; known: {', '.join(TABLES)}")
    where, found = folder(options.traces), list[Table]()
    for name in options.tables or TABLES:
        table = reproduce(name, where, status)
        end_status()
        if options.output not in DATA_FORMS:
            _print(table, every=options.cells)
        found.append(table)
    if options.output in DATA_FORMS:
        print_data([_data(table) for table in found], options.output)
    return int(any(table.passed < len(table.cells) for table in found))


def _print(table: Table, *, every: bool) -> None:
    good = "pass" if table.passed == len(table.cells) else "FAIL"
    print(f"{good}  {table.name}: {table.passed} of {len(table.cells)} cells, in {table.seconds:.1f} s")
    print(f"      {table.source}; {table.tolerance}")
    shown = [c for c in table.cells if every or not c.passed]
    if shown:
        rows = [
            (c.name, f"{c.published:.2f}", f"{c.ours:.2f}", "pass" if c.passed else "FAIL", c.detail) for c in shown
        ]
        print_table(("cell", "published", "ours", "", ""), rows)


def _data(table: Table) -> dict[str, object]:
    return {
        "table": table.name,
        "source": table.source,
        "tolerance": table.tolerance,
        "cells": len(table.cells),
        "passed": table.passed,
        "seconds": round(table.seconds, 3),
        "values": [
            {"cell": c.name, "published": round(c.published, 6), "ours": round(c.ours, 6), "passed": c.passed}
            for c in table.cells
        ],
    }


def named_policies(text: str) -> list[str]:
    """`native,packing`. Raises BadInput."""
    policies, known = [name.strip() for name in text.split(",") if name.strip()], known_policies()
    unknown = [name for name in policies if name not in known]
    if unknown or not policies:
        named = f"{unknown[0]!r} is no policy" if unknown else "name a policy"
        raise BadInput(f"--policy: {named}; known: {', '.join(known)}")
    if len(set(policies)) < len(policies):
        raise BadInput("--policy: a policy is named twice")
    return policies


def jobs_for(nodes: Nodes, file: str, window_jobs: int | None, measured: Measured | None = None) -> Workload:
    """The jobs of a trace, of which each fits these nodes when they are empty. Raises BadInput."""
    workload = read_jobs(Path(file), nodes, None if measured is None else measured.throughputs)
    check(nodes, workload, too_large)
    if window_jobs is not None and window_jobs > len(workload.where):
        raise BadInput(f"--window-jobs: {window_jobs} are more than the {len(workload.where)} jobs of {file}")
    return workload


def conditions_of(options: argparse.Namespace) -> Conditions:
    """--mtbf, what it costs to be stopped, and --gpu-watts. Raises BadInput."""
    given = {name: getattr(options, name) for name in ("mtbf", "repair", "checkpoint", "restart")}
    said = {name: value for name, value in given.items() if value is not None}
    if "repair" in said and "mtbf" not in said:
        raise BadInput("--repair: say with --mtbf how often a node fails")
    for name in ("mtbf", "checkpoint"):
        if said.get(name, 1.0) < 1.0:
            raise BadInput(f"--{name}: {said[name]:g} s are less than a second")
    trouble = Trouble(**said) if said else None
    if options.gpu_watts is None:
        return Conditions(trouble)
    try:
        idle, busy = (float(part) for part in options.gpu_watts.split(":"))
    except ValueError:
        idle, busy = math.nan, math.nan
    if not 0.0 <= idle <= busy < math.inf:
        raise BadInput(f"--gpu-watts: {options.gpu_watts!r} is not IDLE:BUSY, watts of a GPU, as in 30:250")
    return Conditions(trouble, (idle, busy))


def simulate_command(options: argparse.Namespace) -> int:
    """Exit 1 where jobs never start under some policy. Raises BadInput."""
    if options.from_cluster:
        return _of_cluster(options)
    for name, value in (("--what-if", options.what_if), ("--runs", options.runs)):
        if value:
            raise BadInput(f"{name} is about a cluster: name its snapshot with --from-cluster")
    if options.nodes is None or options.jobs is None:
        raise BadInput("--nodes and --jobs are needed, or --from-cluster")
    policies, conditions = named_policies(options.policy or "native,packing"), conditions_of(options)
    page = check_file("--file", options.file, [options.nodes, options.jobs]) if options.file else None
    fleet = read_fleet(options.nodes)
    nodes, measured = fleet.nodes, _measured(options, fleet)
    workload = jobs_for(nodes, options.jobs, options.window_jobs, measured)
    if measured is not None:
        if (workload.model == NO_MODEL).all():
            raise BadInput(f"--throughputs: no job of {options.jobs} says its model")
        workload = _shared(workload) if options.share_gpus else workload
        measured.paces(workload)  # what is wrong is said now
        conditions = conditions._replace(measured=measured)
    for level, name in enumerate(("rack", "block")):
        times = getattr(options, f"across_{name}s")
        if times is not None:
            workload = _slower_across(workload, level, name, times, getattr(nodes, name))
    if options.windows is not None and options.window_jobs is None:
        raise BadInput("--windows: say with --window-jobs how many jobs a window has")
    parts = windows(len(workload.where), options.windows or 10, options.window_jobs, options.seed)
    if options.window_jobs is not None and len(parts) < (options.windows or 10):
        print(f"only {len(parts)} different windows of {options.window_jobs} jobs are there", file=sys.stderr)
    began = time.perf_counter()
    outcomes = run_all(nodes, workload, policies, parts, options.seed, _say, options.workers, conditions)
    end_status()
    seconds = time.perf_counter() - began
    cards = [outcome.card(nodes) | {"first_job": outcome.window.first} for outcome in outcomes]
    compared = comparisons(cards, policies)
    data = {"nodes": len(nodes.gpus), "gpus": int(nodes.gpus.sum()), "seed": options.seed}
    data |= {"runs": cards, "comparisons": compared}
    if page is not None:
        about = f"{Path(options.jobs).name} on {data['nodes']} nodes with {data['gpus']} GPUs, seed {options.seed}"
        _write(page, about, data, outcomes)
    if options.output in DATA_FORMS:
        print_data(data, options.output)
    else:
        _print_cards(cards, compared, len(parts))
        rate = sum(card["decisions"] for card in cards) / max(seconds, 1e-9)
        print(f"{len(parts)} x {cards[0]['jobs']} jobs on {len(nodes.gpus)} nodes; {rate:,.0f} placements a second")
        if page is not None:
            print(f"report: {page.resolve()}")
    return int(any(card["never_started"] for card in cards))


def _measured(options: argparse.Namespace, fleet: Fleet) -> Measured | None:
    """--throughputs, for the GPUs of a fleet. Raises BadInput."""
    if options.throughputs is None:
        if options.share_gpus:
            raise BadInput("--share-gpus: what that costs says a table of throughputs: --throughputs")
        return None
    throughputs, with_gpus = read_throughputs(Path(options.throughputs)), fleet.nodes.gpus > 0
    if not with_gpus.any():
        raise BadInput("--throughputs: --nodes has no GPUs")
    for number in np.unique(fleet.nodes.model[with_gpus]):
        name, known = fleet.gpus[number] if number < len(fleet.gpus) else "", ", ".join(throughputs.gpus)
        if name not in throughputs.gpus:
            said = f"{name!r} is none of the GPUs" if name else "what its GPUs are is not said"
            mend = f"as in 64x8:{throughputs.gpus[0]}, or `gpu: {throughputs.gpus[0]}` of a group"
            raise BadInput(f"--nodes: {said}: {options.throughputs} has {known} ({mend})")
    return Measured(throughputs, fleet.gpus)


def _shared(workload: Workload) -> Workload:
    """Who has a model, one member and one GPU asks for half of it. Raises BadInput where nobody does."""
    kinds, work = workload.kinds, workload.work
    whole = (kinds.gpus == 1) & (kinds.gpu_milli == WHOLE)
    share = whole[work.kind] & (workload.model != NO_MODEL) & (work.members == 1)
    if not share.any():
        raise BadInput("--share-gpus: no job with a model has one member with one GPU")
    chosen = np.unique(work.kind[share])
    more = Kinds(*(np.concatenate([column, column[chosen]]) for column in kinds))
    more.gpu_milli[len(kinds.gpus) :] = WHOLE // 2
    kind = np.where(share, len(kinds.gpus) + np.searchsorted(chosen, work.kind), work.kind)
    return workload._replace(kinds=more, work=work._replace(kind=kind))


def _slower_across(workload: Workload, level: int, name: str, times: float, where: NDArray[np.int64]) -> Workload:
    """Every job with several members, across racks (0) or blocks (1) of them. Raises BadInput."""
    if not 1.0 <= times <= MOST_ACROSS:
        raise BadInput(
            f"--across-{name}s: {times:g} is not from 1 to {MOST_ACROSS:g}: so many times as long a job runs"
        )
    if (where == where[0]).all():
        text = f"--nodes has no {name}s: give its groups `{name}: N`, the nodes of one {name}"
        raise BadInput(f"--across-{name}s: {text}")
    across = workload.work.across.copy()
    across[:, level] = np.where(workload.work.members > 1, times, 1.0)
    if level == 0:
        across[:, 1] = across.max(axis=1)
    if (across[:, 0] > across[:, 1]).any():
        place = workload.where[int(np.argmax(across[:, 0] > across[:, 1]))]
        text = f"{times:g} is less than across racks, which those across blocks are, too ({place})"
        raise BadInput(f"--across-{name}s: {text}")
    return workload._replace(work=workload.work._replace(across=across))


def _of_cluster(options: argparse.Namespace) -> int:
    """Exit 1 where somebody never starts. Raises BadInput."""
    from colocate.simulate.from_cluster import Future, data, future, scenes

    for name in (*OF_TRACES, *CONDITIONS):
        if getattr(options, name) is not None:
            raise BadInput(f"--{name.replace('_', '-')}: not with --from-cluster")
    every, found = scenes(Path(options.from_cluster), options.what_if), list[Future]()
    # The controller goes by what is declared, where it is.
    ours = "ours-declared" if all(gang[3] is not None for gang in every[0].gangs) else "ours"
    policies, otherwise = named_policies(options.policy or ours), HOUR if options.runs is None else options.runs
    for scene in every:
        for policy in policies:
            found.append(future(scene, policy, otherwise, options.seed))
            _say(len(found), (1 + len(options.what_if)) * len(policies))
    end_status()
    never = any(at is None for one in found for _, at in one.starts)
    if options.output in DATA_FORMS:
        print_data([data(one) for one in found], options.output)
        return int(never)
    scene = every[0]
    unsaid = sum(gang[3] is None for gang in scene.gangs)
    waiting = len(found[0].starts)
    print(f"{len(scene.nodes.gpus)} nodes, {len(scene.gangs) - waiting} jobs run, {waiting} wait")
    if unsaid:
        print(f"{unsaid} do not declare how long they run (colocate.io/expected-runtime-seconds): {otherwise:,.0f} s")
    names = [*dict.fromkeys(name for one in found for name, _ in one.starts)]
    heads = [f"{one.scene.name}, {one.policy}" if len(policies) > 1 else one.scene.name for one in found]
    by_name = [dict(one.starts) for one in found]
    print_table(("starts in", *heads), [(n, *(_start(of, n) for of in by_name)) for n in names])
    return int(never)


def _start(starts: Mapping[str, float | None], name: str) -> str:
    if name not in starts:
        return "-"
    at = starts[name]
    return "never" if at is None else "now" if at == 0.0 else f"{at:,.0f} s"


def _say(done: int, of: int) -> None:
    status(f"{done} of {of} simulations")


OF_PACES = ("across_racks", "across_blocks", "throughputs", "share_gpus")
OF_TRACES = ("nodes", "jobs", "window_jobs", "windows", "file", *OF_PACES)
"""Options that are about a trace, not a cluster."""
CONDITIONS = ("mtbf", "repair", "checkpoint", "restart", "gpu_watts")
"""Options of simulate and sweep."""


WAITS = {
    "size": ("GPUs", "By the GPUs of all members of a job."),
    "priority": ("priority", "By the priority of a job."),
}
"""What waits are told by: its name, and a note."""


class Column(NamedTuple):
    """Of the report card."""

    head: str
    keys: tuple[str, ...]
    form: Callable[[float], str]


def _seconds(value: float) -> str:
    return f"{value:,.0f} s"


def _share(value: float) -> str:
    return f"{value:.1%}"


COLUMNS = (
    Column("JCT mean", ("jct_seconds", "mean"), _seconds),
    Column("p50", ("jct_seconds", "p50"), _seconds),
    Column("p99", ("jct_seconds", "p99"), _seconds),
    Column("wait mean", ("wait_seconds", "mean"), _seconds),
    Column("p99", ("wait_seconds", "p99"), _seconds),
    Column("slowdown", ("bounded_slowdown", "mean"), lambda value: f"{value:,.1f}"),
    Column("GPUs allocated", ("gpu_allocation",), _share),
    Column("effective", ("gpu_effective",), _share),
    Column("held idle", ("gpu_held_idle",), _share),
    Column("free, others wait", ("gpu_idle_while_waiting",), _share),
    Column("restarts", ("restarts",), lambda value: f"{value:,.0f}"),
    Column("work redone", ("work_redone",), _share),
    Column("GPU energy", ("gpu_kwh",), lambda value: f"{value:,.0f} kWh"),
)


def card_table(cards: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads, and one row a policy, of several windows the means."""
    columns = [column for column in COLUMNS if column.keys[0] in cards[0]]
    rows = []
    for policy in dict.fromkeys(card["policy"] for card in cards):
        mine, row = [card for card in cards if card["policy"] == policy], [policy]
        for column in columns:
            values = [card[column.keys[0]] for card in mine]
            values = [value[column.keys[1]] for value in values] if len(column.keys) > 1 else values
            known = [value for value in values if value is not None]
            row.append(column.form(sum(known) / len(known)) if known else "-")
        rows.append((*row, str(sum(card["never_started"] for card in mine))))
    return ("policy", *(column.head for column in columns), "never"), rows


def _wait_rows(cards: list[dict[str, Any]], by: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Mean waits by `size` or `priority` of jobs, a column a policy."""
    key = f"wait_seconds_by_{by}"
    policies = list(dict.fromkeys(card["policy"] for card in cards))
    rows = []
    for size in dict.fromkeys(size for card in cards for size in card[key]):
        row = [size]
        for policy in policies:
            means = [card[key].get(size, {}).get("mean") for card in cards if card["policy"] == policy]
            known = [value for value in means if value is not None]
            row.append(f"{sum(known) / len(known):,.0f} s" if known else "-")
        rows.append(tuple(row))
    return (f"mean wait by {WAITS[by][0]}", *policies), rows


def _told_by(cards: list[dict[str, Any]]) -> list[str]:
    return [by for by in WAITS if f"wait_seconds_by_{by}" in cards[0]]


def comparison_texts(compared: list[dict[str, Any]]) -> list[str]:
    """A line for each policy beside the first."""
    texts = []
    for one in compared:
        jct, names = one["jct"], (one["policy"], one["beside"])
        if jct is None:
            texts.append(f"{names[0]} is not compared with {names[1]}: jobs never start")
            continue
        ratio = f"{jct['ratio']:.3f} [{jct['low']:.3f}, {jct['high']:.3f}]"
        of = f"geometric mean of {one['windows']} windows"
        texts.append(f"{names[0]}: {ratio} times the mean completion time of {names[1]}: {of}")
    return texts


def _print_cards(cards: list[dict[str, Any]], compared: list[dict[str, Any]], parts: int) -> None:
    print_table(*card_table(cards), title=f"means of {parts} windows" if parts > 1 else "")
    for by in _told_by(cards):
        print()
        print_table(*_wait_rows(cards, by))
    for text in comparison_texts(compared):
        print(text)


def _write(
    page: Path,
    about: str,
    data: dict[str, Any],
    outcomes: Sequence[Outcome],
) -> None:
    from colocate.report.charts import Series, line_chart
    from colocate.simulate.page import PageTable, write_page

    cards, compared, known = data["runs"], data["comparisons"], known_policies()
    tables = [PageTable("Policies", *card_table(cards), "Simulated. GPUs are told from the first arrival to the last.")]
    tables += [PageTable("Who waits", *_wait_rows(cards, by), WAITS[by][1]) for by in _told_by(cards)]
    tables.append(
        PageTable(
            "What the policies are",
            ("policy", ""),
            [(n, known[n]) for n in dict.fromkeys(c["policy"] for c in cards)],
        )
    )
    first = outcomes[0].window
    lines = [Series(o.policy, o.timeline()) for o in outcomes if o.window == first]
    charts = []
    # When jobs stood, grew or shrank is not told.
    told = not any(o.run.restarts or (o.work.work.least < o.work.work.members).any() for o in outcomes)
    if data["gpus"] and told:
        charts.append((line_chart("GPUs of jobs that run", lines, "hours", "GPUs"), "Of the first window."))
    write_page(page, "A fleet, simulated", about, "; ".join(comparison_texts(compared)), tables, charts)


def demo(options: argparse.Namespace) -> int:
    """A made-up day of a fleet under four policies. Raises BadInput."""
    page, nodes = check_file("--report", options.report), read_nodes(DEMO_NODES)
    workload = made_day(int(nodes.gpus.sum()), options.seed)
    print(f"SIMULATED: a day of {len(workload.where)} made-up jobs on {DEMO_NODES} GPUs", file=sys.stderr)
    parts = windows(len(workload.where), 1, None, options.seed)
    outcomes = run_all(nodes, workload, DEMO_POLICIES, parts, options.seed, _say)
    end_status()
    cards = [outcome.card(nodes) for outcome in outcomes]
    data = {"nodes": len(nodes.gpus), "gpus": int(nodes.gpus.sum()), "seed": options.seed}
    data |= {"runs": cards, "comparisons": []}
    about = f"SIMULATED: {len(workload.where)} made-up jobs on {DEMO_NODES} GPUs, seed {options.seed}"
    _write(page, about, data, outcomes)
    if options.output in DATA_FORMS:
        print_data(data, options.output)
        return 0
    _print_cards(cards, [], 1)
    print(f"report: {page.resolve()}")
    return 0
