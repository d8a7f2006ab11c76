"""An operator's process: its own kubeconfig, and where it has webhooks, a certificate and a `/tmp` of its own.

Operators look for their webhooks' certificate in a fixed folder below `/tmp` (Kueue also below `/etc`): each gets both
folders to itself in a mount namespace, and the API server is told to reach it on loopback.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from colocate.localcluster.controlplane import with_parent
from tests.operators.jobs import Adapter
from tools import operators

START_SECONDS = 60.0
HOOKS = "/apis/admissionregistration.k8s.io/v1"
PLURALS = {
    "MutatingWebhookConfiguration": "mutatingwebhookconfigurations",
    "ValidatingWebhookConfiguration": "validatingwebhookconfigurations",
}
ALONE = 'exec 9<"$2" && mount --bind "$1/etc" /etc && mount --bind "$1" /tmp && shift 2 && exec /proc/self/fd/9 "$@"'
"""The program is opened before `/tmp` is another one: the cache may be in there."""


class Running:
    """One operator, from entering to leaving."""

    def __init__(self, adapter: Adapter, kubeconfig: Path, directory: Path, port: int) -> None:
        self.adapter, self.port, self._directory = adapter, port, directory
        self._kubeconfig = kubeconfig
        self._log = directory / "operator.log"
        (directory / "etc").mkdir(parents=True)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Its process, once it serves its webhooks."""
        folder = operators.built(self.adapter.name)
        assert folder is not None
        shutil.copy(self._kubeconfig, self._directory / "kubeconfig")
        config = self.adapter.config(self.port)
        (self._directory / "config.yaml").write_text(json.dumps(config))
        hooked = (folder / "webhooks.yaml").exists()
        apart = hooked and operators.OPERATORS[self.adapter.name].apart
        where = Path("/tmp") if apart else self._directory  # as the process sees it
        commands = [[str(folder / "operator"), *options] for options in self.adapter.processes(where, self.port)]
        if apart:
            for certificate in ("k8s-webhook-server/serving-certs", "etc/kueue/metrics/certs"):
                self._certify(self._directory / certificate)
            alone = ["unshare", "--map-root-user", "--mount", "sh", "-c", ALONE, "sh", str(self._directory)]
            commands = [[*alone, *command] for command in commands]
        environment = {**os.environ, "KUBECONFIG": str(where / "kubeconfig")}
        environment |= dict.fromkeys(("POD_NAMESPACE", "MY_POD_NAMESPACE"), "default")
        server = urlsplit(json.loads(self._kubeconfig.read_text())["clusters"][0]["cluster"]["server"])
        environment |= self.adapter.environment(folder, server.hostname or "", server.port or 0)
        processes = []
        with self._log.open("wb") as log:
            for command in commands:
                runner = with_parent(shutil.which(command[0]) or command[0], *command[1:])
                processes.append(subprocess.Popen(runner, stdout=log, stderr=log, env=environment))
        try:
            if hooked:
                self._wait(processes[0])
            yield
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def _certify(self, folder: Path) -> None:
        """One self-signed certificate for 127.0.0.1, the same in every folder."""
        folder.mkdir(parents=True)
        made = self._directory / "tls"
        if not made.exists():
            made.mkdir()
            command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
            command += ["-subj", "/CN=operator", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
            command += ["-keyout", str(made / "tls.key"), "-out", str(made / "tls.crt")]
            subprocess.run(command, check=True, capture_output=True)
        for file in made.iterdir():
            shutil.copy(file, folder)

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        until = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            if process.poll() is not None or time.monotonic() > until:
                raise AssertionError(f"{self.adapter.name} serves no webhooks: {self._log.read_text()[-3000:]}")
            time.sleep(0.1)

    def webhooks(self) -> list[tuple[str, dict[str, Any]]]:
        """Collections and bodies of its webhook configurations, which lead to this process."""
        folder = operators.built(self.adapter.name)
        assert folder is not None
        file = folder / "webhooks.yaml"
        if not file.exists():
            return []
        tls = self._directory / "tls" / "tls.crt"
        authority = base64.b64encode(tls.read_bytes()).decode() if tls.exists() else ""
        found = []
        for body in yaml.safe_load_all(file.read_text()):
            hooks = [h for h in body["webhooks"] if self._wanted(h)]
            if not hooks:
                continue
            body["metadata"]["name"] = self.adapter.name
            for hook in hooks:
                path = hook["clientConfig"]["service"]["path"]
                if authority:
                    hook["clientConfig"] = {"url": f"https://127.0.0.1:{self.port}{path}", "caBundle": authority}
                else:  # it has a certificate of its own, for a Service, and writes its authority in here
                    service = {"name": self.adapter.name, "namespace": "default", "port": self.port, "path": path}
                    hook["clientConfig"] = {"service": service}
                if hook["rules"][0]["resources"] == ["pods"]:  # as its own overlay does it
                    exists = {"key": self.adapter.label, "operator": "Exists"}
                    hook["objectSelector"] = {"matchExpressions": [exists]}
                    hook["rules"][0]["operations"] = ["CREATE"]
            found.append((f"{HOOKS}/{PLURALS[body['kind']]}", {**body, "webhooks": hooks}))
        return found

    def _wanted(self, hook: dict[str, Any]) -> bool:
        return set(hook["rules"][0]["apiGroups"]) <= set(self.adapter.hooked)
