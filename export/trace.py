"""A reference trace of a bundle: two pictures, a question and every array between them and the boxes.

    python -m export.trace BUNDLE --out trace.npz
    python -m export.trace BUNDLE --check trace.npz --engine native

For those who write a runtime of their own: BUNDLE.md says what each array is. The pictures are made, and of odd sizes.
The same bundle, engine and versions give the same bytes. With `--check` an engine is compared with a trace, array by
array: its networks are given the trace's tokens, so that one choice between equals does not spoil what follows. The
last line is JSON; exit code 1 where an array is off, and the first that is off is named.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image

import gemvg_edge
from export.trace_file import (
    FIX,
    FORMAT,
    VERSION,
    Arrays,
    Read,
    check_place,
    difference,
    limit_of,
    network_limit,
    read_trace,
    text_of,
    to_bytes,
    write_trace,
)
from gemvg_edge.answer import read_answer
from gemvg_edge.bundle import MANIFEST, SEAL, Manifest, read_manifest
from gemvg_edge.command import OVERWRITE, path_name, run_command, whole_number
from gemvg_edge.decoding import embed_prompt, prefill
from gemvg_edge.engines import ENGINES
from gemvg_edge.engines.protocol import Decoder, Floats, Ids
from gemvg_edge.engines.vision_inputs import window_places
from gemvg_edge.errors import GemvgError
from gemvg_edge.grammar import Walk, answer_grammar, free
from gemvg_edge.images import Grid, patchify, resize, resized_sizes
from gemvg_edge.json_object import read_json_object
from gemvg_edge.opened import Limits, OpenedModel, open_model
from gemvg_edge.positions import mrope_positions, mrope_table, place_table, text_positions, vision_table
from gemvg_edge.prompt import encode_prefix, encode_query

QUESTION = "all red objects"
SIZES = (203, 149), (131, 217)  # width and height: of no model's grid, one wide and one tall
STEPS, MOST_STEPS = 32, 4096
THREADS = 1  # a sum has one order then, on every machine

Pixels = npt.NDArray[np.uint8]


class Given(NamedTuple):
    """What a trace starts from, and the tokens that another one wrote, where these are to be followed."""

    pictures: Sequence[Pixels]  # each (height, width, 3), RGB
    question: str
    steps: int
    free: Ids | None = None
    answer: Ids | None = None


def make_picture(width: int, height: int, turn: int) -> Pixels:
    """A grey table with coloured discs on it, uint8 RGB (height, width, 3); another `turn` has them elsewhere."""
    y, x = np.mgrid[:height, :width]
    pixels = np.empty((height, width, 3), np.int64)
    pixels[:] = (150 + x * 40 // width - y * 30 // height + (x * 7 + y * 13) % 5)[:, :, None]
    for k, colour in enumerate([(200, 40, 40), (40, 70, 200), (230, 190, 40)]):
        across, down = width * (3 + 5 * k) // 16, height * (11 - 4 * ((k + turn) % 3)) // 16
        radius = min(width, height) * (2 + k) // 20
        pixels[(x - across) ** 2 + (y - down) ** 2 <= radius**2] = colour
    return pixels.astype(np.uint8)


def make_trace(model: OpenedModel, given: Given) -> Arrays:
    """Every array between pictures and boxes, in the order in which a runtime makes them; `about` is left out."""
    manifest, shape = model.manifest, model.manifest.model
    merge = manifest.preprocessing.merge_size
    vision, decoder = model.engines()
    arrays: Arrays = {"question": to_bytes(given.question)}
    arrays |= {f"picture_{k}": pixels for k, pixels in enumerate(given.pictures)}
    resized = [resize(Image.fromarray(pixels), manifest.preprocessing) for pixels in given.pictures]
    arrays |= {f"resized_{k}": pixels for k, pixels in enumerate(resized)}
    patches, grids = zip(*(patchify(pixels, manifest.preprocessing) for pixels in resized), strict=True)
    arrays["grids"] = np.array(grids, np.int64)
    for k, grid in enumerate(grids):
        arrays |= _vision_inputs(manifest, k, patches[k], grid)
    visual = vision.encode(patches, grids)
    arrays |= {f"visual_tokens_{k}": tokens for k, tokens in enumerate(visual)}

    sizes = [(pixels.shape[1], pixels.shape[0]) for pixels in given.pictures]
    seen = resized_sizes(sizes, manifest.preprocessing)
    prefix = encode_prefix(model.tokenizer, manifest.prompt, grids, merge)
    query = encode_query(model.tokenizer, manifest.prompt, manifest.answer, given.question, False, seen)
    ids = np.concatenate([prefix, query])
    positions = mrope_positions(ids, shape.image_token_id, grids, merge)
    table = mrope_table(positions, *model.rope)
    embeddings = embed_prompt(decoder, ids, shape.image_token_id, visual)
    arrays |= {"prompt_ids": ids, "positions": positions, "cos": table.cos, "sin": table.sin, "embeddings": embeddings}

    writer = _Writer(model, decoder, embeddings, positions, given.steps)
    arrays["free_ids"], _, arrays["free_logits"] = writer.write(free(), given.free)
    grammar = answer_grammar(model.tokenizer, manifest.answer, seen, shape.eos_token_ids)
    arrays["answer_ids"], arrays["answer_legal"], arrays["answer_logits"] = writer.write(grammar(False), given.answer)
    written = arrays["answer_ids"] if given.answer is None else given.answer
    said = [int(token) for token in written if token not in shape.eos_token_ids]
    text = model.tokenizer.decode(said, skip_special_tokens=False)
    boxes = read_answer(text, sizes, manifest.answer, seen).boxes
    arrays["answer_text"] = to_bytes(text)
    arrays["box_pictures"] = np.array([box.image for box in boxes], np.int64)
    arrays["boxes"] = np.array([tuple(box) for box in boxes], np.float64).reshape(-1, 4)
    return arrays


def _vision_inputs(manifest: Manifest, k: int, patches: Floats, grid: Grid) -> Arrays:
    shape, merge = manifest.model.vision, manifest.preprocessing.merge_size
    table = vision_table(grid, merge, shape.head_dim, shape.rope_theta)
    arrays: Arrays = {f"patches_{k}": patches, f"vision_cos_{k}": table.cos, f"vision_sin_{k}": table.sin}
    if shape.window:
        arrays[f"window_places_{k}"] = window_places(grid, merge, shape.window)
    if shape.place_side:
        places = place_table(grid, merge, shape.place_side)
        arrays |= {f"place_index_{k}": places.rows, f"place_weight_{k}": places.weight}
    return arrays


class _Writer:
    """A prompt in a cache, to be followed by one answer after the other."""

    def __init__(
        self,
        model: OpenedModel,
        decoder: Decoder[Any],
        embeddings: Floats,
        positions: npt.NDArray[np.int64],
        steps: int,
    ) -> None:
        self._model, self._decoder, self._steps = model, decoder, steps
        self._past, self._position = len(embeddings), int(positions.max()) + 1
        self._cache = decoder.new_cache(self._past + steps)
        self._logits = prefill(decoder, model.rope, embeddings, positions, self._cache, 0)  # (vocab,)

    def write(self, walk: Walk, given: Ids | None) -> tuple[Ids, npt.NDArray[np.bool_], Floats]:
        """(ids (n,) of the best legal tokens, which were legal (n, vocab), the logits they were chosen by (n, vocab)).

        A token at a time, those without an alternative too. Where tokens are `given`, these come next instead.
        """
        stops, logits, legal = self._model.manifest.model.eos_token_ids, self._logits, next(walk)
        ids, masks, rows = [], [], []
        for k in range(self._steps if given is None else len(given)):
            mask = np.full(len(logits), legal is None)
            mask[slice(0) if legal is None else legal] = True
            ids.append(int(np.where(mask, logits, -np.inf).argmax()))
            masks.append(mask)
            rows.append(logits)
            token = ids[-1] if given is None else int(given[k])
            if token in stops or k == self._steps - 1 or not (0 <= token < len(mask) and mask[token]):
                break
            legal = walk.send(token)
            logits = prefill(
                self._decoder, self._model.rope, self._decoder.embed(np.array([token])),
                text_positions(self._position + k, 1), self._cache, self._past + k,
            )  # fmt: skip
        return np.array(ids, np.int64), np.stack(masks), np.stack(rows)


def describe(bundle: Path, manifest: Manifest, engine: str) -> Arrays:
    """The trace's mark, as JSON: which bundle and which engine."""
    match engine:
        case "native":
            version = gemvg_edge.__version__
        case "tensorrt":
            version = manifest.tensorrt.version if manifest.tensorrt else ""
        case _:
            version = importlib.import_module("onnxruntime").__version__
    about = {
        "format": FORMAT, "version": VERSION, "gemvg_edge": gemvg_edge.__version__, "bundle": manifest.name,
        "bundle_sha256": _seal(bundle), "dialect": manifest.dialect, "precision": manifest.precision,
        "engine": engine, "engine_version": version, "threads": THREADS, "pillow": PIL.__version__,
    }  # fmt: skip
    return {"about": to_bytes(json.dumps(about))}


