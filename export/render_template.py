"""A chat template from a stranger's checkpoint, rendered in a process of its own with bounds on time and memory.

A template is a program: jinja2's sandbox bounds what it may touch, not how long it runs. Reads one JSON object from
standard input (template, messages, add_vision_id, and memory and longest, the bounds) and writes one: {"text"} or
{"error"}. Run by `export.template_check` as a file, not as a module: it imports nothing of ours.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from typing import Any

SHOWN = 200  # characters of an error


def render(template: str, messages: list[dict[str, Any]], add_vision_id: bool) -> str:
    """As transformers renders: its options, its extensions and the functions that it gives templates."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlocks(Extension):
        """`{% generation %}..{% endgeneration %}`, which marks the assistant's words for training, as plain text."""

        tags = {"generation"}  # noqa: RUF012  (as jinja2 declares it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    extensions = ["jinja2.ext.loopcontrols", GenerationBlocks]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    compiled = environment.from_string(template)
    return compiled.render(messages=messages, add_generation_prompt=True, add_vision_id=add_vision_id)


def to_json(value: Any, **options: Any) -> str:
    """Without HTML's escapes, which jinja2's own has."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def bound_memory(size: int) -> None:
    """Let this process have no more bytes of address space, where the system can do that (Linux, macOS)."""
    try:
        import resource
    except ImportError:
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard == resource.RLIM_INFINITY or hard > size:
        resource.setrlimit(resource.RLIMIT_AS, (size, hard))


def main() -> None:
    """One template from standard input to standard output."""
    asked = json.loads(sys.stdin.buffer.read())
    bound_memory(asked["memory"])
    try:
        answer = {"text": render(asked["template"], asked["messages"], asked["add_vision_id"])[: asked["longest"]]}
    except MemoryError:
        answer = {"error": f"it needs more than {asked['memory'] >> 20} MiB"}
    except Exception as error:
        answer = {"error": (str(error).splitlines() or [type(error).__name__])[0][:SHOWN]}
    sys.stdout.buffer.write(json.dumps(answer).encode())


if __name__ == "__main__":
    main()
