"""The words of NRI that a plugin for resources needs, as plain values; what else is in a message is passed over.

The fields and their numbers are those of `pkg/api/api.proto` of containerd/nri v0.12 and of ttrpc's `request.proto`.
The protobuf runtime reads and writes them; the schema stands in `SCHEMA`, so no generated code is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from colocate.nri.framing import NotNri

PACKAGE = "colocate.nri"
SERVICE = "nri.pkg.api.v1alpha1."
VERSION = "v0.12.3"
"""Of the protocol that is spoken."""
EVENTS = {
    "RunPodSandbox": 1,
    "StopPodSandbox": 2,
    "RemovePodSandbox": 3,
    "CreateContainer": 4,
    "PostCreateContainer": 5,
    "StartContainer": 6,
    "PostStartContainer": 7,
    "UpdateContainer": 8,
    "PostUpdateContainer": 9,
    "StopContainer": 10,
    "RemoveContainer": 11,
    "UpdatePodSandbox": 12,
    "PostUpdatePodSandbox": 13,
    "ValidateContainerAdjustment": 14,
}
"""Bit n-1 of the mask subscribes to event n."""

_WHOLE = descriptor_pb2.FieldDescriptorProto
_KINDS = {
    "string": _WHOLE.TYPE_STRING,
    "bytes": _WHOLE.TYPE_BYTES,
    "bool": _WHOLE.TYPE_BOOL,
    "int32": _WHOLE.TYPE_INT32,
    "int64": _WHOLE.TYPE_INT64,
    "uint32": _WHOLE.TYPE_UINT32,
    "uint64": _WHOLE.TYPE_UINT64,
}
_EVENT = "pod=1:PodSandbox container=2:Container"
SCHEMA = {
    "Pair": "key=1:string value=2:string",
    "Integer": "value=1:int64",
    "Request": "service=1:string method=2:string payload=3:bytes timeout_nano=4:int64 metadata=5:*Pair",
    "Status": "code=1:int32 message=2:string",
    "Response": "status=1:Status payload=2:bytes",
    "RegisterPluginRequest": "plugin_name=1:string plugin_idx=2:string NRI_version=3:string",
    "ConfigureRequest": "config=1:string runtime_name=2:string runtime_version=3:string registration_timeout=4:int64"
    " request_timeout=5:int64 NRI_version=6:string",
    "ConfigureResponse": "events=2:int32",
    "SynchronizeRequest": "pods=1:*PodSandbox containers=2:*Container more=3:bool",
    "SynchronizeResponse": "update=1:*ContainerUpdate more=2:bool",
    "CreateContainerResponse": "adjust=1:ContainerAdjustment",
    "Event": _EVENT,
    "UpdateContainersRequest": "update=1:*ContainerUpdate",
    "UpdateContainersResponse": "failed=1:*ContainerUpdate",
    "PodSandbox": "id=1:string name=2:string uid=3:string namespace=4:string labels=5:*Pair annotations=6:*Pair"
    " linux=8:LinuxPodSandbox",
    "LinuxPodSandbox": "cgroup_parent=3:string",
    "Container": "id=1:string pod_sandbox_id=2:string name=3:string state=4:int32 labels=5:*Pair annotations=6:*Pair"
    " env=8:*string linux=11:LinuxContainer pid=12:uint32 CDI_devices=20:*CDIDevice",
    "LinuxContainer": "devices=2:*LinuxDevice resources=3:LinuxResources cgroups_path=5:string",
    "LinuxDevice": "path=1:string",
    "LinuxResources": "memory=1:LinuxMemory cpu=2:LinuxCPU unified=6:*Pair",
    "LinuxMemory": "limit=1:Integer",
    "LinuxCPU": "shares=1:Integer quota=2:Integer period=3:Integer cpus=6:string",
    "ContainerAdjustment": "env=4:*Pair linux=6:LinuxContainerAdjustment CDI_devices=8:*CDIDevice",
    "CDIDevice": "name=1:string",
    "LinuxContainerAdjustment": "resources=2:LinuxResources cgroups_path=3:string oom_score_adj=4:Integer",
    "ContainerUpdate": "container_id=1:string linux=2:LinuxContainerUpdate ignore_failure=3:bool",
    "LinuxContainerUpdate": "resources=1:LinuxResources",
}
"""Message -> its fields as `name=number:type`; `*` is repeated. A map is repeated pairs on the wire."""
RUNNING = 3


def _classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="colocate/nri.proto", package=PACKAGE, syntax="proto3")
    for name, fields in SCHEMA.items():
        message = file.message_type.add(name=name)
        for field in fields.split():
            named, kind = field.split(":")
            label, number = named.split("=")
            made = message.field.add(name=label, number=int(number), label=_WHOLE.LABEL_OPTIONAL)
            if kind.startswith("*"):
                made.label, kind = _WHOLE.LABEL_REPEATED, kind[1:]
            if kind in _KINDS:
                made.type = _KINDS[kind]
            else:
                made.type, made.type_name = _WHOLE.TYPE_MESSAGE, f".{PACKAGE}.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in SCHEMA}


_CLASSES = _classes()


def message(name: str, /, **fields: Any) -> Any:
    """A message of the schema."""
    return _CLASSES[name](**fields)


def encoded(name: str, /, **fields: Any) -> bytes:
    """A message of the schema as its bytes."""
    return bytes(message(name, **fields).SerializeToString())


def parse(name: str, data: bytes) -> Any:
    """A message out of its bytes. Raises NotNri."""
    try:
        return _CLASSES[name].FromString(data)
    except DecodeError as error:
        raise NotNri(f"no {name}: {error}") from error


class Limits(NamedTuple):
    """What a container may use; None and empty: as it is."""

    cpu_shares: int | None = None
    cpu_quota_us: int | None = None
    """Microseconds in each period; -1: without limit."""
    cpu_period_us: int | None = None
    memory_bytes: int | None = None
    unified: Mapping[str, str] = {}
    """Files of cgroup v2 by name. On a host with v1 a container that is given any does not start."""


class Pod(NamedTuple):
    """A pod sandbox."""

    id: str
    name: str
    uid: str
    namespace: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    cgroup_parent: str
    """Of its containers: a path, or a slice with the systemd driver."""


class Container(NamedTuple):
    """A container as the runtime has it."""

    id: str
    pod_id: str
    name: str
    running: bool
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    cgroups_path: str
    """A path, or `slice:prefix:id` with the systemd driver."""
    pid: int
    limits: Limits
    env: Mapping[str, str] = {}
    devices: tuple[str, ...] = ()
    """What it is given by the Container Device Interface: `nvidia.com/gpu=GPU-…`."""
    files: tuple[str, ...] = ()
    """Device files that it gets: `/dev/dri/renderD128`."""


class Adjustment(NamedTuple):
    """What is changed of a container before it is made."""

    cgroups_path: str = ""
    """Where it goes, in the form of the runtime's driver; empty: where kubelet put it."""
    limits: Limits = Limits()
    env: Mapping[str, str] = {}
    oom_score_adj: int | None = None
    devices: tuple[str, ...] = ()
    """What the runtime adds by the Container Device Interface: `nvidia.com/gpu=GPU-…`."""


