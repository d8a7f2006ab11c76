"""The cards of a node in `top` and `explain gpu`: who is on each, in which mode, and what that protects."""

from __future__ import annotations

import argparse
from typing import Any

from colocate.cli.output import DATA_FORMS, print_data
from colocate.errors import BadInput
from colocate.units import format_bytes

COLUMNS = ("card", "GPU", "memory", "busy", "mode", "batch may", "drain", "floor", "who")


def rows(data: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line a card; none where there is none."""
    cards = sorted(data["snapshot"].get("cards", {}).values(), key=lambda c: c.get("index", 0))
    return [_row(data, card) for card in cards]


def verdict_of(data: dict[str, Any], card: dict[str, Any]) -> dict[str, Any]:
    """What the law says of a card; empty before its first word."""
    return _verdict(data, card, "gpu")


def _verdict(data: dict[str, Any], card: dict[str, Any], law: str) -> dict[str, Any]:
    found = (v for v in data["plan"]["verdicts"] if v["law"] == law and v.get("subject") == card["uuid"])
    return next(found, {})


def _row(data: dict[str, Any], card: dict[str, Any]) -> tuple[str, ...]:
    verdict = verdict_of(data, card)
    numbers = verdict.get("numbers", {})
    used, total = card.get("memory_used_bytes"), card.get("memory_bytes")
    return (
        str(card.get("index", 0)),
        card["uuid"],
        f"{format_bytes(used)} of {format_bytes(total)}" if used is not None and total is not None else "-",
        f"{card['percent']}%" if "percent" in card else "-",
        verdict.get("state", "-"),
        may(verdict),
        _ms(numbers.get("drain_seconds")),
        _ms(numbers.get("floor_seconds")),
        ", ".join(_who(data, card)) or "nobody",
    )


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f} ms" if seconds < 1.0 else f"{seconds:.2f} s"


def may(verdict: dict[str, Any]) -> str:
    """How much of the card batch may have, in words."""
    numbers = verdict.get("numbers", {})
    return {
        "open": "all the time",
        "gate": f"{_ms(numbers.get('hold_off_seconds'))} after a request",
        "dial": f"{numbers.get('share', 0.0):.0%}",
        "probe": "moments, to be measured",
        "off": "nothing",
    }.get(verdict.get("state", ""), "-")


def _who(data: dict[str, Any], card: dict[str, Any]) -> list[str]:
    workloads = data["snapshot"].get("workloads", {})
    said = [f"{workloads[id_]['name']} ({workloads[id_]['tier']})" for id_ in card.get("users", {}) if id_ in workloads]
    strangers = card.get("strangers", 0)
    return said + ([f"{strangers} process(es) of nobody's"] if strangers else [])


def explain(options: argparse.Namespace, data: dict[str, Any], name: str) -> int:
    """All cards, the one of this UUID, or those that this workload is on. Raises BadInput of a name that is neither."""
    workloads = data["snapshot"].get("workloads", {})
    ids = {i for i, w in workloads.items() if name in (i, w["name"])}
    every = sorted(data["snapshot"].get("cards", {}).values(), key=lambda c: c.get("index", 0))
    cards = [
        c for c in every if not name or name in (c["uuid"], str(c.get("index", 0))) or ids & set(c.get("users", {}))
    ]
    if name and not cards:
        known = ", ".join(c["uuid"] for c in every) or "none"
        raise BadInput(f"explain gpu {name}: no such card, and no workload of that name is on one; cards: {known}")
    if options.output in DATA_FORMS:
        said = [{"card": c, "verdict": verdict_of(data, c), "power": _verdict(data, c, "power")} for c in cards]
        print_data(said, options.output)
        return 0
    if not every:
        print("this node has no card, or none can be read: colocate doctor says why")
    for card in cards:
        _print(data, card)
    return 0


def _print(data: dict[str, Any], card: dict[str, Any]) -> None:
    verdict = verdict_of(data, card)
    workloads = data["snapshot"].get("workloads", {})
    print(
        f"card {card.get('index', 0)}, {card.get('name', '')} {card['uuid']}: {', '.join(_who(data, card)) or 'nobody'}"
    )
    if card.get("problem"):
        print(f"  problem: {card['problem']}")
    if verdict:
        print(f"  {verdict['message']}\n  {verdict['reason']} ({verdict['state']}): batch may have {may(verdict)}")
    if power := _verdict(data, card, "power"):
        cap = power.get("numbers", {}).get("cap_watts")
        print(
            f"  {power['message']}\n  {power['reason']}: " + ("no power cap" if cap is None else f"a cap of {cap:g} W")
        )
    numbers = verdict.get("numbers", {})
    if "floor_seconds" in numbers:
        print(
            f"  a request that meets batch loses at most {_ms(numbers['floor_seconds'])}: it goes on for "
            f"{_ms(numbers['drain_seconds'])} after it was stopped, which takes {_ms(card.get('reaction_seconds'))}"
        )
    for said in _held(data, card):
        print(f"  {said}")
    if said := _recorded(card):
        print(f"  {said}")
    if "sigma" in numbers:
        wrong = numbers["prediction_error"]
        print(f"  beside a share u requests take 1 / (1 - {numbers['sigma']:g} u) as long (off by {wrong:.0%} of late)")
    for id_, user in card.get("users", {}).items():
        if id_ in workloads:
            print(f"  {workloads[id_]['name']}: {_user(user)}")


def _held(data: dict[str, Any], card: dict[str, Any]) -> list[str]:
    """By what batch is stopped, where that is not the freezer; and who was taken off the card."""
    workloads = data["snapshot"].get("workloads", {})
    pulses = [p for every in data["plan"].get("pulses", {}).values() for p in every if p["card"] == card["uuid"]]
    words = {"lock": "the driver's checkpoint lock", "suspend": "suspended queues"}
    said = [f"batch is stopped by {words[by]}" for by in sorted({p.get("by", "freeze") for p in pulses} & words.keys())]
    if card.get("struck"):
        said.append(f"the driver holds no process any more in this boot: {card['struck']}")
    for id_, how in card.get("suspended", {}).items():
        state = {"going": "is taken off the card", "suspended": "is off the card"}.get(how, f"is not off it: {how}")
        said.append(f"{workloads.get(id_, {}).get('name', id_)} {state}")
    return said


def _recorded(card: dict[str, Any]) -> str:
    """What is told of it and nothing is decided by."""
    said = []
    if "watts" in card:
        limit = f" of at most {card['limit_watts']:g}" if "limit_watts" in card else ""
        said.append(f"draws {card['watts']:.0f} W{limit}")
    if rates := card.get("pcie_bytes_per_second"):
        said.append(f"PCIe {format_bytes(int(rates[0]))}/s to it, {format_bytes(int(rates[1]))}/s from it")
    return ", ".join(said)


def _user(user: dict[str, Any]) -> str:
    memory = user.get("memory_bytes")
    said = [format_bytes(memory) if memory is not None else "memory not told"]
    if "percent" in user:
        said.append(f"its kernels ran {user['percent']}% of the last moment")
    if user.get("sensor"):
        said.append(f"seen by its {user['sensor']}, busy {user.get('busy_ratio', 0.0):.0%} of the time")
    elif user.get("sensor_problem"):
        said.append(user["sensor_problem"])
    if drains := [seconds for _, seconds in user.get("drains", ())]:
        said.append(f"went on for {_ms(min(drains))} to {_ms(max(drains))} when it was stopped ({len(drains)} times)")
    return ", ".join(said)
