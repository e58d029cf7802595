"""Average the weights of checkpoints that went different ways from one start, such as GRPO's seeds (model soups).

    python -m train.average runs/tiny/grpo-1 runs/tiny/grpo-2 runs/tiny/grpo-3 --out runs/tiny/grpo-mean

What few and noisy gradients have in common is small beside what each run picks up by chance, and the mean keeps the
one and loses most of the other (Wortsman et al., arXiv 2203.05482). Settings, tokenizer and what helps a next stage are
the first checkpoint's. No model is built: it needs the memory of one shard and of the tensor that is averaged.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from gemvg_edge.command import OVERWRITE, command
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import same_path
from train.checkpoint import CONFIG, check_floats, hub_name, read_settings, weight_files
from train.hub import checkpoint_folder
from train.result import shapes
from train.rewrite import check_out, finite, names_in, open_shard, rewrite_weights, writing


def average(checkpoints: Sequence[Path], out: Path, *, overwrite: bool = False) -> None:
    """Write the mean of two or more checkpoints with the same tensors, each summed in float64 and stored as before.

    GemvgError where there is one alone or twice the same, or where names, shapes, answer formats or tokens differ.
    """
    first, *others = checkpoints
    if not others or any(same_path(a, b) for k, a in enumerate(checkpoints) for b in checkpoints[:k]):
        raise GemvgError("an average is of two checkpoints or more, each in a folder of its own")
    check_out(first, out, others, overwrite=overwrite)
    wanted, settings = shapes(first), read_settings(first)
    with ExitStack() as stack:
        tensors: list[dict[str, tuple[Path, str, Any]]] = []  # of each other checkpoint, by the name on the hub
        for folder in others:
            check_floats(folder)
            own = read_settings(folder)
            if own.answer_format != settings.answer_format or own.tokenizer.to_str() != settings.tokenizer.to_str():
                raise GemvgError(f"{folder} answers in another format or other tokens than {first}")
            if different := min((name for name, _ in wanted.items() ^ shapes(folder).items()), default=""):
                raise GemvgError(f"{folder} and {first} differ in {different}; average checkpoints of one model")
            tensors.append({})
            files, index = weight_files(folder)
            for file in files:
                shard = stack.enter_context(open_shard(file))
                tensors[-1] |= {hub_name(name): (file, name, shard) for name in names_in(shard, file, index)}

        def change(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
            if (known := hub_name(name)) not in wanted:  # a table that is computed
                return None
            total = tensor.double()
            for file, stored, shard in (own[known] for own in tensors):
                total += finite(shard.get_tensor(stored), file, stored)
            return known, (total / len(checkpoints)).to(tensor.dtype)

        with writing(first, out, others, overwrite=overwrite) as folder:
            shutil.copyfile(first / CONFIG, folder / CONFIG)
            rewrite_weights(first, folder, change)


@command("train.average")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser("python -m train.average", description="Average the weights of checkpoints.")
    several = "the checkpoint folders, two or more, trained from one start"
    parser.add_argument("checkpoints", type=Path, nargs="+", help=several)
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint folder to write (required)")
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE)
    args = parser.parse_args()
    average([checkpoint_folder(folder) for folder in args.checkpoints], args.out, overwrite=args.overwrite)


if __name__ == "__main__":
    main()
