"""A checkpoint (through PyTorch) or a bundle (through the runtime), whichever a folder is, ready to be asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from PIL import Image

from gemvg_edge.answer import AnswerFormat, read_answer
from gemvg_edge.boxes import Box, Size
from gemvg_edge.bundle import MANIFEST, open_bundle
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file, is_folder, printable, sha256
from gemvg_edge.grounder import Grounder
from gemvg_edge.images import resized_sizes
from gemvg_edge.numbering import pictures_in_query
from gemvg_edge.prompt import PromptTemplate, TokenIds, encode_query
from train.checkpoint import CONFIG, read_settings
from train.hub import checkpoint_folder
from train.output_folder import fingerprint
from train.profiles import OURS, OWN

NEW_TOKENS = 256
QUERY_TOKENS = 1024  # questions of benchmarks list classes and show boxes


@dataclass(frozen=True)
class Said:
    """One answer: its text, and the boxes in the order they were written, in pixels of the originals."""

    text: str
    boxes: tuple[Box, ...]
    thinking: str
    problem: str | None
    tokens: int  # that were decoded
    ms: float  # from decoded pictures to boxes


@dataclass(frozen=True)
class Asking:
    """How a model is asked: with reasoning, in whose words, and within which bounds."""

    think: bool = False
    verbatim: bool = False  # the question is the whole text, whatever words the model's profile has
    max_pixels: int | None = None  # of a picture; None: a bundle's own, or what an export of the checkpoint has
    new_tokens: int = NEW_TOKENS
    engine: str | None = None  # of a bundle; None: the fastest that runs it
    dtype: str = "float32"  # of a checkpoint's weights and arithmetic; one of DTYPES


DTYPES = ("float32", "bfloat16")
DEFAULT = Asking()


@dataclass(frozen=True)
class Facts:
    """What a model's folder says without being opened."""

    folder: Path
    name: str
    digest: str  # of everything that it answers with
    answer: AnswerFormat
    own_words: bool  # trained on this project's words, so that nobody else's are asked


@dataclass(frozen=True)
class Model:
    """An opened model that can be asked."""

    say: Callable[[Sequence[Image.Image], str], Said]
    refuses: Callable[[Sequence[Size], str], str | None]  # why a question cannot be asked about pictures of these sizes
    frame: Callable[[Size], Size]  # of a picture's size: the largest x and y that an answer about it may have


def describe(folder: Path) -> Facts:
    """Read what a bundle, a checkpoint or a hub's id is; GemvgError for what is none.

    It is called by what was given: the hub's own folders are named by a hash.
    """
    name = (folder.resolve() if is_folder(folder) else folder).name
    folder = _model_folder(folder).resolve()
    if is_file(folder / MANIFEST):
        manifest = open_bundle(folder, check_hashes=False).manifest
        digest, answer, profile = sha256(folder / MANIFEST), manifest.answer, manifest.profile
    else:
        settings = read_settings(folder)
        digest, answer, profile = fingerprint(folder), settings.answer_format, settings.profile
    return Facts(folder, name, digest, answer, profile in (OURS, OWN))


def open_model(folder: Path, asking: Asking = DEFAULT) -> Model:
    """Open whichever the folder is."""
    folder = _model_folder(folder)
    return (_open_bundle if is_file(folder / MANIFEST) else _open_checkpoint)(folder, asking)


def _model_folder(folder: Path) -> Path:
    folder = checkpoint_folder(folder)
    if not is_file(folder / MANIFEST) and not is_file(folder / CONFIG):
        raise GemvgError(f"{printable(folder)} is neither a bundle (no {MANIFEST}) nor a checkpoint (no {CONFIG})")
    return folder


def _open_bundle(folder: Path, asking: Asking) -> Model:
    grounder = Grounder.open(
        folder,
        engine=asking.engine,
        max_pixels=asking.max_pixels,
        max_query_tokens=QUERY_TOKENS,
        max_new_tokens=asking.new_tokens,
    )
    return of_grounder(grounder, asking)


