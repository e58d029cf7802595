"""What `/metrics` tells Prometheus: requests, the queue, phases of answers, caches, scenes, memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from gemvg_edge.serve.messages import Message
from gemvg_edge.serve.pool import Pool
from gemvg_edge.serve.scenes import Scenes

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for every one, of when it began
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
PHASES = ("preprocess", "vision", "image_prefill", "query_prefill", "decode")


class Metrics:
    """Counters of one service."""

    def __init__(self, pool: Pool, scenes: Scenes) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        histogram = partial(Histogram, buckets=SECONDS, registry=self.registry)
        self.requests = counter("gemvg_requests", "Requests by route and status", ["route", "status"])
        self.seconds = histogram("gemvg_request_seconds", "From a request's head to the end of its answer", ["route"])
        self.queued = histogram("gemvg_queue_seconds", "Wait for a worker")
        self.phases = histogram("gemvg_phase_seconds", "Phases of answers; a look's own count once", ["phase"])
        self.image_tokens = counter("gemvg_image_tokens", "Tokens of pictures that were looked at")
        self.cached_tokens = counter("gemvg_cached_tokens", "Of those, found in the cache")
        self.answer_tokens = counter("gemvg_answer_tokens", "Tokens that were written")
        self.registry.register(_State(pool, scenes))

    def answered(self, answers: list[Message], queue_ms: float, looked: bool) -> None:
        """Count a request's answers; `looked` where its pictures were looked at for it."""
        self.queued.observe(queue_ms / 1e3)
        for k, answer in enumerate(answers):
            timings = answer["timings"]
            for phase in PHASES if looked and not k else PHASES[3:]:
                self.phases.labels(phase).observe(timings[f"{phase}_ms"] / 1e3)
            self.answer_tokens.inc(timings["answer_tokens"])
        if looked and answers:
            self.image_tokens.inc(answers[0]["timings"]["image_tokens"])
            self.cached_tokens.inc(answers[0]["timings"]["cached_tokens"])

    def text(self) -> bytes:
        """All of it as Prometheus reads it."""
        return generate_latest(self.registry)


class _State(Collector):
    """What is so at the moment it is asked."""

    def __init__(self, pool: Pool, scenes: Scenes) -> None:
        self._pool, self._scenes = pool, scenes

    def collect(self) -> Iterator[GaugeMetricFamily]:
        pool = self._pool
        for name, text, value in (
            ("gemvg_queue_length", "Requests that wait", len(pool.waiting)),
            ("gemvg_running", "Requests that are worked on", pool.running),
            ("gemvg_workers_ready", "Workers that take requests", len(pool.ready)),
            ("gemvg_worker_restarts", "Workers that were started in place of lost ones", pool.restarts),
            ("gemvg_scenes", "Scenes that are kept", len(self._scenes.kept)),
            ("gemvg_scene_bytes", "Memory of these scenes", self._scenes.bytes),
        ):
            yield GaugeMetricFamily(name, text, value)
        memory = GaugeMetricFamily("gemvg_resident_bytes", "Memory of each process", labels=["process"])
        memory.add_metric(["service"], resident(os.getpid()))
        for k, worker in enumerate(pool.ready):
            memory.add_metric([f"worker{k}"], resident(worker.about["pid"] if worker.about else 0))
        yield memory


def resident(pid: int) -> int:
    """Bytes that a process has in memory; 0 where it is gone."""
    with suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0
