"""Records: merge patches, rotation, a full disk, torn lines, and replay byte for byte."""

import asyncio
import gzip

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colocate.actuate.journal import Journal
from colocate.agent.loop import Agent
from colocate.cli.main import main
from colocate.errors import BadInput, StateTooNew
from colocate.kernelmodel import ModelKernel
from colocate.model import kernels
from colocate.policy.schema import (
    BatchPolicy,
    ColocationPolicy,
    CpuPolicy,
    PolicySpec,
    RecordPolicy,
    Selector,
    ServicePolicy,
)
from colocate.report.evaluate import Compared, Report, add_energy, evaluate, to_rows, verdict_of
from colocate.report.page import write_report
from colocate.report.record import Recorder, apply_patch, merge_patch, read_full, read_lines, segments
from colocate.report.replay import replay
from colocate.snapshot import Card, CardUser, Latency, Objective

JSON = st.recursive(
    st.one_of(st.booleans(), st.integers(), st.text(max_size=5), st.lists(st.integers(), max_size=3)),
    lambda children: st.dictionaries(st.text(max_size=3), children, max_size=4),
    max_leaves=20,
)
OBJECTS = st.dictionaries(st.text(max_size=3), JSON, max_size=6)


@given(OBJECTS, OBJECTS)
def test_a_patch_turns_the_old_into_the_new(old, new):
    assert apply_patch(old, merge_patch(old, new)) == new


@given(OBJECTS)
def test_nothing_changed_is_an_empty_patch(value):
    assert merge_patch(value, value) == {}


def a_service_and_a_hog(records):
    """A machine, and the policy by which they are governed."""
    kernel = ModelKernel(version=2)
    for path in ("/web", "/nightly"):
        kernel.mkdir("unified", path)
    kernel.write("unified", "/", "cgroup.subtree_control", "+cpu +cpuset +memory")
    kernel.spawn("hog", "/nightly", command="nightly")
    spec = PolicySpec(
        services=(ServicePolicy(name="web", selector=Selector(cgroup="/web")),),
        batch=(BatchPolicy(name="nightly", selector=Selector(cgroup="/nightly")),),
        records=records,
    )
    return kernel, spec


def one_card(kernel, targets):
    """The service has a fifth of it, batch three."""
    shares = {"service": CardUser(percent=20, sensor="cpu"), "batch": CardUser(percent=60, drains=((1.0, 0.0005),) * 5)}
    users = {t.id: shares[t.tier] for t in targets if t.tier in shares}
    return {"GPU-0": Card(uuid="GPU-0", at_seconds=kernel.monotonic(), percent=80, users=users, watts=250.0)}


