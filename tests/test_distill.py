"""Distillation: the divergence by hand, which checkpoints agree, whole runs at tiny scale."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from gemvg_edge.boxes import Box
from gemvg_edge.errors import GemvgError
from gemvg_edge.prompt import encode, query_text
from tests.checkpoints import TINY, TOKENIZER, write_checkpoint, write_json
from tests.training import StopAt, weights
from train import distill, teacher
from train.checkpoint import read_settings
from train.data.record import Record, write_records
from train.data.samples import read_all
from train.distill import (
    DistillSettings,
    common_tokens,
    disagreement,
    teacher_divergence,
    train,
)
from train.student import make_student
from train.teacher import Sampling, answer_record, write_teacher_answers
from train.vocabulary import add_locations, answer_in_digits, move_to_tokenizer


def write_teacher(folder: Path, sizes: dict[str, Any] = TINY, **saving: Any) -> None:
    write_checkpoint(folder, sizes, **saving)
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})


def write_data(file: Path, count: int) -> None:
    """Records of one and two small random pictures."""
    rng = np.random.default_rng(0)
    records = []
    file.parent.mkdir()
    for k in range(count):
        images = []
        for n in range(1 + k % 2):
            images.append(file.parent / f"{k}-{n}.png")
            Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(images[-1])
        boxes = (Box(0, 1.0 + k, 5.0, 40.0, 50.0),)
        records.append(Record(tuple(images), ((96, 64),) * len(images), "the red mug", boxes, "referential", "test"))
    write_records(records, file)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> DistillSettings:
    folder = tmp_path_factory.mktemp("distill")
    write_teacher(folder / "teacher")
    make_student(folder / "teacher", folder / "student", 2, 1, 52)
    write_data(folder / "data" / "records.jsonl", 6)
    return DistillSettings(
        teacher=folder / "teacher", model=folder / "student", data=folder / "data" / "records.jsonl",
        out=folder / "out", steps=4, batch=2, save_steps=2, warmup_steps=1, bf16=False, learning_rate=1e-3,
    )  # fmt: skip


def test_divergence_by_hand() -> None:
    """Two tokens in common, 0 and 2; the others' logits do not matter."""
    student, teacher = torch.tensor([[0.0, 9.0, math.log(3)]]), torch.tensor([[0.0, -5.0, 0.0, 7.0]])
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    common = torch.tensor([0, 2])
    assert teacher_divergence(student, teacher, common, 1.0).item() == pytest.approx(by_hand)
    assert teacher_divergence(student, student, common, 1.0).item() == pytest.approx(0, abs=1e-7)
    # At temperature 2 the odds of 3 are those of the square root of 3.
    q = 1 / (1 + math.sqrt(3))
    warm = 4 * (0.5 * math.log(0.5 / q) + 0.5 * math.log(0.5 / (1 - q)))
    assert teacher_divergence(student, teacher, common, 2.0).item() == pytest.approx(warm)


def test_two_rows_are_averaged() -> None:
    student, teacher = torch.randn(2, 5), torch.randn(2, 5)
    common = torch.arange(5)
    apart = [teacher_divergence(student[k : k + 1], teacher[k : k + 1], common, 1.0) for k in range(2)]
    torch.testing.assert_close(teacher_divergence(student, teacher, common, 1.0), torch.stack(apart).mean())


def test_which_checkpoints_agree(tmp_path: Path) -> None:
    write_teacher(tmp_path / "digits")
    add_locations(tmp_path / "digits", tmp_path / "locations", 30)
    answer_in_digits(tmp_path / "locations", tmp_path / "back")
    digits, locations, back = (read_settings(tmp_path / name) for name in ("digits", "locations", "back"))
    assert disagreement(digits, digits) is None
    assert disagreement(locations, locations) is None
    assert "the teacher answers in" in str(disagreement(digits, locations))
    assert "other added tokens" in str(disagreement(digits, back))  # the image tags
    assert disagreement(digits, replace(digits, template=replace(digits.template, number_images=True)))
    more = replace(digits, preprocessing=replace(digits.preprocessing, max_pixels=10**6))
    assert disagreement(digits, more) is None
    assert "other patches" in str(
        disagreement(digits, replace(more, preprocessing=replace(more.preprocessing, patch_size=8)))
    )
    content = json.loads(TOKENIZER.to_str())
    content["model"]["merges"].pop()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(content))
    move_to_tokenizer(tmp_path / "digits", tmp_path / "other", tmp_path / "moved")
    assert "split text differently" in str(disagreement(digits, read_settings(tmp_path / "moved")))
    assert common_tokens(digits.tokenizer, back.tokenizer).tolist() == list(range(TOKENIZER.get_vocab_size()))


