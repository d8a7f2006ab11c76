"""Which pods become batch as they are created: admission policies of the API server itself, without a server of ours.

MutatingAdmissionPolicy (KEP-3962) is generally available from Kubernetes 1.36.
"""

from __future__ import annotations

import json
import re
from typing import Any

from colocate.cluster.api import BATCH, BATCH_LABELS, QOS
from colocate.errors import BadInput
from colocate.kube.client import SUBDOMAIN
from colocate.policy.schema import CLUSTER_NAMESPACES

VERSION = "admissionregistration.k8s.io/v1"
PLUGIN = "required-plugins.noderesource.dev/pod"
"""By this annotation the runtime refuses a container while a plugin is away (NRI's default validator)."""
PROFILE = "colocate.io/profile"
PODS_CREATED: dict[str, Any] = {
    "resourceRules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}]
}
DIGITS = 4
"""The last hexadecimal ones of the UID of a pod's controller, which is random, decide whether the pod is chosen: the
pods of one job are alike, as those of a gang must be. Nothing of a pod itself is random when it is admitted.
"""
_KEY = r"(?:[A-Za-z0-9.-]+/)?[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?"
_VALUE = r"(?:[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?)?"
_EQUAL = re.compile(rf"(?P<key>{_KEY})\s*(?P<op>==|=|!=)\s*(?P<value>{_VALUE})")
_SET = re.compile(rf"(?P<key>{_KEY})\s+(?P<op>in|notin)\s+\((?P<values>[^()]*)\)")
_THERE = re.compile(rf"(?P<no>!?)\s*(?P<key>{_KEY})")


def selector_of(text: str, option: str) -> dict[str, Any]:
    """A LabelSelector of what kubectl takes for -l: `a=b,c!=d,e in (x, y),!f`. Raises BadInput."""
    expressions = []
    for part in re.split(r",(?![^()]*\))", text):
        one = part.strip()
        if found := _EQUAL.fullmatch(one):
            operator = "NotIn" if found["op"] == "!=" else "In"
            expressions.append({"key": found["key"], "operator": operator, "values": [found["value"]]})
        elif found := _SET.fullmatch(one):
            values = [value.strip() for value in found["values"].split(",")]
            if not all(re.fullmatch(_VALUE, value) for value in values):
                raise BadInput(f"{option}: {one!r} has a value that no label may have")
            operator = "In" if found["op"] == "in" else "NotIn"
            expressions.append({"key": found["key"], "operator": operator, "values": values})
        elif found := _THERE.fullmatch(one):
            expressions.append({"key": found["key"], "operator": "DoesNotExist" if found["no"] else "Exists"})
        else:
            raise BadInput(f"{option}: {one!r} is no label selector; write team=ml, team in (a, b), team or !team")
    return {"matchExpressions": expressions}


def profile(name: str, pods: str, namespaces: str, percent: int, *, fail_closed: bool = False) -> list[dict[str, Any]]:
    """The policy and its binding by which the selected pods become batch. Raises BadInput.

    `fail_closed`: their containers wait for the agent rather than start as plain BestEffort while it is away.
    Below 100 `percent` it is those of so many of the jobs, and no pod that nobody controls.
    """
    if not SUBDOMAIN.fullmatch(name):
        raise BadInput(f"NAME: {name!r} is no name of an object: lower-case letters, digits, '-' and '.'")
    if not pods and not namespaces:
        raise BadInput("--pods or --namespaces: say whom you mean; without either all pods would become batch")
    if not 1 <= percent <= 100:
        raise BadInput(f"--percent: {percent} is not between 1 and 100")
    constraints = dict(PODS_CREATED)
    constraints |= {"objectSelector": selector_of(pods, "--pods")} if pods else {}
    constraints |= {"namespaceSelector": selector_of(namespaces, "--namespaces")} if namespaces else {}
    conditions = [
        {"name": "not-of-the-cluster", "expression": f"!(request.namespace in {cel(CLUSTER_NAMESPACES)})"},
        {
            "name": "says-nothing-itself",
            "expression": f"{cel([*BATCH_LABELS])}.all(key, "
            "!(has(object.metadata.labels) && key in object.metadata.labels)"
            " && !(has(object.metadata.annotations) && key in object.metadata.annotations))",
        },
        {
            "name": "not-static",
            "expression": "!has(object.metadata.annotations) || "
            '!("kubernetes.io/config.mirror" in object.metadata.annotations)',
        },
    ]
    if percent < 100:
        below = f"{round(percent / 100 * 16**DIGITS):0{DIGITS}x}"
        lot = f'owner.uid.size() == 36 && owner.uid.substring({36 - DIGITS}, 36).lowerAscii() < "{below}"'
        chosen = f"object.metadata.ownerReferences.exists(owner, has(owner.controller) && owner.controller && {lot})"
        conditions.append({"name": "chosen", "expression": f"has(object.metadata.ownerReferences) && {chosen}"})
    labels = {QOS: BATCH}
    annotations = {PROFILE: name, **({PLUGIN: '["colocate"]'} if fail_closed else {})}
    change = f"Object{{metadata: Object.metadata{{labels: {cel(labels)}, annotations: {cel(annotations)}}}}}"
    full = f"colocate-profile-{name}"
    policy = {
        "apiVersion": VERSION,
        "kind": "MutatingAdmissionPolicy",
        "metadata": {"name": full},
        "spec": {
            "failurePolicy": "Ignore",  # that a pod is created matters more than that it is batch
            "reinvocationPolicy": "Never",
            "matchConstraints": constraints,
            "matchConditions": conditions,
            "mutations": [{"patchType": "ApplyConfiguration", "applyConfiguration": {"expression": change}}],
        },
    }
    binding = {
        "apiVersion": VERSION,
        "kind": "MutatingAdmissionPolicyBinding",
        "metadata": {"name": full},
        "spec": {"policyName": full},
    }
    return [policy, binding]


def cel(value: object) -> str:
    """A literal of CEL, which may be written as JSON writes it."""
    return json.dumps(value)
