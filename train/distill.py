"""Distillation: a student learns true answers and, where both write the same tokens, its teacher's whole distribution.

    python -m train.distill --teacher checkpoints/tabletop --model runs/student --data data/world/train --out runs/small
    python -m train.distill --teacher Qwen2-VL-7B --model Qwen2-VL-2B --data records.jsonl --out runs/2b --kl-weight 1
    python -m train.distill .. --teacher-answers reasoned.jsonl --teacher-samples 8 --ray local     # and learn from it

It is train.sft with one more loss: the forward KL divergence from the teacher's next-token distribution to the
student's, on answer tokens. That needs the same prompt, pictures and answer in the same tokens; `disagreement` says
what is not. A location student of a digit teacher has other tokens, so it learns from answers only: the true ones, or
with `--teacher-answers answers.jsonl` the teacher's own to the queries of --data, which it writes first
(train/teacher.py: greedy ones, or of several samples those that are right, which is how reasoning is had).
TRL's DistillationTrainer is not used: it has the student write an answer at every step, and takes prompts from the
tokenizer's chat template, where our questions share their pictures (collate.py).
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.nn import functional

from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file, refuse_inputs
from train import sft
from train.checkpoint import CheckpointSettings, read_trainable
from train.load import load_qwen2_vl
from train.stage import run_stage
from train.teacher import Sampling, write_teacher_answers
from train.trainer import GroundingTrainer


@dataclass(frozen=True, kw_only=True)
class DistillSettings(sft.SftSettings):
    """A fine-tuning run, its teacher, and how much that one's distribution counts beside the true answers."""

    teacher: Path  # the checkpoint folder to learn from
    teacher_answers: Path | None = None  # a .jsonl to learn from in place of --data; written first if it is not there
    teacher_samples: int = 1  # of these many answers to a record one that is right is kept; 1: its greedy answer
    teacher_temperature: float = 1.0  # of these samples
    ray: str | None = None  # spread the teacher's answers over a Ray cluster: local, auto or HOST:PORT
    workers: int = 0  # teachers that are open at once there; 0: one a GPU, else one a machine
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
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        inputs: dict[str, Any],
        kept: torch.Tensor,
    ) -> torch.Tensor:
        """The student's own loss plus the divergence from the teacher, which is logged by itself too."""
        with torch.no_grad(), self.accelerator.autocast():
            hidden = self.teacher.model(**inputs, use_cache=False).last_hidden_state
            taught = self.teacher.lm_head(hidden[:, :-1][kept])  # (answer tokens, teacher's vocabulary)
        divergence = teacher_divergence(logits, taught, self.common, self.temperature)
        own = super().answer_loss(logits, targets, weights, inputs, kept)
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


def train(run: DistillSettings) -> None:
    """Run (or resume) the whole stage and write the student's checkpoint folder."""
    if run.kl_weight < 0 or run.temperature <= 0:
        raise GemvgError(
            f"--kl-weight {run.kl_weight}, --temperature {run.temperature}: "
            "the weight must be 0 or more, the temperature more than 0"
        )
    sft.check(run)
    if run.tower_only:
        raise GemvgError("--tower-only is train.sft's: a vision tower alone has nothing to say to a teacher")
    if run.workers < 0 or (run.workers and not run.ray):
        raise GemvgError(f"--workers {run.workers}: it is at least 0, and says nothing without --ray")
    if not run.teacher_answers and (run.teacher_samples != 1 or run.ray):
        raise GemvgError("--teacher-samples and --ray are of the answers that --teacher-answers names; give that too")
    if run.teacher_answers:
        refuse_inputs(run.teacher_answers, [run.data, run.teacher, run.model], "--teacher-answers")
        if not is_file(run.teacher_answers):
            sampling = Sampling(run.teacher_samples, run.teacher_temperature, run.seed)
            write_teacher_answers(run.teacher, run.data, run.teacher_answers, sampling, run.ray, run.workers)
        run = replace(run, data=run.teacher_answers)
    teacher, settings = read_trainable(run.teacher), read_trainable(run.model)
    reason = disagreement(teacher, settings) if run.kl_weight else "--kl-weight is 0"
    if reason:
        print(f"learning from the answers alone: {reason}", file=sys.stderr)
        sft.train(replace(run, kl_weight=0.0))  # so that training.json says what was done
        return
    # Before the trainer's settings exist: under DeepSpeed's ZeRO-3 these would have it split over the GPUs.
    # A CPU's autocast leaves the parameters of norms as they are, and takes none of half precision.
    teacher_model = load_qwen2_vl(run.teacher, "auto" if torch.cuda.is_available() else torch.float32)
    common = common_tokens(teacher.tokenizer, settings.tokenizer)
    extra = {"teacher": teacher_model, "common": common, "kl_weight": run.kl_weight, "temperature": run.temperature}
    sft.train(run, DistillingTrainer, **extra)


def main() -> None:
    """Command line; see the module's first lines."""
    run_stage("train.distill", DistillSettings, "Distil a teacher into a student, on grounding samples.", train)


if __name__ == "__main__":
    main()
