"""Memory and time of a vision-language model on a device: pure arithmetic, checked against what others measured.

A phase takes max(FLOPs / (efficiency x peak), bytes / (efficiency x bandwidth)): a roofline (Williams et al. 2009,
https://doi.org/10.1145/1498765.1498785) with two efficiencies for all devices, models and phases. Knows the counts of
Qwen2-VL and its relatives, no files and no commands. Units: bytes, seconds, FLOP (a multiplication and an addition are
two).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from export.build_peak import peak_bytes
from quantize.model_config import ModelConfig

# Bits a weight with its share of the scale: float16 a group of 128, for NVFP4 float8 a group of 16. Of int8 an output
# has one scale, since TensorRT dequantises no groups of it inside a product: it would move 5 bytes a weight.
WEIGHT_BITS = {"float16": 16.0, "int8": 8.0, "int4": 4 + 16 / 128, "nvfp4": 4 + 8 / 16}
# What products are computed in: weight-only GEMMs (TensorRT's, ONNX Runtime's) unpack integers to float16.
COMPUTE = {"float16": "float16", "int8": "float16", "int4": "float16", "nvfp4": "nvfp4"}
HALF = 2  # bytes of a float16


@dataclass(frozen=True)
class DecoderShape:
    """Qwen2's or Qwen3's decoder."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    head_norms: bool = False  # of queries and keys, in place of their biases

    @property
    def matrices(self) -> int:
        """Weights of all layers' linear maps."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.inner)

    @property
    def vectors(self) -> int:
        """Norms, and the biases of Qwen2 or the norms of heads of Qwen3."""
        of_heads = 2 if self.head_norms else self.heads + 2 * self.kv_heads
        return self.layers * (2 * self.hidden + self.head_dim * of_heads) + self.hidden

    @property
    def table(self) -> int:
        """Weights of the embedding table, and of the head."""
        return self.vocab * self.hidden

    @property
    def cache_bytes(self) -> int:
        """Bytes that a token takes in a float16 key/value cache."""
        return 2 * self.layers * self.kv_heads * self.head_dim * HALF


@dataclass(frozen=True)
class VisionShape:
    """A Qwen vision tower; `window` patches attend to each other outside `full_layers`, 0 is the whole picture."""

    depth: int
    width: int
    inner: int
    mlp_matrices: int  # 2, or 3 with a gate
    channels: int
    patch: int  # pixels
    temporal: int
    merge: int  # merge x merge patches become a token
    mergers: int  # one, and DeepStack's
    window: int
    full_layers: int
    places: int = 0  # rows of a learned table

    @property
    def blocks(self) -> int:
        """Weights of all blocks' linear maps."""
        return self.depth * (4 * self.width**2 + self.mlp_matrices * self.width * self.inner)

    @property
    def patch_embedding(self) -> int:
        """Weights of the map from a patch's numbers."""
        return self.width * self.channels * self.temporal * self.patch**2

    @property
    def pixels_a_token(self) -> int:
        """Pixels that become one visual token."""
        return (self.patch * self.merge) ** 2

    @property
    def vectors(self) -> int:
        """Norms and biases as Qwen2-VL has them, without the mergers'; with learned places, these and one bias more."""
        extra = (self.places + 1) * self.width if self.places else 0
        return self.depth * (4 * self.width + 5 * self.width + self.inner) + extra


@dataclass(frozen=True)
class Shape:
    """A model: decoder, vision tower, and the most visual tokens that its preprocessor makes of a picture."""

    name: str
    decoder: DecoderShape
    vision: VisionShape
    max_visual_tokens: int

    @property
    def merger(self) -> int:
        """Weights of one merger's two maps."""
        merged = self.vision.width * self.vision.merge**2
        return merged * (merged + self.decoder.hidden)


@dataclass(frozen=True)
class Precision:
    """How each part's weights are stored, as keys of WEIGHT_BITS; norms and biases stay float16."""

    name: str
    decoder: str
    head: str = "float16"
    embedding: str = "float16"
    vision: str = "float16"


