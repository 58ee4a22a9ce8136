"""`ebbline doctor`'s check of Ray: connects to the cluster and lists its nodes. For a local cluster
it lists this machine's GPU types.

Ray is imported in a process of its own: `python -m ebbline.cluster.executors.ray_check ADDRESS`
prints the result as JSON.
"""

import json
import os
import platform
import shutil
import sys
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit

from ebbline.cluster.checks import ExecutorCheck, Finding, one_line, run_module, unreachable

ACCELERATOR = "accelerator_type:"  # how Ray's resources name the type of a real GPU


def check(address: str) -> ExecutorCheck:
    """The findings on the cluster at an address, and its GPU types."""
    if address not in ("auto", "local"):
        where = urlsplit(address if "://" in address else f"ray://{address}")
        silent = unreachable(where.hostname or "", where.port or 6379)
        if silent:
            remedy = (
                "start the cluster (ray up ray_cluster.yaml), or give its head's HOST:6379 to "
                "--address; on the head itself: auto"
            )
            return _problem(f"{address} is not reachable: {silent}", remedy)
    found = run_module(__name__, address)
    if "error" in found:
        remedy = "on the cluster's head, --address auto; without a cluster, --address local"
        if "Version mismatch" in found["error"]:
            remedy = (
                f"put the cluster's Ray and Python here, or ray {version('ray')} and Python "
                f"{platform.python_version()} there"
            )
        return _problem(f"{address}: {found['error']}", remedy)
    types = tuple(found["types"])
    if address == "local":
        return ExecutorCheck(
            (Finding("ray", "ok", "local: each run starts a cluster here"),), types
        )
    nodes = [
        f"{node['name']} {node['gpus']:g} GPU {' '.join(node['labels'])}".strip()
        for node in found["nodes"]
    ]
    gpus = sum(node["gpus"] for node in found["nodes"])
    kind = "GPUs" if types or not gpus else "logical GPUs"
    seen = (
        f"{address}: ray {version('ray')} as here, {len(nodes)} node{'s' * (len(nodes) != 1)}, "
        f"{gpus:g} {kind} ({'; '.join(nodes)})"
    )
    if gpus == 0:
        remedy = (
            "a cluster with an autoscaler grows when a run starts; else add workers with GPUs "
            "(logical ones: ray start --num-gpus)"
        )
        return ExecutorCheck((Finding("ray", "warning", seen, remedy),))
    return ExecutorCheck((Finding("ray", "ok", seen),), types)


def _problem(seen: str, remedy: str) -> ExecutorCheck:
    return ExecutorCheck((Finding("ray", "problem", seen, remedy),))


def _nodes(address: str) -> dict[str, Any]:
    """The nodes and GPU types of the cluster; for `local` the GPU types of this machine."""
    import ray  # only in this process; `check` runs in the doctor's process

    if address == "local":
        from ray._private.accelerators import NvidiaGPUAcceleratorManager as Nvidia

        found = Nvidia.get_current_node_accelerator_type() if shutil.which("nvidia-smi") else None
        return {"types": [found] if found else []}
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        return {"error": one_line(error)}
    alive = [node for node in ray.nodes() if node["Alive"]]
    types = sorted(
        {
            name.removeprefix(ACCELERATOR)
            for node in alive
            for name in node["Resources"]
            if name.startswith(ACCELERATOR)
        }
    )
    nodes = [
        {
            "name": node["NodeManagerHostname"],
            "gpus": node["Resources"].get("GPU", 0.0),
            "labels": [
                f"{name}={value}"
                for name, value in sorted(node["Labels"].items())
                if name != "ray.io/node-id"
            ],
        }
        for node in alive
    ]
    return {"nodes": nodes, "types": types}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_nodes(sys.argv[1])) + "\n")
