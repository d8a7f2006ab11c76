"""Pods that ask for watts by what they may cost, `colocate.io/max-slowdown: "5%"`: admission policies of the API server
itself turn it into watts as the pod is created, so that schedulers, budgets and quotas count them like any others.

MutatingAdmissionPolicy (KEP-3962) is generally available from Kubernetes 1.36. What cannot be turned into watts is
refused with its reason, by a ValidatingAdmissionPolicy: a pod that means to be capped is not to run uncapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from colocate.cluster.api import MAX_SLOWDOWN, POWER, POWER_BECAUSE, POWER_CLASS, POWER_RESOURCES
from colocate.cluster.profiles import PODS_CREATED, VERSION, cel
from colocate.decide.outcome import watts_for
from colocate.errors import BadInput
from colocate.policy.schema import PowerModel

NAME = "colocate-max-slowdown"
SLOWDOWNS = tuple(i / 1000 for i in (*range(0, 101, 5), *range(110, 301, 10), *range(350, 1001, 50), 1500, 2000))
"""Watts are known for these; for one between them those of the one before count, which is the stricter."""
GPUS = ("nvidia.com/gpu", "amd.com/gpu")
FORM = r"^[0-9]{1,4}([.][0-9]{1,6})?%?$"


def outcomes(models: Sequence[PowerModel]) -> list[dict[str, Any]]:
    """The policies and their bindings, with these models in them. Raises BadInput."""
    if not models:
        raise BadInput("spec.power.models is empty: without a model no slowdown can be turned into watts")
    tables = {model.name: _table(model) for model in models}
    unknown, known = f"{POWER_CLASS}: there is no model of the class ", f"; known: {', '.join(sorted(tables))}"
    asks = f"has(object.metadata.annotations) && {cel(MAX_SLOWDOWN)} in object.metadata.annotations"
    labelled = f"has(object.metadata.labels) && {cel(POWER_CLASS)} in object.metadata.labels"
    annotated = f"has(object.metadata.annotations) && {cel(POWER_CLASS)} in object.metadata.annotations"
    text = f"object.metadata.annotations[{cel(MAX_SLOWDOWN)}]"
    number = "(variables.text.endsWith('%') ? double(variables.text.replace('%', '')) / 100.0 : double(variables.text))"
    variables = [
        {"name": "text", "expression": text},
        {
            "name": "class",
            "expression": f"({labelled}) ? object.metadata.labels[{cel(POWER_CLASS)}] : "
            f"(({annotated}) ? object.metadata.annotations[{cel(POWER_CLASS)}] : '')",
        },
        {"name": "models", "expression": cel(tables)},
        {"name": "readable", "expression": f"variables.text.matches({cel(FORM)})"},
        {
            "name": "fitting",
            "expression": "variables.readable && variables.class in variables.models ? "
            f"variables.models[variables.class].filter(p, p[0] <= {number} + 0.000001) : [[0.0]].filter(p, false)",
        },
        {"name": "cards", "expression": f"object.spec.containers.filter(c, {_asks_any('c', GPUS)})"},
    ]
    first = f"has(object.spec.initContainers) && object.spec.initContainers.exists(c, {_asks_any('c', GPUS)})"
    said = f"object.spec.containers.exists(c, {_asks_any('c', POWER_RESOURCES)})"
    watts = "int(variables.fitting[variables.fitting.size() - 1][1])"
    each = " + ".join(
        f"({cel(gpu)} in c.resources.limits ? quantity(string(c.resources.limits[{cel(gpu)}])).asInteger() : 0)"
        for gpu in GPUS
    )
    limits = f"{{{cel(POWER)}: string({watts} * ({each}))}}"
    because = f"variables.class + ' at ' + variables.text + ': ' + string({watts}) + ' W of each GPU'"
    change = (
        f"Object{{metadata: Object.metadata{{annotations: {{{cel(POWER_BECAUSE)}: {because}}}}}, "
        "spec: Object.spec{containers: variables.cards.map(c, Object.spec.containers{name: c.name, "
        f"resources: Object.spec.containers.resources{{limits: {limits}, requests: {limits}}}}})}}}}"
    )
    matched = {
        "matchConstraints": PODS_CREATED,
        "matchConditions": [
            {"name": "asks", "expression": asks},
            {"name": "asks-for-no-watts-itself", "expression": f"!({said})"},
        ],
        "failurePolicy": "Fail",
        "variables": variables,
    }
    mutation = {"patchType": "ApplyConfiguration", "applyConfiguration": {"expression": _only_if_it_can(change)}}
    checks = [
        ("variables.readable", f"'{MAX_SLOWDOWN}: ' + variables.text + ' is no slowdown: write 5% or 0.05'"),
        (
            "variables.class in variables.models",
            f"{cel(unknown)} + variables.class + {cel(known)}",
        ),
        (
            "!variables.readable || !(variables.class in variables.models) || variables.fitting.size() > 0",
            f"'{MAX_SLOWDOWN}: the model of ' + variables.class + ' says that no cap keeps ' + variables.text",
        ),
        (f"!({first})", f"'{MAX_SLOWDOWN}: an init container has GPUs too: ask for watts (colocate.io/power) instead'"),
        ("variables.cards.size() > 0", f"'{MAX_SLOWDOWN}: no container has a limit of {' or '.join(GPUS)}'"),
    ]
    validations = [{"expression": e, "messageExpression": m, "reason": "Invalid"} for e, m in checks]
    return [
        _made("MutatingAdmissionPolicy", {**matched, "mutations": [mutation], "reinvocationPolicy": "Never"}),
        _made("MutatingAdmissionPolicyBinding", {"policyName": NAME}),
        _made("ValidatingAdmissionPolicy", {**matched, "validations": validations}),
        _made("ValidatingAdmissionPolicyBinding", {"policyName": NAME, "validationActions": ["Deny"]}),
    ]


def _only_if_it_can(change: str) -> str:
    """What cannot be turned into watts is left as it is, for the validation to say why."""
    return f"variables.fitting.size() > 0 && variables.cards.size() > 0 ? {change} : Object{{}}"


def _table(model: PowerModel) -> list[list[float]]:
    """Slowdown and watts, for those that a cap keeps."""
    found = ((slowdown, watts_for(model, slowdown)) for slowdown in SLOWDOWNS)
    return [[slowdown, float(watts)] for slowdown, watts in found if watts is not None]


def _asks_any(container: str, resources: Sequence[str]) -> str:
    """CEL: whether a container has a limit of one of these."""
    limits = f"{container}.resources.limits"
    there = " || ".join(f"{cel(name)} in {limits}" for name in resources)
    return f"has({container}.resources) && has({limits}) && ({there})"


def _made(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": VERSION, "kind": kind, "metadata": {"name": NAME}, "spec": spec}
