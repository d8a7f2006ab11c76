"""A real etcd and kube-apiserver on loopback, with nodes that KWOK plays: for the gang demonstration, tests,
benchmarks.

Everything lives in one scratch directory and ends with this process (PR_SET_PDEATHSIG); ports are free ones of
loopback. The binaries come from `$KUBEBUILDER_ASSETS` or from the cache that `make kube-binaries` fills.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import shutil
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType

import yaml

from colocate.errors import HostUnfit
from colocate.kube.client import DEFINITIONS, Api, ApiError

START_SECONDS = 90.0
CONTROLLER = "system:serviceaccount:colocate-system:colocate-controller"
USERS = {
    "colocate": (CONTROLLER, '"system:serviceaccounts"'),
    "admin": ("admin", '"system:masters"'),
    "scheduler": ("system:kube-scheduler", ""),
    "controllers": ("system:kube-controller-manager", ""),
    "kwok": ("kwok", '"system:masters"'),
    "node": ("system:node:localhost", '"system:nodes"'),
}
CONTROLLERS = (
    "job-controller,replicaset-controller,deployment-controller,statefulset-controller,daemonset-controller,"
    "garbage-collector-controller,namespace-controller,serviceaccount-controller,"
    "node-lifecycle-controller,taint-eviction-controller,pod-garbage-collector-controller,disruption-controller,"
    "persistentvolume-binder-controller,persistentvolume-protection-controller,"
    "persistentvolumeclaim-protection-controller,ephemeral-volume-controller"
)
HERE = Path(__file__).resolve()
MANIFESTS = next(p for p in (HERE.with_name("manifests"), HERE.parents[2] / "manifests") if p.is_dir())
"""Beside this file in an installed wheel, in `manifests/` in a checkout."""


async def install(api: Api, *kinds: str) -> None:
    """Create our custom resources where they are not yet; by default those of gang scheduling. Raises ApiError."""
    for name in kinds or ("podgroups", "gangplans", "powerbudgets"):
        try:
            await api.request("POST", DEFINITIONS, yaml.safe_load((MANIFESTS / "crd" / f"{name}.yaml").read_text()))
        except ApiError as error:
            if error.status != 409:
                raise


def cache_folder(name: str) -> Path:
    """Where what was built is kept, of one kind."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "colocate" / name


def binaries(*names: str) -> Path:
    """The folder that has these binaries. Raises HostUnfit that names what is missing and how to get it."""
    cache = cache_folder("kube")
    places = [Path(os.environ["KUBEBUILDER_ASSETS"])] if "KUBEBUILDER_ASSETS" in os.environ else []
    places += sorted(cache.glob("*/")) if cache.is_dir() else []
    for place in places:
        if all(os.access(place / name, os.X_OK) for name in names):
            return place
    where = ", ".join(map(str, places)) or str(cache)
    mend = (
        "make kube-binaries (Go >= 1.26, about ten minutes, once), or set KUBEBUILDER_ASSETS to a folder that has them"
    )
    raise HostUnfit(f"the Kubernetes binaries {', '.join(names)} are not in {where}", mend)


def with_parent(*command: str) -> list[str]:
    """The command as one that is killed when the process that starts it ends (PR_SET_PDEATHSIG)."""
    return [sys.executable, "-IS", str(HERE.with_name("with_parent.py")), *command]


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


