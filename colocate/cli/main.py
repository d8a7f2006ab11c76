"""The command line: argparse, and one late import a command, because it is typed a hundred times a day.

Other packages add commands by entry points (pyproject.toml): `colocate.commands` a function that gets `Add`;
`colocate.explain`, `colocate.demo` and `colocate.replay` what a word, or the suffix of a file, stands for.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import signal
import sys

from colocate import __version__
from colocate.cli.options import (
    Add,
    cluster,
    confidence,
    cores,
    duration,
    form,
    intensity,
    node,
    positive,
    ratio,
    size,
    slowdown,
    snapshot,
    socket,
    state,
    table_form,
    watts,
)
from colocate.errors import ColocateError
from colocate.units import parse_duration

OF_JOBS = ("run", "checkpointed", "progress")
"""Started beside services on a busy node, again and again: nothing is imported for them that they do not need."""


def build_parser(wanted: str = "") -> argparse.ArgumentParser:
    """All commands with their options, or only those that come with the wanted one."""
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

    if wanted in OF_JOBS:
        _add_jobs(add)
        return parser
    from importlib.metadata import entry_points

    _add_demo(add, sorted(entry_points(group="colocate.demo").names))
    _add_node(add)
    _add_jobs(add)
    _add_reports(add)
    _add_undo(add)
    _add_cluster(add)
    _add_power(add)
    _add_simulation(add)
    for more in entry_points(group="colocate.commands"):
        more.load()(add)
    return parser


def _add_demo(add: Add, others: list[str]) -> None:
    demo = add(
        "demo", "colocate.cli.demo:demo", "Show co-location on this machine's own cgroups, in one to three minutes"
    )
    demo.add_argument(
        "what",
        nargs="?",
        choices=[*others, "gpu", "kubernetes", "power"],
        help="gang: gang scheduling on a real API server instead; gpu: batch beside services on simulated"
        " GPUs; kubernetes: the same on a real kubelet, from the manifests; power: caps and budgets on simulated GPUs;"
        " simulate: a day of jobs on a simulated fleet under four policies",
    )
    demo.add_argument("--image", help="kubernetes: an archive that `make image` made (default: made when needed)")
    demo.add_argument("--card", default="", metavar="UUID", help="gpu: on this real one (nvidia-smi -L)")
    demo.add_argument("--nvml-library", default="", metavar="PATH", help="gpu --card: where NVML is")
    table_form(demo)
    demo.add_argument("--report", default="colocate-demo-report.html", help="where the HTML report goes")
    demo.add_argument("--seconds", type=duration, default=parse_duration("16s"), help="length of a phase")
    demo.add_argument("--simulate", action="store_true", help="use the kernel model even where cgroups are writable")
    demo.add_argument("--seed", type=int, default=1, help="seed of the load (and of the model)")
    demo.add_argument("--service-time", type=duration, default=parse_duration("2ms"), help="CPU time of a request")


def _add_fleet(evaluate: argparse.ArgumentParser) -> None:
    text = "What co-location is worth to a simulated fleet, and at what cost to services: four arms, seed by seed"
    commands = evaluate.add_subparsers(dest="what", metavar="fleet")
    fleet = commands.add_parser("fleet", help=text, description=text)
    fleet.set_defaults(target="colocate.cli.fleet:evaluate")
    fleet.add_argument("--nodes", default="500+100", metavar="CPU+GPU", help="nodes (default: 500+100)")
    fleet.add_argument("--hours", type=positive, default=24, help="that are simulated and count (default: 24)")
    fleet.add_argument("--seeds", type=positive, default=10, help="worlds that are drawn (default: 10)")
    fleet.add_argument("--seed", type=positive, default=1, help="of the first (default: 1)")
    fleet.add_argument("--config", help="a policy for ours (default: the default policy)")
    fleet.add_argument("--tornado", action="store_true", help="vary each synthetic assumption too (minutes)")
    fleet.add_argument("--traces", metavar="FOLDER", help="of the traces (default: COLOCATE_TRACES)")
    fleet.add_argument("--workers", type=positive, help="simulations side by side (default: one a CPU)")
    fleet.add_argument("--file", help="an HTML page with tables and charts")
    table_form(fleet)


def _add_power(add: Add) -> None:
    text = "What a sweep of power caps says of a job, which cap to take, and what this node draws"
    commands = add("power", "", text).add_subparsers(dest="what", required=True, metavar="WHAT")

    def of(what: str, target: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(what, help=text, description=text)
        command.set_defaults(target=target)
        return command

    table = "a CSV with power_limit, time_per_epoch and average_power, a run each line"
    for what, text in (
        ("fit", "How much a job slows down under power caps, by a sweep of it"),
        ("recommend", "The least cap that keeps a slowdown"),
    ):
        sweep = of(what, "colocate.cli.power:power", text)
        sweep.add_argument(
            "files", nargs="+", help=f"one for each run (geopmsession's CSV, a GEOPM report), or {table}"
        )
        required = what == "recommend"
        sweep.add_argument(
            "--slowdown", "--power-at-slowdown", type=slowdown, required=required, help="how much longer: 5%% or 0.05"
        )
        sweep.add_argument("--confidence", type=confidence, help="how surely (default 0.9)")
        models = ("auto", "isotonic", "power-law", "quadratic", "seed")
        sweep.add_argument("--model", default="auto", choices=models, help="seed: that of the talk's script")
        sweep.add_argument("--where", default="", metavar="COLUMN=VALUE,...", help="which sweep of a table")
        sweep.add_argument("--report", help="an HTML page with the curves")
        table_form(sweep)
    runs = of("sweep", "colocate.cli.sweep:sweep", "Run a command under several caps of its GPUs, and fit the model")
    runs.add_argument("--caps", required=True, metavar="FROM:TO:STEP", help="in watts, of its GPUs together; or a list")
    runs.add_argument("--repeats", type=positive, default=2, help="how often each, up and down in turn (default 2)")
    runs.add_argument("--file", required=True, help="where the runs are written, a CSV that the others read")
    runs.add_argument("--slowdown", type=slowdown, help="recommend the least cap that keeps this: 5%% or 0.05")
    runs.add_argument("--report", help="an HTML page with the curves")
    runs.add_argument("--job", help="instead of a command: a file with the Job of a cluster that is run under each cap")
    runs.add_argument("-n", "--namespace", default="", help="--job: where it runs")
    runs.add_argument("--scheduler-name", default="colocate", help="--job: who places its pods, unless it says so")
    cluster(runs)
    runs.add_argument("--nvml-library", default="", metavar="PATH", help="where NVML is")
    runs.add_argument("--config", help="policy of the agent that is started if none runs")
    socket(runs)
    table_form(runs)
    runs.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- CMD ...", help="the command")
    split = of("split", "colocate.cli.power:split", "Watts among jobs, so that the worst slowdown is least")
    split.add_argument("files", nargs="+", help=f"{table}; each sweep in it is a job")
    split.add_argument("--budget", type=positive, required=True, metavar="WATTS", help="of all jobs together")
    split.add_argument("--where", default="", metavar="COLUMN=VALUE,...", help="which sweeps of the tables")
    table_form(split)
    budget = of("budget", "colocate.cli.watts:budget", "The power caps and the power budget of this node, and why")
    node(budget)
    socket(budget)
    table_form(budget)
    classes = of("models", "colocate.cli.watts:models", "The models of classes, as running jobs have made them")
    node(classes)
    socket(classes)
    table_form(classes)
    asked = of(
        "outcomes", "colocate.cli.cluster:outcomes", "Print the admission policies that turn slowdowns into watts"
    )
    asked.add_argument("--config", required=True, help="the policy with the models of classes, power.models")
    form(asked, "yaml", "json")
    status = of("status", "colocate.cli.watts:status", "What this node's CPUs and GPUs draw, and their limits")
    status.add_argument("--seconds", type=duration, default=parse_duration("1s"), help="over how long (default 1s)")
    status.add_argument("--nvml-library", default="", metavar="PATH", help="where NVML is")
    status.add_argument("--sysfs", default="/sys", metavar="FOLDER", help="where the host's /sys is mounted")
    table_form(status)


def _add_node(add: Add) -> None:
    doctor = add(
        "doctor", "colocate.cli.host:doctor", "What this host offers, what each missing thing costs, and the mend"
    )
    table_form(doctor)
    node(doctor)

    agent = add("agent", "colocate.cli.host:agent", "The node manager")
    agent.add_argument("--config", help="the ColocationPolicy file; read again when it changes")
    agent.add_argument("--shadow", action="store_true", help="compute and record everything, write nothing")
    agent.add_argument("--handover", action="store_true", help="at the end leave the grants to the successor")
    agent.add_argument(
        "--nri",
        nargs="?",
        default="",
        const="/var/run/nri/nri.sock",
        metavar="SOCKET",
        help="put pods that say that they are batch into the tier, by the container runtime's plugin socket",
    )
    agent.add_argument(
        "--node", default="", help="this node's name in its cluster: watch its pods, publish what batch may have of it"
    )
    agent.add_argument("--embedded", action="store_true", help=argparse.SUPPRESS)
    state(agent)
    socket(agent)

    top = add("top", "colocate.cli.watch:top", "The node live")
    top.add_argument("--once", action="store_true", help="print once and end")
    table_form(top)
    node(top)
    socket(top)

    explain = add("explain", "colocate.cli.watch:explain", "Why a node or pod is as it is, or why a PodGroup waits")
    explain.add_argument(
        "workload",
        nargs="*",
        help="only this service or job; gpu [UUID|WORKLOAD]; or of a cluster: node NAME, pod NAME, podgroup NAME",
    )
    explain.add_argument(
        "--anew", action="store_true", help="of a PodGroup: decide it anew from the whole cluster, which you may list"
    )
    snapshot(explain)
    node(explain, whose_cluster=False)
    table_form(explain)
    socket(explain)

    status = add("status", "colocate.cli.watch:status", "Whether an agent runs, and how it is")
    table_form(status)
    node(status)
    socket(status)


def _add_jobs(add: Add) -> None:
    run = add("run", "colocate.cli.run:run", "Run a command as a batch job in the tier")
    run.add_argument("--name", default="", help="the job's name (default: job-PID)")
    run.add_argument("--cpus", type=cores, help="the most CPU it may use, e.g. 2 or 500m")
    run.add_argument("--memory", type=size, help="the most memory it may use, e.g. 2Gi")
    run.add_argument("--priority", type=int, default=0, help="lower ones are evicted first")
    run.add_argument("--gang", default="", help="jobs of one gang are evicted together")
    run.add_argument("--checkpoint-signal", default="", help="sent before an eviction for memory, e.g. SIGUSR1")
    run.add_argument("--max-runtime", type=duration, help="evicted after this long, e.g. 2h")
    run.add_argument("--gpu-memory", type=size, help="what it will use of a GPU's memory at most, e.g. 12Gi")
    power = run.add_mutually_exclusive_group()
    power.add_argument(
        "--power-cap",
        type=watts,
        help="what its GPUs may draw at most, all together, in watts: those in CUDA_, ROCR_ or HIP_VISIBLE_DEVICES "
        "before it starts",
    )
    power.add_argument(
        "--max-slowdown",
        type=slowdown,
        help="in its place, by how much longer it may take: 5%% or 0.05; by the model of its --power-class",
    )
    run.add_argument("--deadline", type=duration, help="so long after its start it has to be done, e.g. 8h")
    run.add_argument(
        "--work", type=duration, help="how long it takes with all its watts: a budget leaves it what it needs"
    )
    run.add_argument("--power-class", help="of jobs that feel a power cap alike: a name of power.models in the policy")
    run.add_argument("--config", help="policy of the agent that is started if none runs")
    socket(run)
    run.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- CMD ...", help="the command")

    checkpointed = add(
        "checkpointed", "colocate.cli.run:checkpointed", "From inside a job: say that its state is saved"
    )
    socket(checkpointed)
    progress = add("progress", "colocate.cli.run:progress", "From inside a job: say how much of its work is done")
    progress.add_argument("done", type=ratio, metavar="40%", help="as a percentage, or a share as 0.4")
    socket(progress)


def _add_reports(add: Add) -> None:
    report = add("report", "colocate.cli.reports:report", "The utilization evaluation report, from records")
    report.add_argument("records", nargs="?", help="a state directory or record file (default: the agent's)")
    report.add_argument("--since", type=duration, help="only the last so long, e.g. 24h")
    report.add_argument("--machines", type=positive, default=1, help="nodes like this one, for machines saved")
    report.add_argument(
        "--carbon-intensity", type=intensity, metavar="G", help="of the grid, grams of CO2 a kWh: what the energy emits"
    )
    report.add_argument("--file", help="where -o html goes (default: colocate-report.html)")
    form(report, "html", "json", "csv")
    node(report)
    state(report)
    socket(report)

    evaluate = add(
        "evaluate", "colocate.cli.reports:evaluate", "Measure co-location on this node by on/off windows (switchback)"
    )
    evaluate.add_argument("--windows", type=positive, default=20, help="number of windows (default: 20)")
    evaluate.add_argument("--window", type=duration, default=parse_duration("30s"), help="length of a window")
    evaluate.add_argument("--wash-out", type=duration, default=parse_duration("5s"), help="start of a window left out")
    evaluate.add_argument("--off", choices=("frozen", "unmanaged"), default="frozen", help="what `off` means")
    evaluate.add_argument("--seed", type=int, default=1, help="seed of the order of windows")
    evaluate.add_argument("--yes", action="store_true", help="do not ask before --off unmanaged")
    evaluate.add_argument("--file", help="where -o html goes (default: colocate-report.html)")
    form(evaluate, "html", "json", "csv")
    state(evaluate)
    socket(evaluate)
    _add_fleet(evaluate)

    replay = add("replay", "colocate.cli.reports:replay", "Decide a recorded day, or a cluster snapshot, again")
    replay.add_argument("records", help="a state directory, a record file, or a cluster snapshot (.json)")
    replay.add_argument("--config", help="decide with another policy")
    replay.add_argument("--diff", action="store_true", help="print the ticks whose plan differs")
    table_form(replay)


def _add_conditions(command: argparse.ArgumentParser) -> None:
    command.add_argument("--mtbf", type=duration, help="nodes fail, each after so long in the mean (720h)")
    command.add_argument("--repair", type=duration, help="with --mtbf: until it is back (default 1h)")
    command.add_argument(
        "--checkpoint", type=duration, help="jobs save their work so often (default: never), where some are stopped"
    )
    command.add_argument(
        "--restart", type=duration, help="until a job that was stopped works when it begins again (default 0s)"
    )
    command.add_argument(
        "--gpu-watts",
        metavar="IDLE:BUSY",
        help="tell the energy: watts of a GPU that no job has, and of one that jobs have whole",
    )


def _add_simulation(add: Add) -> None:
    fleet = add(
        "simulate", "colocate.cli.simulate:simulate_command", "What policies would make of jobs on a fleet of nodes"
    )
    fleet.add_argument("--nodes", metavar="64x8|FILE", help="nodes times GPUs; or a YAML file with groups of nodes")
    fleet.add_argument(
        "--jobs",
        metavar="FILE",
        help="a trace: plain CSV, SWF, Philly's, openb's, Alibaba's, Azure's, records of an agent (.gz, .parquet too)",
    )
    fleet.add_argument(
        "--policy",
        help="one or more with commas between; the others are compared with the first (default native,packing;"
        " with --from-cluster: ours)",
    )
    fleet.add_argument(
        "--from-cluster",
        metavar="SNAPSHOT",
        help="instead of --nodes and --jobs: what becomes of the jobs of a cluster (colocate snapshot), from now on",
    )
    fleet.add_argument(
        "--what-if",
        action="append",
        default=[],
        metavar="nodes=4x8|job=8x8:2h",
        help="with --from-cluster: the same with more nodes, or with a job more (members x GPUs, or 4x16cpu:2h)",
    )
    fleet.add_argument(
        "--runs",
        type=duration,
        help="with --from-cluster: how long jobs run, or still run, that have not declared it (default 1h)",
    )
    fleet.add_argument("--seed", type=positive, default=1, help="of ties, and of the windows (default 1)")
    fleet.add_argument(
        "--window-jobs", type=positive, help="jobs of a window: the trace is not taken whole, but in parts"
    )
    fleet.add_argument("--windows", type=positive, help="how many (default 10)")
    fleet.add_argument(
        "--across-racks",
        type=float,
        metavar="TIMES",
        help="jobs run so many times as long where their members are in more than one rack (of --nodes FILE)",
    )
    fleet.add_argument(
        "--across-blocks",
        type=float,
        metavar="TIMES",
        help="the same of blocks of racks (default: as across racks)",
    )
    fleet.add_argument(
        "--throughputs",
        metavar="FILE",
        help="jobs with a model run as fast as a table of measurements says, by their GPUs and by who shares these",
    )
    fleet.add_argument(
        "--share-gpus",
        action="store_true",
        default=None,
        help="with --throughputs: jobs with a model and one GPU ask for half of it",
    )
    _add_conditions(fleet)
    fleet.add_argument("--workers", type=positive, help="simulations side by side (default: one a CPU)")
    fleet.add_argument("--file", help="an HTML page with tables and a timeline")
    table_form(fleet)
    many = add(
        "sweep",
        "colocate.cli.simulate_sweep:command",
        "Simulate every policy with every seed on every fleet and trace, here or spread over Ray",
    )
    many.add_argument("--nodes", required=True, nargs="+", metavar="64x8|FILE", help="fleets, each as for simulate")
    many.add_argument("--jobs", required=True, nargs="+", metavar="FILE", help="traces, each as for simulate")
    many.add_argument("--policy", default="native,packing", help="as for simulate (default native,packing)")
    many.add_argument("--seeds", default="1-10", metavar="1-10", help="of windows and ties (default 1-10)")
    many.add_argument("--window-jobs", type=positive, help="each seed takes another window of so many jobs")
    _add_conditions(many)
    many.add_argument(
        "--ray",
        metavar="local|auto|HOST:PORT",
        help="work on Ray: one that is started here, that of this machine, or that of an address",
    )
    many.add_argument("--workers", type=positive, help="simulations side by side (default: one a CPU)")
    table_form(many)
    tables = add(
        "reproduce",
        "colocate.cli.simulate:reproduce_command",
        "Work out tables that others have published, with the engine of the simulator, and compare",
    )
    tables.add_argument("tables", nargs="*", metavar="TABLE", help="only these (default: all)")
    tables.add_argument("--traces", metavar="FOLDER", help="where the traces are (default: COLOCATE_TRACES)")
    tables.add_argument("--cells", action="store_true", help="print every number beside the published one")
    table_form(tables)


def _add_undo(add: Add) -> None:
    restore = add(
        "restore", "colocate.cli.host:restore_command", "Put back what was found before the agent, after a crash"
    )
    restore.add_argument("--move-back", action="store_true", help="also return jobs' processes to their former cgroups")
    restore.add_argument(
        "--unless-handed-over",
        action="store_true",
        help="do nothing if the last agent left its grants to a successor (for ExecStopPost)",
    )
    table_form(restore)
    state(restore)

    calibrate = add(
        "calibrate", "colocate.cli.host:calibrate_command", "Measure the CPU levers of this kernel (at most 30 s)"
    )
    table_form(calibrate)
    state(calibrate)


def _add_cluster(add: Add) -> None:
    publish = add(
        "publish",
        "colocate.cli.cluster:publish",
        "Carry what batch may have of each node over into the nodes' status",
    )
    cluster(publish)
    publish.add_argument("--lease-namespace", default="colocate-system", help="where the lease is")
    publish.add_argument("--lease-name", default="colocate-publication", help="of the lease")
    publish.add_argument("--lease-duration", type=duration, default=15.0, help="how long a dead leader is waited for")

    profile = add(
        "profile",
        "colocate.cli.cluster:profile",
        "Print the admission policy that makes chosen pods batch as they are created, for kubectl apply -f -",
    )
    profile.add_argument("name", metavar="NAME", help="of the profile")
    profile.add_argument("--pods", default="", metavar="SELECTOR", help="by their labels, e.g. team=ml,tier!=web")
    profile.add_argument("--namespaces", default="", metavar="SELECTOR", help="by the labels of their namespaces")
    profile.add_argument("--percent", type=positive, default=100, help="of so many of a hundred jobs, by lot")
    profile.add_argument(
        "--fail-closed",
        action="store_true",
        help="while the agent is away their containers wait, where the runtime's NRI validator is on",
    )
    form(profile, "yaml", "json")


def main(arguments: list[str] | None = None) -> int:
    """Run a command; its exit code. Bad input is 2."""
    sys.stdout, sys.stderr = sys.stdout or open(os.devnull, "w"), sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    given = sys.argv[1:] if arguments is None else arguments
    options = build_parser(given[0] if given else "").parse_args(given)
    module, _, function = options.target.partition(":")
    ended = _end_in_order()
    try:
        code = getattr(importlib.import_module(module), function)(options)
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
