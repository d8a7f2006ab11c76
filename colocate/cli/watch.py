"""top, explain, status: what a running agent says of itself."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from datetime import datetime
from importlib.metadata import entry_points
from typing import Any

from colocate.cli import cards
from colocate.cli.host import socket_path
from colocate.cli.output import DATA_FORMS, print_data, print_table
from colocate.errors import BadInput, NotAnswering
from colocate.jobs.client import Connection
from colocate.units import format_bytes, format_duration

FROM_AFAR_SECONDS = 5.0


def ask_agent(options: argparse.Namespace, op: str) -> dict[str, Any]:
    """The answer of this node's agent, or of another's. Raises NotAnswering, BadInput."""
    if options.node:
        from colocate.cli.remote import answer_of

        return dict(answer_of(options, op))
    connection = Connection(socket_path(options))
    try:
        return connection.ask(op=op)
    finally:
        connection.close()


def status(options: argparse.Namespace) -> int:
    """Exit 0 if an agent answers, 1 if not."""
    data = ask_agent(options, "status")
    if options.output in DATA_FORMS:
        print_data(data, options.output)
        return 0
    rows = [
        (k.replace("_", " "), f"{v:.1f}" if isinstance(v, float) else str(v))
        for k, v in data.items()
        if k != "problems"
    ]
    print_table(("agent", ""), rows)
    for problem in data["problems"].values():
        print(f"problem: {problem}")
    return 0


def _rows(data: dict[str, Any], wide: bool) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    forecasts = data["forecast"].get("workloads", {})
    order = {"service": 0, "besteffort": 1, "batch": 2}
    workloads = sorted(data["snapshot"].get("workloads", {}).values(), key=lambda w: (order[w["tier"]], w["id"]))
    for workload in workloads:
        now = forecasts.get(workload["id"], {})
        p99 = now.get("p99_seconds")
        slack = now.get("slack")
        waiting = now.get("cpu_waiting_ratio")
        memory = workload.get("working_set_bytes")
        rows.append(
            (
                workload["name"],
                workload["tier"],
                f"{now['usage_cores']:.2f}" if "usage_cores" in now else "-",
                f"{now['peak_cores']:.2f}" if "peak_cores" in now else "-",
                format_bytes(memory) if memory is not None else "-",
                f"{waiting:.1%}" if waiting is not None else "-",
                format_duration(p99) if p99 is not None else "-",
                f"{slack:.0%}" if slack is not None else "-",
                *(_more(workload, now) if wide else ()),
                "frozen" if workload.get("frozen") else "",
            )
        )
    return rows


def _more(workload: dict[str, Any], now: dict[str, Any]) -> tuple[str, ...]:
    """The cells of -o wide."""
    knobs = workload.get("knobs", {})
    stalls = now.get("memory_pressure_ratio")
    return (
        f"{stalls:.1%}" if stalls is not None else "-",
        str(now.get("window_requests", "-")),
        knobs.get("cpu.weight", "-"),
        knobs.get("cpu.max", "-"),
        knobs.get("cpuset.cpus", "-"),
        knobs.get("memory.high", knobs.get("memory.max", "-")),
        workload["path"],
    )


def _columns(wide: bool) -> tuple[str, ...]:
    more = ("stalls", "requests", "weight", "cpu.max", "cpus", "memory limit", "cgroup") if wide else ()
    return ("workload", "tier", "cores", "peak", "memory", "waits", "p99", "slack", *more, "")


def _laws(data: dict[str, Any]) -> list[tuple[str, ...]]:
    return [(v["law"], v["state"], v["reason"], v["message"]) for v in data["plan"]["verdicts"]]


def top(options: argparse.Namespace) -> int:
    """Live on a terminal; once elsewhere."""
    data = _first(options)
    if options.output in DATA_FORMS:
        print_data(data, options.output)
        return 0
    wide = options.output == "wide"
    if options.once or not sys.stdout.isatty():
        _print_top(data, wide)
        return 0
    from rich.console import Group
    from rich.live import Live
    from rich.table import Table

    def draw(now: dict[str, Any]) -> Group:
        seen = now["forecast"]
        head = (
            f"node {seen['node_cores']:g} CPUs: services {seen.get('services_cores', 0):.2f}, BestEffort "
            f"{seen.get('besteffort_cores', 0):.2f}, batch {seen.get('batch_cores', 0):.2f}, idle "
            f"{seen.get('idle_cores') or 0:.2f}   tick {now['snapshot']['sequence']} {now['tick_seconds'] * 1e3:.1f} ms"
        )
        table, laws = Table(), Table()
        for column in _columns(wide):
            table.add_column(column)
        for row in _rows(now, wide):
            table.add_row(*row)
        for column in ("law", "state", "reason", "message"):
            laws.add_column(column)
        for row in _laws(now):
            laws.add_row(*row)
        shown = [table]
        if on_cards := cards.rows(now):
            shown.append(Table(*cards.COLUMNS))
            for row in on_cards:
                shown[-1].add_row(*row)
        return Group(head, *shown, laws, *(f"problem: {p}" for p in now["problems"].values()))

    with contextlib.suppress(KeyboardInterrupt), Live(draw(data), auto_refresh=False, screen=False) as live:
        while True:
            time.sleep(FROM_AFAR_SECONDS if options.node else 1)  # it is work on a node that has services
            try:
                live.update(draw(ask_agent(options, "explain")), refresh=True)
            except NotAnswering:
                print("the agent has ended")
                return 0
    return 0


def _first(options: argparse.Namespace) -> dict[str, Any]:
    """The explanation, waiting a moment for an agent that has just started."""
    for _ in range(50):
        data = ask_agent(options, "explain")
        if "plan" in data:
            return data
        time.sleep(0.1)
    raise NotAnswering("the agent has not finished its first tick yet")


def _print_top(data: dict[str, Any], wide: bool) -> None:
    print_table(_columns(wide), _rows(data, wide))
    if on_cards := cards.rows(data):
        print_table(cards.COLUMNS, on_cards)
    print_table(("law", "state", "reason", "message"), _laws(data))
    for problem in data["problems"].values():
        print(f"problem: {problem}")


def explain(options: argparse.Namespace) -> int:
    """Of this node, or of what an entry point stands for: a PodGroup."""
    named = options.workload[:1]
    if len(options.workload) == 1 and "/" in named[0]:  # TYPE/NAME
        named = named[0].split("/", 1)
    for kind in entry_points(group="colocate.explain", name=named[0]) if named else ():
        options.workload = [*named, *options.workload[1:]]
        return int(kind.load()(options))
    if len(asked := [*named, *options.workload[1:]]) == 2 and asked[0] in ("node", "pod"):
        return _explain_elsewhere(options, *asked)
    if named == ["gpu"] and len(asked) < 3:
        return cards.explain(options, _first(options), "".join(asked[1:]))
    if len(options.workload) > 1:
        raise BadInput(
            f"explain takes one service or job, or podgroup, node, pod or gpu NAME, not {' '.join(options.workload)!r}"
        )
    return _explain_node(options)


def _explain_elsewhere(options: argparse.Namespace, kind: str, name: str) -> int:
    """A node of the cluster, or a pod wherever it is."""
    if kind == "node":
        options.node, options.workload = name, []
    else:
        from colocate.cli.remote import placed

        options.node, uid = placed(options, name)
        options.workload = [f"pod:{uid}"]
    return _explain_node(options)


def _explain_node(options: argparse.Namespace) -> int:
    """The laws with today's numbers, the last decisions, what was considered and rejected."""
    data = _first(options)
    name = options.workload[0] if options.workload else None
    workloads = data["snapshot"].get("workloads", {})
    if name is not None:
        ids = [i for i, w in workloads.items() if name in (i, w["name"])]
        lately = [n for n in data["lately"] if n["workload"] in (name, *ids) or n["workload"].endswith(f":{name}")]
        if not ids and lately:
            return _explain_gone(options, name, lately)
        if not ids:
            known = ", ".join(sorted(w["name"] for w in workloads.values())) or "none"
            raise BadInput(f"no workload {name!r}; known: {known}")
        data = {
            **data,
            "lately": lately,
            "workload": workloads[ids[0]],
            "forecast_of_workload": data["forecast"]["workloads"].get(ids[0], {}),
            "outcomes": [o for o in data["outcomes"] if o["workload"] == ids[0]],
        }
    if options.output in DATA_FORMS:
        print_data(data, options.output)
        return 0
    _print_explanation(data, name, wide=options.output == "wide")
    return 0


