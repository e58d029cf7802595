"""Work spread over actors: faults of the user's come home as sentences, what kills every actor ends the run."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from functools import partial

import pytest

from gemvg_edge.errors import GemvgError
from train.sharding import work_through


def open_squarer(refused: int, deadly: int) -> Callable[[int], int]:
    """A function that squares, refuses one number and dies of another."""

    def square(number: int) -> int:
        if number == deadly:
            os._exit(1)
        if number == refused:
            raise GemvgError(f"{number} is refused; give another")
        return number * number

    return square


def test_here_results_come_in_order() -> None:
    assert list(work_through([3, 1, 2], partial(open_squarer, 9, 9))) == [9, 1, 4]
    assert list(work_through([], partial(open_squarer, 9, 9), "local", 2)) == []


def test_over_ray_faults_come_home() -> None:
    import ray

    # One cluster for all of it: starting takes seconds.
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, num_cpus=2)
    try:
        assert sorted(work_through(range(6), partial(open_squarer, 9, 9), "local", 2)) == [0, 1, 4, 9, 16, 25]
        with pytest.raises(GemvgError, match="4 is refused; give another"):
            list(work_through(range(6), partial(open_squarer, 4, 9), "local", 2))
        with pytest.raises(GemvgError, match="item 3 ended the process that worked on it 3 times"):
            list(work_through(range(6), partial(open_squarer, 9, 3), "local", 2))
    finally:
        ray.shutdown()


def test_a_cluster_that_is_not_there_is_said_soon() -> None:
    started = time.monotonic()
    for address in ("127.0.0.1:1", "nonsense"):
        with pytest.raises(GemvgError, match=rf"--ray {address}: no Ray cluster answers there"):
            list(work_through([1], partial(open_squarer, 9, 9), address))
    assert time.monotonic() - started < 20
