"""The jobs of each operator, as its users write them: one coordinator, and workers with eight GPUs each."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Protocol

from podgroup.api import POD_GROUPS

GPUS = 8
Objects = list[tuple[str, dict[str, Any]]]
"""Collections and what is made in them."""


def template(name: str, gpus: int = 0, group: str = "") -> dict[str, Any]:
    """A pod; one whose user groups it by hand names group and scheduler."""
    asked: dict[str, str] = {"cpu": "1", "memory": "1Gi", **({"nvidia.com/gpu": str(gpus)} if gpus else {})}
    container = {"name": name, "image": "example.com/work:1", "resources": {"requests": asked, "limits": asked}}
    spec: dict[str, Any] = {"containers": [container], "terminationGracePeriodSeconds": 0}
    if not group:
        return {"spec": spec}
    spec |= {"schedulerName": "colocate"}
    return {"metadata": {"labels": {"scheduling.x-k8s.io/pod-group": group}}, "spec": spec}


def pod_group(name: str, members: int) -> tuple[str, dict[str, Any]]:
    body = {"apiVersion": "scheduling.x-k8s.io/v1alpha1", "kind": "PodGroup", "metadata": {"name": name}}
    return POD_GROUPS, {**body, "spec": {"minMember": members}}


class Cluster(Protocol):
    """What suspending a job may need."""

    async def patch(self, collection: str, name: str, spec: dict[str, Any]) -> None:
        """Merge into the specification."""

    async def items(self, collection: str) -> list[dict[str, Any]]:
        """Of the namespace."""

    async def create(self, collection: str, body: dict[str, Any]) -> None:
        """In the namespace."""


class Adapter:
    """An operator, its jobs, and what its users do to them."""

    name: str
    collection: str
    label: str
    """Of its pods: the job that they are of."""
    ahead: int | None = None
    """How many of its pods are there before it starts; all of them where it says nothing."""
    hooked: tuple[str, ...] = ()
    """API groups whose webhooks are asked."""

    def options(self, where: Path, port: int) -> list[str]:
        """Of its command line; `where` holds `kubeconfig` and `config.yaml`, `port` is for its webhooks."""
        return [f"--config={where / 'config.yaml'}"]

    def processes(self, where: Path, port: int) -> list[list[str]]:
        """The command lines of its processes; the first serves the webhooks."""
        return [self.options(where, port)]

    def environment(self, folder: Path, host: str, port: int) -> dict[str, str]:
        """Of its processes besides; the folder that it was built in, and where the API server is."""
        return {}

    async def plays(self, cluster: Cluster) -> None:
        """What its jobs do themselves once they run."""

    def config(self, port: int) -> dict[str, Any]:
        """Its file of settings."""
        return {}

    def before(self) -> Objects:
        """What must be there before it starts."""
        return []

    def beside(self) -> Objects:
        """What its administrator makes once it runs."""
        return []

    def job(self, name: str, workers: int) -> dict[str, Any]:
        """An object; its gang has one member more than workers."""
        raise NotImplementedError

    def objects(self, name: str, workers: int) -> Objects:
        """All that a user makes for a job."""
        return [(self.collection, self.job(name, workers))]

    def scaled(self, workers: int) -> dict[str, Any]:
        """The change of its specification, as a merge patch."""
        raise NotImplementedError

    def suspended(self, yes: bool) -> dict[str, Any]:
        """The same."""
        return {"suspend": yes}

    async def suspend(self, cluster: Cluster, name: str, yes: bool) -> None:
        """Suspend it, or let it go on."""
        await cluster.patch(self.collection, name, self.suspended(yes))


class MpiJob(Adapter):
    """kubeflow.org/v2beta1."""

    name, collection = "mpi-operator", "/apis/kubeflow.org/v2beta1/mpijobs"
    label = "training.kubeflow.org/job-name"

    def options(self, where: Path, port: int) -> list[str]:
        scheduler = "--gang-scheduling=scheduler-plugins-scheduler"
        return [f"--kubeConfig={where / 'kubeconfig'}", scheduler, "--lock-namespace=default"]

    def job(self, name: str, workers: int) -> dict[str, Any]:
        replicas = {
            "Launcher": {"replicas": 1, "template": template("launcher")},
            "Worker": {"replicas": workers, "template": template("worker", GPUS)},
        }
        spec = {"slotsPerWorker": 1, "runPolicy": {"cleanPodPolicy": "Running"}, "mpiReplicaSpecs": replicas}
        return {"apiVersion": "kubeflow.org/v2beta1", "kind": "MPIJob", "metadata": {"name": name}, "spec": spec}

    def scaled(self, workers: int) -> dict[str, Any]:
        return {"mpiReplicaSpecs": {"Worker": {"replicas": workers}}}

    def suspended(self, yes: bool) -> dict[str, Any]:
        return {"runPolicy": {"suspend": yes}}


class RayCluster(Adapter):
    """ray.io/v1."""

    name, collection, label = "kuberay", "/apis/ray.io/v1/rayclusters", "ray.io/cluster"

    def options(self, where: Path, port: int) -> list[str]:
        return [
            "--batch-scheduler=scheduler-plugins",
            "--enable-leader-election=false",
            "--metrics-addr=0",
            "--health-probe-bind-address=0",
        ]

    def job(self, name: str, workers: int) -> dict[str, Any]:
        group = {"groupName": "w", "minReplicas": 0, "maxReplicas": 16, "rayStartParams": {}}
        group |= {"replicas": workers, "template": template("worker", GPUS)}
        spec = {
            "rayVersion": "2.46.0",
            "headGroupSpec": {"rayStartParams": {}, "template": template("head")},
            "workerGroupSpecs": [group],
        }
        meta = {"name": name, "labels": {"ray.io/gang-scheduling-enabled": "true"}}
        return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": meta, "spec": spec}

    def scaled(self, workers: int) -> dict[str, Any]:
        group = self.job("", workers)["spec"]["workerGroupSpecs"]
        return {"workerGroupSpecs": group}


class PyTorchJob(Adapter):
    """kubeflow.org/v1. Its operator waits for a certificate that it makes itself; its webhooks are not asked."""

    name, collection = "training-operator", "/apis/kubeflow.org/v1/pytorchjobs"
    label = "training.kubeflow.org/job-name"

    def options(self, where: Path, port: int) -> list[str]:
        return [
            f"--kubeconfig={where / 'kubeconfig'}",
            "--enable-scheme=pytorchjob",
            "--gang-scheduler-name=scheduler-plugins-scheduler",
            f"--webhook-server-port={port}",
            "--metrics-bind-address=0",
            "--health-probe-bind-address=0",
        ]

    def before(self) -> Objects:
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "training-operator-webhook-cert"}}
        hooks = {"apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration"}
        named = {"metadata": {"name": "validator.training-operator.kubeflow.org"}}
        collection = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations"
        return [("/api/v1/namespaces/default/secrets", secret), (collection, {**hooks, **named})]

    def job(self, name: str, workers: int) -> dict[str, Any]:
        replicas = {
            "Master": {"replicas": 1, "restartPolicy": "OnFailure", "template": template("pytorch")},
            "Worker": {"replicas": workers, "restartPolicy": "OnFailure", "template": template("pytorch", GPUS)},
        }
        spec = {"pytorchReplicaSpecs": replicas}
        return {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": {"name": name}, "spec": spec}

    def scaled(self, workers: int) -> dict[str, Any]:
        return {"pytorchReplicaSpecs": {"Worker": {"replicas": workers}}}

    def suspended(self, yes: bool) -> dict[str, Any]:
        return {"runPolicy": {"suspend": yes}}


class JobSet(Adapter):
    """jobset.x-k8s.io/v1alpha2; its user makes the PodGroup."""

    name, collection = "jobset", "/apis/jobset.x-k8s.io/v1alpha2/jobsets"
    label = "jobset.sigs.k8s.io/jobset-name"
    hooked: tuple[str, ...] = ("jobset.x-k8s.io", "")
    labels: dict[str, str] = {}  # noqa: RUF012

    def options(self, where: Path, port: int) -> list[str]:
        return [*super().options(where, port), "--metrics-bind-address=0", "--health-probe-bind-address=0"]

    def config(self, port: int) -> dict[str, Any]:
        return {
            "apiVersion": "config.jobset.x-k8s.io/v1alpha1",
            "kind": "Configuration",
            "internalCertManagement": {"enable": False},
            "leaderElection": {"leaderElect": False},
            "webhook": {"port": port},
        }

    def job(self, name: str, workers: int) -> dict[str, Any]:
        def part(of: str, many: int, gpus: int) -> dict[str, Any]:
            pods = template("main", gpus, name)
            pods["spec"]["restartPolicy"] = "Never"
            jobs = {"parallelism": many, "completions": many, "backoffLimit": 4, "template": pods}
            return {"name": of, "replicas": 1, "template": {"spec": jobs}}

        spec = {"replicatedJobs": [part("leader", 1, 0), part("workers", workers, GPUS)]}
        meta = {"name": name, "labels": self.labels}
        return {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": meta, "spec": spec}

    def objects(self, name: str, workers: int) -> Objects:
        return [pod_group(name, workers + 1), *super().objects(name, workers)]


class LeaderWorkerSet(Adapter):
    """leaderworkerset.x-k8s.io/v1: one group, whose user makes the PodGroup; all pods restart when one does."""

    name, collection = "lws", "/apis/leaderworkerset.x-k8s.io/v1/leaderworkersets"
    label = "leaderworkerset.sigs.k8s.io/name"
    hooked = ("leaderworkerset.x-k8s.io", "")

    def config(self, port: int) -> dict[str, Any]:
        return {
            "apiVersion": "config.lws.x-k8s.io/v1alpha1",
            "kind": "Configuration",
            "internalCertManagement": {"enable": False},
            "leaderElection": {"leaderElect": False},
            "webhook": {"port": port},
            "metrics": {"bindAddress": "0"},
            "health": {"healthProbeBindAddress": "0"},
        }

    def job(self, name: str, workers: int) -> dict[str, Any]:
        pods = {"leaderTemplate": template("main", 0, name), "workerTemplate": template("main", GPUS, name)}
        spec = {"replicas": 1, "leaderWorkerTemplate": {"size": workers + 1, **pods}}
        kind = {"apiVersion": "leaderworkerset.x-k8s.io/v1", "kind": "LeaderWorkerSet"}
        return {**kind, "metadata": {"name": name}, "spec": spec}

    def objects(self, name: str, workers: int) -> Objects:
        return [pod_group(name, workers + 1), *super().objects(name, workers)]


class Queued(JobSet):
    """A JobSet that Kueue admits: by quota first, then by us to nodes."""

    name = "kueue"
    hooked = ("kueue.x-k8s.io", "jobset.x-k8s.io", "kubeflow.org")
    labels = {"kueue.x-k8s.io/queue-name": "queue"}  # noqa: RUF012

    def options(self, where: Path, port: int) -> list[str]:
        gates = "--feature-gates=VisibilityOnDemand=false"
        return [f"--config={where / 'config.yaml'}", f"--kubeconfig={where / 'kubeconfig'}", gates]

    def config(self, port: int) -> dict[str, Any]:
        return {
            "apiVersion": "config.kueue.x-k8s.io/v1beta2",
            "kind": "Configuration",
            "namespace": "kueue-system",  # jobs in its own are not its business
            "health": {"healthProbeBindAddress": "0"},
            "metrics": {"bindAddress": "0"},
            "webhook": {"port": port},
            "leaderElection": {"leaderElect": False},
            "internalCertManagement": {"enable": False},
            "integrations": {"frameworks": ["jobset.x-k8s.io/jobset", "kubeflow.org/mpijob"]},
        }

    def beside(self) -> Objects:
        def made(kind: str, plural: str, name: str, spec: dict[str, Any], within: str = "") -> tuple[str, Any]:
            body = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": kind, "metadata": {"name": name}, "spec": spec}
            return f"/apis/kueue.x-k8s.io/v1beta2/{within}{plural}", body

        def queue(name: str, amount: int, of: str = "nvidia.com/gpu") -> Objects:
            quota = [{"name": r, "nominalQuota": q} for r, q in (("cpu", 999), ("memory", "9Ti"), (of, amount))]
            covered = {"coveredResources": [q["name"] for q in quota], "flavors": [{"name": "any", "resources": quota}]}
            whole = {"namespaceSelector": {}, "resourceGroups": [covered]}
            return [
                made("ClusterQueue", "clusterqueues", name, whole),
                made("LocalQueue", "localqueues", name, {"clusterQueue": name}, "namespaces/default/"),
            ]

        gpus, watts = [*queue("queue", 999), *queue("small", 2 * GPUS)], queue("user-queue", 10_000, "intel.com/power")
        few = queue("few-watts", 1500, "intel.com/power")
        return [made("ResourceFlavor", "resourceflavors", "any", {}), *gpus, *watts, *few]

    async def suspend(self, cluster: Cluster, name: str, yes: bool) -> None:
        """Its administrator takes the admission away."""
        workloads = "/apis/kueue.x-k8s.io/v1beta2/workloads"
        for _ in range(100):
            for item in await cluster.items(workloads):
                if any(o["name"] == name for o in item["metadata"].get("ownerReferences", [])):
                    return await cluster.patch(workloads, item["metadata"]["name"], {"active": not yes})
            await asyncio.sleep(0.1)
        raise AssertionError(f"Kueue made no workload of {name}")


class Spark(Adapter):
    """sparkoperator.k8s.io/v1beta2: the driver is a gang of one that is owed its executors' cores, and makes them."""

    name, collection = "spark-operator", "/apis/sparkoperator.k8s.io/v1beta2/sparkapplications"
    label, hooked, ahead = "sparkoperator.k8s.io/app-name", ("sparkoperator.k8s.io", ""), 1

    def processes(self, where: Path, port: int) -> list[list[str]]:
        both = ["--namespaces=default", "--health-probe-bind-address=0"]
        webhook = ["webhook", "start", *both, f"--webhook-port={port}", f"--webhook-cert-dir={where / 'served'}"]
        webhook += [f"--{kind}-webhook-name={self.name}" for kind in ("mutating", "validating")]
        webhook += [f"--webhook-svc-name={self.name}", "--webhook-svc-namespace=default"]
        controller = ["controller", "start", *both, "--enable-batch-scheduler", "--kube-scheduler-names=colocate"]
        return [[*webhook, "--webhook-secret-namespace=default"], [*controller, "--enable-ui-service=false"]]

    def environment(self, folder: Path, host: str, port: int) -> dict[str, str]:
        home = str(folder / "python" / "pyspark")
        return {"SPARK_HOME": home, "KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": str(port)}

    def before(self) -> Objects:
        service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": self.name}}
        spec = {"type": "ExternalName", "externalName": "localhost"}
        return [("/api/v1/namespaces/default/services", {**service, "spec": spec})]

    def job(self, name: str, workers: int) -> dict[str, Any]:
        gpu = {"name": "nvidia.com/gpu", "quantity": GPUS}
        executor = {"instances": workers, "cores": 12, "memory": "1g", "gpu": gpu}  # more than half a node's
        spec = {
            "type": "Scala",
            "mode": "cluster",
            "sparkVersion": "3.5.5",
            "image": "example.com/spark:3.5.5",
            "mainClass": "org.example.Work",
            "mainApplicationFile": "local:///work.jar",
            "batchScheduler": "colocate",
            "driver": {"cores": 1, "memory": "1g", "serviceAccount": "default"},
            "executor": executor,
        }
        return {
            "apiVersion": "sparkoperator.k8s.io/v1beta2",
            "kind": "SparkApplication",
            "metadata": {"name": name},
            "spec": spec,
        }

    async def plays(self, cluster: Cluster) -> None:
        """Each driver that runs makes the executors that it lacks, from what spark-submit told it."""
        while True:
            pods, told = await cluster.items("/api/v1/pods"), await cluster.items("/api/v1/configmaps")
            for driver in pods:
                about, running = driver["metadata"], driver["status"].get("phase") == "Running"
                if about["labels"].get("spark-role") != "driver" or not running or "deletionTimestamp" in about:
                    continue
                mine = [m for m in told if _owns(about, m)]  # it comes a moment after the pod
                if not mine:
                    continue
                properties = _properties(mine[0]["data"]["spark.properties"])
                own = [p for p in pods if _owns(about, p)]
                alive = sum(p["status"].get("phase") in ("Pending", "Running") for p in own)
                last = max((int(p["metadata"]["labels"]["spark-exec-id"]) for p in own), default=0)
                for number in range(last + 1, last + 1 + int(properties["spark.executor.instances"]) - alive):
                    await cluster.create("/api/v1/pods", _executor(driver, properties, number))
            await asyncio.sleep(0.1)


