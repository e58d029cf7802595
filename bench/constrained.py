"""What the grammar of an answer saves, and whether it changes boxes: the same questions with it and without.

    python -m bench.constrained [BUNDLE] [--limit N] [--save bench/results/constrained.json]

Every held-out question is asked four times about one scene: direct and reasoned, by the grammar and with every token
free. Told are F1, the answers that cannot be read, how many free texts the grammar allows (one that names a picture in
two lines is read and not allowed) and how many of these are the same with it, the steps of the decoder (the query's
prefill is one) and the median of milliseconds a question without the look. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from tqdm import tqdm

from bench.boxes.held_out import held_out, held_out_arguments
from bench.boxes.scoring import count, f1_gain, gain_text, score_counts
from bench.results import result_file, save_result
from gemvg_edge.command import command, whole_number
from gemvg_edge.engines.protocol import Floats, Step
from gemvg_edge.grammar import accepts, answer_grammar
from gemvg_edge.grounder import Grounder
from gemvg_edge.grounding import Grounding
from gemvg_edge.images import load_image
from gemvg_edge.models import DEFAULT_BUNDLE
from gemvg_edge.prompt import encode
from train.data.record import Record

QUESTIONS = 500


class Asked(NamedTuple):
    """One question, both ways."""

    answers: dict[bool, Grounding]  # by whether the grammar held
    steps: dict[bool, int]  # of the decoder
    allowed: bool  # by the grammar, what was written without it


def ask_all(grounder: Grounder, records: Sequence[Record], think: bool) -> list[Asked]:
    """Every question by the grammar and free."""
    decoder, steps = grounder.model.engines()[1], 0
    manifest, tokenizer = grounder.manifest, grounder.model.tokenizer
    forward = decoder.forward

    def counted(asked: Sequence[Step[Any]]) -> list[Floats]:
        nonlocal steps
        steps += len(asked)
        return forward(asked)

    found = []
    with patch.object(decoder, "forward", counted):
        for k, record in enumerate(tqdm(records, desc="reasoned" if think else "direct", leave=False)):
            scene = grounder.look([load_image(path) for path in record.images])
            answers, taken = {}, {}
            for constrained in (True, False) if k % 2 else (False, True):  # neither always finds a warm cache
                steps = 0
                answers[constrained] = scene.ground(record.query, think=think, constrained=constrained)
                taken[constrained] = steps
            stops = manifest.model.eos_token_ids
            walk = answer_grammar(tokenizer, manifest.answer, scene.resized, stops)(think)
            free = answers[False]
            allowed = accepts(walk, [*encode(tokenizer, free.text), stops[0]]) and free.problem is None
            found.append(Asked(answers, taken, allowed))
    return found


def compare(grounder: Grounder, records: Sequence[Record], think: bool) -> dict[str, Any]:
    """Both ways, side by side."""
    asked, truth = ask_all(grounder, records, think), [record.boxes for record in records]
    counts = {way: count([one.answers[way].boxes for one in asked], truth) for way in (True, False)}
    same = sum(one.answers[True].text == one.answers[False].text for one in asked if one.allowed)
    gain, interval = f1_gain(counts[False], counts[True])
    row: dict[str, Any] = {
        "think": think,
        "questions": len(records),
        "allowed": sum(one.allowed for one in asked),
        "same_where_allowed": same,
        "f1_gain": gain,
        "f1_gain_interval": list(interval),
    }
    for way, name in ((True, "constrained"), (False, "free")):
        said = [one.answers[way] for one in asked]
        row[name] = {
            "f1": score_counts(counts[way]).f1,
            "unreadable": sum(answer.problem is not None for answer in said),
            "steps": float(np.mean([one.steps[way] for one in asked])),
            "tokens": float(np.mean([answer.timings.answer_tokens for answer in said])),
            "ms": float(np.median([answer.timings.answer_ms for answer in said])),
        }
    return row


@command("bench.constrained")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser("python -m bench.constrained", description="Answers by their grammar, and free.")
    which = "a bundle folder (default: the shipped bundle)"
    parser.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE", default=DEFAULT_BUNDLE, help=which)
    held_out_arguments(parser, QUESTIONS, split=True)
    threads = "CPU threads, 0 for one a physical core (default: %(default)s)"
    parser.add_argument("--threads", type=whole_number, metavar="N", default=0, help=threads)
    saved = "keep the JSON here too, such as bench/results/constrained.json (default: print it alone)"
    parser.add_argument("--save", type=result_file, metavar="FILE", help=saved)
    args = parser.parse_args()
    if args.limit < 1:
        parser.error("--limit must be at least 1")
    records = held_out(args.data, args.limit, args.split)
    with Grounder.open(args.bundle, threads=args.threads) as grounder:
        rows = [compare(grounder, records, think) for think in (False, True)]
    for row in rows:
        constrained, free = row["constrained"], row["free"]
        print(
            f"{'reasoned' if row['think'] else 'direct':<9} F1 {constrained['f1']:.3f}, {free['f1']:.3f} "
            f"free ({gain_text(row['f1_gain'], row['f1_gain_interval'])}); {row['same_where_allowed']} of "
            f"{row['allowed']} well-formed texts the same; {constrained['steps']:.1f} and {free['steps']:.1f} steps, "
            f"{constrained['ms']:.1f} and {free['ms']:.1f} ms"
        )
    save_result({"model": args.bundle.name, "split": args.split, "rows": rows}, args.save)


if __name__ == "__main__":
    main()
