"""A process's load on a real GPU, by the CUDA driver alone: no toolkit, no framework, one kernel as PTX.

It does what `fakecard.client.Device` does on a simulated card, so that the demonstration's programs run on either.
Source: the CUDA driver API (context, module, execution and memory sections). The driver compiles the PTX when it is
loaded, so any card since Volta runs it.
"""

from __future__ import annotations

import ctypes as c
import time
import uuid

from colocate.errors import HostUnfit

PTX = b"""
.version 7.0
.target sm_70
.address_size 64

// Fixed work: `rounds` dependent multiply-adds in every thread.
.visible .entry work(.param .u64 rounds, .param .u64 sink)
{
  .reg .pred %p, %q;
  .reg .u64 %n, %b, %i;
  .reg .f32 %f;
  ld.param.u64 %n, [rounds];
  ld.param.u64 %b, [sink];
  mov.u64 %i, 0;
  mov.f32 %f, 0f3F800000;
AGAIN:
  fma.rn.f32 %f, %f, 0f3F7FFFFE, 0f33800000;
  add.u64 %i, %i, 1;
  setp.lt.u64 %p, %i, %n;
  @%p bra AGAIN;
  setp.gt.f32 %q, %f, 0f7F000000;
  @!%q bra OUT;
  st.global.f32 [%b], %f;
OUT:
  ret;
}
"""
MULTIPROCESSOR_COUNT, OUT_OF_MEMORY, SINK_BYTES = 16, 2, 256
CALIBRATION_NS, CALIBRATION_ROUNDS = 4e6, 3
"""So long should a kernel be by which rounds are told to take so long; so often is that tried."""
FIRST_ROUNDS = 1 << 20


class CudaDevice:
    """This process's context on one card."""

    def __init__(self, wanted: str) -> None:
        """`wanted`: the card's UUID as NVML writes it, `GPU-…`. Raises HostUnfit."""
        try:
            self._library = c.CDLL("libcuda.so.1")
        except OSError as error:
            raise HostUnfit("there is no libcuda.so.1", "install NVIDIA's driver, or leave out --card") from error
        self._call("cuInit", 0)
        device = self._find(wanted)
        context, module = c.c_void_p(), c.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", c.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        self._call("cuModuleLoadData", c.byref(module), PTX)
        self._work, self._stream, blocks = c.c_void_p(), c.c_void_p(), c.c_int()
        self._call("cuModuleGetFunction", c.byref(self._work), module, b"work")
        self._call("cuDeviceGetAttribute", c.byref(blocks), MULTIPROCESSOR_COUNT, device)
        self._call("cuStreamCreate", c.byref(self._stream), 1)
        self._blocks, self._held = blocks.value, dict[int, list[int]]()
        self._context = context
        sink = c.c_uint64()
        self._call("cuMemAlloc_v2", c.byref(sink), c.c_size_t(SINK_BYTES))
        self._sink = sink.value
        self._rounds_a_ns = self._calibrate()

    def _call(self, name: str, *arguments: object) -> None:
        result = getattr(self._library, name)(*arguments)
        if result:
            raise HostUnfit(f"{name} answered {result}", "see nvidia-smi and the kernel's log")

    def _find(self, wanted: str) -> int:
        count, found = c.c_int(), []
        self._call("cuDeviceGetCount", c.byref(count))
        for ordinal in range(count.value):
            device, raw = c.c_int(), (c.c_ubyte * 16)()
            self._call("cuDeviceGet", c.byref(device), ordinal)
            self._call("cuDeviceGetUuid_v2", raw, device)
            found.append(f"GPU-{uuid.UUID(bytes=bytes(raw))}")
            if found[-1] == wanted:
                return device.value
        raise HostUnfit(f"there is no card {wanted}; there is {', '.join(found) or 'none'}", "name one of them")

    def _calibrate(self) -> float:
        """Rounds of the kernel in a nanosecond of the card: by what twice as many take longer, the least of some."""
        rounds = FIRST_ROUNDS
        for _ in range(CALIBRATION_ROUNDS):  # the first ones raise the clocks
            once, twice = (min(self._timed(n * rounds) for _ in range(5)) for n in (1, 2))
            rounds = max(int(rounds * CALIBRATION_NS / max(twice - once, 1.0)), 1)
        return rounds / CALIBRATION_NS

    def _timed(self, rounds: int) -> float:
        began = time.perf_counter_ns()
        self._launch(rounds)
        self.sync()
        return float(time.perf_counter_ns() - began)

    def _launch(self, rounds: int) -> None:
        held = [c.c_uint64(rounds), c.c_uint64(self._sink)]
        parameters = (c.c_void_p * len(held))(*(c.cast(c.byref(h), c.c_void_p) for h in held))
        self._call("cuLaunchKernel", self._work, self._blocks, 1, 1, 128, 1, 1, 0, self._stream, parameters, None)

    def launch(self, kernels: int, kernel_ns: float) -> None:
        """Launch equal kernels, one after the other; it waits where the queue is full."""
        rounds = max(int(kernel_ns * self._rounds_a_ns), 1)
        for _ in range(kernels):
            self._launch(rounds)

    def graph(self, kernels: int, kernel_ns: float) -> None:
        """As much work in one launch."""
        self.launch(1, kernels * kernel_ns)

    def sync(self, *, spins: bool = True) -> None:  # noqa: ARG002 - it does in any case
        """Wait until all that it has launched has finished, with the CPU spinning: CUDA's default."""
        self._call("cuStreamSynchronize", self._stream)

    def malloc(self, size: int) -> bool:
        """Whether there was room."""
        address = c.c_uint64()
        result = self._library.cuMemAlloc_v2(c.byref(address), c.c_size_t(size))
        if result not in (0, OUT_OF_MEMORY):
            raise HostUnfit(f"cuMemAlloc_v2 answered {result}", "see nvidia-smi")
        if not result:
            self._held.setdefault(size, []).append(address.value)
        return not result

    def free(self, size: int) -> None:
        """Give memory back."""
        self._call("cuMemFree_v2", c.c_uint64(self._held[size].pop()))
