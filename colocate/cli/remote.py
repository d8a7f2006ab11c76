"""The commands about a node, asked of the agent of any node of a cluster: as commands in its pod, by the API server."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any, NamedTuple

import msgspec

from colocate.cluster.api import SYSTEM
from colocate.errors import BadInput, NotAnswering
from colocate.kube.client import NODES, PODS, SUBDOMAIN, Api, ApiError, Executed, path_of
from colocate.objects import Pod

AGENTS = "app.kubernetes.io/name=colocate-agent"
PROGRAM = "colocate"


class Placed(NamedTuple):
    """Where a pod is."""

    node: str
    uid: str


def answer_of(options: argparse.Namespace, *command: str) -> Any:
    """What the agent of `options.node` prints for the command with `-o json`, decoded.

    Raises BadInput if there is no such node, NotAnswering if no agent of it answers, ApiError, Unreachable.
    """
    done = asyncio.run(_run(options, [PROGRAM, *command, "-o", "json"]))
    if done.code and not done.out:
        said = done.err.strip().removeprefix("colocate: ")
        if done.code == BadInput.exit_code:
            raise BadInput(said)
        raise NotAnswering(f"the agent of node {options.node}: {said}")
    try:
        return msgspec.json.decode(done.out)
    except msgspec.DecodeError as error:
        raise NotAnswering(f"the agent of node {options.node} answers with what is no JSON: {error}") from error


async def _run(options: argparse.Namespace, command: list[str]) -> Executed:
    _check_name("--node", options.node)
    async with Api.connect(options.kubeconfig, options.context) as api:
        query = {"labelSelector": AGENTS, "fieldSelector": f"spec.nodeName={options.node}"}
        found = await api.all(Pod, path_of(PODS, SYSTEM), query)
        running = [pod for pod in found if pod.status.phase == "Running" and not pod.deleting]
        if not running:
            raise await _why_none(api, options.node, found)
        path = path_of(PODS, SYSTEM, running[0].metadata.name)
        try:
            return await api.execute(path, command)
        except ApiError as error:
            if error.status != 403:
                raise
            mend = f"whoever asks needs the rights get and create on pods/exec in {SYSTEM}"
            raise NotAnswering(f"{error}: {mend}") from error


async def _why_none(api: Api, node: str, found: list[Pod]) -> Exception:
    try:
        await api.request("GET", path_of(NODES, name=node))
    except ApiError as error:
        if error.status == 404:
            return BadInput(f"--node: there is no node {node!r}")
        if error.status != 403:
            return error
    phase = f"its pod is {found[0].status.phase or 'Pending'}" if found else f"none in {SYSTEM}"
    return NotAnswering(f"no agent runs on node {node}: {phase}")


def placed(options: argparse.Namespace, name: str) -> Placed:
    """The node of a pod, NAMESPACE/NAME or of the namespace that is meant. Raises BadInput, ApiError, Unreachable."""
    return asyncio.run(_placed(options, name))


async def _placed(options: argparse.Namespace, name: str) -> Placed:
    async with Api.connect(options.kubeconfig, options.context) as api:
        namespace, _, pod = name.rpartition("/")
        namespace = namespace or options.namespace or api.namespace
        _check_name("pod", pod)
        _check_name("namespace", namespace)
        try:
            found = await api.get(Pod, path_of(PODS, namespace, pod))
        except ApiError as error:
            if error.status != 404:
                raise
            raise BadInput(f"there is no pod {pod!r} in namespace {namespace!r}") from error
        if not found.spec.node_name:
            raise BadInput(f"pod {namespace}/{pod} is on no node yet")
        return Placed(found.spec.node_name, found.metadata.uid)


def _check_name(what: str, name: str) -> None:
    if not SUBDOMAIN.fullmatch(name):
        raise BadInput(f"{what}: {name!r} is no name of an object")
