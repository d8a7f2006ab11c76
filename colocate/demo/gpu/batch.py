"""A batch job of the simulated card's programs on a real one: python -m colocate.demo.gpu.batch GPU-… blocking"""

from __future__ import annotations

import argparse
from typing import Any

from colocate.demo.gpu.cuda import CudaDevice
from colocate.fakecard.card import MILLISECOND
from colocate.fakecard.client import PROGRAMS, run


def main() -> None:
    """Until it is ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("uuid")
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("--kernel-ms", type=float, default=0.0)
    options = parser.parse_args()
    device = CudaDevice(options.uuid)
    print("on the card", flush=True)
    make: Any = PROGRAMS[options.program]
    run(device, make(kernel_ns=options.kernel_ms * MILLISECOND) if options.kernel_ms else make())


if __name__ == "__main__":
    main()