def _owns(owner: dict[str, Any], it: dict[str, Any]) -> bool:
    return any(o["uid"] == owner["uid"] for o in it["metadata"].get("ownerReferences", []))


def _properties(text: str) -> dict[str, str]:
    lines = (line.replace("\\", "").partition("=") for line in text.splitlines() if not line.startswith("#"))
    return {key: value for key, _, value in lines}


def _executor(driver: dict[str, Any], properties: dict[str, str], number: int) -> dict[str, Any]:
    """As Spark's BasicExecutorFeatureStep makes it; scheduler and GPUs are the webhook's to add."""
    about, prefix = driver["metadata"], "spark.kubernetes.executor.label."
    labels = {k.removeprefix(prefix): v for k, v in properties.items() if k.startswith(prefix)}
    labels |= {k: about["labels"][k] for k in ("spark-app-selector", "spark-app-name", "spark-version")}
    labels |= {"spark-role": "executor", "spark-exec-id": str(number), "spark-exec-resourceprofile-id": "0"}
    owner = {"apiVersion": "v1", "kind": "Pod", "name": about["name"], "uid": about["uid"], "controller": True}
    asked = {"cpu": properties["spark.executor.cores"], "memory": "1408Mi"}
    container: dict[str, Any] = {
        "name": "spark-kubernetes-executor",
        "image": properties["spark.kubernetes.container.image"],
    }
    container |= {"args": ["executor"], "resources": {"requests": asked, "limits": {"memory": asked["memory"]}}}
    meta = {
        "name": f"{about['name'].removesuffix('-driver')}-exec-{number}",
        "labels": labels,
        "ownerReferences": [owner],
    }
    spec = {"restartPolicy": "Never", "containers": [container]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}


ADAPTERS: tuple[Adapter, ...] = (MpiJob(), RayCluster(), PyTorchJob(), JobSet(), LeaderWorkerSet(), Queued(), Spark())
MPI, RAY, PYTORCH, JOBSET, LWS, KUEUE, SPARK = ((a,) for a in ADAPTERS)
ELASTIC = tuple(a for a in ADAPTERS if isinstance(a, MpiJob | RayCluster | PyTorchJob))
"""The others cannot change how many members a gang has."""
SUSPENDABLE = tuple(a for a in ADAPTERS if not isinstance(a, LeaderWorkerSet | Spark))
