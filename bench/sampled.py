"""What GRPO gained over its start: in the rewards of sampled answers, its own objective, and in the likeliest answers.

    python -m bench.sampled runs/tiny stage2 grpo-1 more-sft-1 [--temperature 0 1] [--save bench/results/sampled.json]

Temperature 0 is the likeliest answer, which the runtime gives; above it each question gets `--answers` answers, words
and coordinates sampled alike. The first checkpoint is what the others are compared with, question by question. Ends
with one JSON line.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from bench.boxes.held_out import held_out, held_out_arguments
from bench.boxes.scoring import Counts, count, f1_gain, gain_text, mean_gain, score_counts
from bench.boxes.torch_grounder import TorchGrounder
from bench.results import result_file, save_result
from gemvg_edge.command import command, finite_number, whole_number
from gemvg_edge.images import load_image
from train.data.record import MODES, Mode, Record
from train.rewards import total_reward
from train.shared_prompts import Prompt, sample_answers

MAX_NEW_TOKENS = 160
COLDEST = 1e-4  # a temperature that leaves nothing to chance
AT_ONCE = 32  # questions


def sample_texts(
    grounder: TorchGrounder, records: Sequence[Record], think: bool, answers: int, temperature: float, name: str
) -> Iterator[tuple[Record, list[str], list[bool]]]:
    """Each question's answers as texts (at temperature 0: the likeliest), and whether each came to its end."""
    answers, temperature = (answers, temperature) if temperature else (1, COLDEST)
    settings = grounder.settings
    torch.manual_seed(0)
    for start in tqdm(range(0, len(records), AT_ONCE), desc=name, leave=False):
        part = records[start : start + AT_ONCE]
        prompts = []
        for k, record in enumerate(part):
            images = [load_image(path) for path in record.images]
            asked = grounder.prompt(images, record.query, think=think)
            prompts.append(Prompt(*asked, rows=range(k * answers, (k + 1) * answers)))
        layout = settings.image_token_id, settings.preprocessing.merge_size, grounder.stop_ids[0]
        said = sample_answers(grounder.model, prompts, *layout, grounder.stop_ids, MAX_NEW_TOKENS, temperature)
        for record, prompt in zip(part, prompts, strict=True):
            texts = [settings.tokenizer.decode(said[row], skip_special_tokens=False) for row in prompt.rows]
            yield record, texts, [said[row][-1] in grounder.stop_ids for row in prompt.rows]


def score_samples(
    folder: Path, records: Sequence[Record], mode: Mode, answers: int, temperature: float
) -> tuple[npt.NDArray[np.float64], Counts]:
    """Of each question: the mean reward of its answers (at temperature 0: of the one), and all their boxes' counts."""
    grounder = TorchGrounder.open(folder)
    rewards, counts = [], []
    sampled = sample_texts(grounder, records, mode == "cot", answers, temperature, f"{folder.name} {mode}")
    for record, texts, ended in sampled:
        about = record.boxes, record.sizes, grounder.settings.answer_format
        resized = grounder.settings.resized(record.sizes)
        ends = zip(texts, ended, strict=True)
        worths = [total_reward(text, *about, mode, finished=end, resized=resized) for text, end in ends]
        rewards.append(float(np.mean(worths)))
        boxes = [grounder.read(text, record.sizes).boxes for text in texts]
        counts.append(count(boxes, [record.boxes] * len(boxes)).sum(axis=0))
    return np.asarray(rewards), np.asarray(counts)


@command("bench.sampled")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(
        "python -m bench.sampled", description="Rewards of sampled answers, against the first checkpoint's."
    )
    parser.add_argument("folder", type=Path, help="the folder where the checkpoints are")
    parser.add_argument("stages", nargs="+", help="their names, first what GRPO started from")
    modes = "with reasoning, without, or both (default: both)"
    parser.add_argument("--mode", choices=MODES, nargs="+", default=list(MODES), help=modes)
    held_out_arguments(parser, 1000)
    answers = "how many answers to each question (default: %(default)s)"
    parser.add_argument("--answers", type=whole_number, metavar="N", default=8, help=answers)
    temperatures = "temperatures of sampling, 0 for the likeliest answer (default: 0 and 1)"
    parser.add_argument(
        "--temperature", type=finite_number, nargs="+", metavar="T", default=[0.0, 1.0], help=temperatures
    )
    saved = "keep the JSON here too, such as bench/results/sampled.json (default: print it alone)"
    parser.add_argument("--save", type=result_file, metavar="FILE", help=saved)
    args = parser.parse_args()
    if min(args.limit, args.answers) < 1 or min(args.temperature) < 0:
        parser.error("--limit and --answers must be at least 1, --temperature at least 0")
    rows: list[dict[str, Any]] = []
    records = held_out(args.data, args.limit)
    for mode, temperature in product(args.mode, args.temperature):
        start: tuple[npt.NDArray[np.float64], Counts] | None = None
        for name in args.stages:
            rewards, counts = score_samples(args.folder / name, records, mode, args.answers, temperature)
            row = {"stage": name, "mode": mode, "temperature": temperature}
            row |= {"reward": float(rewards.mean()), "f1": score_counts(counts).f1}
            print(f"{name} {mode} at {temperature:g}: reward {row['reward']:.3f}  F1@0.5 {row['f1']:.3f}")
            if start:
                row["reward_gain"], row["reward_gain_interval"] = mean_gain(start[0], rewards)
                row["f1_gain"], row["f1_gain_interval"] = f1_gain(start[1], counts)
                for gained in ("reward", "f1"):
                    print(f"    {gained} {gain_text(row[f'{gained}_gain'], row[f'{gained}_gain_interval'])}")
            start = start or (rewards, counts)
            rows.append(row)
    save_result({"n": len(records), "answers": args.answers, "start": args.stages[0], "rows": rows}, args.save)


if __name__ == "__main__":
    main()
