"""The only process that has a GPU driver do something: a call that hangs takes this one along and nobody else.

One JSON line a wish on its standard input, and one a fact on its standard output.

    {"pid": 7, "started": 123, "want": "locked"}    what a process shall be: running, locked or checkpointed
    {"number": 1, "call": "set_memory_limits", ...} a setting of a card

A process is brought to what is wanted of it step by step, each in a thread of its own: what was wanted meanwhile and is
not any more is never done. It is never asked for anything while it is frozen: a lock of it would not return, whatever
its time-out (measured, benchmarks/gpu; criu#2458, #2470, #2475, #2514). When the standard input ends, whoever is locked
is let go. Source: the CUDA driver API, 6.37 (checkpointing); NVML API reference.
"""

from __future__ import annotations

import contextlib
import ctypes as c
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from colocate import amdgpu
from colocate.cgroup.port import FilePort, KernelPort
from colocate.cgroup.tree import cgroup_of, start_time

STATES = ("running", "locked", "checkpointed", "failed")
"""CUprocessState."""
LOCK_TIMEOUT_MS = 5000
LOOK_SECONDS, AGAIN_SECONDS, LOOK_FOR_END_SECONDS = 0.02, 0.5, 10.0
LAST_SECONDS = 5.0
"""For so long it tries to let everybody go in the end."""


class DriverError(Exception):
    """A call of the driver failed, and how."""


class _LockArguments(c.Structure):
    _fields_ = (("timeout_ms", c.c_uint), ("reserved0", c.c_uint), ("reserved1", c.c_uint64 * 7))


class Cuda:
    """The checkpoint interface of libcuda.so.1 (driver 570 and newer). Raises OSError where there is none."""

    def __init__(self) -> None:
        self._library = c.CDLL("libcuda.so.1")
        self._call("cuInit", 0)

    def _call(self, name: str, *arguments: object) -> None:
        try:
            result = getattr(self._library, name)(*arguments)
        except AttributeError as error:
            raise DriverError(f"this driver has no {name} (570 and newer have)") from error
        if result:
            raise DriverError(f"{name} answered {result}")

    def state(self, pid: int) -> str:
        """One of STATES."""
        found = c.c_int()
        self._call("cuCheckpointProcessGetState", c.c_int(pid), c.byref(found))
        return STATES[found.value] if 0 <= found.value < len(STATES) else "failed"

    def step(self, pid: int, name: str) -> None:
        """To lock, checkpoint, restore or unlock it."""
        reserved = (c.c_uint64 * 8)()
        given = _LockArguments(timeout_ms=LOCK_TIMEOUT_MS) if name == "lock" else reserved
        self._call(f"cuCheckpointProcess{name.title()}", c.c_int(pid), c.byref(given))


def next_step(state: str, wanted: str) -> str:
    """What brings a process closer to what is wanted of it; empty if nothing does, or it is there."""
    if state == wanted or state == "failed":
        return ""
    if state == "running":
        return "lock"
    if state == "checkpointed":
        return "restore"
    return "checkpoint" if wanted == "checkpointed" else "unlock"


def frozen(port: FilePort, pid: int) -> bool:
    """Whether a process, or whatever is around it, is frozen, in either kind of hierarchy."""
    for hierarchy in port.layout.mounts:
        path = cgroup_of(port, pid, hierarchy)
        if path is None:
            continue
        for file, said in (("cgroup.events", "frozen 1"), ("freezer.state", "FROZEN"), ("freezer.state", "FREEZING")):
            if said in (port.read(hierarchy, path, file) or "").splitlines():
                return True
    return False


class Process:
    """One process, and what it shall be."""

    def __init__(self, port: FilePort, cuda: Cuda, pid: int, started: int) -> None:
        self.pid, self.started = pid, started
        self.wanted, self.wish = "running", 0
        """What it shall be, and by which wish."""
        self._port, self._cuda = port, cuda
        self._changed = threading.Event()
        self.done = self.gone = False
        """Whether it is what it shall be; whether it has ended."""
        threading.Thread(target=self._serve, name=f"process {pid}", daemon=True).start()

    def want(self, state: str, wish: int = 0) -> None:
        """From now on it shall be this."""
        self.wanted, self.wish, self.done = state, wish, False
        self._changed.set()

    @property
    def _there(self) -> bool:
        return start_time(self._port, self.pid) == self.started

    def _serve(self) -> None:
        while self._there:
            if not self._changed.wait(LOOK_FOR_END_SECONDS):
                continue
            self._changed.clear()
            try:
                while not self._settle():
                    self._changed.wait(LOOK_SECONDS)
                    self._changed.clear()
            except DriverError as error:
                self._failed(str(error))
        self.done = self.gone = True
        say(pid=self.pid, state="gone")

    def _settle(self) -> bool:
        """Take one step; whether there is none left."""
        if not self._there:
            return True
        if frozen(self._port, self.pid):
            return False
        wish, wanted = self.wish, self.wanted  # in this order: what is said of an older wish is not believed
        state = self._cuda.state(self.pid)
        step = next_step(state, wanted)
        if not step:
            say(pid=self.pid, state=state, wish=wish)
            self.done = wanted == self.wanted
            return self.done
        say(pid=self.pid, state=state, doing=step)
        began = time.monotonic()
        self._cuda.step(self.pid, step)
        say(pid=self.pid, state=self._cuda.state(self.pid), did=step, seconds=round(time.monotonic() - began, 6))
        return False

    def _failed(self, why: str) -> None:
        """Whatever it was to be, it shall run."""
        state = "unknown"
        with contextlib.suppress(DriverError):
            state = self._cuda.state(self.pid)
        if self._there:
            say(pid=self.pid, state=state, error=why)
        if self._there and state not in ("running", "failed"):
            self.wanted = "running"
            time.sleep(AGAIN_SECONDS)
            self._changed.set()
        else:
            self.done = True


