"""Names of jobs and pods, kubelet's tree wherever it is nested, and what may be governed in place (case M)."""

import os
import shutil
import subprocess
import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colocate import doctor
from colocate.actuate.scratch import namespace_of_pids, sweep
from colocate.actuate.tier import check_job_name
from colocate.cgroup.layout import UNIFIED, discover_layout, namespace_root, parse_mounts
from colocate.cgroup.port import KernelPort
from colocate.cgroup.tree import cgroup_of, find_tree, inodes_of, processes_below
from colocate.errors import BadInput, HostUnfit
from colocate.kernelmodel import ModelKernel
from colocate.observe.latency import LatencyScraper
from colocate.observe.longwaits import LONG_SECONDS, long_ns
from colocate.observe.neighbourhood import reserved_cpus, strangers_us
from colocate.observe.observer import Observer
from colocate.observe.peers import peers, publishers
from colocate.observe.pods import Pod
from colocate.observe.schedstat import RunDelays, Schedstat
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


def test_a_cgroup_that_is_seen_while_it_is_being_made_is_looked_at_again():
    """On v1 it is made in one hierarchy after the other: without its freezer it could never be stopped."""
    kernel = ModelKernel(version=1)
    kernel.mkdir("cpu", "/train")
    observer = Observer(
        kernel, ColocationPolicy(spec=PolicySpec(batch=(batch("train", "/train"),))), dict, LatencyScraper()
    )
    assert set(observer.snapshot(0.0, 0.0).workloads["batch:train"].inodes) == {"cpu"}
    for hierarchy in kernel.layout.mounts:
        if hierarchy != "cpu":
            kernel.mkdir(hierarchy, "/train")
    assert set(observer.snapshot(0.1, 0.1).workloads["batch:train"].inodes) == set(kernel.layout.mounts)


def test_a_cgroup_that_comes_to_a_hierarchy_late_is_looked_at_within_a_minute():
    kernel = ModelKernel(version=1)
    kernel.mkdir("cpu", "/train")
    observer = Observer(
        kernel, ColocationPolicy(spec=PolicySpec(batch=(batch("train", "/train"),))), dict, LatencyScraper()
    )
    for second in range(600):
        observer.snapshot(float(second), float(second))
    kernel.mkdir("freezer", "/train")
    seen = [observer.snapshot(600.0 + s, 600.0 + s).workloads["batch:train"].inodes for s in range(61)]
    assert "freezer" not in seen[0]
    assert "freezer" in seen[-1]


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


def test_a_pod_in_the_tier_is_one_job_with_the_containers_below_it():
    """What laws write they write into the pod's own directory; what it uses and who gets a signal is all below it."""
    pod, container = "/kubepods/batch/podA-1", "/kubepods/batch/podA-1/app"
    kernel = make("/kubepods", "/kubepods/burstable", "/kubepods/besteffort", "/kubepods/batch", pod, container)
    kernel.mkdir(UNIFIED, "/kubepods/batch/train")
    task = kernel.spawn("hog", container)
    observer = Observer(kernel, ColocationPolicy(), dict, LatencyScraper())
    observer.lister.pods["A-1"] = Pod("A-1", "night", "ml", {})
    seen = observer.snapshot(0.0, 10.0)
    found = {w.id: w for w in seen.of("batch")}
    assert set(found) == {"pod:A-1", "job:train"}
    assert (found["pod:A-1"].name, found["pod:A-1"].path) == ("ml/night", pod)
    assert found["pod:A-1"].processes == 1
    assert task.pid in processes_below(kernel, UNIFIED, found["pod:A-1"].path)


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


def test_in_a_container_the_mounts_of_its_host_count():
    both = MOUNTS_V1 + MOUNTS_V1.replace("/sys/fs/cgroup", "/host/cgroup")
    assert parse_mounts(both, "/host/cgroup").mounts[UNIFIED] == "/host/cgroup/unified"
    with pytest.raises(BadInput, match="mount the host's /sys/fs/cgroup"):
        discover_layout(MOUNTS_V1, below="/host/cg")


