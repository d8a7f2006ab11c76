"""Options that several commands have, and the types of their values."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from colocate.units import MOST_SLOWDOWN, parse_bytes, parse_cores, parse_duration, parse_watts

Add = Callable[[str, str, str], argparse.ArgumentParser]
"""(name, module:function, help) -> the command's own parser."""


MOST_INTENSITY = 3000.0
"""Burning the dirtiest coal in the worst plant is half of this."""


def _quantity(parse: Callable[[str], float]) -> Callable[[str], float]:
    """An argparse type that says in the quantity's own words what is wrong."""

    def read(text: str) -> float:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def _seconds(text: str) -> float:
    """A duration; on the command line a bare number is seconds, as for sleep(1)."""
    return parse_duration(f"{text}s" if text.replace(".", "", 1).isdigit() else text)


duration, size, cores = _quantity(_seconds), _quantity(parse_bytes), _quantity(parse_cores)
watts = _quantity(parse_watts)


def intensity(text: str) -> float:
    """An argparse type: grams of CO2 a kWh."""
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0.0 <= found <= MOST_INTENSITY:
        raise argparse.ArgumentTypeError(f"{text!r}: write grams of CO2 a kWh from 0 to {MOST_INTENSITY:g}, e.g. 350")
    return found


def positive(text: str) -> int:
    """An argparse type: a whole number from 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def form(parser: argparse.ArgumentParser, *forms: str) -> None:
    """-o, the first form by default."""
    parser.add_argument("-o", "--output", choices=forms, default=forms[0], help=f"output form (default: {forms[0]})")


def table_form(parser: argparse.ArgumentParser) -> None:
    """-o of a command that prints a table."""
    form(parser, "table", "wide", "json", "yaml")


def state(parser: argparse.ArgumentParser) -> None:
    """--state-dir."""
    parser.add_argument("--state-dir", help="journal, records and model state (default: /var/lib/colocate for root)")


def socket(parser: argparse.ArgumentParser) -> None:
    """--socket."""
    parser.add_argument("--socket", help="the agent's socket (default: /run/colocate/agent.sock for root)")


def cluster(parser: argparse.ArgumentParser) -> None:
    """Which API server."""
    parser.add_argument("--kubeconfig", help="default: $KUBECONFIG, the pod's service account, ~/.kube/config")
    parser.add_argument("--context", help="of the kubeconfig")


def node(parser: argparse.ArgumentParser, *, whose_cluster: bool = True) -> None:
    """--node, and which API server."""
    parser.add_argument("--node", default="", help="ask the agent of this node of the cluster, by the API server")
    if whose_cluster:
        cluster(parser)


def snapshot(parser: argparse.ArgumentParser, *, live: bool = False) -> None:
    """A snapshot file or the live cluster, and whose pods."""
    cluster(parser)
    if live:
        parser.set_defaults(snapshot=None)
    else:
        parser.add_argument("--snapshot", help="a file of `colocate snapshot`, in place of the live cluster")
        parser.add_argument("-n", "--namespace", default="", help="default: the context's")
    parser.add_argument("--scheduler-name", help="whose pods are decided (default: what the controller answers to)")


def _share(text: str) -> float:
    """Of `5%` or `0.05`; NaN of what is neither."""
    try:
        return float(text.removesuffix("%")) / (100.0 if text.endswith("%") else 1.0)
    except ValueError:
        return float("nan")


def slowdown(text: str) -> float:
    """`5%` or `0.05`. Raises ArgumentTypeError."""
    value = _share(text)
    if not 0.0 <= value <= MOST_SLOWDOWN:
        raise argparse.ArgumentTypeError(f"{text!r} is no slowdown: write 5% or 0.05, at most {MOST_SLOWDOWN:g}")
    return value


def ratio(text: str) -> float:
    """`40%` or `0.4`. Raises ArgumentTypeError."""
    value = _share(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: write 40% or 0.4")
    return value


def confidence(text: str) -> float:
    """A probability. Raises ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0.5 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is no confidence: write a number from 0.5, below 1")
    return value
