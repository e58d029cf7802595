"""Quantise a checkpoint: GPTQ layer by layer, with the inputs that multi-image grounding prompts give it.

    python -m quantize.gptq --model checkpoints/tabletop --out runs/tabletop.int4 --group-size 32
    python -m quantize.gptq --model CHECKPOINT --out FOLDER --bits 4 --group-size 128 --records mine.jsonl

The decoder's linear layers get `--bits`; vision tower, head and embedding table stay as they are unless told
otherwise. Out comes a Hugging Face checkpoint in the GPTQ format (gptq_format.py), which other tools load; they do not
know a quantised embedding table. One block's float32 weights are in memory at a time, and a killed run goes on where it
was. `--method rtn` rounds to nearest: the baseline. Ends with one JSON line.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Final, Literal, get_args

import torch
from tqdm import tqdm

from gemvg_edge.errors import GemvgError
from quantize.adapter import with_base
from quantize.calibration import (
    CalibrationPrompt,
    TokenWeights,
    grounding_prompts,
    read_text,
    text_prompts,
)
from quantize.checkpoint import Checkpoint, open_float_checkpoint
from quantize.gptq_format import VERSION_1, VERSION_2, WORD, QuantizedLinear, dequantize
from quantize.parts import (
    START,
    pack_layers,
    quantization_config,
    write_checkpoint,
    write_part,
    writing_parts,
)
from quantize.progress import BAR, block_work
from quantize.solver import Grid, Order, factor, round_to_nearest, solve
from quantize.stream import HEAD, Block, block_names, finished_blocks, stream
from quantize.tensors import EMBEDDING, EMBEDDING_LAYER, PLACES, expected_tensors
from train.checkpoint import with_budget
from train.stage import Switch, check_out, run_stage, settings_json, usable_device, working

UNTOUCHED: Final = 16
Bits = Literal[3, 4, 8]
SideBits = Literal[4, 8, 16]
Method = Literal["gptq", "rtn"]
Calibration = Literal["grounding", "text"]


@dataclass(frozen=True)
class Settings:
    """Everything that a run is told; data and model have no default."""

    model: Path  # the float checkpoint folder to read, or a LoRA adapter's
    out: Path  # the checkpoint folder to write
    bits: Bits = 4  # bits a weight of the decoder's linear layers
    group_size: int = 128  # inputs that share a scale; -1 for all
    sym: bool = True  # zero is the middle code; otherwise every group has its zero-point
    positive_scales: bool = False  # as TensorRT wants them; a sign lets the extreme have the lowest code
    desc_act: bool = False  # groups by importance, which many kernels cannot read
    method: Method = "gptq"  # rtn rounds to nearest, with no calibration
    calibration: Calibration = "grounding"  # kind of prompts that the model is calibrated on
    samples: int = 128  # how many prompts
    records: Path | None = None  # a .jsonl of grounding records to take prompts from; none: simulated scenes
    text: Path | None = None  # a file for --calibration text; none: Python's language reference
    scenes: Path = Path("data/world/calibration")  # where the simulated scenes are, or are rendered to
    max_pixels: int | None = None  # pixels of a calibration picture after resizing, at most; none: as export has it
    visual_weight: float = 1.0  # how much a token of a picture counts
    text_weight: float = 1.0  # how much any other token of a prompt counts
    answer_weight: float = 1.0  # how much a token of an answer counts
    vision_bits: SideBits = UNTOUCHED  # bits a weight of the vision tower; 16 leaves it as it is
    head_bits: SideBits = UNTOUCHED  # bits a weight of the head; 16 leaves it as it is
    embedding_bits: SideBits = UNTOUCHED  # bits a number of the embedding table; 16 leaves it as it is
    damping: float = 0.01  # added to the Hessian's diagonal, as a share of its mean
    search: bool = True  # search the clipping of each group
    true_sequential: bool = False  # a block's layers see what those before them became: more passes
    device: str = "auto"  # what torch computes on, such as cpu or cuda; auto: the GPU if there is one
    base: Path | None = None  # of an adapter: the checkpoint that it belongs to; none: the one that it names
    overwrite: Switch = False  # replace a finished result that is at --out

    def grid(self, layer: str) -> Grid | None:
        """What a layer's weight is rounded to, by its tensor's name without `.weight`; None leaves it."""
        special: dict[str, int] = {HEAD: self.head_bits, EMBEDDING_LAYER: self.embedding_bits}
        bits: int = self.vision_bits if layer.startswith("visual.") else special.get(layer, self.bits)
        # 8-bit products want one scale an output: it can be applied after the sum, and TensorRT fuses no other.
        beside = layer.startswith("visual.") or layer == HEAD
        group_size = -1 if beside and bits == 8 else self.group_size
        symmetric = self.sym or layer.startswith("visual.") or layer == EMBEDDING_LAYER
        return Grid(bits, group_size, symmetric, self.positive_scales) if bits < UNTOUCHED else None

    @property
    def version(self) -> str:
        """Of the GPTQ format. GPTQModel takes zero-points in version 1 only from itself: others' once were wrong."""
        return VERSION_1 if self.sym else VERSION_2

    @property
    def order(self) -> Order:
        """In which order a weight's columns are taken."""
        return "desc_act" if self.desc_act else "grouped"


