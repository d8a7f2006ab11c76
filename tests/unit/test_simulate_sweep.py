"""colocate sweep: the same bytes with one process, many, and Ray; and what cannot be is said."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from colocate.cli.main import build_parser, main
from colocate.cli.simulate_sweep import seeds_of
from colocate.simulate.threads import side_by_side
from podgroup.api import POD_GROUP_LABEL
from podgroup.explain.manifests import Manifest, pods_of

JOBS = "submit_seconds,duration_seconds,gpus,members\n" + "".join(
    f"{10 * i},{100 + 37 * i % 400},{1 + i % 8},{1 + i % 3}\n" for i in range(60)
)


@pytest.fixture
def jobs(tmp_path):
    path = tmp_path / "jobs.csv"
    path.write_text(JOBS)
    return str(path)


def swept(capfd, *arguments):
    """What was printed, as it was."""
    assert main(["sweep", *arguments, "-o", "json"]) == 0
    return capfd.readouterr().out


def test_every_policy_has_every_seed_on_every_fleet_and_trace(jobs, capfd):
    arguments = ["--nodes", "8x8", "9x8", "--jobs", jobs, "--seeds", "1-3,7", "--window-jobs", "30"]
    text = swept(capfd, *arguments)
    assert text == swept(capfd, *arguments, "--workers", "1")
    four, five = json.loads(text)
    assert [(run["card"]["policy"], run["seed"]) for run in four["runs"]] == [
        (policy, seed) for policy in ("native", "packing") for seed in (1, 2, 3, 7)
    ]
    firsts = [run["first_job"] for run in four["runs"]]
    assert firsts[:4] == firsts[4:], "policies are compared on the same windows"
    assert (five["nodes"], five["comparisons"][0]["windows"]) == ("9x8", len(set(firsts)))


def test_whoever_interrupts_does_not_wait_for_what_runs():
    """Ctrl-C in the middle of simulations that take minutes ends the command at once."""
    code = """
import os, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs in the background of a script ignores it
from colocate.simulate.threads import side_by_side
threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    list(side_by_side(lambda _: time.sleep(60), [1, 2, 3], 2))
except KeyboardInterrupt:
    sys.exit(130)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=30).returncode == 130