@dataclass(frozen=True)
class Device:
    """What of a device the roofline needs."""

    name: str
    usable: float  # bytes that the operating system sees
    system: float  # what it holds itself
    bandwidth: float  # bytes a second
    peak: Mapping[str, float]  # dense FLOP a second by type


@dataclass(frozen=True)
class Efficiency:
    """The share of peak and of bandwidth that kernels reach."""

    compute: float
    bandwidth: float


@dataclass(frozen=True)
class Work:
    """A phase: FLOPs by the type that they are computed in, and bytes that are read and written."""

    flops: Mapping[str, float]
    bytes: float

    def seconds(self, device: Device, efficiency: Efficiency) -> float:
        """The roofline."""
        compute = self.compute_seconds(device) / efficiency.compute
        return max(compute, self.bytes / device.bandwidth / efficiency.bandwidth)

    def compute_seconds(self, device: Device) -> float:
        """Seconds at full peak."""
        return sum(flops / device.peak[kind] for kind, flops in self.flops.items())


@dataclass(frozen=True)
class Point:
    """A published time of a phase, the work that it took, and whether the fit may see it."""

    work: Work
    device: Device
    seconds: float
    fitted: bool = True


def shape_of(config: ModelConfig, name: str) -> Shape:
    """The shape of a checkpoint."""
    decoder, tower, numbers = config.shape, config.shape.vision, config.settings.preprocessing
    return Shape(
        name,
        DecoderShape(
            hidden=decoder.hidden_size,
            layers=decoder.layers,
            heads=decoder.heads,
            kv_heads=decoder.kv_heads,
            head_dim=decoder.head_dim,
            inner=config.intermediate_size,
            vocab=decoder.vocab_size,
            head_norms=config.head_norms,
        ),
        VisionShape(
            depth=tower.depth,
            width=tower.embed_dim,
            inner=config.vision_intermediate_size,
            mlp_matrices=3 if tower.window else 2,  # windows came with a gated MLP
            channels=config.channels,
            patch=numbers.patch_size,
            temporal=numbers.temporal_patch_size,
            merge=numbers.merge_size,
            mergers=1 + decoder.deepstack,
            window=(tower.window * numbers.merge_size) ** 2,
            full_layers=len(config.full_attention_blocks) if tower.window else tower.depth,
            places=tower.place_side**2,
        ),
        max_visual_tokens=numbers.max_pixels // (numbers.patch_size * numbers.merge_size) ** 2,
    )


def weight_bytes(shape: Shape, precision: Precision) -> dict[str, float]:
    """Bytes of each part's weights. A tied head counts twice: a bundle stores table and head apart."""
    decoder, vision = shape.decoder, shape.vision
    tower = vision.blocks + vision.patch_embedding + vision.mergers * shape.merger
    merged = vision.width * vision.merge**2
    merger_vectors = vision.mergers * (merged + decoder.hidden)  # biases; DeepStack's norm the merged patches
    merger_vectors += 2 * vision.width + 2 * merged * (vision.mergers - 1)
    return {
        "decoder": _stored(decoder.matrices, precision.decoder) + HALF * decoder.vectors,
        "embedding": _stored(decoder.table, precision.embedding),
        "head": _stored(decoder.table, precision.head),
        "vision": _stored(tower, precision.vision) + HALF * (vision.vectors + merger_vectors),
    }


def building_bytes(shape: Shape, precision: Precision) -> float:
    """The most memory that building the engines takes beside what a GPU of its own has: export.build_memory's."""
    weights = weight_bytes(shape, precision)
    parts = [
        (weights["decoder"] + weights["head"], shape.decoder.matrices, precision.decoder),
        (weights["vision"], shape.vision.blocks, precision.vision),
    ]
    four = [count / 2 if stored == "int4" else 0.0 for _, count, stored in parts]
    return max(peak_bytes(codes, size - codes) for codes, (size, _, _) in zip(four, parts, strict=True))


