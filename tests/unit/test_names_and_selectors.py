"""Names of jobs and pods, kubelet's tree wherever it is nested, and what may be governed in place (case M)."""

import pytest

from colocate.actuate.tier import check_job_name
from colocate.cgroup.layout import UNIFIED, parse_mounts
from colocate.cgroup.tree import find_tree, inodes_of
from colocate.errors import BadInput
from colocate.kernelmodel import ModelKernel
from colocate.observe.latency import LatencyScraper
from colocate.observe.observer import Observer
from colocate.observe.workloads import discover, pod_uid
from colocate.policy.schema import BatchPolicy, ColocationPolicy, PolicySpec, Selector, ServicePolicy
from colocate.snapshot import Latency


@pytest.mark.parametrize("name", ["train", "a", "job-1", "x.y"])
def test_a_job_name_can_be_a_directory(name):
    assert check_job_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "Train", "a/b", "..", "-x", "batchpods", "cpu.max", "cgroup.procs", "tasks", "x" * 64]
)
def test_a_job_name_that_would_break_the_tree_is_refused(name):
    with pytest.raises(BadInput, match="--name"):
        check_job_name(name)


@pytest.mark.parametrize(
    ("directory", "uid"),
    [
        pytest.param("podABC", "ABC", id="a pod of the cgroupfs driver"),
        pytest.param("kubepods-burstable-pod1_2.slice", "1-2", id="a pod of the systemd driver"),
        pytest.param("batch", None, id="our tier is none"),
        pytest.param("kubepods-batch.slice", None, id="also with systemd"),
        pytest.param("batchpods", "s", id="a bad name would be the pod s"),
        pytest.param("xpodypod", None, id="three parts are none"),
    ],
)
def test_pods_are_told_as_kubelet_tells_them(directory, uid):
    assert pod_uid(directory) == uid


def make(*paths):
    kernel = ModelKernel(version=2)
    for path in paths:
        kernel.mkdir(UNIFIED, path)
    return kernel


@pytest.mark.parametrize(
    ("paths", "tier"),
    [
        pytest.param([], "/colocate-batch", id="a plain host"),
        pytest.param(["/kubepods"], "/kubepods/batch", id="the cgroupfs driver"),
        pytest.param(["/kubepods.slice"], "/kubepods.slice/kubepods-batch.slice", id="the systemd driver"),
        pytest.param(
            ["/kubelet.slice", "/kubelet.slice/kubelet-kubepods.slice"],
            "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-batch.slice",
            id="nested, as kind nests it",
        ),
    ],
)
def test_the_tier_is_best_efforts_sibling_wherever_the_tree_is(paths, tier):
    assert find_tree(make(*paths), "/").tier_path == tier


def problems(kernel, *entries):
    services = tuple(e for e in entries if isinstance(e, ServicePolicy))
    batch = tuple(e for e in entries if isinstance(e, BatchPolicy))
    spec = PolicySpec(services=services, batch=batch)

    def inodes(path, _main_inode=None):
        return inodes_of(kernel, path)

    targets, found = discover(kernel, find_tree(kernel, "/"), spec, {}, inodes, {})
    return [t.name for t in targets], found


def service(name, path):
    return ServicePolicy(name=name, selector=Selector(cgroup=path))


def batch(name, path):
    return BatchPolicy(name=name, selector=Selector(cgroup=path))


def test_two_entries_that_claim_one_cgroup_are_a_problem_and_the_first_counts():
    names, found = problems(make("/a"), service("one", "/a"), service("two", "/a"))
    assert names == ["one"]
    assert "already claimed by one" in found["two"]


def test_what_matches_nothing_is_a_problem():
    assert "matches nothing" in problems(make("/a"), service("web", "/b"))[1]["web"]


def test_a_pattern_may_match_many():
    assert problems(make("/a", "/a/x1", "/a/x2"), service("web", "/a/x*"))[0] == ["web-0", "web-1"]


def test_all_that_an_entry_chose_have_its_latency():
    policy = ColocationPolicy(spec=PolicySpec(services=(service("web", "/a/x*"),)))
    scraper = LatencyScraper()
    scraper.readings["web"] = Latency((0.1,), (1.0, 1.0), 0.0)
    observer = Observer(make("/a", "/a/x1", "/a/x2"), policy, dict, scraper)
    seen = observer.snapshot(0.0, 0.0).of("service")
    assert [(w.name, w.latency) for w in seen] == [(n, scraper.readings["web"]) for n in ("web-0", "web-1")]


