"""Refuses a checkpoint whose chat template reads otherwise than `gemvg_edge.prompt` writes.

The runtime has one template of its own; a checkpoint trained with another would answer nonsense without a word. Needs
jinja2, which is the training stack's; without it, or without a template, there is nothing to compare.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file, read_text
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
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    content: list[dict[str, Any]] = [{"type": "image"}, {"type": "image"}]
    content.append({"type": "text", "text": prompt.query.replace("{query}", QUERY)})
    messages = [{"role": "system", "content": prompt.system}, {"role": "user", "content": content}]
    # As transformers renders: its options, its extensions and the functions that it gives templates.
    extensions = ["jinja2.ext.loopcontrols", _generation_blocks()]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(template).render(
        messages=messages, add_generation_prompt=True, add_vision_id=prompt.number_images
    )


def _generation_blocks() -> type[Any]:
    """`{% generation %}..{% endgeneration %}`, which marks the assistant's words for training, as plain text."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class GenerationBlocks(Extension):
        tags = {"generation"}  # noqa: RUF012  (as jinja2 declares it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    return GenerationBlocks


def _to_json(value: Any, **options: Any) -> str:
    """Without HTML's escapes, which jinja2's own has."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


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
