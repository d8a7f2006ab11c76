"""The policy file: exact paths, nearest names, possible numbers."""

import msgspec
import pytest

from colocate.errors import BadInput, ConfigError
from colocate.policy.file import load_policy, parse_policy, policy_of_builtins
from colocate.policy.schema import ColocationPolicy

FULL = """
apiVersion: colocate.io/v1alpha1
kind: ColocationPolicy
metadata: {name: web-node}
spec:
  tick: 500ms
  services:
  - name: web
    selector: {cgroup: /system.slice/web.service}
    slo: {p99: 20ms, url: "http://127.0.0.1:9100/metrics", metric: http_request_duration_seconds}
  - name: db
    selector: {systemdUnit: postgresql.service}
  batch:
  - name: nightly
    selector: {cgroup: /nightly}
    checkpointSignal: SIGUSR1
  cpu: {pressure: 5%, floor: 100m}
  records: {maxBytes: 64Mi}
"""


def test_a_full_policy_is_read_with_its_quantities():
    spec = parse_policy(FULL, "policy.yaml").spec
    assert (spec.tick, spec.cpu.pressure, spec.cpu.floor, spec.records.max_bytes) == (0.5, 5.0, 0.1, 64 << 20)
    assert spec.services[0].slo is not None
    assert spec.services[0].slo.p99 == 0.02


def test_an_empty_file_is_the_default_policy():
    assert parse_policy("", "policy.yaml") == ColocationPolicy()


def test_a_policy_survives_a_record():
    policy = parse_policy(FULL, "policy.yaml")
    assert policy_of_builtins(msgspec.json.decode(msgspec.json.encode(policy))) == policy


@pytest.mark.parametrize(
    ("text", "path", "hint"),
    [
        pytest.param("spec: {cpu: {presure: 3}}", "$.spec.cpu.presure", "pressure", id="a misspelt field"),
        pytest.param(
            "spec: {services: [{name: a, selector: {cgrop: x}}]}",
            "$.spec.services[0].selector.cgrop",
            "cgroup",
            id="also inside a list",
        ),
        pytest.param("spce: {}", "$.spce", "spec", id="also at the top"),
        pytest.param("spec: {tick: soon}", "$.spec.tick", "20ms", id="no duration"),
        pytest.param("spec: {tick: 0}", "$.spec.tick", "between", id="an impossible number"),
        pytest.param(
            "spec: {cpu: {pressure: 110%}}", "$.spec.cpu.pressure", "between 0 and 100", id="a percentage over 100"
        ),
        pytest.param("spec: {drift: fight}", "$.spec.drift", "", id="a word that is none of the choices"),
        pytest.param("spec: {cpu: {pressure: 0}}", "$.spec.cpu.pressure", "between", id="a threshold of nothing"),
        pytest.param(
            "spec: {batch: [{name: a, selector: {cgroup: /x}, checkpointSignal: USR1}]}",
            "$.spec.batch[0].checkpointSignal",
            "SIGUSR1",
            id="a signal that is none",
        ),
        pytest.param("kind: Pod", "$.kind", "ColocationPolicy", id="another kind"),
        pytest.param("apiVersion: v1", "$.apiVersion", "colocate.io", id="another version"),
        pytest.param(
            "spec: {services: [{name: a, selector: {}}]}",
            "$.spec.services[0].selector",
            "exactly one",
            id="a selector that selects nothing",
        ),
        pytest.param(
            "spec: {services: [{name: a, selector: {cgroup: /x, command: y}}]}",
            "$.spec.services[0].selector",
            "exactly one",
            id="a selector with two meanings",
        ),
        pytest.param(
            "spec: {services: [{name: a, selector: {cgroup: /x}}], batch: [{name: a, selector: {cgroup: /y}}]}",
            "$.spec.batch[0].name",
            "services[0]",
            id="one name for two workloads",
        ),
        pytest.param(
            "spec: {services: [{name: a, selector: {cgroup: /x}, slo: {p99: 1ms, url: ftp://x, metric: m}}]}",
            "$.spec.services[0].slo.url",
            "http",
            id="a URL that is none",
        ),
        pytest.param("spec: {nodeRoot: kubepods}", "$.spec.nodeRoot", "start it with /", id="a relative root"),
        pytest.param("spec: {nodeRoot: /a/../b}", "$.spec.nodeRoot", "without ..", id="a root that climbs"),
        pytest.param(
            "spec: {staleness: {stopTighteningAfter: 5, openAfter: 2}}",
            "$.spec.staleness.openAfter",
            "longer duration",
            id="open before it stops tightening",
        ),
        pytest.param("spec: {freeze: {maxFrozen: 0s}}", "$.spec.freeze.maxFrozen", "between", id="frozen for no time"),
        pytest.param("spec: {cpu: {reserve: 100%}}", "$.spec.cpu.reserve", "between", id="everything in reserve"),
        pytest.param(
            "spec: {records: {segmentBytes: 1}}", "$.spec.records.segmentBytes", "between", id="segments of one byte"
        ),
        pytest.param(
            "spec: {services: [{name: '', selector: {cgroup: /x}}]}", "$.spec.services[0].name", "name", id="no name"
        ),
        pytest.param(
            "spec: {services: [{name: a, selector: {command: ''}}]}",
            "$.spec.services[0].selector.command",
            "match everything",
            id="a command that every process has",
        ),
        pytest.param(
            "spec: {services: [{name: a, selector: {cgroup: x}}]}",
            "$.spec.services[0].selector.cgroup",
            "start it with /",
            id="a cgroup that is no path",
        ),
        pytest.param(
            "spec: {services: [{name: a, selector: {podSelector: {}}}]}",
            "$.spec.services[0].selector.podSelector",
            "at least one label",
            id="labels that every pod has",
        ),
        pytest.param(
            "spec: {services: [{name: a, selector: {cgroup: /x, namespace: shop}}]}",
            "$.spec.services[0].selector.namespace",
            "podSelector",
            id="a namespace without labels",
        ),
        pytest.param(
            "spec: {services: [{name: a, selector: {cgroup: /x}, slo: {p99: 1ms, url: 'http://x', metric: ''}}]}",
            "$.spec.services[0].slo.metric",
            "histogram",
            id="no metric",
        ),
        pytest.param(
            "spec: {batch: [{name: a, selector: {podSelector: {k8s-app: kube-proxy}, namespace: kube-system}}]}",
            "$.spec.batch[0].selector.namespace",
            "another namespace",
            id="batch of what runs the cluster",
        ),
        pytest.param("spec: {kubelet: {url: here}}", "$.spec.kubelet.url", "https://", id="a kubelet without a scheme"),
    ],
)
def test_a_wrong_policy_names_the_field_and_the_mend(text, path, hint):
    with pytest.raises(ConfigError) as caught:
        parse_policy(text, "policy.yaml")
    assert caught.value.path == path
    assert hint in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_key_given_twice_is_refused():
    with pytest.raises(BadInput, match="'tick' is given twice"):
        parse_policy("spec: {tick: 1s, tick: 2s}", "policy.yaml")


@pytest.mark.parametrize("text", ["[1", "- a\n- b", "just words"])
def test_what_is_no_mapping_is_refused(text):
    with pytest.raises(BadInput, match=r"policy\.yaml"):
        parse_policy(text, "policy.yaml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"nowhere\.yaml"):
        load_policy(tmp_path / "nowhere.yaml")
