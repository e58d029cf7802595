"""A checkpoint -> a bundle folder, written beside its place and renamed into it when all of it is there.

The same checkpoint and options give the same bytes. Knows files; vision.py and decoder.py know the networks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any

import onnx_ir as ir
from onnxscript import GraphBuilder

from export.bundle_folder import new_bundle_folder
from export.decoder import write_decoder
from export.dialects import Ops, choose_dialect
from export.embedding_table import table_header, write_embedding
from export.hashed_file import FileEntry, HashedFile, describe
from export.template_check import check_chat_template
from export.vision import write_vision
from export.vision_qwen2_5 import write_vision_qwen2_5
from export.vision_qwen3 import write_vision_qwen3
from export.weights import DENSE, Place, Scheme, WeightWriter
from gemvg_edge import bundle
from gemvg_edge.errors import GemvgError
from quantize import codes
from quantize.checkpoint import Checkpoint
from quantize.model_config import ModelConfig
from quantize.tensors import EMBEDDING, EMBEDDING_LAYER, expected_tensors

PRODUCER = "gemvg-edge"
IR_VERSIONS = {20: 9, 21: 10, 24: 12}  # of the onnx release that brought the opset
DTYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
OnTensor = Callable[[str], None]
WriteNetwork = Callable[[GraphBuilder, ModelConfig, WeightWriter, Ops, Scheme], None]


@dataclass(frozen=True)
class Recipe:
    """What to write: the dialect of the graphs, what they compute in, and how each part's float weights are stored."""

    dialect: str = "fused"
    precision: str = "float32"
    decoder: Scheme = DENSE
    vision: Scheme = DENSE

    @property
    def embedding(self) -> str:
        """The table of a quantised bundle is float16: it is only looked up in. Codes stay codes."""
        return "float32" if self.precision == "float32" and not self.decoder.bits else "float16"

    def check(self) -> None:
        """GemvgError for what the dialect cannot hold."""
        ops = choose_dialect(self.dialect)
        if self.precision not in ops.PRECISIONS:
            raise GemvgError(
                f"the {self.dialect} dialect has no {self.precision}; it computes in {', '.join(ops.PRECISIONS)}"
            )
        if ops.GRID and (self.decoder.bits or self.vision.bits):
            raise GemvgError(
                f"the {self.dialect} dialect takes quantised layers as they are and rounds none itself; run "
                "`python -m quantize.gptq` first (--method rtn needs no calibration) and export its checkpoint"
            )


FLOAT32 = Recipe()


def write_bundle(
    checkpoint: Checkpoint,
    target: Path,
    recipe: Recipe,
    on_tensor: OnTensor = lambda name: None,
    *,
    overwrite: bool = False,
) -> None:
    """Write a bundle folder; with `overwrite` a bundle there is replaced but for its README.md, all else is refused."""
    recipe.check()
    with new_bundle_folder(target, bundle.FILES, checkpoint.folders, overwrite=overwrite) as work:
        for folder in checkpoint.folders:  # an adapter's own template is what it was trained with
            check_chat_template(folder, checkpoint.config.settings.template)
        records = _write_parts(checkpoint, work, recipe, on_tensor)
        shutil.copyfile(checkpoint.folder / bundle.TOKENIZER, work / bundle.TOKENIZER)
        records[bundle.TOKENIZER] = describe(work / bundle.TOKENIZER)
        manifest = _manifest(checkpoint, target.resolve().name, recipe)
        write_manifest(work, manifest | {"files": {name: records[name] for name in bundle.FILES}})


def _write_parts(checkpoint: Checkpoint, work: Path, recipe: Recipe, on_tensor: OnTensor) -> dict[str, FileEntry]:
    """Both graphs and the table, side by side, since reading, hashing and writing one leaves processors idle.

    Where one fails, or the user interrupts, the others end at their next tensor.
    """
    stop = Event()

    def going_on(name: str) -> None:
        if stop.is_set():
            raise CancelledError
        on_tensor(name)

    tower = _vision_writer(checkpoint.config)
    graphs = [(bundle.DECODER_GRAPH, write_decoder, recipe.decoder), (bundle.VISION_GRAPH, tower, recipe.vision)]
    records: dict[str, FileEntry] = {}
    with ThreadPoolExecutor(2) as threads:
        parts = [
            threads.submit(_write_graph, checkpoint, work / name, write, recipe, scheme, going_on)
            for name, write, scheme in graphs
        ]
        parts.append(threads.submit(write_embedding, checkpoint, work / bundle.EMBEDDING, recipe.embedding, going_on))
        try:
            for part in as_completed(parts):
                records |= part.result()
        except BaseException:
            stop.set()
            raise
    return records