def test_batch_that_also_holds_a_service_is_not_governed():
    names, found = problems(make("/app", "/app/web"), service("web", "/app/web"), batch("all", "/app"))
    assert names == ["web"]
    assert "also holds web" in found["all"]


def by_command(name, text):
    return BatchPolicy(name=name, selector=Selector(command=text))


def test_batch_chosen_by_its_command_is_governed_with_its_children():
    kernel = make("/night")
    train = kernel.spawn("hog", "/night", command="python train.py")
    kernel.spawn("hog", "/night", command="loader", ppid=train.pid)
    assert problems(kernel, by_command("train", "train.py")) == (["train"], {})


@pytest.mark.parametrize(
    ("cgroup", "above", "governed"),
    [
        pytest.param("/session-3.scope", "bash", False, id="a login session is its user's"),
        pytest.param("/cron.service", "cron", False, id="a daemon that runs other work too"),
        pytest.param("/run-7.scope", "sh", True, id="a script of its own"),
        pytest.param("/docker-1f.scope", "tini", True, id="the init of its container"),
    ],
)
def test_a_command_does_not_put_whoever_lives_with_it_below_services(cgroup, above, governed):
    kernel = make(cgroup)
    parent = kernel.spawn("hog", cgroup, command=above)
    kernel.spawn("hog", cgroup, command="python train.py", ppid=parent.pid)
    names, found = problems(kernel, by_command("train", "train.py"))
    assert names == ["train"] * governed
    assert governed or f"also holds process {parent.pid} ({above})" in found["train"]


def test_batch_that_is_governed_stays_so_while_somebody_looks_in():
    kernel = make("/night")
    kernel.spawn("hog", "/night", command="python train.py")
    entry = by_command("train", "train.py")
    observer = Observer(kernel, ColocationPolicy(spec=PolicySpec(batch=(entry,))), dict, LatencyScraper())
    assert [w.name for w in observer.snapshot(0.0, 0.0).of("batch")] == ["train"]
    kernel.spawn("hog", "/night", command="top")
    assert [w.name for w in observer.snapshot(1.0, 1.0).of("batch")] == ["train"]


def test_a_pod_whose_batch_cannot_be_governed_stays_a_service():
    kernel = kubernetes()
    container = "/kubepods/burstable/podA/c1"
    kernel.spawn("hog", container, command="nginx")
    kernel.spawn("hog", container, command="python train.py")
    names, found = problems(kernel, by_command("train", "train.py"))
    assert names == ["pod-A"]
    assert "also holds process" in found["train"]


def kubernetes():
    return make("/kubepods", "/kubepods/burstable", "/kubepods/burstable/podA", "/kubepods/burstable/podA/c1")


def test_batch_that_also_holds_pods_is_not_governed():
    names, found = problems(kubernetes(), batch("all", "/kubepods/burstable"))
    assert names == ["pod-A"]
    assert "also holds the pod pod-A" in found["all"]


def test_a_pod_may_be_batch():
    assert problems(kubernetes(), batch("pod", "/kubepods/burstable/podA")) == (["pod"], {})


def test_a_service_within_a_pod_is_not_counted_twice():
    assert problems(kubernetes(), service("web", "/kubepods/burstable/podA/c1")) == (["web"], {})


def test_the_root_cannot_be_batch():
    assert "root cgroup" in problems(make(), batch("all", "/"))[1]["all"]


MOUNTS_V1 = """
cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0
cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0
cgroup /sys/fs/cgroup/systemd cgroup rw,name=systemd 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0
tmpfs /tmp tmpfs rw 0 0
"""


def test_mounts_are_read_with_the_controllers_they_hold():
    layout = parse_mounts(MOUNTS_V1)
    assert layout.controllers["cpu"] == layout.controllers["cpuacct"] == "cpu,cpuacct"
    assert layout.mounts[UNIFIED] == "/sys/fs/cgroup/unified"
    assert layout.version == 1
    assert parse_mounts("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0").version == 2
