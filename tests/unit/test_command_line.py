"""The command line as a program: what it costs to start it."""

import subprocess
import sys

HEAVY = {"aiohttp", "asyncio", "importlib.metadata", "jinja2", "kubernetes", "numba", "numpy", "rich", "structlog"}


def test_a_job_is_started_without_what_it_does_not_need():
    """Its start is work beside the services, outside of the tier yet."""
    code = f"import sys\nfrom colocate.cli.main import main\nmain(['run', '--'])\nprint(*{HEAVY} & sys.modules.keys())"
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (found.stdout.strip(), "no command given" in found.stderr) == ("", True)
