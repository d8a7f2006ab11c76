"""colocate power: what a sweep of power caps says of a job, which cap keeps a slowdown, and what this node draws."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np

from colocate.cli.output import DATA_FORMS, check_file, print_data, print_table
from colocate.decide.power import BudgetTooSmallError, split_budget
from colocate.errors import BadInput
from colocate.model.power import (
    CONFIDENCE,
    BadSweepError,
    Kind,
    Model,
    Recommendation,
    falling,
    learn,
    predict,
    recommend,
    saved,
)
from colocate.power.sweeps import Run, read_runs, read_sweeps

SPLIT_POINTS = 41
CONTRADICTION = 0.05
"""A job that is so much faster under a lower cap is not explained by the cap."""
AUTO, SEED = "auto", "seed"


def power(options: argparse.Namespace) -> int:
    """Exit 1 where no cap of the sweep keeps the slowdown. Raises BadInput, HostUnfit."""
    report = check_file("--report", options.report, options.files) if options.report else None
    if options.model == SEED and (report is not None or options.confidence is not None):
        given = "--report" if report is not None else "--confidence"
        raise BadInput(f"{given}: the talk's model has none: leave out --model seed")
    confidence = CONFIDENCE if options.confidence is None else options.confidence
    runs = read_runs(map(Path, options.files), _where(options.where))
    try:
        if options.model == SEED:
            return _seed(options, runs)
        model = learn([run.sample for run in runs], kind=None if options.model == AUTO else cast("Kind", options.model))
    except BadSweepError as error:
        raise BadInput(str(error)) from error
    found = recommend(model, options.slowdown, confidence) if options.slowdown is not None else None
    if report is not None:
        from colocate.power.page import write_page

        write_page(model, found, options.slowdown, report)
    if options.output in DATA_FORMS:
        print_data(_data(model, found, report), options.output)
    else:
        _print(model, found, options.slowdown)
        if report is not None:
            print(f"report: {report.resolve()}")
    return 1 if found is not None and not found.sure else 0


def _where(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",") if part]
    if any(not equals for _, equals, _ in pairs):
        raise BadInput(f"--where {text}: write COLUMN=VALUE, more of them with commas between")
    found = {name.strip(): value.strip() for name, _, value in pairs}
    if len(found) < len(pairs):
        raise BadInput(f"--where {text}: a column is named twice, and no line has two values in it")
    return found


def split(options: argparse.Namespace) -> int:
    """Watts among jobs, a sweep each, so that the worst slowdown is least. Raises BadInput."""
    models = {}
    for name, runs in read_sweeps(map(Path, options.files), _where(options.where)).items():
        try:
            models[name] = learn([run.sample for run in runs])
        except BadSweepError as error:
            raise BadInput(f"{name}: {error}") from error
    points = np.linspace(0.0, 1.0, SPLIT_POINTS)
    caps = np.array([m.sweep.floor + points * (m.fit.greatest - m.sweep.floor) for m in models.values()])
    slowdowns = np.array([falling(predict(m.fit, c)) for m, c in zip(models.values(), caps, strict=True)])
    try:
        found = split_budget(caps, slowdowns, options.budget)
    except BudgetTooSmallError as error:
        raise BadInput(f"--budget: {error}") from error
    jobs = [
        {"job": name, "cap_watts": round(float(cap), 1), "predicted_slowdown": round(float(predict(m.fit, cap)[0]), 6)}
        for (name, m), cap in zip(models.items(), found.caps, strict=True)
    ]
    alike = options.budget / caps[:, -1].sum()
    uniform: float | None = None  # where a job has its floor above its part
    if np.all(caps[:, 0] <= alike * caps[:, -1]):
        share = min(alike, 1.0)
        uniform = max(float(predict(m.fit, share * m.fit.greatest)[0]) for m in models.values())
    if options.output in DATA_FORMS:
        print_data(
            {"jobs": jobs, "worst_slowdown": round(found.worst, 6), "uniform_worst": uniform and round(uniform, 6)},
            options.output,
        )
        return 0
    rows = [(str(j["job"]), f"{j['cap_watts']:.0f}", f"{j['predicted_slowdown']:.1%}") for j in jobs]
    print_table(("job", "cap W", "slowdown"), rows)
    print(f"{found.caps.sum():.0f} of {options.budget:g} W; the worst is {found.worst:.1%} slower", end="")
    if alike >= 1.0:
        print()
    elif uniform is None:
        print(f"; {alike:.0%} of its greatest for each is below the floor of some")
    else:
        print(f", {uniform:.1%} if all were capped at {alike:.0%} of their greatest")
    return 0


def _seed(options: argparse.Namespace, runs: list[Run]) -> int:
    """As the talk's script prints it, its NaN and its caps outside of the sweep included."""
    from colocate.power.seed import fit_seed

    found = fit_seed(runs)
    cap = None if options.slowdown is None else found.cap(options.slowdown)
    if options.output in DATA_FORMS:
        known = {"model": SEED, "coefficients": found.coefficients.tolist(), "r2": found.r2, "problem": found.problem}
        print_data(known | ({} if cap is None else {"cap_watts": cap if np.isfinite(cap) else None}), options.output)
        return 0
    if found.problem:
        print(found.problem, file=sys.stderr)
    print(f"Training R2 Score: {found.r2}", file=sys.stderr)
    print("Coefficients", found.coefficients)
    if cap is not None:
        print(cap, "W")
        caps = [run.cap_watts for run in runs]
        if not min(caps) <= cap <= max(caps):
            print("this is no cap of the sweep: leave out --model seed for one that is", file=sys.stderr)
    return 0


