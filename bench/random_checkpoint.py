"""Write a checkpoint of Qwen2-VL-2B's exact shapes with random weights, in shards, without building the model.

    python -m bench.random_checkpoint FOLDER [--dtype bfloat16|float16]

For memory and speed, where only shapes matter. Shapes and names are those of the published config.json and its index.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (gives numpy bfloat16)
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tqdm import tqdm

from gemvg_edge.command import OVERWRITE, command
from quantize.checkpoint import in_modules
from quantize.model_config import read_config
from quantize.tensors import expected_tensors
from train.output_folder import new_folder
from train.rewrite import write_json
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
# Two layers of each kind at the 7B models' widths. The vocabulary is cut: its rows are all alike.
QWEN2_VL_7B_WIDE: dict[str, Any] = QWEN2_VL_2B | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 2,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
    "tie_word_embeddings": False,
    "vision_config": QWEN2_VL_2B["vision_config"] | {"depth": 2, "hidden_size": 3584},
}
QWEN2_5_VL_7B_WIDE: dict[str, Any] = QWEN2_VL_7B_WIDE | {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "vision_config": {
        "depth": 2,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "hidden_act": "silu",
        "in_channels": 3,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    },
}
# The same of Qwen3-VL-8B, whose vision tower has heads of 72 numbers.
QWEN3_VL_8B_WIDE: dict[str, Any] = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "qwen3_vl_text",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000000.0,
        "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]},
        "hidden_act": "silu",
        "attention_bias": False,
    },
    "vision_config": {
        "model_type": "qwen3_vl",
        "depth": 2,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "in_channels": 3,
        "out_hidden_size": 4096,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [0, 1],
    },
}
PREPROCESSOR = {"min_pixels": 3136, "max_pixels": 12845056, "temporal_patch_size": 2, "merge_size": 2}
SHARD_BYTES = 2 * 10**9


def write_settings(folder: Path, config: dict[str, Any]) -> None:
    """Everything but the weights: config.json with the small tokenizer's ids, preprocessor, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = small_tokenizer()
    ids = {name: int(tokenizer.convert_tokens_to_ids(f"<|{name}|>")) for name in ("image_pad", "im_end")}
    config = {**config, "image_token_id": ids["image_pad"], "eos_token_id": ids["im_end"]}
    config["grounding"] = {"prompt": {"number_images": True}}  # as the small tokenizer's chat template has it
    write_json(folder / "config.json", config)
    patch = {"patch_size": config["vision_config"]["patch_size"]}
    write_json(folder / "preprocessor_config.json", PREPROCESSOR | patch)
    tokenizer.save_pretrained(folder)


def write_random_checkpoint(
    target: Path, config: dict[str, Any], dtype: str = "bfloat16", *, overwrite: bool = False
) -> None:
    """Write the folder; a few GB for the 2B."""
    with new_folder(target, "config.json", overwrite=overwrite) as folder:
        _write_random(folder, config, dtype)


def _write_random(folder: Path, config: dict[str, Any], dtype: str) -> None:
    write_settings(folder, config)
    write_weights(folder, dtype)


def write_weights(folder: Path, dtype: str = "bfloat16") -> None:
    """Random weights of every tensor that the folder's config.json asks for, a shard at a time."""
    config = read_config(folder)
    shapes = list(expected_tensors(config))
    renames = config.shape.model_type == "qwen3_vl"  # whose files came after transformers named its modules
    noise = np.random.default_rng(0).standard_normal(2**22, dtype=np.float32) * 0.02
    weight_map: dict[str, str] = {}
    shard: dict[str, npt.NDArray[Any]] = {}
    shards = 0
    for k, (name, shape) in enumerate(tqdm(shapes, desc="random weights", unit="tensor")):
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            shards = _write_shard(folder, shard, shards, weight_map)
        is_norm = "norm" in name or "ln_q" in name
        # Every tensor its own: ONNX Runtime packs equal weights only once, and the memory would look too small.
        own = np.roll(noise, 104_729 * k)
        values = np.ones(shape, np.float32) if is_norm and name.endswith("weight") else np.resize(own, shape)
        shard[in_modules(name) if renames else name] = values.astype(dtype)
    _write_shard(folder, shard, shards, weight_map)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _write_shard(folder: Path, shard: dict[str, npt.NDArray[Any]], number: int, weight_map: dict[str, str]) -> int:
    file = f"model-{number + 1:05d}.safetensors"
    save_file(shard, folder / file, {"format": "pt"})  # as others' loaders want it said
    weight_map |= dict.fromkeys(shard, file)
    shard.clear()
    return number + 1


@command("bench.random_checkpoint")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(
        "python -m bench.random_checkpoint",
        description="Write a Qwen2-VL-2B-shaped checkpoint with random weights.",
    )
    parser.add_argument("folder", type=Path, help="the checkpoint folder to write, 4.4 GB")
    dtype = "number format of the stored weights (default: %(default)s)"
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help=dtype)
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE)
    args = parser.parse_args()
    write_random_checkpoint(args.folder, QWEN2_VL_2B, args.dtype, overwrite=args.overwrite)


if __name__ == "__main__":
    main()
