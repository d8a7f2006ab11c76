"""What a batch job has done, and what of it is lost when it dies: all since its last checkpoint."""

from __future__ import annotations

from pathlib import Path

from colocate.calibrate.probe import WorkCounter


class Progress:
    """What a job has done, and what of it is saved, as the job itself counts them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done, self.saved = WorkCounter(path), WorkCounter(f"{path}.saved")
        self.lost = WorkCounter(f"{path}.lost")
        """By all who died so far."""
        self.starts = WorkCounter(f"{path}.starts")
        """How often it began, as the job itself counts."""

    def reset(self) -> None:
        """A job that starts from nothing."""
        self.done.done = self.saved.done = self.lost.done = self.starts.done = 0
        self.checkpoint.unlink(missing_ok=True)

    @property
    def checkpoint(self) -> Path:
        """Where the job writes its state."""
        return Path(f"{self.path}.npz")

    def died(self) -> int:
        """Account for a death, whoever notices it first, its successor or its keeper; the work lost by it."""
        lost = max(self.done.done - self.saved.done, 0)
        self.lost.done += lost
        self.done.done = self.saved.done
        return lost
