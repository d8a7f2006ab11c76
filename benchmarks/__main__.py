"""`make bench` (a subset) and `make bench-full`: run what is missing, print each bar as pass, fail or undecided."""

from __future__ import annotations

import logging
import signal
import sys

import msgspec

from benchmarks import (
    agent,
    cluster,
    fidelity,
    gang,
    isolation,
    life,
    node,
    placement,
    power,
    publication,
    reaction,
    simulate,
    speed,
    worlds,
)
from benchmarks.common import RESULTS
from benchmarks.gpu import hand, virtual
from colocate.cli.logs import configure_logs
from colocate.errors import ColocateError

SUITES = {
    "worlds": worlds.run,
    "publication": publication.run,
    "gpu": virtual.run,
    "hand": hand.run,
    "power": power.run,
    "speed": speed.run,
    "agent": agent.run,
    "reaction": reaction.run,
    "isolation": isolation.run,
    "gang": gang.run,
    "cluster": cluster.run,
    "life": life.run,
    "node": node.run,
    "placement": placement.run,
    "simulate": simulate.run,
    "fidelity": fidelity.run,
}
BY_NAME = ("gang", "cluster", "life", "node", "placement", "simulate", "fidelity")
"""These, or `--full`: `make bench` has 40 minutes."""


def _end(*_: object) -> None:
    """SIGTERM ends a run as Ctrl-C does: everything that it made is taken away."""
    raise KeyboardInterrupt


def main(arguments: list[str]) -> int:
    """Run the suites named (default: all); 0 whatever the bars say, for a missed bar is a finding."""
    configure_logs(logging.ERROR)
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)  # also in the background of a script, where it is ignored
    full = "--full" in arguments
    if arguments == ["worlds", "-o", "json"]:
        print(worlds.as_json())
        return 0
    if arguments[:3] == ["gang", "--part", "decide"]:
        if arguments[3:] == ["-o", "json"]:
            print(msgspec.json.encode(gang.worst_decided()).decode())
        else:
            print(*gang.summary_decided(), sep="\n")
        return 0
    named = [a for a in arguments if not a.startswith("-")]
    names = named or [name for name in SUITES if full or name not in BY_NAME]
    unknown = [n for n in names if n not in SUITES] + [a for a in arguments if a.startswith("-") and a != "--full"]
    if unknown:
        print(f"unknown benchmark {unknown[0]!r}; known: {', '.join(SUITES)}", file=sys.stderr)
        return 2
    lines = []
    try:
        for name in names:
            lines += SUITES[name](full)
    except ColocateError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("benchmarks: interrupted; what was measured is kept, and goes on from there", file=sys.stderr)
        return 130
    print(*lines, sep="\n")
    if not named:  # of some suites only it would lose the others
        (RESULTS / "summary.txt").write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
