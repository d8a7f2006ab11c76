"""Slowdown under power caps: the model and its caps on public sweeps, and the talk's numbers beside them."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocate.errors import BadInput
from colocate.model.power import BadSweepError, Sample, falling, fit, learn, left_out, predict, recommend, sweep_of
from colocate.power.seed import fit_seed
from colocate.power.sweeps import Run, read_runs

DATA = Path(__file__).parents[1] / "data" / "zeus-power-sweeps.csv"
LEAST_RANGE = 1.1
"""Sweeps whose slowest cap takes so many times the fastest; others are noise."""


def sweeps(path, device=""):
    found = defaultdict(list)
    with path.open() as file:
        for row in csv.DictReader(file):
            key = tuple(row.get(n, device) for n in ("device", "dataset", "network", "batch_size", "optimizer"))
            found[key].append(
                Sample(float(row["power_limit"]), float(row["time_per_epoch"]), float(row["average_power"]))
            )
    return {k: s for k, s in found.items() if max(x.seconds for x in s) >= LEAST_RANGE * min(x.seconds for x in s)}


def of(device):
    return {k: s for k, s in sweeps(DATA).items() if k[0] == device}


def judge(found, slowdown=0.05):
    """Median error on caps that were left out, caps that were far off, how many were tried, median energy saved."""
    errors, off, tried, energy = [], 0, 0, []
    for samples in found.values():
        sweep = sweep_of(samples)
        errors += np.abs(left_out(sweep, "isotonic")).tolist()
        whole = recommend(learn(samples), slowdown)
        assert sweep.caps[0] <= whole.cap_watts <= sweep.caps[-1]
        assert whole.cap_watts >= sweep.floor
        energy.append(whole.energy_saved_ratio or 0.0)
        for i in range(1, sweep.caps.size - 1):
            less = recommend(learn([s for s in samples if s.cap != sweep.caps[i]]), slowdown)
            truth = np.interp(less.cap_watts, sweep.caps, sweep.slowdowns)
            assert np.isfinite(less.cap_watts)
            off += bool(truth > slowdown + 0.01)
            tried += 1
    return float(np.median(errors)), off / tried, float(np.median(energy))


@pytest.mark.parametrize(("device", "most_error"), [("v100", 0.01), ("a40", 0.025)])
def test_s2_5_better_than_the_script_on_caps_it_was_not_shown(device, most_error):
    """The talk's script is off by 3.6 and 11.7 %, and a quarter of its caps are too low by more than a point."""
    error, off, energy = judge(of(device))
    assert error <= most_error
    assert off <= 0.05
    assert energy >= 0.10


TRACES = os.environ.get("COLOCATE_TRACES", "")


@pytest.mark.slow
@pytest.mark.parametrize("device", ["v100", "p100", "a40", "rtx6000"])
def test_s2_5_on_all_public_sweeps(device):
    path = Path(TRACES or "/nowhere") / "zeus-nsdi23" / f"summary_power_{device}.csv"
    if not path.exists():
        pytest.skip("zeus-nsdi23/summary_power_*.csv (ml-energy/zeus) in COLOCATE_TRACES")
    error, off, energy = judge(sweeps(path, device))
    assert error <= (0.025 if device == "a40" else 0.01)
    assert off <= 0.05
    assert energy >= 0.09


def runs_of(*key):
    [samples] = [s for k, s in sweeps(DATA).items() if k[:4] == key]
    return [Run("", s.cap, s.seconds, (s.watts or 0.0) * s.seconds) for s in samples]


def test_s2_4_the_talks_coefficients_come_out_as_from_its_script():
    found = fit_seed(runs_of("v100", "squad", "bert_base_uncased", "56"))
    assert found.coefficients == pytest.approx([0.879, 3.08, 0.747, -0.020], abs=5e-3)
    assert found.r2 == pytest.approx(0.967, abs=5e-4)
    assert found.cap(0.05) == pytest.approx(201.6, abs=0.1)


