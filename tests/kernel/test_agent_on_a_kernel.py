"""The agent on this machine's own cgroups, and its command line as a user meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from colocate.cgroup.knobfiles import read_knob
from colocate.cgroup.layout import UNIFIED
from colocate.cgroup.tree import inodes_of, joined, processes_below
from colocate.observe.cgroup import read_workload
from tests.kernel.conftest import DUTY, HOG, PATIENCE, AgentProcess, colocate, tier_of, wait_for


@pytest.mark.layouts
def test_the_tier_is_made_at_the_least_weight_and_gone_after_sigterm(node, agent):
    running = agent()
    path = tier_of(node)
    assert read_knob(node.port, path, "cpu.weight", inodes_of(node.port, path)) == "1"
    assert {"cpu", "memory"} <= {c.partition(",")[0] for c in inodes_of(node.port, path)} or UNIFIED in inodes_of(
        node.port, path
    )
    running.stop()
    assert running.process.returncode == 0
    assert inodes_of(node.port, path) == {}


@pytest.mark.layouts
def test_jobs_follow_the_tier_into_the_tree_of_a_kubelet_that_starts_later(node, agent):
    running = agent()
    command = [sys.executable, "-m", "colocate.cli.main", "run", "--name", "follows", "--memory", "64Mi", "--"]
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    job = subprocess.Popen([*command, sys.executable, "-c", code], stdin=subprocess.DEVNULL)
    try:
        before, after = joined(tier_of(node), "follows"), joined(node.path, "kubepods/batch/follows")

        def processes_in(path):
            return processes_below(node.port, node.port.layout.hierarchy("cpu"), path)

        assert wait_for(lambda: len(processes_in(before)) == 2)
        moved = set(processes_in(before))
        for inner in ("kubepods", "kubepods/burstable", "kubepods/besteffort"):
            node.make(inner, inner=True)
        assert wait_for(lambda: set(processes_in(after)) == moved)
        assert wait_for(lambda: inodes_of(node.port, tier_of(node)) == {}), "the plain tier has gone"
        assert read_knob(node.port, after, "memory.max", inodes_of(node.port, after)) == str(64 << 20)
        assert wait_for(lambda: "job:follows" in running.ask("top")["snapshot"]["workloads"])
    finally:
        job.terminate()
        job.wait(20 * PATIENCE)
    assert wait_for(lambda: inodes_of(node.port, after) == {})
    said = running.stop()
    assert "job_rehomed" in said
    assert inodes_of(node.port, joined(node.path, "kubepods/batch")) == {}


def test_a_second_agent_is_refused_with_the_pid_of_the_first(agent, dirs):
    running = agent()
    found = colocate("agent", "--config", str(running.config))
    assert found.returncode == 1
    assert f"(pid {running.process.pid})" in found.stderr
    running.stop()


def test_status_top_explain_and_metrics_answer(node, agent):
    running = agent(more="cpu: {reserve: 7%}")
    node.start("web", HOG, cpu=0)
    time.sleep(1)
    assert running.ask("status")["pid"] == running.process.pid
    verdicts = running.ask("top")["plan"]["verdicts"]
    assert {v["law"] for v in verdicts} == {"cpu", "memory", "eviction", "freeze", "allocatable"}
    shown = colocate("explain", "web").stdout
    assert shown.startswith("web is a service at "), "sentences first"
    assert "guard_rail_cores" not in shown
    assert "guard_rail_cores" in colocate("explain", "web", "-o", "wide").stdout
    assert colocate("explain", "nobody").returncode == 2
    running.stop()


def test_the_http_server_tells_health_and_metrics(node, dirs):
    node.make("web")
    running = AgentProcess(node, dirs)
    running.config.write_text(running.config.read_text().replace("enabled: false", "enabled: true"))
    running.stop()
    with open(dirs / "policy.yaml") as file:
        text = file.read().replace("port: 0", "port: 19464")
    (dirs / "policy.yaml").write_text(text)
    command = [sys.executable, "-m", "colocate.cli.main", "agent", "--config", str(dirs / "policy.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:

        def get(path):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:19464{path}", timeout=2) as answer:
                    return answer.read().decode()
            except OSError:
                return ""

        assert wait_for(lambda: get("/readyz"))
        assert "last tick" in get("/healthz")
        assert 'colocate_node_cpu_cores{tier="batch"}' in get("/metrics")
        assert json.loads(get("/debug/plan"))["plan"]["verdicts"]
    finally:
        process.terminate()
        process.wait(20 * PATIENCE)


def test_an_invalid_policy_keeps_the_old_one_in_force_and_says_why(agent):
    running = agent()
    good = running.config.read_text()
    running.config.write_text(good.replace("tick: 250ms", "tik: 250ms"))
    assert wait_for(lambda: "did you mean tick" in str(running.ask("status")["problems"]))
    running.config.write_text(good)
    assert wait_for(lambda: "policy" not in running.ask("status")["problems"])
    running.stop()


def test_a_service_that_matches_nothing_is_a_problem_not_an_error(node, dirs):
    running = AgentProcess(node, dirs)
    assert wait_for(lambda: "matches nothing" in str(running.ask("status")["problems"]))
    running.stop()


def test_shadow_makes_no_cgroup(node, agent):
    running = agent(options=("--shadow",))
    time.sleep(1)
    assert running.ask("status")["shadow"] is True
    assert inodes_of(node.port, tier_of(node)) == {}
    running.stop()


@pytest.mark.layouts
def test_batch_in_place_is_governed_and_put_back_byte_for_byte(node, agent):
    path = node.make("nightly")
    node.knob("nightly", "cpu.weight", "50")
    hierarchy = node.port.layout.controllers["cpu"]
    file = "cpu.weight" if hierarchy == UNIFIED else "cpu.shares"
    before = node.port.read(hierarchy, path, file)
    running = agent(more="batch: [{name: nightly, selector: {cgroup: /nightly}}]")
    inodes = inodes_of(node.port, path)
    assert wait_for(lambda: read_knob(node.port, path, "cpu.weight", inodes) == "1")
    running.stop()
    assert node.port.read(hierarchy, path, file) == before


# -- colocate run -------------------------------------------------------------------------------------------------


def run(*arguments, **options):
    return colocate("run", *arguments, **options)


def test_run_passes_output_and_exit_code_through(agent):
    running = agent()
    found = run("--name", "hello", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (found.stdout, found.stderr, found.returncode) == ("out\n", "err\n", 7)
    running.stop()


def test_a_job_knows_its_name_and_is_the_kernels_first_victim(agent):
    agent()
    found = run("--name", "train", "--", "sh", "-c", "echo $COLOCATE_JOB; cat /proc/self/oom_score_adj")
    assert found.stdout.split() == ["train", "1000"]


def test_a_job_says_that_its_state_is_saved_and_how_far_it_is(agent):
    running = agent()
    script = f"{sys.executable} -m colocate.cli.main checkpointed; echo $?; read _"
    command = [sys.executable, "-m", "colocate.cli.main", "run", "--name", "train", "--", "sh", "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "0\n"
        (known,) = running.ask("explain")["jobs"]
        assert known["checkpointed_seconds"] > known["started_seconds"]
        job.communicate("\n")
    with subprocess.Popen(
        [*command[:-1], script.replace("checkpointed", "progress 40%")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "0\n"
        (known,) = running.ask("explain")["jobs"]
        assert (known["done_ratio"], known["done_at_seconds"] > known["started_seconds"]) == (0.4, True)
        job.communicate("\n")
    assert colocate("progress", "120%").returncode == 2
    outside = colocate("checkpointed")
    assert outside.returncode == 2
    assert "COLOCATE_JOB is not set" in outside.stderr


@pytest.mark.layouts
def test_run_puts_the_command_into_the_tier_in_every_hierarchy(node, agent):
    running = agent()
    found = run("--name", "where", "--", "cat", "/proc/self/cgroup")
    tier = tier_of(node)
    inside = [line for line in found.stdout.splitlines() if line.endswith(f"{tier}/where")]
    assert len(inside) >= min(len(node.port.layout.mounts), 4) or (
        UNIFIED in node.port.layout.mounts and len(inside) == 1
    )
    assert wait_for(lambda: not node.port.children(node.port.layout.controllers["cpu"], tier))
    running.stop()


@pytest.mark.parametrize(
    ("command", "code"),
    [
        pytest.param(["sh", "-c", "kill -TERM $$"], 143, id="128+n for a signal"),
        pytest.param(["no-such-command"], 127, id="127 for a command that does not exist"),
        pytest.param(["/etc/hostname"], 126, id="126 for one that cannot be executed"),
        pytest.param(["true"], 0, id="0 for success"),
    ],
)
def test_run_ends_as_shells_do(agent, command, code):
    running = agent()
    assert run("--", *command).returncode == code
    running.stop()


def test_run_without_a_command_is_bad_input(dirs):
    assert run("--name", "x").returncode == 2
    assert run("--cpus", "many", "--", "true").returncode == 2


def test_a_taken_name_is_refused(agent):
    running = agent()
    first = subprocess.Popen([sys.executable, "-m", "colocate.cli.main", "run", "--name", "one", "--", "sleep", "5"])
    assert wait_for(lambda: running.ask("status")["jobs"] == 1)
    second = run("--name", "one", "--", "true")
    assert second.returncode == 125
    assert "taken" in second.stderr
    first.terminate()
    first.wait(10 * PATIENCE)
    running.stop()


def test_an_evicted_job_has_its_own_exit_code_and_a_reason(agent):
    running = agent()
    found = run("--name", "long", "--max-runtime", "500ms", "--", "sleep", "30")
    assert found.returncode == 75
    assert "evicted: MaxRuntime" in found.stderr
    afterwards = colocate("explain", "long")
    assert afterwards.returncode == 0, afterwards.stderr
    assert "SIGTERM, MaxRuntime" in afterwards.stdout
    running.stop()


@pytest.mark.layouts
def test_a_job_that_ignores_sigterm_and_forks_out_leaves_nothing(node, agent):
    running = agent(more="memory: {terminationGrace: 500ms}")
    found = run("--name", "stubborn", "--", "sh", "-c", "trap '' TERM; (trap '' TERM; sleep 60) & exit 3")
    assert found.returncode == 3
    tier, hierarchy = tier_of(node), node.port.layout.controllers["cpu"]
    assert wait_for(lambda: processes_below(node.port, hierarchy, tier) == [])
    assert wait_for(lambda: not node.port.children(hierarchy, tier))
    running.stop()


def test_signals_are_passed_to_the_command(agent, dirs):
    running = agent()
    script = f"trap 'echo got > {dirs}/usr1' USR1; touch {dirs}/ready; while :; do sleep 0.05; done"
    job = subprocess.Popen([sys.executable, "-m", "colocate.cli.main", "run", "--", "sh", "-c", script])
    assert wait_for((dirs / "ready").exists)
    job.send_signal(signal.SIGUSR1)
    assert wait_for((dirs / "usr1").exists)
    job.send_signal(signal.SIGTERM)
    assert job.wait(10 * PATIENCE) == 143
    running.stop()


def test_without_an_agent_run_brings_one_that_ends_after_its_last_job(dirs, node):
    config = dirs / "embedded.yaml"
    config.write_text(f"spec: {{nodeRoot: {node.path}}}")
    found = run("--config", str(config), "--", "sh", "-c", "exit 4")
    assert found.returncode == 4, found.stderr
    assert wait_for(lambda: not (dirs / "run" / "agent.sock").exists())
    assert wait_for(lambda: inodes_of(node.port, tier_of(node)) == {})


# -- crashes ------------------------------------------------------------------------------------------------------


def frozen(node):
    tier = tier_of(node)
    paths = [tier] + [joined(tier, c) for c in node.port.children(UNIFIED, tier)]
    return any(read_knob(node.port, p, "cgroup.freeze", inodes_of(node.port, p)) == "1" for p in paths)


@pytest.mark.layouts
def test_a_killed_agent_leaves_nothing_frozen_even_if_nobody_restarts_it(node, agent):
    running = agent()
    job = subprocess.Popen([sys.executable, "-m", "colocate.cli.main", "run", "--name", "ice", "--", "sleep", "60"])
    assert wait_for(lambda: running.ask("status")["jobs"] == 1)
    tier = tier_of(node)
    path = joined(tier, "ice")
    running.process.send_signal(signal.SIGSTOP)
    node.knob(path.removeprefix(node.path), "cgroup.freeze", "1")
    assert frozen(node)
    running.stop(signal.SIGKILL)
    started = time.monotonic()
    assert wait_for(lambda: not frozen(node))
    assert time.monotonic() - started < 5
    assert read_knob(node.port, tier, "cpu.weight", inodes_of(node.port, tier)) == "1"
    job.terminate()
    job.wait(10 * PATIENCE)


@pytest.mark.layouts
def test_the_next_start_undoes_a_crash_and_removes_what_is_empty(node, agent):
    path = node.make("nightly")
    node.knob("nightly", "cpu.weight", "50")
    before = read_knob(node.port, path, "cpu.weight", inodes_of(node.port, path))
    running = agent(more="batch: [{name: nightly, selector: {cgroup: /nightly}}]")
    assert wait_for(lambda: read_knob(node.port, path, "cpu.weight", inodes_of(node.port, path)) == "1")
    running.stop(signal.SIGKILL)
    assert wait_for(lambda: read_knob(node.port, path, "cpu.weight", inodes_of(node.port, path)) == before)
    assert colocate("restore").returncode == 0
    assert inodes_of(node.port, tier_of(node)) == {}


def test_a_handover_is_left_to_the_successor_by_the_unit_and_undone_by_an_operator(node, agent):
    path = node.make("nightly")
    before = read_knob(node.port, path, "cpu.weight", inodes_of(node.port, path))
    running = agent(options=("--handover",), more="batch: [{name: nightly, selector: {cgroup: /nightly}}]")
    assert wait_for(lambda: read_knob(node.port, path, "cpu.weight", inodes_of(node.port, path)) == "1")
    running.stop()
    left = colocate("restore", "--unless-handed-over")
    assert (left.returncode, "successor" in left.stdout) == (0, True)
    assert read_knob(node.port, path, "cpu.weight", inodes_of(node.port, path)) == "1"
    assert colocate("restore").returncode == 0
    assert read_knob(node.port, path, "cpu.weight", inodes_of(node.port, path)) == before
    assert "successor" not in colocate("restore", "--unless-handed-over").stdout, "nothing is handed over any more"


def test_restore_says_by_its_exit_code_that_a_tier_with_jobs_is_left(node, agent):
    running = agent()
    job = subprocess.Popen([sys.executable, "-m", "colocate.cli.main", "run", "--name", "long", "--", "sleep", "60"])
    assert wait_for(lambda: running.ask("status")["jobs"] == 1)
    running.stop()
    found = colocate("restore")
    assert found.returncode == 1, found.stdout
    assert "occupied" in found.stdout
    job.terminate()
    job.wait(10 * PATIENCE)
    assert wait_for(lambda: colocate("restore").returncode == 0)


# -- below BestEffort ---------------------------------------------------------------------------------------------


def used(node, path) -> float:
    """CPU seconds that a cgroup has used: what its processes used before they came into it is not its."""
    found = read_workload(node.port, id_=path, name=path, tier="service", path=path, inodes=inodes_of(node.port, path))
    return (found.cpu_usage_us or 0) / 1e6 if found is not None else 0.0


HOG_ON_0 = f"import os; os.sched_setaffinity(0, {{0}})\n{HOG}"


@pytest.mark.slow
def test_batch_is_strictly_below_best_effort(node, dirs, elsewhere):
    """Service at 60 % duty, a BestEffort hog and a batch hog on one CPU, 30 s; what the first questions cost counts."""
    node.knob("/", "cpuset.cpus", "0")
    for path in ("kubepods", "kubepods/burstable", "kubepods/besteffort"):
        node.make(path, inner=True)
    node.make("kubepods/burstable/podservice")
    node.make("kubepods/besteffort/podhog")
    node.make("web")
    node.knob("kubepods/besteffort", "cpu.weight", "1")
    seconds = 30.0
    # Of 0.34-0.4 cores of BestEffort batch's floor (0.01 cores) and what it may displace (5 %, at least 0.015 cores:
    # designs/0001) are 7-8 %. By weight alone it would have a quarter.
    least = 0.9
    alone = node.start("kubepods/burstable/podservice", DUTY, "0.6", "5", cpu=0)
    alone_median = float(alone.communicate(timeout=30 * PATIENCE)[0].split()[0])
    running = AgentProcess(node, dirs, tick="200ms")
    tier, best_effort = joined(node.path, "kubepods", "batch"), joined(node.path, "kubepods", "besteffort")
    assert inodes_of(node.port, tier), "the tier is BestEffort's sibling"
    job = subprocess.Popen(
        [sys.executable, "-m", "colocate.cli.main", "run", "--name", "hog", "--", sys.executable, "-ISc", HOG_ON_0]
    )
    assert wait_for(lambda: running.ask("status")["jobs"] == 1)
    node.start("kubepods/besteffort/podhog", HOG, cpu=0)
    before = used(node, best_effort), used(node, tier)
    service = node.start("kubepods/burstable/podservice", DUTY, "0.6", str(seconds), cpu=0)
    seen = []
    while service.poll() is None:
        time.sleep(1)
        seen.append((round(used(node, best_effort) - before[0], 2), round(used(node, tier) - before[1], 2)))
    median = float(service.communicate()[0].split()[0])
    got, batch = used(node, best_effort) - before[0], used(node, tier) - before[1]
    job.terminate()
    job.wait(10 * PATIENCE)
    running.stop()
    assert got / (got + batch) >= least, f"BestEffort {got:.2f} s, batch {batch:.2f} s, second by second: {seen}"
    assert median <= 1.25 * alone_median, (
        f"{median} s, alone {alone_median} s; {got:.2f} s BestEffort, {batch:.2f} s batch"
    )


def test_hogs_that_wait_only_for_each_other_do_not_starve_batch(node, dirs):
    for path in ("kubepods", "kubepods/burstable", "kubepods/besteffort"):
        node.make(path, inner=True)
    node.make("kubepods/besteffort/podhog")
    node.make("web")
    node.knob("kubepods/besteffort", "cpu.weight", "1")
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two CPUs")
    running = AgentProcess(node, dirs, tick=f"{200 * PATIENCE:.0f}ms")
    for _ in range(2):
        node.start("kubepods/besteffort/podhog", HOG, cpu=0)
    job = subprocess.Popen(
        [sys.executable, "-m", "colocate.cli.main", "run", "--name", "hog", "--", sys.executable, "-ISc", HOG]
    )
    tier, above = joined(node.path, "kubepods", "batch"), joined(node.path, "kubepods", "besteffort")

    agents = 0.0 if PATIENCE == 1 else 0.3  # what the agent itself takes of an emulated CPU
    seen = []

    def both_run():
        """BestEffort has its CPU, and batch the other one, over five seconds."""
        before, started = (used(node, above), used(node, tier)), time.monotonic()
        time.sleep(5)
        seconds = time.monotonic() - started
        rates = ((used(node, above) - before[0]) / seconds, (used(node, tier) - before[1]) / seconds)
        seen.append(rates)
        return rates[0] > 0.8 - agents and rates[1] > 0.6 - agents

    found = wait_for(both_run, 60)  # others may use the CPUs meanwhile
    job.terminate()
    job.wait(10 * PATIENCE)
    running.stop()
    assert found, seen