def quantize(run: Settings) -> None:
    """Write the quantised checkpoint; after an error its finished blocks stay in the work folder."""
    run = with_base(run)
    check_out(run)
    checkpoint = open_float_checkpoint(run.model, run.base)
    run = replace(run, device=usable_device(run.device))
    check(run, checkpoint)
    prompts = [] if run.method == "rtn" else read_prompts(run, checkpoint)
    with writing_parts(run.out), working(run) as work:
        write_part(checkpoint, work, START, pack_layers(_round_embedding(run, checkpoint), run.version))
        seconds = _quantize_blocks(run, checkpoint, prompts, work)
        record = settings_json(run) | {
            "tokens": sum(len(prompt.ids) for prompt in prompts),
            "seconds_a_layer": round(seconds, 2),
        }
        quantization = {"quantization_config": _describe(run, checkpoint)}
        write_checkpoint(checkpoint, work, run, quantization, record, own_head=run.head_bits < UNTOUCHED)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"out": str(run.out), "seconds_a_layer": round(seconds, 2), "peak_gib": round(peak, 3)}))


def quantize_block(block: Block, run: Settings) -> dict[str, QuantizedLinear]:
    """Round a block's layers, each by the inputs that reach it; its weights become what the codes stand for.

    Where none reach it, as with a vision tower and prompts of text alone, they are rounded to nearest.
    """
    grids = {layer: grid for layer in block.linears if (grid := run.grid(layer))}
    found: dict[str, QuantizedLinear] = {}
    if not grids:
        return found
    groups = _sharing_inputs(block, list(grids)) if block.inputs else []
    reached = {layer for group in groups for layer in group}
    groups += [[layer] for layer in grids if layer not in reached]
    at_once = [[group] for group in groups] if run.true_sequential else [groups]
    for together in at_once:
        hessians = collect_hessians(block, [group[0] for group in together if group[0] in reached])
        for group in together:
            try:
                hessian = hessians.pop(group[0], None)
                size = grids[group[0]].size(block.linears[group[0]].in_features)
                known = None if hessian is None else factor(hessian, run.order, size, run.damping)
                for layer in group:
                    weight, grid = block.linears[layer].weight, grids[layer]
                    found[layer] = solve(weight, known, grid, run.search) if known else round_to_nearest(weight, grid)
                    weight.copy_(torch.from_numpy(dequantize(found[layer])))
            except GemvgError as error:
                raise GemvgError(f"{run.model}: {', '.join(group)}: {error}") from None
    return found


def collect_hessians(block: Block, layers: Sequence[str]) -> dict[str, torch.Tensor]:
    """X^T X (in, in) of the inputs of each layer over all prompts, every token by its weight."""
    linears = block.linears
    hessians = {layer: linears[layer].weight.new_zeros(2 * [linears[layer].in_features]) for layer in layers}
    weights: torch.Tensor | None = None

    def add(layer: str, x: torch.Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])  # (tokens, in)
        hessians[layer].addmm_((x if weights is None else x * weights[:, None]).T, x)

    with block.watching(layers, add):
        for k, weights in enumerate(block.weights):  # noqa: B007  (`add` reads it)
            block.run_one(k)
    return hessians


def read_prompts(run: Settings, checkpoint: Checkpoint) -> list[CalibrationPrompt]:
    """What the model is calibrated on."""
    settings = with_budget(checkpoint.config.settings, run.max_pixels)
    if run.calibration == "text":
        return text_prompts(settings, read_text(run.text), run.samples)
    weights = TokenWeights(run.visual_weight, run.text_weight, run.answer_weight)
    return grounding_prompts(settings, run.records, run.scenes, run.samples, weights)