def live(
    directory, ticks=30, backend="numpy", policy=None, arms=(), on_tick=None, later=None, beyond=0, late=30, cards=False
):
    """An agent's life on the kernel model, recorded."""
    kernel, spec = a_service_and_a_hog(policy or RecordPolicy(keyframe_every=7))
    (directory / "journal").mkdir(parents=True, exist_ok=True)
    recorder = Recorder(directory / "records", spec.records, backend)
    agent = Agent(
        kernel,
        ColocationPolicy(spec=spec),
        kernels.load(jit=backend == "numba"),
        Journal(directory / "journal", "boot"),
        recorder=recorder,
        clock=kernel,
    )
    agent.observer.objectives["web"] = Objective(0.02, 10, 3.0)
    if cards:
        agent.observer.cards = lambda targets: one_card(kernel, targets)
    agent.open()

    async def run():
        good = bad = 0.0
        for i in range(ticks):
            if arms:
                arm = arms[i * len(arms) // ticks]
                changed = i * len(arms) // ticks != (i - 1) * len(arms) // ticks
                recorder.arm, recorder.window = arm, recorder.window + changed
            good += 300
            bad += late if i % 9 == 4 else 0
            past = sum(beyond for j in range(i + 1) if arms and arms[j * len(arms) // ticks] == "on" and j % 3 == 0)
            counts = (good, good + bad, good + bad + past)
            agent.scraper.readings["web"] = Latency((0.01, 0.05), counts, kernel.monotonic())
            if later is not None and i == ticks // 2:
                agent.set_policy(later)
            await agent.tick()
            await agent.writer.settle()
            if on_tick is not None:
                on_tick(i, recorder)
            kernel.advance(0.25)
        await agent.close()

    asyncio.run(run())
    return recorder


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_replay_reproduces_the_recorded_plans_byte_for_byte(tmp_path, backend):
    live(tmp_path, backend=backend)
    ticks = list(replay(tmp_path / "records"))
    assert len(ticks) == 30
    assert [t.sequence for t in ticks if not t.same] == []


def test_30_replay_reproduces_what_was_decided_of_cards(tmp_path):
    live(tmp_path, ticks=120, cards=True, late=0)
    ticks = list(replay(tmp_path / "records"))
    assert [t.sequence for t in ticks if not t.same] == []
    assert any(t.decided.get("pulses") for t in ticks), "batch was gated"
    assert {"gpu GPU-0", "cpu", "memory"} <= set(ticks[-1].decided["verdicts"])


def test_replay_can_start_at_any_keyframe(tmp_path):
    live(tmp_path)
    (segment,) = segments(tmp_path / "records")
    lines = segment.read_bytes().splitlines(keepends=True)
    segment.write_bytes(b"".join(lines[10:]))
    ticks = list(replay(segment))
    assert ticks[0].sequence == 17
    assert all(t.same for t in ticks)


def test_replay_follows_a_policy_that_was_changed_while_the_agent_ran(tmp_path):
    web = ServicePolicy(name="web", selector=Selector(cgroup="/web"))
    later = ColocationPolicy(spec=PolicySpec(services=(web,), cpu=CpuPolicy(floor=0.5, hold_down=1.0)))
    live(tmp_path, policy=RecordPolicy(keyframe_every=10**6), later=later)
    assert [t.sequence for t in replay(tmp_path / "records") if not t.same] == []
    assert len([line for s in segments(tmp_path / "records") for line in read_lines(s) if "keyframe" in line]) == 2


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda text: gzip.compress(text)[:-200], id="a compressed file that was cut off"),
        pytest.param(lambda _: b"no gzip at all\n" * 9, id="no compressed file"),
        pytest.param(lambda text: gzip.compress(text + b'{"another": "shape"}\n'), id="a line of another shape"),
        pytest.param(lambda text: gzip.compress(text + b"[1, 2]\n"), id="a line that is no object"),
    ],
)
def test_a_spoilt_segment_gives_what_is_whole_in_it(tmp_path, spoil):
    live(tmp_path)
    (segment,) = segments(tmp_path / "records")
    whole = list(read_lines(segment))
    packed = segment.with_suffix(".jsonl.gz")
    packed.write_bytes(spoil(segment.read_bytes()))
    segment.unlink()
    found = list(read_lines(packed))
    assert found == whole[: len(found)]
    assert all(t.same for t in replay(packed))


def test_another_policy_decides_otherwise(tmp_path):
    live(tmp_path)
    other = ColocationPolicy(spec=PolicySpec(cpu=CpuPolicy(floor=0.5)))
    assert not all(t.same for t in replay(tmp_path / "records", other))


def test_a_torn_last_line_is_tolerated(tmp_path):
    live(tmp_path)
    (segment,) = segments(tmp_path / "records")
    segment.write_bytes(segment.read_bytes()[:-40])
    assert len(list(read_lines(segment))) == 29
    assert len(list(replay(tmp_path / "records"))) == 29


