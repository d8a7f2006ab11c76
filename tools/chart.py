"""Writes the templates of manifests/helm/colocate from manifests/base: `python -m tools.chart`.

The manifests are the only source: a template is one of them with a value where an operator may want another. With the
default values the chart is what `kubectl apply -k manifests/base` applies.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

MANIFESTS = Path(__file__).resolve().parent.parent / "manifests"
CHART = MANIFESTS / "helm" / "colocate"


class Value(NamedTuple):
    """A text of a manifest that becomes a value of the chart, and how often it is there."""

    text: str
    template: str
    times: int = 1


def _resources(requests: str, limits: str, of: str) -> Value:
    text = f"resources:\n          requests: {requests}\n          limits: {limits}"
    return Value(text, f"resources: {{{{ toJson .Values.{of}.resources }}}}")


def _image(container: str) -> Value:
    text = f"      containers:\n      - name: {container}\n        image: colocate:0.1.0\n"
    template = f"""\
      {{{{- with .Values.imagePullSecrets }}}}
      imagePullSecrets: {{{{ toJson . }}}}
      {{{{- end }}}}
      containers:
      - name: {container}
        image: {{{{ .Values.image }}}}
        {{{{- with .Values.imagePullPolicy }}}}
        imagePullPolicy: {{{{ . }}}}
        {{{{- end }}}}
"""
    return Value(text, template)


_POLICY = '(.Values.policy | default (dict "http" (dict "host" "0.0.0.0")))'
_PROBES = """\
        readinessProbe: {httpGet: {path: /readyz, port: http}}
        livenessProbe: {httpGet: {path: /healthz, port: http}, initialDelaySeconds: 30, periodSeconds: 20}
"""
_PORTS = "        ports: [{name: http, containerPort: 9464}]\n"
_PROBED = f"""\
        {{{{- $http := {_POLICY}.http | default dict }}}}
        {{{{- if and (ne (toString $http.enabled) "false") (ne (toString $http.host) "127.0.0.1") }}}}
        ports: [{{name: http, containerPort: {{{{ $http.port | default 9464 }}}}}}]
{_PROBES}\
        {{{{- end }}}}
"""
"""Kubelet asks where the policy has the agent listen, if it does."""

TEMPLATES: dict[str, tuple[str, str, tuple[Value, ...]]] = {
    "namespace.yaml": ("controller/namespace.yaml", ".Values.namespace.create", ()),
    "colocationpolicies.yaml": ("crd/colocationpolicies.yaml", "", ()),
    "nodecolocations.yaml": ("crd/nodecolocations.yaml", "", ()),
    "gangplans.yaml": ("crd/gangplans.yaml", "", ()),
    "powerbudgets.yaml": ("crd/powerbudgets.yaml", "", ()),
    "controller-rights.yaml": ("rbac/controller.yaml", ".Values.controller.enabled", ()),
    "controller.yaml": (
        "controller/controller.yaml",
        ".Values.controller.enabled",
        (
            Value("replicas: 2", "replicas: {{ .Values.controller.replicas }}"),
            _image("controller"),
            _resources("{cpu: 200m, memory: 200Mi}", "{memory: 1Gi}", "controller"),
        ),
    ),
    "publication.yaml": (
        "base/publication.yaml",
        "",
        (
            Value("replicas: 2", "replicas: {{ .Values.publication.replicas }}"),
            _image("publication"),
            _resources("{cpu: 50m, memory: 96Mi}", "{memory: 256Mi}", "publication"),
        ),
    ),
    "agent.yaml": (
        "base/agent.yaml",
        "",
        (
            Value("      http: {host: 0.0.0.0}\n", f"      {{{{- toYaml {_POLICY} | nindent 6 }}}}\n"),
            Value(_PORTS + _PROBES, _PROBED),
            Value("maxUnavailable: 10%", "maxUnavailable: {{ .Values.agent.maxUnavailable }}"),
            Value("nodeSelector: {kubernetes.io/os: linux}", "nodeSelector: {{ toJson .Values.agent.nodeSelector }}"),
            Value("tolerations: [{operator: Exists}]", "tolerations: {{ toJson .Values.agent.tolerations }}"),
            _image("agent"),
            Value("--node, $(NODE_NAME)]", "--node, $(NODE_NAME){{ if .Values.agent.shadow }}, --shadow{{ end }}]"),
            _resources("{cpu: 50m, memory: 128Mi}", "{memory: 512Mi}", "agent"),
        ),
    ),
}
"""File of the chart -> manifest, the condition under which it is there, and its values."""


def template(name: str) -> str:
    """The text of a template. Raises ValueError where a manifest has changed, so that a value is no longer in it."""
    source, condition, values = TEMPLATES[name]
    text = (MANIFESTS / source).read_text()
    if "{{" in text:
        raise ValueError(f"{source}: Helm would take its {{{{ for a template")
    for value in values:
        if text.count(value.text) != value.times:
            raise ValueError(f"{source}: {value.text!r} is there {text.count(value.text)} times, not {value.times}")
        text = text.replace(value.text, value.template)
    head = f"{{{{- /* python -m tools.chart wrote this from manifests/{source} */}}}}\n"
    return f"{head}{{{{- if {condition} }}}}\n{text}{{{{- end }}}}\n" if condition else head + text


def main() -> None:
    """Write all of them."""
    folder = CHART / "templates"
    folder.mkdir(parents=True, exist_ok=True)
    for name in TEMPLATES:
        (folder / name).write_text(template(name))


if __name__ == "__main__":
    main()
