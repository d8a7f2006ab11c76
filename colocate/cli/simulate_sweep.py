"""colocate sweep: seeds x policies x workloads, here or spread over Ray."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

from colocate.cli.output import DATA_FORMS, end_status, print_data, print_table, status
from colocate.cli.simulate import card_table, comparison_texts, conditions_of, jobs_for, named_policies
from colocate.errors import BadInput
from colocate.simulate.compare import comparisons
from colocate.simulate.sweep import World, sweep
from colocate.simulate.workloads import read_nodes

SEEDS = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")
MOST_SEEDS = 10_000


def seeds_of(text: str) -> list[int]:
    """`1-20`, `3,7`, or both. Raises BadInput."""
    found: list[int] = []
    for part in text.split(","):
        given = SEEDS.fullmatch(part.strip())
        if given is None or int(given[2] or given[1]) < int(given[1]):
            raise BadInput(
                f"--seeds: {part.strip()!r} is neither a number nor FIRST-LAST with the lesser first, as in 1-20"
            )
        found += range(int(given[1]), min(int(given[2] or given[1]), int(given[1]) + MOST_SEEDS) + 1)
    if 0 in found:
        raise BadInput("--seeds: 0 is no seed: they begin at 1")
    if len(found) > MOST_SEEDS or len(set(found)) < len(found):
        raise BadInput(
            f"--seeds: {'more than ' + str(MOST_SEEDS) if len(found) > MOST_SEEDS else 'one stands there twice'}"
        )
    return found


def command(options: argparse.Namespace) -> int:
    """Exit 1 where jobs never start under some policy. Raises BadInput."""
    policies, seeds = named_policies(options.policy), seeds_of(options.seeds)
    worlds, conditions = list[World](), conditions_of(options)
    for fleet in options.nodes:
        nodes = read_nodes(fleet)
        for jobs in options.jobs:
            workload = jobs_for(nodes, jobs, options.window_jobs)
            worlds.append(World((fleet, jobs), nodes, workload, conditions))
    if len({world.names for world in worlds}) < len(worlds):
        raise BadInput("--nodes, --jobs: one is named twice")
    runs = sweep(worlds, policies, seeds, options.window_jobs, _say, ray=options.ray, workers=options.workers)
    end_status()
    found: list[dict[str, Any]] = []
    for world in worlds:
        mine = [run for run in runs if (run["nodes"], run["jobs"]) == world.names]
        drawn = {run["first_job"]: run["seed"] for run in reversed(mine)}
        once = [run["card"] for run in mine if drawn[run["first_job"]] == run["seed"]]  # one window counts once
        if options.window_jobs and len(drawn) < len(seeds):
            end_status()
            text = f"{len(seeds)} seeds have drawn {len(drawn)} different windows; each counts once"
            print(f"{world.names[1]}: {text}", file=sys.stderr)
        compared = comparisons(once, policies) if options.window_jobs else []
        found.append({"nodes": world.names[0], "jobs": world.names[1], "runs": mine, "comparisons": compared})
    if options.output in DATA_FORMS:
        print_data(found, options.output)
    else:
        for one in found:
            cards = [run["card"] for run in one["runs"]]
            print_table(*card_table(cards), title=f"{one['jobs']} on {one['nodes']}, means of {len(seeds)} seeds")
            print("\n".join(comparison_texts(one["comparisons"])))
    return int(any(run["card"]["never_started"] for run in runs))


def _say(done: int, of: int) -> None:
    status(f"{done} of {of} simulations")
