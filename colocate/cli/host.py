"""doctor, agent, restore, calibrate: the commands about this host."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from colocate.actuate.statedir import StateDirectory, default_state_dir, runtime_dir
from colocate.calibration import Calibration
from colocate.cli.logs import configure_logs
from colocate.cli.output import DATA_FORMS, end_status, print_data, print_table, status
from colocate.errors import BadInput, ColocateError
from colocate.policy.schema import ColocationPolicy


def state_dir(options: argparse.Namespace) -> Path:
    """--state-dir, or the default."""
    return Path(options.state_dir) if options.state_dir else default_state_dir()


def socket_path(options: argparse.Namespace, *, own: bool = False) -> Path:
    """--socket, COLOCATE_SOCKET, or the default: one's `own`, else root's if there is only that one."""
    given = options.socket or os.environ.get("COLOCATE_SOCKET")
    if given:
        return Path(given)
    mine, the_hosts = runtime_dir() / "agent.sock", Path("/run/colocate/agent.sock")
    only_the_hosts = not mine.exists() and the_hosts.exists() and "COLOCATE_RUNTIME_DIR" not in os.environ
    return the_hosts if only_the_hosts and not own else mine


def doctor(options: argparse.Namespace) -> int:
    """Exit 0 when a tier is possible, 1 when not."""
    if options.node:
        from colocate.cli.remote import answer_of

        data = answer_of(options, "doctor")
    else:
        data = _examined()
    possible = bool(data["tier_possible"])
    if options.output in DATA_FORMS:
        print_data(data, options.output)
        return 0 if possible else 1
    rows = []
    for check in data["checks"]:
        lost = "" if check["ok"] else check["cost"] + (f"; mend: {check['mend']}" if check["mend"] else "")
        rows.append(("✓" if check["ok"] else "✗", check["name"], check["found"], lost))
    print_table(("", "what", "found", "without it"), rows)
    calibration = msgspec.convert(data["calibration"], Calibration)
    if calibration.measured_seconds:
        print(f"calibrated: lever {calibration.lever}, rungs {' > '.join(calibration.rungs)}")
        if options.output == "wide":
            print_calibration(calibration)
    else:
        print("not calibrated on this kernel: weight 1 is used (measure with: colocate calibrate)")
    print("a batch tier is possible" if possible else "no batch tier is possible: mend the first lines above")
    return 0 if possible else 1


def _examined() -> dict[str, Any]:
    from colocate.calibrate.measure import load_calibration
    from colocate.cgroup.port import KernelPort
    from colocate.doctor import checks

    port = KernelPort()
    found = checks(port)
    state = default_state_dir()
    known = os.access(state, os.R_OK | os.X_OK)
    calibration = load_calibration(StateDirectory(state), port) if known else Calibration()
    return {
        "tier_possible": all(c.ok for c in found if c.required),
        "checks": [c._asdict() for c in found],
        "calibration": msgspec.to_builtins(calibration),
    }


def print_calibration(calibration: Calibration) -> None:
    """The measured arms as a table."""
    rows = []
    for arm, entry in calibration.evidence.items():
        ratio = f"{entry['p99_ratio']:.2f} [{entry['p99_ratio_low']:.2f}, {entry['p99_ratio_high']:.2f}]"
        work = f"{entry['work_ratio']:.2f}" if "work_ratio" in entry else "-"
        rows.append((arm, f"{entry['p99_ms']:.2f} ms", ratio, work))
    print_table(("arm", "service p99", "ratio to weight 1 [95 %]", "batch work ratio"), rows)


def calibrate_command(options: argparse.Namespace) -> int:
    """Measure and keep it."""
    from colocate.calibrate.measure import FILE, calibrate
    from colocate.cgroup.port import KernelPort

    state = StateDirectory(state_dir(options))
    if not os.access(state.path, os.W_OK):
        raise BadInput(f"--state-dir {state.path} cannot be written, so the calibration could not be kept")
    found = calibrate(KernelPort(), lambda done, total, arm: status(f"calibrating {done}/{total}: {arm}"))
    end_status()
    if not state.save(FILE, msgspec.to_builtins(found)):
        raise ColocateError(f"measured, but {state.path / FILE} could not be written: is the disk full?")
    if options.output in DATA_FORMS:
        print_data(found, options.output)
    else:
        print_calibration(found)
        if options.output == "wide":
            print_table(("machine", ""), list(found.machine.items()))
        print(f"lever: {found.lever}; rungs: {' > '.join(found.rungs)}; kept in {state.path / FILE}")
    return 0


def agent(options: argparse.Namespace) -> int:
    """Run until SIGTERM."""
    import asyncio

    from colocate.agent.daemon import Service
    from colocate.policy.file import load_policy

    configure_logs()
    policy = load_policy(Path(options.config)) if options.config else ColocationPolicy()
    if not options.config and os.geteuid() != 0:
        policy = _in_own_scope(policy)
    service = Service(
        policy,
        state_dir(options),
        runtime_dir(),
        socket_path(options, own=True),
        policy_path=Path(options.config) if options.config else None,
        shadow=options.shadow,
        embedded=options.embedded,
        handover=options.handover,
        nri=options.nri,
        node=options.node,
    )
    report = asyncio.run(service.run())
    for line in report.occupied:
        print(
            f"colocate: {line} is still occupied: left at the least weight, without limits, thawed; it is removed "
            "when its last process ends",
            file=sys.stderr,
        )
    for line in report.capped:
        print(
            f"colocate: the GPUs of {line} keep their power limits until its last process ends; then those that were "
            "found are put back",
            file=sys.stderr,
        )
    return 1 if report.failed else 0


def _in_own_scope(policy: ColocationPolicy) -> ColocationPolicy:
    """An ordinary user's node is the cgroup that was delegated to him, if this is cgroup v2."""
    from colocate.actuate.scratch import base_path, step_aside
    from colocate.cgroup.port import KernelPort

    port = KernelPort()
    own = base_path(port)
    if own != "/":
        step_aside(port, own)
    return msgspec.structs.replace(policy, spec=msgspec.structs.replace(policy.spec, node_root=own))