IN_A_NAMESPACE = {
    "it begins at our own cgroup": ("/", "/kubepods/podx/c"),
    "it begins above our own": ("/c", "/kubepods/podx"),
    "we are in the host's": ("/kubepods/podx/c", "/"),
}


@pytest.mark.parametrize(("own", "begins"), IN_A_NAMESPACE.values(), ids=IN_A_NAMESPACE.keys())
def test_where_our_cgroup_namespace_begins_is_found_by_our_process(own, begins, tmp_path):
    for path, pids in {"": "1\n", "kubepods/pody": "77\n", "kubepods/podx/c": f"{os.getpid()}\n"}.items():
        tmp_path.joinpath(path).mkdir(parents=True, exist_ok=True)
        tmp_path.joinpath(path, "cgroup.procs").write_text(pids)
    assert namespace_root(str(tmp_path), own) == begins


def test_who_does_not_see_itself_in_its_hosts_cgroups_is_told_what_its_pod_needs(tmp_path):
    tmp_path.joinpath("cgroup.procs").write_text("0\n")
    with pytest.raises(BadInput, match="hostPID: true"):
        namespace_root(str(tmp_path), "/")


def test_a_path_of_another_container_is_read_from_our_namespace():
    kernel = make("/kubepods", "/kubepods/podx", "/kubepods/pody")
    kernel.layout = msgspec.structs.replace(kernel.layout, namespace="/kubepods/podx")
    kernel.proc = {"/proc/7/cgroup": "0::/../pody/c\n"}.get
    assert cgroup_of(kernel, 7, UNIFIED) == "/kubepods/pody/c"


def test_what_a_demonstration_left_is_removed_unless_its_owner_may_live_in_another_pid_namespace():
    left, beside = f"/colocate-demo-99999-1-{namespace_of_pids()}", "/colocate-demo-99999-1-77"
    kernel = make(left, f"{left}/kubepods", beside, "/colocate-demo-99999-1")
    assert sweep(kernel) == [left]
    assert sorted(kernel.children(UNIFIED, "/")) == ["colocate-demo-99999-1", "colocate-demo-99999-1-77"]


# -- what nodes really look like ----------------------------------------------------------------------------------


def test_the_tier_is_in_the_tree_in_which_pods_run():
    kernel = make("/kubepods", "/kubepods/podold", "/kubepods.slice", "/kubepods.slice/kubepods-podnew.slice")
    kernel.spawn("sleep", "/kubepods.slice/kubepods-podnew.slice")
    assert find_tree(kernel, "/").kubepods == "/kubepods.slice"


def test_two_trees_with_pods_are_refused_with_both_paths():
    kernel = make("/kubepods", "/kubepods/podold", "/kubepods.slice", "/kubepods.slice/kubepods-podnew.slice")
    for path in ("/kubepods/podold", "/kubepods.slice/kubepods-podnew.slice"):
        kernel.spawn("sleep", path)
    with pytest.raises(HostUnfit, match=r"/kubepods and /kubepods\.slice"):
        find_tree(kernel, "/")


DEEP = (
    "/user.slice", "/user.slice/user-1000.slice", "/user.slice/user-1000.slice/user@1000.service",
    "/user.slice/user-1000.slice/user@1000.service/app.slice",
    "/user.slice/user-1000.slice/user@1000.service/app.slice/shop.service",
    "/system.slice", "/system.slice/system-postgresql.slice",
    "/system.slice/system-postgresql.slice/postgresql@16-main.service",
)  # fmt: skip


def unit(name):
    return ServicePolicy(name="db", selector=Selector(systemd_unit=name))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        pytest.param("shop.service", "", id="a user's unit, five levels down"),
        pytest.param("postgresql@16-main.service", "", id="an instance of a template"),
        pytest.param("postgresql@*.service", "", id="a pattern"),
        pytest.param(
            "postgresql.service", "units that begin so: postgresql@16-main.service", id="the wrapper of a template"
        ),
        pytest.param("shpo.service", "did you mean shop.service?", id="a slip of the pen"),
    ],
)
def test_units_are_found_at_any_depth_or_said_what_is_near(name, says):
    _, found = problems(make(*DEEP), unit(name))
    assert (found == {}) == (says == "")
    assert says in "".join(found.values())


