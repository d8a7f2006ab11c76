"""A real kubelet with containerd and runc, in mount and process namespaces of its own: nothing of it outlives us.

What a kubelet changes on its host it changes in there: the sysctls that it tunes are files bound over /proc/sys, /run,
/var/lib and /var/log are empty, and its cgroups are below a scratch node, which is swept should its owner be killed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
from pathlib import Path

from colocate.actuate.scratch import ScratchNode, sweep
from colocate.cgroup.layout import UNIFIED
from colocate.cgroup.port import KernelPort
from colocate.errors import HostUnfit
from colocate.localcluster.archive import write_archive
from colocate.localcluster.controlplane import ControlPlane, binaries, free_ports, with_parent

BINARIES = ("kubelet", "containerd", "containerd-shim-runc-v2", "ctr")
PROGRAMS = ("runc", "unshare", "mount")
BUSYBOX = Path("/usr/bin/busybox")
IMAGE = "localhost/colocate/pause:1"
NAME = "localhost"
"""A kubelet refuses a loopback address, but not the name."""
MOST_PODS = 300
"""Above kubelet's 110: some operators have 250."""
SYSCTLS = (
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)
START = """
set -eu
echo 0 > {system}/cgroup.procs
mount --make-rprivate /
i=0
for file in {sysctls}; do
  i=$((i + 1)); cat /proc/sys/$file > {home}/sysctl-$i; mount --bind {home}/sysctl-$i /proc/sys/$file
done
for folder in /run /var/lib /var/log; do mount -t tmpfs tmpfs $folder; done
for folder in nri cdi; do mkdir /run/$folder; mount --bind {home}/$folder /run/$folder; done
while :; do containerd --config {home}/containerd.toml >> {home}/containerd.log 2>&1 || sleep 0.2; done &
until ctr --address {home}/containerd.sock version > {home}/ctr.log 2>&1; do sleep 0.05; done
ctr --address {home}/containerd.sock --namespace k8s.io images import {home}/pause.tar >> {home}/ctr.log 2>&1
for i in 1 2 3 4 5; do
  kubelet --config {home}/kubelet.json --kubeconfig {kubeconfig} --hostname-override {name} \\
    --root-dir {home}/kubelet --cert-dir {home}/pki >> {home}/kubelet.log 2>&1 || sleep 0.2
done
"""
CONTAINERD = """
version = 3
root = "{home}/containerd"
state = "{home}/state"
[grpc]
  address = "{home}/containerd.sock"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  use_local_image_pull = true
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "{image}"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["{home}/cni"]
    conf_dir = "{home}/cni"
[plugins."io.containerd.nri.v1.nri"]
  disable = false
  socket_path = "{home}/nri/nri.sock"
  plugin_path = "{home}/nri-plugins"
  plugin_config_path = "{home}/nri-plugins"
  [plugins."io.containerd.nri.v1.nri".default_validator]
    enable = true
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
    SystemdCgroup = {systemd}
"""


def lacks() -> str:
    """What is missing for it here; empty if nothing."""
    if os.geteuid() != 0:
        return "root"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    missing += [] if BUSYBOX.exists() else [f"{BUSYBOX} (busybox-static)"]
    try:
        binaries(*BINARIES)
    except HostUnfit as error:
        missing.append(str(error))
    return ", ".join(missing)


