"""The ColocationPolicy: one schema for the policy file and, later, for Kubernetes. Loading it is the shell's.

Fields are camelCase on the wire. Quantities are the types of `units`; the defaults are meant to be right.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Literal

import msgspec

from colocate.errors import ConfigError
from colocate.units import Bytes, Cores, Duration, Percent

API_VERSION = "colocate.io/v1alpha1"
KIND = "ColocationPolicy"
SIGNALS = ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGINT", "SIGTERM", "SIGQUIT", "SIGALRM", "SIGWINCH")
"""What a job may handle as its checkpoint signal."""


class Spec(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True, kw_only=True):
    """Base of all configuration structs: frozen, camelCase, unknown fields are errors."""


class Selector(Spec, frozen=True):
    """Which workload is meant: exactly one field."""

    systemd_unit: str | None = None
    """A unit name, e.g. `nginx.service`."""
    cgroup: str | None = None
    """A cgroup path below the node root, e.g. `/kubepods/burstable/pod123`; `*` matches within one component."""
    command: str | None = None
    """A process whose command line contains this text; its cgroup is meant."""
    pod_selector: dict[str, str] | None = None
    """Labels of pods, all of which must match. The kubelet (`spec.kubelet`) tells them where no API server does."""
    namespace: str | None = None
    """Only with podSelector: pods of this namespace alone."""


class ServiceLevelObjective(Spec, frozen=True):
    """What the service promises, measured by its own Prometheus histogram."""

    p99: Duration
    """The target of the 99th percentile."""
    url: str
    """Where the service exposes its metrics, e.g. `http://127.0.0.1:9100/metrics`."""
    metric: str
    """The histogram's name without `_bucket`, e.g. `http_request_duration_seconds`."""
    unit: Literal["seconds", "milliseconds", "microseconds"] | None = None
    """Of its bounds; without it the name's end tells (`_milliseconds`, `_ms`, `_us`), or the page's `# UNIT`, else
    seconds."""
    labels: dict[str, str] = {}
    """Only series with these labels are added up."""
    gauges: tuple[str, ...] = ()
    """Gauges on the same page that are all zero while it has no request, e.g. `vllm:num_requests_running`: batch beside
    it on a GPU is let go by them."""
    minimum_samples: int = 100
    """A quantile of fewer requests is not believed."""
    window: Duration = 5.0
    """Requests of this long are judged together."""
    scrape_timeout: Duration = 0.5
    """An answer that takes longer is given up; no tick waits for it."""


class ServicePolicy(Spec, frozen=True):
    """A latency-sensitive service that must not be hurt."""

    name: str
    """As it is called in reasons, metrics and reports."""
    selector: Selector
    """Where it runs; all cgroups that match are this service."""
    slo: ServiceLevelObjective | None = None
    """Without one it is judged by how long it waits for a CPU."""
    lends_gpu: bool = False
    """Whether batch pods may be given a card of its, where `gpu.borrow` is on."""


CLUSTER_NAMESPACES = ("kube-system", "kube-node-lease", "kube-public", "colocate-system")
"""Of what runs the cluster: no selector makes batch of it."""


class BatchPolicy(Spec, frozen=True):
    """Batch work that is already running somewhere: governed in place, never moved."""

    name: str
    """As it is called in reasons, metrics and reports."""
    selector: Selector
    """Where it runs."""
    priority: int = 0
    """Lower priorities are evicted first."""
    checkpoint_signal: str | None = None
    """Asks those of its processes that handle it to save their state, e.g. `SIGUSR1`, before it is evicted."""
    gang: str = ""
    """Batch of one gang is evicted together, and its lost work counts together."""


class CpuPolicy(Spec, frozen=True):
    """The CPU law (designs/0001-cpu.md)."""

    reserve: Percent = 5.0
    """Of the node, never granted while a grant is in force."""
    floor: Cores = 0.01
    """The least grant: what batch keeps when a service suffers."""
    question: Duration = 3.0
    """How long batch is at its floor when it is asked whether it is what a service suffers from."""
    hold_down: Duration = 10.0
    """How long a grant stands before more is tried, after batch was found to harm; doubles with each, to 4 minutes."""
    pressure: Percent = 20.0
    """The share of time in which a service may wait for a CPU before batch is asked. Up to it batch may add to what the
    service waits by itself, half of it at least; to one that waits more by itself, as much again. Of a service that
    waits half of that or more, only waits of a millisecond or more count."""
    best_effort_waits: Percent = 5.0
    """The share of time in which BestEffort may wait for a CPU before batch is asked, and of its CPU use that batch may
    take away."""


