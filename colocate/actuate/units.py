"""What systemd is told of the slices that batch pods are put into, where it makes the cgroups of containers.

A container's scope in `kubepods-batch-pod<uid>.slice` makes systemd start that slice, and `kubepods-batch.slice`
above it, with settings of its own: weight 100, a hundred times BestEffort's. Nor do they end: kubelet stops the slices
that it made, and systemd keeps a slice that nobody stops, and its cgroup. Drop-ins say both, from where systemd looks
when it meets a unit: in a directory of the unit's name, or of a prefix of it that ends in a dash (systemd.unit(5)).
They need no reload, are gone with the next boot, and go on when the agent has ended, so that the last pod takes the
tier along.
"""

from __future__ import annotations

import os
from pathlib import Path

import structlog

from colocate.cgroup.layout import HOST_CGROUP

HOST_UNITS = "COLOCATE_HOST_UNITS"
"""In a container: where those directories of the host's /run/systemd/system are mounted that are named after slices."""
UNITS = Path("/run/systemd/system")
NAME = "50-colocate.conf"
ENDS = "[Unit]\nStopWhenUnneeded=yes\n"
WEIGHS = "[Slice]\nCPUWeight=1\nIOWeight=1\n"
log = structlog.get_logger()


def units_folder() -> Path | None:
    """Where drop-ins go; None where no systemd is, or none is reached from this container."""
    named = os.environ.get(HOST_UNITS, "")
    if HOST_CGROUP in os.environ and not named:
        return None
    folder = Path(named) if named else UNITS
    return folder if folder.is_dir() else None


def tell_systemd(folder: Path, tier: str) -> bool:
    """Have the slice of the tier, named so, at the least weight, and end with the last of its pods' slices.

    False where that cannot be said: in a container, only directories that are mounted reach systemd.
    """
    base = tier.removesuffix(".slice")
    said = {f"{tier}.d": ENDS + WEIGHS, f"{base}-.slice.d": ENDS}
    for name, text in said.items():
        file = folder / name / NAME
        try:
            if file.exists() and file.read_text() == text:
                continue
            if HOST_CGROUP not in os.environ:
                file.parent.mkdir(exist_ok=True)
            made = file.with_suffix(".new")
            made.write_text(text)
            made.replace(file)
        except OSError as error:
            log.warning("systemd_not_told", unit=name.removesuffix(".d"), error=str(error))
            return False
    return True