def test_side_by_side_keeps_the_order_and_raises_the_first_error():
    assert list(side_by_side(lambda n: n * n, range(50), 4)) == [n * n for n in range(50)]
    with pytest.raises(ZeroDivisionError):
        list(side_by_side(lambda n: 1 // n, [1, 0, 2], 2))


def test_two_seeds_that_draw_the_same_window_count_once(jobs, capsys):
    arguments = ["--nodes", "8x8", "--jobs", jobs, "--seeds", "1-10", "--window-jobs", "59"]
    assert main(["sweep", *arguments]) == 0
    out, err = capsys.readouterr()
    assert "10 seeds have drawn 2 different windows; each counts once" in err
    assert "geometric mean of 2 windows" in out


def test_what_people_read_names_the_fleet_and_compares(jobs, capsys):
    assert main(["sweep", "--nodes", "8x8", "--jobs", jobs, "--seeds", "1-3", "--window-jobs", "30"]) == 0
    out = capsys.readouterr().out
    assert f"{jobs} on 8x8, means of 3 seeds" in out
    assert "times the mean completion time of native: geometric mean of 2 windows" in out


@contextmanager
def ray_cluster(folder):
    """A real one on this machine, of two CPUs; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--node-ip-address=127.0.0.1"]
    command += [f"--port={port}", "--num-cpus=2", f"--temp-dir={folder}", "--include-dashboard=false", "--block"]
    process = subprocess.Popen(
        [*command, "--disable-usage-stats"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 60
        while subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", f"127.0.0.1:{port}"],
            check=False, capture_output=True,
        ).returncode:  # fmt: skip
            assert time.monotonic() < until
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_gives_the_same_bytes_as_one_process(jobs, tmp_path, tmp_path_factory, monkeypatch):
    pytest.importorskip("ray", reason="Ray (the extra `ray`) is not installed")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    command = [sys.executable, "-m", "colocate.cli.main", "sweep", "--nodes", "8x8", "--jobs", jobs, "--seeds", "1-3"]
    command += ["--window-jobs", "30", "-o", "json"]

    def out(*more):
        return subprocess.run([*command, *more], check=True, capture_output=True, timeout=180).stdout

    expected = out("--workers", "1")
    assert out("--ray", "local", "--workers", "2") == expected
    with ray_cluster(f"/tmp/ray-{os.getpid()}") as address:  # the path of a socket is short
        assert out("--ray", address) == expected


def parent(pid):
    """The process that has started one; 0 once that is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def simulating(pid):
    """Whether a worker (of the raylet) of this process has begun with a simulation: its title says so."""
    found = subprocess.run(["pgrep", "-f", "^ray::_of_bytes"], capture_output=True, text=True, check=False).stdout
    return any(parent(parent(worker)) == pid for worker in map(int, found.split()))


@pytest.mark.slow
def test_whoever_ends_a_sweep_over_ray_is_told_by_what_it_ended(jobs, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="Ray (the extra `ray`) is not installed")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    short = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))  # the path of a socket is short
    command = [
        sys.executable,
        "-m",
        "colocate.cli.main",
        "sweep",
        "--nodes",
        "8x8",
        "--jobs",
        jobs,
        "--seeds",
        "1-9999",
    ]
    try:
        process = subprocess.Popen(
            [*command, "--ray", "local", "--workers", "1"],
            env={**os.environ, "TMPDIR": str(short)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = time.monotonic() + 120
        while not simulating(process.pid):  # while it starts Ray ends a process itself, as if it had crashed
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.2)
        process.terminate()
        assert process.wait(60) == 143
    finally:
        shutil.rmtree(short, ignore_errors=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["--seeds", "3-1"], "--seeds: '3-1' is neither a number nor FIRST-LAST", id="seeds backwards"),
        pytest.param(["--seeds", "0-3"], "--seeds: 0 is no seed", id="seed 0"),
        pytest.param(["--seeds", "1,x"], "--seeds: 'x' is neither", id="no seed"),
        pytest.param(["--seeds", "1-3,2"], "--seeds: one stands there twice", id="a seed twice"),
        pytest.param(["--seeds", "1-99999999"], "--seeds: more than 10000", id="too many seeds"),
        pytest.param(["--policy", "best"], "--policy: 'best' is no policy; known: native", id="an unknown policy"),
        pytest.param(
            ["--window-jobs", "61"], "--window-jobs: 61 are more than the 60 jobs of", id="too large a window"
        ),
        pytest.param(["--nodes", "1x1"], "members of 1 GPUs, 0 m CPU, 0 MiB each do not fit", id="a job too large"),
        pytest.param(["--nodes", "8x8", "8x8"], "--nodes, --jobs: one is named twice", id="a fleet twice"),
        pytest.param(["--ray", "nonsense"], "'nonsense' is none of local, auto and HOST:PORT", id="no address"),
        pytest.param(["--ray", "127.0.0.1:1"], "nobody answers at 127.0.0.1:1: Connection refused", id="nobody there"),
        pytest.param(["--ray", "auto"], "--ray: no Ray at auto", id="none on this machine"),
        pytest.param(["--ray", "auto", "--workers", "2"], "--workers: a Ray cluster has its own", id="its workers"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_what_cannot_be_is_said(arguments, said, jobs, capsys):
    if "--ray" in arguments:
        pytest.importorskip("ray", reason="Ray (the extra `ray`) is not installed")
    given = ["--jobs", jobs, *arguments]
    assert main(["sweep", *(["--nodes", "8x8"] if "--nodes" not in arguments else []), *given]) == 2
    assert said in capsys.readouterr().err


def test_the_sample_is_one_gang_whose_command_is_a_sweep():
    file = Path(__file__).parents[2] / "manifests" / "samples" / "sweep-rayjob.yaml"
    documents = list(yaml.safe_load_all(file.read_text()))
    group, job = documents
    manifests = [Manifest(str(file), i + 1, each) for i, each in enumerate(documents)]
    found = pods_of(manifests, "default", ("colocate",), "2026-01-01T00:00:00Z")
    names = [pod.metadata.labels.get(POD_GROUP_LABEL) for pod in found.pods]
    assert names == [group["metadata"]["name"]] * group["spec"]["minMember"]
    assert (found.groups[0].metadata.name, found.passed_over) == ("sweep", [])
    [_, *command] = job["spec"]["entrypoint"].split()
    options = build_parser("sweep").parse_args(command)
    assert (options.ray, len(options.nodes), seeds_of(options.seeds)[-1]) == ("auto", 2, 50)


def test_seeds_are_numbers_and_ranges():
    assert seeds_of("1-3, 7") == [1, 2, 3, 7]
