"""As much of the CUDA driver as a measured load needs, by ctypes: no toolkit, no framework, kernels as PTX.

Functions and structures are those of the CUDA Driver API reference (context, module, execution, graph and process
checkpointing sections). The driver compiles the PTX when it is loaded, so any card since Volta runs it.
"""

from __future__ import annotations

import ctypes as c
import mmap
import os
from pathlib import Path

PTX = b"""
.version 7.0
.target sm_70
.address_size 64

// Fixed work: `rounds` dependent multiply-adds in every thread, then one beat: {GPU ns, kernels done}.
.visible .entry work(.param .u64 rounds, .param .u64 beat)
{
  .reg .pred %p, %q;
  .reg .u64 %n, %b, %i, %t, %k;
  .reg .f32 %f;
  .reg .u32 %x, %y;
  ld.param.u64 %n, [rounds];
  ld.param.u64 %b, [beat];
  mov.u64 %i, 0;
  mov.f32 %f, 0f3F800000;
AGAIN:
  fma.rn.f32 %f, %f, 0f3F7FFFFE, 0f33800000;
  add.u64 %i, %i, 1;
  setp.lt.u64 %p, %i, %n;
  @%p bra AGAIN;
  mov.u32 %x, %tid.x;
  mov.u32 %y, %ctaid.x;
  or.b32 %x, %x, %y;
  setp.ne.u32 %q, %x, 0;
  @%q bra OUT;
  mov.u64 %t, %globaltimer;
  st.volatile.global.f32 [%b+16], %f;
  st.volatile.global.u64 [%b], %t;
  ld.volatile.global.u64 %k, [%b+8];
  add.u64 %k, %k, 1;
  st.volatile.global.u64 [%b+8], %k;
OUT:
  ret;
}

// Looks at the card's clock for `ns` and writes down {from, until} of up to `most` gaps longer than `least` ns.
.visible .entry watch(.param .u64 ns, .param .u64 least, .param .u64 most, .param .u64 into)
{
  .reg .pred %p;
  .reg .u64 %d, %l, %m, %o, %t0, %t1, %t2, %e, %k;
  ld.param.u64 %d, [ns];
  ld.param.u64 %l, [least];
  ld.param.u64 %m, [most];
  ld.param.u64 %o, [into];
  mov.u64 %k, 0;
  mov.u64 %t0, %globaltimer;
  mov.u64 %t1, %t0;
  st.volatile.global.u64 [%o], %t0;
LOOK:
  mov.u64 %t2, %globaltimer;
  sub.u64 %e, %t2, %t1;
  setp.lt.u64 %p, %e, %l;
  @%p bra NEXT;
  setp.ge.u64 %p, %k, %m;
  @%p bra NEXT;
  add.u64 %k, %k, 1;
  shl.b64 %e, %k, 4;
  add.u64 %e, %o, %e;
  st.volatile.global.u64 [%e], %t1;
  st.volatile.global.u64 [%e+8], %t2;
NEXT:
  mov.u64 %t1, %t2;
  sub.u64 %e, %t2, %t0;
  setp.lt.u64 %p, %e, %d;
  @%p bra LOOK;
  st.volatile.global.u64 [%o+8], %k;
  ret;
}
"""

STATES = ("running", "locked", "checkpointed", "failed")
"""CUprocessState."""


class CudaError(Exception):
    """A call of the driver failed: its name and CUresult."""


class _LockArgs(c.Structure):
    _fields_ = (("timeout_ms", c.c_uint), ("reserved0", c.c_uint), ("reserved1", c.c_uint64 * 7))


class _UnlockArgs(c.Structure):
    _fields_ = (("reserved", c.c_uint64 * 8),)


class Driver:
    """libcuda.so.1; raises `OSError` where it is not installed and `CudaError` where a call fails."""

    def __init__(self) -> None:
        self._lib = c.CDLL("libcuda.so.1")
        self.call("cuInit", 0)

    def call(self, name: str, *args: object) -> None:
        """Call `name`; an error of the driver becomes an exception."""
        result = getattr(self._lib, name)(*args)
        if result:
            raise CudaError(f"{name} answered {result}")

    def version(self) -> int:
        """The highest CUDA version that the driver serves, e.g. 13000."""
        found = c.c_int()
        self.call("cuDriverGetVersion", c.byref(found))
        return found.value

    def lock(self, pid: int, timeout_ms: int) -> None:
        """Let no further CUDA call of `pid` through (driver >= 570); a call that times out changes nothing."""
        args = _LockArgs(timeout_ms=timeout_ms)
        self.call("cuCheckpointProcessLock", c.c_int(pid), c.byref(args))

    def unlock(self, pid: int) -> None:
        """Let `pid` go on."""
        args = _UnlockArgs()
        self.call("cuCheckpointProcessUnlock", c.c_int(pid), c.byref(args))

    def state(self, pid: int) -> str:
        """One of `STATES`."""
        found = c.c_int()
        self.call("cuCheckpointProcessGetState", c.c_int(pid), c.byref(found))
        return STATES[found.value]


