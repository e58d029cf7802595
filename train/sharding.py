"""The same work on many items, here or spread over a Ray cluster: one model an actor, results as they come.

    for result in work_through(items, partial(open_model, folder), ray="local", workers=2): ...

`make` opens what is expensive and gives the function that is then called once an item. An actor that dies is started
again and its item is done again; what was handed out already is not. Knows no model; Ray is imported where it is used.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from gemvg_edge.errors import GemvgError

TRIES = 3  # of an item whose actor dies: one that kills each of them ends the run
PATIENCE = 10.0  # seconds, to be answered by a cluster
LOCAL = "local"  # as Ray's own address: a cluster of this machine that ends with the process
T = TypeVar("T")
R = TypeVar("R")
Make = Callable[[], Callable[[T], R]]


def work_through(items: Sequence[T], make: Make[T, R], ray: str | None = None, workers: int = 0) -> Iterator[R]:
    """Each item's result: in order where `ray` is None, else as they come from `workers` actors of a cluster.

    `ray`: "local", "auto", or the address of a running cluster. `workers`: 0 is one a GPU, or one a node without any.
    GemvgError for what `make` and its function raise as such, and for a cluster that cannot be reached.
    """
    if workers < 0:
        raise GemvgError(f"--workers {workers} is below 0")
    if not items:
        return
    if ray is None:
        work = make()
        yield from map(work, items)
        return
    yield from _over_ray(items, make, ray, workers)


class _Tries:
    """Counts how often each item was begun; it outlives the actors that die of one."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()

    def begin(self, number: int) -> int:
        """Which try this is, from 1."""
        self.counts[number] += 1
        return self.counts[number]


class _Actor:
    """What Ray keeps alive: the opened model; errors of the user's go home as sentences."""

    def __init__(self, make: Make[Any, Any], tries: Any) -> None:
        self.make, self.tries = make, tries
        self.work: Callable[[Any], Any] | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        return {"result": [pickle.dumps(self.answer(*pickle.loads(item))) for item in batch["item"]]}

    def answer(self, number: int, item: Any) -> tuple[str | None, Any]:
        """(what was wrong, the result), one of them None."""
        import ray

        if (tries := ray.get(self.tries.begin.remote(number))) > TRIES:
            return f"item {number} ended the process that worked on it {tries - 1} times; was it out of memory?", None
        try:
            self.work = self.work or self.make()
            return None, self.work(item)
        except GemvgError as error:
            return str(error), None


def _over_ray(items: Sequence[T], make: Make[T, R], address: str, workers: int) -> Iterator[R]:
    ray, data = _import_ray()
    started = not ray.is_initialized()
    if started:
        _start(ray, address)
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        workers = workers or gpus or len([node for node in ray.nodes() if node["Alive"]])
        context = data.DataContext.get_current()
        context.enable_progress_bars = False  # the caller shows how many results are saved
        context.enable_operator_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # each run resets it
        tries = ray.remote(num_cpus=0)(_Tries).remote()
        # A block an item: what a dying actor had in hand is one item.
        numbered = [{"item": pickle.dumps(item)} for item in enumerate(items)]
        rows = data.from_items(numbered, override_num_blocks=len(numbered))
        done = rows.map_batches(
            _Actor,
            fn_constructor_args=(make, tries),
            compute=data.ActorPoolStrategy(size=min(workers, len(items))),
            batch_size=1,
            num_cpus=None if gpus else 1,
            num_gpus=1 if gpus else None,
        )
        for row in done.iter_rows():
            fault, result = pickle.loads(row["result"])
            if fault is not None:
                raise GemvgError(fault)
            yield result
    except ray.exceptions.RayError as error:
        why = " ".join(str(error).split())[-300:]
        raise GemvgError(f"the cluster gave up ({why}); what came before is kept, the same command goes on") from None
    finally:
        if started:
            ray.shutdown()


def _import_ray() -> tuple[Any, Any]:
    # Off before the import, which reads them: it would count its users, and warn of what does not concern ours.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    logging.getLogger("ray").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        from ray import data
    except ImportError as error:
        raise GemvgError(f"--ray needs Ray ({error}); pip install --group ray in the checkout") from None
    return ray, data


def _start(ray: Any, address: str) -> None:
    """Join the cluster, or start one of this machine; GemvgError where neither can be had."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        # Its own dashboard and metrics would be further processes that nobody asked for.
        options |= {"include_dashboard": False, "_metrics_export_port": -1}
    fault = _unreachable(address)
    if fault is None:
        try:
            ray.init(address=address, **options)
            return
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            fault = error
    raise GemvgError(
        f"--ray {address}: no Ray cluster answers there ({' '.join(str(fault).split())[:200]}); give local, auto, or "
        "HOST:PORT of one that `ray start --head` began"
    )


def _unreachable(address: str) -> Exception | None:
    """What is wrong with HOST:PORT; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address in (LOCAL, "auto"):
        return None
    try:
        socket.create_connection((host, int(port)), PATIENCE).close()
    except (OSError, ValueError, OverflowError) as error:
        return error
    return None
