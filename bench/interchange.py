"""Whether GPTQ checkpoints pass between quantize/ and GPTQModel: each reads the other's, and the logits agree.

    python -m bench.interchange checkpoints/tabletop --gptqmodel ENV/bin/python [--save bench/results/interchange.json]

GPTQModel runs in an environment of its own (gptqmodel_side.py says how it is made), since it forces another torch.
Both sides compute in float32 with the same codes, on text. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.readme import interchange as table
from bench.results import machine, result_file, save_result
from gemvg_edge.command import command
from gemvg_edge.errors import GemvgError
from quantize.checkpoint import open_checkpoint
from quantize.gptq import Settings, quantize
from quantize.torch_model import load_model

SIDE = Path(__file__).with_name("gptqmodel_side.py")
OURS: dict[str, dict[str, Any]] = {
    "4 bits": {},
    "4 bits, activation order": {"desc_act": True},
    "4 bits, zero-points": {"sym": False},
    "3 bits": {"bits": 3},
    "8 bits, one group": {"bits": 8, "group_size": -1},
}
THEIRS: dict[str, dict[str, Any]] = {
    "4 bits": {"bits": 4, "group_size": 32},
    "4 bits, activation order, zero-points": {"bits": 4, "group_size": 32, "desc_act": True, "sym": False},
    "4 bits, a kind of layer at 8 and one left alone": {
        "bits": 4,
        "group_size": 32,
        "dynamic": {"+:.*down_proj": {"bits": 8}, r"-:.*layers\.3\.self_attn\.q_proj": {}},
    },
    "3 bits": {"bits": 3, "group_size": 32},
}


def run_gptqmodel(python: Path, jobs: list[dict[str, Any]], folder: Path) -> None:
    """Do the jobs in GPTQModel's environment."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs), encoding="utf-8")
    try:
        # In the folder that is thrown away: GPTQModel leaves a log where it is started.
        command = [python.absolute(), SIDE.resolve(), file]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError as error:
        raise GemvgError(f"{python} cannot be run ({error}); give the python of GPTQModel's environment") from None
    if done.returncode:
        raise GemvgError(f"{SIDE.name} failed in {python}:\n{done.stderr[-2000:]}")


@torch.inference_mode()
def our_logits(checkpoint: Path, ids: np.ndarray[Any, Any]) -> torch.Tensor:
    """Logits (tokens, vocabulary) with the weights that we read from the codes."""
    tokens = torch.from_numpy(ids[:128])[None]
    logits: torch.Tensor = load_model(checkpoint)(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False
    ).logits[0]
    return logits


def interchange(checkpoint: Path, python: Path, folder: Path) -> list[dict[str, Any]]:
    """Every case's largest difference of logits."""
    below = open_checkpoint(checkpoint).config.shape.eos_token_ids[0]  # plain text, no picture's place among it
    ids = np.random.default_rng(0).integers(0, below, 16 * 128)
    np.save(folder / "ids.npy", ids)
    jobs = []
    for writer, cases in (("quantize.gptq", OURS), ("GPTQModel", THEIRS)):
        for k, options in enumerate(cases.values()):
            out = folder / f"{writer}-{k}"
            if writer == "GPTQModel":
                given = {"checkpoint": str(checkpoint.resolve()), "out": str(out), "ids": str(folder / "ids.npy")}
                jobs.append({"do": "quantise", **given, **options})
            else:
                quantize(Settings(checkpoint, out, **{"group_size": 32, "samples": 16, "device": "cpu", **options}))
            given = {"checkpoint": str(out), "out": f"{out}.npy", "ids": str(folder / "ids.npy")}
            jobs.append({"do": "load", **given})
    run_gptqmodel(python, jobs, folder)
    rows = []
    for writer, cases in (("quantize.gptq", OURS), ("GPTQModel", THEIRS)):
        for k, name in enumerate(cases):
            out = folder / f"{writer}-{k}"
            theirs, ours = np.load(f"{out}.npy"), our_logits(out, ids).numpy()
            row = {"writer": writer, "case": name, "largest_difference": float(np.abs(ours - theirs).max())}
            rows.append(row | {"largest_logit": float(np.abs(theirs).max())})
    return rows


@command("bench.interchange")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(
        "python -m bench.interchange", description="Pass GPTQ checkpoints to GPTQModel and back."
    )
    parser.add_argument("checkpoint", type=Path, help="a small float checkpoint folder")
    python = "the python of GPTQModel's own environment (required)"
    parser.add_argument("--gptqmodel", type=Path, metavar="PYTHON", required=True, help=python)
    saved = "keep the JSON here too, such as bench/results/interchange.json (default: print it alone)"
    parser.add_argument("--save", type=result_file, metavar="FILE", help=saved)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = interchange(args.checkpoint, args.gptqmodel, Path(folder))
    result = {"model": args.checkpoint.name, "rows": rows}
    print(table({**result, "machine": machine()}))
    save_result(result, args.save)


if __name__ == "__main__":
    main()