class Words:
    """A file of 64-bit words that processes, and through it the card, share."""

    SIZE = 1 << 16
    GPU_NS, BEATS, _SINK, LAUNCHED, BUSY, READY, DEPTH, CYCLES = range(8)
    GAPS = 512
    """Where `watch` writes: {from, count} and then pairs."""

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        os.ftruncate(descriptor, self.SIZE)
        self.memory = mmap.mmap(descriptor, self.SIZE)
        os.close(descriptor)
        self._words = memoryview(self.memory).cast("Q")

    def __getitem__(self, i: int) -> int:
        return self._words[i]

    def __setitem__(self, i: int, value: int) -> None:
        self._words[i] = value

    def gaps(self) -> tuple[int, list[tuple[int, int]]]:
        """When `watch` began and the gaps that it saw, in the card's nanoseconds."""
        first, count = self[self.GAPS], self[self.GAPS + 1]
        at = self.GAPS + 2
        return first, [(self[at + 2 * i], self[at + 2 * i + 1]) for i in range(count)]


class Card:
    """A context on card 0 with both kernels loaded and `words` mapped into the card's address space."""

    def __init__(self, words: Words) -> None:
        self.driver = Driver()
        call = self.driver.call
        device, context, module = c.c_int(), c.c_void_p(), c.c_void_p()
        call("cuDeviceGet", c.byref(device), 0)
        call("cuDevicePrimaryCtxRetain", c.byref(context), device)
        call("cuCtxSetCurrent", context)
        call("cuModuleLoadData", c.byref(module), PTX)
        self._work, self._watch = c.c_void_p(), c.c_void_p()
        call("cuModuleGetFunction", c.byref(self._work), module, b"work")
        call("cuModuleGetFunction", c.byref(self._watch), module, b"watch")
        processors = c.c_int()
        call("cuDeviceGetAttribute", c.byref(processors), 16, device)  # MULTIPROCESSOR_COUNT
        self.processors = processors.value
        host = (c.c_char * Words.SIZE).from_buffer(words.memory)
        call("cuMemHostRegister_v2", c.byref(host), c.c_size_t(Words.SIZE), 3)  # portable, mapped
        mapped = c.c_uint64()
        call("cuMemHostGetDevicePointer_v2", c.byref(mapped), c.byref(host), 0)
        self._words = mapped.value
        self.stream = c.c_void_p()
        call("cuStreamCreate", c.byref(self.stream), 1)  # not the default stream, which cannot be captured

    def _launch(self, kernel: c.c_void_p, blocks: int, threads: int, *args: int) -> None:
        held = [c.c_uint64(a) for a in args]
        params = (c.c_void_p * len(held))(*(c.cast(c.byref(h), c.c_void_p) for h in held))
        self.driver.call("cuLaunchKernel", kernel, blocks, 1, 1, threads, 1, 1, 0, self.stream, params, None)

    def work(self, rounds: int) -> None:
        """Queue one kernel of fixed work on every multiprocessor; it returns as soon as the queue has room."""
        self._launch(self._work, self.processors, 128, rounds, self._words)

    def watch(self, ns: int, least_ns: int) -> None:
        """Queue a kernel of one thread that runs `ns` and writes down when it did not."""
        most = (Words.SIZE // 8 - Words.GAPS - 2) // 2
        self._launch(self._watch, 1, 1, ns, least_ns, most, self._words + 8 * Words.GAPS)

    def sync(self) -> None:
        """Wait until all that was queued is done."""
        self.driver.call("cuStreamSynchronize", self.stream)

    def graph(self, kernels: int, rounds: int) -> c.c_void_p:
        """One launch of `kernels` kernels."""
        graph, launchable = c.c_void_p(), c.c_void_p()
        self.driver.call("cuStreamBeginCapture_v2", self.stream, 2)  # relaxed
        for _ in range(kernels):
            self.work(rounds)
        self.driver.call("cuStreamEndCapture", self.stream, c.byref(graph))
        self.driver.call("cuGraphInstantiateWithFlags", c.byref(launchable), graph, c.c_uint64(0))
        return launchable

    def replay(self, graph: c.c_void_p) -> None:
        """Launch a graph."""
        self.driver.call("cuGraphLaunch", graph, self.stream)
