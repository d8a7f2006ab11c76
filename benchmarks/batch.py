"""Batch work that strains one resource: `stream` memory bandwidth, `cache` the page cache.

`python -IS benchmarks/batch.py KIND FILE` counts rounds into the file's first eight bytes, for ever, like probe's hog.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import sys
import tempfile

BLOCK = 32 << 20
CACHED_FILE = 512 << 20


def main(kind: str, path: str) -> None:
    """Copy memory, or write a file larger than what the node has free, again and again."""
    ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG: a benchmark that is killed leaves none of this
    with open(path, "r+b") as file:
        counter = mmap.mmap(file.fileno(), 8)
    source, target = bytearray(os.urandom(1 << 20) * (BLOCK >> 20)), bytearray(BLOCK)
    done = 0
    with tempfile.TemporaryFile(dir=os.path.dirname(path)) as out:
        while True:
            if kind == "stream":
                target[:] = source
            else:
                out.write(source[: BLOCK // 8])
                if out.tell() > CACHED_FILE:
                    out.seek(0)
            done += 1
            counter[:8] = struct.pack("Q", done)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
