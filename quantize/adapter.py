"""A LoRA folder of peft's on its base: which tensors of the base it replaces, and what it adds to which.

A layer becomes weight + scaling * B @ A (arXiv 2106.09685), bit for bit what peft's merge_and_unload() makes of it in
float32; a tensor that was trained and saved whole takes the place of the base's. What peft merges in another way (DoRA,
other methods, starts that changed the base) is refused. Reads the adapter's settings; its tensors are checkpoint.py's.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file, is_folder
from gemvg_edge.json_object import JsonObject, read_json_object, short
from gemvg_edge.tokenizer import open_tokenizer
from quantize.tensors import EMBEDDING
from train.checkpoint import (
    ADAPTER,
    CONFIG,
    HEAD,
    PREPROCESSOR,
    PROCESSOR,
    QUANTIZED,
    TOKENIZER,
    CheckpointSettings,
    read_object,
    read_preprocessor,
)
from train.hub import checkpoint_folder

WEIGHTS = "adapter_model.safetensors"
DOWN, UP = "lora_A.weight", "lora_B.weight"
WHOLE = ("model*.safetensors", "model*.safetensors.index.json", "pytorch_model*.bin")  # weights of a model
PREFIX = "base_model.model."  # peft's wrappers around the model
WRAPPED = ".base_layer."  # and around a layer
MERGE = "merge it with peft's merge_and_unload() and save_pretrained(), and give what that wrote"

# What a config may say without changing how the adapter is merged. Of fields that are not here, newer ones too, a
# switch that is on, or a text, list or object with something in it, is a way of merging that is not known.
READ = (
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights",
    "base_model_name_or_path", "revision",
)  # fmt: skip
OF_TRAINING = (
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_core", "modules_to_save",
    "peft_version", "target_modules", "task_type",
)  # fmt: skip
# Other starts (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) take from the base's weights what they put into the adapter.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
BIASES = ("none", "all", "lora_only")
RANKS, ALPHAS = (1, 2**16), (-1e6, 1e6)
MOST_PATTERNS, LONGEST_PATTERN = 4096, 256
# A pattern is a stranger's regular expression, which may not end: names and their ends, also several, are matched.
_ENDS = r"\^?(?:\.\*)?(?:[\w-]|\\?\.)+\$?"
_PATTERN = re.compile(rf"{_ENDS}(?:\|{_ENDS})*", re.ASCII)

Array = npt.NDArray[np.float32]
# Where each tensor lies (file and its name there), and its shape.
Tensors = tuple[dict[str, tuple[Path, str]], dict[str, tuple[int, ...]]]
Run = TypeVar("Run")
N = TypeVar("N", int, float)
Patterns = tuple[tuple[re.Pattern[str], N], ...]


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, the checkpoint that it belongs to, and what its config says of the merge."""

    folder: Path
    base: Path
    rank: int
    alpha: float
    by_root: bool  # rsLoRA: alpha counts by the root of the rank
    ranks: Patterns[int]  # of layers with another rank
    alphas: Patterns[float]

    @property
    def weights(self) -> Path:
        """The file of its tensors."""
        return self.folder / WEIGHTS


