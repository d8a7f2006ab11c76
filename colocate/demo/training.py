"""A real training job: a network learns a function by gradient descent, hungry for CPU, with a growing replay memory.

It counts the samples it has learned from into a memory-mapped file, and on SIGUSR1 writes a checkpoint.
"""

from __future__ import annotations

import argparse
import os
import signal

import numpy as np

from colocate.calibrate.probe import WorkCounter

BATCH = 256
WIDTH = 64
INPUTS = 32
GROW_EVERY_STEPS = 50


def main() -> None:
    """One worker, for ever."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--progress", required=True)
    parser.add_argument("--checkpoint", default="")
    parser.add_argument("--grow-bytes", type=int, default=1 << 20)
    parser.add_argument("--most-bytes", type=int, default=128 << 20)
    options = parser.parse_args()
    counter = WorkCounter(options.progress)
    generator = np.random.Generator(np.random.PCG64(os.getpid()))
    truth = generator.standard_normal((INPUTS, 1)).astype(np.float32)
    first = generator.standard_normal((INPUTS, WIDTH)).astype(np.float32) / 8
    second = generator.standard_normal((WIDTH, 1)).astype(np.float32) / 8
    replay: list[bytearray] = []
    done = 0

    def checkpoint(*_: object) -> None:
        if options.checkpoint:
            np.savez(options.checkpoint, first=first, second=second, done=np.array([done]))

    signal.signal(signal.SIGUSR1, checkpoint)
    step = 0
    while True:
        x = generator.standard_normal((BATCH, INPUTS), dtype=np.float32)
        y = np.sin(x @ truth)
        hidden = np.maximum(x @ first, 0)
        error = hidden @ second - y
        gradient = (error @ second.T) * (hidden > 0)
        second -= 0.01 * (hidden.T @ error) / BATCH
        first -= 0.01 * (x.T @ gradient) / BATCH
        done += BATCH
        step += 1
        if step % GROW_EVERY_STEPS == 0 and len(replay) * options.grow_bytes < options.most_bytes:
            block = bytearray(options.grow_bytes)
            block[::4096] = b"\1" * len(block[::4096])
            replay.append(block)
        counter.done = done


if __name__ == "__main__":
    main()