@pytest.mark.parametrize("key", sorted(k for k in sweeps(DATA)), ids=" ".join)
def test_the_talks_family_as_a_convex_problem_fits_as_well(key):
    samples = sweeps(DATA)[key]
    sweep, seed = sweep_of(samples), fit_seed([Run("", s.cap, s.seconds, None) for s in samples])
    ours = np.sum((predict(fit(sweep, "quadratic"), sweep.caps) - sweep.slowdowns) ** 2)
    baseline = sweep.seconds.min() / sweep.seconds[-1]  # the talk counts from the fastest run
    theirs = (1.0 - seed.r2) * np.sum(
        (sweep.seconds / sweep.seconds.min() - np.mean(sweep.seconds) / sweep.seconds.min()) ** 2
    )
    assert ours <= theirs * baseline**2 * 1.02 + 1e-9


CURVE = st.lists(st.floats(0.0, 3.0), min_size=3, max_size=9)


@given(CURVE)
@settings(deadline=None)
def test_what_is_modelled_never_rises_with_the_cap_and_stays_within_what_was_measured(values):
    caps = [100.0 + 25.0 * i for i in range(len(values))]
    model = learn(
        [Sample(c, 100.0 * (1.0 + v)) for c, v in zip(caps, sorted(values, reverse=True), strict=True)], kind="isotonic"
    )
    s = predict(model.fit, model.grid)
    assert np.all(np.diff(s) <= 1e-9)
    assert s.max() <= model.sweep.slowdowns.max() + 1e-9
    assert s.min() >= model.sweep.slowdowns.min() - 1e-9


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30))
def test_the_nearest_falling_sequence_falls_and_keeps_the_mean(values):
    found = falling(np.array(values))
    assert np.all(np.diff(found) <= 1e-6)
    assert found.mean() == pytest.approx(np.mean(values), abs=1e-6)


@given(CURVE, st.floats(0.0, 1.0))
@settings(deadline=None, max_examples=30)
def test_a_recommended_cap_is_of_the_sweep_and_a_greater_slowdown_needs_no_greater_cap(values, slowdown):
    samples = [Sample(100.0 + 25.0 * i, 100.0 * (1.0 + v)) for i, v in enumerate(values)]
    model = learn(samples)
    first, second = recommend(model, slowdown), recommend(model, slowdown + 0.1)
    assert 100.0 <= second.cap_watts <= first.cap_watts <= samples[-1].cap


def test_repeats_tell_how_much_runs_differ():
    def sample(noise):
        return [
            Sample(c, 100.0 * (1.0 + s) * f)
            for c, s in ((100, 0.4), (150, 0.1), (200, 0.03), (250, 0.0))
            for f in (1 - noise, 1.0, 1 + noise)
        ]

    calm, rough = recommend(learn(sample(0.001)), 0.05), recommend(learn(sample(0.02)), 0.05)
    assert rough.cap_watts > calm.cap_watts
    assert rough.high - rough.low > calm.high - calm.low


def test_caps_that_the_hardware_did_not_meet_are_not_recommended():
    samples = [
        Sample(100, 101.0, 121.0),
        Sample(150, 100.5, 149.0),
        Sample(200, 100.2, 180.0),
        Sample(300, 100.0, 182.0),
    ]
    assert recommend(learn(samples), 0.05).cap_watts == 150.0


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        pytest.param([], "0 cap", id="nothing"),
        pytest.param([Sample(200, 10.0), Sample(200, 11.0)], "1 cap", id="one cap"),
        pytest.param([Sample(-5, 10.0), Sample(200, 11.0)], "-5 W is impossible", id="a cap below nothing"),
        pytest.param([Sample(100, 0.0), Sample(200, 11.0)], "0 s at 100 W", id="a run of no time"),
        pytest.param([Sample(100, float("nan")), Sample(200, 11.0)], "nan s", id="a time that is no number"),
    ],
)
def test_a_sweep_that_says_nothing(samples, said):
    with pytest.raises(BadSweepError, match=said):
        learn(samples)


