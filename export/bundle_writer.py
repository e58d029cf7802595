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
from tokenizers import Tokenizer

from export.checkpoint import Checkpoint
from export.config import ModelConfig
from export.decoder import write_decoder
from export.dialects import Ops, choose_dialect
from export.template_check import check_chat_template
from export.vision import write_vision
from export.weights import FLOAT32, Scheme, WeightWriter, row_pieces
from gemvg_edge import bundle
from gemvg_edge.boxes import RELATIVE_FRAME
from gemvg_edge.errors import GemvgError
from gemvg_edge.prompt import IMAGE_TOKEN, token_id

PRODUCER, IR_VERSION = "gemvg-edge", 10
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
        """The table of a quantised bundle is float16: it is only looked up in."""
        return "float32" if self.decoder.bits == 32 else "float16"


def write_bundle(checkpoint: Checkpoint, target: Path, recipe: Recipe, on_tensor: OnTensor = lambda name: None) -> None:
    """Write a bundle folder; an existing bundle there is replaced, anything else is left alone and refused."""
    _check_target(target)
    _check_tokenizer(checkpoint)
    check_chat_template(checkpoint.folder, checkpoint.config.prompt)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        work.chmod(0o755)  # mkdtemp's folder is for its owner alone
        ops = choose_dialect(recipe.dialect)
        _write_graph(checkpoint, work / bundle.VISION_GRAPH, write_vision, ops, recipe.vision, on_tensor)
        _write_graph(checkpoint, work / bundle.DECODER_GRAPH, write_decoder, ops, recipe.decoder, on_tensor)
        _write_embedding(checkpoint, work / bundle.EMBEDDING, recipe.embedding)
        on_tensor("model.embed_tokens.weight")
        shutil.copyfile(checkpoint.folder / bundle.TOKENIZER, work / bundle.TOKENIZER)
        _write_manifest(checkpoint, work, target.name, recipe)
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
    biases = sum(name.endswith(".bias") and "norm" not in name and "ln_q" not in name for name in checkpoint.places)
    return len(checkpoint.places) - biases + checkpoint.config.tied_head


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
    name = "model.embed_tokens.weight"
    header = {"descr": npy.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": checkpoint.shape(name)}
    with path.open("wb") as file:
        npy.write_array_header_1_0(file, header)
        for rows in row_pieces(checkpoint, name):
            file.write(rows.astype(dtype).data)


def _write_manifest(checkpoint: Checkpoint, folder: Path, name: str, recipe: Recipe) -> None:
    config = checkpoint.config
    manifest = {
        "format": bundle.FORMAT,
        "format_version": bundle.FORMAT_VERSION,
        "name": name,
        "model": asdict(config.shape),
        "preprocessing": config.preprocessing.to_config(),
        "coordinate_frame": {"kind": "relative", "size": RELATIVE_FRAME},
        "answer": config.answer.to_config(),
        "prompt": config.prompt.to_config(),
        "dialect": recipe.dialect,
        "weights": {
            "vision": recipe.vision.name,
            "decoder": recipe.decoder.name,
            "head": recipe.decoder.name,
            "embedding": recipe.embedding,
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
    if any(target.iterdir()) and not (target / bundle.MANIFEST).is_file():
        raise GemvgError(f"{target} is not empty and not a bundle, so it is not overwritten; give another folder")


def _check_tokenizer(checkpoint: Checkpoint) -> None:
    path = checkpoint.folder / bundle.TOKENIZER
    if not path.is_file():
        raise GemvgError(f"{path}: no such file; save the checkpoint's tokenizer there with save_pretrained")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise GemvgError(f"{path} is not a tokenizer ({error}); download the checkpoint again") from None
    shape, answer = checkpoint.config.shape, checkpoint.config.answer
    if token_id(tokenizer, IMAGE_TOKEN) != shape.image_token_id:
        raise GemvgError(f"{path}: {IMAGE_TOKEN} is not token {shape.image_token_id}, config.json's image_token_id")
    if answer.coordinates == "locations":
        for k in (0, answer.locations - 1):
            token_id(tokenizer, f"<loc_{k}>")
    if (tokens := tokenizer.get_vocab_size()) > shape.vocab_size:
        raise GemvgError(f"{path} has {tokens} tokens, the model {shape.vocab_size}; they do not belong together")
