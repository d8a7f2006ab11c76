"""report, evaluate, replay: what records say."""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import tempfile
import time
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import msgspec

from colocate.cli.host import socket_path, state_dir
from colocate.cli.output import DATA_FORMS, check_file, end_status, print_data, print_table, status
from colocate.decide.pipeline import OFF_FROZEN, OFF_UNMANAGED
from colocate.errors import BadInput, NotAnswering
from colocate.jobs.client import Connection
from colocate.report.evaluate import Report, to_rows
from colocate.report.evaluate import evaluate as evaluate_records
from colocate.report.record import segments


def _show(report: Report, options: argparse.Namespace) -> None:
    if options.output == "json":
        print_data(report, "json")
    elif options.output == "csv":
        from colocate.report.charts import to_csv

        sys.stdout.write(to_csv(*to_rows(report)))
    else:
        from colocate.report.page import write_report

        path = _file(options)
        write_report(report, path)
        print(report.verdict)
        print(f"report: {path.resolve()}")


def _file(options: argparse.Namespace) -> Path:
    return check_file("--file", options.file or "colocate-report.html")


def report(options: argparse.Namespace) -> int:
    """Exit 0 also if the data do not support a verdict: the report says so."""
    if options.node:
        from colocate.cli.remote import answer_of

        since = ["--since", f"{options.since:g}s"] if options.since is not None else []
        if options.carbon_intensity is not None:
            since += ["--carbon-intensity", f"{options.carbon_intensity:g}"]
        told = answer_of(options, "report", "--machines", str(options.machines), *since)
        _show(msgspec.convert(told, Report), options)
        return 0
    with contextlib.ExitStack() as stack:
        records = Path(options.records) if options.records else _kept_in_memory(options, stack) or state_dir(options)
        found = evaluate_records(
            records,
            since_seconds=options.since,
            machines=options.machines,
            carbon_intensity=options.carbon_intensity,
        )
        _show(found, options)
    return 0


def _kept_in_memory(options: argparse.Namespace, stack: contextlib.ExitStack) -> Path | None:
    """What an agent keeps in memory because its disk refuses records, as a file; None if it does not."""
    if options.state_dir:  # of another agent, or of none
        return None
    try:
        connection = Connection(socket_path(options))
    except NotAnswering:
        return None
    stack.callback(connection.close)
    if connection.ask(op="status").get("records", "ok") == "ok":
        return None
    lines = connection.ask(op="records")["lines"]
    path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="colocate-"))) / "records-memory.jsonl"
    path.write_text("".join(lines))
    print("the agent's disk refuses records: this is what it has kept in memory", file=sys.stderr)
    return path


def order_of_windows(count: int, off: str, seed: int) -> list[str]:
    """A randomised switchback: pairs of windows, the order within each pair by lot, so that drift hits both alike."""
    generator = random.Random(seed)
    arms = []
    for _ in range((count + 1) // 2):
        pair = ["on", off]
        generator.shuffle(pair)
        arms.extend(pair)
    return arms[:count]


def evaluate(options: argparse.Namespace) -> int:
    """Alternate the arms on the running agent, then report."""
    if options.wash_out >= options.window:
        raise BadInput("--wash-out: must be shorter than --window, or nothing of a window is left")
    if options.off == "unmanaged" and not options.yes:
        raise BadInput("--off unmanaged lets batch run at the weight of a service for half of the time: add --yes")
    off = OFF_FROZEN if options.off == "frozen" else OFF_UNMANAGED
    arms = order_of_windows(options.windows, off, options.seed)
    if options.output == "html":
        _file(options)
    connection = Connection(socket_path(options))
    records = Path(options.state_dir or connection.ask(op="status")["state_dir"])
    segments(records)  # says now, and not after all windows, if they cannot be read
    started = time.time()
    try:
        for i, arm in enumerate(arms):
            _begin(connection, arm, options.window, f"window {i + 1} of {len(arms)}")
            end = time.monotonic() + options.window
            while (left := end - time.monotonic()) > 0:
                status(
                    f"window {i + 1}/{len(arms)}: {arm}, {left:.0f} s left ({len(arms) * options.window / 60:.0f} min)"
                )
                time.sleep(min(left, 1.0))
    finally:
        end_status()
        with contextlib.suppress(NotAnswering):
            connection.ask(op="arm", arm="")
        connection.close()
    time.sleep(0.2)
    since = time.time() - started
    _show(evaluate_records(records, since_seconds=since, wash_out=options.wash_out), options)
    return 0


def _differing(was: dict[str, Any], now: dict[str, Any]) -> tuple[str, str]:
    """Two verdicts in the words in which they differ."""

    def words(verdict: dict[str, Any]) -> str:
        return f"{verdict.get('reason')} ({verdict.get('state')})"

    if words(was) != words(now):
        return words(was), words(now)
    if was.get("message") != now.get("message"):
        return str(was.get("message")), str(now.get("message"))
    keys = [k for k, v in now.get("numbers", {}).items() if was.get("numbers", {}).get(k) != v]
    return tuple(", ".join(f"{k} {v['numbers'].get(k)}" for k in keys) for v in (was, now))  # type: ignore[return-value]


def _begin(connection: Connection, arm: str, seconds: float, which: str) -> None:
    try:
        connection.ask(op="arm", arm=arm, seconds=seconds)
    except NotAnswering as error:
        raise NotAnswering(f"{error}; {which} was not measured: colocate report shows what there is") from error


def replay(options: argparse.Namespace) -> int:
    """Exit 1 if the recorded policy does not reproduce the recorded plans."""
    from colocate.policy.file import load_policy
    from colocate.report.replay import replay as replay_records

    path = Path(options.records)
    for kind in entry_points(group="colocate.replay", name=path.suffix.removeprefix(".")) if path.is_file() else ():
        return int(kind.load()(path, options))

    other = load_policy(Path(options.config)) if options.config else None
    total, different = 0, []
    for tick in replay_records(Path(options.records), other):
        total += 1
        if not tick.same:
            different.append(tick)
    if not total:
        raise BadInput(f"{options.records} has no complete line of a record, or no keyframe")
    if options.output in DATA_FORMS:
        rows = [{"sequence": t.sequence, "recorded": t.recorded, "decided": t.decided} for t in different]
        print_data(
            {"open_loop": True, "ticks": total, "different": rows if options.diff else len(different)}, options.output
        )
    else:
        if options.diff:
            table = []
            for tick in different:
                for law, verdict in tick.decided["verdicts"].items():
                    was = tick.recorded["verdicts"].get(law, {})
                    if was != verdict:
                        table.append((str(tick.sequence), law, *_differing(was, verdict)))
                for side, plan in (("recorded", tick.recorded), ("decided", tick.decided)):
                    other_plan = tick.decided if side == "recorded" else tick.recorded
                    for action in plan.get("actions", []):
                        if action not in other_plan.get("actions", []):
                            done = f"{action['workload']} {action['knob']} = {action['value']} ({action['reason']})"
                            row = (done, "-") if side == "recorded" else ("-", done)
                            table.append((str(tick.sequence), "action", *row))
            print_table(("tick", "law", "recorded", "decided"), table)
        print(f"open loop: {total} ticks decided again, {len(different)} differ")
        print("open loop means: what another decision would have changed on the node is not simulated")
    return 1 if different and other is None else 0