def restore_command(options: argparse.Namespace) -> int:
    """Undo what the journal knows, 1 if something of ours is left; refuses while an agent runs."""
    from colocate.actuate.journal import Journal, boot_id
    from colocate.actuate.restore import Report, restore
    from colocate.actuate.scratch import sweep
    from colocate.actuate.statedir import HANDOVER_FILE, Lock
    from colocate.cgroup.port import KernelPort

    directory = state_dir(options)
    ended_well = os.environ.get("SERVICE_RESULT", "success") == "success"  # systemd says so to ExecStopPost
    if options.unless_handed_over and ended_well and directory.is_dir():
        handed_over = StateDirectory(directory).load(HANDOVER_FILE)
        if handed_over is not None and handed_over.get("boot_id") == boot_id():
            print("nothing was undone: the last agent left its grants to a successor")
            return 0
    if not directory.is_dir():
        report = Report(removed=sweep(KernelPort()))  # a demo or benchmark that was killed needs no state directory
    else:
        lock = Lock(directory, "state", role="restore")
        try:
            port = KernelPort()
            journal = Journal(directory, boot_id())
            report = restore(port, journal, move_back=options.move_back)
            journal.close()
            report.removed.extend(sweep(port))
            (directory / HANDOVER_FILE).unlink(missing_ok=True)  # what a successor would have taken over is gone
        finally:
            lock.release()
    if options.output in DATA_FORMS:
        print_data(report, options.output)
    else:
        for title, lines in msgspec.to_builtins(report).items():
            for line in lines:
                print(f"{title.replace('_', ' ')}: {line}")
        print("clean: nothing of ours is left" if report.clean else "not everything could be undone yet, see above")
    return 0 if report.clean else 1
