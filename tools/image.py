"""The container image, made of Debian packages and the locked wheels: without a registry or a daemon.

    python -m tools.image [FILE]        an OCI image archive, for `ctr images import`, `skopeo copy`, `podman load`

mmdebstrap unpacks the packages and pip the wheels of requirements.lock that colocate itself needs, by their hashes;
times are clamped to the last commit's, so that the same commit and packages give the same bytes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from colocate import __version__
from colocate.errors import BadInput, HostUnfit
from colocate.localcluster.archive import write_archive

ROOT = Path(__file__).resolve().parent.parent
NAME = f"docker.io/library/colocate:{__version__}"
"""What `colocate:VERSION` of the manifests stands for."""
TARGET = ROOT / "build" / "image" / "colocate.tar"
PACKAGES = ("python3-minimal", "python3", "libpython3-stdlib", "libstdc++6", "base-files", "netbase", "tzdata")
SITE, PROGRAM = "/opt/colocate", "/usr/bin/colocate"
START = "#!/usr/bin/python3 -P\nimport sys\nfrom colocate.cli.main import main\nsys.exit(main())\n"
LEFT_OUT = (
    *(f"usr/share/{unread}" for unread in ("doc", "man", "locale", "info", "lintian", "perl5", "bash-completion")),
    *("usr/lib/*/gconv", "usr/lib/*/perl*", "var/cache", "var/lib/dpkg/info"),
    *(f"opt/colocate/numpy/_core/{of_compilers}" for of_compilers in ("include", "lib")),
)


def main(arguments: list[str]) -> int:
    """Make it; say where it is and how large."""
    path = Path(arguments[0]) if arguments else TARGET
    build(path)
    print(f"{NAME}: {path} ({path.stat().st_size / 1e6:.0f} MB)")
    return 0


def _epoch() -> str:
    """When the last commit was made, in seconds; 0 outside of a clone."""
    command = ["git", "log", "-1", "--format=%ct"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip() or "0"


def lacks() -> str:
    """What is missing for it here; empty if nothing."""
    missing = [program for program in ("mmdebstrap", "zstd") if shutil.which(program) is None]
    return f"{', '.join(missing)} (make system-packages)" if missing else ""


def build(path: Path) -> None:
    """The archive. Raises HostUnfit."""
    if lacks():
        raise HostUnfit(f"no image without {lacks()}", "make system-packages")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="colocate-image-") as scratch:
        root = Path(scratch)
        layer = root / "layer.tar"
        by_hash = "-q --invalidation-mode unchecked-hash"  # times are no part of it
        compiled = f'{sys.executable} -m compileall {by_hash} -s "$1" "$1"{SITE} "$1"/usr/lib/python3*'
        hooks = [f'{sys.executable} -P -m tools.image --wheels "$1"', compiled]
        hooks += [f'rm -rf "$1"/{folder}' for folder in LEFT_OUT]
        command = ["mmdebstrap", "--quiet", "--variant=extract", f"--include={','.join(PACKAGES)}"]
        command += [f"--extract-hook={hook}" for hook in hooks]
        environment = {"SOURCE_DATE_EPOCH": _epoch(), **os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [*command, _suite(), str(layer)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise HostUnfit(f"mmdebstrap ended with code {done.returncode}", done.stderr[-2000:])
        config = {
            "User": "65534",
            "Env": [f"PYTHONPATH={SITE}", "PATH=/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE=1", "HOME=/tmp"],
            "Entrypoint": [PROGRAM],
            "WorkingDir": "/",
            "Labels": {
                "org.opencontainers.image.version": __version__,
                "org.opencontainers.image.licenses": "Apache-2.0",
            },
        }
        write_archive(path, NAME, layer.read_bytes(), config)


def _suite() -> str:
    """This machine's release: its packages come from the distribution's own mirror."""
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    return release.get("VERSION_CODENAME", "stable").strip('"')


def wheels(folder: Path) -> None:
    """colocate and what it needs, as the lock has it, into a root file system; for the Python that is in there."""
    versions = sorted(folder.glob("usr/lib/python3.*"))
    if not versions:
        raise HostUnfit(f"there is no Python in {folder}", f"packages: {', '.join(PACKAGES)}")
    version, here = versions[-1].name, f"python{sys.version_info.major}.{sys.version_info.minor}"
    if version != here:
        raise HostUnfit(f"the image has {version}, this is {here}", f"make clean, then make PYTHON={version} image")
    site = folder / SITE.lstrip("/")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    into = ["install", "--target", str(site), "--no-deps", "--no-compile"]
    with tempfile.TemporaryDirectory() as scratch:
        lock = Path(scratch) / "requirements.txt"
        lock.write_text(needed((ROOT / "requirements.lock").read_text()))
        subprocess.run([*pip, *into, "--require-hashes", "-r", str(lock)], check=True)
        subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", scratch, str(ROOT)], check=True)
        ours = next(Path(scratch).glob("colocate-*.whl"))
        shutil.unpack_archive(ours, site, "zip")  # pip would write down where it was
    program = folder / PROGRAM.lstrip("/")
    program.write_text(START)
    program.chmod(0o755)
    for unused in [*site.rglob("tests"), *site.rglob("__pycache__"), site / "bin"]:
        shutil.rmtree(unused, ignore_errors=True)


def needed(lock: str) -> str:
    """The entries of a lock that the installed colocate needs at run time, directly or not."""
    wanted, waiting = set[str](), ["colocate"]
    while waiting:
        name = waiting.pop()
        for requirement in metadata.requires(name) or ():
            marker = requirement.partition(";")[2]
            found = re.match(r"[A-Za-z0-9._-]+", requirement)
            assert found is not None
            other = re.sub(r"[-_.]+", "-", found[0]).lower()
            if "extra ==" in marker or other in wanted or not _installed(other):
                continue
            wanted.add(other)
            waiting.append(other)
    entries = re.split(r"\n(?=\S)", lock)
    return "\n".join(e for e in entries if re.split(r"==| ", e)[0].lower() in wanted) + "\n"


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:  # for another platform or version of Python
        return False
    return True


if __name__ == "__main__":
    if sys.argv[1:2] == ["--wheels"]:  # called by mmdebstrap, in its user namespace
        wheels(Path(sys.argv[2]))
        sys.exit(0)
    try:
        sys.exit(main(sys.argv[1:]))
    except (HostUnfit, BadInput) as error:
        print(f"image: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