def _data(model: Model, found: Recommendation | None, report: Path | None) -> dict[str, Any]:
    sweep = model.sweep
    data: dict[str, Any] = {
        "model": model.fit.kind,
        "errors": {k: None if np.isnan(e) else round(e, 6) for k, e in model.errors.items()},
        "greatest_watts": model.fit.greatest,
        "floor_watts": sweep.floor,
        "parameters": list(model.fit.parameters),
        "caps": [
            {
                "cap_watts": cap,
                "runs": len(runs),
                "slowdown": round(float(s), 6),
                "modelled": round(float(predict(model.fit, cap)[0]), 6),
                "energy_saved_ratio": None if (e := saved(model, cap)) is None else round(e, 6),
            }
            for cap, s, runs in zip(sweep.caps.tolist(), sweep.slowdowns, sweep.repeats, strict=True)
        ],
    }
    if found is not None:
        data |= {
            "recommended_cap_watts": found.cap_watts,
            "predicted_slowdown": round(found.slowdown, 6),
            "low": round(found.low, 6),
            "high": round(found.high, 6),
            "sure": found.sure,
            "energy_saved_ratio": None if found.energy_saved_ratio is None else round(found.energy_saved_ratio, 6),
        }
    return data | ({} if report is None else {"report": str(report.resolve())})


def _print(model: Model, found: Recommendation | None, slowdown: float | None) -> None:
    sweep = model.sweep
    lines = []
    for cap, s, runs in zip(sweep.caps.tolist(), sweep.slowdowns, sweep.repeats, strict=True):
        energy, expected = saved(model, cap), float(predict(model.fit, cap)[0])
        met = "" if cap >= sweep.floor else "not met by the hardware"
        lines.append((f"{cap:g}", str(len(runs)), f"{s:.1%}", f"{expected:.1%}", _ratio(energy), met))
    print_table(("cap W", "runs", "slowdown", "modelled", "energy saved", ""), lines)
    fastest = int(np.argmin(sweep.slowdowns))
    if sweep.slowdowns[fastest] < -CONTRADICTION:
        low, top, faster = sweep.caps[fastest], sweep.caps[-1], -sweep.slowdowns[fastest]
        print(f"under {low:g} W it was {faster:.1%} faster than under {top:g} W:", end=" ")
        print("are runs or columns mixed up, or do runs differ so much?")
    error = model.errors[model.fit.kind]
    judged = "too few caps to judge it"
    if not np.isnan(error):
        judged = f"off by {error:.1%} of the time on caps it was not shown"
    print(f"model: {model.fit.kind}, {judged}")
    if found is None or slowdown is None:
        return
    if not found.sure:
        print(f"no cap of this sweep keeps a slowdown of {slowdown:.1%} so surely: repeat runs, or")
        print(f"sweep higher ones than {found.cap_watts:g} W")
        return
    between = f"{max(found.low, 0.0):.1%} to {found.high:.1%}"
    print(f"cap: {found.cap_watts:g} W of {model.fit.greatest:g}, for a slowdown of at most {slowdown:.1%}")
    print(f"expected: {found.slowdown:.1%} longer ({between}), {_ratio(found.energy_saved_ratio)} of the energy saved")
    if any(len(runs) == 1 for runs in sweep.repeats):
        print("some caps were run once: how much runs differ is known by what is not monotone alone; repeat them")


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