class MemoryPolicy(Spec, frozen=True):
    """The memory law (designs/0002-memory.md)."""

    reserve: Percent = 5.0
    """Of the node's memory, never part of what batch may have."""
    pressure: Percent = 5.0
    """The share of time in which some task of a service may stall on memory before the ladder starts."""
    poll: Duration = 0.1
    """How often pressure totals are read where triggers are not allowed."""
    rung: Duration = 0.5
    """How long a rung is given to work before the next is taken."""
    calm: Duration = 10.0
    """How long without pressure before a rung is undone."""
    crawl: Duration = 10.0
    """How long batch may crawl at its allowance (v2) before one job has to go, its work saved."""
    checkpoint_deadline: Duration = 10.0
    """How long jobs have to save their state before the ladder goes on; at once when all say that they have."""
    termination_grace: Duration = 5.0
    """Between SIGTERM and the kill of an evicted job."""


class FreezePolicy(Spec, frozen=True):
    """The freeze law (designs/0003-freeze.md)."""

    max_frozen: Duration = 30.0
    """A job frozen longer than this is evicted: a frozen job holds memory and does no work."""
    gangs: Literal["together", "alone"] = "together"
    """Whether a batch pod is frozen while a member of its gang on another node is: it would only wait for it."""


class BatchResourcesPolicy(Spec, frozen=True):
    """What batch pods are promised of a node, as `kubernetes.io/batch-cpu` and `batch-memory` (designs/0007)."""

    law: Literal["calibrated", "koordinator"] = "calibrated"
    """`calibrated`: by what services will need in `runtime`, at `risk`; `koordinator`: as koord-manager would."""
    runtime: Duration = 3600.0
    """How long a batch pod is expected to run."""
    risk: Percent = 1.0
    """How often services may need, within that time, some of what was promised to batch when it started."""
    growth: Percent = 10.0
    """Of the node, by which what is promised may grow in five minutes; it shrinks at once."""


class GpuPolicy(Spec, frozen=True):
    """The law of the cards that batch shares with services (designs/0008-gpu.md)."""

    enabled: bool = True
    """Whether cards are looked at. Where there is no driver nothing is done either way."""
    modes: tuple[Literal["open", "gate", "dial"], ...] = ("open", "gate", "dial")
    """How batch may share a card with services; with none of them it never does."""
    memory_reserve: Bytes = 1 << 30
    """Of a card's memory, kept free for its services: batch is stopped before it would touch it."""
    nvml_library: str = ""
    """libnvidia-ml.so.1, where the driver's is not found by itself, e.g.
    `/run/nvidia/driver/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1`."""
    gangs: Literal["shared", "refused"] = "shared"
    """Whether members of gangs may be on a card with services; one that is refused is evicted from there."""
    lock_drivers: tuple[str, ...] = ()
    """Versions of the GPU driver, e.g. `580.*`, by whose checkpoint interface batch is held, so that its CPU side goes
    on; empty: by the freezer alone. An opt-in: some versions have faults there."""
    suspend_queues: bool = False
    """Whether AMD's queues of batch are taken off a GPU in the middle of their kernels: what a job has launched need
    not end first. It excludes debuggers of the job; without it AMD's GPUs are only watched."""
    suspend: bool = False
    """Whether batch may be taken off a card into the host's memory, before it is evicted for the card's; with one of
    lockDrivers only."""
    borrow: bool = False
    """Whether batch pods may borrow cards of services that lend them (`services[].lendsGpu`): the node offers
    `colocate.io/gpu-borrow`, and a container that requests it gets such a card from the container runtime."""
    cdi_kind: str = "nvidia.com/gpu"
    """Under which kind of the Container Device Interface cards are known to the runtime by their UUID."""
    starved_after: Duration = 600.0
    """A job that had less than a hundredth of its card in this long is evicted, to run elsewhere."""


class PowerPoint(Spec, frozen=True):
    """One point of a curve."""

    watts: int
    """The cap of one GPU."""
    slowdown: float
    """By how much longer the same work takes: 0.05 is 5 %."""


class PowerModel(Spec, frozen=True):
    """How much jobs of a class slow down under caps, as `colocate power fit` says."""

    name: str
    """Of the class: the label or annotation `colocate.io/power-class` of pods, or `colocate run --power-class`."""
    points: tuple[PowerPoint, ...]
    """Ascending in watts; between them the straight line counts."""


