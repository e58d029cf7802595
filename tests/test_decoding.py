"""The greedy loop on a decoder that follows a rule: where it stops, what it passes on, each shortcut's plain twin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemvg_edge.decoding import LOOKUP, Rope, Writing, advance, decode, embed_prompt, look_up, prefill
from gemvg_edge.engines.protocol import Floats, Ids, Step
from gemvg_edge.grammar import Walk
from gemvg_edge.positions import mrope_table, text_positions

VOCAB, HIDDEN, STOP = 10, 4, 9
ROPE = Rope(head_dim=8, theta=100.0, sections=(1, 1, 2))
PAST, POSITION = 20, 12


@dataclass
class TokenCache:
    """Tokens instead of keys and values."""

    capacity: int = 100
    tokens: list[int] = field(default_factory=lambda: [-1] * PAST)

    @property
    def bytes(self) -> int:
        """Nothing."""
        return 0


@dataclass
class RuleDecoder:
    """Logits that depend on every token in the cache, and with a `script` on its next one; keeps what it was given."""

    script: list[int] | None = None
    batches: bool = False
    vocabulary: int = VOCAB
    steps: list[Step[TokenCache]] = field(default_factory=list)
    calls: int = 0
    steady: int = 0

    def new_cache(self, capacity: int) -> TokenCache:
        """An empty cache."""
        return TokenCache(capacity, [])

    def copy(self, source: TokenCache, target: TokenCache, tokens: int) -> None:
        """The first tokens."""
        target.tokens[:tokens] = source.tokens[:tokens]

    def embed(self, ids: Ids) -> Floats:
        """Rows that tell the ids apart."""
        return np.repeat(ids[:, None], HIDDEN, axis=1).astype(np.float32)

    def forward(self, steps: Sequence[Step[TokenCache]]) -> list[Floats]:
        """Each step's logits."""
        self.calls += 1
        return [self._run(step) for step in steps]

    def _run(self, step: Step[TokenCache]) -> Floats:
        assert step.past <= len(step.cache.tokens), "every token before is in the cache"
        assert step.rows == 1 or self.batches
        ids = step.embeddings[:, 0].astype(int).tolist()
        step.cache.tokens[step.past :] = ids
        assert len(step.cache.tokens) <= step.cache.capacity
        self.steps.append(step)
        ends = range(len(step.cache.tokens) - step.rows + 1, len(step.cache.tokens) + 1)
        logits = np.stack([self._logits(step.cache.tokens[:end]) for end in ends])
        return logits if step.legal is None else logits[:, step.legal]

    def _logits(self, tokens: list[int]) -> Floats:
        logits = np.linspace(-1, 0, self.vocabulary, dtype=np.float32)
        if self.script is None:  # often the same again, so that a look-up finds something
            seed = 7 * tokens[-1] + tokens[-2] % 3
            return np.random.default_rng(seed + 2).normal(size=self.vocabulary).astype(np.float32)
        logits[self.script[len(tokens) - PAST - 1]] = 1
        return logits


def literal(*choices: list[int]) -> Walk:
    """One of these ids after the other."""
    for ids in choices:
        yield np.array(ids)


def writing(max_tokens: int = 8, walk: Walk | None = None, prompt: Sequence[int] = (3,)) -> Writing[TokenCache]:
    return Writing(prompt, TokenCache(), PAST, POSITION, [STOP], max_tokens, walk)


CASES = [
    # label, script, max_tokens, tokens
    ("stops at the stop token and keeps it", [3, 5, STOP, 7], 8, [3, 5, STOP]),
    ("stops at the first token", [STOP, 7], 8, [STOP]),
    ("is cut at max_tokens", [3, 5, 7, 1, 2], 3, [3, 5, 7]),
    ("one token only", [3, 5], 1, [3]),
    ("the stop token as the last that fits", [3, STOP, 5], 2, [3, STOP]),
    ("repeats itself", [3] * 9, 5, [3] * 5),
]


