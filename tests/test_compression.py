"""bench.compression: its figures against plain ones, and the whole command on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import compression
from bench.boxes.torch_grounder import TorchGrounder
from bench.compression import Row, answer_distributions, round_activations, weight_error
from gemvg_edge.prompt import encode, token_id
from quantize.gptq import Settings, quantize
from tests.checkpoints import torch_logits
from tests.test_gptq import SAMPLES, prompts_of, tiny
from train.data.record import read_records

__all__ = ["tiny"]


def test_weight_error_by_hand(tiny: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = tiny
    quantize(Settings(folder / "checkpoint", tmp_path / "codes", method="rtn", group_size=8, device="cpu"))
    other = TorchGrounder.open(tmp_path / "codes").model.state_dict()
    plain = {name: tensor for name, tensor in model.state_dict().items() if "inv_freq" not in name}
    wrong = sum(float((other[name].double() - tensor.double()).square().sum()) for name, tensor in plain.items())
    whole = sum(float(tensor.double().square().sum()) for tensor in plain.values())
    assert weight_error(tmp_path / "codes", folder / "checkpoint") == pytest.approx((wrong / whole) ** 0.5, rel=1e-4)
    assert weight_error(folder / "checkpoint", folder / "checkpoint") == 0


def test_activations_have_eight_bits_a_token() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False))
    layer[0].weight.data = torch.eye(16)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 5)[:, None]
    round_activations(layer)
    seen = layer(x).detach()
    codes = seen / (x.abs().amax(dim=1, keepdim=True) / 127)
    assert (codes - codes.round()).abs().max() < 1e-3
    assert codes.abs().max() == pytest.approx(127)
    assert ((seen - x).abs() <= x.abs().amax(dim=1, keepdim=True) / 253).all()
    assert not layer(torch.zeros(1, 16)).any()


def test_distributions_are_those_before_each_token_of_the_answer(tiny: tuple[Any, Path]) -> None:
    model, folder = tiny
    records = list(read_records(folder / "records.jsonl"))
    grounder = TorchGrounder.open(folder / "checkpoint")
    found = answer_distributions(grounder, records)  # type: ignore[arg-type]
    plain = []
    for prompt in prompts_of(folder):
        patches = [part.numpy() for part in torch.split(prompt.patches, [h * w for _, h, w in prompt.grids])]
        logits = torch.from_numpy(torch_logits(model, prompt.ids.numpy(), patches, list(prompt.grids)))
        tokenizer, ids = grounder.settings.tokenizer, prompt.ids.tolist()
        turns = [k for k, token in enumerate(ids) if token == token_id(tokenizer, "<|im_start|>")]
        first = turns[-1] + len(encode(tokenizer, "<|im_start|>assistant\n"))
        assert ids[-1] == grounder.stop_ids[0]
        plain.append(logits[first - 1 : -1].log_softmax(dim=-1))
    assert torch.allclose(found, torch.cat(plain), atol=1e-4)


def test_the_whole_command(
    tiny: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = tiny
    records = list(read_records(folder / "records.jsonl"))
    monkeypatch.setattr(compression, "held_out", lambda data, limit: records[:limit])
    options = {"records": folder / "records.jsonl", "samples": SAMPLES, "device": "cpu"}
    # The tiny model's widths allow no groups that have a kernel, so what becomes a bundle has one scale an output.
    int8: dict[str, Any] = {"bits": 8, "group_size": -1, "method": "rtn", "positive_scales": True, "device": "cpu"}
    rows = (
        Row("RTN int4", {"method": "rtn", "device": "cpu"}),
        Row("GPTQ int4", {**options, "group_size": -1}, bundle="as a bundle"),
        Row("int8", int8, bundle="as TensorRT computes it", dialect="standard"),
    )
    monkeypatch.setattr(compression, "ROWS", rows)
    quantize(Settings(folder / "checkpoint", tmp_path / "mine", method="rtn", bits=8, group_size=-1, device="cpu"))
    arguments = [str(folder / "checkpoint"), str(tmp_path / "mine"), "--group-size", "8", "--limit", "4"]
    arguments += ["--work", str(tmp_path / "work"), "--save", str(tmp_path / "compression.json")]
    monkeypatch.setattr(sys, "argv", ["compression", *arguments])
    compression.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "compression.json").read_text())
    names = [row["name"] for row in result["rows"]]
    bundles = ["GPTQ int4, as a bundle", "int8, as TensorRT computes it"]
    assert names == ["float32", "RTN int4", "GPTQ int4", "int8", "mine", *bundles]
    plain, rtn, _, _, mine, bundle, _ = result["rows"]
    assert bundle["kl"] is None
    assert bundle["weight_error"] == result["rows"][2]["weight_error"]
    assert (plain["kl"], plain["weight_error"], plain["same_text"], plain["n"]) == (0, 0, 4, 4)
    assert rtn["kl"] > mine["kl"] >= 0
    assert rtn["weight_error"] > 5 * mine["weight_error"] > 0
    assert rtn["bytes"] < mine["bytes"] < plain["bytes"]
    assert (tmp_path / "compression.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(compression, "quantize", lambda settings: pytest.fail("a finished checkpoint was made again"))
    compression.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result


def test_bad_input(tiny: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    _, folder = tiny
    quantize(Settings(folder / "checkpoint", tmp_path / "codes", method="rtn", group_size=8, device="cpu"))
    for given, said in (
        ([str(tmp_path / "codes")], "is quantised; give the float checkpoint first"),
        ([str(tmp_path / "nothing")], "nothing: no such checkpoint folder"),
        ([str(folder / "checkpoint"), "--limit", "0"], "--limit must be at least 1"),
    ):
        monkeypatch.setattr(sys, "argv", ["compression", *given, "--work", str(tmp_path / "work")])
        with pytest.raises(SystemExit):
            compression.main()
        assert said in capsys.readouterr().err