def test_segments_are_rotated_compressed_and_capped(tmp_path):
    policy = RecordPolicy(max_bytes=60_000, segment_bytes=15_000, keyframe_every=10**6)
    live(tmp_path, ticks=300, policy=policy)
    found = segments(tmp_path)
    assert any(s.suffix == ".gz" for s in found)
    assert sum(s.stat().st_size for s in found) <= 60_000
    with gzip.open(found[0]) as first:
        assert b'"keyframe"' in first.readline()
    assert all(t.same for t in replay(tmp_path))


def test_a_full_disk_degrades_to_memory_and_heals(tmp_path):
    def full(i, recorder):
        target = tmp_path / "records"
        if i == 10:
            recorder._disk._file.close()
            target.rename(tmp_path / "away")
            target.write_text("in the way")
            recorder._disk.size = 10**9
        if i == 20:
            target.unlink()
            (tmp_path / "away").rename(target)

    recorder = live(tmp_path, on_tick=full)
    assert recorder.lost_lines >= 9
    assert len(recorder.recent) == 30
    assert recorder.degraded == ""
    assert all(t.same for t in replay(tmp_path))


def test_records_of_a_newer_version_are_refused_by_name(tmp_path):
    live(tmp_path)
    (segment,) = segments(tmp_path)
    segment.write_bytes(segment.read_bytes().replace(b'"version":2,"colocate"', b'"version":99,"colocate"'))
    with pytest.raises(StateTooNew, match="records-"):
        list(read_full(segment))


def test_a_directory_without_records_is_named(tmp_path):
    with pytest.raises(BadInput, match="no records"):
        segments(tmp_path)


# -- the report ---------------------------------------------------------------------------------------------------


def test_without_windows_there_is_no_verdict(tmp_path):
    live(tmp_path)
    report = evaluate(tmp_path)
    assert not report.supported
    assert "nothing can be said" in report.verdict


def test_what_batch_had_of_gpus_is_reported(tmp_path):
    live(tmp_path, ticks=60, cards=True)
    report = evaluate(tmp_path)
    card = report.gpus["GPU-0"]
    assert {k: card[k] for k in ("busy", "services", "batch")} == {"busy": 0.8, "services": 0.2, "batch": 0.6}
    assert card["batch_hours"] == pytest.approx(0.6 * card["hours"], rel=0.05)
    assert ["GPU-0 batch", "ratio", "0.6", "", "mean", "", "", ""] in to_rows(report)[1]


def test_the_energy_of_gpus_goes_to_whose_kernels_ran_and_sums_up_to_the_meter(tmp_path):
    live(tmp_path, ticks=60, cards=True)
    report = evaluate(tmp_path, carbon_intensity=400.0)
    card = report.gpus["GPU-0"]
    assert card["joules"] == pytest.approx(250.0 * card["hours"] * 3600, rel=0.05)
    parts = [card[f"{kind}_joules"] for kind in ("services", "batch", "idle")]
    assert parts == pytest.approx([0.2 * card["joules"], 0.6 * card["joules"], 0.2 * card["joules"]], rel=1e-3)
    assert report.energy["gpu_kwh"] == pytest.approx(card["joules"] / 3.6e6, abs=1e-6)
    assert report.energy["grams_co2"] == pytest.approx(400 * card["joules"] / 3.6e6, rel=0.01)
    names = [row[:2] for row in to_rows(report)[1]]
    assert ["GPU-0 batch_energy", "J"] in names
    assert ["batch_grams_co2", "g"] in names


@given(st.floats(0.0, 2000.0), st.floats(0.0, 3.0), st.floats(0.0, 3.0), st.floats(0.01, 10.0))
def test_what_a_card_drew_is_given_to_somebody_or_nobody_and_nothing_else(watts, services, batch, seconds):
    """Samples of several processes may add up to more than the whole time."""
    card: dict[str, float] = {}
    add_energy(card, {"watts": watts, "services": services, "batch": batch}, seconds)
    parts = [card[f"{kind}_joules"] for kind in ("services", "batch", "idle")]
    assert sum(parts) == pytest.approx(card["joules"], abs=1e-9)
    assert min(parts) >= -1e-9


