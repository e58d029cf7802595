"""transformers on PyTorch's CPU kernels, bfloat16, as a measured system. Runs in its own environment; see serve.py."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from importlib import import_module
from statistics import median
from typing import Any

PICTURE, PLACE = "<|image_pad|>", "<|placeholder|>"


@dataclass
class System:
    """The model, what the vision tower took, and the pictures' keys and values."""

    torch: Any
    tokenizer: Any
    images: Any
    model: Any
    vision_ms: list[float] = field(default_factory=list)
    started: float = 0.0
    cache: Any = None
    seen: int = 0  # tokens of the cache that are the pictures'
    pictures: list[Any] = field(default_factory=list)


def open_system(settings: dict[str, Any]) -> System:
    """Weights as the checkpoint stores them; SDPA attention is the default."""
    torch, transformers = import_module("torch"), import_module("transformers")
    torch.set_num_threads(settings["threads"])
    torch.set_grad_enabled(False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(settings["model"])
    # Not the whole processor: its video part wants torchvision, whose build must match torch's.
    images = transformers.AutoImageProcessor.from_pretrained(settings["model"])
    model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(settings["model"], dtype=torch.bfloat16).eval()
    system = System(torch, tokenizer, images, model)
    tower = model.model.visual
    tower.register_forward_pre_hook(lambda *_: setattr(system, "started", time.perf_counter()))
    tower.register_forward_hook(lambda *_: system.vision_ms.append(_milliseconds(system.started)))
    return system


def processes(system: System) -> list[int]:
    """All in this one."""
    return [os.getpid()]


def first(system: System, request: dict[str, Any]) -> dict[str, Any]:
    """New pictures and a question: each phase to the first token, then steady decoding."""
    image = import_module("PIL.Image")
    started = time.perf_counter()
    system.pictures, system.cache = [image.open(path).convert("RGB") for path in request["pictures"]], None
    system.vision_ms.clear()
    inputs = _inputs(system, request["question"])
    prepared = _milliseconds(started)
    out = system.model(**inputs, use_cache=True, logits_to_keep=1)
    token = int(out.logits[0, -1].argmax())
    first_token, vision = _milliseconds(started), sum(system.vision_ms)
    system.cache = out.past_key_values
    ids = inputs["input_ids"][0].tolist()
    end = system.tokenizer.convert_tokens_to_ids("<|vision_end|>")
    system.seen = len(ids) - ids[::-1].index(end)
    taken = []
    for _ in range(request["tokens"]):
        one = time.perf_counter()
        out = system.model(
            input_ids=system.torch.tensor([[token]]), past_key_values=system.cache, use_cache=True, logits_to_keep=1
        )
        token = int(out.logits[0, -1].argmax())
        taken.append(_milliseconds(one))
    return {
        "first_token_ms": first_token,
        "vision_ms": prepared + vision,
        "prefill_ms": first_token - prepared - vision,
        "prompt_tokens": len(ids),
        "token_ms": median(taken),
    }


def again(system: System, request: dict[str, Any]) -> dict[str, Any]:
    """The pictures' keys and values are kept (the cache is cropped); only the question is prefilled."""
    started = time.perf_counter()
    inputs = _inputs(system, request["question"])
    system.cache.crop(system.seen - system.cache.get_seq_length())
    position, _ = system.model.model.get_rope_index(
        **{name: inputs[name] for name in ("input_ids", "image_grid_thw", "attention_mask", "mm_token_type_ids")
           if name in inputs}
    )  # fmt: skip
    out = system.model(
        input_ids=inputs["input_ids"][:, system.seen :],
        position_ids=position[:, :, system.seen :],
        past_key_values=system.cache,
        use_cache=True,
        logits_to_keep=1,
    )
    out.logits[0, -1].argmax().item()
    return {"first_token_ms": _milliseconds(started), "way": "the pictures' keys and values, kept by hand"}


def _inputs(system: System, question: str) -> Any:
    content = [{"type": "image"} for _ in system.pictures] + [{"type": "text", "text": question}]
    prompt = system.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = dict(system.images(images=system.pictures, return_tensors="pt"))
    for grid in inputs["image_grid_thw"]:
        prompt = prompt.replace(PICTURE, PLACE * (int(grid.prod()) // system.images.merge_size**2), 1)
    text = system.tokenizer(prompt.replace(PLACE, PICTURE), return_tensors="pt")
    inputs["mm_token_type_ids"] = (text["input_ids"] == system.tokenizer.convert_tokens_to_ids(PICTURE)).int()
    return inputs | dict(text)


def _milliseconds(started: float) -> float:
    return (time.perf_counter() - started) * 1e3
