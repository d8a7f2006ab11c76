"""Fragmentation gradient descent (FGD, USENIX ATC 2023): how much of a cluster's GPUs six policies can hand out.

Alibaba's openb nodes and seventeen lists of pods. Pods are shuffled, drawn again until they ask for 1.3 times the GPUs,
and placed one after the other; none departs. Their ten shuffles are not ours, so the means agree and not the digits. We
take thirty of the policies that leave many nodes equal: what they make of a list hangs on the nodes' order, by two
points.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from colocate.errors import BadInput
from colocate.simulate import traces
from colocate.simulate.placement import Nodes, arrivals, place, typical_shares
from colocate.simulate.reproduce import Cell
from colocate.simulate.threads import side_by_side

SOURCE = "Weng and others, Beware of Fragmentation, USENIX ATC 2023 (hkust-adsl/kubernetes-scheduler-simulator)"
POINTS = 0.4
TOLERANCE = {"openb-fgd": f"the mean of ten or thirty shuffles within {POINTS:g} points"}
FOLDER = "openb-2023"
FEW, MANY = range(42, 52), range(42, 72)
ARRIVED = 1.3
"""Pods ask for so many times the GPUs that there are."""
NAMES = {
    "Random": "random",
    "DotProd": "dot-product",
    "GpuClustering": "clustering",
    "GpuPacking": "packing",
    "BestFit": "best-fit",
    "FGD": "fgd",
}
OF_MANY = {"Random", "DotProd", "GpuClustering", "GpuPacking"}
"""Those that draw lots, or whose means are close to the bar: their own noise is to be small beside the published."""
Ints = NDArray[np.int64]


def allocated(nodes: Nodes, pods: traces.Pods, policy: str, seed: int) -> float:
    """The share of all GPUs that is handed out at the end."""
    capacity = int(nodes.gpus.sum()) * 1000
    come = arrivals(pods.kinds, pods.kind_of, ARRIVED * capacity, seed)
    typical = typical_shares(pods.kind_of, pods.kinds) if policy == "fgd" else None
    return float(place(nodes, pods.kinds, come, policy, seed, typical).allocated_milli[-1]) / capacity


def cells(
    name: str, folder: Path, say: Callable[[str], None], workloads: Collection[str] | None = None
) -> Iterator[Cell]:
    """A hundred and two, or six for each of some workloads. Raises BadInput."""
    del name
    there = folder / FOLDER
    nodes, models = traces.openb_nodes(there / "nodes_gpu_node.csv.gz")
    published: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in traces.table(there / "expected" / "fgd_allo_discrete.csv.gz", ("workload", "sc_policy", "130")):
        key = row.text("workload").removeprefix("openb_pod_list_"), row.text("sc_policy").partition("-")[2]
        if key[1] not in NAMES:
            raise BadInput(f"{row.place}, sc_policy: {row.text('sc_policy')!r} is no policy of the table")
        if workloads is None or key[0] in workloads:
            published[key].append(row.number("130"))
    lists: dict[str, traces.Pods] = {}
    for (workload, policy), values in published.items():
        say(f"{workload}, {policy}")
        if workload not in lists:
            lists = {workload: traces.openb_pods(there / "pods" / f"{workload}.csv.gz", models)}

        def one(seed: int, pods: traces.Pods = lists[workload], named: str = NAMES[policy]) -> float:
            return 100.0 * allocated(nodes, pods, named, seed)

        found, mean = list(side_by_side(one, MANY if policy in OF_MANY else FEW)), float(np.mean(values))
        ours = float(np.mean(found))
        detail = f"ours {min(found):.2f} to {max(found):.2f}, theirs {min(values):.2f} to {max(values):.2f}"
        yield Cell(f"{workload} {policy}", mean, ours, abs(ours - mean) <= POINTS, detail)
