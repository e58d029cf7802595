"""Distillation: a student learns true answers and, where both write the same tokens, its teacher's whole distribution.

    python -m train.distill --teacher checkpoints/tabletop --model runs/student --data data/world/train --out runs/small
    python -m train.distill --teacher Qwen2-VL-7B --model Qwen2-VL-2B --data records.jsonl --out runs/2b --kl-weight 1

It is train.sft with one more loss: the forward KL divergence from the teacher's next-token distribution to the
student's, on answer tokens. That needs the same prompt, pictures and answer in the same tokens; `disagreement` says
what is not. A location student of a digit teacher has other tokens, so it learns from answers only: the true ones, or
with `--teacher-answers answers.jsonl` the teacher's own to the queries of --data, which it writes first.
TRL's DistillationTrainer is not used: it has the student write an answer at every step, and takes prompts from the
tokenizer's chat template, where our questions share their pictures (collate.py).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from tqdm import tqdm

from gemvg_edge.answer import read_answer
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file, refuse_inputs
from gemvg_edge.prompt import END_OF_TURN
from train import sft
from train.checkpoint import CheckpointSettings, read_trainable
from train.collate import IGNORED, collate
from train.data.record import Record, check_output, read_records, write_records
from train.data.samples import read_all, record_sample
from train.load import load_qwen2_vl
from train.output_folder import CONTENTS, WORK, claim, fingerprint, remove
from train.stage import run_stage
from train.trainer import GroundingTrainer

SHARD = 256  # answers of the teacher that a kill may cost
MAX_NEW_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class DistillSettings(sft.SftSettings):
    """A fine-tuning run, its teacher, and how much that one's distribution counts beside the true answers."""

    teacher: Path  # the checkpoint folder to learn from
    teacher_answers: Path | None = None  # a .jsonl to learn from in place of --data; written first if it is not there
    kl_weight: float = 1.0  # weight of the divergence from the teacher beside the true answers' loss; 0: answers alone
    temperature: float = 1.0  # softens both distributions; above 1 unlikely tokens weigh more


class DistillingTrainer(GroundingTrainer):
    """GroundingTrainer with the teacher's distribution as a second loss; `common` are the token ids that both have."""

    def __init__(self, *, teacher: Any, common: torch.Tensor, kl_weight: float, temperature: float, **kwargs: Any):
        super().__init__(**kwargs)
        device = self.accelerator.device
        self.teacher, self.common = teacher.eval().requires_grad_(False).to(device), common.to(device)
        self.kl_weight, self.temperature = kl_weight, temperature

    def answer_loss(
        self, logits: torch.Tensor, targets: torch.Tensor, inputs: dict[str, Any], kept: torch.Tensor
    ) -> torch.Tensor:
        """The student's own loss plus the divergence from the teacher, which is logged by itself too."""
        with torch.no_grad(), self.accelerator.autocast():
            hidden = self.teacher.model(**inputs, use_cache=False).last_hidden_state
            taught = self.teacher.lm_head(hidden[:, :-1][kept])  # (answer tokens, teacher's vocabulary)
        divergence = teacher_divergence(logits, taught, self.common, self.temperature)
        own = super().answer_loss(logits, targets, inputs, kept)
        for name, value in (("own_loss", own), ("kl_loss", divergence)):
            self._metrics["train"][name].append(value.item())
        return own + self.kl_weight * divergence