def is_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter and nothing else; one with weights of a model beside it is for nobody to guess."""
    whole = next((file for pattern in WHOLE for file in folder.glob(pattern)), None)
    return is_file(folder / ADAPTER) and not whole


def find_base(folder: Path, given: Path | None) -> Path | None:
    """The checkpoint that an adapter belongs to, the `given` one or the one that it names; None for no adapter.

    A name is a folder, as it is written or seen from the adapter's, or a hub id. GemvgError where there is none.
    """
    if not is_adapter(folder):
        if given is not None:
            raise GemvgError(f"--base is what an adapter belongs to, but {folder} is no adapter's folder; leave it out")
        return None
    if given is not None:
        return given
    config = _read_config(folder)
    name = config.value("base_model_name_or_path", str, "")
    if not name:
        raise GemvgError(f"{config.path} does not name the model that it belongs to; give it with --base")
    for place in (Path(name), folder / name):
        if is_folder(place):
            return place
    if revision := config.value("revision", str, ""):
        raise GemvgError(
            f"{config.path} names revision {short(revision)} of {short(name)}; download that and give it with --base"
        )
    try:
        found = checkpoint_folder(Path(name))
    except GemvgError as error:
        raise GemvgError(f"{config.path} names its base: {error}; or give it with --base") from None
    if not is_folder(found):
        raise GemvgError(f"{config.path} names {short(name)} as its base, which is not here; give it with --base")
    return found


def with_base(run: Run) -> Run:
    """The same run with the base of its `model` where that is an adapter, so that it is known as something read."""
    settings: Any = run
    found: Run = replace(settings, base=find_base(settings.model, settings.base))
    return found


def open_adapter(folder: Path, base: Path | None) -> Adapter | None:
    """An adapter with its base, as in `find_base`; None for a whole checkpoint, GemvgError for what is not merged."""
    found = find_base(folder, base)
    if found is None:
        return None
    config = _read_config(folder)
    _check_mergeable(config)
    if not is_file(folder / WEIGHTS):
        other = " (adapter_model.bin, a pickle, is not read)" if is_file(folder / "adapter_model.bin") else ""
        raise GemvgError(f"{folder}: no {WEIGHTS}{other}; save the adapter as safetensors")
    if any(read_object(found / CONFIG).content.get(key) for key in QUANTIZED):
        raise GemvgError(
            f"{found} is quantised, and adapters are merged into floats; give the float checkpoint that it was made "
            "from with --base"
        )
    return Adapter(
        folder,
        found,
        rank=config.value("r", int, low=RANKS[0], high=RANKS[1]),
        alpha=config.value("lora_alpha", float, low=ALPHAS[0], high=ALPHAS[1]),
        by_root=config.value("use_rslora", bool, False),
        ranks=_read_patterns(config, "rank_pattern", int, RANKS),
        alphas=_read_patterns(config, "alpha_pattern", float, ALPHAS),
    )


def name_in_model(stored: str) -> str:
    """A tensor's name in the model, from that in the adapter's file."""
    return stored.removeprefix(PREFIX).replace(WRAPPED, ".")


def lay_on(adapter: Adapter, theirs: Tensors, base: Tensors, tied: bool) -> None:
    """Put an adapter's tensors over those of its base, whose head may be `tied` to its embedding table."""
    (their_places, their_shapes), (places, shapes) = theirs, base
    # A table that was trained without its head, or a head without its table: they were two from then on.
    trained = EMBEDDING in their_places or HEAD.replace("weight", DOWN) in their_places
    if tied and trained and HEAD not in their_places and EMBEDDING in places:
        places[HEAD], shapes[HEAD] = places[EMBEDDING], shapes[EMBEDDING]
    places |= their_places
    shapes |= their_shapes


def read_scaling(
    adapter: Adapter, stored: str, down: tuple[int, ...], up: tuple[int, ...] | None, weight: tuple[int, ...]
) -> float:
    """How much the product of one layer counts, whose A (rank, in) has the name `stored` in the adapter's file.

    GemvgError where A and `up`, the shape of B (out, rank), are not of the stated rank and the weight's (out, in).
    """
    module = name_in_model(stored).removesuffix(f".{DOWN}")  # as it was called in training, which patterns are about
    rank = next((rank for pattern, rank in adapter.ranks if pattern.match(module)), adapter.rank)
    alpha = next((alpha for pattern, alpha in adapter.alphas if pattern.match(module)), adapter.alpha)
    if up is None:
        raise GemvgError(f"{adapter.weights} has {stored} without its lora_B; save the adapter again")
    if len(down) != 2 or down[0] != rank:
        raise GemvgError(
            f"{adapter.weights}: {stored} has shape {down}, not ({rank}, inputs) as {ADAPTER} states; take both from "
            f"one adapter, or where the layer is no linear one, {MERGE}"
        )
    if len(weight) != 2 or down[1] != weight[1] or up != (weight[0], rank):
        raise GemvgError(
            f"{adapter.weights}: {module} has lora_A {down} and lora_B {up}, which do not fit the weight {weight} of "
            f"{adapter.base}; give the base that it was trained on with --base"
        )
    return alpha / (math.sqrt(rank) if adapter.by_root else rank)


