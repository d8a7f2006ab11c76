"""report, evaluate, replay: what records say."""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

from colocate.cli.host import socket_path, state_dir
from colocate.cli.output import end_status, print_data, print_table, status
from colocate.decide.pipeline import OFF_FROZEN, OFF_UNMANAGED
from colocate.errors import BadInput
from colocate.jobs.client import Connection
from colocate.report.evaluate import Report, to_rows
from colocate.report.evaluate import evaluate as evaluate_records


def _show(report: Report, options: argparse.Namespace) -> None:
    if options.output == "json":
        print_data(report, "json")
    elif options.output == "csv":
        from colocate.report.charts import to_csv

        sys.stdout.write(to_csv(*to_rows(report)))
    else:
        from colocate.report.page import write_report

        path = Path(options.file or "colocate-report.html")
        if not path.parent.is_dir():
            raise BadInput(f"--file: the directory {path.parent} does not exist")
        write_report(report, path)
        print(report.verdict)
        print(f"report: {path.resolve()}")


def report(options: argparse.Namespace) -> int:
    """Exit 0 also if the data do not support a verdict: the report says so."""
    records = Path(options.records) if options.records else state_dir(options)
    _show(evaluate_records(records, since_seconds=options.since, machines=options.machines), options)
    return 0


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
    connection = Connection(socket_path(options))
    started = time.time()
    try:
        for i, arm in enumerate(arms):
            connection.ask(op="arm", arm=arm)
            end = time.monotonic() + options.window
            while (left := end - time.monotonic()) > 0:
                status(
                    f"window {i + 1}/{len(arms)}: {arm}, {left:.0f} s left ({len(arms) * options.window / 60:.0f} min)"
                )
                time.sleep(min(left, 1.0))
    finally:
        end_status()
        connection.ask(op="arm", arm="")
        connection.close()
    time.sleep(0.2)
    since = time.time() - started
    _show(evaluate_records(state_dir(options), since_seconds=since, wash_out=options.wash_out), options)
    return 0


def replay(options: argparse.Namespace) -> int:
    """Exit 1 if the recorded policy does not reproduce the recorded plans."""
    from colocate.policyfile import load_policy
    from colocate.report.replay import replay as replay_records

    other = load_policy(Path(options.config)) if options.config else None
    total, different = 0, []
    for tick in replay_records(Path(options.records), other):
        total += 1
        if not tick.same:
            different.append(tick)
    if options.output == "json":
        rows = [{"sequence": t.sequence, "recorded": t.recorded, "decided": t.decided} for t in different]
        print_data({"open_loop": True, "ticks": total, "different": rows if options.diff else len(different)}, "json")
    else:
        if options.diff:
            table = []
            for tick in different:
                for law, verdict in tick.decided["verdicts"].items():
                    was = tick.recorded["verdicts"].get(law, {})
                    if was != verdict:
                        before = f"{was.get('reason')} ({was.get('state')})"
                        table.append((str(tick.sequence), law, before, f"{verdict['reason']} ({verdict['state']})"))
            print_table(("tick", "law", "recorded", "decided"), table)
        print(f"open loop: {total} ticks decided again, {len(different)} differ")
        print("open loop means: what another decision would have changed on the node is not simulated")
    return 1 if different and other is None else 0
