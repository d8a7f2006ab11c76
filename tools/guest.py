"""A virtual machine with Debian's kernel, full cgroup v2, this project and its installed packages inside.

QEMU without hardware virtualisation; ext4 root made by mke2fs from a staging directory, a small initramfs that loads
the virtio modules, a command channel on the second serial line. Nothing needs root or a mount. `python -m tools.guest
COMMAND` runs a shell command in a fresh guest.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import platform
import shutil
import socket
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "guest"
KERNEL = BUILD / "kernel"
MODULES = (
    "drivers/virtio/virtio_ring", "drivers/virtio/virtio", "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci_modern_dev", "drivers/virtio/virtio_pci", "drivers/block/virtio_blk",
    "net/core/failover", "drivers/net/net_failover", "drivers/net/virtio_net", "fs/overlayfs/overlay",
)  # fmt: skip
LEFT_OUT = (
    "mypy",
    "mypyc",
    "ruff",
    "pip",
    "setuptools",
    "_distutils_hack",
    "grimp",
    "importlinter",
    "duckdb",
    "_duckdb",
)
MEMORY_MIB = 2048
NETWORK, HOST, ADDRESS = "10.96.0.0/24", "10.96.0.1", "10.96.0.15"
"""With a network, the guest finds the host's loopback where a cluster's nodes find the `kubernetes` service."""
IMAGE_MIB = 1500
END = "__END__"

INITRAMFS_INIT = """#!/bin/sh
B=/bin/busybox
$B mount -t devtmpfs dev /dev; $B mount -t proc proc /proc
for m in /mod/*.ko; do $B insmod $m || echo "insmod $m failed"; done
for i in 1 2 3 4 5 6 7 8 9 10; do [ -b /dev/vda ] && break; $B sleep 0.1; done
$B mount -t ext4 -o noatime /dev/vda /newroot || exec $B sh
case "$($B cat /proc/cmdline)" in *guest.systemd*) init=/lib/systemd/systemd;; *) init=/sbin/init;; esac
$B mount --move /dev /newroot/dev; $B umount /proc
exec $B switch_root /newroot $init
"""

INIT = """#!/bin/sh
export PATH=/usr/bin:/bin:/sbin:/usr/sbin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t cgroup2 none /sys/fs/cgroup
mkdir -p /dev/pts /dev/shm; mount -t devpts pts /dev/pts; mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run; mount -t tmpfs tmp /tmp
ip link set lo up; hostname guest; ln -sf /proc/self/fd /dev/fd
exec /sbin/channel
"""

CHANNEL = """#!/bin/sh
export PATH=/usr/bin:/bin:/sbin:/usr/sbin HOME=/root PYTHONPATH=/opt/site:/opt/project
export COLOCATE_TEST_PATIENCE=6 TERM=dumb
mkdir -p /opt/project; cd /opt/project; tar x -f /dev/vdb
stty -F /dev/ttyS1 raw -echo 2>/dev/null
exec 3<>/dev/ttyS1
echo "READY" >&3
while read -r number line <&3; do sh -c "$line" >&3 2>&1 </dev/null; echo "__END__$number $?" >&3; done
"""


SYSTEMD_PACKAGES = ("systemd", "dbus", "dbus-daemon", "dbus-bin", "dbus-system-bus-common", "util-linux", "mount")
MASKED = ("logind", "journal-flush", "random-seed", "update-utmp", "firstboot", "machine-id-commit", "hwdb-update",
          "networkd", "resolved", "sysusers", "pcrphase", "pcrphase-sysinit", "repart")  # fmt: skip
SYSTEMD_UNITS = {
    "guest.service": "[Unit]\nRequires=dbus.service\nAfter=dbus.service\n"
    "[Service]\nExecStart=/sbin/channel\nStandardOutput=null\n",
    # Without PAM, which would set it, and without a login: the unit that a login starts, started by hand.
    "user@.service.d/guest.conf": "[Service]\nPAMName=\nEnvironment=XDG_RUNTIME_DIR=/run/user/%i\n",
}


def kernel_files() -> tuple[Path, Path] | None:
    """(vmlinuz, modules) of the Debian kernel that `make system-packages` unpacked; None without it."""
    images = sorted(KERNEL.glob("boot/vmlinuz-*"))
    modules = sorted([*KERNEL.glob("lib/modules/*/kernel"), *KERNEL.glob("usr/lib/modules/*/kernel")])
    return (images[-1], modules[-1]) if images and modules else None


def lacks() -> str:
    """What is missing for a guest; empty if it can be started."""
    needed = {"qemu-system-x86_64": "qemu-system-x86", "busybox": "busybox-static", "mke2fs": "e2fsprogs"}
    missing = [package for program, package in needed.items() if not which(program)]
    if platform.machine() != "x86_64":
        return "an x86-64 machine"
    if not missing and kernel_files() is None:
        missing = ["a Debian kernel image unpacked in build/guest/kernel"]
    return f"{', '.join(missing)} (make system-packages)" if missing else ""


def which(program: str) -> str | None:
    """The program, also where an ordinary user's PATH does not look."""
    return shutil.which(program) or shutil.which(program, path="/sbin:/usr/sbin")


def _cpio(directory: Path) -> bytes:
    """The directory as a newc archive (initramfs), gzipped."""
    out = bytearray()
    inode = 0

    def add(name: str, mode: int, body: bytes = b"") -> None:
        nonlocal inode
        inode += 1
        encoded = name.encode() + b"\0"
        fields = (inode, mode, 0, 0, 1, 0, len(body), 0, 0, 0, 0, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % f for f in fields)
        out.extend(header + encoded + b"\0" * (-(len(header) + len(encoded)) % 4))
        out.extend(body + b"\0" * (-len(body) % 4))

    for path in sorted(directory.rglob("*")):
        info, name = path.lstat(), str(path.relative_to(directory))
        if stat.S_ISDIR(info.st_mode):
            add(name, 0o40755)
        elif stat.S_ISLNK(info.st_mode):
            add(name, 0o120777, os.readlink(path).encode())
        else:
            add(name, 0o100000 | (info.st_mode & 0o777), path.read_bytes())
    add("TRAILER!!!", 0)
    return gzip.compress(bytes(out), 1)


def _busybox() -> Path:
    found = which("busybox")
    assert found
    return Path(found)


def _is_elf(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(4) == b"\x7fELF"


def _libraries(files: list[Path]) -> set[Path]:
    """Shared libraries that these files need, by ldd."""
    found: set[Path] = set()
    for i in range(0, len(files), 50):
        text = subprocess.run(["ldd", *files[i : i + 50]], capture_output=True, text=True, check=False).stdout
        found |= {Path(w) for line in text.splitlines() for w in line.split() if w.startswith("/") and ".so" in w}
    return {f for f in found if f.exists()}


def _copy_file(source: Path, root: Path) -> None:
    target = root / str(source).lstrip("/")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def _python(root: Path) -> None:
    """The interpreter, its standard library at the same paths, and our site-packages in /opt/site."""
    executable = Path(os.path.realpath(sys.executable))
    standard = Path(sysconfig.get_paths()["stdlib"])
    _copy_file(executable, root)
    for name in ("python3", "python"):
        link = root / "usr" / "bin" / name
        if not link.exists():
            link.symlink_to(executable)
    ignore = shutil.ignore_patterns("site-packages", "dist-packages", "test", "idlelib", "ensurepip", "__pycache__",
                                    "config-*", "tkinter", "lib2to3", "*.a")  # fmt: skip
    shutil.copytree(standard, root / str(standard).lstrip("/"), ignore=ignore, dirs_exist_ok=True, symlinks=True)
    site = root / "opt" / "site"
    skip = shutil.ignore_patterns("__pycache__", "*.pth", "*.dist-info/licenses", "tests", *LEFT_OUT,
                                  *(f"{name}-*.dist-info" for name in LEFT_OUT))  # fmt: skip
    shutil.copytree(sysconfig.get_paths()["purelib"], site, ignore=skip)
    # Emulated, compiling the imports of every process would take longer than the tests.
    for directory in (root / str(standard).lstrip("/"), site):
        subprocess.run([executable, "-m", "compileall", "-q", "-j", "2", directory], capture_output=True, check=False)
    for library in _libraries([f for f in root.rglob("*") if not f.is_symlink() and f.is_file() and _is_elf(f)]):
        if not str(library).startswith(str(root)):
            _copy_file(library, root)


def systemd_lacks() -> str:
    """What is missing for a guest with systemd as its first process; empty if it can be started."""
    if lack := lacks():
        return lack
    programs = ("/lib/systemd/systemd", "/usr/bin/dbus-daemon")
    return (
        "" if all(Path(p).exists() for p in programs) else "the Debian packages systemd and dbus (make system-packages)"
    )


def _systemd(root: Path) -> None:
    """The host's systemd and D-Bus packages, and the units that join them to the command channel."""
    listed = subprocess.run(["dpkg", "-L", *SYSTEMD_PACKAGES], capture_output=True, text=True, check=False).stdout
    for name in dict.fromkeys(listed.splitlines()):
        source, target = Path(name), root / name.lstrip("/")
        if name.startswith(("/usr/share/doc", "/usr/share/man", "/usr/share/locale")) or source.parent == Path("/"):
            continue
        if source.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                target.symlink_to(os.readlink(source))
        elif source.is_file():
            target.unlink(missing_ok=True)  # busybox's link
            _copy_file(source, root)
    units = root / "etc" / "systemd" / "system"
    for name, text in SYSTEMD_UNITS.items():
        (units / name).parent.mkdir(parents=True, exist_ok=True)
        (units / name).write_text(text)
    for name in MASKED:
        (units / f"systemd-{name}.service").symlink_to("/dev/null")
    (root / "etc" / "machine-id").write_text("0123456789abcdef0123456789abcdef\n")


def _root(root: Path) -> None:
    for directory in (
        "usr/bin",
        "usr/sbin",
        "usr/lib",
        "usr/lib64",
        "dev",
        "proc",
        "sys",
        "run",
        "tmp",
        "etc",
        "var/lib",
        "var/tmp",
        "root",
        "home/user",
        "opt",
    ):
        (root / directory).mkdir(parents=True, exist_ok=True)
    for name in ("bin", "sbin", "lib", "lib64"):  # as Debian merges them
        (root / name).symlink_to(f"usr/{name}")
    shutil.copy2(_busybox(), root / "bin" / "busybox")
    applets = subprocess.run([_busybox(), "--list"], capture_output=True, text=True, check=True).stdout.split()
    for applet in applets:
        link = root / "bin" / applet
        if applet != "busybox" and not link.exists():
            link.symlink_to("busybox")
    (root / "sbin" / "init").write_text(INIT)
    (root / "sbin" / "init").chmod(0o755)
    (root / "sbin" / "channel").write_text(CHANNEL)
    (root / "sbin" / "channel").chmod(0o755)
    users = {"root": 0, "messagebus": 101, "systemd-journal": 102, "other": 1001, "user": 1000, "nobody": 65534}
    homes = {"root": "/root", "user": "/home/user"}
    rows = [f"{name}:x:{id_}:{id_}::{homes.get(name, '/tmp')}:/bin/sh\n" for name, id_ in users.items()]
    (root / "etc" / "passwd").write_text("".join(rows))
    (root / "etc" / "group").write_text(
        "".join(f"{name}:x:{id_}:\n" for name, id_ in users.items()) + "tty:x:5:\ncolocate:x:900:user\n"
    )
    (root / "etc" / "hosts").write_text("127.0.0.1 localhost\n")
    (root / "etc" / "hostname").write_text("guest\n")


def build() -> Path:
    """The directory with kernel, initrd and root image; made anew when the lock or this file changes."""
    found = kernel_files()
    assert found is not None, lacks()
    vmlinuz, modules = found
    key = hashlib.sha256()
    for part in (
        (ROOT / "requirements.lock").read_bytes(),
        Path(__file__).read_bytes(),
        sys.version.encode(),
        str(vmlinuz).encode(),
        systemd_lacks().encode(),
        str(which("runc")).encode(),
    ):
        key.update(part)
    image = BUILD / key.hexdigest()[:16]
    if (image / "root.img").exists():
        return image
    for old in BUILD.glob("*/root.img"):
        shutil.rmtree(old.parent)
    with tempfile.TemporaryDirectory(dir=_made(BUILD), prefix="making-") as name:
        making = Path(name)
        ram = making / "ram"
        for directory in ("bin", "mod", "dev", "proc", "newroot"):
            (ram / directory).mkdir(parents=True)
        shutil.copy2(_busybox(), ram / "bin" / "busybox")
        (ram / "bin" / "sh").symlink_to("busybox")
        for i, module in enumerate(MODULES):
            if (modules / f"{module}.ko").exists():
                shutil.copy2(modules / f"{module}.ko", ram / "mod" / f"{i:02d}-{Path(module).name}.ko")
        (ram / "init").write_text(INITRAMFS_INIT)
        (ram / "init").chmod(0o755)
        root = making / "root"
        _root(root)
        if runc := which("runc"):
            _copy_file(Path(runc), root)
        if not systemd_lacks():
            _systemd(root)
        _python(root)
        result = making / "result"
        result.mkdir()
        (result / "initrd").write_bytes(_cpio(ram))
        shutil.copy2(vmlinuz, result / "vmlinuz")
        disk(result / "root.img", root, IMAGE_MIB)
        result.rename(image)
    return image