def add_product(weight: Array, down: Array, up: Array, scaling: float) -> Array:
    """Weight (out, in) + scaling * up (out, rank) @ down (rank, in), as peft adds them."""
    try:
        # numpy's product sums in another order than peft's, which shows in last digits.
        import torch
    except ImportError as error:
        raise GemvgError(f"merging an adapter needs PyTorch ({error}); run `pip install --group train`") from None
    factors = (torch.from_numpy(np.array(factor)).clone() for factor in (up, down))
    product: Array = torch.matmul(*factors).mul_(scaling).numpy()
    with np.errstate(over="ignore"):  # whoever asked looks for infinities
        return np.add(weight, product, out=product)


def check_settings(adapter: Adapter, settings: CheckpointSettings) -> None:
    """GemvgError where the adapter brings a tokenizer or picture sizes that are not the base's, whose own are used."""
    if is_file(file := adapter.folder / TOKENIZER):
        theirs = open_tokenizer(file, "take the base's instead")
        if theirs.get_vocab(with_added_tokens=True) != settings.tokenizer.get_vocab(with_added_tokens=True):
            raise GemvgError(
                f"{file} has other tokens than {adapter.base}, whose tokenizer an adapter is used with; {MERGE}, with "
                "this tokenizer in it"
            )
    processor = is_file(adapter.folder / PROCESSOR) and read_object(adapter.folder / PROCESSOR).content
    if is_file(adapter.folder / PREPROCESSOR) or (processor and processor.get("image_processor")):
        said = read_preprocessor(adapter.folder)
        ours = settings.preprocessing
        numbers = said.settings(type(ours), others=True)
        # How many pixels a picture may have is for the exporter to choose.
        if replace(numbers, min_pixels=ours.min_pixels, max_pixels=ours.max_pixels) != ours:
            raise GemvgError(f"{said.path} prepares pictures otherwise than {adapter.base}; give the base with --base")


def _read_config(folder: Path) -> JsonObject:
    return read_json_object(folder / ADAPTER, "mend it or save the adapter again", "no such file")


def _check_mergeable(config: JsonObject) -> None:
    """GemvgError for what is not merged as weight + scaling * B @ A."""
    if (kind := config.value("peft_type", str)) != "LORA":
        raise GemvgError(f"{config.path}: an adapter of type {short(kind)} is not merged here; {MERGE}")
    start = config.content.get("init_lora_weights", True)
    if (start.lower() if isinstance(start, str) else start) not in STARTS:
        raise GemvgError(
            f"{config.path}: init_lora_weights {short(start)} changed the base's weights before training; {MERGE}"
        )
    if (bias := config.value("bias", str, "none")) not in BIASES:
        raise GemvgError(f"{config.path}: bias {short(bias)} is not known; {MERGE}")
    for field, value in config.content.items():
        said = value is True or (isinstance(value, (str, list, dict)) and value)
        if said and field not in READ and field not in OF_TRAINING:
            raise GemvgError(f"{config.path}: {field} is {short(value)}, which is not merged here; {MERGE}")


def _read_patterns(config: JsonObject, field: str, kind: type[N], limits: tuple[float, float]) -> Patterns[N]:
    """Patterns of modules' names as peft matches them, the first that fits counting, and the number of each."""
    patterns = config.object(field, {})
    if len(patterns.content) > MOST_PATTERNS:
        raise GemvgError(f"{config.path}: {field} has more than {MOST_PATTERNS} entries; {MERGE}")
    found = []
    for pattern in patterns.content:
        if len(pattern) > LONGEST_PATTERN or not _PATTERN.fullmatch(pattern):
            raise GemvgError(
                f"{config.path}: {field} has {short(pattern)}; names of layers are followed, and their ends, but no "
                f"other regular expressions; {MERGE}"
            )
        number = patterns.value(pattern, kind, low=limits[0], high=limits[1])
        found.append((re.compile(rf"(.*\.)?({pattern})$"), number))
    return tuple(found)