class Update(NamedTuple):
    """What is changed of a container that runs."""

    container_id: str
    limits: Limits
    ignore_failure: bool = False


def pod_of(found: Any) -> Pod:
    """A `PodSandbox` as a value."""
    maps = _pairs(found.labels), _pairs(found.annotations)
    return Pod(found.id, found.name, found.uid, found.namespace, *maps, found.linux.cgroup_parent)


def container_of(found: Any) -> Container:
    """A `Container` as a value."""
    cpu, memory = found.linux.resources.cpu, found.linux.resources.memory
    limits = Limits(
        _integer(cpu, "shares"),
        _integer(cpu, "quota"),
        _integer(cpu, "period"),
        _integer(memory, "limit"),
        _pairs(found.linux.resources.unified),
    )
    maps = _pairs(found.labels), _pairs(found.annotations)
    where = found.linux.cgroups_path
    env = {name: value for name, _, value in (each.partition("=") for each in found.env)}
    devices = tuple(device.name for device in found.CDI_devices)
    files = tuple(device.path for device in found.linux.devices)
    state = found.state == RUNNING
    return Container(
        found.id, found.pod_sandbox_id, found.name, state, *maps, where, found.pid, limits, env, devices, files
    )


def adjustment(wanted: Adjustment) -> Any:
    """A `ContainerAdjustment`."""
    linux: dict[str, Any] = {"cgroups_path": wanted.cgroups_path}
    if wanted.limits != Limits():
        linux["resources"] = _resources(wanted.limits)
    if wanted.oom_score_adj is not None:
        linux["oom_score_adj"] = message("Integer", value=wanted.oom_score_adj)
    made = message("LinuxContainerAdjustment", **linux)
    devices = [message("CDIDevice", name=name) for name in wanted.devices]
    return message("ContainerAdjustment", env=_as_pairs(wanted.env), linux=made, CDI_devices=devices)


def updates(wanted: Iterable[Update]) -> list[Any]:
    """`ContainerUpdate`s."""
    return [
        message(
            "ContainerUpdate",
            container_id=one.container_id,
            linux=message("LinuxContainerUpdate", resources=_resources(one.limits)),
            ignore_failure=one.ignore_failure,
        )
        for one in wanted
    ]


def _resources(limits: Limits) -> Any:
    cpu = {"shares": limits.cpu_shares, "quota": limits.cpu_quota_us, "period": limits.cpu_period_us}
    said = {name: message("Integer", value=value) for name, value in cpu.items() if value is not None}
    parts = {"cpu": message("LinuxCPU", **said)} if said else {}
    if limits.memory_bytes is not None:
        parts["memory"] = message("LinuxMemory", limit=message("Integer", value=limits.memory_bytes))
    return message("LinuxResources", unified=_as_pairs(limits.unified), **parts)


def _integer(found: Any, field: str) -> int | None:
    return getattr(found, field).value if found.HasField(field) else None


def _pairs(found: Iterable[Any]) -> dict[str, str]:
    return {pair.key: pair.value for pair in found}


def _as_pairs(wanted: Mapping[str, str]) -> list[Any]:
    return [message("Pair", key=key, value=value) for key, value in wanted.items()]