class ControlPlane:
    """A context manager: running while it is entered."""

    def __init__(
        self,
        directory: Path,
        *,
        scheduler: bool = False,
        controllers: bool = False,
        kwok: bool = True,
        without_admission: tuple[str, ...] = (),
    ) -> None:
        self.directory, self._without_admission = directory, ("ServiceAccount", *without_admission)
        names = ["etcd", "kube-apiserver"]
        names += [
            n for n, w in (("kube-scheduler", scheduler), ("kube-controller-manager", controllers), ("kwok", kwok)) if w
        ]
        self._bin, self._names = binaries(*names), names
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._tokens = {user: secrets.token_hex(16) for user in USERS}  # others on this machine reach its ports too
        self.port = 0

    def __enter__(self) -> ControlPlane:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def kubeconfig(self, user: str = "admin") -> Path:
        """A kubeconfig of one of `USERS`."""
        path = self.directory / f"{user}.kubeconfig"
        authority = base64.b64encode((self.directory / "certs" / "apiserver.crt").read_bytes()).decode()
        server = {"server": f"https://127.0.0.1:{self.port}", "certificate-authority-data": authority}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "colocate",
            "clusters": [{"name": "colocate", "cluster": server}],
            "users": [{"name": user, "user": {"token": self._tokens[user]}}],
            "contexts": [{"name": "colocate", "context": {"cluster": "colocate", "user": user}}],
        }
        path.write_text(json.dumps(config))
        path.chmod(0o600)
        return path

    @property
    def kubelet_client(self) -> Path:
        """The certificate by which kubelets know the API server; it is signed by itself."""
        return self.directory / "kubelet-client.crt"

    def pid(self, name: str) -> int:
        """Of one of its processes, by the name of its binary."""
        return self._processes[name].pid

    @property
    def pids(self) -> list[int]:
        """Of all its processes."""
        return [process.pid for process in self._processes.values()]

    def stop(self) -> None:
        """End what was started, in reverse; nothing is left."""
        for process in reversed(self._processes.values()):
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
            if process.poll() is None:
                process.kill()
                process.wait()
        self._processes.clear()
        for scratch in ("etcd", "certs"):
            shutil.rmtree(self.directory / scratch, ignore_errors=True)

    def _start(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        client, peer, self.port = free_ports(3)
        tokens = "".join(f"{self._tokens[u]},{name},{u},{groups}\n" for u, (name, groups) in USERS.items())
        path = self.directory / "tokens.csv"
        path.touch(mode=0o600)
        path.write_text(tokens)
        key = self.directory / "service-account.key"
        self._openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(key))
        self._openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc", "-days", "30"),
            *("-keyout", str(self.kubelet_client.with_suffix(".key")), "-out", str(self.kubelet_client)),
            *("-subj", "/O=system:masters/CN=kube-apiserver-kubelet-client"),
        )
        self._run_etcd(client, peer)
        self._run_api(client, key)
        if "kube-scheduler" in self._names:
            self.start_scheduler()
        if "kube-controller-manager" in self._names:
            config = str(self.kubeconfig("controllers"))
            self._spawn(
                "kube-controller-manager",
                *(f"--{f}kubeconfig={config}" for f in ("", "authentication-", "authorization-")),
                *("--use-service-account-credentials", "--leader-elect=false", "--secure-port=0"),
                *(f"--controllers={CONTROLLERS}", f"--service-account-private-key-file={key}"),
                "--enable-hostpath-provisioner",
                *("--kube-api-qps=1000", "--kube-api-burst=1000", "--node-monitor-grace-period=1h"),
            )
        if "kwok" in self._names:
            stages = HERE.with_name("kwok.yaml")
            self._spawn("kwok", f"--kubeconfig={self.kubeconfig('kwok')}", f"--config={stages}", "-v=ERROR")

    def start_scheduler(self, *flags: str) -> None:
        """kube-scheduler, for what is not ours and for comparison."""
        config = str(self.kubeconfig("scheduler"))
        self._spawn(
            "kube-scheduler",
            *(f"--{f}kubeconfig={config}" for f in ("", "authentication-", "authorization-")),
            *("--leader-elect=false", "--secure-port=0", "--kube-api-qps=5000", "--kube-api-burst=5000", *flags),
        )

    def end(self, name: str) -> None:
        """End one of its processes."""
        process = self._processes.pop(name)
        process.terminate()
        process.wait()

    def _run_etcd(self, client: int, peer: int) -> None:
        url, peers = f"http://127.0.0.1:{client}", f"http://127.0.0.1:{peer}"
        self._spawn(
            "etcd",
            *("--name=c", f"--data-dir={self.directory / 'etcd'}", "--unsafe-no-fsync", "--log-level=error"),
            *(f"--listen-client-urls={url}", f"--advertise-client-urls={url}", f"--listen-peer-urls={peers}"),
            *(f"--initial-advertise-peer-urls={peers}", f"--initial-cluster=c={peers}"),
            f"--quota-backend-bytes={2 << 30}",
        )

    def _run_api(self, etcd: int, key: Path) -> None:
        self._spawn(
            "kube-apiserver",
            *(f"--etcd-servers=http://127.0.0.1:{etcd}", "--bind-address=127.0.0.1", f"--secure-port={self.port}"),
            *(
                "--advertise-address=127.0.0.1",
                "--endpoint-reconciler-type=none",
                f"--cert-dir={self.directory / 'certs'}",
            ),
            *(f"--token-auth-file={self.directory / 'tokens.csv'}", "--authorization-mode=Node,RBAC"),
            f"--kubelet-client-certificate={self.kubelet_client}",
            f"--kubelet-client-key={self.kubelet_client.with_suffix('.key')}",
            *(f"--service-account-key-file={key}", f"--service-account-signing-key-file={key}"),
            *("--service-account-issuer=https://kubernetes.default.svc", "--service-cluster-ip-range=10.96.0.0/16"),
            *(
                "--enable-admission-plugins=Priority",
                f"--disable-admission-plugins={','.join(self._without_admission)}",
            ),
            *("--max-requests-inflight=2000", "--max-mutating-requests-inflight=1000", "--profiling=false"),
        )
        until = time.monotonic() + START_SECONDS
        while not self._ready():
            self._check()
            if time.monotonic() > until:
                raise HostUnfit(
                    "kube-apiserver is not ready after 90 s", f"read {self.directory / 'kube-apiserver.log'}"
                )
            time.sleep(0.05)

    def _ready(self) -> bool:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # only asks whether it is up
        url = f"https://127.0.0.1:{self.port}/readyz"
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {self._tokens['admin']}"})
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        try:
            with opener.open(request, timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _check(self) -> None:
        for name, process in self._processes.items():
            if process.poll() is not None:
                tail = (self.directory / f"{name}.log").read_text(errors="replace")[-800:]
                raise HostUnfit(f"{name} ended with code {process.returncode}", tail)

    def _spawn(self, name: str, *arguments: str) -> None:
        log = (self.directory / f"{name}.log").open("wb")
        environment = {"PATH": os.environ.get("PATH", ""), "HOME": str(self.directory), "GOGC": "200"}
        with log:
            self._processes[name] = subprocess.Popen(
                with_parent(str(self._bin / name), *arguments),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.directory,
            )

    def _openssl(self, *arguments: str) -> None:
        try:
            subprocess.run(["openssl", *arguments], check=True, capture_output=True)
        except FileNotFoundError as error:
            raise HostUnfit("openssl is not here", "install the Debian package openssl") from error
