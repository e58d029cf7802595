"""Refuses a checkpoint whose chat template reads otherwise than `gemvg_edge.prompt` writes.

The runtime has one template of its own; a checkpoint trained with another would answer nonsense without a word. Needs
jinja2, which is the training stack's; without it, or without a template, there is nothing to compare.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gemvg_edge.errors import GemvgError
from gemvg_edge.prompt import PromptTemplate, prefix_text, query_text
from train.checkpoint import read_json

QUERY = "the red mug"


def check_chat_template(folder: Path, prompt: PromptTemplate) -> None:
    """Render a message of two pictures with the checkpoint's own template and compare."""
    found = _find_template(folder)
    if found is None:
        return
    path, template = found
    try:
        rendered = _render(template, prompt)
    except ImportError:
        return
    except Exception as error:  # a template is a program
        raise GemvgError(f"{path}: the chat template cannot be rendered ({error}); mend or remove it") from None
    expected = prefix_text(prompt, 2) + query_text(prompt, QUERY)
    if rendered != expected:
        shorter = min(len(rendered), len(expected))
        at = next((i for i, (a, b) in enumerate(zip(rendered, expected, strict=False)) if a != b), shorter)
        raise GemvgError(
            f"{path}: the chat template writes {rendered[at : at + 40]!r}, gemvg-edge {expected[at : at + 40]!r}; "
            "set `grounding.prompt` in config.json to what the checkpoint was trained with"
        )


def _render(template: str, prompt: PromptTemplate) -> str:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    content: list[dict[str, Any]] = [{"type": "image"}, {"type": "image"}]
    content.append({"type": "text", "text": prompt.query.replace("{query}", QUERY)})
    messages = [{"role": "system", "content": prompt.system}, {"role": "user", "content": content}]
    # transformers renders with these two options.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        messages=messages, add_generation_prompt=True, add_vision_id=prompt.number_images
    )


def _find_template(folder: Path) -> tuple[Path, str] | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path, path.read_text(encoding="utf-8", errors="replace")
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            template = read_json(path).get("chat_template")
            if isinstance(template, str):
                return path, template
    return None
