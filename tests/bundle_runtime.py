"""A runtime of its own, written from BUNDLE.md alone: numpy, onnxruntime and tokenizers, and nothing of ours.

Gives the arrays of a trace. What it needed and BUNDLE.md did not say was put there. Its other parts: seal, pictures
and answers, in files beside this one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

from tests.bundle_runtime_answer import Grammar, most_steps, show, to_boxes, tokens_of
from tests.bundle_runtime_pictures import (
    frequencies,
    in_windows,
    learned_places,
    new_size,
    patch_rows,
    resize,
    spread,
    to_patches,
)
from tests.bundle_runtime_seal import seal

Array = np.ndarray
Arrays = dict[str, Array]
New = tuple[Array, Array, Array]  # embeddings, cos and sin of the new tokens of a scene


def run(folder: Path, trace: Arrays) -> Arrays:
    """All arrays of a trace but `about`, from its pictures and question; the answers' tokens are the trace's."""
    pictures, free, answer = [trace["picture_0"], trace["picture_1"]], trace["free_ids"], trace["answer_ids"]
    question, about = bytes(trace["question"]).decode(), json.loads(bytes(trace["about"]))
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert seal(manifest) == manifest["sha256"]
    numbers, model = manifest["preprocessing"], manifest["model"]
    merge = numbers["merge_size"]
    arrays: Arrays = {"question": np.frombuffer(question.encode(), np.uint8)}
    vision = session(folder / "vision.onnx")
    grids, sizes, seen, visual = [], [], [], []
    for k, picture in enumerate(pictures):
        height, width = picture.shape[:2]
        w, h = new_size(width, height, numbers)
        resized = resize(picture, w, h, int(about["pillow"].split(".")[0]))
        patches = to_patches(resized, numbers)
        grids.append((1, h // numbers["patch_size"], w // numbers["patch_size"]))
        sizes.append((width, height))
        seen.append((w, h))
        cos, sin = patch_rows(grids[-1], merge, model["vision"])
        arrays |= {f"picture_{k}": picture, f"resized_{k}": resized, f"patches_{k}": patches}
        arrays |= {f"vision_cos_{k}": cos, f"vision_sin_{k}": sin}
        inputs = {"patches": patches[None], "cos": cos, "sin": sin}
        places = None
        if side := model["vision"].get("place_side", 0):
            index, weight = learned_places(grids[-1], merge, side)
            arrays |= {f"place_index_{k}": index, f"place_weight_{k}": weight}
            inputs |= {"place_index": index, "place_weight": weight}
        if window := model["vision"].get("window", 0):
            places = arrays[f"window_places_{k}"] = in_windows(grids[-1], merge, window)
            inputs = {name: spread(rows, places, merge**2) for name, rows in inputs.items()}
            inputs["valid"] = np.repeat(places >= 0, merge**2)[None]
        tokens = vision.run(["tokens"], inputs)[0][0]
        if places is not None:
            back = np.empty((sum(places >= 0), tokens.shape[1]), np.float32)
            back[places[places >= 0]] = tokens[places >= 0]
            tokens = back
        arrays[f"visual_tokens_{k}"] = tokens
        visual.append(tokens)
    arrays["grids"] = np.array(grids)

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    asked = show(question, manifest["answer"], seen)
    ids = prompt(tokenizer, manifest, [len(tokens) for tokens in visual], asked)
    table = widened(embedding_rows(np.load(folder / "embedding.npy"), model["hidden_size"]), model)
    embeddings = table[ids]
    embeddings[ids == model["image_token_id"]] = np.concatenate(visual)
    positions = token_positions(ids, model["image_token_id"], [(h // merge, w // merge) for _, h, w in grids])
    cos, sin = token_rows(positions, model)
    arrays |= {"prompt_ids": ids, "positions": positions, "cos": cos, "sin": sin, "embeddings": embeddings}

    steps = [most_steps(manifest["answer"], size) for size in seen]
    grammar = Grammar(tokenizer, manifest, steps)
    for name, given in (("free", free), ("answer", answer)):
        decoder = Decoder(folder, manifest, len(ids) + len(given))
        chosen, masks, logits = [], [], [decoder.run([(embeddings, cos, sin)])[0]]
        for k, token in enumerate(given):
            masks.append(np.full(model["vocab_size"], name == "free"))
            masks[-1][sorted(grammar.legal(given[:k].tolist()))] = True
            chosen.append(int(np.where(masks[-1], logits[-1], -np.inf).argmax()))
            if k < len(given) - 1:
                row = token_rows(np.full((3, 1), positions.max() + 1 + k), model)
                logits.append(decoder.run([(table[[token]], *row)])[0])
        arrays |= {f"{name}_ids": np.array(chosen), f"{name}_logits": np.stack(logits)}
    arrays["answer_legal"] = np.stack(masks)
    said = [int(token) for token in answer if token not in model["eos_token_ids"]]
    text = tokenizer.decode(said, skip_special_tokens=False)
    found = sorted(to_boxes(text, sizes, steps, manifest["answer"]))
    arrays["answer_text"] = np.frombuffer(text.encode(), np.uint8)
    arrays["box_pictures"] = np.array([box[0] for box in found], np.int64)
    arrays["boxes"] = np.array([box[1:] for box in found], np.float64).reshape(-1, 4)
    return arrays


def session(graph: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def prompt(tokenizer: Tokenizer, manifest: dict[str, Any], visual: Sequence[int], question: str) -> Array:
    words = manifest["prompt"]
    text = f"<|im_start|>system\n{words['system']}<|im_end|>\n" if words.get("system_turn", True) else ""
    text += "<|im_start|>user\n"
    for n in range(1, len(visual) + 1):
        text += (f"Picture {n}: " if words["number_images"] else "") + "<|vision_start|><|image_pad|><|vision_end|>"
    ids, counts = [], iter(visual)
    for token in tokens_of(tokenizer, text):
        ids += [token] * (next(counts) if token == manifest["model"]["image_token_id"] else 1)
    query = words["query"].replace("{query}", question.strip()) + "<|im_end|>\n<|im_start|>assistant\n"
    return np.array(ids + tokens_of(tokenizer, query))


def embedding_rows(stored: Array, hidden: int) -> Array:
    if stored.dtype.names is None:
        return stored.astype(np.float32)
    codes, z = stored["codes"], 128
    if codes.shape[1] == hidden // 2:
        both = np.empty((len(codes), hidden), np.uint8)
        both[:, ::2], both[:, 1::2] = codes & 15, codes >> 4
        codes, z = both, 8
    scales = stored["scales"].astype(np.float32)
    return (codes.astype(np.float32) - np.float32(z)) * np.repeat(scales, hidden // scales.shape[1], axis=1)


def widened(rows: Array, model: dict[str, Any]) -> Array:
    return np.pad(rows, ((0, 0), (0, model["hidden_size"] * model.get("deepstack", 0))))


def token_positions(ids: Array, image: int, cells: Sequence[tuple[int, int]]) -> Array:
    columns: list[tuple[int, int, int]] = []
    position, k, pictures = 0, 0, iter(cells)
    while k < len(ids):
        if ids[k] != image:
            columns.append((position,) * 3)
            position, k = position + 1, k + 1
            continue
        down, across = next(pictures)
        columns += [(position, position + y, position + x) for y in range(down) for x in range(across)]
        position, k = position + max(down, across), k + down * across
    return np.array(columns).T


def token_rows(positions: Array, model: dict[str, Any]) -> tuple[Array, Array]:
    f = frequencies(model["head_dim"], model["rope_theta"])
    sections = model["mrope_section"]
    which = [axis for axis, count in enumerate(sections) for _ in range(count)]
    if model.get("mrope_interleaved", False):
        which = [j % 3 if j < 3 * sections[j % 3] else 0 for j in range(len(f))]
    angles = positions[which].T.astype(np.float32) * f
    return np.cos(angles), np.sin(angles)


class Decoder:
    """A graph and the cache of some scenes."""

    def __init__(self, folder: Path, manifest: dict[str, Any], capacity: int, scenes: int = 1) -> None:
        model = manifest["model"]
        self.session, self.dialect = session(folder / "decoder.onnx"), manifest["dialect"]
        self.capacity, self.past = capacity, np.zeros(scenes, np.int64)
        dims = (scenes, model["kv_heads"], capacity, model["head_dim"])
        self.names = [f"{what}_{k}" for k in range(model["layers"]) for what in ("key", "value")]
        self.cache = {name: np.zeros(dims, np.dtype(manifest["precision"])) for name in self.names}
        self.rotary = np.zeros((2, capacity, model["head_dim"] // 2), np.float32)

    def run(self, new: Sequence[New]) -> Array:
        """New tokens of each scene -> the logits of its last, (scenes, vocab)."""
        counts = np.array([len(embeddings) for embeddings, *_ in new])
        tokens = max(counts)
        embeddings, cos, sin = (
            np.stack([np.pad(rows, ((0, tokens - len(rows)), (0, 0))) for rows in part])
            for part in zip(*new, strict=True)
        )
        places = self.past[:, None] + np.arange(tokens)
        total = places.max() + 1
        inputs = {f"past_{name}": values for name, values in self.cache.items()} | {"inputs_embeds": embeddings}
        if self.dialect == "fused":
            self.rotary[:, places[0]] = cos[0], sin[0]
            inputs |= {"cos": self.rotary[0], "sin": self.rotary[1]}
            inputs |= {"seqlens_k": np.array([total - 1], np.int32), "total": np.array(total, np.int32)}
        else:
            slots = total if self.dialect == "standard" else self.capacity
            inputs |= {"cos": cos, "sin": sin, "places": places, "slots": np.arange(slots)}
            inputs |= {"rows": np.arange(len(new)) * tokens + counts - 1}
        given = "new" if self.dialect == "plain" else "present"
        logits, *written = self.session.run(["logits", *(f"{given}_{name}" for name in self.names)], inputs)
        for name, values in zip(self.names, written, strict=True):
            if self.dialect == "plain":
                for cache, where, one in zip(self.cache[name], places, values, strict=True):
                    cache[:, where] = one
            else:
                self.cache[name] = values
        self.past += counts
        return np.asarray(logits)
