"""colocate reproduce: other people's tables, worked out by our engine."""

from __future__ import annotations

import argparse

from colocate.cli.output import DATA_FORMS, end_status, print_data, print_table, status
from colocate.errors import BadInput
from colocate.simulate.reproduce import TABLES, Table, reproduce
from colocate.simulate.traces import folder


def reproduce_command(options: argparse.Namespace) -> int:
    """Exit 1 where a cell is not as it was published. Raises BadInput."""
    unknown = [name for name in options.tables if name not in TABLES]
    if unknown:
        raise BadInput(f"{unknown[0]!r} is no table; known: {', '.join(TABLES)}")
    where, found = folder(options.traces), list[Table]()
    for name in options.tables or TABLES:
        table = reproduce(name, where, status)
        end_status()
        if options.output not in DATA_FORMS:
            _print(table, every=options.cells)
        found.append(table)
    if options.output in DATA_FORMS:
        print_data([_data(table) for table in found], options.output)
    return int(any(table.passed < len(table.cells) for table in found))


def _print(table: Table, *, every: bool) -> None:
    good = "pass" if table.passed == len(table.cells) else "FAIL"
    print(f"{good}  {table.name}: {table.passed} of {len(table.cells)} cells, in {table.seconds:.1f} s")
    print(f"      {table.source}; {table.tolerance}")
    shown = [c for c in table.cells if every or not c.passed]
    if shown:
        rows = [
            (c.name, f"{c.published:.2f}", f"{c.ours:.2f}", "pass" if c.passed else "FAIL", c.detail) for c in shown
        ]
        print_table(("cell", "published", "ours", "", ""), rows)


def _data(table: Table) -> dict[str, object]:
    return {
        "table": table.name,
        "source": table.source,
        "tolerance": table.tolerance,
        "cells": len(table.cells),
        "passed": table.passed,
        "seconds": round(table.seconds, 3),
        "values": [
            {"cell": c.name, "published": round(c.published, 6), "ours": round(c.ours, 6), "passed": c.passed}
            for c in table.cells
        ],
    }
