"""One process for each GPU, started and watched over by torch's own launcher, which torchrun is a shell of."""

from __future__ import annotations

import os
import signal
import sys
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ..errors import RecipeError
from ..process import cores
from ..recipe import LaunchRecipe

GRACE = "600"
"""Seconds that processes may take to finish a step and save it, once they are told to stop."""

PORT = 29500


def launch(
    asked: LaunchRecipe, words: Sequence[str], use_cpu: bool = False, environ: Mapping[str, str] = os.environ
) -> int:
    """Run a command line of this package in a process for each GPU of this machine; returns its exit code.

    With launch.nodes it waits for the other machines, each of which runs the same command: MASTER_ADDR names the
    first, NODE_RANK (or SLURM_NODEID) says which one this is, MASTER_PORT may be set. Raises RecipeError.
    """
    config = launch_config(asked, use_cpu, environ)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", GRACE)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // config.nproc_per_node)))
    try:
        elastic_launch(config, sys.executable)("-m", "mantis_lite", *words)
    except ChildFailedError as error:
        codes = [found.exitcode for found in error.failures.values()]
        # The others end by 1 or are ended, once one has.
        code = next((code for code in codes if code not in (1, -signal.SIGTERM)), codes[0])
        return 128 - code if code < 0 else code
    except SignalException as error:
        return 128 + signal.Signals(error.sigval).value
    return 0


def launch_config(asked: LaunchRecipe, use_cpu: bool = False, environ: Mapping[str, str] = os.environ) -> LaunchConfig:
    """How torch is to start the processes that are asked for. Raises RecipeError."""
    nodes, gpus = asked.nodes, _gpus(asked.gpus, use_cpu)
    shared: dict[str, Any] = {"nproc_per_node": gpus, "max_restarts": 0, "logs_specs": DefaultLogsSpecs()}
    if nodes == 1:
        place: dict[str, Any] = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": uuid.uuid4().hex}
        return LaunchConfig(1, 1, local_addr="localhost", **place, **shared)
    rank = environ.get("NODE_RANK", environ.get("SLURM_NODEID"))
    if rank is None or "MASTER_ADDR" not in environ:
        raise RecipeError(
            f"launch.nodes: {nodes}, but which machine this is and where the first one is, is not known\n"
            "  Run the same command on each with MASTER_ADDR (of the first) and NODE_RANK (0, 1, ...) set."
        )
    if not rank.isdecimal() or int(rank) >= nodes:
        raise RecipeError(f"NODE_RANK: {rank}, of {nodes} machines\n  Number them from 0 to {nodes - 1}.")
    endpoint = f"{environ['MASTER_ADDR']}:{environ.get('MASTER_PORT', PORT)}"
    place = {"rdzv_backend": "static", "rdzv_endpoint": endpoint, "rdzv_configs": {"rank": int(rank)}}
    return LaunchConfig(nodes, nodes, run_id="mantis-lite", **place, **shared)


def _gpus(asked: int | None, use_cpu: bool) -> int:
    """How many processes this machine gets: those that are asked for, else one for each GPU that can be seen."""
    there = 0 if use_cpu else torch.cuda.device_count()
    if there and (asked or 0) > there:
        raise RecipeError(f"launch.gpus: {asked}, and this machine shows {there}\n  Set launch.gpus={there}.")
    return asked or there or 1
