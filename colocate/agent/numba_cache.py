"""The model's kernels as the shell needs them: compiled or not, safely cached, and LLVM let go."""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import tempfile
from pathlib import Path

from colocate.errors import BadInput
from colocate.model import kernels

MADV_DONTNEED, MADV_PAGEOUT = 4, 21


def prepare(state_dir: Path) -> bool:
    """Whether kernels shall be compiled, and a cache for them; with COLOCATE_JIT=off numba is not imported.

    Raises BadInput if the cache of compiled code could be written by somebody else.
    """
    if os.environ.get("COLOCATE_JIT", "on").lower() in ("off", "0", "no", "false"):
        return False
    _prepare_cache(state_dir)
    return True


def load_compiled() -> kernels.Kernels:
    """The kernels by numba, from the prepared cache or compiled anew; may run in a thread beside the numpy twins."""
    loaded = kernels.load(jit=True)
    _let_go_of_llvm()
    return loaded


def load_kernels(state_dir: Path) -> kernels.Kernels:
    """The kernels that the environment asks for, ready to run. Raises BadInput as `prepare` does."""
    return load_compiled() if prepare(state_dir) else kernels.load(jit=False)


def _prepare_cache(state_dir: Path) -> None:
    """Give numba a cache of its own that only its owner can write: compiled code is loaded from it.

    A read-only root file system or a missing home would make `cache=True` fail at import (numba has no locator then).
    """
    if "NUMBA_CACHE_DIR" in os.environ:
        return
    cache = state_dir / "numba"
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:  # no home, or a read-only one: compiled anew each time, but it works
        cache = Path(tempfile.mkdtemp(prefix="colocate-numba-"))
        atexit.register(shutil.rmtree, cache, ignore_errors=True)
    info = cache.stat()
    if info.st_uid != os.geteuid() or info.st_mode & 0o022:
        raise BadInput(f"{cache} must belong to uid {os.geteuid()} alone (mode 0700): compiled code is loaded from it")
    os.environ["NUMBA_CACHE_DIR"] = str(cache)


def _let_go_of_llvm() -> None:
    """Let the pages of LLVM go, which the kernels needed only to be compiled or loaded: 65 MiB of resident memory.

    madvise(2) MADV_PAGEOUT loses nothing, but skips pages that another process maps too; code is never changed, so it
    may be dropped even then (MADV_DONTNEED). What is needed again is read from the library again.
    """
    libc = ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "libllvmlite" in line:
            addresses, access = line.split()[:2]
            start, end = (int(address, 16) for address in addresses.split("-"))
            advice = MADV_DONTNEED if access == "r-xp" else MADV_PAGEOUT
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
