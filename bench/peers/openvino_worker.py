"""OpenVINO GenAI's VLMPipeline as a measured system, with its own clock. Runs in its own environment; see serve.py.

`again` is a second turn of the chat, so the pictures and their keys and values are there already.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass
class System:
    """The pipeline and the package that it is from."""

    genai: Any
    openvino: Any
    pipeline: Any
    chatting: bool = False


def open_system(settings: dict[str, Any]) -> System:
    """Its defaults, with the threads asked for."""
    genai, openvino = import_module("openvino_genai"), import_module("openvino")
    options = {"INFERENCE_NUM_THREADS": settings["threads"], **settings.get("options", {})}
    if settings.get("prefix_caching"):
        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching, scheduler.cache_size = True, 1
        options["scheduler_config"] = scheduler
    return System(genai, openvino, genai.VLMPipeline(settings["model"], "CPU", **options))


def processes(system: System) -> list[int]:
    """All in this one."""
    return [os.getpid()]


def first(system: System, request: dict[str, Any]) -> dict[str, Any]:
    """New pictures and a question, in a new chat."""
    if system.chatting:
        system.pipeline.finish_chat()
    system.pipeline.start_chat("You are a helpful assistant.")
    system.chatting = True
    started = time.perf_counter()
    pictures = [read_picture(system, path) for path in request["pictures"]]
    reading = (time.perf_counter() - started) * 1e3
    metrics = _ask(system, request["question"], 1 + request["tokens"], images=pictures)
    vision, to_first = metrics.get_prepare_embeddings_duration().mean, metrics.get_ttft().mean
    return {
        "first_token_ms": reading + to_first,
        "vision_ms": reading + vision,
        "prefill_ms": to_first - vision,
        "prompt_tokens": metrics.get_num_input_tokens(),
        "token_ms": metrics.get_tpot().mean,
        "generate_ms": metrics.get_generate_duration().mean,
    }


def again(system: System, request: dict[str, Any]) -> dict[str, Any]:
    """The next question of the chat."""
    metrics = _ask(system, request["question"], 2)
    return {"first_token_ms": metrics.get_ttft().mean, "way": "the next turn of its chat"}


def read_picture(system: System, path: str) -> Any:
    """A PNG as the tensor that the pipeline takes."""
    numpy, image = import_module("numpy"), import_module("PIL.Image")
    return system.openvino.Tensor(numpy.asarray(image.open(path).convert("RGB"))[None])


def _ask(system: System, question: str, tokens: int, **given: Any) -> Any:
    config = system.genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=False)
    return system.pipeline.generate(question, generation_config=config, **given).perf_metrics
