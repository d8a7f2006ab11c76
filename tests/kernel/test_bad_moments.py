"""What a user or a machine does at a bad moment: agents that end, hang or cannot start, and jobs that misbehave."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from colocate.actuate.scratch import owned
from colocate.agent.socket import ARM_LATE_SECONDS
from colocate.cgroup.port import KernelPort
from colocate.cgroup.tree import inodes_of, joined
from colocate.errors import ColocateError, NotAnswering
from colocate.jobs import client
from tests.kernel.conftest import HOG, PATIENCE, AgentProcess, colocate, tier_of, wait_for
from tests.kernel.test_agent_on_a_kernel import run

CLI = [sys.executable, "-m", "colocate.cli.main"]


# -- jobs ---------------------------------------------------------------------------------------------------------


def test_a_pipeline_in_a_job_ends_as_it_does_in_a_shell(agent):
    running = agent()
    found = run("--", "sh", "-c", "while :; do echo x; done 2> /dev/null | head -1; echo after")
    assert found.stdout == "x\nafter\n"
    running.stop()


def test_arguments_need_not_be_utf8(agent):
    running = agent()
    found = subprocess.run([*CLI, "run", "--", "printf", b"f\xe9"], capture_output=True, timeout=60 * PATIENCE)
    assert (found.returncode, found.stdout) == (0, b"f\xe9")
    running.stop()


@pytest.mark.layouts
def test_a_job_over_its_memory_is_told_so(agent):
    running = agent()
    found = run("--memory", "40Mi", "--", sys.executable, "-ISc", "b = bytearray(200 << 20); b[::4096] = b'1' * 51200")
    assert found.returncode == 137
    assert "over its --memory of 40.0 MiB" in found.stderr
    running.stop()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        pytest.param(["--cpus", "0"], "--cpus", id="no CPU"),
        pytest.param(["--memory", "1"], "--memory", id="one byte"),
        pytest.param(["--cpus", "9" * 306], "--cpus", id="more CPUs than there are"),
        pytest.param(["--memory", "9" * 320], "--memory", id="more memory than there is"),
        pytest.param(["--name", "a\nb"], "--name", id="a name of two lines"),
        pytest.param(["--deadline", "1h"], "--deadline and --work", id="a deadline without the work"),
        pytest.param(["--deadline", "1h", "--work", "30m"], "give --power-cap", id="a deadline without watts"),
        pytest.param(
            ["--deadline", "0", "--work", "1h", "--power-cap", "200"], "more than 0", id="a deadline that is over"
        ),
        pytest.param(["--config", "/nowhere.yaml"], "/nowhere.yaml", id="no such policy"),
    ],
)
def test_what_no_job_could_be_is_bad_input(dirs, options, says):
    found = run(*options, "--", "true")
    assert found.returncode == 2
    assert says in found.stderr


def test_a_relative_policy_is_found_from_where_the_user_is(dirs, node):
    (dirs / "mine.yaml").write_text(f"spec: {{nodeRoot: {node.path}, http: {{enabled: false}}}}")
    found = run("--config", "mine.yaml", "--", "sh", "-c", "exit 4", cwd=dirs)
    assert found.returncode == 4, found.stderr
    assert wait_for(lambda: inodes_of(node.port, tier_of(node)) == {})


def test_closed_output_does_not_change_a_jobs_exit_code(agent):
    running = agent()
    command = " ".join([*CLI, "run", "--", "sh", "-c", "'exit 6'"])
    assert subprocess.run(f"{command} <&- >&- 2>&-", shell=True, timeout=60 * PATIENCE).returncode == 6
    running.stop()


@pytest.mark.layouts
def test_a_job_that_makes_cgroups_of_its_own_leaves_none(node, agent):
    running = agent()
    mount = node.port.layout.mounts[node.port.layout.controllers["memory"]]
    inner = f"{mount}{tier_of(node)}/nest/inner"
    script = f"mkdir {inner} && echo $$ > {inner}/cgroup.procs && sleep 60 & sleep 0.5; ls {inner} > /dev/null"
    assert run("--name", "nest", "--", "sh", "-c", script).returncode == 0
    assert wait_for(lambda: not os.path.exists(os.path.dirname(inner)))
    running.stop()


# -- agents -------------------------------------------------------------------------------------------------------


def test_jobs_without_an_agent_go_on_and_their_directories_go_with_the_last(node, agent):
    running = agent()
    job = subprocess.Popen([*CLI, "run", "--name", "long", "--", "sh", "-c", f"sleep {4 * PATIENCE}; exit 9"])
    assert wait_for(lambda: running.ask("status")["jobs"] == 1)
    said = running.stop()
    assert "removed when its last process ends" in said
    assert "Traceback" not in said
    assert inodes_of(node.port, joined(tier_of(node), "long"))
    assert job.wait(30 * PATIENCE) == 9
    assert wait_for(lambda: inodes_of(node.port, tier_of(node)) == {})


def test_an_agent_that_cannot_start_does_not_cut_off_the_one_that_runs(node, agent, tmp_path):
    running = agent()
    other = tmp_path / "other.yaml"
    other.write_text("spec: {http: {enabled: false}, calibrate: false}")
    found = colocate("agent", "--shadow", "--config", str(other), "--state-dir", str(tmp_path / "other"))
    assert found.returncode == 2
    assert "another agent answers on" in found.stderr
    assert running.ask("status")["pid"] == running.process.pid
    running.stop()


def test_a_client_that_never_reads_does_not_keep_the_agent_from_ending(node, agent):
    running = agent()
    with socket.socket(socket.AF_UNIX) as rude:
        rude.connect(str(running.socket))
        rude.settimeout(0.2)
        try:
            while True:
                rude.sendall(b'{"op":"explain"}\n' * 100)
        except TimeoutError:
            pass  # its answers fill every buffer
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(15 * PATIENCE) == 0
    running.stop()
    assert inodes_of(node.port, tier_of(node)) == {}


def test_a_hung_agent_is_told_from_a_quick_one(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "ANSWER_SECONDS", 0.3)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "agent.sock"))
        silent.listen()
        connection = client.Connection(tmp_path / "agent.sock")
        with pytest.raises(NotAnswering, match="has not answered for"):
            connection.ask(op="status")
        connection.close()


def test_a_job_that_no_agent_takes_is_not_a_success(tmp_path):
    with socket.socket(socket.AF_UNIX) as rude:
        rude.bind(str(tmp_path / "agent.sock"))
        rude.listen()

        def hang_up():
            for _ in range(2):
                with contextlib.suppress(OSError):  # the socket may be closed before a second caller comes
                    rude.accept()[0].close()

        threading.Thread(target=hang_up, daemon=True).start()
        found = run("--socket", str(tmp_path / "agent.sock"), "--", "echo", "I ran")
    assert found.returncode == 125
    assert found.stdout == ""


def test_an_evaluation_says_so_when_its_agent_ends(agent, dirs):
    running = agent()
    assert wait_for(lambda: running.ask("status")["ticks"] > 2)
    command = [*CLI, "evaluate", "--windows", "60", "--window", "1s", "--wash-out", "0s", "-o", "json"]
    evaluation = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(2.5 * PATIENCE)
    running.stop()
    _, said = evaluation.communicate(timeout=30 * PATIENCE)
    assert evaluation.returncode == 1
    assert "of 60 was not measured" in said


def test_an_evaluation_whose_caller_is_stopped_ends(agent, dirs):
    running = agent()
    assert wait_for(lambda: running.ask("status")["ticks"] > 2)
    command = [*CLI, "evaluate", "--windows", "60", "--window", "1s", "--wash-out", "0s", "-o", "json"]
    evaluation = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    other = client.Connection(running.socket)
    try:
        records = running.directory / "state" / "records"
        assert wait_for(lambda: b'"arm":"o' in b"".join(f.read_bytes() for f in records.glob("*.jsonl")))
        evaluation.send_signal(signal.SIGSTOP)
        with pytest.raises(ColocateError, match="another evaluation is running"):
            other.ask(op="arm", arm="on", seconds=1.0)
        time.sleep(1 + ARM_LATE_SECONDS + 2 * PATIENCE)
        assert other.ask(op="arm", arm="on", seconds=1.0) == {"ok": True}
    finally:
        other.close()
        evaluation.kill()
        evaluation.wait()


def test_a_connection_runs_one_job(agent, dirs):
    running = agent()
    children = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    try:
        connection = client.Connection(running.socket)
        connection.ask(op="run", pid=children[0].pid, name="one")
        with pytest.raises(ColocateError, match="runs 'one' already"):
            connection.ask(op="run", pid=children[1].pid, name="two")
        connection.close()
        other = client.Connection(running.socket)
        with pytest.raises(ColocateError, match="cores"):
            other.ask(op="run", pid=children[1].pid, name="big", cores=1e305)
        other.close()
        assert wait_for(lambda: running.ask("status")["jobs"] == 0)
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_nothing_is_imported_from_where_the_agent_was_started(node, dirs):
    """Its guardian runs as root, perhaps in a directory where others can write."""
    (dirs / "subprocess.py").write_text(f"open({str(dirs / 'ran')!r}, 'w').close()\n")
    config = dirs / "policy.yaml"
    config.write_text(f"spec: {{nodeRoot: {node.path}, http: {{enabled: false}}, calibrate: false}}")
    command = [sys.executable, "-P", "-m", "colocate.cli.main", "agent", "--config", str(config)]
    running = subprocess.Popen(command, cwd=dirs, stderr=subprocess.DEVNULL)
    try:
        assert wait_for((dirs / "run" / "agent.sock").exists)
        children = pathlib.Path(f"/proc/{running.pid}/task/{running.pid}/children")
        assert wait_for(lambda: "guardian" in command_of(children))
        time.sleep(2 * PATIENCE)  # it has imported what it needs
        assert not (dirs / "ran").exists()
    finally:
        running.terminate()
        running.wait()


def command_of(children):
    pids = children.read_text().split()
    with contextlib.suppress(OSError):  # one has just ended
        return " ".join(pathlib.Path(f"/proc/{pid}/cmdline").read_text() for pid in pids)
    return ""


def test_an_agent_that_was_stopped_for_a_while_goes_on_as_before(node, agent):
    running = agent()
    node.start("web", HOG)
    job = subprocess.Popen([*CLI, "run", "--name", "calm", "--", "sleep", "60"])
    assert wait_for(lambda: running.ask("status")["jobs"] == 1)
    running.process.send_signal(signal.SIGSTOP)  # a machine that is suspended looks the same from inside
    time.sleep(3)
    running.process.send_signal(signal.SIGCONT)
    ticks = running.ask("status")["ticks"]
    assert wait_for(lambda: running.ask("status")["ticks"] > ticks + 3)
    assert job.poll() is None
    job.terminate()
    assert job.wait(20 * PATIENCE) == 143
    running.stop()


def test_a_lock_that_a_stranger_could_hold_is_not_readable_for_strangers(agent, dirs):
    running = agent()
    modes = {file.name: file.stat().st_mode & 0o777 for file in (dirs / "run").glob("*.lock")}
    assert set(modes.values()) == {0o600}
    running.stop()


@pytest.mark.layouts
def test_read_only_cgroups_are_named_with_the_mend(dirs, node):
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare(1)")
    (dirs / "policy.yaml").write_text(f"spec: {{nodeRoot: {node.path}, http: {{enabled: false}}, calibrate: false}}")
    mounts = " ".join(KernelPort().layout.mounts.values())
    script = (
        f"for m in {mounts}; do mount --bind $m $m && mount -o remount,bind,ro $m || exit 77; done; "
        f"exec {' '.join(CLI)} agent --config {dirs}/policy.yaml"
    )
    found = subprocess.run(
        ["unshare", "-m", "--propagation", "private", "sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=60 * PATIENCE,
    )
    if found.returncode == 77:
        pytest.skip(f"cannot mount in a namespace of its own: {found.stderr}")
    assert found.returncode == 1, found.stderr
    assert "Read-only file system" in found.stderr
    assert "with cgroups mounted for writing" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    ("number", "ignored"),
    [
        pytest.param(signal.SIGTERM, [], id="SIGTERM"),
        pytest.param(signal.SIGINT, [], id="SIGINT"),
        pytest.param(signal.SIGHUP, [], id="SIGHUP"),
        pytest.param(signal.SIGTERM, [signal.SIGINT], id="SIGTERM in the background of a script"),
    ],
)
def test_a_demo_that_is_ended_leaves_nothing(tmp_path, number, ignored):
    port = KernelPort()
    environment = {**os.environ, "COLOCATE_STATE_DIR": str(tmp_path / "state"), "TMPDIR": str(tmp_path)}
    command = [*CLI, "demo", "--seconds", "3", "--report", str(tmp_path / "report.html")]
    shell = "".join(f"trap '' {n.name.removeprefix('SIG')}; " for n in ignored) + 'exec "$@"'
    before = {signal.SIGHUP: signal.signal(signal.SIGHUP, signal.SIG_DFL)}  # this suite may be nohup's child
    if not ignored:  # or in the background
        before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    demo = subprocess.Popen(["sh", "-c", shell, "sh", *command], env=environment, stderr=subprocess.DEVNULL)
    for n, handler in before.items():
        signal.signal(n, handler)
    hierarchy = port.layout.controllers["cpu"]
    mine = owned(port, "demo", demo.pid)
    assert wait_for(lambda: mine in port.children(hierarchy, "/"))
    time.sleep(1)
    demo.send_signal(number)
    assert demo.wait(30 * PATIENCE) == 128 + number
    left = [name for h in port.layout.mounts for name in port.children(h, "/") if f"-{demo.pid}-" in name]
    assert left == []
    assert not list(tmp_path.glob("colocate-*"))


def test_state_files_of_another_shape_are_set_aside(node, dirs):
    node.make("web")
    (dirs / "state").mkdir()
    for name in ("jobs.json", "model.json", "calibration.json", "handover.json"):
        (dirs / "state" / name).write_text('{"stateVersion":"1"}' if name == "jobs.json" else "[1, 2]")
    running = AgentProcess(node, dirs)
    assert running.ask("status")["jobs"] == 0
    assert (dirs / "state" / "jobs.broken").exists()
    assert "Traceback" not in running.stop()
