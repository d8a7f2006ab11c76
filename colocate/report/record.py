"""Records: the whole input of model and decide, and what came of it, as JSON lines that can be replayed and queried.

A keyframe carries everything (snapshot, model state, law state, policy, versions, kernel backend); the lines between
carry the snapshot and the plan as JSON merge patches (RFC 7396) against the line before. Each line has a flat `series`
for SQL. Segments are rotated, compressed and capped in total. A full disk degrades to memory and stops nothing.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import os
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from colocate import __version__
from colocate.calibration import Calibration
from colocate.decide.pipeline import LawState, laws_to_builtins
from colocate.errors import BadInput, StateTooNew, StateTooOld
from colocate.model.forecast import Forecast, ModelState
from colocate.model.state import to_builtins
from colocate.plan import Outcome, Plan
from colocate.policy.schema import ColocationPolicy, RecordPolicy
from colocate.snapshot import Card, NodeSnapshot

RECORD_VERSION = 2
MEMORY_LINES = 600
MOST_PENDING = 120
"""Lines that may wait for a slow disk."""
PREFIX = "records-"
NOTED_RATIO = 0.02
"""A service without an SLO is in the series while it waits or stalls more than this."""
_EVERY_LINE = {"time", "sequence", "snapshot", "plan", "series"}


def merge_patch(old: Any, new: Any) -> Any:
    """The JSON merge patch that turns `old` into `new`; {} if they are equal. Neither may contain null."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    patch: dict[str, Any] = {key: None for key in old if key not in new}
    for key, value in new.items():
        if key not in old:
            patch[key] = value
        elif old[key] != value:
            patch[key] = merge_patch(old[key], value)
    return patch


def apply_patch(old: Any, patch: Any) -> Any:
    """RFC 7396: what `old` becomes."""
    if not isinstance(patch, dict):
        return patch
    result = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = apply_patch(result.get(key), value)
    return result


def plan_builtins(plan: Plan) -> dict[str, Any]:
    """A plan as a dictionary whose parts are keyed, so that a patch of it is small."""
    data: dict[str, Any] = {
        "sequence": plan.sequence,
        "verdicts": {f"{v.law} {v.subject}" if v.subject else v.law: msgspec.to_builtins(v) for v in plan.verdicts},
    }
    if plan.pulses:
        data["pulses"] = msgspec.to_builtins(plan.pulses)
    if plan.actions:
        data["actions"] = msgspec.to_builtins(plan.actions)
    if plan.rejected:
        data["rejected"] = msgspec.to_builtins(plan.rejected)
    return data


def series(snapshot: NodeSnapshot, forecast: Forecast) -> dict[str, Any]:
    """The flat figures of one tick, for SQL."""
    services = {}
    for workload in snapshot.of("service"):
        now = forecast.workloads[workload.id]
        figures = {
            "cores": now.usage_cores,
            "p99": now.p99_seconds,
            "requests": now.new_requests or None,
            "slack": now.slack,
            "waiting": now.cpu_pressure_ratio or None,  # of every tick alike, looked at closely or not
            "stall": now.memory_pressure_ratio or None,
        }
        suffers = (now.cpu_pressure_ratio or 0.0) >= NOTED_RATIO or (now.memory_pressure_ratio or 0.0) >= NOTED_RATIO
        if workload.objective is not None or suffers:
            services[workload.name] = {k: v for k, v in figures.items() if v is not None}
    jobs = {w.name: forecast.workloads[w.id].usage_cores or 0.0 for w in snapshot.of("batch")}
    row: dict[str, Any] = {
        "dt": forecast.interval_seconds,
        "cores": forecast.node_cores,
        "services": forecast.services_cores,
        "services_peak": forecast.services_peak_cores,
        "besteffort": forecast.besteffort_cores,
        "batch": forecast.batch_cores,
        "system": forecast.system_cores,
        "frozen": sum(w.frozen for w in snapshot.of("batch")),
    }
    if forecast.idle_cores is not None:
        row["idle"] = forecast.idle_cores
    if services:
        row["service"] = services
    if jobs:
        row["job"] = jobs
    if snapshot.cards:
        row["gpu"] = {uuid: _of_card(snapshot, card) for uuid, card in snapshot.cards.items()}
    return row