def test_a_killed_run_ends_where_an_unbroken_one_does(run: DistillSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    train(run)
    unbroken = weights(run.out)
    assert any(not torch.equal(unbroken[name], start) for name, start in weights(run.model).items())
    record = json.loads((run.out / "training.json").read_text())
    assert (record["teacher"], record["kl_weight"]) == (str(run.teacher), 1.0)

    broken = replace(run, out=run.out.with_name("broken"))
    trainer = distill.DistillingTrainer
    with monkeypatch.context() as patch:
        patch.setattr(distill, "DistillingTrainer", lambda **kwargs: trainer(callbacks=[StopAt(3)], **kwargs))
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    assert not broken.out.exists()
    with pytest.raises(GemvgError, match="other settings"):
        train(replace(broken, temperature=2.0))
    train(broken)
    for name, tensor in weights(broken.out).items():
        torch.testing.assert_close(tensor, unbroken[name], atol=1e-5, rtol=1e-4, msg=name)


class Watch(TrainerCallback):  # type: ignore[misc]
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: object, state: object, control: object, logs: dict[str, float], **kwargs: object) -> None:
        """The Trainer calls it whenever it logs."""
        self.logs.append(logs)


def test_the_student_comes_nearer_to_its_teacher(run: DistillSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, trainer = Watch(), distill.DistillingTrainer

    def watched(args: Any, **kwargs: Any) -> Any:
        args.logging_steps = 5
        return trainer(args=args, callbacks=[watch], **kwargs)

    monkeypatch.setattr(distill, "DistillingTrainer", watched)
    train(replace(run, out=run.out.with_name("near"), steps=40, save_steps=100, learning_rate=3e-3, kl_weight=10.0))
    values = [entry["kl_loss"] for entry in watch.logs if "kl_loss" in entry]
    assert values[-1] < 0.5 * values[0]


def test_a_location_student_learns_from_answers_alone(run: DistillSettings, capsys: pytest.CaptureFixture[str]) -> None:
    student = run.model.with_name("location-student")
    add_locations(run.model, student, 20)
    out = run.out.with_name("location-out")
    train(replace(run, model=student, out=out, steps=2))
    assert "learning from the answers alone: the teacher answers in" in capsys.readouterr().err
    assert json.loads((out / "training.json").read_text())["kl_weight"] == 0
    assert read_settings(out).answer_format.locations == 20


class Scripted:
    """Stands for a trained teacher: it says one thing, and keeps what it was asked."""

    device = "cpu"

    def __init__(self, says: str) -> None:
        self.says, self.asked = encode(TOKENIZER, says + "<|im_end|>"), torch.empty(0)

    def generate(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        """The prompt and what it says."""
        assert all(options[name].shape == input_ids.shape for name in ("attention_mask", "mm_token_type_ids"))
        self.asked = input_ids
        return torch.cat([input_ids, torch.tensor([self.says])], dim=1)


@pytest.mark.parametrize(
    ("says", "mode", "wanted"),
    [
        ("Image-1: <|box_start|>(0,0),(500,250)<|box_end|>", "direct", (Box(0, 0, 0, 48, 16),)),
        ("None", "direct", ()),
        ("Image-1: <|box_start|>(0,0),(500,", "direct", None),
        ("<think>left</think><answer>None</answer>", "cot", ()),
        ("None", "cot", None),
    ],
)
def test_a_teachers_answer_becomes_a_record(run: DistillSettings, says: str, mode: Any, wanted: Any) -> None:
    settings, record = read_settings(run.teacher), read_all(run.data)[1]
    record = replace(record, mode=mode, thinking="right" if mode == "cot" else "")
    scripted = Scripted(says)
    answered = answer_record(scripted, settings, record)
    if wanted is None:
        assert answered is None
    else:
        assert answered == replace(record, boxes=wanted, thinking="left" if mode == "cot" else "")
    text = settings.tokenizer.decode(scripted.asked[0].tolist(), skip_special_tokens=False)
    assert text.endswith(query_text(settings.template, "the red mug", mode == "cot"))
    assert text.count("<|vision_start|>") == 2


def test_a_real_model_can_be_asked(run: DistillSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(teacher, "MAX_NEW_TOKENS", 3)
    with pytest.raises(GemvgError, match="gave no answer that can be used"):  # its weights are random
        write_teacher_answers(run.teacher, run.data, tmp_path / "answers.jsonl")
    assert not (tmp_path / "answers.jsonl").exists()


def test_answers_survive_a_kill_and_are_learned_from(run: DistillSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answered(model: object, settings: object, record: Record, sampling: Sampling) -> Record | None:
        if len(asked) == 5:
            asked.append("killed")
            raise KeyboardInterrupt
        asked.append(record.images[0].name)
        return None if record.images[0].name == "5-0.png" else replace(record, boxes=())

    monkeypatch.setattr(teacher, "answer_record", answered)
    answers = run.data.with_name("answers") / "answers.jsonl"
    taught = replace(run, teacher_answers=answers, out=run.out.with_name("taught"), steps=2)
    with pytest.raises(KeyboardInterrupt):
        train(taught)
    with pytest.raises(GemvgError, match="another teacher's answers"):
        write_teacher_answers(run.model, run.data, answers)
    records = run.data.read_bytes()
    run.data.write_bytes(records.replace(b"the red mug", b"the red cup", 1))  # of the same name and size
    with pytest.raises(GemvgError, match="answers to other records"):
        write_teacher_answers(run.teacher, run.data, answers)
    run.data.write_bytes(records)
    train(taught)
    assert asked[6:] == ["5-0.png"]  # the others were kept
    assert [record.boxes for record in read_all(answers)] == [()] * 5
    assert [path.name for path in answers.parent.iterdir()] == ["answers.jsonl"]
    assert json.loads((taught.out / "training.json").read_text())["teacher_answers"] == str(answers)
    with pytest.raises(GemvgError, match=r"give a \.jsonl as --data"):
        train(replace(taught, teacher_answers=answers.with_name("none.jsonl"), data=run.data.parent, overwrite=True))


def test_answers_take_the_place_of_nothing_else(run: DistillSettings, tmp_path: Path) -> None:
    before = run.data.read_bytes()
    with pytest.raises(GemvgError, match=r"--teacher-answers .* is .*, which is read"):
        train(replace(run, teacher_answers=run.data.parent / "." / run.data.name, overwrite=True))
    (tmp_path / "notes.jsonl").write_text("mine")
    (tmp_path / "a.jsonl.work").mkdir()
    (tmp_path / "a.jsonl.work" / "mine").touch()
    for out, reason in (("notes.jsonl", "holds no records"), ("a.jsonl", "was not made by gemvg-edge")):
        with pytest.raises(GemvgError, match=reason):
            write_teacher_answers(run.teacher, run.data, tmp_path / out)
    assert run.data.read_bytes() == before
    assert (tmp_path / "notes.jsonl").read_text() == "mine"
    assert (tmp_path / "a.jsonl.work" / "mine").exists()


def test_settings_that_cannot_work_are_refused(run: DistillSettings) -> None:
    with pytest.raises(GemvgError, match="--kl-weight -1"):
        train(replace(run, kl_weight=-1))
    with pytest.raises(GemvgError, match="temperature more than 0"):
        train(replace(run, temperature=0))
    with pytest.raises(GemvgError, match="nobody: no such checkpoint folder"):
        train(replace(run, teacher=run.teacher.with_name("nobody"), overwrite=True))


def test_a_teacher_that_is_stored_in_half_precision_teaches_on_a_cpu(run: DistillSettings, tmp_path: Path) -> None:
    """Autocast in bfloat16, the default where it pays, met norms of bfloat16 and gave up."""
    folder = shutil.copytree(run.teacher, tmp_path / "teacher")
    weights_of = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor.bfloat16() for name, tensor in weights_of.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    train(replace(run, teacher=folder, out=tmp_path / "out", steps=1, bf16=True))
    assert (tmp_path / "out" / "config.json").is_file()
    for change, fault in (
        ({"teacher_samples": 4}, "--teacher-samples and --ray are of the answers"),
        ({"ray": "local"}, "--teacher-samples and --ray are of the answers"),
        ({"workers": 2}, "says nothing without --ray"),
    ):
        with pytest.raises(GemvgError, match=fault):
            train(replace(run, out=tmp_path / "other", **change))