@pytest.mark.parametrize("batches", [False, True])
@pytest.mark.parametrize(("label", "script", "most", "tokens"), CASES, ids=lambda v: str(v))
def test_stops(label: str, script: list[int], most: int, tokens: list[int], batches: bool) -> None:
    decoder, answer = RuleDecoder(script + [0] * 9, batches), writing(most)
    seen: list[int] = []
    decode(decoder, ROPE, [answer], lambda: seen.append(len(answer.tokens)))
    assert answer.tokens == tokens, label
    assert len(answer.log_probs) == len(tokens)
    assert len(decoder.steps) == len(seen) <= len(tokens)
    assert seen[-1] == len(tokens)


def test_each_step_passes_its_tokens_past_and_positions() -> None:
    decoder, answer = RuleDecoder([0, 5, 7, STOP]), writing(prompt=[3, 4])
    decode(decoder, ROPE, [answer])
    assert [step.embeddings[:, 0].tolist() for step in decoder.steps] == [[3, 4], [5], [7]]
    assert [step.past for step in decoder.steps] == [20, 22, 23]
    for step, (first, count) in zip(decoder.steps, [(12, 2), (14, 1), (15, 1)], strict=True):
        expected = mrope_table(text_positions(first, count), ROPE.head_dim, ROPE.theta, ROPE.sections)
        assert np.array_equal(step.table.cos, expected.cos)
        assert np.array_equal(step.table.sin, expected.sin)


def test_what_has_no_alternative_rides_along_and_the_end_is_not_run() -> None:
    walk = literal([1, 2], [3], [4], [5, 6], [7], [STOP])
    decoder, answer = RuleDecoder([2, 0, 0, 5, 0, 0]), writing(walk=walk)
    decode(decoder, ROPE, [answer])
    assert answer.tokens == [2, 3, 4, 5, 7, STOP]
    assert [step.embeddings[:, 0].tolist() for step in decoder.steps] == [[3], [2, 3, 4]]
    assert [step.legal.tolist() for step in decoder.steps if step.legal is not None] == [[1, 2], [5, 6]]
    assert [k for k, value in enumerate(answer.log_probs) if value] == [0, 3]


def test_probabilities_are_among_what_was_legal() -> None:
    decoder, answer = RuleDecoder([2, STOP, 0, 0]), writing(walk=literal([0, 2, 5], [4, STOP]))
    decode(decoder, ROPE, [answer])
    logits = np.linspace(-1, 0, VOCAB)
    expected = [-np.log(np.exp([logits[0] - 1, 0, logits[5] - 1]).sum()), -np.log(np.exp([logits[4] - 1, 0]).sum())]
    np.testing.assert_allclose(answer.log_probs, expected, rtol=1e-5)


CHOICES = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=4, unique=True).map(sorted), min_size=1)