def activation_bytes(shape: Shape, prompt_tokens: int, visual_tokens: int) -> float:
    """The larger of a picture's and the prompt's float16 buffers, and the prompt's embeddings.

    Attention is fused, layers share their buffers: input, normed input, queries with keys and values, inner values.
    """
    decoder, vision = shape.decoder, shape.vision
    width = 2 * decoder.hidden + decoder.head_dim * (decoder.heads + 2 * decoder.kv_heads) + 2 * decoder.inner
    patches = visual_tokens * vision.merge**2
    tower = patches * (2 * vision.width + 3 * vision.width + (vision.mlp_matrices - 1) * vision.inner)
    embedding = decoder.hidden * vision.mergers  # a token comes with its DeepStack features
    return HALF * (max(tower, prompt_tokens * width) + prompt_tokens * embedding)


def vision_work(shape: Shape, precision: Precision, visual_tokens: int, pictures: int = 1) -> Work:
    """Encoding pictures of `visual_tokens` each, one after the other; attention stays inside a picture."""
    vision = shape.vision
    patches = visual_tokens * vision.merge**2
    linear = 2 * patches * (vision.blocks + vision.patch_embedding)
    merging = 2 * visual_tokens * vision.mergers * shape.merger
    near = min(vision.window or patches, patches)
    attended = patches * (vision.full_layers * patches + (vision.depth - vision.full_layers) * near)
    flops = pictures * (linear + merging + 4 * vision.width * attended)
    return Work({COMPUTE[precision.vision]: flops}, pictures * weight_bytes(shape, precision)["vision"])


def prefill_work(shape: Shape, precision: Precision, tokens: int) -> Work:
    """Reading a prompt at once; the head sees its last token only."""
    decoder = shape.decoder
    attention = 4 * decoder.layers * decoder.heads * decoder.head_dim * tokens * (tokens + 1) / 2
    flops = {"float16": attention + 2 * decoder.table}
    kind = COMPUTE[precision.decoder]
    flops[kind] = flops.get(kind, 0) + 2.0 * decoder.matrices * tokens
    weights = weight_bytes(shape, precision)
    return Work(flops, weights["decoder"] + weights["head"] + tokens * decoder.cache_bytes)


def decode_work(shape: Shape, precision: Precision, past: int) -> Work:
    """One token after `past` others: every weight of decoder and head is read, and the whole cache."""
    decoder = shape.decoder
    flops = 2 * (decoder.matrices + decoder.table) + 4 * decoder.layers * decoder.heads * decoder.head_dim * past
    weights = weight_bytes(shape, precision)
    # Four-bit floats are unpacked too when there is but one row.
    return Work({"float16": flops}, weights["decoder"] + weights["head"] + past * decoder.cache_bytes)


def fit(points: Sequence[Point]) -> Efficiency:
    """The two efficiencies with the least mean |log(predicted / published)| of the fitted points, in steps of 0.01.

    Like a median of an even number, the best may be a stretch: then it is the middle.
    """
    points = [point for point in points if point.fitted]
    steps = np.arange(1, 101) / 100
    compute = np.array([point.work.compute_seconds(point.device) for point in points])
    memory = np.array([point.work.bytes / point.device.bandwidth for point in points])
    published = np.array([point.seconds for point in points])
    predicted: Any = np.maximum(compute / steps[:, None, None], memory / steps[None, :, None])
    loss = np.abs(np.log(predicted / published)).mean(axis=2)
    best = (np.argwhere(loss < loss.min() + 1e-9).mean(axis=0) + 1) / 100
    return Efficiency(float(best[0]), float(best[1]))


def relative_error(point: Point, efficiency: Efficiency) -> float:
    """How much longer the prediction is than what was published; 0.1 is 10 %."""
    return point.work.seconds(point.device, efficiency) / point.seconds - 1


def held_out_error(points: Sequence[Point]) -> float:
    """Median absolute error on the points that the fit does not see."""
    efficiency = fit(points)
    return median(abs(relative_error(point, efficiency)) for point in points if not point.fitted)


def _stored(weights: int, kind: str) -> float:
    return math.ceil(weights * WEIGHT_BITS[kind] / 8)