def _of_card(snapshot: NodeSnapshot, card: Card) -> dict[str, float]:
    """Shares of the card's time: in which anything ran, kernels of services, and of batch; those that were told. And
    the watts that it drew."""
    found = {"busy": card.percent / 100} if card.percent is not None else {}
    if card.watts is not None and not card.problem:
        found["watts"] = card.watts
    for id_, user in card.users.items():
        workload = snapshot.workloads.get(id_)
        if workload is not None and user.percent is not None:
            kind = "batch" if workload.tier == "batch" else "services"
            found[kind] = round(found.get(kind, 0.0) + user.percent / 100, 4)
    return found


class Before(NamedTuple):
    """What a tick was decided from, beside its snapshot, and under."""

    model: ModelState
    laws: LawState
    policy: ColocationPolicy
    calibration: Calibration
    arm: str = ""
    window: int = 0


class _Disk:
    """The segments of one directory. Its methods may block: they are called from one thread at a time."""

    def __init__(self, directory: Path, policy: RecordPolicy) -> None:
        self._directory, self._policy = directory, policy
        self._file: Any = None
        self.size = 0

    @property
    def full(self) -> bool:
        """Whether the next line begins a segment."""
        return self._file is None or self.size > self._policy.segment_bytes

    def _segments(self) -> list[Path]:
        return sorted(self._directory.glob(f"{PREFIX}*"))

    def _rotate(self, time_seconds: float) -> None:
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o750)
        if self._file is not None:
            finished = Path(self._file.name)
            self._file.close()
            self._file = None
            packed = finished.with_suffix(".jsonl.gz")
            part = finished.with_suffix(".part")
            with finished.open("rb") as source, gzip.open(part, "wb", compresslevel=4) as target:
                target.write(source.read())
            part.replace(packed)
            finished.unlink()
        total, newest = 0, -1
        for segment in reversed(self._segments()):
            digits = segment.name.removeprefix(PREFIX).partition(".")[0]
            newest = max(newest, int(digits) if digits.isdigit() else -1)
            total += segment.stat().st_size
            if total > self._policy.max_bytes - self._policy.segment_bytes:
                segment.unlink(missing_ok=True)
        # Names sort in the order of writing, also after the clock was set back.
        number = max(int(time_seconds * 1000), newest + 1)
        self._file = open(self._directory / f"{PREFIX}{number:015d}.jsonl", "ab", buffering=0)  # noqa: SIM115
        self.size = 0

    def write(self, encoded: bytes, time_seconds: float, *, rotate: bool) -> str:
        """Append a line; why it could not be, or empty."""
        try:
            if rotate:
                self._rotate(time_seconds)
            elif self._file is None:
                raise OSError(errno.ENOENT, "the segment that it belongs to was not begun")
            elif os.fstat(self._file.fileno()).st_nlink == 0 or not Path(self._file.name).exists():
                self.close()  # somebody took the file away: what is written into it nobody reads
                raise OSError(errno.ENOENT, "the file is gone; another is begun")
            written = os.write(self._file.fileno(), encoded)
            if written != len(encoded):
                raise OSError(errno.ENOSPC, "No space left on device")
            self.size += written
        except OSError as error:
            with contextlib.suppress(OSError):
                self.close()
            return str(error.strerror)
        return ""

    def close(self) -> None:
        """Close the segment."""
        if self._file is not None:
            self._file.close()
            self._file = None


