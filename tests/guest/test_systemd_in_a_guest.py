"""A guest with systemd as its first process: an ordinary user's delegated scope, and a tier that systemd lets be."""

from __future__ import annotations

from collections.abc import Iterator

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
    assert found["arms"]["colocate"]["batch_processes_lost"] == 0
    _, left = guest.run("find /sys/fs/cgroup -name '*colocate*'")
    assert left.strip() == ""


def test_systemd_reloading_and_starting_units_leaves_the_tier_as_it_is(guest):
    config = "spec: {http: {enabled: false}, calibrate: false, tick: 500ms}"
    start = f"echo '{config}' > /tmp/p.yaml; COLOCATE_JIT=off nohup {COLOCATE} agent --config /tmp/p.yaml"
    guest.run(f"({start} > /tmp/agent.log 2>&1 &); for i in $(seq 100); do [ -d {TIER} ] && break; sleep 0.2; done")
    job = f"(nohup {COLOCATE} run --name hog -- sh -c 'while :; do :; done' > /tmp/job.log 2>&1 &)"
    guest.run(f"{job}; for i in $(seq 100); do [ -s {TIER}/hog/cgroup.procs ] && break; sleep 0.2; done")
    code, output = guest.run(
        "systemctl daemon-reload && systemd-run -q --unit=web -p CPUWeight=200 sleep 300 && "
        "systemctl set-property web.service CPUQuota=50% && systemctl daemon-reexec && systemctl stop web.service; "
        "sleep 2"
    )
    assert code == 0, output
    _, weight = guest.run(f"cat {TIER}/cpu.weight")
    _, jobs = guest.run(f"cat {TIER}/hog/cgroup.procs | wc -l")
    _, controllers = guest.run(f"cat {TIER}/cgroup.controllers")
    _, log = guest.run("cat /tmp/agent.log")
    assert weight.strip() == "1"
    assert jobs.strip() == "1"
    assert {"cpu", "memory", "cpuset"} <= set(controllers.split())
    assert '"event":"drift"' not in log, log
    assert "Traceback" not in log, log
    code, output = guest.run(
        "pkill -TERM -f 'run --name hog'; sleep 2; pkill -TERM -f 'agent --config'; sleep 3; ls -d /sys/fs/cgroup/colo*"
    )
    assert "colocate-batch" not in output.replace("No such file", ""), output
