"""What export.verify runs: made-up scenes through the graphs of a bundle, one by one and as a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx

from export.op_lists import load_graph
from export.reference import Case
from export.rounded import rounded
from gemvg_edge.bundle import DECODER_GRAPH, TOKENIZER, VISION_GRAPH, Bundle
from gemvg_edge.decoding import Rope, embed_prompt, prefill
from gemvg_edge.engines.embedding import EmbeddingTable
from gemvg_edge.engines.graph_ops import operators_of
from gemvg_edge.engines.protocol import CacheT, Decoder, Floats, VisionTower
from gemvg_edge.images import patchify
from gemvg_edge.positions import mrope_positions
from gemvg_edge.prompt import encode_prefix, encode_query
from gemvg_edge.tokenizer import open_tokenizer

STEPS = 32
# Merged cells (height, width) of the pictures: landscape, portrait, tiny, and two of one shape, which share a run.
SCENES = (((4, 7),), ((4, 7), (6, 3)), ((1, 1), (5, 8), (6, 3), (5, 8)))


class Exact(NamedTuple):
    """A bundle's networks as they are compared."""

    bundle: Bundle  # with the precision that these take and give
    vision: VisionTower
    decoder: Decoder[Any]
    session: Any  # the decoder's


def exact_engines(bundle: Bundle, folder: Path) -> Exact:
    """Both graphs on ONNX Runtime's CPU with the arithmetic that they stand for; `folder` is for what is written.

    Quantised layers see activations as they are. Graphs for TensorRT in half floats are computed as its kernels do
    (rounded.py), and take and give float32.
    """
    # Here, so that a missing onnxruntime is a sentence from the command and no traceback.
    from gemvg_edge.engines.onnxruntime import OnnxDecoder, OnnxVisionTower

    vision, decoder = (_exact_session(bundle, name, folder) for name in (VISION_GRAPH, DECODER_GRAPH))
    if is_rounded(bundle):
        bundle = replace(bundle, manifest=replace(bundle.manifest, precision="float32"))
    return Exact(bundle, OnnxVisionTower(bundle, session=vision), OnnxDecoder(bundle, session=decoder), decoder)


def is_rounded(bundle: Bundle) -> bool:
    """Whether a bundle's half floats are those of TensorRT's kernels."""
    return bundle.manifest.dialect != "fused" and bundle.manifest.precision != "float32"


def _exact_session(bundle: Bundle, graph: str, folder: Path) -> Any:
    """A graph opened so that quantised layers see activations as they are, and half floats are rounded as on a GPU."""
    from gemvg_edge.engines.onnxruntime import open_graph

    operators_of(bundle.path(graph))  # a loop of a stranger's may never end
    model = load_graph(bundle.path(graph))
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1  # float32
    if is_rounded(bundle):
        model = rounded(model, bundle.manifest.precision)
    onnx.save(model, folder / graph)
    return open_graph(
        folder / graph,
        entries={
            # The weights stay where they are; a product with dequantised weights becomes MatMulNBits on loading.
            "session.model_external_initializers_file_folder_path": str(bundle.folder.resolve()),
            "session.qdq_matmulnbits_accuracy_level": "1",
        },
    )


def make_cases(bundle: Bundle) -> list[Case]:
    """Random pixels in pictures of several shapes, with the bundle's own prompt."""
    manifest = bundle.manifest
    merge, patch = manifest.preprocessing.merge_size, manifest.preprocessing.patch_size
    tokenizer = open_tokenizer(bundle.path(TOKENIZER), "export the bundle again")
    rng = np.random.default_rng(0)
    cases = []
    for cells in SCENES:
        sizes = [(h * merge * patch, w * merge * patch) for h, w in cells]
        pixels = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
        pictures = [patchify(picture, manifest.preprocessing) for picture in pixels]
        grids = [grid for _, grid in pictures]
        prefix = encode_prefix(tokenizer, manifest.prompt, grids, merge)
        query = encode_query(tokenizer, manifest.prompt, manifest.answer, "the mug that is in every picture")
        answer = rng.choice(query, STEPS)
        name = f"{len(sizes)} picture(s), " + " ".join(f"{w}x{h}" for h, w in sizes)
        ids = np.concatenate([prefix, query, answer])
        cases.append(Case(name, [patches for patches, _ in pictures], grids, ids, STEPS))
    return cases