class Recorder:
    """Writes the records of one agent: lines are made here, and written by a thread where `threaded`."""

    def __init__(self, directory: Path | None, policy: RecordPolicy, backend: str, *, threaded: bool = False) -> None:
        self._policy, self.backend = policy, backend
        self._disk = _Disk(directory, policy) if directory is not None else None
        self._thread = ThreadPoolExecutor(1, "colocate-records") if threaded and directory is not None else None
        self._pending: deque[Future[str]] = deque()
        self._since_keyframe: int | None = None
        self._under: tuple[ColocationPolicy, Calibration, str] | None = None
        """What the last tick was decided under: another needs a keyframe, or replay would go on with the old one."""
        self._snapshot: dict[str, Any] = {}
        self._plan: dict[str, Any] = {}
        self.recent: deque[bytes] = deque(maxlen=MEMORY_LINES)
        self.degraded = ""
        self.lost_lines = 0
        self.arm = ""
        self.window = 0
        """Set by `evaluate`: which arm and which window of a switchback this tick belongs to."""

    def _frame(self, before: Before) -> dict[str, Any]:
        return {
            "version": RECORD_VERSION,
            "colocate": __version__,
            "backend": self.backend,
            "model": to_builtins(before.model),
            "laws": laws_to_builtins(before.laws),
            "policy": msgspec.to_builtins(before.policy),
            "calibration": msgspec.to_builtins(before.calibration),
        }

    def write(
        self, snapshot: NodeSnapshot, forecast: Forecast, plan: Plan, outcomes: list[Outcome], before: Before
    ) -> None:
        """Record one tick. Never raises for a disk that is full or gone, and waits for none that is slow."""
        self._look_at_pending()
        row, actions = msgspec.to_builtins(snapshot), plan_builtins(plan)
        rotate = self._disk is not None and self._disk.full and not self._pending
        under = (before.policy, before.calibration, self.backend)
        changed = self._under is None or any(was is not now for was, now in zip(self._under, under, strict=True))
        self._under = under
        key = changed or rotate or self._since_keyframe is None or self._since_keyframe >= self._policy.keyframe_every
        line: dict[str, Any] = {"time": snapshot.time_seconds, "sequence": snapshot.sequence}
        if before.arm:
            line["arm"], line["window"] = before.arm, before.window
        if key:
            line["keyframe"] = self._frame(before)
            line["snapshot"], line["plan"] = row, actions
            self._since_keyframe = 0
        else:
            line["snapshot"], line["plan"] = merge_patch(self._snapshot, row), merge_patch(self._plan, actions)
            self._since_keyframe = (self._since_keyframe or 0) + 1
        self._snapshot, self._plan = row, actions
        if outcomes:
            line["outcomes"] = msgspec.to_builtins(outcomes)
        line["series"] = series(snapshot, forecast)
        encoded = msgspec.json.encode(line) + b"\n"
        self.recent.append(encoded)
        if self._disk is not None:
            self._hand_over(encoded, snapshot.time_seconds, rotate=rotate)

    def _hand_over(self, encoded: bytes, time_seconds: float, *, rotate: bool) -> None:
        assert self._disk is not None
        if self._thread is None:
            self._note(self._disk.write(encoded, time_seconds, rotate=rotate))
        elif len(self._pending) >= MOST_PENDING:
            self._note("the disk does not keep up")
        else:
            self._pending.append(self._thread.submit(self._disk.write, encoded, time_seconds, rotate=rotate))

    def _look_at_pending(self) -> None:
        while self._pending and self._pending[0].done():
            done = self._pending.popleft()
            error = done.exception()
            self._note(done.result() if error is None else f"{type(error).__name__}: {error}")

    def _note(self, failed: str) -> None:
        if failed:
            self.degraded = f"records are kept in memory only: {failed}"
            self.lost_lines += 1
            self._since_keyframe = None  # a gap: the next line that fits must stand alone
        else:
            self.degraded = ""

    def close(self) -> None:
        """Write what is pending and close the segment."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._look_at_pending()
        if self._disk is not None:
            self._disk.close()


def segments(path: Path) -> list[Path]:
    """The record files of a directory (or the file itself), in time order. Raises BadInput."""
    try:
        if path.is_file():
            return [path]
    except OSError as error:
        raise BadInput(f"{str(path)[:60]}... is no path: {error.strerror}") from error
    found = sorted(path.glob(f"{PREFIX}*.jsonl*")) or sorted((path / "records").glob(f"{PREFIX}*.jsonl*"))
    if not found:
        raise BadInput(f"no records in {path}: give a state directory of an agent, its records/, or a .jsonl file")
    return found


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a record file up to the first that is none: a torn one, or a compressed file that was cut off."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        try:
            for line in file:
                if not line.endswith(b"\n"):
                    return
                record = msgspec.json.decode(line, type=dict[str, Any])
                if not record.keys() >= _EVERY_LINE:
                    return
                yield record
        except (msgspec.MsgspecError, EOFError, OSError, zlib.error):
            return


def read_full(path: Path) -> Iterator[dict[str, Any]]:
    """The lines with `snapshot` and `plan` made whole again, from the first keyframe on. Raises StateTooNew."""
    snapshot: dict[str, Any] | None = None
    plan: dict[str, Any] = {}
    for segment in segments(path):
        for line in read_lines(segment):
            frame = line.get("keyframe")
            if frame is not None:
                if frame["version"] != RECORD_VERSION:
                    error = StateTooNew if frame["version"] > RECORD_VERSION else StateTooOld
                    raise error(
                        f"{segment} has record version {frame['version']}, this colocate reads {RECORD_VERSION}: use "
                        f"colocate {frame['colocate']}"
                    )
                snapshot, plan = line["snapshot"], line["plan"]
            elif snapshot is None:
                continue
            else:
                snapshot, plan = apply_patch(snapshot, line["snapshot"]), apply_patch(plan, line["plan"])
            yield {**line, "snapshot": snapshot, "plan": plan}
