"""A checkpoint -> a bundle folder, written beside its place and renamed into it when all of it is there.

The same checkpoint and options give the same bytes. Knows files; vision.py and decoder.py know the networks.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.lib import format as npy
from onnxscript import GraphBuilder

from export.decoder import write_decoder
from export.dialects import Ops, choose_dialect
from export.gptq_blocks import Blocks, to_blocks
from export.template_check import check_chat_template
from export.vision import write_vision
from export.weights import FLOAT32, Scheme, WeightWriter, row_pieces
from gemvg_edge import bundle
from gemvg_edge.boxes import RELATIVE_FRAME
from gemvg_edge.errors import GemvgError
from gemvg_edge.json_object import read_json_object
from quantize.checkpoint import Checkpoint
from quantize.model_config import ModelConfig
from quantize.tensors import EMBEDDING, EMBEDDING_LAYER, expected_tensors

PRODUCER, IR_VERSION = "gemvg-edge", 10
CARD = "README.md"  # written by hand, so it outlives the bundle that it describes
LEFT_ALONE = "the folder is left alone, give another one"
OnTensor = Callable[[str], None]
WriteNetwork = Callable[[GraphBuilder, ModelConfig, WeightWriter, Ops, Scheme], None]


@dataclass(frozen=True)
class Recipe:
    """What to write: the dialect of the graphs and how each part's weights are stored."""

    dialect: str = "fused"
    decoder: Scheme = FLOAT32
    vision: Scheme = FLOAT32

    @property
    def embedding(self) -> str:
        """The table of a quantised bundle is float16: it is only looked up in. Codes stay codes."""
        return "float32" if self.decoder.bits == 32 else "float16"


def write_bundle(checkpoint: Checkpoint, target: Path, recipe: Recipe, on_tensor: OnTensor = lambda name: None) -> None:
    """Write a bundle folder; an existing bundle there is replaced but for its README.md, anything else is refused."""
    target = target.resolve()  # gives `.` and links their name
    _check_target(target)
    check_chat_template(checkpoint.folder, checkpoint.config.settings.template)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        work.chmod(0o755)  # mkdtemp's folder is for its owner alone
        ops = choose_dialect(recipe.dialect)
        _write_graph(checkpoint, work / bundle.VISION_GRAPH, write_vision, ops, recipe.vision, on_tensor)
        _write_graph(checkpoint, work / bundle.DECODER_GRAPH, write_decoder, ops, recipe.decoder, on_tensor)
        _write_embedding(checkpoint, work / bundle.EMBEDDING, recipe.embedding)
        on_tensor(EMBEDDING)
        shutil.copyfile(checkpoint.folder / bundle.TOKENIZER, work / bundle.TOKENIZER)
        _write_manifest(checkpoint, work, target.name, recipe)
        if (target / CARD).is_file():
            shutil.copyfile(target / CARD, work / CARD)
        if target.exists():
            target.rename(work / "replaced")
        work.rename(target)
    except BaseException:
        if (work / "replaced").exists():
            (work / "replaced").rename(target)
        shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(target / "replaced", ignore_errors=True)


def count_tensors(checkpoint: Checkpoint) -> int:
    """How many times `write_bundle` calls on_tensor."""
    return len(list(expected_tensors(checkpoint.config))) + checkpoint.config.tied_head  # a tied table is read twice


def _write_graph(
    checkpoint: Checkpoint, path: Path, write: WriteNetwork, ops: Ops, scheme: Scheme, on_tensor: OnTensor
) -> None:
    graph = ir.Graph([], [], nodes=[], opset_imports=dict(ops.OPSETS), name=path.stem)
    g = GraphBuilder(graph)
    with WeightWriter(g, checkpoint, path.with_suffix(".data"), on_tensor) as weights:
        write(g, checkpoint.config, weights, ops, scheme)
    for node in graph:  # the builder's notes on Python scopes, which are empty here
        node.metadata_props.clear()
    ir.save(ir.Model(graph, ir_version=IR_VERSION, producer_name=PRODUCER), path)


def _write_embedding(checkpoint: Checkpoint, path: Path, dtype: str) -> None:
    if checkpoint.is_quantized(EMBEDDING_LAYER):
        _write_embedding_codes(to_blocks(checkpoint.quantized(EMBEDDING_LAYER), EMBEDDING_LAYER), path)
        return
    shape = checkpoint.shape(EMBEDDING)
    header = {"descr": npy.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    with path.open("wb") as file:
        npy.write_array_header_1_0(file, header)
        for rows in row_pieces(checkpoint, EMBEDDING):
            file.write(rows.astype(dtype).data)


def _write_embedding_codes(blocks: Blocks, path: Path) -> None:
    """A quantised table: a row's codes and then its scales, so that looking one up reads one place."""
    if blocks.zeros is not None:
        raise GemvgError(f"{EMBEDDING_LAYER} has zero-points; quantise the table symmetrically")
    rows, count = blocks.scales.shape
    codes = blocks.packed.reshape(rows, -1)
    fields = [("codes", "u1", (codes.shape[1],)), ("scales", "<f2", (count,))]
    table = np.empty(rows, fields)
    table["codes"], table["scales"] = codes, blocks.scales
    np.save(path, table)


def _weights_name(checkpoint: Checkpoint, layer: str, otherwise: str) -> str:
    """What the manifest says of a layer: how the checkpoint stores it, or else how it was written."""
    if not checkpoint.is_quantized(layer):
        return otherwise
    bits, groups = checkpoint.grid(layer)
    return f"int{bits}-gptq-" + ("channel" if groups == 1 else f"g{checkpoint.shape(f'{layer}.weight')[1] // groups}")


def _write_manifest(checkpoint: Checkpoint, folder: Path, name: str, recipe: Recipe) -> None:
    settings = checkpoint.config.settings
    manifest = {
        "format": bundle.FORMAT,
        "format_version": bundle.FORMAT_VERSION,
        "name": name,
        "model": asdict(checkpoint.config.shape),
        "preprocessing": settings.preprocessing.to_config(),
        "coordinate_frame": {"kind": "relative", "size": RELATIVE_FRAME},
        "answer": settings.answer_format.to_config(),
        "prompt": settings.template.to_config(),
        "dialect": recipe.dialect,
        "weights": {
            "vision": _weights_name(checkpoint, "visual.merger.mlp.2", recipe.vision.name),
            "decoder": _weights_name(checkpoint, "model.layers.0.mlp.down_proj", recipe.decoder.name),
            "head": _weights_name(checkpoint, "lm_head", recipe.decoder.name),
            "embedding": _weights_name(checkpoint, EMBEDDING_LAYER, recipe.embedding),
        },
        "files": {file: _describe(folder / file) for file in bundle.FILES},
    }
    (folder / bundle.MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _describe(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _check_target(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise GemvgError(f"{target} is a file; give a folder to write the bundle to")
    files = {path.name for path in target.iterdir()}
    if others := sorted(files - {*bundle.FILES, bundle.MANIFEST, CARD}):
        raise GemvgError(f"{target} holds {others[0]}, no part of a bundle, so it is left alone; give another folder")
    if files:
        manifest = read_json_object(target / bundle.MANIFEST, LEFT_ALONE, f"no such file; {LEFT_ALONE}")
        if manifest.content.get("format") != bundle.FORMAT:
            raise GemvgError(f"{manifest.path} is not the manifest of a bundle; {LEFT_ALONE}")
