"""Every flag of every command says what it means; the docs' reference is made of the same texts."""

from __future__ import annotations

import re

import pytest

from bench.commands import help_texts, runnable_modules

TEXTS = help_texts()
ENTRY = re.compile(r"  (?P<name>[^\s].*?)(?:\s{2,}(?P<text>\S.*))?")  # a flag or a positional, and how its text begins


def entries(text: str) -> dict[str, str]:
    """What a help says of each flag and positional, in one line."""
    found: dict[str, str] = {}
    _, _, listed = re.split(r"^( ?options|positional arguments):?$", text, maxsplit=1, flags=re.M)
    for line in listed.splitlines():
        if entry := ENTRY.fullmatch(line):
            name = entry["name"]
            found[name] = entry["text"] or ""
        elif found and line.startswith("   "):
            found[name] += f" {line.strip()}"
    return found


def test_all_commands_are_there() -> None:
    assert {"gemvg ground", "gemvg inspect", "train.sft", "quantize.gptq", "export.to_onnx", "bench.plan"} <= set(TEXTS)
    assert len(runnable_modules()) > 25


@pytest.mark.parametrize("command", TEXTS)
def test_every_flag_says_what_it_means(command: str) -> None:
    text = TEXTS[command]
    assert text.startswith("usage: ")
    said = entries(text)
    assert "-h, --help" in said
    for name, meaning in said.items():
        assert len(re.findall(r"[a-z]{2,}", meaning.partition("(default")[0])) >= 2, (name, meaning)


@pytest.mark.parametrize("command", [name for name in TEXTS if not name.startswith("gemvg")])
def test_every_value_has_its_default_or_is_required(command: str) -> None:
    for name, meaning in entries(TEXTS[command]).items():
        takes_value = name.startswith("--") and " " in name and ", --no-" not in name
        required = "required" in meaning or "needed without" in meaning
        assert not takes_value or required or "(default" in meaning, (name, meaning)


def test_texts_are_the_same_on_every_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert help_texts() == TEXTS
    assert not any("\x1b" in text for text in TEXTS.values())
    lines = TEXTS["train.sft"].splitlines()
    assert 90 < max(map(len, lines)) <= 100


def test_a_setting_of_a_stage_is_told_whole() -> None:
    said = entries(TEXTS["quantize.gptq"])
    assert said["--bits {3,4,8}"] == "bits a weight of the decoder's linear layers (default: 4)"
    assert said["--model PATH"] == "the float checkpoint folder to read, or a LoRA adapter's (required)"
    assert said["--records PATH"].endswith("none: simulated scenes (default: none)")
    assert said["--sym, --no-sym"].endswith("(default: True)")
    assert "--overwrite" in said