def test_without_meters_there_is_no_energy(tmp_path):
    live(tmp_path, ticks=30)
    assert evaluate(tmp_path, carbon_intensity=400.0).energy == {}


def test_a_switchback_compares_windows_with_intervals(tmp_path):
    arms = ["on", "off-frozen"] * 6
    live(tmp_path, ticks=240, arms=arms, late=2)
    report = evaluate(tmp_path, wash_out=1.0, machines=100)
    assert report.arms == {"on": 6, "off-frozen": 6}
    gain = report.compared[0]
    assert gain.name == "CPU utilization"
    assert gain.low is not None
    assert gain.low > 20
    assert {c.name for c in report.compared} >= {"batch work", "web p50", "web p99"}
    assert report.machines_saved is not None
    assert report.supported


def test_a_service_whose_p99_is_beyond_its_buckets_is_not_said_to_notice_nothing(tmp_path):
    arms = ["on", "off-frozen", "off-frozen", "on"] * 3
    live(tmp_path, ticks=240, arms=arms, beyond=100)
    report = evaluate(tmp_path, wash_out=1.0)
    assert report.supported
    assert "judge web p99: the data do not support a verdict on services" in report.verdict


def test_too_few_windows_support_no_verdict(tmp_path):
    live(tmp_path, ticks=80, arms=["on", "off-frozen"])
    report = evaluate(tmp_path, wash_out=1.0)
    assert not report.supported
    assert "do not support a verdict" in report.verdict


def tail(name, change, low, high):
    return Compared(f"{name} p99", "ms", 10.0, 10.0, change, low, high, "ratio")


@pytest.mark.parametrize(
    ("tails", "says"),
    [
        pytest.param([tail("web", 1.01, 0.99, 1.04)], "without the services noticing: web p99 1.01", id="unhurt"),
        pytest.param(
            [tail("web", 1.01, 0.99, 1.04), tail("db", 1.0, 0.6, 2.5)], "do not show whether", id="one is uncertain"
        ),
        pytest.param([tail("web", 1.01, 0.99, 1.04), tail("db", None, None, None)], "judge db", id="one is unknown"),
        pytest.param([tail("db", None, None, None), tail("web", 1.2, 1.1, 1.3)], "at a cost: web", id="one is hurt"),
        pytest.param([], "cost to services is unknown", id="no histogram"),
    ],
)
def test_a_verdict_speaks_of_all_services(tails, says):
    gain = Compared("CPU utilization", "%", 60.0, 20.0, 40.0, 35.0, 45.0, "difference")
    report = Report(verdict="", supported=False, start_seconds=0, end_seconds=1, ticks=1, node_cores=2.0)
    report.off, report.arms, report.compared = "off-frozen", {"on": 6, "off-frozen": 6}, [gain, *tails]
    assert says in verdict_of(report)


def test_the_report_goes_out_as_page_json_and_csv(tmp_path):
    live(tmp_path, ticks=120, arms=["on", "off-frozen"] * 4)
    report = evaluate(tmp_path, wash_out=1.0)
    write_report(report, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert report.verdict.split(";")[0][:40] in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert msgspec.json.decode(msgspec.json.encode(report))["ticks"] == 120
    columns, rows = to_rows(report)
    assert all(len(row) == len(columns) for row in rows)


@pytest.mark.parametrize("named", [True, False], ids=["by --state-dir", "the agent's own"])
def test_the_command_reports_of_an_agent_s_records(named, tmp_path, monkeypatch, capsys):
    live(tmp_path, ticks=10)
    monkeypatch.setenv("COLOCATE_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("COLOCATE_STATE_DIR", str(tmp_path / "nowhere" if named else tmp_path))
    assert main(["report", "-o", "json", *(["--state-dir", str(tmp_path)] if named else [])]) == 0
    assert msgspec.json.decode(capsys.readouterr().out)["ticks"] == 10
