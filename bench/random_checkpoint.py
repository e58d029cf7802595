"""Write a checkpoint of Qwen2-VL-2B's exact shapes with random bfloat16 weights, in shards, without building the model.

    python -m bench.random_checkpoint FOLDER

For memory and speed, where only shapes matter. Shapes and names are those of the published config.json and its index.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tqdm import tqdm

from train.small_model import small_tokenizer

QWEN2_VL_2B: dict[str, Any] = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "hidden_act": "silu",
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "num_heads": 16,
        "mlp_ratio": 4,
        "in_channels": 3,
        "hidden_size": 1536,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}
PREPROCESSOR = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
SHARD_BYTES = 2 * 10**9


def tensor_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of a Qwen2-VL checkpoint with tied embeddings, in the hub's names."""
    hidden, inner, vision = config["hidden_size"], config["intermediate_size"], config["vision_config"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    width = vision["embed_dim"]
    yield "visual.patch_embed.proj.weight", (width, 3, vision["temporal_patch_size"], *[vision["patch_size"]] * 2)
    for k in range(vision["depth"]):
        block = f"visual.blocks.{k}."
        for name, outputs, inputs in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            yield f"{block}{name}.weight", (outputs, inputs)
            yield f"{block}{name}.bias", (outputs,)
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            yield block + name, (width,)
    merged = width * vision["spatial_merge_size"] ** 2
    yield from (("visual.merger.ln_q.weight", (width,)), ("visual.merger.ln_q.bias", (width,)))
    for name, outputs in (("mlp.0", merged), ("mlp.2", hidden)):
        yield f"visual.merger.{name}.weight", (outputs, merged)
        yield f"visual.merger.{name}.bias", (outputs,)
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for k in range(config["num_hidden_layers"]):
        layer = f"model.layers.{k}."
        for name, outputs in (("q", hidden), ("k", keys), ("v", keys)):
            yield f"{layer}self_attn.{name}_proj.weight", (outputs, hidden)
            yield f"{layer}self_attn.{name}_proj.bias", (outputs,)
        yield f"{layer}self_attn.o_proj.weight", (hidden, hidden)
        yield f"{layer}mlp.gate_proj.weight", (inner, hidden)
        yield f"{layer}mlp.up_proj.weight", (inner, hidden)
        yield f"{layer}mlp.down_proj.weight", (hidden, inner)
        yield f"{layer}input_layernorm.weight", (hidden,)
        yield f"{layer}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)


def write_random_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    """Write the folder; a few GB for the 2B."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = small_tokenizer()
    ids = {name: int(tokenizer.convert_tokens_to_ids(f"<|{name}|>")) for name in ("image_pad", "im_end")}
    config = {**config, "image_token_id": ids["image_pad"], "eos_token_id": ids["im_end"]}
    config["grounding"] = {"prompt": {"number_images": True}}  # as the small tokenizer's chat template has it
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    tokenizer.save_pretrained(folder)
    noise = np.random.default_rng(0).standard_normal(2**22, dtype=np.float32) * 0.02
    weight_map: dict[str, str] = {}
    shard: dict[str, npt.NDArray[Any]] = {}
    shards = 0
    for k, (name, shape) in enumerate(tqdm(list(tensor_shapes(config)), desc="random weights", unit="tensor")):
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            shards = _write_shard(folder, shard, shards, weight_map)
        is_norm = "norm" in name or "ln_q" in name
        # Every tensor its own: ONNX Runtime packs equal weights only once, and the memory would look too small.
        own = np.roll(noise, 104_729 * k)
        values = np.ones(shape, np.float32) if is_norm and name.endswith("weight") else np.resize(own, shape)
        shard[name] = values.astype(ml_dtypes.bfloat16)
    _write_shard(folder, shard, shards, weight_map)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _write_shard(folder: Path, shard: dict[str, npt.NDArray[Any]], number: int, weight_map: dict[str, str]) -> int:
    file = f"model-{number + 1:05d}.safetensors"
    save_file(shard, folder / file)
    weight_map |= dict.fromkeys(shard, file)
    shard.clear()
    return number + 1


def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(description="Write a Qwen2-VL-2B-shaped checkpoint with random weights.")
    parser.add_argument("folder", type=Path)
    write_random_checkpoint(parser.parse_args().folder, QWEN2_VL_2B)


if __name__ == "__main__":
    main()
