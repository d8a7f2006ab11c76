"""colocate demo."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from colocate.actuate.statedir import default_state_dir
from colocate.cli.delegated import enter_delegated_scope
from colocate.cli.logs import configure_logs
from colocate.cli.output import DATA_FORMS, check_file, print_data, print_table
from colocate.demo.result import ARMS, SHORT_TITLES, Arm, Result, format_rate
from colocate.errors import BadInput, HostUnfit, PermissionMissing

if TYPE_CHECKING:
    from colocate.demo.gpu.result import GpuResult
    from colocate.demo.power.result import PowerResult

MOST_SECONDS = 3600
LEAST_SERVICE_SECONDS = 1e-4


def _rows(result: Result, wide: bool) -> list[tuple[str, ...]]:
    """A line a figure, a column an arm: what is compared stands side by side, on eighty columns too."""

    def ratio(value: float | None) -> str:
        return "n/a" if value is None else f"{value:.0%}"

    def number(value: float | None) -> str:
        return "n/a" if value is None else f"{value:.2f}"

    figures: list[tuple[str, Callable[[Arm], str]]] = [
        ("p50 ms", lambda a: number(a.p50_ms)),
        ("p99 ms", lambda a: number(a.p99_ms)),
        ("errors", lambda a: str(a.failed_requests)),
        ("restarts", lambda a: str(a.service_restarts)),
        ("stalled s", lambda a: number(a.stalled_seconds)),
        ("BestEffort's work", lambda a: ratio(a.besteffort_work_ratio)),
        ("batch work/s, kept", lambda a: format_rate(a.batch_work_per_second)),
        ("batch work/s, lost", lambda a: format_rate(a.batch_lost_per_second)),
        ("CPU", lambda a: ratio(a.cpu_utilization)),
        ("effective", lambda a: ratio(a.effective_machine_utilization)),
    ]
    more: list[tuple[str, Callable[[Arm], str]]] = [
        ("p99.9 ms", lambda a: number(a.p999_ms)),
        ("requests/s", lambda a: f"{a.requests_per_second:.0f}"),
        ("requests", lambda a: str(a.requests)),
        ("batch deaths", lambda a: str(a.batch_processes_lost)),
    ]
    mark = "SIMULATED " if result.simulated else ""
    return [
        (mark + name, *(show(result.arms[arm]) for arm in ARMS)) for name, show in [*figures, *(more if wide else [])]
    ]


def demo(options: argparse.Namespace) -> int:
    """Print the table, write the report; exit 1 if the host (or the node) was not left as it was found."""
    configure_logs(logging.ERROR)
    for other in entry_points(group="colocate.demo", name=options.what) if options.what else ():
        return int(other.load()(options))
    _check(options)
    if options.what == "gpu":
        return _gpu(options)
    if options.what == "power":
        return _power(options)
    report = check_file("--report", options.report)
    if options.what == "kubernetes":
        result = _kubernetes(options)
    elif options.simulate:
        result = _simulated(options, "--simulate was given")
    else:
        enter_delegated_scope()
        try:
            result = _real(options)
        except PermissionMissing as error:
            result = _simulated(options, str(error))
    from colocate.demo.page import sentence, write_page

    write_page(result, report)
    if options.output in DATA_FORMS:
        data = {
            "simulated": result.simulated,
            "host_unchanged": result.host_unchanged,
            "report": str(report.resolve()),
            "target_p99_ms": result.target_p99_ms,
            "lever": result.lever,
            "changes": result.changes,
            "arms": msgspec.to_builtins(result.arms),
            **(msgspec.to_builtins(result.in_cluster) if result.in_cluster is not None else {}),
        }
        print_data(data, options.output)
    else:
        mark = "SIMULATED: " if result.simulated else ""
        title = f"{mark}{result.title}, four ways"
        print_table(("", *(SHORT_TITLES[a] for a in ARMS)), _rows(result, options.output == "wide"), title)
        print(f"{mark}{sentence(result)}")
        for line in _of_cluster(result):
            print(line)
        for change in result.changes:
            print(f"{mark}changed on the host: {change}")
        print(f"{mark}host's cgroups as before: {'yes' if result.host_unchanged else 'NO'}")
        print(f"{mark}report: {report.resolve()}")
    kept = result.in_cluster is None or result.in_cluster.node_unchanged
    return 0 if result.host_unchanged and kept else 1


def _check(options: argparse.Namespace) -> None:
    """Raises BadInput of options that make no sense, alone or together."""
    if options.seconds < 3:
        raise BadInput("--seconds: a phase needs at least 3s to say anything")
    if options.seconds > MOST_SECONDS:
        raise BadInput(f"--seconds: at most {MOST_SECONDS} s")
    if not LEAST_SERVICE_SECONDS <= options.service_time <= 1:
        raise BadInput("--service-time: write a duration between 0.1ms and 1s")
    if options.what == "kubernetes" and options.simulate:
        raise BadInput("--simulate: there is no model of a cluster; leave out `kubernetes`, or --simulate")
    if options.what == "gpu":
        return
    if options.card or options.nvml_library:
        raise BadInput("--card: only `demo gpu` runs on a card")
    if options.image and options.what != "kubernetes":
        raise BadInput("--image: only `demo kubernetes` runs an image")


def _print_host(result: GpuResult | PowerResult, report: Path) -> None:
    for change in result.changes:
        print(f"changed on the host: {change}")
    print(f"host's cgroups as before: {'yes' if result.host_unchanged else 'NO'}")
    print(f"report: {report.resolve()}")


def _power(options: argparse.Namespace) -> int:
    """Caps and budgets, on simulated cards. Exit 1 if a promise was not kept."""
    from colocate.cgroup.port import KernelPort
    from colocate.demo.power.page import write_page
    from colocate.demo.power.result import MARK, rows, sentence
    from colocate.demo.power.script import PowerDemo

    if options.simulate:
        raise BadInput("--simulate: with `power` the cards are simulated anyway; leave it out")
    report = check_file("--report", options.report)
    enter_delegated_scope()
    print(f"{MARK}: no GPU is used; the agent, the jobs, their deaths and the solver are real", file=sys.stderr)
    with _Progress() as progress:
        result = asyncio.run(PowerDemo(KernelPort(), progress.show).run())
    write_page(result, report)
    if options.output in DATA_FORMS:
        print_data({**msgspec.to_builtins(result), "report": str(report.resolve())}, options.output)
        return 0 if result.kept else 1
    print_table((MARK, ""), rows(result), "jobs under power caps and budgets")
    print(f"{MARK}: {sentence(result)}")
    _print_host(result, report)
    return 0 if result.kept else 1


def _gpu(options: argparse.Namespace) -> int:
    """Cards that are simulated, or a real one, and everything else real. Exit 1 if the host was not left as found."""
    from colocate.cgroup.port import KernelPort
    from colocate.demo.gpu.page import write_page
    from colocate.demo.gpu.result import legend, refusal, rows, sentence
    from colocate.demo.gpu.script import GpuDemo
    from colocate.demo.gpu.where import RealCard
    from colocate.model import kernels

    if options.simulate:
        raise BadInput("--simulate: with `gpu` the card is simulated unless --card names one; leave it out")
    if options.nvml_library and not options.card:
        raise BadInput("--nvml-library: it is the real card's; name that with --card")
    real = RealCard(options.card, options.nvml_library) if options.card else None
    report = check_file("--report", options.report)
    enter_delegated_scope()
    what = f"the real card {options.card} is used" if real else "no GPU is used"
    mark = "REAL CARD" if real else "SIMULATED CARD"
    print(f"{mark}: {what}; the agent, the processes, the requests and the freezes are real", file=sys.stderr)
    with _Progress() as progress:
        demonstration = GpuDemo(KernelPort(), options.seconds, options.seed, progress.show, real)
        result = asyncio.run(demonstration.run(kernels.load(jit=False)))
    write_page(result, report)
    if options.output in DATA_FORMS:
        data = msgspec.to_builtins(result)
        del data["details"]
        print_data({**data, "report": str(report.resolve())}, options.output)
        return 0 if result.host_unchanged else 1
    print(f"{mark}: {legend(result)}.")
    for service in dict.fromkeys(a.service for a in result.arms.values()):
        columns, lines = rows(result, service)
        print_table(
            columns, lines, f"{mark}: the {service} service, target {result.of(service)['alone'].target_ms:g} ms"
        )
    print(f"{mark}: {sentence(result)}")
    if held := refusal(result):
        print(f"{mark}: {held}")
    if result.reaction_p95_ms is not None:
        ms = f"{result.reaction_p95_ms:.1f} ms"
        print(f"from a request to batch told to stop, p95: {ms} (what they had launched runs on)")
    _print_host(result, report)
    return 0 if result.host_unchanged else 1


def _of_cluster(result: Result) -> list[str]:
    found = result.in_cluster
    if found is None:
        return []
    return [
        f"batch pods in the tier: {found.batch_pods_in_tier}, placed by NRI: {'yes' if found.placed_by_nri else 'NO'}",
        f"published for batch when it was placed: {found.published_batch_cpu_milli} thousandths of a CPU",
        *(f"changed on the node: {change}" for change in found.node_changes),
        f"node's cgroups as before the installation: {'yes' if found.node_unchanged else 'NO'}",
    ]


def _kubernetes(options: argparse.Namespace) -> Result:
    from colocate.cgroup.port import KernelPort
    from colocate.demo.kubernetes import KubernetesDemo
    from colocate.localcluster.image import fresh_image
    from colocate.localcluster.realnode import lacks
    from colocate.model import kernels

    if missing := lacks():
        raise HostUnfit(f"a real kubelet needs {missing}", "make system-packages kube-binaries, and be root")
    with _Progress() as progress:
        progress.show("making the image", 0.0)
        image = fresh_image(options.image)
        demonstration = KubernetesDemo(
            KernelPort(), image, options.seconds, options.seed, options.service_time, progress.show
        )
        return asyncio.run(demonstration.run(None, kernels.load(jit=False)))  # its agent has its own, in its pod


def _real(options: argparse.Namespace) -> Result:
    from colocate.actuate.statedir import StateDirectory
    from colocate.agent.numba_cache import load_kernels
    from colocate.calibrate.measure import load_calibration
    from colocate.cgroup.port import KernelPort
    from colocate.demo.script import Demo

    port = KernelPort()
    state = default_state_dir()
    calibration = None
    if os.access(state, os.R_OK | os.X_OK):
        found = load_calibration(StateDirectory(state), port)
        calibration = found if found.measured_seconds else None
    with _Progress() as progress:
        demonstration = Demo(port, options.seconds, options.seed, options.service_time, progress.show)
        return asyncio.run(demonstration.run(calibration, load_kernels(state)))


def _simulated(options: argparse.Namespace, why: str) -> Result:
    from colocate.demo.simulated import simulate

    print(f"SIMULATED: {why}", file=sys.stderr)
    print("SIMULATED: what follows is the same code on a model of the kernel, not this machine", file=sys.stderr)
    return simulate(options.seconds, options.seed, options.service_time)


class _Progress:
    """A bar on a terminal, a line a phase elsewhere."""

    def __init__(self) -> None:
        self._last = ""
        self._bar: object = None

    def __enter__(self) -> _Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            bar = Progress(
                TextColumn("{task.description:34}"), BarColumn(), TimeElapsedColumn(), console=Console(stderr=True)
            )
            bar.start()
            self._task = bar.add_task("starting", total=1.0)
            self._bar = bar
        return self

    def __exit__(self, *_: object) -> None:
        from rich.progress import Progress

        if isinstance(self._bar, Progress):
            self._bar.update(self._task, completed=1.0)
            self._bar.stop()

    def show(self, text: str, done: float) -> None:
        """The phase that begins, and how much is done."""
        from rich.progress import Progress

        if isinstance(self._bar, Progress):
            self._bar.update(self._task, description=text, completed=done)
        elif text.partition(":")[0] != self._last:
            self._last = text.partition(":")[0]
            print(f"[{done:4.0%}] {self._last}", file=sys.stderr, flush=True)