class SignalStep(Spec, frozen=True):
    """What may be drawn while a signal is high."""

    above: float
    """Grams of CO2 a kWh, or a price: in the signal's own unit."""
    budget: int
    """Watts in place of `power.budget`."""


class SignalPolicy(Spec, frozen=True):
    """How dear or how dirty power is now, from a file that somebody else keeps."""

    file: str = ""
    """JSON as Electricity Maps or the Carbon Aware SDK answer, or a number; empty: there is no signal."""
    steps: tuple[SignalStep, ...] = ()
    """Ascending in `above`; the last one that is exceeded counts."""
    max_age: Duration = 7200.0
    """What was said so long ago counts no more: the whole budget does then."""
    elastic: bool = False
    """Whether jobs with a deadline have their watts when the forecast in `file` is low, and fewer while it is high, as
    far as their deadlines let them."""


class NodePowerPoint(Spec, frozen=True):
    """One point of what a node draws."""

    utilization: float
    """Of its CPUs, 0 to 1."""
    watts: int
    """What the whole node draws then."""


class PowerPolicy(Spec, frozen=True):
    """Watts that pods and jobs ask for (docs/power.md)."""

    offer: int = 0
    """Watts that pods may ask for of this node, as `colocate.io/power`; 0: none are offered."""
    budget: int = 0
    """Watts that the GPUs of this node may draw together; 0: no budget. Who asked for watts gets less where it needs
    that."""
    cpu_budget: int = 0
    """Watts that the CPUs of this node may draw, packages and their DRAM; 0: no budget. Batch alone gives way."""
    powercap: str = "/sys/class/powercap"
    """Where the meter of the CPUs (RAPL) is; in a container, where the host's is mounted."""
    attribution: bool = False
    """Whether that meter's energy is divided among containers and jobs, and served under Kepler's names."""
    oversubscribe: Percent = 0.0
    """By so much more than `budget` the limits of the GPUs may add up to, as long as what they draw leaves room."""
    boost: Percent = 0.0
    """By so much more than it asks for a job may have, while the node's `budget` has watts left and they make it
    faster."""
    signal: SignalPolicy = SignalPolicy()
    """When the budget is to be less, by carbon intensity or price."""
    models: tuple[PowerModel, ...] = ()
    """Of classes of jobs: who hardly feels a cap gives watts to who does. Of others the time is taken to grow as the
    cap falls."""
    refine: bool = False
    """Whether models are made better by what running jobs of their class say of their progress."""
    explore: bool = False
    """Whether such jobs are held to a tenth less for one minute of ten, as far as they have time to spare."""
    curve: tuple[NodePowerPoint, ...] = ()
    """What a node draws by how busy its CPUs are, for gangs that go where that costs the least watts; empty: as the
    CPUs' own meter (RAPL) says, once that has been learnt."""


class StalenessPolicy(Spec, frozen=True):
    """What happens when readings are old."""

    stop_tightening_after: Duration = 3.0
    """Readings older than this tighten nothing any more."""
    open_after: Duration = 10.0
    """Readings older than this leave the tier open."""


class RecordPolicy(Spec, frozen=True):
    """Where records go and how large they may grow."""

    max_bytes: Bytes = 200 << 20
    """Of all segments together; the oldest go first."""
    segment_bytes: Bytes = 8 << 20
    """A segment that is larger is compressed and another begun."""
    keyframe_every: int = 300
    """Ticks between lines that stand alone; replay can start at each."""


class KubeletPolicy(Spec, frozen=True):
    """How the kubelet of this node is asked for its pods; used only if a podSelector is."""

    url: str = "https://127.0.0.1:10250"
    """Of the kubelet of this very node."""
    token_file: str = "/var/run/secrets/kubernetes.io/serviceaccount/token"
    """A token that may read nodes/pods; read again at each question."""
    ca_file: str = ""
    """Who signed the kubelet's serving certificate; empty: the system's authorities."""
    insecure_skip_tls_verify: bool = False
    """Do not check the kubelet's certificate, which is often signed by itself."""
    every: Duration = 10.0
    """How often it is asked."""


class HttpPolicy(Spec, frozen=True):
    """Where /metrics, /healthz, /readyz and /debug/plan are served; port 0 takes any free port."""

    host: str = "127.0.0.1"
    """The address to listen on."""
    port: int = 9464
    """The port; 0 takes any free one."""
    enabled: bool = True
    """Whether anything is served."""


