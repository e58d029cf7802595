"""The latency benchmark: what it reads of others, counts and refuses; whole with our engine on a tiny checkpoint."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from bench import latency
from bench.latency import read_counts, read_names, read_pixels
from bench.peers import conversion
from bench.peers.checkpoint import CHAT_TEMPLATE, random_checkpoint, write_tokenizer
from bench.plan import find_shape
from bench.speed import peaks as peaks_module
from bench.speed.noise import TICK, Noise, Process, noise_between, read_stat
from bench.speed.peaks import measure_peaks, middle
from bench.speed.pictures import picture
from bench.speed.report import bars, markdown, plot, ratios, slopes
from bench.speed.work import DIGITS_BOX, add_boxes, operations, shares
from gemvg_edge.errors import GemvgError

LOG = """0.12.007.407 I slot   operator(): id  0 | task 0 | cached n_tokens = 15, memory_seq_rm [15, end)
0.12.007.484 I slot process_mtmd: id  0 | task 0 | encoding mtmd batch from idx = 15, n_chunks = 1
0.47.858.372 I decoding image batch 1/1, n_tokens_batch = 256
0.57.028.110 I image decoded (batch 1/1) in 9170 ms
0.57.602.766 I slot process_mtmd: id  0 | task 0 | encoding mtmd batch from idx = 273, n_chunks = 1
1.30.066.214 I decoding image batch 1/1, n_tokens_batch = 256
1.36.380.327 I image decoded (batch 1/1) in 6309 ms
"""
PEAKS = {"int8_gops": 800.0, "float32_gflops": 200.0, "read_gbs": 40.0}
SHAPE = find_shape("qwen2-vl-2b")


@pytest.fixture
def llama_cpp_worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(conversion.HERE))  # as its own process has it
    return importlib.import_module("llama_cpp_worker")


def test_encoding_time_is_read_from_the_servers_log(llama_cpp_worker: Any) -> None:
    assert llama_cpp_worker.vision_ms(LOG) == pytest.approx(35850.888 + 32463.448)
    assert llama_cpp_worker.vision_ms("0.12.007.407 I srv  update_slots: all slots are idle") == 0
    batched = LOG.replace("0.57.602.766 I slot process_mtmd: id  0 | task 0 | encoding mtmd batch", "0.57.602.766 I x")
    assert llama_cpp_worker.vision_ms(batched) == pytest.approx(35850.888)  # one encoding, two pictures decoded


def test_others_pay_each_token_of_a_box() -> None:
    phases = add_boxes({"first_token_ms": 1000.0, "token_ms": 40.0}, 19)
    assert phases["box_ms"] == 760
    assert phases["first_box_ms"] == 1720
    ours = {"first_token_ms": 1000.0, "token_ms": 40.0, "box_ms": 500.0, "first_box_ms": 1400.0}
    assert add_boxes(ours, 19) == ours


def test_work_is_counted_from_the_shape() -> None:
    work = operations(SHAPE, 256, 2, 543)
    patches, decoder = 1024, SHAPE.decoder
    blocks = 2 * 2 * patches * 32 * (4 * 1280**2 + 2 * 1280 * 5120)
    attention = 2 * 4 * 32 * 1280 * patches**2
    assert work["vision"] == pytest.approx(blocks + attention, rel=0.02)  # patch embedding and merger are the rest
    assert work["prefill"] == pytest.approx(2 * decoder.matrices * 543, rel=0.03)
    assert operations(SHAPE, 256, 4, 543)["vision"] == 2 * work["vision"]


def test_shares_of_peaks() -> None:
    phases = {"vision_ms": 1000.0, "prefill_ms": 500.0, "token_ms": 25.0}
    found = shares(phases, {"vision": 400e9, "prefill": 100e9}, 500_000_000, PEAKS)
    assert found["vision_of_int8"] == pytest.approx(0.5)
    assert found["vision_of_float32"] == pytest.approx(2)
    assert found["prefill_of_int8"] == pytest.approx(0.25)
    assert found["token_of_read"] == pytest.approx(0.5)
    assert shares(phases, {"vision": 400e9, "prefill": 100e9}, 1, peaks_module.NOTHING) == {}


def test_a_process_is_read_whatever_its_name() -> None:
    fields = "S 1 5 77 0 -1 4194560 1 2 3 4 120 30 0 0 20 0 1 0 5"
    assert read_stat(f"42 (a b) c) {fields}") == (42, Process("a b) c", 77, 150))
    assert read_stat(f"42 (kworker/0:1) {fields.replace('S 1', 'S 2', 1)}") is None


def test_the_loudest_other_process_is_named() -> None:
    before = {10: Process("make", 10, 100), 20: Process("ours", 7, 0)}
    busy = round(0.2 / TICK)
    after = {10: Process("make", 10, 100 + busy), 20: Process("ours", 7, 500), 30: Process("new", 30, busy // 2)}
    after[os.getpid()] = Process("pytest", 1, 10_000)
    noise = noise_between(before, after, 2.0, own=[7])
    assert (noise.name, round(noise.share, 3), round(noise.all, 3)) == ("make (10)", 0.1, 0.15)
    assert noise_between(after, after, 2.0, own=[]).share == 0


def test_a_noisy_machine_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(latency, "listen", lambda seconds: Noise("make (10)", 0.3, 0.3))
    monkeypatch.setattr(sys, "argv", ["bench.latency", "--shape", "tiny", "--peers", "", "--work", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        latency.main()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "make (10) took 30 % of a core before anything was measured, more than 5 %; wait, or give --noisy" in said


def test_the_whole_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(conversion, "SETUP", {"llama-cpp": "no_such_script.sh"})
    saved = tmp_path / "latency.json"
    arguments = ["--shape", "tiny", "--peers", "llama-cpp", "--systems", "ours-onnx", "--images", "1,4", "--runs", "1",
                 "--tokens", "4", "--noisy", "--work", str(tmp_path / "work"), "--save", str(saved)]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["bench.latency", *arguments])
    latency.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(saved.read_text(encoding="utf-8"))
    assert saved.with_suffix(".png").stat().st_size > 10_000
    one, four = result["rows"]
    assert (one["pictures"], four["pictures"]) == (1, 4)
    assert four["prompt_tokens"] - one["prompt_tokens"] >= 3 * result["picture_tokens"]
    assert 0 < one["vision_ms"] < one["first_token_ms"] < one["first_box_ms"]
    assert 0 < four["changed_ms"] < four["first_token_ms"]
    assert one["load_s"] > 0
    assert one["peak_gib"] > 0.03
    assert set(result["slopes"]["ours-onnx"]) >= {"vision_ms", "prefill_ms"}
    assert "no_such_script.sh cannot be run" in result["failed"]["llama-cpp"]


def result_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "model": "a model", "pixels": "448x448", "runs": 3, "threads": 2, "peaks": PEAKS, "rows": rows, "failed": {},
        "noise": {"loud": True, "told": "make (10) took 30 % of a core"}, "slopes": slopes(rows),
        "machine": {"processor": "a processor"},
    }  # fmt: skip


def row(system: str, pictures: int, factor: float) -> dict[str, Any]:
    times = {
        "vision_ms": 1000, "prefill_ms": 500, "first_token_ms": 1600, "first_box_ms": 2000, "box_ms": 400,
        "token_ms": 20, "again_ms": 100,
    }  # fmt: skip
    scaled = {key: pictures * factor * value for key, value in times.items()}
    share = {"vision_of_int8": 0.7, "prefill_of_int8": 0.5, "token_of_read": 0.9}
    rest = {"load_s": 1.0, "peak_gib": 2.0, "prompt_tokens": 300, "shares": share}
    return {"system": system, "pictures": pictures, **scaled, **rest}


def test_goals_are_against_the_best_rival(tmp_path: Path) -> None:
    rows = [row("ours", 1, 1), row("ours-onnx", 1, 0.5), row("llama-cpp", 1, 4), row("openvino-genai", 1, 2)]
    rows[0]["location_box_ms"] = 200.0
    ratios(rows)
    assert rows[2]["times_ours"]["first_token_ms"] == 4
    met = {goal["goal"]: (round(goal["reached"], 3), goal["met"]) for goal in bars(rows)}
    assert met["first_token_ms"] == (0.5, False)
    assert met["box_ms"] == (0.5, True)
    assert met["location_box_ms"] == (0.25, True)
    assert met["peak_gib"] == (1, True)
    assert met["prefill_of_int8"] == (0.5, False)
    text = markdown(result_of(rows))
    assert "| first token, ms | 1600 | 800 (0.50) | 6400 (4.00) | 3200 (2.00) |" in text
    assert "Not a quiet machine: make (10) took 30 % of a core." in text
    plot(result_of(rows), tmp_path / "one.png")


def test_slopes_are_of_a_further_picture() -> None:
    found = slopes([row("ours", count, 1) for count in (1, 2, 4)])
    assert found["ours"]["vision_ms"] == pytest.approx(1000)
    assert slopes([row("ours", 2, 1)]) == {}


def test_pictures_are_the_same_every_time(tmp_path: Path) -> None:
    first, other = (Path(picture(tmp_path / name, (56, 84), 3)).read_bytes() for name in "ab")
    assert first == other
    assert Path(picture(tmp_path, (56, 84), 4)).read_bytes() != first


def test_no_compiler_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    peaks = measure_peaks(tmp_path, 2)
    assert peaks["int8_gops"] is None
    assert "no-such-compiler" in peaks["reason"]
    assert middle([peaks, peaks])["read_gbs"] is None
    assert middle([PEAKS, {**PEAKS, "read_gbs": 50.0}])["read_gbs_range"] == [40, 50]


def test_a_conversion_is_made_once_and_again_when_its_commands_change(tmp_path: Path) -> None:
    checkpoint = random_checkpoint("tiny", tmp_path)
    command = ["sh", "-c", f"date +%N > {conversion.OUT}/when"]
    folder = conversion.convert("some", [command], checkpoint, tmp_path)
    when = (folder / "when").read_text(encoding="utf-8")
    assert conversion.convert("some", [command], checkpoint, tmp_path) == folder
    assert (folder / "when").read_text(encoding="utf-8") == when
    conversion.convert("some", [command, ["true"]], checkpoint, tmp_path)
    assert (folder / "when").read_text(encoding="utf-8") != when
    with pytest.raises(GemvgError, match=r"some-conversion-1 failed with exit code 3: no room \(all of it: .*log\)"):
        conversion.convert("some", [["sh", "-c", "echo no room; exit 3"]], checkpoint, tmp_path)


def test_what_a_token_reads_of_a_checkpoint(tmp_path: Path) -> None:
    checkpoint = random_checkpoint("tiny", tmp_path)
    layer = 128 * (2 * 128 + 2 * 64 + 3 * 256) + 128 + 2 * 64 + 2 * 128
    assert conversion.decoder_bytes(checkpoint) == 2 * (2 * layer + 1024 * 128 + 128)  # the head is the table


def test_qwen3s_tokenizer_becomes_qwen2_vls(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    tokens = [{"id": number, "content": f"<{number}>"} for number in (151656, 151657)]
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    (source / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens, "model": model}), encoding="utf-8")
    settings: dict[str, Any] = {"added_tokens_decoder": {"151656": {}, "151657": {}}}
    (source / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    write_tokenizer(source, target)
    assert [token["id"] for token in json.loads((target / "tokenizer.json").read_text())["added_tokens"]] == [151656]
    written = json.loads((target / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert written == {"added_tokens_decoder": {"151656": {}}, "chat_template": CHAT_TEMPLATE}
    assert (target / "merges.txt").read_text(encoding="utf-8") == "#version: 0.2\na b\n"
    assert json.loads((target / "vocab.json").read_text(encoding="utf-8")) == model["vocab"]


def test_a_box_is_nineteen_tokens_where_each_digit_is_one(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(random_checkpoint("tiny", tmp_path) / "tokenizer.json"))
    assert sum(character.isdigit() for character in DIGITS_BOX) == 12
    assert len(tokenizer.encode(DIGITS_BOX, add_special_tokens=False).ids) >= 19


def test_what_the_command_line_takes() -> None:
    assert read_pixels("448x336") == (448, 336)
    assert read_counts("4,1,2") == [1, 2, 4]
    assert read_names("") == []
    for read, text in ((read_pixels, "448"), (read_counts, "0,2"), (read_names, "vllm")):
        with pytest.raises(Exception, match="give"):
            read(text)
