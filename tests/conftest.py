"""What several suites need."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from colocate.errors import HostUnfit
from colocate.localcluster.image import fresh_image
from tools import image

settings.register_profile("untimed", deadline=None)  # time is measured in benchmarks, and this machine may be busy
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def archive() -> Path:
    """The image, as `make image` makes it."""
    if image.lacks():
        pytest.skip(f"the container image needs {image.lacks()}")
    try:
        return fresh_image()
    except HostUnfit as error:
        pytest.skip(f"the container image could not be made here (no mirror?): {error}")
