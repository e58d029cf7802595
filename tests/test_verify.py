"""export.verify as a command: it passes a true export, fails a wrong one, and says what it cannot compare."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from export.hashed_file import describe
from export.to_onnx import main as export
from export.verify import TOLERANCES, largest_difference
from export.verify import main as verify
from gemvg_edge.bundle import MANIFEST, VISION_GRAPH
from quantize.gptq import Settings, quantize
from tests.checkpoints import TINY, edit_json, write_checkpoint
from tests.damage import alter, edit_manifest

Capture = pytest.CaptureFixture[str]
TOLERANCE = TOLERANCES["float32"]
KINDS = ("vision", "prefill", "decode")


@pytest.fixture
def pair(random_model: tuple[Any, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A bundle and the checkpoint it was exported from, to be changed."""
    source = random_model[1].parent
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    return tmp_path / "bundle", tmp_path / "checkpoint"


def run(pair: tuple[Path, Path], capsys: Capture) -> tuple[int, dict[str, Any]]:
    code = verify([str(pair[0]), "--against", str(pair[1])])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_true_export_passes(pair: tuple[Path, Path], capsys: Capture) -> None:
    code, result = run(pair, capsys)
    assert (code, result["passed"], result["tolerance"]) == (0, True, TOLERANCE)
    assert all(0 < result[kind] <= TOLERANCE for kind in KINDS)
    assert "with_8_bit_activations" not in result


CHANGES: dict[str, tuple[Callable[[Any], torch.Tensor], set[str]]] = {
    "vision": (lambda model: model.model.visual.blocks[0].norm1.weight, {"vision", "prefill", "decode"}),
    "decoder": (lambda model: model.model.language_model.layers[1].mlp.up_proj.weight, {"prefill", "decode"}),
    "head": (lambda model: model.lm_head.weight, {"prefill", "decode"}),
}


@pytest.mark.parametrize("part", CHANGES)
def test_other_weights_fail(random_model: tuple[Any, Path], tmp_path: Path, capsys: Capture, part: str) -> None:
    weight, wrong = CHANGES[part]
    model = write_checkpoint(tmp_path)
    with torch.no_grad():
        weight(model).mul_(1.1)
    model.save_pretrained(tmp_path)
    code, result = run((random_model[1], tmp_path), capsys)
    assert (code, result["passed"]) == (1, False)
    assert {kind for kind in KINDS if result[kind] > TOLERANCE} == wrong


def test_no_number_fails(tmp_path: Path, capsys: Capture) -> None:
    model = write_checkpoint(tmp_path / "checkpoint")
    with torch.no_grad():
        model.lm_head.weight[0] = 3e38  # finite, and its products are not
    model.save_pretrained(tmp_path / "checkpoint")
    assert export([str(tmp_path / "checkpoint"), str(tmp_path / "bundle")]) == 0
    capsys.readouterr()
    code, result = run((tmp_path / "bundle", tmp_path / "checkpoint"), capsys)
    assert (code, result["passed"], result["prefill"]) == (1, False, None)


def test_largest_difference() -> None:
    ones = np.ones((2, 2), np.float32)
    assert largest_difference(ones, ones * np.float32(0.5)) == 0.5
    assert largest_difference(ones, ones * np.float32("nan")) == np.inf
    assert largest_difference(ones * np.float32("inf"), ones) == np.inf
    spread = np.array([-2, 2], np.float32)
    assert largest_difference(spread, spread + 1, relative=True) == 0.5


def test_rounded_weights_are_judged_on_exact_activations(pair: tuple[Path, Path], capsys: Capture) -> None:
    small = pair[0].parent / "int4"
    assert export([str(pair[1]), str(small), "--weights", "int4"]) == 0
    capsys.readouterr()
    code, result = run((small, pair[1]), capsys)
    assert (code, result["passed"], result["tolerance"]) == (0, True, TOLERANCE)
    assert max(result[kind] for kind in KINDS) <= TOLERANCE
    assert all(TOLERANCE < result["with_8_bit_activations"][kind] < 1 for kind in KINDS)


def test_other_weights_fail_where_they_are_rounded(pair: tuple[Path, Path], tmp_path: Path, capsys: Capture) -> None:
    assert export([str(pair[1]), str(pair[0].parent / "int4"), "--weights", "int4"]) == 0
    model = write_checkpoint(tmp_path / "other")
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.up_proj.weight.mul_(1.1)
    model.save_pretrained(tmp_path / "other")
    capsys.readouterr()
    code, result = run((pair[0].parent / "int4", tmp_path / "other"), capsys)
    assert (code, result["passed"]) == (1, False)