class PolicySpec(Spec, frozen=True):
    """The whole policy."""

    node_root: str = "/"
    """The cgroup that is taken as the node; `/` is the machine."""
    tick: Duration = 1.0
    """How often the node is looked at; a memory stall, or a question under way, is looked at sooner."""
    services: tuple[ServicePolicy, ...] = ()
    """What must not be hurt. Guaranteed and Burstable pods are services without being named."""
    batch: tuple[BatchPolicy, ...] = ()
    """Running batch work that is governed where it is. Jobs of `colocate run` are batch without being named."""
    cpu: CpuPolicy = CpuPolicy()
    """Of the CPU law."""
    memory: MemoryPolicy = MemoryPolicy()
    """Of the memory law."""
    freeze: FreezePolicy = FreezePolicy()
    """Of the freeze law."""
    gpu: GpuPolicy = GpuPolicy()
    """Of the law of the cards."""
    power: PowerPolicy = PowerPolicy()
    """Of the watts that are asked for."""
    batch_resources: BatchResourcesPolicy = BatchResourcesPolicy()
    """Of what batch pods are promised."""
    staleness: StalenessPolicy = StalenessPolicy()
    """When readings are too old."""
    records: RecordPolicy = RecordPolicy()
    """Of the records."""
    http: HttpPolicy = HttpPolicy()
    """Of the HTTP server."""
    kubelet: KubeletPolicy = KubeletPolicy()
    """Of the kubelet, for `podSelector`."""
    drift: Literal["reassert", "yield"] = "reassert"
    """When somebody else writes one of our knobs: write it again, or leave it to them."""
    calibrate: bool = True
    """Measure the CPU levers once at start, if nothing is known of this kernel and the node is at least 30 % idle."""


class Metadata(Spec, frozen=True):
    """The name of the policy."""

    name: str = "default"


class ColocationPolicy(Spec, frozen=True):
    """`apiVersion: colocate.io/v1alpha1`, `kind: ColocationPolicy`."""

    api_version: str = API_VERSION
    kind: str = KIND
    metadata: Metadata = Metadata()
    spec: PolicySpec = PolicySpec()


def _check_range(path: str, value: float, low: float, high: float, unit: str = "") -> None:
    if not low <= value <= high:
        raise ConfigError(path, f"{value:g}{unit} is impossible", f"write a value between {low:g} and {high:g}{unit}")


