"""A guest with systemd as its first process: an ordinary user's delegated scope, and a tier that systemd lets be."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tools.guest import Guest, systemd_lacks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(systemd_lacks()), reason=f"a guest with systemd lacks {systemd_lacks()}"),
]
COLOCATE = "env PYTHONPATH=/opt/site:/opt/project python3 -m colocate.cli.main"
AS_USER = (
    "systemd-run -q --uid=1000 --gid=1000 --slice=user-1000.slice --scope "
    f"env XDG_RUNTIME_DIR=/run/user/1000 HOME=/home/user COLOCATE_JIT=off {COLOCATE}"
)
TIER = "/sys/fs/cgroup/colocate-batch"


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    with Guest(systemd=True) as running:
        code, output = running.run("ip link set lo up; chown user:user /home/user; systemctl start user@1000.service")
        assert code == 0, output
        yield running


def test_an_ordinary_user_gets_the_real_demonstration_in_a_delegated_scope(guest):
    command = (
        f"cd /home/user; {AS_USER} demo -o json --seconds 4 > demo.json 2> demo.err; echo $?; cat demo.err demo.json"
    )
    code, output = guest.run(command, 600)
    assert code == 0
    first, _, rest = output.partition("\n")
    assert first == "0", rest
    found = msgspec.json.decode(rest[rest.index("{") : rest.rindex("}") + 1])
    assert found["simulated"] is False
    assert found["host_unchanged"] is True, found["changes"]
    assert all(arm["requests"] > 0 for arm in found["arms"].values())
    assert all(arm["service_restarts"] == 0 for name, arm in found["arms"].items() if name != "unmanaged")
    _, left = guest.run("find /sys/fs/cgroup -name '*colocate*' 2>/dev/null")
    assert left.strip() == ""


def test_an_ordinary_user_without_an_agent_brings_one_in_a_scope_of_his_own(guest):
    code, output = guest.run(f"cd /home/user; {AS_USER} run --name mine -- sh -c 'cat /proc/self/cgroup; exit 6'", 200)
    assert code == 6, output
    assert output.strip().startswith("0::/user.slice/user-1000.slice/user@1000.service/app.slice/run-")
    assert output.strip().endswith(".scope/colocate-batch/mine")
    _, left = guest.run(
        "for i in $(seq 100); do left=$(find /sys/fs/cgroup -name '*colocate*' 2>/dev/null); [ \"$left\" ] || break; "
        'sleep 0.2; done; echo "$left"'
    )
    assert left.strip() == ""


UNIT = Path(__file__).resolve().parents[2] / "manifests" / "systemd" / "colocate.service"


def test_the_shipped_unit_starts_feeds_its_watchdog_and_is_undone_when_it_is_killed(guest):
    program = (
        '#!/bin/sh\nexec env COLOCATE_JIT=off PYTHONPATH=/opt/site:/opt/project python3 -m colocate.cli.main "$@"\n'
    )
    policy = "spec: {http: {enabled: false}, calibrate: false}\n"
    files = {"/usr/local/bin/colocate": program, "/etc/colocate/policy.yaml": policy}
    files["/run/systemd/system/colocate.service"] = UNIT.read_text()
    for path, text in files.items():
        coded = base64.b64encode(text.encode()).decode()
        code, output = guest.run(f"mkdir -p $(dirname {path}); echo {coded} | base64 -d > {path}; chmod 755 {path}")
        assert code == 0, output
    code, output = guest.run("systemctl daemon-reload && systemctl start colocate && systemctl is-active colocate", 200)
    assert (code, output.strip()) == (0, "active"), output
    _, fed = guest.run(
        "sleep 5; systemctl show -P WatchdogTimestampMonotonic colocate; systemctl show -P WatchdogUSec colocate"
    )
    first, timeout = fed.split()
    assert (int(first) > 0, timeout) == (True, "1min"), fed
    _, later = guest.run("sleep 5; systemctl show -P WatchdogTimestampMonotonic colocate")
    assert int(later) > int(first), "each tick feeds it"
    _, output = guest.run(
        "systemctl kill -s KILL --kill-whom=main colocate; "
        'for i in $(seq 150); do [ "$(systemctl show -P NRestarts colocate)" = 1 ] && break; sleep 0.2; done; '
        f'for i in $(seq 150); do [ "$(systemctl is-active colocate)" = active ] && break; sleep 0.2; done; '
        f"systemctl is-active colocate; cat {TIER}/cpu.weight"
    )
    assert output.split() == ["active", "1"], output
    guest.run("systemctl stop colocate", 200)
    _, left = guest.run(f"ls -d {TIER} 2>/dev/null")
    assert left.strip() == ""


@pytest.fixture(scope="module")
def agent(guest: Guest) -> Iterator[None]:
    config = "spec: {http: {enabled: false}, calibrate: false, tick: 500ms}"
    unit = "systemd-run -q --unit=agent -p KillMode=process -p StandardError=file:/tmp/log -E COLOCATE_JIT=off"
    guest.run(f"echo '{config}' > /tmp/p.yaml; {unit} {COLOCATE} agent --config /tmp/p.yaml")
    code, _ = guest.run("for i in $(seq 150); do [ -S /run/colocate/agent.sock ] && exit 0; sleep 0.2; done; exit 1")
    _, log = guest.run("cat /tmp/log")
    assert code == 0, log
    yield
    guest.run("systemctl stop agent.service")
    _, left = guest.run(f"ls -d {TIER} 2>/dev/null")
    _, log = guest.run("tail -5 /tmp/log")
    assert left.strip() == "", log


def as_uid(uid: int, groups: str, command: str) -> str:
    who = f"/usr/bin/setpriv --reuid={uid} --regid={uid} --groups={groups}"
    return f"cd /tmp; {who} env HOME=/tmp XDG_RUNTIME_DIR=/tmp/none {COLOCATE} {command}"


def test_members_of_the_group_run_jobs_in_roots_tier_under_their_own_uid(guest, agent):
    code, output = guest.run(
        as_uid(1000, "1000,900", "run --name mine -- sh -c 'id -u; cat /proc/self/cgroup; exit 5'")
    )
    assert code == 5, output
    assert output.split() == ["1000", "0::/colocate-batch/mine.1000"], "names of one user are no business of another's"


def test_strangers_are_told_which_group_they_need(guest, agent):
    code, output = guest.run(as_uid(1001, "1001", "run -- true"))
    assert code == 125
    assert "join the group colocate" in output


def test_systemd_reloading_and_starting_units_leaves_the_tier_as_it_is(guest, agent):
    job = f"systemd-run -q --unit=job {COLOCATE} run --name hog -- sh -c 'while :; do :; done'"
    guest.run(f"{job}; for i in $(seq 100); do [ -s {TIER}/hog/cgroup.procs ] && break; sleep 0.2; done")
    code, output = guest.run(
        "systemctl daemon-reload && systemd-run -q --unit=web -p CPUWeight=200 sleep 300 && "
        "systemctl set-property web.service CPUQuota=50% && systemctl daemon-reexec && systemctl stop web.service && "
        "sleep 2"
    )
    assert code == 0, output
    _, weight = guest.run(f"cat {TIER}/cpu.weight")
    _, jobs = guest.run(f"cat {TIER}/hog/cgroup.procs | wc -l")
    _, controllers = guest.run(f"cat {TIER}/cgroup.controllers")
    _, log = guest.run("cat /tmp/log")
    assert weight.strip() == "1"
    assert jobs.strip() == "1"
    assert {"cpu", "memory", "cpuset"} <= set(controllers.split())
    assert '"event":"drift"' not in log, log
    assert "Traceback" not in log, log
    guest.run(f"systemctl stop job.service; for i in $(seq 100); do [ -d {TIER}/hog ] || break; sleep 0.2; done")
