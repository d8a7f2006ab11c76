"""Which pods go into the tier, and where that is, with either cgroup driver."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from colocate.actuate.units import tell_systemd, units_folder
from colocate.agent.placement import Placement, in_tier, limits_of
from colocate.agent.publisher import pod_of
from colocate.cgroup.tree import Tree
from colocate.cluster.api import is_batch
from colocate.decide import cpu
from colocate.kernelmodel import ModelKernel
from colocate.model.forecast import WorkloadForecast
from colocate.nri import Adjustment, Container, Limits, Pod
from colocate.objects import Container as ContainerObject
from colocate.objects import ObjectMeta, OwnerReference, PodSpec, PodStatus, Quantities, Resources
from colocate.objects import Pod as PodObject
from colocate.observe.pods import BatchRequest, PodLister
from colocate.observe.pods import Pod as NodePod
from tests import make

UID = "0a1b-2c3d"
PLAIN = Tree("/", "/kubepods", systemd_driver=False, tier_path="/kubepods/batch")
NESTED = Tree("/", "/kind/kubelet/kubepods", systemd_driver=False, tier_path="/kind/kubelet/kubepods/batch")
SYSTEMD = Tree("/", "/kubepods.slice", systemd_driver=True, tier_path="/kubepods.slice/kubepods-batch.slice")
NO_TREE = Tree("/", None, systemd_driver=False, tier_path="/colocate-batch")
PREFIXED = Tree(
    "/", "/kubelet.slice/kubelet-kubepods.slice", systemd_driver=True,
    tier_path="/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-batch.slice",
)  # fmt: skip


@pytest.mark.parametrize(
    ("tree", "path", "wanted"),
    [
        pytest.param(PLAIN, f"/kubepods/besteffort/pod{UID}/c1", f"/kubepods/batch/pod{UID}/c1", id="BestEffort"),
        pytest.param(PLAIN, f"/kubepods/burstable/pod{UID}/c1", f"/kubepods/batch/pod{UID}/c1", id="Burstable"),
        pytest.param(PLAIN, f"/kubepods/pod{UID}/c1", None, id="Guaranteed: it may have CPUs of its own"),
        pytest.param(PLAIN, f"/kubepods/besteffort/pod{UID}-x/c1", None, id="another pod's"),
        pytest.param(PLAIN, "/docker/c1", None, id="not kubelet's"),
        pytest.param(
            NESTED, f"/kubelet/kubepods/besteffort/pod{UID}/c1", f"/kubelet/kubepods/batch/pod{UID}/c1",
            id="a node in a container: the runtime sees its own part of the path, and is answered with that",
        ),
        pytest.param(
            SYSTEMD, "kubepods-besteffort-pod0a1b_2c3d.slice:cri-containerd:c1",
            "kubepods-batch-pod0a1b_2c3d.slice:cri-containerd:c1", id="systemd's driver, containerd",
        ),
        pytest.param(
            SYSTEMD, "kubepods-burstable-pod0a1b_2c3d.slice:crio:c1", "kubepods-batch-pod0a1b_2c3d.slice:crio:c1",
            id="systemd's driver, CRI-O",
        ),
        pytest.param(SYSTEMD, "kubepods-pod0a1b_2c3d.slice:cri-containerd:c1", None, id="systemd's driver, Guaranteed"),
        pytest.param(SYSTEMD, f"/kubepods/besteffort/pod{UID}/c1", None, id="a runtime with another driver"),
        pytest.param(
            PREFIXED, "kubelet-kubepods-besteffort-pod0a1b_2c3d.slice:cri-containerd:c1",
            "kubelet-kubepods-batch-pod0a1b_2c3d.slice:cri-containerd:c1", id="a tree with a prefix",
        ),
        pytest.param(NO_TREE, f"/kubepods/besteffort/pod{UID}/c1", None, id="there is no kubelet's tree"),
    ],
)  # fmt: skip
def test_where_a_container_goes(tree: Tree, path: str, wanted: str | None):
    assert in_tier(path, UID, tree) == wanted


@pytest.mark.parametrize(
    ("labels", "annotations", "batch"),
    [
        pytest.param({"colocate.io/qos": "batch"}, {}, True, id="ours"),
        pytest.param({"koordinator.sh/qosClass": "BE"}, {}, True, id="Koordinator's"),
        pytest.param({}, {"volcano.sh/qos-level": "-1"}, True, id="Volcano's, an annotation"),
        pytest.param({"koordinator.sh/qosClass": "LS"}, {}, False, id="a service of Koordinator's"),
        pytest.param({"volcano.sh/qos-level": "0"}, {}, False, id="Volcano's middle level"),
        pytest.param({}, {}, False, id="it says nothing"),
    ],
)
def test_how_a_pod_says_that_it_is_batch(labels: dict[str, str], annotations: dict[str, str], batch: bool):
    assert is_batch(labels, annotations) is batch


def with_cgroup(version: int, path: str) -> ModelKernel:
    """A kernel with this cgroup in every hierarchy."""
    kernel = ModelKernel(version=version)
    for hierarchy in kernel.layout.mounts:
        for i in range(1, path.count("/") + 1):
            part = "/".join(path.split("/")[: i + 1])
            if kernel.inode(hierarchy, part) is None:
                kernel.mkdir(hierarchy, part)
    return kernel


def pod(uid: str = UID, **labels: str) -> Pod:
    return Pod("sandbox", "train", uid, "ml", labels, {}, "")


def container(path: str) -> Container:
    return Container("c1", "sandbox", "main", False, {}, {}, path, 0, Limits())


BATCH = {"colocate.io/qos": "batch"}
PATH = f"/kubepods/besteffort/pod{UID}/c1"


def of(
    port: ModelKernel,
    lister: PodLister | None = None,
    ensure: Callable[[], object] = lambda: None,
    *,
    shadow: bool = False,
) -> Placement:
    """On a node whose tree is `PLAIN`."""
    return Placement(port, lambda: PLAIN, lister or PodLister(), ensure, shadow=shadow)


@pytest.mark.parametrize("version", [1, 2])
def test_a_batch_pod_goes_into_a_tier_that_is_there_and_its_directory_goes_with_it(version: int):
    port = with_cgroup(version, "/kubepods/batch")
    placement = of(port)
    assert placement.create_container(pod(), container(PATH)) is None, "it did not say that it is batch"
    assert placement.create_container(pod(**BATCH), container(PATH)) == Adjustment(f"/kubepods/batch/pod{UID}/c1")
    for hierarchy in port.layout.mounts:
        port.mkdir(hierarchy, f"/kubepods/batch/pod{UID}")
    placement.pod_removed(pod(**BATCH))
    assert not any(port.children(hierarchy, "/kubepods/batch") for hierarchy in port.layout.mounts)


@pytest.mark.parametrize("version", [1, 2])
def test_what_pods_left_that_went_while_the_runtime_was_away_goes_when_it_is_back(version: int):
    port = with_cgroup(version, "/kubepods/batch")
    for hierarchy in port.layout.mounts:
        for name in (f"pod{UID}", "podgone", "job-of-ours"):
            port.mkdir(hierarchy, f"/kubepods/batch/{name}")
    of(port).synchronize([pod()], [])
    for hierarchy in port.layout.mounts:
        assert set(port.children(hierarchy, "/kubepods/batch")) == {f"pod{UID}", "job-of-ours"}


@pytest.mark.parametrize("version", [1, 2])
def test_nothing_is_placed_in_shadow_or_before_there_is_a_tier(version: int):
    batch = pod(**BATCH), container(PATH)
    assert of(with_cgroup(version, "/kubepods/batch"), shadow=True).create_container(*batch) is None
    assert of(with_cgroup(version, "/kubepods")).create_container(*batch) is None


@pytest.mark.parametrize("version", [1, 2])
def test_a_tier_that_has_gone_with_its_last_pod_is_made_for_the_next_one(version: int):
    port = with_cgroup(version, "/kubepods")

    def ensure() -> None:
        for hierarchy in port.layout.mounts:
            port.mkdir(hierarchy, "/kubepods/batch")

    found = of(port, ensure=ensure).create_container(pod(**BATCH), container(PATH))
    assert found == Adjustment(f"/kubepods/batch/pod{UID}/c1")


@pytest.mark.parametrize(
    "inside",
    [pytest.param(False, id="on the host"), pytest.param(True, id="in a container, into what is mounted")],
)
def test_systemd_is_told_of_the_slices(inside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = [f"{name}.slice.d" for name in ("kubepods-batch", "kubepods-batch-")]
    if inside:
        monkeypatch.setenv("COLOCATE_HOST_CGROUP", "/host/cgroup")
        for name in names:
            (tmp_path / name).mkdir()
    assert tell_systemd(tmp_path, "kubepods-batch.slice")
    assert tell_systemd(tmp_path, "kubepods-batch.slice"), "once more is once"
    tier, pods = ((tmp_path / name / "50-colocate.conf").read_text() for name in names)
    assert "StopWhenUnneeded=yes" in tier
    assert "CPUWeight=1\n" in tier
    assert pods == "[Unit]\nStopWhenUnneeded=yes\n"
    assert sorted(f.name for f in tmp_path.rglob("*") if f.is_file()) == ["50-colocate.conf"] * 2


def test_systemd_is_not_told_where_it_is_not_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLOCATE_HOST_CGROUP", "/host/cgroup")
    assert units_folder() is None
    monkeypatch.setenv("COLOCATE_HOST_UNITS", str(tmp_path))
    assert units_folder() == tmp_path
    assert not tell_systemd(tmp_path, "kubelet-kubepods-batch.slice"), "nobody would read it"
    assert list(tmp_path.iterdir()) == []


# what a pod asks for, as the API server tells it


def told(*containers: ContainerObject, phase: str = "Running", **meta: Any) -> PodObject:
    about: dict[str, Any] = {
        "name": "p",
        "namespace": "ns",
        "uid": UID,
        "creation_timestamp": "2026-01-01T00:00:00Z",
        **meta,
    }
    return PodObject(
        metadata=ObjectMeta(**about), spec=PodSpec(containers=list(containers)), status=PodStatus(phase=phase)
    )


def asking(name: str = "c", limits: Quantities | None = None, **requests: str) -> ContainerObject:
    asked: Quantities = {k.replace("batch_", "kubernetes.io/batch-"): v for k, v in requests.items()}
    return ContainerObject(name=name, resources=Resources(requests=asked, limits=limits or {}))


def test_requests_of_all_containers_count():
    found: Any = pod_of(told(asking("a", cpu="500m", memory="1Gi"), asking("b", cpu="1")), 1000.0)
    assert (found.asked_cores, found.asked_bytes, found.batch) == (1.5, 1 << 30, {})


def test_a_static_pod_is_known_by_its_hash():
    mirror = {"kubernetes.io/config.hash": "abc", "kubernetes.io/config.mirror": "abc"}
    node = [OwnerReference(kind="Node", name="n0")]
    found: Any = pod_of(told(asking(batch_cpu="1"), annotations=mirror, owner_references=node), 1000.0)
    assert (found.uid, found.batch) == ("abc", {})
    found = pod_of(told(asking(batch_cpu="1"), annotations={"kubernetes.io/config.hash": "abc"}), 1000.0)
    assert found.uid == UID, "who only says so is himself"
    assert found.batch


@pytest.mark.parametrize(
    ("requests", "cores", "size"),
    [
        pytest.param({"cpu": "2k", "memory": "1e9"}, 2000.0, 10**9, id="exponents and thousands"),
        pytest.param({"cpu": "1e-3", "memory": "1500m"}, 0.001, 1, id="thousandths, also of a byte"),
        pytest.param({"cpu": "1e18", "memory": "1e30"}, 65536.0, 1 << 60, id="more than there is anywhere"),
    ],
)
def test_every_quantity_that_the_api_server_takes_is_understood(requests: dict[str, str], cores: float, size: int):
    found: Any = pod_of(told(asking(**requests)), 1000.0)  # type: ignore[arg-type]
    assert (found.asked_cores, found.asked_bytes) == (cores, size)


@pytest.mark.parametrize(
    "pod",
    [
        pytest.param(told(asking(), phase="Succeeded"), id="it has ended"),
        pytest.param(told(asking(cpu="much")), id="it asks for no quantity"),
        pytest.param(told(asking(batch_cpu="much")), id="it asks for no batch quantity"),
    ],
)
def test_who_is_left_out(pod: PodObject):
    assert pod_of(pod, 1000.0) is None


@pytest.mark.parametrize("version", [1, 2])
def test_who_asks_for_batch_resources_is_batch_and_gets_them(version: int):
    asked = asking(
        "main",
        {"kubernetes.io/batch-cpu": "2k", "kubernetes.io/batch-memory": "1Gi"},
        batch_cpu="500",
        batch_memory="1Gi",
    )
    known = pod_of(told(asked), 1000.0)
    assert known is not None
    assert known.batch == {"main": BatchRequest(500, 2000, 1 << 30)}
    port, lister = with_cgroup(version, "/kubepods/batch"), PodLister()
    lister.told({UID: known})
    placement = of(port, lister)
    found: Any = placement.create_container(pod(), container(PATH))
    assert found == Adjustment(f"/kubepods/batch/pod{UID}/c1", limits_of(known.batch["main"]))
    assert found.limits == Limits(512, 200_000, 100_000, 1 << 30)


@pytest.mark.parametrize(
    ("asked", "limits"),
    [
        pytest.param(BatchRequest(), Limits(), id="nothing said"),
        pytest.param(BatchRequest(0, 0, None), Limits(2, 1000, 100_000), id="never less than the kernel takes"),
        pytest.param(BatchRequest(None, None, 5 << 20), Limits(memory_bytes=5 << 20), id="memory alone"),
    ],
)
def test_what_a_container_gets(asked: BatchRequest, limits: Limits):
    assert limits_of(asked) == limits


@pytest.mark.parametrize(
    ("cores", "milli", "weight"),
    [
        pytest.param(0.0, {}, 1, id="it requests nothing: the least, as kubelet gives BestEffort"),
        pytest.param(0.0, {"a": 4000}, 400, id="four CPUs of batch"),
        pytest.param(0.0, {"a": 1500, "b": 500}, 200, id="its containers together"),
        pytest.param(0.0, {"a": 4000, "init": 4000}, 400, id="not one that ends before the others begin"),
        pytest.param(0.25, {}, 25, id="a quarter of a plain CPU: it says by its label that it is batch"),
        pytest.param(0.0, {"a": 3}, 1, id="next to nothing"),
        pytest.param(0.0, {"a": 10**9}, 10_000, id="more than there is"),
    ],
)
def test_a_batch_pod_weighs_what_it_requests(cores: float, milli: dict[str, int], weight: int):
    batch = {name: BatchRequest(cpu_milli=value, passing=name == "init") for name, value in milli.items()}
    found = NodePod("u", "p", "ns", {}, asked_cores=cores, asked_bytes=0, batch=batch)
    assert found.as_batch["weight"] == weight
    assert "weight" not in NodePod("u", "p", "ns", {}).as_batch, "nobody has said what it requests"


@pytest.mark.parametrize(
    ("labels", "annotations", "gang"),
    [
        pytest.param({"scheduling.x-k8s.io/pod-group": "pg"}, {}, "ml/pg", id="coscheduling's"),
        pytest.param({"pod-group.scheduling.sigs.k8s.io": "pg"}, {}, "ml/pg", id="its former label"),
        pytest.param({}, {"scheduling.k8s.io/group-name": "pg"}, "ml/pg", id="Volcano's"),
        pytest.param({"gang.scheduling.koordinator.sh/name": "pg"}, {}, "ml/pg", id="Koordinator's"),
        pytest.param({"app": "pg"}, {}, "", id="none"),
    ],
)
def test_the_members_of_a_gang_are_one_victim(labels: dict[str, str], annotations: dict[str, str], gang: str):
    meta = ObjectMeta(name="p", namespace="ml", uid="u", labels=labels, annotations=annotations)
    found = pod_of(PodObject(metadata=meta), 0.0)
    assert found is not None
    assert found.as_batch.get("gang", "") == (f"pods/{gang}" if gang else "")


@pytest.mark.parametrize("weight", [pytest.param(400, id="known"), pytest.param(None, id="not known: as it is")])
def test_the_law_gives_it_that_weight(weight: int | None):
    pod = make.job("pod", weight=weight)
    snapshot = make.snapshot(pod)
    found = cpu.decide_cpu(make.view(snapshot, make.forecast({pod.id: WorkloadForecast()})), cpu.CpuState())
    weights = [(a.value, a.reason) for a in found.actions if a.workload == pod.id and a.knob == "cpu.weight"]
    assert weights == ([] if weight is None else [(str(weight), "Requested")])


@pytest.mark.parametrize(
    ("labels", "annotations", "env"),
    [
        pytest.param({}, {}, {}, id="nothing is asked for"),
        pytest.param(
            {"colocate.io/gpu-drain": "blocking"},
            {},
            {"CUDA_LAUNCH_BLOCKING": "1", "HIP_LAUNCH_BLOCKING": "1"},
            id="each launch waits, by label",
        ),
        pytest.param(
            {}, {"colocate.io/gpu-drain": "short-queue"}, {"CUDA_SCALE_LAUNCH_QUEUES": "0.25x"}, id="by annotation"
        ),
        pytest.param(
            {"colocate.io/gpu-drain": "fast"}, {}, {}, id="another word does nothing, and is named in the log"
        ),
    ],
)
def test_a_batch_pods_gpu_work_stops_sooner_if_its_owner_asks_for_that(labels, annotations, env):
    placement = of(with_cgroup(2, "/kubepods/batch"))
    given = pod(**BATCH)._replace(labels={**BATCH, **labels}, annotations=annotations)
    found: Any = placement.create_container(given, container(PATH))
    assert found is not None
    assert found.env == env