def test_a_constant_sweep_takes_its_least_cap():
    assert recommend(learn([Sample(c, 7.0) for c in (100, 150, 200, 250)]), 0.05).cap_watts == 100.0


SIGNALS = ("TIME", "GPU_POWER_LIMIT_CONTROL", "GPU_ENERGY", "CPU_ENERGY", "DRAM_ENERGY")
HEADER = ",".join(f'"{s}-board-0"' for s in (*SIGNALS, "GPU_CORE_FREQUENCY_STATUS", "CPU_FREQUENCY_STATUS"))


def session(path, cap, seconds, watts):
    """As geopmsession writes it, a line a second."""
    count = int(seconds) + 1
    rows = [f"{1000 + i},{cap},{5e6 + watts * i},{1e6 + 90 * i},{2e5 + 10 * i},1.4e9,2.1e9" for i in range(count)]
    path.write_text("\n".join([HEADER, *rows]) + "\n")
    return path


def power(*arguments):
    command = [sys.executable, "-m", "colocate.cli.main", "power", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_s2_4_the_talks_files_are_read_and_answered_as_its_script_does(tmp_path):
    """Seven caps for four GPUs; the numbers are the talk's family exactly, with x0 = 1."""
    caps = range(600, 1201, 100)
    files = [session(tmp_path / f"{c}.csv", c, 100 * (1 + 2 * (1 - c / 1200) ** 2), 0.8 * c) for c in caps]
    found = power("fit", *files, "--model", "seed", "--power-at-slowdown", "0.05")
    assert found.returncode == 0, found.stderr
    first, second = found.stdout.splitlines()
    assert first.startswith("Coefficients [")
    assert second.endswith(" W")
    assert found.stderr.startswith("Training R2 Score: 0.99")
    assert float(second.split()[0]) == pytest.approx(1200 * (1 - (0.05 / 2) ** 0.5), rel=0.02)
    [run, *_] = read_runs([files[0]])
    assert (run.cap_watts, run.seconds) == (600.0, 150.0)
    assert run.joules == pytest.approx(150 * (480 + 100))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param(HEADER.replace("GPU_ENERGY", "OTHER"), "no column GPU_ENERGY", id="a column is missing"),
        pytest.param(HEADER + "\n1,2,3,4,5,6,7\n", "1 line(s) of samples", id="a run of one line"),
        pytest.param(
            HEADER + "\n1,2,3,4,5,6,7\n2,2,3,4\n", "line 3: it has 4 of 7 fields", id="a file that is cut off"
        ),
        pytest.param(HEADER + "\n1,2,3,4,5,6,7\n1,2,3,4,5,6,7\n", "its times do not rise", id="a clock that stands"),
        pytest.param(HEADER + "\n1,2,9,4,5,6,7\n2,2,3,4,5,6,7\n", "was reset", id="a counter that was reset"),
        pytest.param(HEADER + "\n1,2,3,x,5,6,7\n2,2,3,4,5,6,7\n", "CPU_ENERGY-board-0 is 'x'", id="no number"),
        pytest.param("", "it is empty", id="an empty file"),
        pytest.param("power_limit;time_per_epoch\n100;5\n", "semicolons", id="semicolons"),
        pytest.param("power_limit,time_per_epoch,power_limit\n1,2,3\n", "power_limit 2 times", id="a column twice"),
        pytest.param("power_limit,time_per_epoch\n100,inf\n", "the run took inf s", id="an endless run"),
        pytest.param("power_limit,time_per_epoch\n100000,5\n", "may be milliwatts", id="milliwatts"),
        pytest.param(
            "power_limit,time_per_epoch,average_power\n100,5,-95\n",
            "line 2: average_power is -95",
            id="less than no draw",
        ),
        pytest.param("power_limit,time_per_epoch\n100," + "5" * 140_000, "field larger than", id="an endless field"),
        pytest.param(
            "power_limit,time_per_epoch\n100,5\n200\n", "line 3: it has 1 of 2 fields", id="a table that is cut off"
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_what_is_wrong(tmp_path, text, said):
    path = tmp_path / "run.csv"
    path.write_text(text)
    with pytest.raises(BadInput, match=r"run\.csv:") as caught:
        read_runs([path])
    assert said in str(caught.value)


def test_a_geopm_report_is_a_run(tmp_path):
    path = tmp_path / "run.report"
    path.write_text(
        "Profile: p\nHosts:\n  a:\n    Application Totals:\n      runtime (s): 10\n      GPU_POWER_LIMIT_CONTROL: 600\n"
        "      package-energy (J): 900\n      gpu-energy (J): 5000\n      dram-energy (J): 100\n"
    )
    assert read_runs([path]) == [Run(str(path), 600.0, 10.0, 6000.0, 5000.0)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("Hosts: {a: {Application Totals: }}", "no GEOPM report", id="totals without a word"),
        pytest.param("[" * 5000, "no GEOPM report", id="a bottomless list"),
        pytest.param(
            "Hosts: {a: {Application Totals: {GPU_POWER_LIMIT_CONTROL: 600, runtime (s): abc}}}",
            "a: runtime (s) is 'abc'",
            id="a time that is a word",
        ),
        pytest.param(
            "Hosts: {a: {Application Totals: {GPU_POWER_LIMIT_CONTROL: [600], runtime (s): 3}}}",
            "a: GPU_POWER_LIMIT_CONTROL is [600]",
            id="a cap that is a list",
        ),
    ],
)
def test_a_report_that_cannot_be_used_is_named_with_what_is_wrong(tmp_path, text, said):
    path = tmp_path / "run.report"
    path.write_text(text)
    with pytest.raises(BadInput, match=r"run\.report: ") as caught:
        read_runs([path])
    assert said in str(caught.value)


TIMES = {100: 130, 150: 110, 200: 103, 250: 101, 300: 100}


def run_of(tmp_path, cap, seconds, columns):
    """A run of geopmsession, whose columns are (name, watts): a limit stays, what is energy grows."""
    path = tmp_path / f"{cap}.csv"
    lines = [",".join(["TIME-board-0", *(name for name, _ in columns)])]
    lines += [
        ",".join([str(at), *(str(w if "LIMIT" in n else 1000 + w * at) for n, w in columns)]) for at in (0.0, seconds)
    ]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8-sig")
    return path


def test_what_cpus_draw_does_not_say_that_a_cap_of_gpus_was_not_met(tmp_path):
    files = [
        run_of(
            tmp_path,
            cap,
            seconds,
            [
                ("GPU_POWER_LIMIT_CONTROL-board-0", cap),
                ("GPU_ENERGY-board-0", 0.95 * cap),
                ("CPU_ENERGY-board-0", 120),
                ("DRAM_ENERGY-board-0", 15),
            ],
        )
        for cap, seconds in TIMES.items()
    ]
    model = learn([run.sample for run in read_runs(files)])
    assert model.sweep.floor == 100.0
    assert model.sweep.total == pytest.approx([0.95 * cap + 135 for cap in TIMES])
    assert 150.0 <= recommend(model, 0.1).cap_watts < 155.0


def test_of_several_gpus_and_packages_the_sum_counts(tmp_path):
    path = run_of(
        tmp_path,
        100,
        130.0,
        [
            *(("GPU_POWER_LIMIT_CONTROL-gpu-0", 100), ("GPU_POWER_LIMIT_CONTROL-gpu-1", 300)),
            *(("GPU_ENERGY-gpu-0", 50), ("GPU_ENERGY-gpu-1", 280)),
            *(("CPU_ENERGY-package-0", 5), ("CPU_ENERGY-package-1", 100)),
            *(("DRAM_ENERGY-package-0", 1), ("DRAM_ENERGY-package-1", 1)),
        ],
    )
    [run] = read_runs([path])
    assert run.cap_watts == 400.0
    assert (run.joules, run.capped_joules) == pytest.approx((437 * 130, 330 * 130))


def test_caps_that_are_means_of_readings_are_one_cap():
    caps = (100.01, 100.02, 150.01, 150.03, 200.0, 200.04, 299.97, 300.0)
    sweep = sweep_of([Sample(cap, 1.0 + 1.0 / cap) for cap in caps])
    assert [len(runs) for runs in sweep.repeats] == [2, 2, 2, 2]
    assert sweep.caps == pytest.approx([100.015, 150.02, 200.02, 299.985])


def test_an_expected_slowdown_is_against_the_greatest_cap():
    found = recommend(learn([Sample(100, 100), Sample(150, 110), Sample(200, 120), Sample(300, 130)]), 0.05)
    assert found.slowdown == pytest.approx(0.0)
    assert found.low <= found.slowdown <= found.high


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("power_limit,time_per_epoch\n" + "".join(f"{c},{t}\n" for c, t in TIMES.items()))
    return path


def test_runs_of_another_job_are_no_repeats(tmp_path, table):
    other = tmp_path / "b.csv"
    other.write_text("power_limit,time_per_epoch\n100,1300\n300,1260\n")
    with pytest.raises(BadInput, match="put all runs of a sweep into it"):
        read_runs([table, other])


def test_the_choice_that_is_offered_keeps_what_was_chosen():
    with pytest.raises(BadInput, match=r"choose one, e\.g\. --where .*network=resnet50") as caught:
        read_runs([DATA], {"network": "resnet50"})
    chosen = dict(part.split("=") for part in str(caught.value).rpartition("--where ")[2].split(","))
    assert len(read_runs([DATA], chosen)) > 2


def test_no_input_is_overwritten_by_the_report(table):
    before = table.read_text()
    found = power("recommend", table, "--slowdown", "10%", "--report", table)
    assert (found.returncode, table.read_text()) == (2, before)
    assert "would be overwritten" in found.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        pytest.param(["recommend", DATA], 2, "--slowdown", id="no slowdown"),
        pytest.param(["recommend", DATA, "--slowdown=-1%"], 2, "no slowdown", id="a slowdown below nothing"),
        pytest.param(["fit", DATA], 2, "68 sweeps: choose one", id="a table of many"),
        pytest.param(["fit", DATA, "--where", "device"], 2, "write COLUMN=VALUE", id="half a choice"),
        pytest.param(["fit", "/nowhere.csv"], 2, "cannot be read", id="no file"),
        pytest.param(
            ["fit", DATA, "--report", "/proc/x.html"], 2, "--report: /proc/x.html", id="where nobody may write"
        ),
        pytest.param(["fit", DATA, "--where", "job=a,job=b"], 2, "named twice", id="two values of a column"),
        pytest.param(["fit", DATA, "--model=seed", "--report", "x.html"], 2, "--report: the talk's", id="seed's page"),
        pytest.param(["fit", DATA, "--model=seed", "--confidence=0.9"], 2, "--confidence: ", id="seed's confidence"),
        pytest.param(["split", DATA, "--budget=400", "--where=network=no"], 2, "no line of it", id="no job is chosen"),
        pytest.param(["split", DATA, "--budget=400", "--where=jb=a"], 2, "no column jb", id="a column's name mistyped"),
    ],
)
def test_what_cannot_be_answered_ends_with_what_to_write(arguments, code, said):
    found = power(*arguments)
    assert found.returncode == code
    assert said in found.stderr


def test_a_slowdown_that_no_cap_keeps_is_said_and_is_no_success(tmp_path):
    table = tmp_path / "sweep.csv"
    rows = [(100, 14), (100, 10), (200, 13), (200, 9), (300, 12), (300, 9.5)]
    table.write_text("power_limit,time_per_epoch\n" + "".join(f"{c},{t}\n" for c, t in rows))
    found = power("recommend", table, "--slowdown", "0.1%")
    assert found.returncode in (0, 1)
    assert ("no cap of this sweep keeps" in found.stdout) == (found.returncode == 1)
