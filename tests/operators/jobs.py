"""The jobs of each operator, as its users write them: one coordinator, and workers with eight GPUs each."""

from __future__ import annotations

from typing import Any, Protocol

GPUS = 8


def template(name: str, gpus: int = 0) -> dict[str, Any]:
    asked: dict[str, str] = {"cpu": "1", "memory": "1Gi", **({"nvidia.com/gpu": str(gpus)} if gpus else {})}
    container = {"name": name, "image": "example.com/work:1", "resources": {"requests": asked, "limits": asked}}
    return {"spec": {"containers": [container], "terminationGracePeriodSeconds": 0}}


class Adapter(Protocol):
    """An operator, its jobs, and what its users do to them."""

    name: str
    collection: str
    label: str
    """Of its pods: the job that they are of."""

    def options(self, kubeconfig: str) -> list[str]:
        """Of its command line."""

    def job(self, name: str, workers: int) -> dict[str, Any]:
        """An object; its gang has one member more than workers."""

    def scaled(self, workers: int) -> dict[str, Any]:
        """The change of its specification, as a merge patch."""

    def suspended(self, yes: bool) -> dict[str, Any]:
        """The same."""


class MpiJob:
    """kubeflow.org/v2beta1."""

    name, collection = "mpi-operator", "/apis/kubeflow.org/v2beta1/mpijobs"
    label = "training.kubeflow.org/job-name"

    def options(self, kubeconfig: str) -> list[str]:
        scheduler = "--gang-scheduling=scheduler-plugins-scheduler"
        return [f"--kubeConfig={kubeconfig}", scheduler, "--lock-namespace=default"]

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


class RayCluster:
    """ray.io/v1."""

    name, collection, label = "kuberay", "/apis/ray.io/v1/rayclusters", "ray.io/cluster"

    def options(self, kubeconfig: str) -> list[str]:
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

    def suspended(self, yes: bool) -> dict[str, Any]:
        return {"suspend": yes}


ADAPTERS: tuple[Adapter, ...] = (MpiJob(), RayCluster())