def run_bundle(
    bundle: Bundle, vision: VisionTower, decoder: Decoder[CacheT], case: Case
) -> tuple[list[Floats], Floats]:
    """Visual tokens of each picture, and logits (1 + steps, vocab) of the prompt's end and of each token after it."""
    shape, merge = bundle.manifest.model, bundle.manifest.preprocessing.merge_size
    rope = Rope.of(shape)
    features = vision.encode(case.patches, case.grids)
    embeddings = embed_prompt(decoder, case.ids, shape.image_token_id, features)
    positions = mrope_positions(case.ids, shape.image_token_id, case.grids, merge)
    prompt, total = len(case.ids) - case.steps, len(case.ids)
    cache = decoder.new_cache(total)
    logits = []
    for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, total))]:
        logits.append(prefill(decoder, rope, embeddings[start:stop], positions[:, start:stop], cache, start))
    return features, np.stack(logits)


def run_batch(bundle: Bundle, session: Any, cases: Sequence[Case], features: Sequence[list[Floats]]) -> Floats:
    """All scenes as one batch through the decoder's graph: logits (1 + steps, scenes, vocab).

    Shorter prompts are filled up at their end; what stands there is written over by the steps that follow.
    """
    manifest, table = bundle.manifest, EmbeddingTable.open(bundle)
    shape, plain = manifest.model, manifest.dialect == "plain"
    lengths = np.array([len(case.ids) - case.steps for case in cases])
    tokens, capacity = int(lengths.max()), int(lengths.max()) + STEPS
    embeds = np.zeros((len(cases), capacity, shape.embedding_width), np.float32)
    cos = np.zeros((len(cases), capacity, shape.head_dim // 2), np.float32)
    sin = cos.copy()
    for k, (case, visual) in enumerate(zip(cases, features, strict=True)):
        rows = table.rows(case.ids)
        rows[case.ids == shape.image_token_id] = np.concatenate(visual)
        positions = mrope_positions(case.ids, shape.image_token_id, case.grids, manifest.preprocessing.merge_size)
        count = len(case.ids)
        embeds[k, :count] = rows
        cos[k, :count], sin[k, :count] = Rope.of(shape).table(positions)
    names = [f"{part}_{layer}" for layer in range(shape.layers) for part in ("key", "value")]
    dims = (len(cases), shape.kv_heads, capacity, shape.head_dim)
    caches = {name: np.zeros(dims, np.float32) for name in names}
    outputs = ["logits", *(f"{'new' if plain else 'present'}_{name}" for name in names)]
    scene = np.arange(len(cases))[:, None]
    logits = []
    for step in range(STEPS + 1):
        places = np.tile(np.arange(tokens), (len(cases), 1)) if step == 0 else (lengths + step - 1)[:, None]
        last = scene[:, 0] * tokens + lengths - 1 if step == 0 else scene[:, 0]
        found, *written = session.run(
            outputs,
            {
                "inputs_embeds": embeds[scene, places], "cos": cos[scene, places], "sin": sin[scene, places],
                "places": places, "slots": np.arange(capacity), "rows": last,
                **{f"past_{name}": cache for name, cache in caches.items()},
            },
        )  # fmt: skip
        logits.append(found)
        for name, values in zip(names, written, strict=True):
            if plain:
                caches[name][scene[..., None], np.arange(shape.kv_heads)[None, :, None], places[:, None]] = values
            else:
                caches[name] = values
    return np.stack(logits)
