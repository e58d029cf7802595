"""A smaller student from a teacher checkpoint: evenly spaced layers, and the strongest channels of their MLPs.

    python -m train.student checkpoints/tabletop runs/student --decoder-layers 4 --vision-layers 2 --intermediate 256

Folder in, folder out. The student's weights are the teacher's own, as DistilBERT's are (https://arxiv.org/abs/1910.01108),
so train.distill starts near the teacher and needs far fewer steps than from random weights. Widths other than the MLP's
and the vocabulary stay. Works on one safetensors shard at a time; no model is built.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch

from gemvg_edge.command import OVERWRITE, command, whole_number
from gemvg_edge.errors import GemvgError
from train.checkpoint import CONFIG, read_object, read_settings, weight_files
from train.hub import checkpoint_folder
from train.rewrite import check_out, count_parameters, open_shard, rewrite_weights, write_json, writing

# Both ways of naming: the hub's `model.layers.3.` and the module's own `model.language_model.layers.3.`.
_LAYER = re.compile(r"(?P<start>.*\b(?:layers|blocks)\.)(?P<number>\d+)(?P<rest>\..*)")
_CHANNELS = re.compile(r".*layers\.(?P<layer>\d+)\.mlp\.(?P<part>gate|up|down)_proj\.weight")


def make_student(
    teacher: Path,
    out: Path,
    decoder_layers: int | None,
    vision_layers: int | None,
    intermediate: int | None,
    *,
    overwrite: bool = False,
) -> None:
    """Write the student; None keeps what the teacher has."""
    check_out(teacher, out, overwrite=overwrite)
    read_settings(teacher)
    file = read_object(teacher / CONFIG)
    config = dict(file.content)
    if "quantization_config" in config:
        raise GemvgError(f"{teacher} is quantised; make the student from the checkpoint that it was quantised from")
    nested = "text_config" in config  # Qwen's own files keep the decoder's fields at the top
    text, vision = file.object("text_config") if nested else file, file.object("vision_config")
    depth, width = text.value("num_hidden_layers", int), text.value("intermediate_size", int)
    kept = _spaced("--decoder-layers", decoder_layers, depth)
    kept_vision = _spaced("--vision-layers", vision_layers, vision.value("depth", int))
    wanted = width if intermediate is None else _checked("--intermediate", intermediate, width)
    channels = _strongest(teacher, wanted) if wanted < width else {}

    def change(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        if not (place := _LAYER.fullmatch(name)):
            return name, tensor
        number, layers = int(place["number"]), kept_vision if "visual." in name else kept
        if number not in layers:
            return None
        if channels and (mlp := _CHANNELS.fullmatch(name)):
            tensor = tensor.index_select(1 if mlp["part"] == "down" else 0, channels[number])
        return f"{place['start']}{layers.index(number)}{place['rest']}", tensor

    sizes: dict[str, Any] = {"num_hidden_layers": len(kept), "intermediate_size": wanted}
    if "layer_types" in text.content:
        sizes["layer_types"] = [text.value("layer_types", list)[k] for k in kept]
    new_text = {**text.content, **sizes}
    config = {**config, "text_config": new_text} if nested else new_text
    config["vision_config"] = {**vision.content, "depth": len(kept_vision)}
    with writing(teacher, out, overwrite=overwrite) as folder:
        write_json(folder / CONFIG, config)
        rewrite_weights(teacher, folder, change)
        before, after = count_parameters(teacher), count_parameters(folder)
        done = {"decoder_layers": kept, "vision_layers": kept_vision, "intermediate": wanted}
        record = {"stage": "train.student", "checkpoint": str(teacher), **done, "parameters": after}
        write_json(folder / "training.json", record)
    print(f"{teacher}: {before / 1e6:.2f} million parameters -> {out}: {after / 1e6:.2f} million")
    print(f"decoder layers {kept} of {depth}, vision layers {kept_vision}, {wanted} of {width} channels")


def _checked(flag: str, wanted: int, teacher: int) -> int:
    if not 1 <= wanted <= teacher:
        raise GemvgError(f"{flag} {wanted}: the teacher has {teacher}; give 1 to {teacher}")
    return wanted


def _spaced(flag: str, wanted: int | None, layers: int) -> list[int]:
    """Which layers to keep: evenly spaced, the first and the last among them; the first alone if it is one."""
    count = layers if wanted is None else _checked(flag, wanted, layers)
    return [round(k * (layers - 1) / max(1, count - 1)) for k in range(count)]


def _strongest(teacher: Path, count: int) -> dict[int, torch.Tensor]:
    """The indices, in order, of the strongest MLP channels of every decoder layer.

    A channel's strength is the product of the norms of its gate row, up row and down column: unlike their sum it does
    not change when one is scaled up and another down, which leaves the function as it was.
    """
    strength: dict[int, torch.Tensor] = {}
    for file in weight_files(teacher)[0]:
        with open_shard(file) as shard:
            for name in shard.keys():  # noqa: SIM118  # no mapping
                if mlp := _CHANNELS.fullmatch(name):
                    norms = shard.get_tensor(name).float().norm(dim=0 if mlp["part"] == "down" else 1)  # (channels,)
                    layer = int(mlp["layer"])
                    strength[layer] = strength.get(layer, torch.ones(())) * norms
    return {layer: values.topk(count).indices.sort().values for layer, values in strength.items()}


@command("train.student")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser("python -m train.student", description="Make a smaller student from a teacher.")
    parser.add_argument("teacher", type=Path, help="the float checkpoint folder that the student's weights come from")
    parser.add_argument("out", type=Path, help="the checkpoint folder to write")
    parser.add_argument(
        "--decoder-layers", type=whole_number, metavar="N", help="decoder layers that are kept (default: all)"
    )
    parser.add_argument(
        "--vision-layers", type=whole_number, metavar="N", help="vision layers that are kept (default: all)"
    )
    channels = "MLP channels that each decoder layer keeps (default: all)"
    parser.add_argument("--intermediate", type=whole_number, metavar="N", help=channels)
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE)
    args = parser.parse_args()
    sizes = args.decoder_layers, args.vision_layers, args.intermediate
    make_student(checkpoint_folder(args.teacher), args.out, *sizes, overwrite=args.overwrite)


if __name__ == "__main__":
    main()