@given(CHOICES, st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_riding_along_is_decoding_one_at_a_time(choices: list[list[int]], most: int) -> None:
    def plain() -> list[int]:
        decoder, cache, tokens, pending = RuleDecoder(), TokenCache(), [], [3]
        for ids in [*choices, *[[STOP]] * 20]:
            table = mrope_table(text_positions(0, 1), *ROPE)
            step = Step(decoder.embed(np.array(pending)), cache, len(cache.tokens), table)
            logits = decoder.forward([step])[0][-1]
            pending = [max(ids, key=lambda token: (logits[token], -token))]
            tokens += pending
            if pending == [STOP] or len(tokens) == most:
                break
        return tokens

    answer = writing(most, literal(*choices, *[[STOP]] * 20))
    decoder = RuleDecoder()
    decode(decoder, ROPE, [answer])
    assert answer.tokens == plain()
    assert decoder.calls == sum(len(ids) > 1 for ids in choices[: len(answer.tokens)])


@given(st.lists(st.lists(st.integers(0, VOCAB - 2), min_size=1, max_size=9), min_size=1, max_size=5), st.booleans())
@settings(max_examples=200, deadline=None)
def test_together_and_drafted_are_one_by_one_and_plain(prompts: list[list[int]], batches: bool) -> None:
    def answers(drafts: bool, together: bool) -> tuple[list[list[int]], int]:
        decoder, writings = RuleDecoder(batches=drafts), [writing(30, prompt=prompt) for prompt in prompts]
        for group in [writings] if together else [[one] for one in writings]:
            decode(decoder, ROPE, group)
        return [one.tokens for one in writings], len(decoder.steps)

    plain, steps = answers(drafts=False, together=False)
    assert answers(drafts=False, together=True) == (plain, steps)
    drafted, fewer = answers(drafts=True, together=batches)
    assert drafted == plain
    assert fewer <= steps


def test_drafts_save_steps_where_a_text_repeats_itself() -> None:
    script = [0, 0, 0, 0, *([1, 2, 3, 4] * 6), STOP]
    plain, drafting = RuleDecoder(script), RuleDecoder(script + [0] * 9, batches=True)
    texts = []
    for decoder in (plain, drafting):
        answer = writing(40, prompt=[1, 2, 3, 4, 5])
        decode(decoder, ROPE, [answer])
        texts.append(answer.tokens)
    assert texts[0] == texts[1]
    assert (len(plain.steps), len(drafting.steps)) == (25, 10)


def test_a_draft_ends_where_a_choice_begins() -> None:
    """A walk that leaves free text while a draft is verified: its choice is among the legal."""

    def walk() -> Walk:
        for _ in range(6):
            yield None
        yield np.array([7, 8])
        yield np.array([STOP])

    for batches in (False, True):
        decoder = RuleDecoder([0, 0, 0, 1, 2, 3, 1, 2, 3, 1, 2, 3] + [0] * 9, batches)
        answer = writing(20, walk(), [1, 2, 3, 0])
        decode(decoder, ROPE, [answer])
        assert answer.tokens == [1, 2, 3, 1, 2, 3, 8, STOP]


def test_an_error_of_the_caller_ends_the_loop() -> None:
    decoder = RuleDecoder([1] * 30)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode(decoder, ROPE, [writing()], interrupt)
    assert decoder.calls == 1


def test_who_is_done_waits_for_nobody() -> None:
    decoder = RuleDecoder([1, STOP, 0, 0])
    long, short = writing(4, walk=literal(*[[1, 2]] * 4)), writing()
    decode(decoder, ROPE, [long, short])
    assert [len(one.tokens) for one in (long, short)] == [4, 2]
    assert len(decoder.steps) == 6
    advance(decoder, ROPE, [long, short])
    assert len(decoder.steps) == 6


def test_look_up_finds_the_last_time() -> None:
    assert LOOKUP == 3
    assert look_up([1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 1, 2, 3], 2) == [6, 7]
    assert look_up([1, 2, 3, 4, 1, 2, 3], 9) == [4, 1, 2, 3]
    assert look_up([1, 1, 1, 1], 9) == [1]
    assert look_up([1, 2, 3, 4, 1, 2, 3], 0) == look_up([1, 2, 3, 4], 3) == look_up([1], 3) == []


def test_prefill_passes_the_table_of_its_positions() -> None:
    decoder, cache = RuleDecoder([0, 0, 3]), TokenCache()
    positions = np.array([[5, 5, 6], [5, 6, 7], [5, 7, 7]])  # (3, tokens)
    logits = prefill(decoder, ROPE, decoder.embed(np.arange(3)), positions, cache, PAST)
    assert logits.argmax() == 3
    step = decoder.steps[0]
    assert (step.embeddings.shape, step.past, step.table.cos.shape) == ((3, HIDDEN), PAST, (3, 4))
    streams = [0, 1, 2, 2]  # which stream each of the four frequencies follows
    frequencies = 100.0 ** -(np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(step.table.cos, np.cos(positions[streams].T * frequencies), atol=1e-6)
    np.testing.assert_allclose(step.table.sin, np.sin(positions[streams].T * frequencies), atol=1e-6)


def test_pictures_take_their_places_in_order() -> None:
    picture = 8
    ids = np.array([1, picture, picture, 2, picture, 3])
    first, second = np.full((2, HIDDEN), 0.25, np.float32), np.full((1, HIDDEN), 0.5, np.float32)
    embeddings = embed_prompt(RuleDecoder([]), ids, picture, [first, second])
    assert embeddings[:, 0].tolist() == [1, 0.25, 0.25, 2, 0.5, 3]
    assert embed_prompt(RuleDecoder([]), ids[:1], picture, []).tolist() == [[1] * HIDDEN]