def test_a_service_in_the_root_cgroup_is_refused_for_it_would_be_the_whole_machine():
    kernel = make()
    kernel.spawn("hog", "/", command="cart --serve")
    _, found = problems(kernel, ServicePolicy(name="cart", selector=Selector(command="cart")))
    assert "the whole machine would be this service" in found["cart"]


@pytest.mark.parametrize("kind", ["service", "batch"])
def test_a_command_never_claims_the_tiers_own_jobs(kind):
    kernel = make("/pg", "/colocate-batch", "/colocate-batch/dump")
    kernel.spawn("hog", "/pg", command="postgres -D /data")
    kernel.spawn("hog", "/colocate-batch/dump", command="pg_dump postgres")
    policy = (ServicePolicy if kind == "service" else BatchPolicy)(name="pg", selector=Selector(command="postgres"))
    spec = PolicySpec(services=(policy,)) if isinstance(policy, ServicePolicy) else PolicySpec(batch=(policy,))
    targets, _ = discover(kernel, find_tree(kernel, "/"), spec, {}, lambda p, _i=None: inodes_of(kernel, p), {})
    assert {t.id: t.path for t in targets} == {
        f"{kind}:pg": "/pg",
        "job:dump": "/colocate-batch/dump",
    }


@pytest.mark.parametrize("onlooker", ["tail -f /var/log/postgres.log", "/usr/bin/vim postgres.conf"])
def test_who_only_looks_at_a_file_of_that_name_is_left_out_and_named(onlooker):
    kernel = make("/pg", "/session-4.scope")
    kernel.spawn("hog", "/pg", command="postgres -D /data")
    kernel.spawn("sleep", "/session-4.scope", command=onlooker)
    entry = ServicePolicy(name="pg", selector=Selector(command="postgres"))
    _, found = problems(kernel, entry)
    assert onlooker in found["pg (command)"]
    assert "left out" in found["pg (command)"]


def test_exclusive_cpus_of_a_guaranteed_pod_are_reserved():
    kernel = make(
        "/kubepods",
        "/kubepods/podguaranteed",
        "/kubepods/besteffort",
        "/kubepods/besteffort/podx",
        "/kubepods/burstable",
    )
    for path in ("/", "/kubepods", "/kubepods/besteffort"):
        kernel.write(UNIFIED, path, "cgroup.subtree_control", "+cpuset")
    kernel.write(UNIFIED, "/kubepods/podguaranteed", "cpuset.cpus", "1")
    tree = find_tree(kernel, "/")
    targets, _ = discover(kernel, tree, PolicySpec(), {}, lambda p, _i=None: inodes_of(kernel, p), {})
    assert reserved_cpus(kernel, tree, (0, 1), targets) == (1,)


def test_one_unreadable_cgroup_is_stale_by_itself():
    kernel = make("/a", "/b")
    spec = PolicySpec(services=(service("a", "/a"), service("b", "/b")))
    observer = Observer(kernel, ColocationPolicy(spec=spec), dict, LatencyScraper())
    observer.snapshot(0.0, 10.0)
    plain = kernel.read

    def refuse(hierarchy, path, file, inode=None):
        if path == "/a" and file == "cpu.stat":
            raise OSError(5, "Input/output error")
        return plain(hierarchy, path, file, inode)

    kernel.read = refuse
    now = observer.snapshot(1.0, 11.0)
    assert {w.name: w.at_seconds for w in now.workloads.values()} == {"a": 10.0, "b": 11.0}
    assert now.stale_seconds == {}
    assert "cannot be read" in observer.problems["service:a"]


def test_the_largest_stranger_is_seen_and_known_workloads_are_none():
    kernel = make(
        "/web", "/system.slice", "/system.slice/backup.service", "/system.slice/shop.service", "/colocate-batch"
    )
    kernel.usage("/system.slice/backup.service").cpu = 7.0
    known = ["/web", "/system.slice/shop.service"]
    assert strangers_us(kernel, find_tree(kernel, "/"), known) == {"/system.slice/backup.service": 7_000_000}


