"""Tables that other people have published, worked out anew by our engine: whoever reproduces them may be believed.

Each table is a module with `SOURCE` and `cells(folder, say)`, the published value beside ours in each cell.
"""

from __future__ import annotations

import importlib.util
import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from colocate.errors import BadInput

TABLES = {
    "rlscheduler": ("rlscheduler", 20),
    "pollux-tiresias": ("pollux", 32),
    "pollux-optimus": ("pollux", 32),
    "openb-fgd": ("openb", 102),
    "muri": ("muri", 5),
    "helios": ("helios", 6),
    "sia": ("sia", 12),
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


def needs(table: str, library: str) -> None:
    """Raises BadInput where a library of the extra `sim` is not installed."""
    if importlib.util.find_spec(library) is None:
        raise BadInput(f"{table} needs {library}: pip install 'colocate[sim]'")


def in_order(published: Mapping[str, float], ours: Mapping[str, float]) -> list[Cell]:
    """Of neighbours in a published order, least first, the ratio of the better to the next; passed where that is so."""
    names, found = sorted(published, key=published.__getitem__), []
    for better, worse in itertools.pairwise(names):
        theirs, here = published[better] / published[worse], ours[better] / ours[worse]
        seconds = [f"{of[better]:,.0f} and {of[worse]:,.0f} s" for of in (ours, published)]
        detail = f"{seconds[0]}; published {seconds[1]}"
        found.append(Cell(f"{better} before {worse}", theirs, here, here < 1.0, detail))
    return found


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
