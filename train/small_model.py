"""Write the small Qwen2-VL checkpoint that training starts from: config, tokenizer, random weights.

    python -m train.small_model runs/start

It is transformers' own Qwen2VLForConditionalGeneration, only small, so every later stage treats it as it treats the 7B.
What differs from Qwen's sizes, and why:
  * patch 8 instead of 14: at 128 x 128 pixels a visual token covers 16 pixels, about the smallest object;
  * rope_theta 300 and mRoPE sections 2, 4, 10 instead of 10^6 and 16, 24, 24: the width axis comes last and so has the
    lowest frequencies. At 10^6 none of them tells neighbouring columns of an 8 x 8 grid apart; at 10 all of them turn
    so fast that words could not be matched with pictures some thirty tokens away, and questions were ignored;
  * 129 location tokens: one a pixel edge, initialised as smooth waves so that near numbers start near each other.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from gemvg_edge.answer import AnswerFormat
from gemvg_edge.command import OVERWRITE, command, seed_number
from gemvg_edge.prompt import PromptTemplate
from gemvg_edge.tokenizer import SPLIT
from train.checkpoint import CONFIG
from train.output_folder import check_target, new_folder
from train.rewrite import write_json
from train.vocabulary import IMAGE_TAGS, waves
from train.world.questions import corpus

LOCATIONS = 129
THINK = "Think first. "  # what asks for reasoning, before the question, so that its words are read for that
BYTE_PAIRS = 512
# Qwen2's own, so that the tokenizer behaves as the large models' does.
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% set pictures = namespace(count=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{% set pictures.count = pictures.count + 1 %}"
    "Picture {{ pictures.count }}: <|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 8,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "min_pixels": 64 * 64,
    "max_pixels": 128 * 128,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "do_convert_rgb": True,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
}


def small_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Qwen2-VL's special tokens and `<loc_0>`..`<loc_128>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    texts = [*corpus(), *["system\nYou are a helpful assistant.", "user\n", "assistant\n", "None"] * 50]
    texts += [f"{word}{n}: " for word in ("Picture ", "Image-") for n in range(1, 10) for _ in range(20)]
    texts += [tag for tag in ("<think>", "</think>", "<answer>", "</answer>", THINK) for _ in range(50)]
    trainer = trainers.BpeTrainer(
        vocab_size=BYTE_PAIRS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    added = [*IMAGE_TAGS, *(f"<loc_{k}>" for k in range(LOCATIONS))]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )


def small_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLConfig:
    """About 5.3 million parameters: vision 4 x 128, decoder 10 x 192."""
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "im_end")}
    return Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 10,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "mrope_section": [2, 4, 10]},
            "bos_token_id": None,
            "eos_token_id": ids["im_end"],
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 4,
            "embed_dim": 128,
            "num_heads": 4,
            "hidden_size": 192,
            "mlp_ratio": 4,
            "patch_size": PREPROCESSOR["patch_size"],
            "spatial_merge_size": PREPROCESSOR["merge_size"],
            "temporal_patch_size": PREPROCESSOR["temporal_patch_size"],
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=True,
        grounding={
            "prompt": PromptTemplate(think=THINK + "{query}", number_images=True).to_config(),
            "answer": AnswerFormat("locations", LOCATIONS).to_config(),
        },
    )


def smooth_locations(embedding: torch.Tensor, first: int, count: int) -> None:
    """Overwrite rows first.. of the table (vocabulary, width) with waves of k, at the scale of the other rows."""
    with torch.no_grad():
        embedding[first : first + count] = waves(count, embedding.shape[1]) * embedding.std()


def write_small_model(target: Path, seed: int, *, overwrite: bool = False) -> None:
    """Write a complete checkpoint folder with random weights."""
    check_target(target, CONFIG, overwrite=overwrite)
    torch.manual_seed(seed)
    tokenizer = small_tokenizer()
    model = Qwen2VLForConditionalGeneration(small_config(tokenizer))
    smooth_locations(model.get_input_embeddings().weight, int(tokenizer.convert_tokens_to_ids("<loc_0>")), LOCATIONS)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    with new_folder(target, CONFIG, overwrite=overwrite) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / "preprocessor_config.json", PREPROCESSOR)
    size = np.sum([p.numel() for p in model.parameters()]) / 1e6
    print(f"{target}: {size:.2f} million parameters, {len(tokenizer)} tokens")


@command("train.small_model")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(
        "python -m train.small_model", description="Write a small Qwen2-VL checkpoint with random weights."
    )
    parser.add_argument("folder", type=Path, help="the checkpoint folder to write")
    seed = "what the random weights start from (default: %(default)s)"
    parser.add_argument("--seed", type=seed_number, metavar="N", default=0, help=seed)
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE)
    args = parser.parse_args()
    write_small_model(args.folder, args.seed, overwrite=args.overwrite)


if __name__ == "__main__":
    main()
