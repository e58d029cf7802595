"""Smoothing and rotating change weights and nothing that the model computes; both help 8 bits where outliers are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.compression import round_activations
from gemvg_edge.errors import GemvgError
from quantize.checkpoint import open_checkpoint
from quantize.gptq import Settings, quantize
from quantize.rotate import Settings as Rotation
from quantize.rotate import random_rotation, rotate
from quantize.smooth import Settings as Smoothing
from quantize.smooth import smooth
from quantize.torch_model import load_model
from tests.checkpoints import write_checkpoint
from tests.test_gptq import distances, prompts_of, tiny, write_prompts

__all__ = ["tiny"]


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A checkpoint some of whose channels are forty times as large as others after each norm, as in large models."""
    folder = tmp_path_factory.mktemp("outliers")
    model = write_checkpoint(folder / "checkpoint")
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            for norm, readers in (
                (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
                (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
            ):
                norm.weight[:3] *= 40
                for reader in readers:
                    reader.weight[:, :3] /= 40
    model.save_pretrained(folder / "checkpoint")
    write_prompts(folder)
    return model, folder


def change(kind: str, folder: Path, out: str) -> Path:
    if kind == "smooth":
        records = folder / "records.jsonl"
        smooth(Smoothing(folder / "checkpoint", folder / out, samples=6, records=records, device="cpu"))
    else:
        rotate(Rotation(folder / "checkpoint", folder / out))
    return folder / out


@pytest.mark.parametrize("kind", ["smooth", "rotate"])
def test_the_model_computes_the_same(kind: str, tiny: tuple[Any, Path]) -> None:
    model, folder = tiny
    out = change(kind, folder, kind)
    assert max(distances(model, load_model(out), prompts_of(folder))) < 1e-4
    name = "model.layers.0.self_attn.q_proj.weight"
    before, after = (open_checkpoint(checkpoint).read(name) for checkpoint in (folder / "checkpoint", out))
    assert np.abs(before - after).max() > 0.01


@pytest.mark.parametrize("kind", ["smooth", "rotate"])
def test_eight_bits_hold_outliers_afterwards(kind: str, outliers: tuple[Any, Path]) -> None:
    model, folder = outliers
    errors = []
    for source in (folder / "checkpoint", change(kind, folder, kind)):
        out = folder / f"{source.name}.{kind}.w8"
        quantize(Settings(source, out, bits=8, group_size=-1, method="rtn", device="cpu"))
        rounded = load_model(out)
        round_activations(rounded)
        errors.append(np.mean(distances(model, rounded, prompts_of(folder))))
    assert errors[1] < 0.6 * errors[0]


def test_a_tied_head_becomes_one_of_its_own(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "checkpoint", tied=True)
    write_prompts(tmp_path)
    rotate(Rotation(tmp_path / "checkpoint", tmp_path / "rotated"))
    config = json.loads((tmp_path / "rotated" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert max(distances(model, load_model(tmp_path / "rotated"), prompts_of(tmp_path))) < 1e-4


def test_rotations_are_orthogonal() -> None:
    rotation = random_rotation(96, seed=3)
    assert np.abs(rotation @ rotation.T - np.eye(96)).max() < 1e-5


def test_bad_input_is_one_sentence(tiny: tuple[Any, Path]) -> None:
    _, folder = tiny
    with pytest.raises(GemvgError, match="--alpha is 2"):
        smooth(Smoothing(folder / "checkpoint", folder / "bad", alpha=2.0))
    quantize(Settings(folder / "checkpoint", folder / "coded", method="rtn", group_size=8))
    with pytest.raises(GemvgError, match="is quantised already"):
        smooth(Smoothing(folder / "coded", folder / "bad"))
    with pytest.raises(GemvgError, match="is quantised already"):
        rotate(Rotation(folder / "coded", folder / "bad"))
    assert not (folder / "bad").exists()