def _explain_gone(options: argparse.Namespace, name: str, lately: list[dict[str, Any]]) -> int:
    """A workload that is not there any more, with what was done to it."""
    if options.output in DATA_FORMS:
        print_data({"lately": lately}, options.output)
        return 0
    print(f"{name} is not there any more")
    _print_lately(lately)
    return 0


def _print_lately(notes: list[dict[str, Any]]) -> None:
    for note in notes:
        when = datetime.fromtimestamp(note["time_seconds"]).astimezone().strftime("%d %b %H:%M:%S")
        print(f"{when} {note['workload']}: {note['what']}" + (f": {note['why']}" if note["why"] else ""))


def _print_explanation(data: dict[str, Any], name: str | None, *, wide: bool) -> None:
    """Sentences first: what, why, what would change it; the fields behind them with -o wide."""
    if name is not None:
        print(_sentence_of(data["workload"], data["forecast_of_workload"]))
        if wide:
            for key, value in sorted(data["forecast_of_workload"].items()):
                print(f"  {key} = {value}")
            for knob, value in sorted(data["workload"].get("knobs", {}).items()):
                print(f"  {knob} = {value}")
    for verdict in data["plan"]["verdicts"]:
        print(f"{verdict['law']}: {verdict['message']}\n  {verdict['reason']} ({verdict['state']})")
        numbers = verdict.get("numbers", {})
        if numbers and wide:
            print("  " + ", ".join(f"{k} {v:g}" for k, v in numbers.items()))
    for item in data["plan"].get("rejected", []):
        print(f"rejected ({item['law']}): {item['considered']}: {item['why']}")
    for outcome in data["outcomes"]:
        if wide or outcome["status"] in ("failed", "skipped"):
            done = f"{outcome['workload']} {outcome['knob']} = {outcome['value']} ({outcome['reason']})"
            print(f"{outcome['status']}: {done}" + (f": {outcome['error']}" if outcome.get("error") else ""))
    for drift in data["drifts"]:
        print(f"drift: {drift['knob']} of {drift['workload']} is {drift['found']}, probably by {drift['probably']}")
    for problem in data["problems"].values():
        print(f"problem: {problem}")
    _print_lately(data["lately"])
    if wide:
        print(f"lever: {data['calibration'].get('lever', 'weight')} (designs/0001-cpu.md)")


