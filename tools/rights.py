"""Gives the controller's service account on a test's API server the rights that the manifests give it, and no more."""

from __future__ import annotations

from typing import Any

import yaml

from colocate.kube.client import Api, ApiError, path_of
from colocate.localcluster.controlplane import MANIFESTS

COLLECTIONS = {
    "Namespace": "/api/v1/namespaces",
    "ServiceAccount": "/api/v1/serviceaccounts",
    "ClusterRole": "/apis/rbac.authorization.k8s.io/v1/clusterroles",
    "ClusterRoleBinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
    "Role": "/apis/rbac.authorization.k8s.io/v1/roles",
    "RoleBinding": "/apis/rbac.authorization.k8s.io/v1/rolebindings",
}


def documents() -> list[dict[str, Any]]:
    """The manifests' objects, in the order in which they are made."""
    files = ("controller/namespace.yaml", "rbac/controller.yaml")
    return [body for file in files for body in yaml.safe_load_all((MANIFESTS / file).read_text())]


async def grant(api: Api) -> None:
    """Make them where they are not yet. Raises ApiError."""
    for body in documents():
        path = path_of(COLLECTIONS[body["kind"]], body["metadata"].get("namespace", ""))
        try:
            await api.request("POST", path, body)
        except ApiError as error:
            if error.status != 409:
                raise


async def grant_scheduler(api: Api) -> None:
    """Let the user that kube-scheduler is look after PodGroups too, as scheduler-plugins' manifests do."""
    rules = [{"apiGroups": ["scheduling.x-k8s.io"], "resources": ["*"], "verbs": ["*"]}]
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "metadata": {"name": "podgroups"}}
    await api.request("POST", COLLECTIONS["ClusterRole"], {**role, "kind": "ClusterRole", "rules": rules})
    who = {"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "system:kube-scheduler"}
    what = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "podgroups"}
    binding = {**role, "kind": "ClusterRoleBinding", "roleRef": what, "subjects": [who]}
    await api.request("POST", COLLECTIONS["ClusterRoleBinding"], binding)
