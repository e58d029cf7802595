"""Pictures that were looked at: questions about them, one after the other, from any thread.

Made by `Grounder.look`. Knows prompts, tokens and answers; no pixels and no engine.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple, overload

from gemvg_edge.answer import read_answer
from gemvg_edge.boxes import Box
from gemvg_edge.decoding import Writing, advance, decode
from gemvg_edge.engines.protocol import Decoder
from gemvg_edge.errors import GemvgError
from gemvg_edge.grammar import Grammar, answer_grammar, free
from gemvg_edge.grounding import Grounding, Picture, Timings, merge
from gemvg_edge.images import Preprocessing, resized_sizes
from gemvg_edge.json_object import short
from gemvg_edge.marks import mark, shows_box
from gemvg_edge.numbering import pictures_in_query
from gemvg_edge.opened import OpenedModel, Seen
from gemvg_edge.prompt import TokenIds, check_query, encode_query
from gemvg_edge.scores import box_scores
from gemvg_edge.stopping import Stopping, Turn, stopping
from gemvg_edge.streaming import OnText, Writer

log = logging.getLogger("gemvg_edge")
CUT = "the answer was cut"  # how the problem of one that ran out of tokens begins
TOGETHER = 8  # questions that are decoded at once, each in a cache as large as the scene's


class Scene:
    """Pictures that were looked at, ready for questions, from any thread: one is answered after the other."""

    def __init__(
        self,
        model: OpenedModel,
        pictures: Sequence[Picture],
        seen: Seen,
        numbers: Preprocessing,
        timings: Timings,
        warning: str | None = None,
    ) -> None:
        self.pictures = tuple(pictures)
        self.sizes = [(picture.width, picture.height) for picture in pictures]  # of each original picture
        self.resized = resized_sizes(self.sizes, numbers)  # and as the model sees it
        self.timings = timings
        self.warning = (
            warning  # what about the pictures is unlike those of the model's training: boxes may mean nothing
        )
        self._model = model
        self._seen = seen
        self._numbers = numbers
        self._turn = Turn()  # a question extends the cache in place
        self._alone: list[Scene] = []  # of each picture by itself, where a question needed that

    @property
    def bytes(self) -> int:
        """What its keys and values take in memory, with those of its pictures alone where a question needed these."""
        taken: int = self._seen.cache.bytes + sum(scene.bytes for scene in self._alone)
        return taken

    def mark(self, box: Box) -> str:
        """A box of one of the scene's pictures as a query shows it: `f"the same object as {scene.mark(box)}"`."""
        if not isinstance(box, Box):
            raise GemvgError(f"box is a {type(box).__name__}; give a Box, such as one of an answer's boxes")
        if not 0 <= box.image < len(self.sizes):
            raise GemvgError(f"{box} lies in none of the scene's {len(self.sizes)} pictures; they count from 0")
        return mark(box, self.sizes[box.image])

    @overload
    def ground(
        self,
        query: str,
        *,
        think: bool = False,
        constrained: bool = True,
        timeout: float | None = None,
        cancel: threading.Event | None = None,
        on_text: OnText | None = None,
        max_new_tokens: int | None = None,
    ) -> Grounding: ...

    @overload
    def ground(
        self,
        query: list[str] | tuple[str, ...],
        *,
        think: bool = False,
        constrained: bool = True,
        timeout: float | None = None,
        cancel: threading.Event | None = None,
        on_text: OnText | None = None,
        max_new_tokens: int | None = None,
    ) -> list[Grounding]: ...

    def ground(
        self,
        query: str | list[str] | tuple[str, ...],
        *,
        think: bool = False,
        constrained: bool = True,
        timeout: float | None = None,
        cancel: threading.Event | None = None,
        on_text: OnText | None = None,
        max_new_tokens: int | None = None,
    ) -> Grounding | list[Grounding]:
        """Ask for something; an answer that names nothing, or nothing readable, has no boxes. A list gives a list.

        With `think` the model reasons before it answers, if it was trained to: slower, and not always better. Only what
        an answer's grammar allows is decoded; without `constrained` every token competes, as in other runtimes: slower,
        and an answer may be unreadable. Where it is not, both are the same.
        `timeout` is in seconds and for the whole call; after it, or once `cancel` is set, TimedOut or Cancelled is
        raised, at the latest one token later. `on_text` is called with each piece of text as the model writes it.
        `max_new_tokens` cuts an answer earlier than the Grounder's own does, which is the most that it may be.
        """
        stop, most = stopping(timeout, cancel), self._most(max_new_tokens)
        if isinstance(query, str):
            return self._ask([query], think, stop, on_text, constrained, most)[0]
        if not isinstance(query, (list, tuple)):
            raise GemvgError(f"query is a {type(query).__name__}; give a text, or a list of texts")
        for k, one in enumerate(query):  # all, before the work for the first
            self._check(one, f"query[{k}]: " if len(query) > 1 else "")
        together = on_text is None and self._model.engines()[1].batches  # pieces of several answers would be mixed
        size = TOGETHER if together else 1
        groups = [query[k : k + size] for k in range(0, len(query), size)]
        return [answer for group in groups for answer in self._ask(group, think, stop, on_text, constrained, most)]

    def __repr__(self) -> str:
        return f"<Scene of {', '.join(picture.name for picture in self.pictures)}>"

    def __reduce__(self) -> Any:
        raise GemvgError(
            "a Scene holds its engine's memory and cannot be pickled; send the Grounder and the pictures, look there"
        )

    def ask(
        self, query: str, think: bool, stop: Stopping, on_text: OnText | None, constrained: bool = True
    ) -> Grounding:
        """As `ground`, within what is left of the time of a longer request."""
        (grounding,) = self._ask([query], think, stop, on_text, constrained, self._model.limits.new_tokens)
        return grounding

    def _most(self, max_new_tokens: int | None) -> int:
        limit = self._model.limits.new_tokens
        if max_new_tokens is None:
            return limit
        if type(max_new_tokens) is not int or not 1 <= max_new_tokens <= limit:
            raise GemvgError(
                f"max_new_tokens={short(max_new_tokens)}; give 1 to {limit}, what the model was opened for"
            )
        return max_new_tokens

    def _check(self, query: str, where: str) -> None:
        """GemvgError for a query that cannot be asked here, which begins with `where`."""
        try:
            check_query(query)
            self._named(query)
        except GemvgError as error:
            raise GemvgError(f"{where}{error}") from None

    def _ask(
        self, queries: Sequence[str], think: bool, stop: Stopping, on_text: OnText | None, constrained: bool, most: int
    ) -> list[Grounding]:
        model = self._model
        for query in queries:
            check_query(query)
        if on_text is not None and not callable(on_text):
            raise GemvgError(f"on_text is a {type(on_text).__name__}; give a function of one text")
        named = [self._named(query) for query in queries]
        alone = len(self.sizes) > 1 and model.manifest.answer.unnamed == "each"
        about_all = [k for k, picture in enumerate(named) if picture is not None or not alone]
        with self._turn.taken(stop), model.in_turn(stop):
            _, decoder = model.engines()
            questions = [_Question(queries[k], named[k], think, constrained, most) for k in about_all]
            said = self._answer(decoder, questions, stop, on_text) if questions else []
            answers = dict(zip(about_all, said, strict=True))
            for k, query in enumerate(queries):
                if k not in answers:
                    question = _Question(query, None, think, constrained, most)
                    answers[k] = self._answer_each(decoder, question, stop, on_text)
        for k, query in enumerate(queries):
            grounding = answers[k]
            log.info(
                "%r: %d boxes in %.0f ms (%d + %d tokens)%s",
                query[:80],
                len(grounding),
                grounding.timings.query_prefill_ms + grounding.timings.decode_ms,
                grounding.timings.query_tokens,
                grounding.timings.answer_tokens,
                f"; {grounding.problem}" if grounding.problem else "",
            )
        return [answers[k] for k in range(len(queries))]

    def _named(self, query: str) -> int | None:
        """The picture that an answer is about where it names none itself; GemvgError for one that was not given."""
        named = pictures_in_query(query) if len(self.sizes) > 1 else []
        if far := [image for image in named if not 0 <= image < len(self.sizes)]:
            raise GemvgError(f"the query names image {far[0] + 1}, of {len(self.sizes)} pictures; they count from 1")
        return self._model.manifest.answer.about(named)

    def _answer_each(
        self, decoder: Decoder[Any], question: _Question, stop: Stopping, on_text: OnText | None
    ) -> Grounding:
        """The question to each picture alone: what a model of single pictures can answer about several."""
        if shows_box(question.query):
            raise GemvgError(
                "the query shows a box and names no picture to look in, which this model needs; say 'in image 2'"
            )
        parts: list[Grounding] = []
        for k in range(len(self.pictures)):
            stop.check()
            if k == len(self._alone):
                one, visual, grids = slice(k, k + 1), self._seen.visual, self._seen.grids
                seen = self._model.prefill_pictures(decoder, visual[one], grids[one])
                self._alone.append(Scene(self._model, self.pictures[one], seen, self._numbers, Timings()))
            if on_text is not None:
                on_text(f"Image-{k + 1}: " if k == 0 else f"\nImage-{k + 1}: ")
            parts += self._alone[k]._answer(decoder, [question], stop, on_text)
        sums = {
            name: sum(getattr(part.timings, name) for part in parts)
            for name in ("query_prefill_ms", "decode_ms", "query_tokens", "answer_tokens")
        }
        return merge(parts, self.pictures, replace(self.timings, **sums))

    def _answer(
        self, decoder: Decoder[Any], questions: Sequence[_Question], stop: Stopping, on_text: OnText | None
    ) -> list[Grounding]:
        """Questions about all pictures, decoded in step."""
        model, seen = self._model, self._seen
        started = time.perf_counter()
        prompts = [self._encode(question) for question in questions]
        caches = [seen.cache]  # the others hold the pictures too, each for one question
        for _ in questions[1:]:
            caches.append(decoder.new_cache(seen.cache.capacity))
            decoder.copy(seen.cache, caches[-1], seen.past)
        stop_ids = model.manifest.model.eos_token_ids
        writings = [
            Writing(
                ids,
                cache,
                seen.past,
                seen.position,
                stop_ids,
                question.most,
                self._grammar(question.think) if question.constrained else free(),
            )
            for question, ids, cache in zip(questions, prompts, caches, strict=False)
        ]
        finished = [0.0] * len(writings)
        write = None if on_text is None else Writer(model.tokenizer, stop_ids, on_text)

        def on_step() -> None:
            now = time.perf_counter()
            for k, writing in enumerate(writings):
                finished[k] = finished[k] or (now if writing.done else 0.0)
            stop.check()
            if write:
                write(writings[0].tokens)

        advance(decoder, model.rope, writings)
        prefilled = time.perf_counter()
        on_step()
        decode(decoder, model.rope, writings, on_step)
        groundings = []
        for question, ids, writing, end in zip(questions, prompts, writings, finished, strict=True):
            timings = replace(
                self.timings,
                query_prefill_ms=(prefilled - started) * 1e3,
                decode_ms=(end - prefilled) * 1e3,
                query_tokens=len(ids),
                answer_tokens=len(writing.tokens),
            )
            groundings.append(self._read(question, writing, timings, write))
        return groundings

    def _encode(self, question: _Question) -> TokenIds:
        model = self._model
        template, answer = model.manifest.prompt, model.manifest.answer
        ids = encode_query(model.tokenizer, template, answer, question.query, question.think, self.resized)
        if len(ids) > model.limits.query_tokens:
            raise GemvgError(
                f"the query takes {len(ids)} tokens, more than max_query_tokens={model.limits.query_tokens}; "
                "shorten it or open the Grounder with more"
            )
        return ids

    @cached_property
    def _grammar(self) -> Grammar:
        model = self._model
        stop_ids = model.manifest.model.eos_token_ids
        return answer_grammar(model.tokenizer, model.manifest.answer, self.resized, stop_ids)

    def _read(self, question: _Question, writing: Writing[Any], timings: Timings, write: Writer | None) -> Grounding:
        model = self._model
        manifest, tokens = model.manifest, writing.tokens
        stopped = tokens[-1] in manifest.model.eos_token_ids
        text: str = model.tokenizer.decode(tokens[:-1] if stopped else tokens, skip_special_tokens=False)
        if write:
            write.rest(text)
        score = box_scores(model.tokenizer, tokens, writing.log_probs, text, manifest.calibration)
        answer = read_answer(text, self.sizes, manifest.answer, self.resized, question.named, score)
        problem = answer.problem if stopped else f"{CUT} at max_new_tokens={question.most}"
        boxes = tuple(replace(box, label=box.label or question.query) for box in answer.boxes)
        return Grounding(boxes, text, answer.thinking, problem, timings, question.query, self.pictures)


class _Question(NamedTuple):
    query: str
    named: int | None  # the picture that it names, where an answer need not
    think: bool
    constrained: bool
    most: int  # tokens of the answer