class RealNode:
    """A node of the control plane's cluster while it is entered; its name is `NAME`."""

    def __init__(
        self, plane: ControlPlane, directory: Path, purpose: str = "test", memory_bytes: int | None = None
    ) -> None:
        self._plane, self._home = plane, directory
        self._port = KernelPort()
        self.scratch = ScratchNode(self._port, purpose, memory_bytes)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RealNode:
        sweep(self._port)
        self.scratch.__enter__()
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # the first one of the namespace takes all others with it
            self._process.wait()
        self.scratch.__exit__()

    @property
    def nri_socket(self) -> str:
        """Where containerd waits for plugins."""
        return str(self._home / "nri" / "nri.sock")

    @property
    def cdi_folder(self) -> Path:
        """Where devices of the Container Device Interface are described."""
        return self._home / "cdi"

    @property
    def cgroup(self) -> str:
        """What the kubelet takes for its host's root."""
        return self.scratch.path

    def end_containerd(self) -> None:
        """SIGKILL; it is started again at once, and containers run on."""
        self._signal("containerd", "containerd.toml")

    def end_kubelet(self) -> None:
        """The same; not more than four times."""
        self._signal("kubelet", "kubelet.json")

    def silence_kubelet(self) -> None:
        """SIGSTOP: a node that nobody reaches, whose containers run on."""
        self._signal("kubelet", "kubelet.json", signal.SIGSTOP)

    def wake_kubelet(self) -> None:
        """SIGCONT."""
        self._signal("kubelet", "kubelet.json", signal.SIGCONT)

    def _signal(self, program: str, configuration: str, by: signal.Signals = signal.SIGKILL) -> None:
        wanted = f"{self._home}/{configuration}"
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if words[0].endswith(program) and wanted in words:
                    os.kill(int(folder.name), by)

    @property
    def static_pods(self) -> Path:
        """Where kubelet finds pods that the API server has not been asked for."""
        return self._home / "static"

    def bring(self, archive: Path) -> None:
        """Give the node an image, as an operator without a registry does."""
        ctr = [str(binaries(*BINARIES) / "ctr"), "--address", str(self._home / "containerd.sock"), "-n", "k8s.io"]
        subprocess.run([*ctr, "images", "import", str(archive)], check=True, capture_output=True)

    def said_by(self, pod: str) -> str:
        """What the containers of a pod have written."""
        return "".join(f.read_text(errors="replace") for f in self._home.glob(f"logs/*_{pod}*/*/*.log"))

    def words(self) -> str:
        """The last lines of each log."""
        logs = sorted(self._home.glob("*.log"))
        return "\n".join(f"{log.name}:\n{log.read_text(errors='replace')[-3000:]}" for log in logs)

    def _start(self) -> None:
        home = self._home
        for hierarchy in self._port.layout.mounts:  # a kubelet wants its root in every one
            if self._port.inode(hierarchy, self.scratch.path) is None:
                self._port.mkdir(hierarchy, self.scratch.path)
        furnish(home, str(home), self.scratch.path, free_ports(1)[0], self._plane.kubelet_client)
        script = START.format(
            system=self._system(),
            home=home,
            kubeconfig=self._plane.kubeconfig("node"),
            name=NAME,
            sysctls=" ".join(SYSCTLS),
        )
        environment = {**os.environ, "PATH": f"{binaries(*BINARIES)}:{os.environ['PATH']}"}
        isolated = [
            shutil.which("unshare") or "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "sh",
            "-c",
            script,
        ]
        with (home / "start.log").open("wb") as log:
            self._process = subprocess.Popen(
                with_parent(*isolated),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _system(self) -> str:
        """The node's `system.slice`: kubelet and runtime share CPUs with pods as a group, as on a machine of its own.

        Where that can be had, in the hierarchy of the CPU alone: the node's memory is its pods'.
        """
        path, hierarchy = self.scratch.make("system"), self._port.layout.hierarchy("cpu") or UNIFIED
        return self._port.layout.mounts[hierarchy] + path

    def check(self) -> None:
        """Raises HostUnfit with its last words if it has ended."""
        if self._process is not None and self._process.poll() is not None:
            raise HostUnfit(f"the kubelet ended with code {self._process.returncode}", self.words())


def furnish(folder: Path, home: str, cgroup_root: str, port: int, client: Path | str, *, systemd: bool = False) -> None:
    """Write what containerd and kubelet begin with into a folder, which they will know as `home`."""
    for name in ("cni", "nri", "cdi", "static"):
        (folder / name).mkdir()
    network = {"cniVersion": "1.0.0", "name": "none", "plugins": [{"type": "none"}]}
    (folder / "cni" / "10-none.conflist").write_text(json.dumps(network))
    (folder / "containerd.toml").write_text(containerd_configuration(home, systemd=systemd))
    kubelet = kubelet_configuration(home, cgroup_root, port, client, systemd=systemd)
    (folder / "kubelet.json").write_text(json.dumps(kubelet))
    write_pause(folder / "pause.tar")


def containerd_configuration(home: str, *, systemd: bool = False) -> str:
    """Of a containerd that has everything in this folder; `systemd` chooses the driver that makes cgroups."""
    return CONTAINERD.format(home=home, image=IMAGE, systemd=str(systemd).lower())


def kubelet_configuration(
    home: str, cgroup_root: str, port: int, client: Path | str, *, systemd: bool = False
) -> dict[str, object]:
    """A KubeletConfiguration; `client` is the certificate by which it knows the API server."""
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "failCgroupV1": False,
        "cgroupDriver": "systemd" if systemd else "cgroupfs",
        "cgroupRoot": cgroup_root,
        "containerRuntimeEndpoint": f"unix://{home}/containerd.sock",
        "address": "127.0.0.1",
        "port": port,
        "healthzPort": 0,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": False},
            "x509": {"clientCAFile": str(client)},
        },
        "authorization": {"mode": "AlwaysAllow"},
        "resolvConf": "",
        "failSwapOn": False,
        "crashLoopBackOff": {"maxContainerRestartPeriod": "1s"},  # nobody wants to wait for minutes
        "makeIPTablesUtilChains": False,
        "nodeStatusUpdateFrequency": "2s",
        "maxPods": MOST_PODS,
        "evictionHard": {"memory.available": "50Mi", "nodefs.available": "0%", "imagefs.available": "0%"},
        "staticPodPath": f"{home}/static",
        "podLogsDir": f"{home}/logs",
        "volumePluginDir": f"{home}/plugins",
    }


def write_pause(path: Path) -> None:
    """An image with a static busybox that sleeps."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for folder in ("bin", "dev", "proc", "sys", "etc", "tmp"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        tar.add(BUSYBOX, "bin/sleep")
    write_archive(path, IMAGE, layer.getvalue(), {"Cmd": ["/bin/sleep", "1000000"]})