def teacher_divergence(
    student: torch.Tensor, teacher: torch.Tensor, common: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Mean KL(teacher || student) of logits (n, vocabulary), both over the common tokens alone.

    Times the square of the temperature, so that its gradients keep their size (https://arxiv.org/abs/1503.02531).
    """
    wanted = torch.log_softmax(teacher[:, common].float() / temperature, dim=1)
    said = torch.log_softmax(student[:, common].float() / temperature, dim=1)
    return functional.kl_div(said, wanted, reduction="batchmean", log_target=True) * temperature**2


def disagreement(teacher: CheckpointSettings, student: CheckpointSettings) -> str | None:
    """Why the teacher's next token says nothing about the student's, or None if it does."""
    if teacher.answer_format != student.answer_format:
        return f"the teacher answers in {teacher.answer_format}, the student in {student.answer_format}"
    if teacher.template != student.template:
        return "their prompt templates differ (grounding.prompt in config.json)"
    budget = student.preprocessing.min_pixels, student.preprocessing.max_pixels  # a teacher reads any size
    if replace(teacher.preprocessing, min_pixels=budget[0], max_pixels=budget[1]) != student.preprocessing:
        return "their pictures are cut into other patches (preprocessor_config.json)"
    ours, theirs = json.loads(student.tokenizer.to_str()), json.loads(teacher.tokenizer.to_str())
    if any(ours[part] != theirs[part] for part in ("model", "normalizer", "pre_tokenizer")):
        return "their tokenizers split text differently (tokenizer.json)"
    if _added(student) != _added(teacher):
        return "their tokenizers have other added tokens (tokenizer.json)"
    return None


def _added(settings: CheckpointSettings) -> dict[str, int]:
    """Added tokens that may occur: a model that answers in digits never reads or writes a location."""
    tokens = {token.content: number for number, token in settings.tokenizer.get_added_tokens_decoder().items()}
    if settings.answer_format.coordinates == "locations":
        return tokens
    return {name: number for name, number in tokens.items() if not name.startswith("<loc_")}


def common_tokens(teacher: Tokenizer, student: Tokenizer) -> torch.Tensor:
    """Ids, in order, of the tokens that both have under the same id; rows that only pad a table are none."""
    ours, theirs = student.get_vocab(with_added_tokens=True), teacher.get_vocab(with_added_tokens=True)
    return torch.tensor(sorted(number for name, number in ours.items() if theirs.get(name) == number))


def write_teacher_answers(teacher: Path, data: Path, out: Path) -> None:
    """Records with the teacher's greedy answers in place of the true ones; those that cannot be read are left out.

    Written in shards, which a second run after a kill finds and keeps. Answers in words stay the true ones.
    """
    if data.suffix != ".jsonl":
        raise GemvgError(f"there is no {out}, and only records can be answered: give a .jsonl as --data")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise GemvgError(f"there is no {out}; run this command in a single process until it is written")
    check_output(out, [teacher, data])
    settings, records = read_trainable(teacher), read_all(data)
    work = out.with_name(out.name + ".work")
    contents = {f"{CONTENTS}the teacher": fingerprint(teacher), f"{CONTENTS}the records": fingerprint(data)}
    content = {"format": WORK, **contents, "shard": SHARD}
    try:
        lock = claim(work, content, keep=True)
    except GemvgError as error:
        raise GemvgError(f"{error}; it may hold another teacher's answers, or answers to other records") from None
    try:
        _answer_in_shards(teacher, settings, records, work, out)
        remove(work)
    finally:
        lock.close()


def _answer_in_shards(
    teacher: Path, settings: CheckpointSettings, records: Sequence[Record], work: Path, out: Path
) -> None:
    model = load_qwen2_vl(teacher, "auto").eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    shards = []
    for first in tqdm(range(0, len(records), SHARD), "teacher's answers"):
        shards.append(work / f"{first:08d}.jsonl")
        if not is_file(shards[-1]):
            answered = (_answered(model, settings, record) for record in records[first : first + SHARD])
            write_records((record for record in answered if record is not None), shards[-1])
    kept = [record for shard in shards for record in read_records(shard) if isinstance(record, Record)]
    if not kept:
        raise GemvgError(f"{teacher} gave no answer that can be read; is it trained on grounding?")
    write_records(kept, out)
    print(f"{out}: {len(kept)} of {len(records)} answers can be read", file=sys.stderr)


@torch.no_grad()
def _answered(model: Any, settings: CheckpointSettings, record: Record) -> Record | None:
    if record.kind == "understanding":
        return record
    resized = settings.resized(record.sizes)
    sample = record_sample(record, settings.answer_format, resized)
    batch = collate([replace(sample, turns=[sample.turns[0]._replace(answer="")])], settings, pad_id=0)
    length = int((batch["labels"][0] == IGNORED).sum())  # the labels are the turn's end alone
    ids = batch["input_ids"][:, :length]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": batch["mm_token_type_ids"][:, :length],
        "pixel_values": batch["pixel_values"],
        "image_grid_thw": batch["image_grid_thw"],
    }
    end = settings.tokenizer.token_to_id(END_OF_TURN)
    said = model.generate(
        **{name: tensor.to(model.device) for name, tensor in inputs.items()},
        max_new_tokens=MAX_NEW_TOKENS, do_sample=False, temperature=None, top_p=None, top_k=None,
        eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    text = settings.tokenizer.decode(said[0, length:].tolist(), skip_special_tokens=False)
    answer = read_answer(text, record.sizes, settings.answer_format, resized)
    if answer.problem or (record.mode == "cot" and not answer.thinking):
        return None
    return replace(record, boxes=answer.boxes, thinking=answer.thinking if record.mode == "cot" else "")


def train(run: DistillSettings) -> None:
    """Run (or resume) the whole stage and write the student's checkpoint folder."""
    if run.kl_weight < 0 or run.temperature <= 0:
        raise GemvgError(
            f"--kl-weight {run.kl_weight}, --temperature {run.temperature}: "
            "the weight must be 0 or more, the temperature more than 0"
        )
    sft.check(run)
    if run.teacher_answers:
        refuse_inputs(run.teacher_answers, [run.data, run.teacher, run.model], "--teacher-answers")
        if not is_file(run.teacher_answers):
            write_teacher_answers(run.teacher, run.data, run.teacher_answers)
        run = replace(run, data=run.teacher_answers)
    teacher, settings = read_trainable(run.teacher), read_trainable(run.model)
    reason = disagreement(teacher, settings) if run.kl_weight else "--kl-weight is 0"
    if reason:
        print(f"learning from the answers alone: {reason}", file=sys.stderr)
        sft.train(replace(run, kl_weight=0.0))  # so that training.json says what was done
        return
    # Before the trainer's settings exist: under DeepSpeed's ZeRO-3 these would have it split over the GPUs.
    teacher_model = load_qwen2_vl(run.teacher, "auto")
    common = common_tokens(teacher.tokenizer, settings.tokenizer)
    extra = {"teacher": teacher_model, "common": common, "kl_weight": run.kl_weight, "temperature": run.temperature}
    sft.train(run, DistillingTrainer, **extra)


def main() -> None:
    """Command line; see the module's first lines."""
    run_stage("train.distill", DistillSettings, "Distil a teacher into a student, on grounding samples.", train)


if __name__ == "__main__":
    main()
