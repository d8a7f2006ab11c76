"""The report pages in a real Chromium: they render, without console errors, readable wide and narrow."""

import html
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from colocate.demo.page import write_page
from colocate.demo.simulated import simulate
from colocate.report.evaluate import evaluate
from colocate.report.page import write_report
from tests.unit.test_records import live

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--virtual-time-budget=2000",
]
# The page sits in a frame of the wanted width, because a headless window is never narrower than 500 px.
FRAME = """<html><body style="margin:0">
<iframe id="f" width="{width}" height="1500" style="border:0" srcdoc="{page}"></iframe>
<script>addEventListener("load", () => {{ const d = document.getElementById("f").contentDocument;
const sizes = [...d.querySelectorAll("p, td")].map(e => parseFloat(getComputedStyle(e).fontSize));
const drawn = [...d.querySelectorAll("svg")].filter(s => s.getBoundingClientRect().height > 50);
document.title = ["W" + d.documentElement.scrollWidth, "T" + d.querySelectorAll("table").length,
"S" + drawn.length, "F" + Math.min(...sizes)].join(" "); }});</script></body></html>"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pages")
    write_page(simulate(4.0, 1, 0.002), directory / "demo.html")
    live(directory / "records", ticks=160, arms=["on", "off-frozen"] * 4)
    write_report(evaluate(directory / "records", wash_out=1.0), directory / "report.html")
    return directory


def chromium(page: Path, width: int, *options: str) -> subprocess.CompletedProcess[str]:
    profile = page.parent / f"profile-{page.stem}-{width}"
    command = [
        "chromium",
        *FLAGS,
        f"--user-data-dir={profile}",
        f"--window-size={width},1600",
        "--enable-logging=stderr",
    ]
    found = subprocess.run([*command, *options, page.as_uri()], capture_output=True, text=True, timeout=120)
    shutil.rmtree(profile, ignore_errors=True)
    return found


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", ["demo", "report"])
def test_a_page_renders_without_console_errors_and_fits(pages, name, width):
    probed = pages / f"{name}-probed.html"
    probed.write_text(FRAME.format(width=width, page=html.escape((pages / f"{name}.html").read_text())))
    found = chromium(probed, 1400, "--dump-dom")
    title = re.search(r"<title>W(\d+) T(\d+) S(\d+) F([\d.]+)</title>", found.stdout)
    assert title, found.stderr[-2000:]
    assert "CONSOLE" not in found.stderr, found.stderr[-2000:]
    assert int(title[1]) <= width
    assert int(title[2]) >= 2
    assert int(title[3]) >= 2
    assert float(title[4]) >= 12


def test_a_picture_of_the_page_is_not_empty(pages):
    shot = pages / "shot.png"
    chromium(pages / "report.html", 1280, f"--screenshot={shot}")
    content = shot.read_bytes()
    width, _ = struct.unpack(">II", content[16:24])
    assert width == 1280
    assert len(content) > 20_000


def test_a_simulated_page_says_so(pages):
    text = (pages / "demo.html").read_text()
    assert text.count("SIMULATED") >= 6
