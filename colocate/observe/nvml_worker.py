"""The only process that talks to NVML: a driver that hangs, or falls over, takes this one along and nobody else.

It answers one JSON line for each on its standard input, and ends with that. Facts of NVML: process utilization says
NOT_FOUND where nothing is newer (idle, no error), keeps stale rows and values beyond 100, and nvidia-ml-py raises
"success" where the list is empty; GPM says zero for samples less than 100 ms apart (NVML API reference; measured in
benchmarks/gpu).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable
from typing import Any, Protocol

RECENT_SECONDS = 1.0
LEAST_APART_SECONDS = 0.1
"""Of two samples of GPM's."""
NOT_TOLD = ("NOT_SUPPORTED", "NO_PERMISSION", "FUNCTION_NOT_FOUND", "NOT_FOUND", "INSUFFICIENT_SIZE", "TIMEOUT")
"""INSUFFICIENT_SIZE: a list grew between the two calls that nvidia-ml-py makes."""
LOST = ("UNINITIALIZED", "DRIVER_NOT_LOADED", "GPU_IS_LOST", "RESET_REQUIRED", "UNKNOWN")
"""After these the library is initialized anew."""


class Sample(Protocol):
    """A row of nvmlDeviceGetProcessUtilization."""

    pid: int
    timeStamp: int  # noqa: N815 - NVML's names
    smUtil: int  # noqa: N815


def newest_percent(samples: Iterable[Sample], since_us: int) -> dict[int, int]:
    """pid -> what its kernels ran of the newest sampling period, of rows that can be believed."""
    newest: dict[int, Sample] = {}
    for sample in samples:
        if sample.timeStamp <= since_us or sample.smUtil > 100:
            continue
        if sample.pid not in newest or sample.timeStamp > newest[sample.pid].timeStamp:
            newest[sample.pid] = sample
    return {pid: sample.smUtil for pid, sample in newest.items()}