def of_grounder(grounder: Grounder, asking: Asking = DEFAULT) -> Model:
    """An opened bundle as a model; the opened one is changed where it is asked verbatim."""
    manifest = grounder.manifest
    if asking.verbatim:
        prompt, answer = _verbatim(manifest.prompt, manifest.answer)
        manifest = grounder.model.manifest = replace(manifest, prompt=prompt, answer=answer)

    def say(images: Sequence[Image.Image], query: str) -> Said:
        started = time.perf_counter()
        found = grounder.ground(images, query, think=asking.think, constrained=not asking.verbatim)
        ms = 1e3 * (time.perf_counter() - started)
        sizes = [image.size for image in images]
        boxes = in_order(found.text, found.boxes, sizes, manifest.answer, resized(sizes), query)
        return Said(found.text, boxes, found.thinking, found.problem, found.timings.answer_tokens, ms)

    def resized(sizes: Sequence[Size]) -> list[Size]:
        return resized_sizes(sizes, grounder.preprocessing)

    def refuses(sizes: Sequence[Size], query: str) -> str | None:
        asked = grounder.model.tokenizer, manifest.prompt, manifest.answer, query, asking.think, resized(sizes)
        return refusal(lambda: encode_query(*asked), query, len(sizes))

    return Model(
        say,
        refuses,
        lambda size: manifest.answer.steps(resized([size])[0]),
    )


def _open_checkpoint(folder: Path, asking: Asking) -> Model:
    # Imported only for checkpoints: scoring a bundle needs no torch.
    import torch

    from bench.boxes.torch_grounder import TorchGrounder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    reference = TorchGrounder.open(folder, asking.max_pixels, device, asking.dtype)
    settings = reference.settings
    if asking.verbatim:
        template, answer = _verbatim(settings.template, settings.answer_format)
        settings = replace(settings, template=template, answer_format=answer)
        reference = replace(reference, settings=settings)

    def say(images: Sequence[Image.Image], query: str) -> Said:
        started = time.perf_counter()
        text, found, tokens = reference.ground(images, query, asking.new_tokens, asking.think)
        ms = 1e3 * (time.perf_counter() - started)
        sizes = [image.size for image in images]
        boxes = in_order(text, found.boxes, sizes, settings.answer_format, settings.resized(sizes), query)
        return Said(text, boxes, found.thinking, found.problem, tokens, ms)

    def refuses(sizes: Sequence[Size], query: str) -> str | None:
        words = settings.tokenizer, settings.template, settings.answer_format
        return refusal(lambda: encode_query(*words, query, asking.think, settings.resized(sizes)), query, len(sizes))

    return Model(
        say,
        refuses,
        lambda size: settings.answer_format.steps(settings.resized([size])[0]),
    )


def refusal(encode: Callable[[], Sequence[int] | TokenIds], query: str, pictures: int) -> str | None:
    """Why a question cannot be asked about so many pictures; None where it can. `encode` gives its tokens."""
    try:
        tokens = len(encode())
    except GemvgError as error:
        return str(error)
    if tokens > QUERY_TOKENS:
        return f"the question takes {tokens} tokens, more than {QUERY_TOKENS}"
    far = [image for image in pictures_in_query(query) if image >= pictures] if pictures > 1 else []
    return f"the question names image {far[0] + 1}, of {pictures}" if far else None


def _verbatim(prompt: PromptTemplate, answer: AnswerFormat) -> tuple[PromptTemplate, AnswerFormat]:
    """The same without words around the question; all pictures are shown at once, as in the published runs."""
    unnamed = "query" if answer.unnamed == "each" else answer.unnamed
    return replace(prompt, query="{query}", think="{query}"), replace(answer, unnamed=unnamed)


def in_order(
    text: str,
    boxes: Sequence[Box],
    sizes: Sequence[Size],
    answer: AnswerFormat,
    resized: Sequence[Size],
    query: str,
) -> tuple[Box, ...]:
    """An answer's boxes, which come sorted, in the order that its text has them: benchmarks take the first one.

    Their labels are those that the model wrote: the runtime names a box that has none by the question.
    """
    number = count()
    unnamed = answer.about(pictures_in_query(query))
    read = read_answer(text, sizes, answer, resized, unnamed, score=lambda spans: float(next(number))).boxes
    if read != tuple(boxes):  # of pictures that were asked about one by one
        return tuple(replace(box, label=None if box.label == query else box.label) for box in boxes)
    pairs = sorted(zip(read, boxes, strict=True), key=lambda pair: pair[0].score or 0)
    return tuple(replace(box, label=said.label) for said, box in pairs)