def _sentence_of(workload: dict[str, Any], now: dict[str, Any]) -> str:
    """One workload in a sentence: what it is, what it uses, what it feels."""
    kind = {"service": "a service", "besteffort": "BestEffort", "batch": "batch work"}.get(workload["tier"], "the tier")
    place = " in place" if workload.get("in_place") else ""
    said = [f"uses {now['usage_cores']:.2f} cores"] if "usage_cores" in now else ["has no new reading"]
    if "peak_cores" in now:
        said.append(f"may need {now['peak_cores']:.2f}")
    if now.get("cpu_waiting_ratio"):
        said.append(f"waits for a CPU {now['cpu_waiting_ratio']:.1%} of the time")
    if now.get("cpu_pressure_ratio", 0.0) > now.get("cpu_waiting_ratio", 0.0):
        said.append(f"with waits too short to be felt {now['cpu_pressure_ratio']:.1%}")
    if now.get("memory_pressure_ratio"):
        said.append(f"stalls on memory {now['memory_pressure_ratio']:.1%} of the time")
    objective = workload.get("objective")
    if objective is not None and "p99_seconds" in now:
        target = format_duration(objective["p99_seconds"])
        said.append(f"has a p99 of {format_duration(now['p99_seconds'])} of its target {target}")
    if workload.get("frozen"):
        said.append("is frozen")
    return f"{workload['name']} is {kind}{place} at {workload['path']}: it {', '.join(said)}"
