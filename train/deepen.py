"""Give a checkpoint more decoder layers without changing what it says, so that training can go on deeper.

    python -m train.deepen checkpoints/tabletop runs/deep --layers 8

New layers are copies of the layer before them whose two last projections are zero, so each passes its input on as it
is until it is trained (LLaMA Pro's block expansion, https://arxiv.org/abs/2401.02415). They are spread evenly between
the old ones. Folder in, folder out; the counterpart of train.student.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch

from gemvg_edge.command import OVERWRITE, command, whole_number
from gemvg_edge.errors import GemvgError
from train.checkpoint import read_trainable
from train.hub import checkpoint_folder
from train.load import load_qwen2_vl
from train.rewrite import RECORD, check_out, write_json, writing


def deepen(checkpoint: Path, out: Path, layers: int, *, overwrite: bool = False) -> None:
    """Write the checkpoint with `layers` decoder layers."""
    read_trainable(checkpoint)  # its errors name what is missing
    check_out(checkpoint, out, overwrite=overwrite)
    model = load_qwen2_vl(checkpoint, "auto")
    decoder, config = model.model.language_model, model.config.text_config
    old = len(decoder.layers)
    if layers <= old:
        raise GemvgError(f"--layers {layers}: {checkpoint} has {old} layers already; train.student takes layers away")
    sources = layer_sources(old, layers)
    stack = []
    for number, (source, new) in enumerate(sources):
        layer = copy.deepcopy(decoder.layers[source]) if new else decoder.layers[source]
        layer.self_attn.layer_idx = number
        if new:
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)
        stack.append(layer)
    decoder.layers = torch.nn.ModuleList(stack)
    config.layer_types = [config.layer_types[source] for source, _ in sources]
    config.num_hidden_layers = layers
    with writing(checkpoint, out, overwrite=overwrite) as folder:
        model.save_pretrained(folder)
        write_json(folder / RECORD, {"deepened": str(checkpoint), "layers": [source for source, _ in sources]})


def layer_sources(old: int, layers: int) -> list[tuple[int, bool]]:
    """Of each layer of the deeper decoder: which old layer it comes from, and whether it is a new copy."""
    added = layers - old
    after = [(k + 1) * old // (added + 1) for k in range(added)]  # how many old layers stand before each new one
    sources = []
    for number in range(old):
        sources += [(max(0, number - 1), True)] * after.count(number) + [(number, False)]
    return sources + [(old - 1, True)] * after.count(old)


@command("train.deepen")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser("python -m train.deepen", description="Give a checkpoint more decoder layers.")
    parser.add_argument("checkpoint", type=Path, help="the checkpoint folder to read")
    parser.add_argument("out", type=Path, help="the checkpoint folder to write")
    layers = "how many decoder layers there are to be, more than now (required)"
    parser.add_argument("--layers", type=whole_number, metavar="N", required=True, help=layers)
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE)
    args = parser.parse_args()
    deepen(checkpoint_folder(args.checkpoint), args.out, args.layers, overwrite=args.overwrite)


if __name__ == "__main__":
    main()
