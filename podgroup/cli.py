"""The options of the commands about a cluster; what they do is in `commands`, which is imported when one runs."""

from __future__ import annotations

from colocate.cli.options import Add, cluster, duration, positive, snapshot, table_form
from podgroup.api import LEASE


def add_commands(add: Add) -> None:
    """controller, queue, what-if, snapshot."""
    controller = add(
        "controller", "podgroup.controller.process:controller", "Gang scheduling: the controller of a cluster"
    )
    cluster(controller)
    controller.add_argument("--scheduler-name", default="colocate", help="the pods we bind (default: colocate)")
    controller.add_argument(
        "--also-answer-to",
        action="append",
        default=[],
        choices=["scheduler-plugins-scheduler"],
        help="the name that KubeRay writes; refused while that scheduler is alive",
    )
    controller.add_argument(
        "--timeout", type=positive, default=60, help="seconds to start a gang whose PodGroup says nothing"
    )
    controller.add_argument(
        "--node-loss-grace",
        type=duration,
        default=40.0,
        help="for how long a node's object must have been gone before the members on it are given up",
    )
    controller.add_argument(
        "--order",
        default="age-tightest/1",
        help="by what gangs and nodes are ordered: age-tightest/1, or age-least-watts/1, onto nodes that draw the least"
        " more for them (docs/power.md)",
    )
    controller.add_argument("--http", default="", help="HOST:PORT of /metrics, /healthz and /readyz (default: none)")
    controller.add_argument("--lease-namespace", default=LEASE[0], help="where the lease is")
    controller.add_argument("--lease-name", default=LEASE[1], help="of the lease")
    controller.add_argument(
        "--lease-duration", type=duration, default=15.0, help="how long a dead leader is waited for"
    )

    queue = add("queue", "podgroup.commands:queue", "The gangs that wait: position, since when, and why")
    cluster(queue)
    whose = queue.add_mutually_exclusive_group()
    whose.add_argument("-n", "--namespace", default="", help="default: the context's")
    whose.add_argument("-A", "--all-namespaces", action="store_true", help="of all namespaces")
    table_form(queue)

    what_if = add(
        "what-if", "podgroup.commands:what_if", "Whether a job would start now, and where: the same solver, read-only"
    )
    what_if.add_argument(
        "-f", "--file", action="append", required=True, help="the job's manifest, YAML; several are one question"
    )
    snapshot(what_if)
    table_form(what_if)

    taken = add(
        "snapshot", "podgroup.commands:snapshot", "Write the cluster as it is to a file, to decide it again elsewhere"
    )
    taken.add_argument("-f", "--file", default="colocate-cluster.json", help="default: colocate-cluster.json")
    taken.add_argument(
        "--from",
        dest="controller",
        default="",
        metavar="URL",
        help="of a controller's --http: what it goes by and decides, its memory included",
    )
    snapshot(taken, live=True)
