"""A Kubernetes node in a virtual machine: kubelet, containerd and runc on full cgroup v2, of a control plane here."""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from colocate.localcluster.controlplane import ControlPlane, binaries
from colocate.localcluster.realnode import BINARIES, NAME, furnish
from tools.guest import HOST, Guest, disk

HOME = "/disk"
DISK_MIB = 3000
MEMORY_MIB = 3072
EXPORTS = f"export PATH={HOME}/bin:$PATH;"
CTR = f"{EXPORTS} ctr --address {HOME}/containerd.sock --namespace k8s.io"
PATIENCE_SECONDS = 240.0
"""Emulated, all takes five to ten times as long."""


class GuestNode:
    """Ready while it is entered; with systemd, its systemd makes the cgroups."""

    def __init__(self, plane: ControlPlane, archive: Path, *, systemd: bool) -> None:
        """`archive` is an image that the node has."""
        self._plane, self._archive, self._systemd = plane, archive, systemd
        self._folder: tempfile.TemporaryDirectory[str]
        self._guest: Guest

    def __enter__(self) -> GuestNode:
        self._folder = tempfile.TemporaryDirectory(prefix="colocate-guest-node-")
        try:
            image = self._make_disk(Path(self._folder.name))
            self._guest = Guest(memory_mib=MEMORY_MIB, systemd=self._systemd, network=True, disk=image)
            self._guest.__enter__()
        except BaseException:
            self._folder.cleanup()
            raise
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._guest.__exit__()
        self._folder.cleanup()

    def _make_disk(self, folder: Path) -> Path:
        root = folder / "root"
        for name in ("bin", "nri-plugins", "pki"):
            (root / name).mkdir(parents=True)
        for name in BINARIES:
            shutil.copy2(binaries(*BINARIES) / name, root / "bin" / name)
        furnish(root, HOME, "/", 10250, f"{HOME}/kubelet-client.crt", systemd=self._systemd)
        shutil.copy2(self._plane.kubelet_client, root)
        # What it is for is its name, as in the API server's certificate.
        found = json.loads(self._plane.kubeconfig("node").read_text())
        found["clusters"][0]["cluster"]["server"] = f"https://{HOST}:{self._plane.port}"
        (root / "kubeconfig").write_text(json.dumps(found))
        shutil.copy2(self._archive, root / "image.tar")
        disk(folder / "disk.img", root, DISK_MIB)
        shutil.rmtree(root)
        return folder / "disk.img"

    def _start(self) -> None:
        # The runtime's plugins and the agents look where a distribution has its sockets.
        self.run("mkdir -p /var /run/nri /var/lib/colocate; rm -rf /var/run; ln -s /run /var/run")
        self.run(f"mount --bind {HOME}/nri /run/nri; mount --make-rshared /")
        self.background("containerd", f"containerd --config {HOME}/containerd.toml")
        self.until(lambda: self._guest.run(f"{CTR} version")[0] == 0, "containerd answers")
        for name in ("pause", "image"):
            self.run(f"{CTR} images import {HOME}/{name}.tar", PATIENCE_SECONDS)
        self.start_kubelet()

    def start_kubelet(self) -> None:
        """It is not started again by anyone."""
        self.background(
            "kubelet",
            f"kubelet --config {HOME}/kubelet.json --kubeconfig {HOME}/kubeconfig --hostname-override {NAME} "
            f"--root-dir {HOME}/kubelet --cert-dir {HOME}/pki",
        )

    def background(self, name: str, command: str) -> None:
        """Start a program of the node; with systemd as a unit, else as a process of its own session."""
        script = f"{EXPORTS} exec {command} >> {HOME}/{name}.log 2>&1"
        if self._systemd:
            self.run(f"systemd-run -q --unit={name} -p Delegate=yes -p KillMode=process sh -c {shlex.quote(script)}")
        else:
            self.run(f"setsid sh -c {shlex.quote(script)} </dev/null >/dev/null 2>&1 &")

    def end(self, name: str) -> None:
        """SIGKILL a program of the node."""
        self.run(f"kill -9 $(pidof {name})")

    def run(self, command: str, seconds: float = 120.0) -> str:
        """What a command in the guest says; it has to succeed."""
        code, said = self._guest.run(command, seconds)
        assert code == 0, f"{command}: {code}: {said}\n{self.words()}"
        return said

    def until(self, what: Callable[[], Any], why: str, seconds: float = PATIENCE_SECONDS) -> Any:
        """What it is, once it is something."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := what():
                return found
            time.sleep(0.5)
        raise AssertionError(f"not within {seconds:g} s: {why}\n{self.words()}")

    def words(self) -> str:
        """The last lines of each log."""
        _, said = self._guest.run(
            f"for f in {HOME}/*.log {HOME}/logs/*colocate*/*/*.log; do echo $f:; tail -n 12 $f; done"
        )
        return said[-12000:]

    def read(self, path: str) -> str:
        """A file of the unified hierarchy; empty if it is not there."""
        return self._guest.run(f"cat /sys/fs/cgroup{path} 2>/dev/null")[1]

    def processes(self, path: str) -> list[int]:
        """Of a cgroup and all below it."""
        found = self._guest.run(f"find /sys/fs/cgroup{path} -name cgroup.procs -exec cat {{}} + 2>/dev/null")[1]
        return [int(pid) for pid in found.split()]
