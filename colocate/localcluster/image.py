"""Which image of colocate the local cluster runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from colocate.errors import BadInput, HostUnfit
from colocate.localcluster.controlplane import MANIFESTS

ROOT = MANIFESTS.parent
SOURCES = ("colocate", "podgroup", "tools/image.py", "pyproject.toml", "requirements.lock")


def _changed_seconds() -> float:
    files = [f for source in SOURCES for f in ((ROOT / source).rglob("*.py"), [ROOT / source])]
    return max(file.stat().st_mtime for some in files for file in some)


def fresh_image(given: str | None = None) -> Path:
    """The archive that was given, or what `make image` makes of this clone: made if it is older than the sources.

    Raises BadInput, HostUnfit.
    """
    if given:
        if not Path(given).is_file():
            raise BadInput(f"--image: {given} is no file; give an archive that `make image` made")
        return Path(given)
    if not (ROOT / "tools" / "image.py").exists():
        raise BadInput("--image: outside of a clone of colocate, give an archive that `make image` made in one")
    path = ROOT / "build" / "image" / "colocate.tar"
    if not path.exists() or path.stat().st_mtime < _changed_seconds():
        made = subprocess.run(
            [sys.executable, "-m", "tools.image", str(path)], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if made.returncode:
            raise HostUnfit("the image could not be made", made.stderr.strip()[-2000:])
    return path