def test_codes_against_the_floats_they_came_from_have_no_verdict(
    pair: tuple[Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    codes, bundle = tmp_path / "codes", tmp_path / "coded"
    quantize(Settings(pair[1], codes, method="rtn", group_size=-1, device="cpu"))
    assert export([str(codes), str(bundle)]) == 0
    capsys.readouterr()
    code, result = run((bundle, pair[1]), capsys)
    assert (code, result["passed"], result["tolerance"]) == (1, None, None)
    assert result["vision"] <= TOLERANCE < min(result["prefill"], result["decode"])
    code, result = run((bundle, codes), capsys)
    assert (code, result["passed"], result["tolerance"]) == (0, True, TOLERANCE)


def test_a_node_that_a_target_would_not_parse_fails(pair: tuple[Path, Path], tmp_path: Path, capsys: Capture) -> None:
    bundle = tmp_path / "plain"
    assert export([str(pair[1]), str(bundle), "--dialect", "plain", "--precision", "float32"]) == 0
    model = onnx.load(bundle / VISION_GRAPH, load_external_data=False)
    model.graph.node.append(onnx.helper.make_node("Unique", ["tokens"], ["kinds"], name="visual/odd"))
    onnx.save(model, bundle / VISION_GRAPH)
    files = json.loads((bundle / MANIFEST).read_text())["files"]
    edit_manifest(bundle, files=files | {VISION_GRAPH: describe(bundle / VISION_GRAPH)})
    capsys.readouterr()
    code, result = run((bundle, pair[1]), capsys)
    assert (code, result["passed"]) == (1, False)
    assert max(result[kind] for kind in KINDS) <= TOLERANCE, "the numbers are not to blame"
    assert len(result["unparsed"]) == len(result["targets"]) == 3
    assert all(said.startswith("vision.onnx: node 'visual/odd' (Unique): not among") for said in result["unparsed"])


def test_a_graph_within_a_graph_is_not_run(pair: tuple[Path, Path], capsys: Capture) -> None:
    """It might be a loop without an end."""
    helper, bundle = onnx.helper, pair[0]
    model = onnx.load(bundle / VISION_GRAPH, load_external_data=False)
    going_on = helper.make_tensor_value_info("again", onnx.TensorProto.BOOL, [])
    always = onnx.numpy_helper.from_array(np.array(True), "again")
    body = helper.make_graph([], "body", [], [going_on], [always])
    model.graph.node.append(helper.make_node("Loop", ["", ""], [], "visual/loop", body=body))
    onnx.save(model, bundle / VISION_GRAPH)
    files = json.loads((bundle / MANIFEST).read_text())["files"]
    edit_manifest(bundle, files=files | {VISION_GRAPH: describe(bundle / VISION_GRAPH)})
    assert verify([str(bundle), "--against", str(pair[1])]) == 2
    assert "vision.onnx is not an ONNX graph (it has a graph within its graph)" in capsys.readouterr().err


def test_another_models_checkpoint(random_model: tuple[Any, Path], tmp_path: Path, capsys: Capture) -> None:
    write_checkpoint(tmp_path, {**TINY, "text_config": TINY["text_config"] | {"num_hidden_layers": 2}})
    assert verify([str(random_model[1]), "--against", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "bundle has layers 3" in message
    assert f"{tmp_path} 2; give the checkpoint that the bundle was exported from" in message


BAD: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "altered graph": (lambda bundle, _: alter("vision.onnx")(bundle), "vision.onnx"),
    "no bundle": (lambda bundle, _: shutil.rmtree(bundle), "no such bundle"),
    "no checkpoint": (lambda _, checkpoint: shutil.rmtree(checkpoint), "no such"),
    "other model": (lambda _, checkpoint: edit_json(checkpoint / "config.json", model_type="llava"), "llava"),
    "no weights": (lambda _, checkpoint: (checkpoint / "model.safetensors").unlink(), "safetensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_it_cannot_compare(pair: tuple[Path, Path], capsys: Capture, case: str) -> None:
    spoil, named = BAD[case]
    spoil(*pair)
    assert verify([str(pair[0]), "--against", str(pair[1])]) == 2
    message = capsys.readouterr().err
    assert named in message
    assert len(message.splitlines()) == 1