def check(run: Settings, checkpoint: Checkpoint) -> None:
    """Refuse, before any work, what cannot be done."""
    for value, choices, flag in (
        (run.bits, Bits, "bits"),
        (run.vision_bits, SideBits, "vision-bits"),
        (run.head_bits, SideBits, "head-bits"),
        (run.embedding_bits, SideBits, "embedding-bits"),
        (run.method, Method, "method"),
        (run.calibration, Calibration, "calibration"),
    ):
        if value not in (known := get_args(choices)):
            raise GemvgError(f"--{flag} is {value}; give one of {', '.join(map(str, known))}")
    if run.samples < 1 or run.damping <= 0 or min(run.visual_weight, run.text_weight, run.answer_weight) < 0:
        raise GemvgError("--samples and --damping must be above zero, the weights of tokens not below")
    if run.group_size != -1 and run.group_size < 1:
        raise GemvgError(f"--group-size is {run.group_size}; give how many inputs share a scale, or -1 for all")
    for layer, (outputs, inputs) in linear_layers(checkpoint).items():
        if not (grid := run.grid(layer)):
            continue
        if grid.group_size != -1 and inputs % grid.group_size:
            fits = ", ".join(str(size) for size in (32, 64, 128) if inputs % size == 0) or "no usual group"
            raise GemvgError(
                f"--group-size {grid.group_size} does not divide the {inputs} inputs of {layer}; {fits} would, and -1"
            )
        if inputs * grid.bits % WORD or outputs * grid.bits % WORD:
            raise GemvgError(
                f"{layer} has {inputs} inputs and {outputs} outputs; at {grid.bits} bits both must fill whole "
                f"{WORD}-bit words, so leave the layer as it is or use more bits"
            )


def linear_layers(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Shape (out, in) of each layer that could be quantised, the embedding table too, by name without `.weight`."""
    tensors = expected_tensors(checkpoint.config)
    shapes = {name: shape for name, shape in tensors if len(shape) == 2 and name != PLACES}
    shapes.setdefault(f"{HEAD}.weight", shapes[EMBEDDING])  # where it is tied
    return {name.removesuffix(".weight"): shape for name, shape in shapes.items()}


def _describe(run: Settings, checkpoint: Checkpoint) -> dict[str, Any]:
    grids = {layer: grid for layer in linear_layers(checkpoint) if (grid := run.grid(layer))}
    return quantization_config(Grid(run.bits, run.group_size, run.sym), run.desc_act, run.damping, run.version, grids)


def _quantize_blocks(run: Settings, checkpoint: Checkpoint, prompts: Sequence[CalibrationPrompt], work: Path) -> float:
    """Write every block's part; median seconds of a decoder layer."""
    names = block_names(checkpoint)
    layers = linear_layers(checkpoint)
    sizes = block_work(checkpoint, prompts, layers, [layer for layer in layers if run.grid(layer)])
    before = sum(sizes[: finished_blocks(work)])
    seconds: list[float] = []
    started = time.perf_counter()
    with tqdm(total=sum(sizes), initial=before, desc=run.out.name, bar_format=BAR) as bar:
        for block in stream(checkpoint, prompts, run.device, work):
            write_part(checkpoint, work, block.name, pack_layers(quantize_block(block, run), run.version))
            bar.update(sizes[names.index(block.name)])
            seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
    in_decoder = [took for name, took in zip(names[-len(seconds) :], seconds, strict=True) if name.startswith("model.")]
    return median(in_decoder or [0.0])


def _round_embedding(run: Settings, checkpoint: Checkpoint) -> dict[str, QuantizedLinear]:
    """The embedding table's rows are looked up, not multiplied, so they are rounded to nearest."""
    grid = run.grid(EMBEDDING_LAYER)
    return {EMBEDDING_LAYER: round_to_nearest(torch.from_numpy(checkpoint.read(EMBEDDING)), grid)} if grid else {}


def _sharing_inputs(block: Block, layers: Sequence[str]) -> list[list[str]]:
    """The layers in the order in which they are computed, those of one and the same input together."""
    groups: list[tuple[torch.Tensor, list[str]]] = []

    def note(layer: str, x: torch.Tensor) -> None:
        if groups and groups[-1][0] is x:
            groups[-1][1].append(layer)
        else:
            groups.append((x, [layer]))

    with block.watching(layers, note):
        block.run_one(0)
    return [group for _, group in groups]


def main() -> None:
    """Command line; see the module's first lines."""
    run_stage("quantize.gptq", Settings, "Quantise a checkpoint with GPTQ.", quantize)


if __name__ == "__main__":
    main()
