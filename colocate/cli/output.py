"""Printing: tables for people, JSON and YAML for programs; colours and progress only on a terminal."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from colocate.errors import BadInput

DATA_FORMS = ("json", "yaml")
"""Forms of -o for programs; the others are tables for people."""


def print_data(data: Any, form: str) -> None:
    """Print plain data as `json` or `yaml`."""
    if form == "yaml":
        import yaml

        sys.stdout.write(yaml.safe_dump(msgspec.to_builtins(data), sort_keys=False, allow_unicode=True))
    else:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(data), indent=2).decode() + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """A table: drawn on a terminal, plain aligned columns in a pipe."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title or None, title_justify="left")
        for i, column in enumerate(columns):
            table.add_column(column, overflow="fold", no_wrap=i == 0)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    if title:
        print(title)
    widths = [max(len(str(r[i])) for r in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, *rows]:
        print("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def check_file(option: str, given: str, inputs: Iterable[str | Path] = ()) -> Path:
    """The path of a file that will be written at the end of long work. Raises BadInput now if it could not be, or is an
    input of that work."""
    path = Path(given)
    if path.resolve() in [Path(file).resolve() for file in inputs]:
        raise BadInput(f"{option}: {path} is one of the files that are read, and would be overwritten")
    if not path.parent.is_dir():
        raise BadInput(f"{option}: the directory {path.parent} does not exist")
    if path.is_dir():
        raise BadInput(f"{option}: {path} is a directory; name a file in it")
    try:
        with tempfile.TemporaryFile(dir=path.parent):  # root may write everywhere, and yet not in /proc
            allowed = not path.exists() or os.access(path, os.W_OK)
    except OSError:
        allowed = False
    if not allowed:
        raise BadInput(f"{option}: {path} cannot be written")
    return path


def status(text: str) -> None:
    """A line of progress on stderr, only for a person."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def end_status() -> None:
    """Clear the line of progress."""
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")