def test_threads_that_end_take_nothing_back_and_waiting_is_a_share_of_time():
    kernel = make("/a")
    one, two = kernel.spawn("hog", "/a"), kernel.spawn("hog", "/a")
    delays = RunDelays()
    assert delays.waited_us(kernel, "a", [one.pid, two.pid], 0.0) == 0
    one.waited_seconds = two.waited_seconds = 0.5
    assert delays.waited_us(kernel, "a", [one.pid, two.pid], 1.0) == 750_000, "half of the time each: three quarters"
    kernel.kill(two.pid, 9)
    one.waited_seconds = 0.7
    assert delays.waited_us(kernel, "a", [one.pid], 2.0) == 950_000


@pytest.mark.parametrize(
    ("what", "waits", "apart_ms", "long_ms"),
    [
        ("many short waits", [(1.9, 40), (2.9, 60)], 2.0, 0.0),
        ("one wait of two milliseconds", [(2.0, 1)], 2.0, 2.0),
        ("a wait that was credited at once, with short ones, is longer than they could be", [(4.5, 12)], 2.0, 4.5),
        ("of two threads only the one that waited long", [(4.0, 1), (0.5, 1)], 2.0, 4.0),
        ("looks that follow at once do not make a short wait long", [(0.9, 1)], 0.1, 0.0),
        ("a late look tells of long waits too", [(6.0, 9), (30.0, 12), (5.0, 2)], 5.0, 35.0),
    ],
)
def test_waits_are_long_by_their_number_and_by_the_time_between_looks(what, waits, apart_ms, long_ms):
    before = {i: Schedstat(0, 7_000_000, 1) for i in range(len(waits))}
    now = {i: Schedstat(0, 7_000_000 + int(ms * 1e6), 1 + times) for i, (ms, times) in enumerate(waits)}
    new = {99: Schedstat(0, 50_000_000, 1)}
    assert long_ns(before, now | new, apart_ms / 1e3) == int(long_ms * 1e6), what


@given(
    waits=st.lists(st.tuples(st.floats(0.0, 0.02), st.floats(0.0, 0.01)), max_size=60),
    apart=st.floats(0.0015, 0.005),
)
def test_short_waits_never_count_and_those_longer_than_a_look_and_a_half_always_do(waits, apart):
    """A thread waits and runs in turns (seconds each); its delay grows at the end of each wait."""
    ends, t = [], 0.0
    for waited, ran in waits:
        t += waited
        ends.append((t, waited))
        t += ran
    counted, before = 0, Schedstat(0, 0, 0)
    for i in range(1, int(t / apart) + 3):
        done = [w for at, w in ends if at <= i * apart]
        now = Schedstat(0, sum(int(w * 1e9) for w in done), len(done))
        grown = long_ns({1: before}, {1: now}, apart)
        longest = max((w for at, w in ends if (i - 1) * apart < at <= i * apart), default=0.0)
        assert grown == 0 or longest > min(0.5 * apart, LONG_SECONDS) - 1e-6
        counted, before = counted + grown, now
    assert counted >= sum(int(w * 1e9) for _, w in ends if w > 1.5 * apart + 1e-6)


def test_programs_that_govern_batch_too_are_known_by_their_processes(tmp_path):
    program = tmp_path / "koordlet"
    shutil.copy2(shutil.which("sleep") or "/bin/sleep", program)
    process = subprocess.Popen([program, "60"])
    try:
        port, until = KernelPort(), time.monotonic() + 10
        while "koordlet" not in peers(port) and time.monotonic() < until:
            time.sleep(0.01)  # the kernel shows a new program's arguments a moment after it has begun
        assert peers(port)["koordlet"] == process.pid
        assert "koordlet" in publishers(port)
        (check,) = [c for c in doctor.checks(port) if c.name == "without koordlet"]
        assert not check.ok
        assert "DaemonSet" in check.mend
    finally:
        process.kill()
        process.wait()
    assert "koordlet" not in peers(port)