def check(policy: ColocationPolicy) -> ColocationPolicy:
    """The policy itself, if its numbers and selectors are possible. Raises ConfigError with the exact path."""
    if policy.api_version != API_VERSION:
        raise ConfigError("$.apiVersion", f"unknown version {policy.api_version!r}", f"write {API_VERSION}")
    if policy.kind != KIND:
        raise ConfigError("$.kind", f"unknown kind {policy.kind!r}", f"write {KIND}")
    spec = policy.spec
    if not spec.node_root.startswith("/") or ".." in spec.node_root.split("/"):
        raise ConfigError("$.spec.nodeRoot", f"{spec.node_root!r} is not absolute", "start it with /, without ..")
    if spec.staleness.open_after < spec.staleness.stop_tightening_after:
        raise ConfigError("$.spec.staleness.openAfter", "is below stopTighteningAfter", "write a longer duration")
    _check_range("$.spec.staleness.stopTighteningAfter", spec.staleness.stop_tightening_after, 0.1, 86400, "s")
    _check_range("$.spec.freeze.maxFrozen", spec.freeze.max_frozen, 0.1, 86400, "s")
    _check_range("$.spec.cpu.reserve", spec.cpu.reserve, 0, 90, "%")
    _check_range("$.spec.memory.reserve", spec.memory.reserve, 0, 90, "%")
    _check_range("$.spec.records.segmentBytes", spec.records.segment_bytes, 1 << 16, spec.records.max_bytes)
    _check_range("$.spec.batchResources.runtime", spec.batch_resources.runtime, 60, 86400, "s")
    _check_range("$.spec.batchResources.risk", spec.batch_resources.risk, 0.1, 50, "%")
    _check_range("$.spec.batchResources.growth", spec.batch_resources.growth, 0.1, 100, "%")
    _check_range("$.spec.gpu.starvedAfter", spec.gpu.starved_after, 10, 86400, "s")
    _check_range("$.spec.power.offer", spec.power.offer, 0, 100_000, " W")
    _check_range("$.spec.power.budget", spec.power.budget, 0, 100_000, " W")
    _check_range("$.spec.power.cpuBudget", spec.power.cpu_budget, 0, 100_000, " W")
    if not spec.power.powercap.startswith("/"):
        raise ConfigError("$.spec.power.powercap", f"{spec.power.powercap!r} is no path", "start it with /")
    _check_range("$.spec.power.oversubscribe", spec.power.oversubscribe, 0, 100, "%")
    _check_signal(spec.power.signal)
    _check_models(spec.power.models)
    _check_curve(spec.power.curve)
    _check_range("$.spec.gpu.memoryReserve", spec.gpu.memory_reserve, 0, 1 << 40)
    if not re.fullmatch(r"[a-z0-9.-]+/[a-z0-9.-]+", spec.gpu.cdi_kind, re.IGNORECASE):
        raise ConfigError("$.spec.gpu.cdiKind", f"{spec.gpu.cdi_kind!r} is no kind", "write one, e.g. nvidia.com/gpu")
    if spec.gpu.nvml_library and not spec.gpu.nvml_library.startswith("/"):
        raise ConfigError("$.spec.gpu.nvmlLibrary", f"{spec.gpu.nvml_library!r} is no path", "start it with /")
    _check_range("$.spec.tick", spec.tick, 0.05, 60, "s")
    _check_range("$.spec.cpu.question", spec.cpu.question, 0.5, 60, "s")
    _check_range("$.spec.cpu.holdDown", spec.cpu.hold_down, 0.1, 3600, "s")
    _check_range("$.spec.cpu.bestEffortWaits", spec.cpu.best_effort_waits, 0.1, 100, "%")
    _check_range("$.spec.cpu.floor", spec.cpu.floor, 0.01, 1024)
    _check_range("$.spec.cpu.pressure", spec.cpu.pressure, 0.1, 100, "%")
    _check_range("$.spec.memory.pressure", spec.memory.pressure, 0.1, 100, "%")
    _check_range("$.spec.memory.poll", spec.memory.poll, 0.01, 10, "s")
    _check_range("$.spec.kubelet.every", spec.kubelet.every, 1, 3600, "s")
    if not spec.kubelet.url.startswith(("http://", "https://")):
        raise ConfigError("$.spec.kubelet.url", f"{spec.kubelet.url!r} is no URL", "start it with https://")
    _check_range("$.spec.http.port", spec.http.port, 0, 65535)
    _check_range("$.spec.records.maxBytes", spec.records.max_bytes, 1 << 20, 1 << 40)
    _check_range("$.spec.records.keyframeEvery", spec.records.keyframe_every, 1, 10**6)
    names: dict[str, str] = {}
    entries: list[tuple[str, ServicePolicy | BatchPolicy]] = [
        *((f"$.spec.services[{i}]", s) for i, s in enumerate(spec.services)),
        *((f"$.spec.batch[{i}]", b) for i, b in enumerate(spec.batch)),
    ]
    for path, entry in entries:
        _check_entry(path, entry, names)
    return policy


def _check_signal(signal: SignalPolicy) -> None:
    path = "$.spec.power.signal"
    if signal.file and not signal.file.startswith("/"):
        raise ConfigError(f"{path}.file", f"{signal.file!r} is no path", "start it with /")
    if bool(signal.file) != bool(signal.steps or signal.elastic):
        what = "has a file that nothing follows, or steps or elastic without a file"
        raise ConfigError(path, what, "write a file with steps, with elastic: true, or with both")
    _check_range(f"{path}.maxAge", signal.max_age, 60, 30 * 86400, "s")
    for i, step in enumerate(signal.steps):
        _check_range(f"{path}.steps[{i}].above", step.above, 0, 100_000)
        _check_range(f"{path}.steps[{i}].budget", step.budget, 1, 100_000, " W")
    for i, (before, step) in enumerate(pairwise(signal.steps), start=1):
        if step.above <= before.above or step.budget > before.budget:
            raise ConfigError(f"{path}.steps[{i}]", "is not above, or has more watts", "sort them: watts fall")


