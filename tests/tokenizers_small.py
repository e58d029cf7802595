"""A small tokenizer of Qwen2-VL's make: its normaliser, its splitting rule, byte-level BPE and its special tokens."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
CORPUS = (
    "system\nYou are a helpful assistant.",
    "user\nFind the red mug that is in both pictures.",
    "assistant\nImage-1: (120,340),(560,780)\nImage-2: (0,15),(999,1000)",
    "Picture 1: Picture 2: every blue block on the table, what changed between the two views?",
)


def small_tokenizer(locations: int = 0) -> Tokenizer:
    """About 400 tokens: all bytes, a few merges, the special tokens, then `locations` tokens <loc_0>, <loc_1>, ..."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, BpeTrainer(vocab_size=384, initial_alphabet=alphabet, show_progress=False, special_tokens=[])
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(f"<loc_{k}>", special=False, normalized=False) for k in range(locations)])
    return tokenizer