class AmdSettings:
    """Power limits of AMD GPUs, by their driver's files."""

    def __init__(self, root: Path = amdgpu.KFD, drm: Path = amdgpu.DRM) -> None:
        self._root, self._drm = root, drm

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """One answer; an error of the driver is one too."""
        folder = amdgpu.power_folder(asked["uuid"], self._root, self._drm)
        if folder is None:
            return {"error": "it has no power limit of its own"}
        try:
            if asked["call"] == "set_power_limit":
                return {"value": str(amdgpu.set_limit(folder, int(asked["value"])))}
            limit = amdgpu.read_power(folder).limit_mw
        except (OSError, ValueError) as error:
            return {"error": getattr(error, "strerror", None) or str(error)}
        if asked["call"] not in ("get_power_limit", "get_enforced_limit") or limit is None:
            return {"error": f"its driver does not tell ({asked['call']})"}
        return {"value": str(limit)}


class Settings:
    """Settings of cards, by NVML."""

    def __init__(self) -> None:
        import pynvml

        self._nvml: Any = pynvml
        self._ready = False

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """One answer; an error of the driver is one too."""
        try:
            if not self._ready:
                self._nvml.nvmlInit()
                self._ready = True
            handle = self._nvml.nvmlDeviceGetHandleByUUID(asked["uuid"])
            found: dict[str, Any] = getattr(self, f"_{asked['call']}")(handle, asked)
        except self._nvml.NVMLError as error:
            known = {v: k for k, v in vars(self._nvml).items() if k.startswith("NVML_ERROR_")}
            return {"error": known.get(getattr(error, "value", None), type(error).__name__)}
        return found

    def _get_memory_limits(self, handle: Any, asked: dict[str, Any]) -> dict[str, Any]:
        """Of a cgroup (drivers from r615 on): the value that `set` takes back."""
        found = self._nvml.c_nvmlGetMemoryLimits_v1_t(nameSpace=asked["group"].encode())
        self._nvml.nvmlDeviceGetMemoryLimits_v1(handle, found)
        return {"value": f"{found.softLimit} {found.hardLimit}"}

    def _get_power_limit(self, handle: Any, _asked: dict[str, Any]) -> dict[str, Any]:
        """The limit that is set, in mW."""
        return {"value": str(self._nvml.nvmlDeviceGetPowerManagementLimit(handle))}

    def _set_power_limit(self, handle: Any, asked: dict[str, Any]) -> dict[str, Any]:
        """By the first call for it: of the second nvidia-ml-py passes over the answer (13.615, measured)."""
        self._nvml.nvmlDeviceSetPowerManagementLimit(handle, int(asked["value"]))
        return self._get_power_limit(handle, asked)

    def _get_enforced_limit(self, handle: Any, _asked: dict[str, Any]) -> dict[str, Any]:
        """What is in force, in mW: the least of all limits, of the board and its chassis too."""
        return {"value": str(self._nvml.nvmlDeviceGetEnforcedPowerLimit(handle))}

    def _set_memory_limits(self, handle: Any, asked: dict[str, Any]) -> dict[str, Any]:
        soft, hard = map(int, asked["value"].split())
        limits = self._nvml.c_nvmlSetMemoryLimits_v1_t(
            nameSpace=asked["group"].encode(), softLimit=soft, hardLimit=hard
        )
        self._nvml.nvmlDeviceSetMemoryLimits_v1(handle, limits)
        return self._get_memory_limits(handle, asked)


_speaking = threading.Lock()


def say(**fact: object) -> None:
    """One line."""
    with _speaking, contextlib.suppress(OSError):
        sys.stdout.write(json.dumps(fact) + "\n")
        sys.stdout.flush()


def main() -> int:
    """Serve until standard input ends, and then let everybody go."""
    port, processes = KernelPort(), dict[int, Process]()
    cuda: Cuda | None = None
    settings: Settings | None = None
    amd = AmdSettings()
    for line in sys.stdin:
        asked = json.loads(line)
        if "call" in asked:
            if asked["uuid"].startswith(amdgpu.PREFIX):
                answer = amd.answer(asked)
            else:
                settings = settings if settings is not None else Settings()
                answer = settings.answer(asked)
            say(number=asked["number"], **answer)
            continue
        try:
            cuda = cuda if cuda is not None else Cuda()
        except (OSError, DriverError) as error:
            say(pid=asked["pid"], state="unknown", error=str(error))
            continue
        pid, started = asked["pid"], asked["started"]
        process = processes.get(pid)
        if process is None or process.started != started:
            process = processes[pid] = Process(port, cuda, pid, started)
        process.want(asked["want"], asked["wish"])
        processes = {p: one for p, one in processes.items() if not one.gone}
    for process in processes.values():
        process.want("running")
    deadline = time.monotonic() + LAST_SECONDS
    while not all(p.done for p in processes.values()) and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
    return 0


if __name__ == "__main__":
    code = main()
    os._exit(code)  # a call that hangs keeps nobody
