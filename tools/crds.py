"""Writes manifests/crd/*.yaml from the structs of `podgroup.api` and `colocate.cluster.api`: `python -m tools.crds`.

The PodGroup is upstream's (scheduling.x-k8s.io/v1alpha1, kubernetes-sigs/scheduler-plugins) with conditions and
observedGeneration added to its status; it is only for clusters that have no PodGroup yet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import yaml

from colocate import objects
from colocate.cluster import api as node_api
from colocate.cluster.api import POWER_RESOURCES, ColocationPolicyStatus, NodeColocationSpec, NodeColocationStatus
from colocate.policy import schema
from colocate.policy.schema import PolicySpec
from podgroup import api
from podgroup.api import (
    GangPlanSpec,
    GangPlanStatus,
    PodGroupSpec,
    PodGroupStatus,
    PowerBudgetSpec,
    PowerBudgetStatus,
)
from tools.policy_reference import meanings_of

TARGET = Path(__file__).resolve().parent.parent / "manifests" / "crd"
TIMES = frozenset({"schedule_start_time", "last_transition_time", "created", "waiting_since", "observed", "since"})


MEANINGS = {**meanings_of(objects), **meanings_of(api), **meanings_of(node_api), **meanings_of(schema)}


def _schema(kind: Any, name: str = "") -> dict[str, Any]:
    """The structural schema of a type."""
    info = msgspec.inspect
    if isinstance(kind, info.UnionType):
        kinds = [k for k in kind.types if not isinstance(k, info.NoneType)]
        if len(kinds) > 1:
            pattern = r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?[0-9]+))?$"
            forms = [{"type": "integer"}, {"type": "string"}]
            return {"anyOf": forms, "x-kubernetes-int-or-string": True, "pattern": pattern}
        return _schema(kinds[0], name)
    if isinstance(kind, info.StructType):
        return _struct(kind.cls)
    if isinstance(kind, info.Metadata):
        # An operator writes a quantity as a text with its unit, or as a number: the agents tell what is wrong with one.
        return {"x-kubernetes-preserve-unknown-fields": True}
    if isinstance(kind, info.VarTupleType):
        return {"type": "array", "items": _schema(kind.item_type), "x-kubernetes-list-type": "atomic"}
    if isinstance(kind, info.ListType):
        found = {"type": "array", "items": _schema(kind.item_type)}
        return {**found, "x-kubernetes-list-type": "atomic"}
    if isinstance(kind, info.TupleType):
        size = len(kind.item_types)
        return {"type": "array", "items": _schema(kind.item_types[0]), "minItems": size, "maxItems": size}
    if isinstance(kind, info.DictType):
        return {"type": "object", "additionalProperties": _schema(kind.value_type)}
    if isinstance(kind, info.LiteralType):
        return {"type": "string", "enum": sorted(kind.values)}
    if name in TIMES:
        return {"type": "string", "format": "date-time"}
    if isinstance(kind, info.IntType):
        return {"type": "integer", "format": "int32"}
    return {"type": {"StrType": "string", "FloatType": "number", "BoolType": "boolean"}[type(kind).__name__]}


def _struct(cls: Any) -> dict[str, Any]:
    properties = {}
    for field in msgspec.inspect.type_info(cls).fields:  # type: ignore[attr-defined]
        meaning = MEANINGS.get((cls.__name__, field.name))
        properties[field.encode_name] = {
            **({"description": meaning} if meaning else {}),
            **_schema(field.type, field.name),
        }
    return {"type": "object", "description": " ".join((cls.__doc__ or "").split()), "properties": properties}


def _definition(
    group: str, version: str, kind: str, short: list[str], spec: Any, status: Any, columns: list[tuple[str, str, str]]
) -> dict[str, Any]:
    plural = f"{kind.lower().removesuffix('y')}ies" if kind.endswith("y") else f"{kind.lower()}s"
    schema = {
        "type": "object",
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": _struct(spec),
            "status": _struct(status),
        },
    }
    shown = [{"name": name, "type": form, "jsonPath": path} for name, form, path in columns]
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{group}"},
        "spec": {
            "group": group,
            "names": {
                "kind": kind,
                "listKind": f"{kind}List",
                "plural": plural,
                "singular": kind.lower(),
                "shortNames": short,
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": version,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": schema},
                    "additionalPrinterColumns": shown,
                }
            ],
        },
    }


def _of_cluster(definition: dict[str, Any]) -> None:
    """Of no namespace, and with a status that is written apart."""
    definition["spec"]["scope"] = "Cluster"
    definition["spec"]["versions"][0]["subresources"] = {"status": {}}


def generate() -> dict[str, str]:
    """File name -> content."""
    group = _definition(
        "scheduling.x-k8s.io",
        "v1alpha1",
        "PodGroup",
        ["pg", "pgs"],
        PodGroupSpec,
        PodGroupStatus,
        [
            ("Phase", "string", ".status.phase"),
            ("MinMember", "integer", ".spec.minMember"),
            ("Running", "integer", ".status.running"),
            ("Succeeded", "integer", ".status.succeeded"),
            ("Failed", "integer", ".status.failed"),
            ("Age", "date", ".metadata.creationTimestamp"),
        ],
    )
    upstream = "https://github.com/kubernetes-sigs/scheduler-plugins/pull/50"
    group["metadata"]["annotations"] = {"api-approved.kubernetes.io": upstream}
    version = group["spec"]["versions"][0]
    version["subresources"] = {"status": {}}
    version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["minMember"]["minimum"] = 1
    plan = _definition(
        "colocate.io",
        "v1alpha1",
        "GangPlan",
        ["gp"],
        GangPlanSpec,
        GangPlanStatus,
        [
            ("Phase", "string", ".status.phase"),
            ("Reason", "string", ".status.reason"),
            ("Position", "integer", ".status.position"),
            ("Message", "string", ".status.message"),
            ("Age", "date", ".metadata.creationTimestamp"),
        ],
    )
    node = _definition(
        "colocate.io",
        "v1alpha1",
        "NodeColocation",
        ["nco"],
        NodeColocationSpec,
        NodeColocationStatus,
        [
            ("Ready", "string", ".status.reason"),
            ("Batch-CPU-Milli", "string", r".status.promised.kubernetes\.io/batch-cpu"),
            ("Batch-Memory", "string", r".status.promised.kubernetes\.io/batch-memory"),
            ("Pressure", "string", ".status.pressure"),
            ("Last-Action", "string", ".status.lastAction"),
            ("Observed", "date", ".status.observed"),
            ("Age", "date", ".metadata.creationTimestamp"),
        ],
    )
    _of_cluster(node)
    policy = _definition(
        "colocate.io",
        "v1alpha1",
        "ColocationPolicy",
        ["cop"],
        PolicySpec,
        ColocationPolicyStatus,
        [
            ("Ready", "string", ".status.ready"),
            ("Batch-Cores", "string", ".status.batchCores"),
            ("Pressure", "string", ".status.pressure"),
            ("Last-Action", "string", ".status.lastAction"),
            ("Problem", "string", ".status.problem"),
            ("Age", "date", ".metadata.creationTimestamp"),
        ],
    )
    _of_cluster(policy)
    budget = _definition(
        "colocate.io",
        "v1alpha1",
        "PowerBudget",
        ["pb"],
        PowerBudgetSpec,
        PowerBudgetStatus,
        [
            ("Watts", "integer", ".spec.watts"),
            ("Nodes", "integer", ".status.nodes"),
            ("Requested", "integer", ".status.requested"),
            ("Left", "integer", ".status.left"),
            ("Message", "string", ".status.message"),
            ("Age", "date", ".metadata.creationTimestamp"),
        ],
    )
    _of_cluster(budget)
    whole = budget["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    whole["required"], spec = ["spec"], whole["properties"]["spec"]
    spec["required"] = ["watts"]
    for name in ("watts", "idleWatts"):
        spec["properties"][name]["minimum"] = 0
    spec["properties"]["resource"]["enum"] = list(POWER_RESOURCES)
    selecting = spec["properties"]["nodeSelector"]["properties"]["matchExpressions"]["items"]
    selecting["required"] = ["key", "operator"]
    selecting["properties"]["operator"]["enum"] = ["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"]
    head = "# Generated by `python -m tools.crds` from the structs of the API.\n"
    dump = {
        "podgroups.yaml": group,
        "gangplans.yaml": plan,
        "nodecolocations.yaml": node,
        "colocationpolicies.yaml": policy,
        "powerbudgets.yaml": budget,
    }
    return {name: head + yaml.safe_dump(what, sort_keys=False, width=120) for name, what in dump.items()}


if __name__ == "__main__":
    for file, content in generate().items():
        (TARGET / file).write_text(content)
