"""What a checkpoint folder says beside its weights: tokenizer, preprocessing, prompt template, answer format.

Reads the Hugging Face layout; our own settings are the key `grounding` of config.json, and a checkpoint without it
(Qwen's own, Migician) gets those of a profile. Imports no torch, so that export can use it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gemvg_edge.answer import AnswerFormat
from gemvg_edge.boxes import Size
from gemvg_edge.bundle import MANIFEST
from gemvg_edge.errors import GemvgError
from gemvg_edge.familiar import Familiar
from gemvg_edge.files import is_file, is_folder
from gemvg_edge.images import EDGE_MAX_PIXELS, Preprocessing, resized_sizes
from gemvg_edge.json_object import JsonObject, read_json_object, short
from gemvg_edge.prompt import PromptTemplate
from gemvg_edge.tokenizer import check_tokens, open_tokenizer
from train.profiles import OURS, OWN, guess_profile, read_profile

COORDINATES = {"qwen2_5_vl": "pixels", "qwen3_vl": "json"}  # of families that write other ones than Qwen2-VL
CONFIG, PREPROCESSOR, TOKENIZER = "config.json", "preprocessor_config.json", "tokenizer.json"
PROCESSOR = "processor_config.json"  # transformers 5 keeps the preprocessor's settings in it
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
QUANTIZED = ("quantization_config", "compression_config")  # the latter once was compressed-tensors'
HEAD = "lm_head.weight"  # the same in every naming
# transformers has saved the first two, and DeepSpeed's gathered weights come as the third; the right-hand names are the
# hub's, and the ones that are used here.
RENAMED = (("model.language_model.", "model."), ("model.visual.", "visual."), ("model.model.", "model."))
OTHER_WEIGHTS = ("*.bin", "*.gguf", "*.pth", "*.pt", "*.ckpt")


@dataclass(frozen=True)
class CheckpointSettings:
    """Everything that turns pictures and a query into a checkpoint's inputs, and its text into boxes."""

    tokenizer: Tokenizer
    preprocessing: Preprocessing
    template: PromptTemplate
    answer_format: AnswerFormat
    image_token_id: int
    familiar: Familiar  # the pictures that it was trained on, where that is known
    profile: str  # whose words `template` has

    def resized(self, sizes: Sequence[Size]) -> list[Size]:
        """Each original picture's (width, height) -> that which the model sees, the frame of answers in pixels."""
        return resized_sizes(sizes, self.preprocessing)


def read_settings(folder: Path, profile: str | None = None) -> CheckpointSettings:
    """Read the settings of a checkpoint folder; GemvgError names the file that is missing or wrong.

    `profile` is one of train.profiles.NAMES, whose words and ways then count, or OWN; left out, it is guessed.
    """
    config = read_object(folder / CONFIG)
    grounding = config.object("grounding", default={})
    name = profile or guess_profile(config)
    said = grounding if name == OWN else read_profile(name)
    answer = said.object("answer", default={})
    coordinates = COORDINATES.get(config.value("model_type", str, ""), AnswerFormat().coordinates)
    settings = CheckpointSettings(
        read_tokenizer(folder / TOKENIZER),
        read_preprocessor(folder).settings(Preprocessing, others=True),
        said.object("prompt", default={}).settings(PromptTemplate),
        replace(answer, content={"coordinates": coordinates, **answer.content}).settings(AnswerFormat),
        config.value("image_token_id", int),
        grounding.object("familiar", default={}).settings(Familiar),
        name,
    )
    check_tokens(settings.tokenizer, folder / TOKENIZER, settings.answer_format, settings.image_token_id, CONFIG)
    return settings


def with_budget(settings: CheckpointSettings, max_pixels: int | None) -> CheckpointSettings:
    """The same with another budget of pixels a picture; left out, the checkpoint's, but at most EDGE_MAX_PIXELS."""
    numbers = settings.preprocessing
    budget = min(numbers.max_pixels, EDGE_MAX_PIXELS) if max_pixels is None else max_pixels
    return replace(settings, preprocessing=numbers.within(budget))


def read_trainable(folder: Path) -> CheckpointSettings:
    """The same, for training: GemvgError for a family that is only quantised, exported and run here.

    transformers loads such a checkpoint into Qwen2-VL's classes with most of its weights random and a mere warning.
    """
    model_type = read_object(folder / CONFIG).content.get("model_type")
    if model_type in COORDINATES:
        raise GemvgError(f"{folder} is a {model_type}, which cannot be trained here; give a qwen2_vl checkpoint")
    settings = read_settings(folder)
    return settings if settings.profile == OWN else read_settings(folder, OURS)  # what training makes of it