def count_tensors(checkpoint: Checkpoint) -> int:
    """How many times `write_bundle` calls on_tensor; a tied table is asked for twice."""
    return len(list(expected_tensors(checkpoint.config))) + checkpoint.config.tied_head


def _vision_writer(config: ModelConfig) -> WriteNetwork:
    match config.shape.model_type:
        case "qwen2_vl":
            return write_vision
        case "qwen2_5_vl":
            return write_vision_qwen2_5
        case "qwen3_vl":
            return write_vision_qwen3
    raise GemvgError(f"no vision tower of {config.shape.model_type!r} is exported")


def _write_graph(
    checkpoint: Checkpoint,
    path: Path,
    write: WriteNetwork,
    recipe: Recipe,
    scheme: Scheme,
    on_tensor: OnTensor,
) -> dict[str, FileEntry]:
    ops = choose_dialect(recipe.dialect)
    graph = ir.Graph([], [], nodes=[], opset_imports=dict(ops.OPSETS), name=path.stem)
    g = GraphBuilder(graph)
    with HashedFile(path.with_suffix(".data")) as data:
        elsewhere = _table_place(checkpoint, path.with_name(bundle.EMBEDDING), recipe)
        weights = WeightWriter(g, checkpoint, data, elsewhere, on_tensor, DTYPES[recipe.precision], ops.GRID)
        write(g, checkpoint.config, weights, ops, scheme)
        record = data.record()
    for node in graph:  # the builder's notes on Python scopes, which are empty here
        node.metadata_props.clear()
    int4 = any(value.dtype == ir.DataType.INT4 for value in graph.initializers.values())
    if not int4 and not any("block_size" in node.attributes for node in graph if node.op_type == "DequantizeLinear"):
        graph.opset_imports.update(ops.OPSETS_WITHOUT_INT4)
    ir.save(ir.Model(graph, ir_version=IR_VERSIONS[graph.opset_imports[""]], producer_name=PRODUCER), path)
    return {path.name: describe(path), data.path.name: record}


def _table_place(checkpoint: Checkpoint, path: Path, recipe: Recipe) -> dict[str, Place]:
    """Where the embedding's numbers are in the bundle, if a graph can read them there: a tied head needs no copy."""
    if checkpoint.is_quantized(EMBEDDING_LAYER) or recipe.embedding != recipe.precision:
        return {}
    return {EMBEDDING: Place(path, len(table_header(checkpoint.shape(EMBEDDING), recipe.embedding)))}


def _weights_name(checkpoint: Checkpoint, layer: str, otherwise: str) -> str:
    """What the manifest says of a layer: how the checkpoint stores it, or else how it was written."""
    if not checkpoint.is_quantized(layer):
        return otherwise
    bits, groups = checkpoint.grid(layer)
    method = codes.method(checkpoint.codes_format or "")
    size = "channel" if groups == 1 else f"g{checkpoint.shape(f'{layer}.weight')[1] // groups}"
    return f"int{bits}-{method}-{size}"


def _manifest(checkpoint: Checkpoint, name: str, recipe: Recipe) -> dict[str, Any]:
    settings, precision = checkpoint.config.settings, recipe.precision
    return {
        "format": bundle.FORMAT,
        "format_version": bundle.format_version(settings.answer_format),
        "name": name,
        "model": asdict(checkpoint.config.shape),
        "preprocessing": settings.preprocessing.to_config(),
        "coordinate_frame": settings.answer_format.coordinate_frame,
        "answer": settings.answer_format.to_config(),
        "prompt": settings.template.to_config(),
        "familiar": settings.familiar.to_config(),
        "profile": settings.profile,
        "dialect": recipe.dialect,
        "precision": precision,
        "weights": {
            "vision": _weights_name(checkpoint, "visual.blocks.0.attn.proj", recipe.vision.name(precision)),
            "decoder": _weights_name(checkpoint, "model.layers.0.mlp.down_proj", recipe.decoder.name(precision)),
            "head": _weights_name(checkpoint, "lm_head", recipe.decoder.name(precision)),
            "embedding": _weights_name(checkpoint, EMBEDDING_LAYER, recipe.embedding),
        },
        "calibration": None,  # measured on the bundle itself, by bench.calibration
    }


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """`manifest.json` of a bundle folder, sealed."""
    fields = {key: value for key, value in manifest.items() if key != bundle.SEAL}
    sealed = {**fields, bundle.SEAL: bundle.seal(fields)}
    (folder / bundle.MANIFEST).write_text(json.dumps(sealed, indent=2) + "\n", encoding="utf-8")
