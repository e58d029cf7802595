"""Refuses a checkpoint whose chat template reads otherwise than `gemvg_edge.prompt` writes.

The runtime has one template of its own; a checkpoint trained with another would answer nonsense without a word. Needs
jinja2, which is the training stack's; without it, or without a template, there is nothing to compare.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file, read_text
from gemvg_edge.prompt import PromptTemplate, prefix_text, query_text
from train.checkpoint import read_json

QUERY = "the red mug"
RENDERER = Path(__file__).with_name("render_template.py")
SECONDS = 20  # that a template may take; Qwen's takes a hundredth, nearly all the rest is Python's start
MEMORY = 2**29  # and the bytes of address space; Python and jinja2 take a tenth
LONGEST = 2**20  # characters that come back, more than any prompt of ours


def check_chat_template(folder: Path, prompt: PromptTemplate) -> None:
    """Render a message of two pictures with the checkpoint's own template and compare."""
    found = _find_template(folder)
    if found is None or find_spec("jinja2") is None:
        return
    path, template = found
    try:
        rendered = _render(template, prompt)
    except ValueError as error:
        raise GemvgError(f"{path}: the chat template cannot be rendered ({error}); mend or remove it") from None
    expected = prefix_text(prompt, 2) + query_text(prompt, QUERY)
    if rendered != expected:
        shorter = min(len(rendered), len(expected))
        at = next((i for i, (a, b) in enumerate(zip(rendered, expected, strict=False)) if a != b), shorter)
        raise GemvgError(
            f"{path}: the chat template writes {rendered[at : at + 40]!r}, gemvg-edge {expected[at : at + 40]!r}; "
            "give the --profile that the checkpoint was trained with, or none and `grounding.prompt` in config.json"
        )


def _render(template: str, prompt: PromptTemplate) -> str:
    """The template's text for one question; ValueError says why there is none."""
    content: list[dict[str, Any]] = [{"type": "image"}, {"type": "image"}]
    content.append({"type": "text", "text": prompt.query.replace("{query}", QUERY)})
    system = [{"role": "system", "content": prompt.system}] if prompt.system_turn else []
    messages = [*system, {"role": "user", "content": content}]
    asked = {"template": template, "messages": messages, "add_vision_id": prompt.number_images,
             "memory": MEMORY, "longest": LONGEST}  # fmt: skip
    command = [sys.executable, "-P", str(RENDERER)]  # -P: this folder's other files are no modules to it
    try:
        done = subprocess.run(
            command, input=json.dumps(asked).encode(), capture_output=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"it does not end within {SECONDS} second(s)") from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:  # ended by the system, which says nothing
        raise ValueError(f"its process ended with code {done.returncode}") from None
    if "error" in answer:
        raise ValueError(answer["error"])
    return str(answer["text"])


def _find_template(folder: Path) -> tuple[Path, str] | None:
    path = folder / "chat_template.jinja"
    if is_file(path):
        return path, read_text(path)
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = folder / name
        if is_file(path):
            template = read_json(path).get("chat_template")
            if isinstance(template, list):  # named ones
                named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
                template = named.get("default")
            if isinstance(template, str):
                return path, template
    return None
