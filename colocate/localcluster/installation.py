"""What `kubectl apply -k manifests/base` installs, on a cluster that has neither a network of pods nor kube-proxy."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import yaml

from colocate.cluster.api import SYSTEM
from colocate.errors import HostUnfit
from colocate.localcluster.controlplane import MANIFESTS, ControlPlane, binaries

ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
SYS_RESOURCE = 24
"""The number of CAP_SYS_RESOURCE (capability.h)."""
PATIENCE_SECONDS = 120


def _may_have_sys_resource() -> bool:
    bounding = Path("/proc/self/status").read_text().partition("CapBnd:\t")[2].split()[0]
    return bool(int(bounding, 16) >> SYS_RESOURCE & 1)


class Installation:
    """The manifests as they are, and over them what this cluster lacks: pods share the host's network, so nothing is
    probed or scraped; where the API server is is said, and its certificate brought; a right that this machine's root
    has not is not asked for; one publisher is enough, and gangs are not shown.
    """

    def __init__(
        self,
        plane: ControlPlane,
        directory: Path,
        policy: dict[str, Any],
        *,
        host: str = "127.0.0.1",
        sys_resource: bool | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        """`policy` is the `spec` of the agents' policy; `host` is where nodes find the API server.

        `sys_resource`: whether their root has that right (default: as this machine's); `environment` is the agents'.
        """
        self._plane, self._overlay = plane, directory
        self._overlay.mkdir(parents=True)
        policy = {**policy, "http": {"enabled": False}}
        whole = {
            "apiVersion": "colocate.io/v1alpha1",
            "kind": "ColocationPolicy",
            "metadata": {"name": "default"},
            "spec": policy,
        }
        api = [
            {"name": "KUBERNETES_SERVICE_HOST", "value": host},
            {"name": "KUBERNETES_SERVICE_PORT", "value": str(plane.port)},
        ]
        sources = [{"serviceAccountToken": {"path": "token"}}, {"configMap": {"name": "authority"}}]
        account = {"name": "account", "projected": {"sources": sources}}
        reaches = {"env": api, "volumeMounts": [{"name": "account", "mountPath": ACCOUNT, "readOnly": True}]}
        sys_resource = _may_have_sys_resource() if sys_resource is None else sys_resource
        rights = ["KILL", "SYS_RESOURCE"] if sys_resource else ["KILL"]
        agent = {
            **reaches,
            "name": "agent",
            "env": [*api, *({"name": n, "value": v} for n, v in (environment or {}).items())],
            "readinessProbe": None,
            "livenessProbe": None,
            "securityContext": {"capabilities": {"add": rights}},
        }

        def pod(container: dict[str, Any]) -> dict[str, Any]:
            return {"template": {"spec": {"hostNetwork": True, "containers": [container], "volumes": [account]}}}

        self._patches = [
            self._of("v1", "ConfigMap", "colocate-policy", data={"policy.yaml": yaml.safe_dump(whole)}),
            self._of("apps/v1", "DaemonSet", "colocate-agent", spec=pod(agent)),
            self._of(
                "apps/v1",
                "Deployment",
                "colocate-publication",
                spec={"replicas": 1, **pod({**reaches, "name": "publication"})},
            ),
            self._of("apps/v1", "Deployment", "colocate-controller", spec={"replicas": 0}),
        ]

    def _of(self, version: str, kind: str, name: str, **rest: Any) -> dict[str, Any]:
        return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "namespace": SYSTEM}, **rest}

    def apply(self) -> None:
        """Raises HostUnfit with kubectl's words."""
        authority = (self._plane.directory / "certs" / "apiserver.crt").read_text()
        added = self._of("v1", "ConfigMap", "authority", data={"ca.crt": authority})
        (self._overlay / "authority.json").write_text(json.dumps(added))
        names = []
        for i, patch in enumerate(self._patches):
            names.append({"path": f"patch-{i}.json"})
            (self._overlay / f"patch-{i}.json").write_text(json.dumps(patch))
        base = os.path.relpath((MANIFESTS / "base").resolve(), self._overlay.resolve())  # it takes no absolute one
        kustomization = {"resources": [base, "authority.json"], "patches": names}
        (self._overlay / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        self.kubectl("apply", "--server-side", "-k", str(self._overlay))

    def remove_agents(self) -> None:
        """The DaemonSet goes, and what the agents have said; back when the last of their pods has gone."""
        self.kubectl("delete", "-n", SYSTEM, "daemonset/colocate-agent", "--cascade=foreground")
        self.kubectl("delete", "nodecolocations", "--all")

    def remove(self, *, wait: bool = True) -> None:
        """All, or all the rest; without waiting for nodes that do not answer."""
        self.kubectl("delete", "--ignore-not-found", f"--wait={str(wait).lower()}", "-k", str(self._overlay))

    def kubectl(self, *arguments: str) -> str:
        """What it prints. Raises HostUnfit with its words."""
        command = [str(binaries("kubectl") / "kubectl"), "--kubeconfig", str(self._plane.kubeconfig())]
        try:
            done = subprocess.run(
                [*command, *arguments],
                capture_output=True,
                text=True,
                check=False,
                timeout=PATIENCE_SECONDS,
                env={**os.environ, "HOME": str(self._overlay)},
            )
        except subprocess.TimeoutExpired as error:
            raise HostUnfit(f"kubectl {' '.join(arguments)}: not within {PATIENCE_SECONDS} s") from error
        if done.returncode:
            raise HostUnfit(f"kubectl {' '.join(arguments)} ended with code {done.returncode}", done.stderr[-2000:])
        return done.stdout