def start_ticks(pid: int) -> int | None:
    """When it started, in ticks since the boot: with its pid, which process it is."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


class Driver:
    """NVML, initialized when it is first needed, and again after it was lost."""

    def __init__(self) -> None:
        import pynvml

        self._nvml: Any = pynvml
        self._ready = self._lost = False
        """`_lost`: a card was, in the reading under way."""
        self._marks: dict[str, tuple[Any, float]] = {}
        self._samples_of: dict[str, tuple[Any, float]] = {}
        """Counters of each card as of the last reading."""

    def _forget(self) -> None:
        """Samples of a library that is initialized anew are none."""
        self._marks.clear()
        self._samples_of.clear()

    def _name(self, error: Exception) -> str:
        known = {v: k.removeprefix("NVML_ERROR_") for k, v in vars(self._nvml).items() if k.startswith("NVML_ERROR_")}
        return str(known.get(getattr(error, "value", None), type(error).__name__))

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """One answer; an error of the driver is one too."""
        try:
            if not self._ready:
                self._nvml.nvmlInit()
                self._ready = True
            found: dict[str, Any] = getattr(self, f"_{asked['ask']}")(asked)
        except self._nvml.NVMLError as error:
            name = self._name(error)
            if name in LOST:
                self._ready = False
                self._forget()
            return {"error": f"NVML: {name}"}
        return found

    def _read(self, _asked: dict[str, Any]) -> dict[str, Any]:
        nvml = self._nvml
        cards = [self._card(i) for i in range(nvml.nvmlDeviceGetCount())]
        driver = nvml.nvmlSystemGetDriverVersion()
        if self._lost:
            self._ready = self._lost = False
            self._forget()
        return {"cards": cards, "driver": driver, "at": time.monotonic()}

    def _optional(self, function: str, *arguments: Any) -> Any:
        """None where this card does not offer it, or cannot say just now."""
        try:
            return getattr(self._nvml, function)(*arguments)
        except self._nvml.NVMLError as error:
            if self._name(error) in NOT_TOLD:
                return None
            raise

    def _limits(self, handle: Any) -> Any:
        """Something, where the driver limits memory by cgroup (r615 and newer)."""
        if not hasattr(self._nvml, "c_nvmlGetMemoryLimits_v1_t"):
            return None
        asked = self._nvml.c_nvmlGetMemoryLimits_v1_t(nameSpace=b"/")
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlDeviceGetMemoryLimits_v1(handle, asked)
            return asked
        return None

    def _utilization(self, handle: Any, since_us: int) -> list[Any] | None:
        """Samples of processes that are newer; none where all is idle; None where that is not told."""
        try:
            return list(self._nvml.nvmlDeviceGetProcessUtilization(handle, since_us))
        except self._nvml.NVMLError as error:
            if getattr(error, "value", None) == 0 or self._name(error) == "NOT_FOUND":
                return []
            if self._name(error) in NOT_TOLD:
                return None
            raise

    def _card(self, index: int) -> dict[str, Any]:
        nvml = self._nvml
        card: dict[str, Any] = {"index": index, "uuid": "", "error": ""}
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            card["uuid"] = nvml.nvmlDeviceGetUUID(handle)
            card["name"] = nvml.nvmlDeviceGetName(handle)
            memory = self._optional("nvmlDeviceGetMemoryInfo", handle)
            rates = self._optional("nvmlDeviceGetUtilizationRates", handle)
            mig = self._optional("nvmlDeviceGetMigMode", handle)
            virtual = self._optional("nvmlDeviceGetVirtualizationMode", handle)
            since = int(time.time() * 1e6 - RECENT_SECONDS * 1e6)
            samples = self._utilization(handle, since)
            limits = self._limits(handle)
            gpm = self._optional("nvmlGpmQueryDeviceSupport", handle)
            plain = self._optional("nvmlDeviceGetComputeRunningProcesses_v3", handle) or []
            clients = self._optional("nvmlDeviceGetMPSComputeRunningProcesses_v3", handle) or []
            persistence = self._optional("nvmlDeviceGetPersistenceMode", handle)
            power = self._optional("nvmlDeviceGetPowerUsage", handle)
            limit = self._optional("nvmlDeviceGetEnforcedPowerLimit", handle)
            set_limit = self._optional("nvmlDeviceGetPowerManagementLimit", handle)
            energy = self._optional("nvmlDeviceGetTotalEnergyConsumption", handle)
            limits_of_power = self._optional("nvmlDeviceGetPowerManagementLimitConstraints", handle)
            counted = bool(gpm is not None and gpm.isSupportedDevice)
            pcie = self._pcie(handle, card["uuid"]) if counted else None
        except nvml.NVMLError as error:
            if self._name(error) in LOST:
                self._lost = True
            card["error"] = self._name(error)
            return card
        mig_now = bool(mig and mig[0])
        percents = None if mig_now or samples is None else newest_percent(samples, since)
        card |= {
            "memory": memory and [int(memory.total), int(memory.used)],
            "percent": rates.gpu if rates is not None and rates.gpu <= 100 else None,
            "mig": mig_now,
            "virtual": virtual == nvml.NVML_GPU_VIRTUALIZATION_MODE_VGPU,
            "mps": bool(clients),
            "limits": limits is not None,
            "counted": counted,
            "persistence": None if persistence is None else bool(persistence),
            "power_mw": power,
            "limit_mw": limit,
            "set_mw": set_limit,
            "energy_mj": energy,
            "limits_mw": limits_of_power and list(limits_of_power),
            "pcie": pcie,
            "processes": [
                [p.pid, start_ticks(p.pid), p.usedGpuMemory, percents.get(p.pid, 0) if percents is not None else None]
                for p in {p.pid: p for p in [*plain, *clients]}.values()
            ],
        }
        return card

    def _pcie(self, handle: Any, uuid: str) -> list[float] | None:
        """Bytes a second to and from the card since the last reading; None where that is not told."""
        nvml = self._nvml
        before, now = self._samples_of.get(uuid), time.monotonic()
        sample = nvml.nvmlGpmSampleAlloc()
        nvml.nvmlGpmSampleGet(handle, sample)
        self._samples_of[uuid] = sample, now
        if before is None:
            return None
        wanted = (nvml.NVML_GPM_METRIC_PCIE_RX_PER_SEC, nvml.NVML_GPM_METRIC_PCIE_TX_PER_SEC)
        found = self._metrics(before[0], sample, wanted) if now - before[1] >= LEAST_APART_SECONDS else None
        nvml.nvmlGpmSampleFree(before[0])
        rates = [value * (1 << 20) for value in found or () if value is not None]
        return rates if len(rates) == len(wanted) else None

    def _metrics(self, first: Any, second: Any, wanted: tuple[int, ...]) -> list[float | None]:
        """Values of GPM's metrics between two samples; None of one that this card does not have."""
        nvml = self._nvml
        request = nvml.c_nvmlGpmMetricsGet_t()
        request.version, request.numMetrics = nvml.NVML_GPM_METRICS_GET_VERSION, len(wanted)
        request.sample1, request.sample2 = first, second
        for i, metric in enumerate(wanted):
            request.metrics[i].metricId = metric
        nvml.nvmlGpmMetricsGet(request)
        return [None if request.metrics[i].nvmlReturn else request.metrics[i].value for i in range(len(wanted))]

    def _mark(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Look at a card's counters, to be asked how busy it was `since`."""
        nvml, uuid = self._nvml, asked["uuid"]
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        if not nvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice:
            return {"error": "this card has no GPM counters (Hopper and newer have)"}
        before = self._marks.pop(uuid, None)
        sample = before[0] if before is not None else nvml.nvmlGpmSampleAlloc()
        nvml.nvmlGpmSampleGet(handle, sample)
        self._marks[uuid] = sample, time.monotonic()
        return {"at": self._marks[uuid][1]}

    def _samples(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What these processes, or all, ran in periods that ended after a time: pid, end (wall clock), percent."""
        handle = self._nvml.nvmlDeviceGetHandleByUUID(asked["uuid"])
        since = int(asked["since"] * 1e6)
        found = self._utilization(handle, since) or []
        pids = asked["pids"] or {s.pid for s in found}
        wanted = [s for s in found if s.pid in pids and s.timeStamp > since and s.smUtil <= 100]
        return {"samples": [[s.pid, s.timeStamp / 1e6, s.smUtil] for s in wanted]}

    def _since(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The share of time in which anything ran since the mark, which moves to now.

        GRAPHICS_UTIL is of time; SM_UTIL is of the SMs, of which a kernel may fill few (nvml.h).
        """
        nvml, uuid = self._nvml, asked["uuid"]
        if uuid not in self._marks:
            return {"error": "no mark"}
        first, began = self._marks[uuid]
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        second = nvml.nvmlGpmSampleAlloc()
        nvml.nvmlGpmSampleGet(handle, second)
        now = time.monotonic()
        [percent] = self._metrics(first, second, (nvml.NVML_GPM_METRIC_GRAPHICS_UTIL,))
        nvml.nvmlGpmSampleFree(first)
        self._marks[uuid] = second, now
        if percent is None:
            return {"error": "GPM tells no utilization"}
        return {"percent": percent, "seconds": now - began, "at": now}


def main() -> int:
    """Answer until standard input ends."""
    driver = Driver()
    with contextlib.suppress(OSError):  # the driver's calls are short, or hang without CPU: they need not wait for one
        os.nice(-10)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps({**driver.answer(asked), "to": asked["number"]}))
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a driver that hangs in its own end keeps nobody
