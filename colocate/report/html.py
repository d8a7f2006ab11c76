"""One self-contained page: no script, no font, nothing from outside; light and dark, printable, charts with data."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape


def render(template: str, **context: Any) -> str:
    """The page of a template."""
    environment = Environment(
        loader=PackageLoader("colocate.report"), autoescape=select_autoescape(), undefined=StrictUndefined
    )
    environment.filters["datauri"] = lambda text: "data:text/csv;base64," + base64.b64encode(text.encode()).decode()
    return environment.get_template(template).render(**context)


def write(page: str, path: Path) -> None:
    """Put the page in place whole."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(page)
    part.replace(path)
