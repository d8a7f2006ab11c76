"""How kernels are compiled: kept for the next process where there is a place for that, else anew in each."""

from __future__ import annotations

import os
from pathlib import Path

import numba

PLACES = [os.environ.get("NUMBA_CACHE_DIR", ""), str(Path(__file__).parent / "solve" / "__pycache__")]
njit = numba.njit(cache=any(place and os.access(place, os.W_OK) for place in PLACES))
"""Without a place that can be written numba refuses to keep anything (RuntimeError), so it is not asked to."""
