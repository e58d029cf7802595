"""A bundle against its checkpoint in PyTorch: the same pictures and prompts through both, and how far they differ.

    python -m export.verify BUNDLE --against CHECKPOINT

PyTorch reads a whole sequence at once without a cache; the bundle prefills, then goes on token by token. The last line
is JSON; exit code 1 if a float32 bundle differs by more than 1e-3. Quantised bundles are only reported.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from gemvg_edge.bundle import TOKENIZER, Bundle, open_bundle
from gemvg_edge.decoding import Rope, embed_prompt, prefill
from gemvg_edge.engines.protocol import CacheT, Decoder, Floats, VisionTower
from gemvg_edge.errors import GemvgError
from gemvg_edge.images import Grid, patchify
from gemvg_edge.positions import mrope_positions
from gemvg_edge.prompt import encode_prefix, encode_query
from quantize.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from transformers import Qwen2VLForConditionalGeneration

TOLERANCE = 1e-3
STEPS = 6
# Merged cells (height, width) of the pictures: landscape, portrait, tiny, and two of one shape, which share a run.
SCENES = (((4, 7),), ((4, 7), (6, 3)), ((1, 1), (5, 8), (6, 3), (5, 8)))


@dataclass(frozen=True)
class Case:
    """Pictures, and a prompt about them that goes on for STEPS tokens of an answer."""

    name: str
    patches: list[Floats]
    grids: list[Grid]
    ids: npt.NDArray[np.int64]


def verify(bundle: Bundle, checkpoint: Path) -> dict[str, float]:
    """The largest absolute difference of each kind of output over all scenes; infinite where one is no number."""
    # Here, so that a missing onnxruntime is a sentence from the command and no traceback.
    from gemvg_edge.engines.onnxruntime import OnnxDecoder, OnnxVisionTower

    _check_shape(bundle, checkpoint)
    model = load_torch(checkpoint)
    vision, decoder = OnnxVisionTower(bundle), OnnxDecoder(bundle)
    worst = {"vision": 0.0, "prefill": 0.0, "decode": 0.0}
    for case in make_cases(bundle):
        features, logits = run_torch(model, case, bundle.manifest.model.image_token_id)
        ours, our_logits = run_bundle(bundle, vision, decoder, case)
        found = {
            "vision": max(largest_difference(a, b) for a, b in zip(ours, features, strict=True)),
            "prefill": largest_difference(our_logits[0], logits[0]),
            "decode": largest_difference(our_logits[1:], logits[1:]),
        }
        print(f"{case.name}:  " + "  ".join(f"{kind} {value:.2e}" for kind, value in found.items()))
        worst = {kind: max(worst[kind], found[kind]) for kind in worst}
    return worst


def largest_difference(ours: Floats, theirs: Floats) -> float:
    """The largest absolute difference; a NaN counts as infinite, since it would pass every comparison."""
    difference = float(np.abs(ours - theirs).max())
    return difference if np.isfinite(difference) else np.inf


def _check_shape(bundle: Bundle, checkpoint: Path) -> None:
    ours, theirs = asdict(bundle.manifest.model), asdict(open_checkpoint(checkpoint).config.shape)
    for field in ours:
        if ours[field] != theirs[field]:
            raise GemvgError(
                f"{bundle.folder} has {field} {ours[field]}, {checkpoint} {theirs[field]}; "
                "give the checkpoint that the bundle was exported from"
            )


def make_cases(bundle: Bundle) -> list[Case]:
    """Random pixels in pictures of several shapes, with the bundle's own prompt."""
    manifest = bundle.manifest
    merge, patch = manifest.preprocessing.merge_size, manifest.preprocessing.patch_size
    tokenizer = Tokenizer.from_file(str(bundle.path(TOKENIZER)))
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
        cases.append(Case(name, [patches for patches, _ in pictures], grids, np.concatenate([prefix, query, answer])))
    return cases


def run_bundle(
    bundle: Bundle, vision: VisionTower, decoder: Decoder[CacheT], case: Case
) -> tuple[list[Floats], Floats]:
    """Visual tokens of each picture, and logits (1 + STEPS, vocab) of the prompt's end and of each token after it."""
    shape, merge = bundle.manifest.model, bundle.manifest.preprocessing.merge_size
    rope = Rope(shape.head_dim, shape.rope_theta, shape.mrope_section)
    features = vision.encode(case.patches, case.grids)
    embeddings = embed_prompt(decoder, case.ids, shape.image_token_id, features)
    positions = mrope_positions(case.ids, shape.image_token_id, case.grids, merge)
    prompt, total = len(case.ids) - STEPS, len(case.ids)
    cache = decoder.new_cache(total)
    logits = []
    for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, total))]:
        logits.append(prefill(decoder, rope, embeddings[start:stop], positions[:, start:stop], cache, start))
    return features, np.stack(logits)


def load_torch(checkpoint: Path) -> Qwen2VLForConditionalGeneration:
    """The checkpoint in float32, by transformers."""
    try:
        import torch
        from transformers import Qwen2VLForConditionalGeneration
    except ImportError as error:
        raise GemvgError(f"PyTorch's side cannot be run ({error}); run `pip install --group train`") from None
    model = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
    return model.eval()


def run_torch(model: Qwen2VLForConditionalGeneration, case: Case, image_token_id: int) -> tuple[list[Floats], Floats]:
    """The same two outputs by transformers, the sequence in one piece."""
    import torch

    pixels, grids = torch.from_numpy(np.concatenate(case.patches)), torch.tensor(case.grids)
    ids = torch.from_numpy(case.ids)[None]
    with torch.inference_mode():
        features: Any = model.model.get_image_features(pixels, grids)
        output = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            image_grid_thw=grids,
            mm_token_type_ids=(ids == image_token_id).int(),  # without it the positions are plain text's
            use_cache=False,
            logits_to_keep=STEPS + 1,
        )
    return [feature.numpy() for feature in features.pooler_output], output.logits[0].numpy()


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 past the tolerance, 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--against", type=Path, required=True, metavar="CHECKPOINT")
    given = parser.parse_args(arguments)
    try:
        bundle = open_bundle(given.bundle)
        worst = verify(bundle, given.against)
    except GemvgError as error:
        print(error, file=sys.stderr)
        return 2
    exact = all(what == "float32" for what in bundle.manifest.weights.values())
    passed = not exact or max(worst.values()) <= TOLERANCE
    tolerance = TOLERANCE if exact else None
    numbers = {kind: value if np.isfinite(value) else None for kind, value in worst.items()}  # JSON has no infinity
    print(json.dumps({**numbers, "tolerance": tolerance, "passed": passed, "weights": dict(bundle.manifest.weights)}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
