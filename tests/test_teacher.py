"""Records that a teacher labels: greedy answers, samples that the truth confirms, over Ray too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.boxes.held_out import held_out
from gemvg_edge.answer import write_answer
from gemvg_edge.boxes import Box, match_boxes
from gemvg_edge.errors import GemvgError
from gemvg_edge.prompt import encode
from train import teacher
from train.checkpoint import read_settings
from train.data.record import Record, write_records
from train.data.samples import read_all
from train.teacher import Sampling, answer_record, write_teacher_answers

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "tabletop"


class Scripted:
    """Stands for a teacher: it says what it is told to, and keeps how it was asked."""

    device = "cpu"

    def __init__(self, *says: str) -> None:
        self.tokenizer = read_settings(CHECKPOINT).tokenizer
        self.says = [encode(self.tokenizer, text + "<|im_end|>") for text in says]
        self.options: dict[str, Any] = {}

    def generate(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        """The prompt and an answer, a row each."""
        self.options = options
        most = max(map(len, self.says))
        end = encode(self.tokenizer, "<|im_end|>")
        rows = [said + end * (most - len(said)) for said in self.says]
        return torch.cat([input_ids.repeat(len(rows), 1), torch.tensor(rows)], dim=1)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    return held_out(tmp_path_factory.mktemp("world"), 12)


def test_of_samples_the_first_that_is_right_is_kept(records: list[Record]) -> None:
    settings = read_settings(CHECKPOINT)
    record = next(r for r in records if len(r.boxes) == 1)
    record = replace(record, mode="cot", thinking="as it was")

    def said(boxes: tuple[Box, ...], thinking: str | None) -> str:
        return write_answer(boxes, record.sizes, settings.answer_format, thinking)

    (true,) = record.boxes
    wrong = Box(true.image, 0, 0, 9, 9)
    near = Box(true.image, true.x1 + 1, true.y1, true.x2, true.y2)
    scripted = Scripted(
        said((wrong,), "wrong"), "<think>cut", said((near,), None), said((true, wrong), "too many"),
        said((near,), "right"), said((near,), "right too"),
    )  # fmt: skip
    kept = answer_record(scripted, settings, record, Sampling(6, 0.7))
    assert kept == replace(record, thinking="right")  # with the true boxes
    assert (scripted.options["num_return_sequences"], scripted.options["temperature"]) == (6, 0.7)
    assert answer_record(Scripted(said((wrong,), "wrong"), "None"), settings, record, Sampling(2)) is None
    greedy = Scripted(said((near,), "mine"))
    answered = answer_record(greedy, settings, record)
    assert answered is not None
    assert answered.thinking == "mine"
    assert len(match_boxes(answered.boxes, (near,), 0.9)) == 1
    assert not greedy.options["do_sample"]


def test_a_real_teacher_over_ray_says_what_it_says_alone(records: list[Record], tmp_path: Path) -> None:
    """The shipped checkpoint, three samples a record: the draw is the record's, whoever answers it."""
    asked = [record for record in records if record.boxes][:5]
    write_records([replace(record, mode="cot", thinking="x") for record in asked], tmp_path / "data.jsonl")
    sampling = Sampling(3, 0.5, seed=1)
    for name, ray in (("alone", None), ("ray", "local")):
        write_teacher_answers(CHECKPOINT, tmp_path / "data.jsonl", tmp_path / f"{name}.jsonl", sampling, ray, workers=2)
    alone = read_all(tmp_path / "alone.jsonl")
    assert alone == read_all(tmp_path / "ray.jsonl")
    assert 1 <= len(alone) <= 5
    true = {record.query: record.boxes for record in read_all(tmp_path / "data.jsonl")}
    assert all(record.boxes == true[record.query] and len(record.thinking) > 5 for record in alone)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone.jsonl", "data.jsonl", "ray.jsonl"]


def test_reasoning_as_a_command(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed after its second record it goes on there, and writes what an unbroken run writes."""
    words = replace(records[0], kind="understanding", boxes=(), words="a mug")
    asked_about = [record for record in records if record.boxes][:4]
    write_records([*asked_about, words], tmp_path / "data.jsonl")

    def run(out: str, *flags: str) -> None:
        about = [str(CHECKPOINT), str(tmp_path / "data.jsonl"), str(tmp_path / out)]
        monkeypatch.setattr("sys.argv", ["teacher", *about, "--samples=3", "--temperature=0.5", "--seed=1", *flags])
        teacher.main()

    run("unbroken.jsonl")
    assert "of 4 answers can be used" in capsys.readouterr().err
    wanted = read_all(tmp_path / "unbroken.jsonl")
    true = {record.query: record.boxes for record in records}
    assert wanted
    for record in wanted:
        assert (record.mode, record.boxes) == ("cot", true[record.query])
        assert len(record.thinking) > 5
    asked: list[str] = []

    def stopping(model: Any, settings: Any, record: Record, sampling: Sampling) -> Record | None:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(record.query)
        return answer_record(model, settings, record, sampling)

    with monkeypatch.context() as patch:
        patch.setattr(teacher, "answer_record", stopping)
        with pytest.raises(SystemExit, match="130"):
            run("cot.jsonl")
        asked.append("not asked again")  # past the stop
        run("cot.jsonl")
    assert len(asked) == 2 + 1 + 2
    assert read_all(tmp_path / "cot.jsonl") == wanted
    for flags, message in (
        (["--samples=1"], "--samples 1: give at least 2, of which the truth picks one"),
        (["--workers=2"], "--workers 2: it is at least 0, and says nothing without --ray"),
        (["--temperature=0"], "3 samples at a temperature of 0.0: give at least one, and a temperature of at least"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run("other.jsonl", *flags)
        assert message in capsys.readouterr().err
    write_records([words], tmp_path / "data.jsonl", overwrite=True)
    with pytest.raises(SystemExit, match="2"):
        run("other.jsonl")
    assert "has no record that boxes answer; there is nothing to reason about" in capsys.readouterr().err


def test_settings_that_cannot_work(tmp_path: Path) -> None:
    for sampling in (Sampling(0), Sampling(2, 0.0)):
        with pytest.raises(GemvgError, match="give at least one, and a temperature of at least"):
            write_teacher_answers(CHECKPOINT, tmp_path / "a.jsonl", tmp_path / "b.jsonl", sampling)
    assert Sampling(1) == teacher.GREEDY
