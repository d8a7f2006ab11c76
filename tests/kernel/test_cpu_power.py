"""S2.8: the CPUs' power budget on a real kernel: batch is throttled by real bandwidth until a meter says that it fits.

The meter is a folder as the kernel's powercap has it, fed by what the processes really use.
"""

from __future__ import annotations

import os
import subprocess
import time
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from colocate.cgroup.knobfiles import read_knob
from colocate.cgroup.tree import inodes_of, joined, processes_anywhere
from colocate.demo.power.package import IDLE_WATTS, Package, UsedIn
from colocate.localcluster.controlplane import free_ports
from tests.kernel.conftest import POLICY, AgentProcess, tier_of, wait_for
from tests.kernel.fake_cards import CLI, end

SPIN = "while :; do :; done"


def watts(package, seconds):
    """What it draws from now on."""
    before, began = package.joules, time.monotonic()
    time.sleep(seconds)
    return (package.joules - before) / (time.monotonic() - began)


@pytest.fixture
def spinners(node):
    """CPU seconds of whoever is in the tier, also of those who have ended meanwhile."""
    return UsedIn(node.port, tier_of(node))


def about_cpus(running):
    return next((v for v in running.ask("explain")["plan"]["verdicts"] if v.get("subject") == "cpus"), {})


def test_s2_8_batch_gives_way_until_the_cpus_fit_their_budget_and_services_have_no_limit(
    node, agent, spinners, tmp_path
):
    package = Package(tmp_path / "powercap", spinners)
    job = None
    try:
        budget = 35 if (os.cpu_count() or 1) > 1 else 28
        running = agent(tick="1s", more=f"power: {{cpuBudget: {budget}, powercap: {package.root}}}")
        assert wait_for(lambda: "watts" in about_cpus(running).get("numbers", {}))
        both = f"{SPIN} & {SPIN}"
        job = subprocess.Popen([*CLI, "run", "--name", "spin", "--", "sh", "-c", f"({both}) & wait"])
        assert wait_for(lambda: about_cpus(running).get("state") == "capped")
        tier = tier_of(node)
        assert wait_for(lambda: (read_knob(node.port, tier, "cpu.max", inodes_of(node.port, tier)) or "max") != "max")
        time.sleep(3.0)
        drawn = watts(package, 8.0)
        assert drawn <= 1.05 * budget, f"{drawn:.1f} W"
        assert drawn >= IDLE_WATTS + 1.0, "batch still runs"
        web = joined(node.path, "web")
        assert (read_knob(node.port, web, "cpu.max", inodes_of(node.port, web)) or "max").startswith("max")
        end(job)
        for pid in processes_anywhere(node.port, joined(tier, "spin")):
            node.port.kill(pid, 9)
        assert wait_for(lambda: about_cpus(running).get("state") == "open", 90), about_cpus(running)
    finally:
        if job is not None:
            end(job)
        package.close()


def test_s2_8_a_meter_that_is_not_there_is_said(node, agent, tmp_path):
    running = agent(more=f"power: {{cpuBudget: 50, powercap: {tmp_path / 'none'}}}")
    assert wait_for(lambda: "cpu power" in running.ask("explain")["problems"])
    assert "has no zone of a package" in running.ask("explain")["problems"]["cpu power"]


def with_http(port):
    return POLICY.replace("http: {{port: 0, enabled: false}}", f"http: {{{{port: {port}, enabled: true}}}}")


def test_s2_8_energy_is_told_by_who_drew_it_and_sums_up_to_the_meter(node, dirs, spinners, tmp_path, monkeypatch):
    package, port = Package(tmp_path / "powercap", spinners), free_ports(1)[0]
    node.make("web")
    more = f"power: {{attribution: true, powercap: {package.root}}}"
    monkeypatch.setattr("tests.kernel.conftest.POLICY", with_http(port))
    running, job = AgentProcess(node, dirs, more=more), None

    def series(name, **labels):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                text = answer.read().decode()
        except OSError:
            return []
        samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
        return [s.value for s in samples if s.name == name and labels.items() <= s.labels.items()]

    try:
        job = subprocess.Popen([*CLI, "run", "--name", "spin", "--", "sh", "-c", SPIN])
        assert wait_for(lambda: sum(series("colocate_job_cpu_joules_total", job="spin")) > 10, 60)
        parts = ("colocate_job_cpu", "kepler_container_cpu", "kepler_node_cpu_idle", "colocate_node_cpu_others")

        def conserved():
            """Each question is answered from one account, two questions perhaps from two."""
            before = series("kepler_node_cpu_joules_total")
            whole = sum(sum(series(f"{part}_joules_total")) for part in parts)
            return before == series("kepler_node_cpu_joules_total") and abs(whole - sum(before)) < 1e-6 * whole

        assert wait_for(conserved)
        assert sum(series("kepler_node_cpu_joules_total")) <= package.joules + 1.0
        end(job)
        assert wait_for(lambda: series("colocate_job_cpu_joules_total", job="spin", state="terminated"), 30)
    finally:
        if job is not None:
            end(job)
        running.stop()
        package.close()