def _seal(bundle: Path) -> str:
    return read_json_object(bundle / MANIFEST, "export the bundle again", "no such file").value(SEAL, str)


def check(model: OpenedModel, theirs: Read, network: float) -> dict[str, Any]:
    """An engine's arrays against a trace's: the largest difference of each, and the first past its limit."""
    ours = make_trace(model, _given_by(theirs))
    off = sorted(set(ours) ^ (set(theirs) - {"about"}))
    found = {name: difference(name, ours, theirs, network) for name in ours if name in theirs}
    for name, value in found.items():
        print(f"{name:16} {value:9.2g}  of {limit_of(name, network):g}")
        if value > limit_of(name, network):
            off.append(name)
    differences = {name: value if np.isfinite(value) else None for name, value in found.items() if value}
    return {"passed": not off, "first_off": off[0] if off else None, "tolerance": network, "differences": differences}


def _given_by(trace: Read) -> Given:
    """What a trace started from; GemvgError where that is missing or something else."""
    names = [name for name in trace if name.startswith("picture_")]
    for name in ("question", "free_ids", "answer_ids", *(names or ["picture_0"])):
        kind, dims = (np.int64, 1) if name.endswith("ids") else (np.uint8, 3 if name in names else 1)
        array = trace.get(name)
        if (
            array is None
            or array.dtype != kind
            or array.ndim != dims
            or not array.size
            or array.shape[2:] not in ((), (3,))
        ):
            raise GemvgError(f"the trace's {name} is missing or of another kind; {FIX}")
    free_ids, answer_ids = trace["free_ids"], trace["answer_ids"]
    for name, ids in (("free_logits", free_ids), ("answer_logits", answer_ids)):
        logits = trace.get(name)
        if logits is None or logits.dtype != np.float32 or logits.ndim != 2 or len(logits) != len(ids):
            raise GemvgError(f"the trace's {name} is missing or of another kind; {FIX}")
    if (steps := max(len(free_ids), len(answer_ids))) > MOST_STEPS:
        raise GemvgError(f"the trace's answers have {steps} tokens, and {MOST_STEPS} at most are followed; {FIX}")
    try:
        question = text_of(trace["question"])
    except UnicodeDecodeError:
        raise GemvgError(f"the trace's question is missing or of another kind; {FIX}") from None
    return Given([trace[name] for name in names], question, steps, free_ids, answer_ids)


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 where an engine is off, 2 for bad input."""
    return run_command("export.trace", lambda: _run(arguments))


def _run(arguments: list[str] | None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m export.trace", description=__doc__, formatter_class=raw)
    parser.add_argument("bundle", type=Path, help="the bundle folder to trace")
    out = "the file to write; a trace that is there is replaced (default: %(default)s)"
    parser.add_argument("--out", type=path_name, default=Path("trace.npz"), metavar="FILE", help=out)
    asked = "what is asked about the pictures (default: %(default)s)"
    parser.add_argument("--query", default=QUESTION, metavar="TEXT", help=asked)
    steps = "tokens of each answer, at most (default: %(default)s)"
    parser.add_argument("--steps", type=whole_number, default=STEPS, metavar="N", help=steps)
    engines = "which engine runs the bundle (default: onnx, or tensorrt where the bundle was built for it)"
    parser.add_argument("--engine", choices=ENGINES, help=engines)
    against = "compare the engine with this trace and write nothing (default: write one)"
    parser.add_argument("--check", type=path_name, metavar="FILE", help=against)
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE.replace("a finished result", "any file"))
    given = parser.parse_args(arguments)
    if not 1 <= given.steps <= MOST_STEPS:
        raise GemvgError(f"--steps {given.steps} is not 1 to {MOST_STEPS}")
    manifest = read_manifest(given.bundle / MANIFEST)
    engine = given.engine or ("tensorrt" if manifest.tensorrt else "onnx")
    trace = read_trace(given.check) if given.check else None
    if trace is None:
        check_place(given.out, given.bundle, overwrite=given.overwrite)
    model = open_model(given.bundle, engine, THREADS, Limits(1, 1), check_hashes=True)
    about = describe(given.bundle, manifest, engine)
    if trace is not None:
        theirs, ours = (json.loads(text_of(one["about"])) for one in (trace, about))
        return _report(theirs, ours, check(model, trace, network_limit(manifest, theirs["engine"], engine)))
    pictures = [make_picture(*size, turn) for turn, size in enumerate(SIZES)]
    arrays = about | make_trace(model, Given(pictures, given.query, given.steps))
    write_trace(given.out, arrays)
    found = zip(arrays["box_pictures"].tolist(), arrays["boxes"].tolist(), strict=True)
    print(
        json.dumps(
            json.loads(text_of(about["about"]))
            | {"file": str(given.out), "arrays": len(arrays), "bytes": given.out.stat().st_size}
            | {"answer": text_of(arrays["answer_text"]), "boxes": [[image, *box] for image, box in found]}
        )
    )
    return 0


def _report(theirs: Mapping[str, str], ours: Mapping[str, str], result: dict[str, Any]) -> int:
    same = theirs["bundle_sha256"] == ours["bundle_sha256"]
    if not same:
        print(f"the trace is of another bundle, {theirs['bundle']} in the {theirs['dialect']} dialect")
    print(f"{result['first_off']} is the first that is off" if result["first_off"] else "nothing is off")
    line = {**result, "same_bundle": same, "engine": ours["engine"], "trace_engine": theirs["engine"]}
    print(json.dumps(line))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
