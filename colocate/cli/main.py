"""The command line: argparse, and one late import a command, because it is typed a hundred times a day."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import signal
import sys
from collections.abc import Callable

from colocate import __version__
from colocate.errors import ColocateError
from colocate.units import parse_bytes, parse_cores, parse_duration


def _quantity(parse: Callable[[str], float]) -> Callable[[str], float]:
    """An argparse type that says in the quantity's own words what is wrong."""

    def read(text: str) -> float:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def _seconds(text: str) -> float:
    """A duration; on the command line a bare number is seconds, as for sleep(1)."""
    return parse_duration(f"{text}s" if text.replace(".", "", 1).isdigit() else text)


_duration, _bytes, _cores = _quantity(_seconds), _quantity(parse_bytes), _quantity(parse_cores)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _form(parser: argparse.ArgumentParser, *forms: str) -> None:
    parser.add_argument("-o", "--output", choices=forms, default=forms[0], help=f"output form (default: {forms[0]})")


def _table_form(parser: argparse.ArgumentParser) -> None:
    _form(parser, "table", "wide", "json", "yaml")


def _state(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--state-dir", help="journal, records and model state (default: /var/lib/colocate for root)")


def _socket(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--socket", help="the agent's socket (default: /run/colocate/agent.sock for root)")


def _cluster(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kubeconfig", help="default: $KUBECONFIG, the pod's service account, ~/.kube/config")
    parser.add_argument("--context", help="of the kubeconfig")


def _snapshot(parser: argparse.ArgumentParser, *, live: bool = False) -> None:
    _cluster(parser)
    if live:
        parser.set_defaults(snapshot=None)
    else:
        parser.add_argument("--snapshot", help="a file of `colocate snapshot`, in place of the live cluster")
        parser.add_argument("-n", "--namespace", default="", help="default: default")
    parser.add_argument("--scheduler-name", default="colocate", help="whose pods are decided (default: colocate)")


def build_parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    parser = argparse.ArgumentParser(
        prog="colocate",
        description="Run batch and AI jobs on the nodes of latency-sensitive services, without the services noticing.",
    )
    parser.add_argument("--version", action="version", version=f"colocate {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, target: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(target=target)
        return command

    _add_demo(add)
    _add_node(add)
    _add_reports(add)
    _add_undo(add)
    _add_cluster(add)
    return parser


Add = Callable[[str, str, str], argparse.ArgumentParser]
"""(name, module:function, help) -> the command's own parser."""


def _add_demo(add: Add) -> None:
    demo = add("demo", "demo:demo", "Show co-location on this machine's own cgroups, in one to two minutes")
    demo.add_argument("what", nargs="?", choices=["gang"], help="gang: gang scheduling on a real API server instead")
    _table_form(demo)
    demo.add_argument("--report", default="colocate-demo-report.html", help="where the HTML report goes")
    demo.add_argument("--seconds", type=_duration, default=parse_duration("16s"), help="length of a phase")
    demo.add_argument("--simulate", action="store_true", help="use the kernel model even where cgroups are writable")
    demo.add_argument("--seed", type=int, default=1, help="seed of the load (and of the model)")
    demo.add_argument("--service-time", type=_duration, default=parse_duration("2ms"), help="CPU time of a request")


def _add_node(add: Add) -> None:
    doctor = add("doctor", "host:doctor", "What this host offers, what each missing thing costs, and the mend")
    _table_form(doctor)

    agent = add("agent", "host:agent", "The node manager")
    agent.add_argument("--config", help="the ColocationPolicy file; read again when it changes")
    agent.add_argument("--shadow", action="store_true", help="compute and record everything, write nothing")
    agent.add_argument("--handover", action="store_true", help="at the end leave the grants to the successor")
    agent.add_argument("--embedded", action="store_true", help=argparse.SUPPRESS)
    _state(agent)
    _socket(agent)

    run = add("run", "run:run", "Run a command as a batch job in the tier")
    run.add_argument("--name", default="", help="the job's name (default: job-PID)")
    run.add_argument("--cpus", type=_cores, help="the most CPU it may use, e.g. 2 or 500m")
    run.add_argument("--memory", type=_bytes, help="the most memory it may use, e.g. 2Gi")
    run.add_argument("--priority", type=int, default=0, help="lower ones are evicted first")
    run.add_argument("--gang", default="", help="jobs of one gang are evicted together")
    run.add_argument("--checkpoint-signal", default="", help="sent before an eviction for memory, e.g. SIGUSR1")
    run.add_argument("--max-runtime", type=_duration, help="evicted after this long, e.g. 2h")
    run.add_argument("--config", help="policy of the agent that is started if none runs")
    _socket(run)
    run.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- CMD ...", help="the command")

    checkpointed = add("checkpointed", "run:checkpointed", "From inside a job: say that its state is saved")
    _socket(checkpointed)

    top = add("top", "watch:top", "The node live")
    top.add_argument("--once", action="store_true", help="print once and end")
    _table_form(top)
    _socket(top)

    explain = add("explain", "watch:explain", "Why the node is as it is, or why a PodGroup waits")
    explain.add_argument("workload", nargs="*", help="only this service or job; or: podgroup NAME")
    _snapshot(explain)
    _table_form(explain)
    _socket(explain)

    status = add("status", "watch:status", "Whether an agent runs, and how it is")
    _table_form(status)
    _socket(status)


def _add_reports(add: Add) -> None:
    report = add("report", "reports:report", "The utilization evaluation report, from records")
    report.add_argument("records", nargs="?", help="a state directory or record file (default: the agent's)")
    report.add_argument("--since", type=_duration, help="only the last so long, e.g. 24h")
    report.add_argument("--machines", type=_positive, default=1, help="nodes like this one, for machines saved")
    report.add_argument("--file", help="where -o html goes (default: colocate-report.html)")
    _form(report, "html", "json", "csv")
    _state(report)

    evaluate = add("evaluate", "reports:evaluate", "Measure co-location on this node by on/off windows (switchback)")
    evaluate.add_argument("--windows", type=_positive, default=20, help="number of windows (default: 20)")
    evaluate.add_argument("--window", type=_duration, default=parse_duration("30s"), help="length of a window")
    evaluate.add_argument("--wash-out", type=_duration, default=parse_duration("5s"), help="start of a window left out")
    evaluate.add_argument("--off", choices=("frozen", "unmanaged"), default="frozen", help="what `off` means")
    evaluate.add_argument("--seed", type=int, default=1, help="seed of the order of windows")
    evaluate.add_argument("--yes", action="store_true", help="do not ask before --off unmanaged")
    evaluate.add_argument("--file", help="where -o html goes (default: colocate-report.html)")
    _form(evaluate, "html", "json", "csv")
    _state(evaluate)
    _socket(evaluate)

    replay = add("replay", "reports:replay", "Decide a recorded day, or a cluster snapshot, again")
    replay.add_argument("records", help="a state directory, a record file, or a cluster snapshot (.json)")
    replay.add_argument("--config", help="decide with another policy")
    replay.add_argument("--diff", action="store_true", help="print the ticks whose plan differs")
    _table_form(replay)


def _add_undo(add: Add) -> None:
    restore = add("restore", "host:restore_command", "Put back what was found before the agent, after a crash")
    restore.add_argument("--move-back", action="store_true", help="also return jobs' processes to their former cgroups")
    restore.add_argument(
        "--unless-handed-over",
        action="store_true",
        help="do nothing if the last agent left its grants to a successor (for ExecStopPost)",
    )
    _table_form(restore)
    _state(restore)

    calibrate = add("calibrate", "host:calibrate_command", "Measure the CPU levers of this kernel (at most 30 s)")
    _table_form(calibrate)
    _state(calibrate)


def _add_cluster(add: Add) -> None:
    controller = add("controller", "cluster:controller", "Gang scheduling: the controller of a cluster")
    _cluster(controller)
    controller.add_argument("--scheduler-name", default="colocate", help="the pods we bind (default: colocate)")
    controller.add_argument(
        "--also-answer-to",
        action="append",
        default=[],
        choices=["scheduler-plugins-scheduler"],
        help="the name that KubeRay writes; refused while that scheduler is alive",
    )
    controller.add_argument(
        "--timeout", type=_positive, default=60, help="seconds to start a gang whose PodGroup says nothing"
    )
    controller.add_argument(
        "--node-loss-grace",
        type=_duration,
        default=40.0,
        help="for how long a node's object must have been gone before the members on it are given up",
    )
    controller.add_argument("--http", default="", help="HOST:PORT of /metrics, /healthz and /readyz (default: none)")
    controller.add_argument("--lease-namespace", default="colocate-system", help="where the lease is")
    controller.add_argument("--lease-name", default="colocate-controller", help="of the lease")
    controller.add_argument(
        "--lease-duration", type=_duration, default=15.0, help="how long a dead leader is waited for"
    )

    queue = add("queue", "cluster:queue", "The gangs that wait: position, since when, and why")
    _cluster(queue)
    queue.add_argument("-n", "--namespace", default="", help="only this namespace")
    _table_form(queue)

    what_if = add("what-if", "cluster:what_if", "Whether a job would start now, and where: the same solver, read-only")
    what_if.add_argument("-f", "--file", required=True, help="the job's manifest, YAML")
    _snapshot(what_if)
    _table_form(what_if)

    snapshot = add("snapshot", "cluster:snapshot", "Write the cluster as it is to a file, to decide it again elsewhere")
    snapshot.add_argument("-f", "--file", default="colocate-cluster.json", help="default: colocate-cluster.json")
    _snapshot(snapshot, live=True)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; its exit code. Bad input is 2."""
    sys.stdout, sys.stderr = sys.stdout or open(os.devnull, "w"), sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    options = build_parser().parse_args(arguments)
    module, _, function = options.target.partition(":")
    ended = _end_in_order()
    try:
        code = getattr(importlib.import_module(f"colocate.cli.{module}"), function)(options)
        sys.stdout.flush()
        return int(code or 0)
    except ColocateError as error:
        print(f"colocate: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        print(f"colocate: {error.filename or 'output'}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if not ended:
            print("colocate: interrupted", file=sys.stderr)
        return 128 + (ended[0] if ended else signal.SIGINT)


def _end_in_order() -> list[int]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does, so that it cleans up; the list tells which one came.

    `agent` and `run` put handlers of their own in their place.
    """
    ended: list[int] = []

    def end(number: int, _frame: object) -> None:
        ended.append(number)
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as shells start what they put into the background
            signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.raise_signal(signal.SIGINT)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, end)
    return ended


if __name__ == "__main__":
    sys.exit(main())
