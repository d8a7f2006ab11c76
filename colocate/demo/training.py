"""A real training job: a network learns a function by gradient descent, hungry for CPU and for memory.

It counts the samples it has learned from into a memory-mapped file, and keeps them in a replay memory. Every
`--checkpoint-every` seconds, when it is asked by SIGUSR1, and before it ends by SIGTERM it writes a checkpoint, from
which its successor goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time

import numpy as np

from colocate.demo.progress import Progress
from colocate.demo.scenario import CHECKPOINT_SECONDS
from colocate.errors import ColocateError
from colocate.jobs.client import tell_checkpointed

BATCH = 256
WIDTH = 64
INPUTS = 32
BLOCK_BYTES = 1 << 20
ASKED = {signal.SIGUSR1, signal.SIGTERM}


def main() -> None:
    """One worker, for ever."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--progress", required=True)
    parser.add_argument("--checkpoint-every", type=float, default=CHECKPOINT_SECONDS)
    parser.add_argument("--sample-bytes", type=float, default=0.0, help="what a sample takes in the replay memory")
    parser.add_argument("--most-bytes", type=int, default=128 << 20)
    options = parser.parse_args()
    progress = Progress(options.progress)
    progress.died()  # what its predecessor had not saved is lost
    progress.starts.done += 1
    generator = np.random.Generator(np.random.PCG64(os.getpid()))
    truth = np.random.Generator(np.random.PCG64(1)).standard_normal((INPUTS, 1)).astype(np.float32)
    first = generator.standard_normal((INPUTS, WIDTH)).astype(np.float32) / 8
    second = generator.standard_normal((WIDTH, 1)).astype(np.float32) / 8
    done = began = 0
    if progress.checkpoint.exists():
        with np.load(progress.checkpoint) as found:
            first, second, done = found["first"], found["second"], int(found["done"])
        began = done
    replay: list[bytearray] = []

    def checkpoint(*_: object) -> None:
        unfinished = f"{progress.checkpoint}.new"
        with open(unfinished, "wb") as file:
            np.savez(file, first=first, second=second, done=np.array(done))
        os.replace(unfinished, progress.checkpoint)
        progress.saved.done = done
        with contextlib.suppress(ColocateError):  # an agent that knows no such job is none of training's business
            tell_checkpointed()

    def end(*_: object) -> None:
        checkpoint()
        sys.exit(0)

    signal.signal(signal.SIGUSR1, checkpoint)
    signal.signal(signal.SIGTERM, end)
    due = time.monotonic() + options.checkpoint_every
    while True:
        x = generator.standard_normal((BATCH, INPUTS), dtype=np.float32)
        y = np.sin(x @ truth)
        hidden = np.maximum(x @ first, 0)
        error = hidden @ second - y
        gradient = (error @ second.T) * (hidden > 0)
        second -= 0.01 * (hidden.T @ error) / BATCH
        first -= 0.01 * (x.T @ gradient) / BATCH
        done += BATCH
        wanted = min((done - began) * options.sample_bytes, options.most_bytes)
        if len(replay) * BLOCK_BYTES < wanted - BLOCK_BYTES:
            block = bytearray(BLOCK_BYTES)
            block[::4096] = b"\1" * len(block[::4096])
            replay.append(block)
        progress.done.done = done
        if time.monotonic() >= due:
            signal.pthread_sigmask(signal.SIG_BLOCK, ASKED)  # one at a time
            checkpoint()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKED)
            due = time.monotonic() + options.checkpoint_every


if __name__ == "__main__":
    main()
