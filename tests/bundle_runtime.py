"""A runtime of its own, written from BUNDLE.md alone: numpy, onnxruntime and tokenizers, and nothing of ours.

Gives the arrays of a trace. What it needed and BUNDLE.md did not say was put there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

from tests.bundle_runtime_pictures import frequencies, in_windows, new_size, patch_rows, resize, spread, to_patches

Array = np.ndarray
Arrays = dict[str, Array]
Steps = tuple[int, int]


def run(folder: Path, trace: Arrays) -> Arrays:
    """All arrays of a trace but `about`, from its pictures and question; the answers' tokens are the trace's."""
    pictures, free, answer = [trace["picture_0"], trace["picture_1"]], trace["free_ids"], trace["answer_ids"]
    question, about = bytes(trace["question"]).decode(), json.loads(bytes(trace["about"]))
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
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
        if window := model["vision"]["window"]:
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
    ids = prompt(tokenizer, manifest, [len(tokens) for tokens in visual], question)
    table = embedding_rows(np.load(folder / "embedding.npy"), model["hidden_size"])
    embeddings = table[ids]
    embeddings[ids == model["image_token_id"]] = np.concatenate(visual)
    positions = token_positions(ids, model["image_token_id"], [(h // merge, w // merge) for _, h, w in grids])
    cos, sin = token_rows(positions, model)
    arrays |= {"prompt_ids": ids, "positions": positions, "cos": cos, "sin": sin, "embeddings": embeddings}

    steps = [most_steps(manifest["answer"], size) for size in seen]
    grammar = Grammar(tokenizer, manifest, steps)
    for name, given in (("free", free), ("answer", answer)):
        decoder = Decoder(folder, manifest, len(ids) + len(given))
        chosen, masks, logits = [], [], [decoder.run(embeddings, cos, sin)]
        for k, token in enumerate(given):
            masks.append(np.full(model["vocab_size"], name == "free"))
            masks[-1][sorted(grammar.legal(given[:k].tolist()))] = True
            chosen.append(int(np.where(masks[-1], logits[-1], -np.inf).argmax()))
            if k < len(given) - 1:
                row = token_rows(np.full((3, 1), positions.max() + 1 + k), model)
                logits.append(decoder.run(table[[token]], *row))
        arrays |= {f"{name}_ids": np.array(chosen), f"{name}_logits": np.stack(logits)}
    arrays["answer_legal"] = np.stack(masks)
    said = [int(token) for token in answer if token not in model["eos_token_ids"]]
    text = tokenizer.decode(said, skip_special_tokens=False)
    found = sorted(to_boxes(text, sizes, steps))
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
    text = f"<|im_start|>system\n{words['system']}<|im_end|>\n<|im_start|>user\n"
    for n in range(1, len(visual) + 1):
        text += (f"Picture {n}: " if words["number_images"] else "") + "<|vision_start|><|image_pad|><|vision_end|>"
    ids, counts = [], iter(visual)
    for token in tokens_of(tokenizer, text):
        ids += [token] * (next(counts) if token == manifest["model"]["image_token_id"] else 1)
    query = words["query"].replace("{query}", question.strip()) + "<|im_end|>\n<|im_start|>assistant\n"
    return np.array(ids + tokens_of(tokenizer, query))


def tokens_of(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


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
    which = [axis for axis, count in enumerate(model["mrope_section"]) for _ in range(count)]
    angles = positions[which].T.astype(np.float32) * f
    return np.cos(angles), np.sin(angles)


class Decoder:
    """A graph and its cache."""

    def __init__(self, folder: Path, manifest: dict[str, Any], capacity: int) -> None:
        model = manifest["model"]
        self.session, self.dialect = session(folder / "decoder.onnx"), manifest["dialect"]
        self.capacity, self.past = capacity, 0
        dims = (1, model["kv_heads"], capacity, model["head_dim"])
        self.names = [f"{what}_{k}" for k in range(model["layers"]) for what in ("key", "value")]
        self.cache = {name: np.zeros(dims, np.dtype(manifest["precision"])) for name in self.names}
        self.rotary = np.zeros((2, capacity, model["head_dim"] // 2), np.float32)

    def run(self, embeddings: Array, cos: Array, sin: Array) -> Array:
        """New tokens -> the logits of the last."""
        total = self.past + len(embeddings)
        places = np.arange(self.past, total)
        inputs = {f"past_{name}": values for name, values in self.cache.items()} | {"inputs_embeds": embeddings[None]}
        if self.dialect == "fused":
            self.rotary[:, places] = cos, sin
            inputs |= {"cos": self.rotary[0], "sin": self.rotary[1]}
            inputs |= {"seqlens_k": np.array([total - 1], np.int32), "total": np.array(total, np.int32)}
        else:
            slots = total if self.dialect == "standard" else self.capacity
            inputs |= {"cos": cos[None], "sin": sin[None], "places": places[None]}
            inputs |= {"slots": np.arange(slots), "rows": np.array([len(embeddings) - 1])}
        given = "new" if self.dialect == "plain" else "present"
        logits, *written = self.session.run(["logits", *(f"{given}_{name}" for name in self.names)], inputs)
        for name, values in zip(self.names, written, strict=True):
            if self.dialect == "plain":
                self.cache[name][:, :, places] = values
            else:
                self.cache[name] = values
        self.past = total
        return np.asarray(logits[0])


def most_steps(answer: dict[str, Any], seen: tuple[int, int]) -> Steps:
    """X and Y of a picture."""
    match answer["coordinates"]:
        case "digits":
            return 1000, 1000
        case "pixels":
            return seen
    return answer["locations"] - 1, answer["locations"] - 1


class Grammar:
    """What may come after some tokens: the answer is parsed from its start, in every way that is left."""

    def __init__(self, tokenizer: Tokenizer, manifest: dict[str, Any], steps: Sequence[Steps]) -> None:
        assert manifest["answer"]["unnamed"] == "refuse"
        self.digits = manifest["answer"]["coordinates"] != "locations"
        pieces = ["(", ",", "),(", ",", ")"] if self.digits else [""] * 5
        pieces = [f"<|box_start|>{pieces[0]}", *pieces[1:4], f"{pieces[4]}<|box_end|>"]
        names = range(10) if self.digits else [f"<loc_{k}>" for k in range(manifest["answer"]["locations"])]
        self.pieces = [tokens_of(tokenizer, piece) for piece in pieces]
        self.numbers = [tokens_of(tokenizer, str(name))[0] for name in names]
        self.none = tokens_of(tokenizer, "None")
        self.heads = [
            [tokens_of(tokenizer, f"{line}Image-{n + 1}: ") for n in range(len(steps))] for line in ("", "\n")
        ]
        self.steps, self.stops = steps, manifest["model"]["eos_token_ids"]

    def legal(self, written: Sequence[int]) -> set[int]:
        """The ids that may come after these."""
        self.written, self.found = written, set[int]()
        for stop in self.stops:
            list(self.literal([*self.none, stop], 0))
        for n, head in enumerate(self.heads[0]):
            for at in self.literal(head, 0):
                self.boxes(n, at)
        return self.found

    def boxes(self, n: int, at: int) -> None:
        """Those of one line, and the lines after it."""
        for end in self.box(*self.steps[n], at):
            self.boxes(n, end)
            for m in range(n + 1, len(self.steps)):
                for start in self.literal(self.heads[1][m], end):
                    self.boxes(m, start)
            for stop in self.stops:
                list(self.literal([stop], end))

    def box(self, across: int, down: int, at: int) -> Iterator[int]:
        """Where a box ends that starts here."""
        for a in self.literal(self.pieces[0], at):
            for x1, b in self.number(0, across - 1, self.pieces[1], a):
                for y1, c in self.number(0, down - 1, self.pieces[2], b):
                    for _, d in self.number(x1 + 1, across, self.pieces[3], c):
                        for _, end in self.number(y1 + 1, down, self.pieces[4], d):
                            yield end

    def literal(self, piece: Sequence[int], at: int) -> Iterator[int]:
        """Where a piece ends that starts here, if it does; what is missing of it is legal."""
        for k, token in enumerate(piece):
            if at + k == len(self.written):
                self.found.add(token)
                return
            if self.written[at + k] != token:
                return
        yield at + len(piece)

    def number(self, low: int, high: int, after: Sequence[int], at: int) -> Iterator[tuple[int, int]]:
        """Each number within both bounds that may be meant here, and where what comes after it ends."""
        candidates = [[k] for k in range(low, high + 1)]
        if self.digits:
            candidates = [[int(digit) for digit in str(k)] for k in range(low, high + 1)]
        for value, candidate in enumerate(candidates, low):
            for end in self.literal([self.numbers[k] for k in candidate], at):
                for there in self.literal(after, end):
                    yield value, there


def to_boxes(text: str, sizes: Sequence[tuple[int, int]], steps: Sequence[Steps]) -> Iterator[tuple[float, ...]]:
    """(picture, x1, y1, x2, y2) in pixels of the originals, of an answer that may have been cut."""
    image = 0
    pieces = (r"Image-(\d+): ", r"\((\d+),(\d+)\),\((\d+),(\d+)\)", r"<loc_(\d+)>" * 4)
    for found in re.finditer("|".join(pieces), text):
        numbers = [int(value) for value in found.groups() if value]
        if len(numbers) == 1:
            image = numbers[0] - 1
            continue
        (width, height), (across, down), (x1, y1, x2, y2) = sizes[image], steps[image], numbers
        yield image, x1 * width / across, y1 * height / down, x2 * width / across, y2 * height / down