def _check_models(models: tuple[PowerModel, ...]) -> None:
    for i, model in enumerate(models):
        path = f"$.spec.power.models[{i}]"
        if not model.name or model.name in [m.name for m in models[:i]]:
            raise ConfigError(f"{path}.name", f"{model.name!r} is empty or another's", "give each model its own")
        if len(model.points) < 2:
            raise ConfigError(f"{path}.points", "are fewer than two", "write what `colocate power fit` prints")
        for j, (before, point) in enumerate(pairwise(model.points), start=1):
            if point.watts <= before.watts or point.slowdown > before.slowdown:
                where = f"{path}.points[{j}]"
                raise ConfigError(where, "has less watts, or more slowdown", "sort them: watts rise, slowdowns fall")
        _check_range(f"{path}.points[0].watts", model.points[0].watts, 1, 100_000, " W")
        _check_range(f"{path}.points[-1].slowdown", model.points[-1].slowdown, 0.0, 100.0)
        _check_range(f"{path}.points[0].slowdown", model.points[0].slowdown, 0.0, 100.0)


def _check_curve(points: tuple[NodePowerPoint, ...]) -> None:
    path = "$.spec.power.curve"
    for i, point in enumerate(points):
        _check_range(f"{path}[{i}].utilization", point.utilization, 0, 1)
        _check_range(f"{path}[{i}].watts", point.watts, 0, 100_000, " W")
    for i, (before, point) in enumerate(pairwise(points), start=1):
        if point.utilization <= before.utilization or point.watts < before.watts:
            raise ConfigError(f"{path}[{i}]", "has less utilization, or less watts", "sort them: both rise")
    if points and (len(points) == 1 or points[0].utilization != 0 or points[-1].utilization != 1):
        raise ConfigError(path, "does not reach from 0 to 1", "write an idle node's watts first, a busy one's last")


def _check_entry(path: str, entry: ServicePolicy | BatchPolicy, names: dict[str, str]) -> None:
    if entry.name in names:
        raise ConfigError(f"{path}.name", f"{entry.name!r} is also the name of {names[entry.name]}", "rename one")
    if not entry.name or not entry.name.isprintable():
        raise ConfigError(f"{path}.name", f"{entry.name!r} is no name", "write a short printable text")
    names[entry.name] = path
    if isinstance(entry, BatchPolicy) and entry.selector.namespace in CLUSTER_NAMESPACES:
        namespace = entry.selector.namespace
        raise ConfigError(f"{path}.selector.namespace", f"{namespace} runs the cluster", "choose another namespace")
    how = ("systemd_unit", "cgroup", "command", "pod_selector")
    chosen = [f for f in how if getattr(entry.selector, f) is not None]
    if len(chosen) != 1:
        raise ConfigError(
            f"{path}.selector",
            f"needs exactly one of systemdUnit, cgroup, command, podSelector; {len(chosen)} are set",
        )
    for field, given in (("systemdUnit", entry.selector.systemd_unit), ("command", entry.selector.command)):
        if given == "":
            raise ConfigError(
                f"{path}.selector.{field}", "is empty and would match everything", "write what to look for"
            )
    if entry.selector.cgroup is not None and not entry.selector.cgroup.startswith("/"):
        raise ConfigError(f"{path}.selector.cgroup", f"{entry.selector.cgroup!r} is no path", "start it with /")
    if entry.selector.namespace is not None and entry.selector.pod_selector is None:
        raise ConfigError(
            f"{path}.selector.namespace", "belongs to podSelector", "choose by podSelector, or leave it out"
        )
    if entry.selector.pod_selector == {}:
        raise ConfigError(f"{path}.selector.podSelector", "no labels would mean every pod", "write at least one label")
    if isinstance(entry, BatchPolicy) and entry.checkpoint_signal not in (None, *SIGNALS):
        raise ConfigError(
            f"{path}.checkpointSignal",
            f"{entry.checkpoint_signal!r} is no signal",
            f"write one of {', '.join(SIGNALS)}",
        )
    if isinstance(entry, ServicePolicy) and entry.slo is not None:
        _check_range(f"{path}.slo.p99", entry.slo.p99, 1e-6, 3600, "s")
        _check_range(f"{path}.slo.minimumSamples", entry.slo.minimum_samples, 1, 10**9)
        _check_range(f"{path}.slo.window", entry.slo.window, 0.1, 86400, "s")
        _check_range(f"{path}.slo.scrapeTimeout", entry.slo.scrape_timeout, 0.01, 60, "s")
        if not entry.slo.metric:
            raise ConfigError(f"{path}.slo.metric", "is empty", "write the histogram's name without _bucket")
        if not entry.slo.url.startswith(("http://", "https://")):
            raise ConfigError(f"{path}.slo.url", f"{entry.slo.url!r} is no URL", "start it with http://")
