"""Label records with a teacher: its own greedy answers, or of several sampled ones those that the truth confirms.

    python -m train.teacher Qwen2-VL-7B-Instruct questions.jsonl cot.jsonl --samples 8 [--ray local]     # reasoning

As a command it asks every question to be reasoned about and writes records of mode `cot`: a teacher's reasoning, the
true boxes. train.distill asks as the records say, and learns from what is written.

With one answer a record the teacher's boxes take the place of the true ones. With several (rejection sampling, as
STaR and RFT do, https://arxiv.org/abs/2203.14465) the truth decides: the first answer whose boxes are all right, each
IoU at least 0.5 and none too many, gives its reasoning to the true boxes; a record that none answers right is left out.
Answers are saved as they come, so that a kill costs one; with `ray` they are spread over a cluster.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gemvg_edge.answer import Answer, read_answer
from gemvg_edge.boxes import Box, match_boxes
from gemvg_edge.command import command, finite_number, seed_number, whole_number
from gemvg_edge.errors import GemvgError
from gemvg_edge.prompt import END_OF_TURN
from train.checkpoint import CheckpointSettings, read_trainable
from train.collate import IGNORED, collate
from train.data.record import Record, check_output, write_records
from train.data.samples import read_all, record_sample
from train.hub import checkpoint_folder
from train.journal import Line, open_journal
from train.load import load_qwen2_vl
from train.output_folder import CONTENTS, WORK, claim, fingerprint, remove
from train.sharding import work_through

MAX_NEW_TOKENS = 512
COLDEST = 0.01  # logits over a lower temperature leave float32
ANSWERS = "answers.jsonl"  # in the work folder
Numbered = tuple[int, Record]


@dataclass(frozen=True)
class Sampling:
    """How a teacher is asked: once, greedily, or several times at a temperature; record k draws from seed + k."""

    answers: int = 1
    temperature: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """GemvgError for what cannot be asked."""
        if self.answers < 1 or self.temperature < COLDEST:
            raise GemvgError(
                f"{self.answers} samples at a temperature of {self.temperature}: give at least one, and a temperature "
                f"of at least {COLDEST}"
            )


GREEDY = Sampling()


def write_teacher_answers(
    teacher: Path,
    data: Path,
    out: Path,
    sampling: Sampling = GREEDY,
    ray: str | None = None,
    workers: int = 0,
    *,
    reason: bool = False,
) -> None:
    """Write the records of a file as the teacher answers them; those that cannot be used are left out.

    A second run after a kill keeps what was answered. Answers in words stay the true ones. With `reason` every record
    that boxes answer is asked to be reasoned about, and the others are left out.
    """
    sampling.check()
    if data.suffix != ".jsonl":
        raise GemvgError(f"there is no {out}, and only records can be answered: give a .jsonl as --data")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise GemvgError(f"there is no {out}; run this command in a single process until it is written")
    check_output(out, [teacher, data])
    read_trainable(teacher)  # its faults are told before any work
    records = read_all(data)
    if reason:
        records = [replace(record, mode="cot", thinking="") for record in records if record.kind != "understanding"]
        if not records:
            raise GemvgError(f"{data} has no record that boxes answer; there is nothing to reason about")
    work = out.with_name(out.name + ".work")
    contents = {f"{CONTENTS}the teacher": fingerprint(teacher), f"{CONTENTS}the records": fingerprint(data)}
    try:
        lock = claim(work, {"format": WORK, **contents, **vars(sampling), "reason": reason}, keep=True)
    except GemvgError as error:
        raise GemvgError(f"{error}; it may hold another teacher's answers, or answers to other records") from None
    try:
        header = {"format": "gemvg-edge-teacher", "version": 1}
        with open_journal(work / ANSWERS, header, "take the folder away") as (done, append):
            items = [(k, record) for k, record in enumerate(records) if str(k) not in done]
            make = partial(answering, teacher.resolve(), sampling)
            bar = tqdm(total=len(records), initial=len(done), desc="teacher's answers", disable=None)
            usable = sum(line["kept"] for line in done.values())
            with bar:
                for line in work_through(items, make, ray, workers):
                    append(line)
                    done[line["id"]] = line
                    usable += line["kept"]
                    bar.set_postfix(usable=usable, refresh=False)
                    bar.update()
        kept = [_from_line(record, done[str(k)]) for k, record in enumerate(records) if done[str(k)]["kept"]]
        if not kept:
            raise GemvgError(f"{teacher} gave no answer that can be used; is it trained on grounding?")
        write_records(kept, out)
        print(f"{out}: {len(kept)} of {len(records)} answers can be used", file=sys.stderr)
        remove(work)
    finally:
        lock.close()


def answering(teacher: Path, sampling: Sampling) -> Callable[[Numbered], Line]:
    """Open a teacher; a function that answers one record and gives the line to save."""
    settings = read_trainable(teacher)
    model = load_qwen2_vl(teacher, "auto").eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def answer(item: Numbered) -> Line:
        number, record = item
        answered = answer_record(model, settings, record, replace(sampling, seed=sampling.seed + number))
        line: Line = {"id": str(number), "kept": answered is not None}
        if answered is not None:
            line |= {"boxes": [[b.image, *b] for b in answered.boxes], "thinking": answered.thinking}
        return line

    return answer


def _from_line(record: Record, line: Line) -> Record:
    return replace(record, boxes=tuple(Box(*box) for box in line["boxes"]), thinking=line["thinking"])


@torch.no_grad()
def answer_record(
    model: Any, settings: CheckpointSettings, record: Record, sampling: Sampling = GREEDY
) -> Record | None:
    """The record as the teacher answers it, or None if no answer can be used."""
    if record.kind == "understanding":
        return record
    resized = settings.resized(record.sizes)
    for text in _texts(model, settings, record, sampling):
        answer = read_answer(text, record.sizes, settings.answer_format, resized)
        if answer.problem or (record.mode == "cot" and not answer.thinking):
            continue
        thinking = answer.thinking if record.mode == "cot" else ""
        if sampling.answers == 1:
            return replace(record, boxes=answer.boxes, thinking=thinking)
        if is_right(answer, record):
            return replace(record, thinking=thinking)
    return None


def is_right(answer: Answer, record: Record) -> bool:
    """Whether every true box was found, and nothing else was claimed."""
    return len(match_boxes(answer.boxes, record.boxes)) == len(answer.boxes) == len(record.boxes)


def _texts(model: Any, settings: CheckpointSettings, record: Record, sampling: Sampling) -> list[str]:
    """The teacher's answers to a record."""
    sample = record_sample(record, settings.answer_format, settings.resized(record.sizes))
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
    options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling.answers > 1:
        options = {"do_sample": True, "temperature": sampling.temperature, "top_p": 1.0, "top_k": 0}
        options["num_return_sequences"] = sampling.answers
        torch.manual_seed(sampling.seed)
    said = model.generate(
        **{name: tensor.to(model.device) for name, tensor in inputs.items()},
        **options, max_new_tokens=MAX_NEW_TOKENS, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    return [settings.tokenizer.decode(row[length:].tolist(), skip_special_tokens=False) for row in said]


@command("train.teacher")
def main() -> None:
    """Command line; see the module's first lines."""
    about = "Have a teacher reason about records, and keep what the truth confirms."
    parser = argparse.ArgumentParser("python -m train.teacher", description=about)
    parser.add_argument("teacher", type=Path, help="the checkpoint folder that is asked")
    parser.add_argument("data", type=Path, help="the .jsonl of records to be asked about")
    parser.add_argument("out", type=Path, help="the .jsonl to write, of records of mode cot")
    samples = "answers to a record, of which the first that is right is kept; at least 2 (default: %(default)s)"
    parser.add_argument("--samples", type=whole_number, metavar="N", default=8, help=samples)
    heat = "how much chance is in the answers (default: %(default)s)"
    parser.add_argument("--temperature", type=finite_number, metavar="N", default=1.0, help=heat)
    seed = "what drawing starts from (default: %(default)s)"
    parser.add_argument("--seed", type=seed_number, metavar="N", default=0, help=seed)
    ray = "spread the questions over a Ray cluster: local, auto or HOST:PORT (default: this process alone)"
    parser.add_argument("--ray", metavar="ADDRESS", help=ray)
    workers = "teachers that are open at once there; 0: one a GPU, else one a machine (default: %(default)s)"
    parser.add_argument("--workers", type=whole_number, metavar="N", default=0, help=workers)
    args = parser.parse_args()
    if args.samples < 2:
        raise GemvgError(f"--samples {args.samples}: give at least 2, of which the truth picks one")
    if args.workers < 0 or (args.workers and not args.ray):
        raise GemvgError(f"--workers {args.workers}: it is at least 0, and says nothing without --ray")
    sampling = Sampling(args.samples, args.temperature, args.seed)
    about_whom = checkpoint_folder(args.teacher), args.data, args.out
    write_teacher_answers(*about_whom, sampling, args.ray, args.workers, reason=True)


if __name__ == "__main__":
    main()
