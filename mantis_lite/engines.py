"""What runs a function over many tasks: processes of this machine, or Ray Data on one machine or many."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context, parent_process
from typing import Any, Literal

from .errors import DataError, RecipeError

Engine = Literal["plain", "ray"]
Task = dict[str, Any]
Work = Callable[[Task], Task]


def run(engine: Engine, work: Work, tasks: Sequence[Task], workers: int) -> Iterator[Task]:
    """What `work` makes of each task, in the order in which they are done; both are what JSON can hold.

    With one worker the plain engine starts no process. Raises RecipeError where Ray is not installed, DataError where
    a process dies.
    """
    if engine == "ray":
        return _by_ray(work, tasks, workers)
    return map(work, tasks) if workers == 1 else _by_processes(work, tasks, workers)


def _by_processes(work: Work, tasks: Sequence[Task], workers: int) -> Iterator[Task]:
    # Begun anew rather than forked: the tokenizer's threads do not survive a fork.
    with ProcessPoolExecutor(workers, get_context("spawn"), _end_with_parent) as pool:
        try:
            for done in as_completed([pool.submit(work, task) for task in tasks]):
                yield done.result()
        except BrokenProcessPool:
            found = "data prepare: a process that writes died, as one does that runs out of memory"
            raise DataError(f"{found}\n  Run the same command again: it goes on. Lower --workers.") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Let this process end when that which began it is killed: it would wait for tasks for ever."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _by_ray(work: Work, tasks: Sequence[Task], workers: int) -> Iterator[Task]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # or it reports home
    try:
        import ray
        import ray.data
    except ImportError:
        raise RecipeError("--engine: ray is not installed\n  pip install 'mantis-lite[ray]'") from None
    if begun := not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        here: dict[str, Any] = {} if address else {"num_cpus": workers, "include_dashboard": False}
        ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **here)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        rows = ray.data.from_items([{"task": json.dumps(task)} for task in tasks], override_num_blocks=len(tasks))
        for row in rows.map(partial(_of_row, work)).iter_rows():
            yield json.loads(row["done"])
    finally:
        if begun:
            ray.shutdown()


def _of_row(work: Work, row: dict[str, str]) -> dict[str, str]:
    """Tasks as text: Arrow would make other kinds of numbers and lists of them."""
    return {"done": json.dumps(work(json.loads(row["task"])))}
