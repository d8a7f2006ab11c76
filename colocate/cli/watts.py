"""colocate power status, budget and models: what this node's CPUs and GPUs draw, what they may draw, and for whom."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from colocate.amdgpu import FIRST_INDEX, alone, gpus, read_power
from colocate.cli.output import DATA_FORMS, print_data, print_table
from colocate.cli.watch import ask_agent
from colocate.decide.caps import LAW
from colocate.decide.node_budget import NODE
from colocate.errors import BadInput, HostUnfit
from colocate.observe.hsmp import read_sockets
from colocate.observe.node import has_nvidia
from colocate.observe.powercap import Zone, counted, read_zones, watts

LEAST_SECONDS = 0.05
"""Counters move every millisecond or so: over less than this a few of their steps would be the answer."""


def status(options: argparse.Namespace) -> int:
    """Exit 1 where nothing here tells of power. Raises BadInput, HostUnfit."""
    if options.seconds < LEAST_SECONDS:
        raise BadInput(f"--seconds: at least {LEAST_SECONDS:g}")
    root = Path(options.sysfs) / "class" / "powercap"
    before, began = read_zones(root), time.monotonic()
    driver = bool(options.nvml_library) or has_nvidia()
    amd = _amd(Path(options.sysfs))
    sockets = read_sockets(Path(options.sysfs) / "class" / "hwmon")
    if not before and not driver and not amd and not sockets:
        raise HostUnfit(
            f"neither powercap zones ({root}), nor AMD's HSMP, nor a driver of GPUs: nothing here tells of power",
            "modprobe intel_rapl_msr; in a container mount the host's /sys and name it with --sysfs; "
            "virtual machines have none",
        )
    if before:
        time.sleep(options.seconds)
    zones, seconds = read_zones(root), time.monotonic() - began
    drawn = watts(before, zones, seconds)
    rows = [_zone(zone, drawn[zone.id]) for zone in zones]
    cards = [*(_gpus(options.nvml_library) if driver else []), *amd]
    cpus = counted(zones, drawn)
    if options.output in DATA_FORMS:
        told = {"zones": rows, "sockets": [socket._asdict() for socket in sockets], "gpus": cards}
        print_data({**told, "cpu_watts": None if cpus is None else round(cpus, 3)}, options.output)
        return 0
    lines = [
        (
            ("  " if row["part_of"] else "") + row["name"],
            row["id"],
            _text(row["watts"]),
            _limits(row["limits"]),
            row["note"],
        )
        for row in rows
    ]
    lines += [
        (
            f"socket {s.number}",
            f"hsmp:{s.number}",
            _text(s.watts),
            _text(s.limit_watts),
            s.problem or _most(s.most_watts),
        )
        for s in sockets
    ]
    lines += [
        (f"GPU {g['index']} {g['name']}".strip(), g["uuid"], _text(g["watts"]), _text(g["limit_watts"]), g["note"])
        for g in cards
    ]
    print_table(("device", "id", "draws W", "limit W", ""), lines)
    if cpus is not None:
        print(f"packages and their DRAM: {cpus:.1f} W over {seconds:.1f} s")
    return 0


def budget(options: argparse.Namespace) -> int:
    """What the agent of this node lets its GPUs draw, for whom and why. Raises NotAnswering."""
    data = ask_agent(options, "explain")
    about = {v.get("subject", ""): v for v in data["plan"]["verdicts"] if v["law"] == LAW} if data else {}
    cards = sorted(data["snapshot"].get("cards", {}).values(), key=lambda c: c.get("index", 0)) if data else []
    names = {i: w["name"] for i, w in data["snapshot"].get("workloads", {}).items()} if data else {}
    rows = [
        {
            "index": card.get("index", 0),
            "uuid": card["uuid"],
            "cap_watts": about.get(card["uuid"], {}).get("numbers", {}).get("cap_watts"),
            "limit_watts": card.get("limit_watts"),
            "watts": card.get("watts"),
            "workloads": sorted(names[i] for i in {*card.get("users", {}), *card.get("allotted", ())} if i in names),
            "why": about.get(card["uuid"], {}).get("message", ""),
        }
        for card in cards
    ]
    node = about.get(NODE)
    problems = [why for name, why in data.get("problems", {}).items() if name.startswith("power ")] if data else []
    if options.output in DATA_FORMS:
        print_data({"gpus": rows, "node": node, "problems": problems}, options.output)
        return 0
    lines = [
        (
            f"GPU {row['index']}",
            *(_text(row[key]) for key in ("cap_watts", "limit_watts", "watts")),
            ", ".join(row["workloads"]) or "nobody",
            row["why"],
        )
        for row in rows
    ]
    print_table(("GPU", "cap W", "limit W", "draws W", "who", "why"), lines)
    print(f"{node['reason']}: {node['message']}" if node else "the policy has no power.budget")
    for problem in problems:
        print(f"problem: {problem}")
    return 0


def models(options: argparse.Namespace) -> int:
    """What is known of each class; -o yaml has the models as a policy takes them. Raises NotAnswering."""
    classes = ask_agent(options, "explain").get("power_classes", [])
    if options.output in DATA_FORMS:
        about = [{key: each[key] for key in ("name", "policy", "jobs", "seconds")} for each in classes]
        given = [{"name": each["name"], "points": each["points"]} for each in classes]
        print_data({"models": given, "heard": about}, options.output)
        return 0
    lines = [
        (
            each["name"] if i == 0 else "",
            str(point["watts"]),
            f"{point['slowdown']:.1%}",
            f"{each['policy'][i]:.1%}",
            f"{each['seconds'][i]:.0f}",
            str(each["jobs"]) if i == 0 else "",
        )
        for each in classes
        for i, point in enumerate(each["points"])
    ]
    print_table(("class", "cap W", "slower", "policy", "heard s", "jobs"), lines)
    if not classes:
        print("the policy has no power.models")
    return 0


def _zone(zone: Zone, drawn: float | None) -> dict[str, Any]:
    limits = [limit._asdict() for limit in zone.limits]
    return {
        "id": zone.id,
        "name": zone.name,
        "part_of": zone.parent,
        "watts": None if drawn is None else round(drawn, 3),
        "enabled": zone.enabled,
        "limits": limits,
        "note": _note(zone, drawn),
    }


def _note(zone: Zone, drawn: float | None) -> str:
    if zone.doubles:
        return f"the same as {zone.doubles}"
    said = [zone.problem] if zone.problem else ["its counter was set back"] if drawn is None else []
    if not zone.limits:
        said.append("measured only")
    elif zone.enabled is False:
        said.append("its limits are off, or locked by the firmware")
    return "; ".join(said)


def _limits(limits: list[dict[str, Any]]) -> str:
    """Each as WATTS/WINDOW; a limit of 0 is one that nobody has set."""
    said = []
    for limit in limits:
        most = "none" if limit["watts"] == 0 else _text(limit["watts"])
        said.append(f"{most}/{limit['window_seconds']:.3g}s" if limit["window_seconds"] else most)
    return ", ".join(said) or "-"


def _most(watts: float | None) -> str:
    return "" if watts is None else f"at most {_text(watts)} W can be set; its packages' zones may count the same"


def _amd(sysfs: Path) -> list[dict[str, Any]]:
    every = gpus(sysfs / "class" / "kfd" / "kfd", sysfs / "class" / "drm")
    found = []
    for index, gpu in enumerate(every):
        power = read_power(gpu.hwmon)
        mine = gpu.hwmon is None or alone(gpu, every)
        found.append(
            {
                "index": FIRST_INDEX + index,
                "uuid": gpu.uuid,
                "name": "AMD",
                "watts": _kilo(power.draw_mw),
                "limit_watts": _kilo(power.limit_mw),
                "note": "" if mine else "a part of a board: draw and limit are the whole board's",
            }
        )
    return found


def _gpus(library: str) -> list[dict[str, Any]]:
    """Each card; of a driver that is silent one line that says so."""
    from colocate.observe.nvml import NvmlSilent, Worker

    worker = Worker(library)
    try:
        cards = worker.ask(ask="read")["cards"]
    except NvmlSilent as error:
        cards = [{"index": "", "error": str(error)}]
    finally:
        worker.end()
    return [
        {
            "index": card["index"],
            "name": card.get("name", ""),
            "uuid": card.get("uuid", ""),
            "watts": _kilo(card.get("power_mw")),
            "limit_watts": _kilo(card.get("limit_mw")),
            "note": f"not read: {card['error']}" if card["error"] else "",
        }
        for card in cards
    ]


def _kilo(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"