def disk(path: Path, directory: Path, mib: int) -> None:
    """An ext4 image of a directory, sparse."""
    mke2fs = which("mke2fs")
    assert mke2fs
    command = [mke2fs, "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d", str(directory)]
    subprocess.run([*command, str(path), f"{mib}M"], check=True, capture_output=True)


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory


class Guest:
    """A running guest; use as a context manager."""

    def __init__(
        self,
        *,
        cpus: int = 2,
        memory_mib: int = MEMORY_MIB,
        systemd: bool = False,
        network: bool = False,
        disk: Path | None = None,
    ) -> None:
        """`disk` is an ext4 image, in the guest on /disk; what is written to it is thrown away."""
        self._cpus, self._memory_mib, self._systemd = cpus, memory_mib, systemd
        self._network, self._disk = network, disk
        self._directory: Path
        self._number = 0
        self._qemu: subprocess.Popen[bytes] | None = None
        self._channel = socket.socket(socket.AF_UNIX)
        self._buffer = b""

    def __enter__(self) -> Guest:
        """Boot; back when commands are accepted. Raises RuntimeError with the console's end."""
        image = build()
        self._directory = Path(tempfile.mkdtemp(prefix="colocate-guest-"))
        project = self._directory / "project.tar"
        tracked = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout
        subprocess.run(
            ["tar", "c", "--null", "--ignore-failed-read", "-T", "-", "-f", project],
            cwd=ROOT,
            input=tracked,
            check=True,
        )
        with project.open("ab") as tar:
            tar.truncate((project.stat().st_size + 511) // 512 * 512)
        line = "console=ttyS0 panic=1 rdinit=/init mitigations=off random.trust_cpu=on quiet tsc=reliable psi=1"
        if self._systemd:
            line += " guest.systemd systemd.unit=guest.service systemd.show_status=0"
        self._qemu = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL",  # nobody ends it if we are killed
             "qemu-system-x86_64", "-machine", "q35", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max",
             "-smp", str(self._cpus), "-m", str(self._memory_mib), "-nographic", "-nodefaults", "-no-reboot",
             "-kernel", str(image / "vmlinuz"), "-initrd", str(image / "initrd"), "-append", line,
             "-drive", f"file={image / 'root.img'},if=virtio,format=raw,snapshot=on,cache=unsafe",
             "-drive", f"file={project},if=virtio,format=raw,readonly=on",
             "-serial", f"file:{self._directory / 'console'}",
             "-serial", f"unix:{self._directory / 'channel'},server=on,wait=on", "-monitor", "none", *self._devices()],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self._qemu.poll() is None:
            try:
                self._channel.connect(str(self._directory / "channel"))
                self._until(b"READY", deadline)
            except OSError:
                time.sleep(0.1)
            else:
                self._prepare()
                return self
        said = (
            (self._directory / "console").read_text(errors="replace") if (self._directory / "console").exists() else ""
        )
        self.__exit__()
        raise RuntimeError(f"the guest did not start: {said[-4000:]}")

    def _devices(self) -> list[str]:
        found = []
        if self._disk is not None:
            found += ["-drive", f"file={self._disk},if=virtio,format=raw,snapshot=on,cache=unsafe"]
        if self._network:
            found += ["-netdev", f"user,id=net,net={NETWORK},host={HOST}", "-device", "virtio-net-pci,netdev=net"]
        return found

    def _prepare(self) -> None:
        commands = []
        if self._disk is not None:
            commands += ["mkdir /disk", "mount -t ext4 -o noatime /dev/vdc /disk"]
        if self._network:
            commands += [f"ip addr add {ADDRESS}/24 dev eth0", "ip link set eth0 up"]
        if commands:
            code, said = self.run(" && ".join(commands))
            if code:
                raise RuntimeError(f"the guest has no disk or network: {said}")

    def __exit__(self, *_: object) -> None:
        """End the guest and remove what it used."""
        self._channel.close()
        if self._qemu is not None:
            self._qemu.kill()
            self._qemu.wait()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _until(self, mark: bytes, deadline: float, show: bool = False) -> bytes:
        while mark not in self._buffer:
            self._channel.settimeout(max(deadline - time.monotonic(), 0.01))
            chunk = self._channel.recv(1 << 16)
            if not chunk:
                raise OSError("the guest has ended")
            if show:
                sys.stdout.write(chunk.decode(errors="replace").replace("\r", ""))
                sys.stdout.flush()
            self._buffer += chunk
        before, _, self._buffer = self._buffer.partition(mark)
        return before

    def run(self, command: str, seconds: float = 120.0, *, show: bool = False) -> tuple[int, str]:
        """(exit code, output) of a shell command, shown as it comes if wanted. Raises TimeoutError."""
        assert "\n" not in command
        self._number += 1  # what a command that ran out of time still says must not answer the next one
        self._channel.sendall(f"{self._number} {command}\n".encode())
        deadline = time.monotonic() + seconds
        output = self._until(f"{END}{self._number} ".encode(), deadline, show)
        code = self._until(b"\n", deadline).strip()
        return int(code), output.decode(errors="replace").replace("\r", "")


def main(arguments: list[str]) -> int:
    """Run one command in a fresh guest; `--systemd` before it boots systemd there."""
    systemd = arguments[:1] == ["--systemd"]
    if lack := systemd_lacks() if systemd else lacks():
        print(f"a guest lacks {lack}", file=sys.stderr)
        return 2
    with Guest(systemd=systemd) as guest:
        return guest.run(" ".join(arguments[systemd:]), 1800, show=True)[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
