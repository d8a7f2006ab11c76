"""publish, profile, power outcomes: the commands above nodes."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

import yaml

from colocate.cli.logs import configure_logs
from colocate.cli.output import print_data
from colocate.cluster import outcomes as policies
from colocate.cluster import profiles
from colocate.cluster.publication import Publication
from colocate.kube.client import Api
from colocate.kube.lease import Candidate, Election, identity_of, lead_until, stop_on_signals
from colocate.policy.file import load_policy


def publish(options: argparse.Namespace) -> int:
    """Lead, or wait to; until SIGTERM."""
    configure_logs()
    return asyncio.run(_publish(options))


async def _publish(options: argparse.Namespace) -> int:
    stop, identity = stop_on_signals(), identity_of()
    async with Api.connect(options.kubeconfig, options.context) as api:

        def candidate() -> Candidate:
            where = options.lease_namespace, options.lease_name
            election = Election(api, *where, identity, options.lease_duration)
            return election, Publication(api, election).run

        await lead_until(stop, candidate)
    return 0


def profile(options: argparse.Namespace) -> int:
    """Print the objects; applying them is kubectl's."""
    made = profiles.profile(
        options.name, options.pods, options.namespaces, options.percent, fail_closed=options.fail_closed
    )
    return _print_objects(made, options.output)


def outcomes(options: argparse.Namespace) -> int:
    """The same of those that turn slowdowns into watts."""
    policy = load_policy(Path(options.config))
    return _print_objects(policies.outcomes(policy.spec.power.models), options.output)


def _print_objects(made: list[dict[str, Any]], form: str) -> int:
    if form == "json":
        print_data({"apiVersion": "v1", "kind": "List", "items": made}, "json")
    else:
        print(yaml.safe_dump_all(made, sort_keys=False), end="")
    return 0
