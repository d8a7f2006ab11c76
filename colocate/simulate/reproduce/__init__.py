"""Tables that other people have published, worked out anew by our engine: whoever reproduces them may be believed.

Each table is a module with `SOURCE` and `cells(folder, say)`, the published value beside ours in each cell.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from colocate.errors import BadInput

TABLES = {
    "rlscheduler": ("rlscheduler", 20),
    "pollux-tiresias": ("pollux", 32),
    "pollux-optimus": ("pollux", 32),
    "openb-fgd": ("openb", 102),
}
"""By name, the module, and how many cells were published."""


class Cell(NamedTuple):
    """One number of a table."""

    name: str
    published: float
    ours: float
    passed: bool
    detail: str = ""


class Table(NamedTuple):
    """A table as it came out."""

    name: str
    source: str
    tolerance: str
    cells: tuple[Cell, ...]
    seconds: float

    @property
    def passed(self) -> int:
        """How many cells are as they were published."""
        return sum(cell.passed for cell in self.cells)


def reproduce(name: str, folder: Path, say: Callable[[str], None]) -> Table:
    """Work a table out, from the traces in a folder. Raises BadInput, KeyError of a table that is not known."""
    source, published = TABLES[name]
    module = importlib.import_module(f"{__name__}.{source}")
    began = time.perf_counter()
    found: Iterable[Cell] = module.cells(name, folder, lambda text: say(f"{name}: {text}"))
    cells = tuple(found)
    if len(cells) != published:
        raise BadInput(f"{name}: its inputs in {folder} make {len(cells)} cells, and {published} were published")
    return Table(name, module.SOURCE, module.TOLERANCE[name], cells, time.perf_counter() - began)
