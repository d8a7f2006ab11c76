"""The model's memory as JSON: sparse, versioned, exact to the bit (floats in their shortest round-trip form)."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from colocate.errors import StateTooNew, StateTooOld
from colocate.model.forecast import COUNTERS, MODEL_VERSION, SLOTS, TOTALS, ModelState, NodeBefore
from colocate.model.histogram import CPU_BOUNDS_CORES, MEMORY_BOUNDS_BYTES
from colocate.model.needs import Needs
from colocate.model.reference import Floats
from colocate.snapshot import Latency

OLDEST_READABLE = 2
"""The oldest model version that can still be read: since then columns were only added."""


def _sparse(array: Floats) -> list[list[list[float]]]:
    """Per row the [column, value] pairs that are neither 0 nor NaN."""
    rows = []
    for row in array:
        columns = np.flatnonzero((row != 0.0) & ~np.isnan(row))
        rows.append([[int(c), float(row[c])] for c in columns])
    return rows


def _dense(rows: list[list[list[float]]], width: int, fill: float) -> Floats:
    result = np.full((len(rows), width), fill)
    for i, row in enumerate(rows):
        for column, value in row:
            result[i, int(column)] = value
    return result


def _wide(rows: list[list[float | None]], width: int, fill: float) -> Floats:
    """Rows of numbers; columns that an older version did not have are filled."""
    result = np.full((len(rows), width), fill)
    for i, row in enumerate(rows):
        result[i, : len(row)] = [np.nan if v is None else v for v in row]
    return result


def _vector(array: Floats) -> list[float | None]:
    return [None if np.isnan(v) else float(v) for v in array]


def _needs_to_builtins(needs: Needs) -> dict[str, Any]:
    return {
        name: [_vector(row) for row in value] if isinstance(value, np.ndarray) else value
        for name, value in msgspec.structs.asdict(needs).items()
    }


def _needs_from_builtins(data: dict[str, Any]) -> Needs:
    """An older version remembered none."""
    known: dict[str, Any] = dict(data)
    for name in ("now", "largest"):
        known[name] = tuple(data.get(name, ()))
    for name in ("ended", "bases", "bounds", "residuals", "offset"):
        if name in data:
            known[name] = _wide(data[name], 2, np.nan)
    return Needs(**known)


def to_builtins(state: ModelState) -> dict[str, Any]:
    """Plain lists and dictionaries for a keyframe or the state file."""
    return {
        "version": MODEL_VERSION,
        "ids": list(state.ids),
        "inodes": list(state.inodes),
        "counters": [_vector(row) for row in state.counters],
        "at_seconds": _vector(state.at_seconds),
        "totals": state.totals.tolist(),
        "cpu_weights": _sparse(state.cpu_weights),
        "memory_weights": _sparse(state.memory_weights),
        "season_cores": _sparse(state.season_cores),
        "smooth_cores": _vector(state.smooth_cores),
        "slot": state.slot,
        "node": msgspec.to_builtins(state.node),
        "windows": msgspec.to_builtins(state.windows),
        "needs": _needs_to_builtins(state.needs),
        "snapshot_seconds": state.snapshot_seconds,
    }


def from_builtins(data: dict[str, Any], source: str) -> ModelState:
    """The state again. Raises StateTooNew naming `source` if a newer version wrote it, StateTooOld for an older one."""
    if data["version"] > MODEL_VERSION:
        raise StateTooNew(
            f"{source} has model version {data['version']}, this colocate knows up to {MODEL_VERSION}: "
            "install the newer version again, or give another --state-dir"
        )
    if data["version"] < OLDEST_READABLE:
        raise StateTooOld(f"{source} has model version {data['version']}, this colocate reads version {MODEL_VERSION}")

    def vector(values: list[float | None]) -> Floats:
        return np.array([np.nan if v is None else v for v in values], dtype=np.float64)

    return ModelState(
        ids=tuple(data["ids"]),
        inodes=tuple(data["inodes"]),
        counters=_wide(data["counters"], len(COUNTERS), np.nan),
        at_seconds=vector(data["at_seconds"]),
        totals=_wide(data["totals"], len(TOTALS), 0.0),
        cpu_weights=_dense(data["cpu_weights"], CPU_BOUNDS_CORES.size, 0.0),
        memory_weights=_dense(data["memory_weights"], MEMORY_BOUNDS_BYTES.size, 0.0),
        season_cores=_dense(data["season_cores"], SLOTS, np.nan),
        smooth_cores=vector(data["smooth_cores"]),
        slot=data["slot"],
        node=msgspec.convert(data["node"], NodeBefore | None),
        windows=msgspec.convert(data["windows"], dict[str, tuple[Latency, ...]]),
        needs=_needs_from_builtins(data.get("needs", {})),
        snapshot_seconds=data["snapshot_seconds"],
    )


def without_times(state: ModelState) -> ModelState:
    """What was learnt of the workloads, without the counters and times of another boot or process."""
    return msgspec.structs.replace(
        state,
        inodes=(0,) * len(state.ids),
        counters=np.full_like(state.counters, np.nan),
        at_seconds=np.full_like(state.at_seconds, np.nan),
        node=None,
        windows={},
        snapshot_seconds=None,
    )