def read_preprocessor(folder: Path) -> JsonObject:
    """What the checkpoint says of its pictures: as transformers, inside the processor's file before its own file."""
    if is_file(folder / PROCESSOR):
        processor = read_object(folder / PROCESSOR)
        if processor.content.get("image_processor") is not None:
            return processor.object("image_processor")
    return read_object(folder / PREPROCESSOR)


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files that hold a checkpoint's weights, and of shards, which file has each tensor.

    As transformers takes them: a single file comes before an index, which an earlier save may have left; files that
    the index does not name are no part of the checkpoint. GemvgError for one that is missing.
    """
    if is_file(folder / ADAPTER):  # transformers would load it on top of the weights
        raise GemvgError(
            f"{folder} has an adapter beside its weights ({ADAPTER}); merge it into them with peft's "
            "merge_and_unload(), or move it away"
        )
    if (named := read_object(folder / CONFIG).content.get("transformers_weights")) not in (None, SINGLE, INDEX):
        raise GemvgError(
            f"{folder / CONFIG}: transformers_weights names {short(named)}, which is not followed here; call that file "
            f"{SINGLE} (of shards, the index {INDEX}) and take the field out"
        )
    if is_file(folder / SINGLE) and named != INDEX:
        return [folder / SINGLE], {}
    if not is_file(folder / INDEX):
        others = sorted(path.name for pattern in OTHER_WEIGHTS for path in folder.glob(pattern))
        found = f" (it has {others[0]}, which is not read)" if others else ""
        raise GemvgError(f"{folder}: no {SINGLE} and no {INDEX}{found}; save the checkpoint as safetensors")
    weight_map = read_object(folder / INDEX).object("weight_map")
    places = {tensor: weight_map.value(tensor, str) for tensor in weight_map.content}
    for name in dict.fromkeys(places.values()):
        if Path(name).name != name or name in ("", ".", "..") or "\\" in name:
            raise GemvgError(f"{folder / INDEX} names {name[:80]!r}, outside the folder; download the checkpoint again")
        if not is_file(folder / name):
            raise GemvgError(f"{folder / name}: this shard of the checkpoint is missing; download the checkpoint again")
    return [folder / name for name in sorted(set(places.values()))], places


def hub_name(name: str) -> str:
    """A tensor's name on the hub, from any that transformers saves it under."""
    for old, new in RENAMED:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def check_floats(folder: Path) -> None:
    """GemvgError for a checkpoint whose weights are codes, where the work begins with floats."""
    if any(read_object(folder / CONFIG).content.get(key) for key in QUANTIZED):
        raise GemvgError(f"{folder} is quantised already; give the float checkpoint that it came from")


def text_section(config: JsonObject) -> JsonObject:
    """The decoder's fields: nested as transformers 5 saves them, or at the top as in Qwen's own files."""
    return config.object("text_config") if config.content.get("text_config") else config


def read_object(file: Path) -> JsonObject:
    """A JSON object from a checkpoint's file, its fields checked as they are read."""
    if not is_folder(file.parent):
        raise GemvgError(f"{file.parent}: no such checkpoint folder; give one with {CONFIG} and safetensors")
    if file.name == CONFIG and not is_file(file) and is_file(file.with_name(MANIFEST)):
        raise GemvgError(
            f"{file.parent} is a bundle, no checkpoint (it has {MANIFEST}); give what it was exported from"
        )
    if file.name == CONFIG and not is_file(file) and is_file(file.with_name(ADAPTER)):
        raise GemvgError(
            f"{file.parent} is an adapter (it has {ADAPTER}), no checkpoint; merge it into its model first, with "
            "peft's merge_and_unload() and save_pretrained()"
        )
    missing = f"no such file; {file.parent} is not a checkpoint in the Hugging Face layout"
    return read_json_object(file, "mend it or download the checkpoint again", missing)


def read_json(file: Path) -> dict[str, Any]:
    """The same as a plain dict."""
    return dict(read_object(file).content)


def read_tokenizer(file: Path) -> Tokenizer:
    """A tokenizer.json; GemvgError says that it is missing or broken."""
    return open_tokenizer(file, "save the checkpoint's fast tokenizer there with save_pretrained")
