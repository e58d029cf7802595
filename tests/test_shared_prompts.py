"""Answers that share their prompt's row score as they do alone, and are sampled as transformers would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from gemvg_edge.prompt import END_OF_TURN, encode, encode_prefix, encode_query
from tests.checkpoints import write_checkpoint
from train.checkpoint import CheckpointSettings, read_settings
from train.collate import IGNORED
from train.shared_prompts import Packed, Prompt, alike, find_prompts, pack, sample_answers, unpack

PAD = 0
GRIDS = ([(1, 4, 6)], [(1, 4, 4), (1, 6, 4), (1, 4, 4)])  # of two prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def settings(folder: Path) -> CheckpointSettings:
    return read_settings(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Qwen2VLForConditionalGeneration:
    return Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def prompts(settings: CheckpointSettings) -> list[Prompt]:
    """Three answers to a question about one picture, two to one about three."""
    torch.manual_seed(0)
    rows, found = (range(3), range(3, 5)), []
    for grids, its_rows, query in zip(GRIDS, rows, ("a mug", "what moved"), strict=True):
        prefix = encode_prefix(settings.tokenizer, settings.template, grids, settings.preprocessing.merge_size)
        question = encode_query(settings.tokenizer, settings.template, settings.answer_format, query, False)
        patches = sum(h * w for _, h, w in grids)
        values = 3 * 2 * settings.preprocessing.patch_size**2
        ids = torch.cat([torch.from_numpy(prefix), torch.from_numpy(question)])
        found.append(Prompt(ids, torch.randn(patches, values), torch.tensor(grids), its_rows))
    return found


def alone(
    model: Qwen2VLForConditionalGeneration, settings: CheckpointSettings, prompt: Prompt, answer: list[int]
) -> torch.Tensor:
    """Log-probability of every token of an answer, asked by itself."""
    ids = torch.cat([prompt.ids, torch.tensor(answer, dtype=torch.long)])[None]
    logits = model(
        input_ids=ids,
        pixel_values=prompt.pixels,
        image_grid_thw=prompt.grids,
        mm_token_type_ids=(ids == settings.image_token_id).int(),
    ).logits[0, len(prompt.ids) - 1 : -1]
    return torch.log_softmax(logits, dim=1).gather(1, ids[0, len(prompt.ids) :, None])[:, 0]


def packed_log_probs(
    model: Qwen2VLForConditionalGeneration,
    settings: CheckpointSettings,
    prompts: list[Prompt],
    answers: torch.Tensor,
    mask: torch.Tensor,
) -> tuple[Packed, torch.Tensor]:
    packed = pack(prompts, answers, mask, settings.image_token_id, settings.preprocessing.merge_size, PAD)
    said = torch.log_softmax(model(**packed.inputs).logits, dim=2)
    wanted = packed.labels.masked_fill(packed.labels == IGNORED, 0)
    return packed, unpack(said.gather(2, wanted[..., None])[..., 0], packed)


def test_answers_score_as_they_do_alone(
    model: Qwen2VLForConditionalGeneration, settings: CheckpointSettings, prompts: list[Prompt]
) -> None:
    answers = torch.randint(1, 40, (5, 6))
    mask = torch.arange(6) < torch.tensor([6, 0, 3, 1, 5])[:, None]  # the second answer counts for nothing
    packed, found = packed_log_probs(model, settings, prompts, answers, mask)
    assert packed.inputs["input_ids"].shape[0] == 2
    assert not found[~mask].any()
    for prompt in prompts:
        for row in prompt.rows:
            wanted = alone(model, settings, prompt, answers[row][mask[row]].tolist())
            torch.testing.assert_close(found[row][mask[row]], wanted, atol=1e-5, rtol=1e-5)


def test_a_group_that_counts_for_nothing_is_not_computed(
    model: Qwen2VLForConditionalGeneration, settings: CheckpointSettings, prompts: list[Prompt]
) -> None:
    answers, mask = torch.randint(1, 40, (5, 4)), torch.ones(5, 4, dtype=torch.bool)
    mask[:3] = False
    packed, found = packed_log_probs(model, settings, prompts, answers, mask)
    assert packed.inputs["image_grid_thw"].tolist() == prompts[1].grids.tolist()
    torch.testing.assert_close(found[4], alone(model, settings, prompts[1], answers[4].tolist()), atol=1e-5, rtol=1e-5)
    packed, found = packed_log_probs(model, settings, prompts, answers, torch.zeros_like(mask))
    assert not found.any()
    assert found.requires_grad, "several processes add up their gradients, this one's too"


def test_batches_hold_rows_of_about_one_length_and_score_the_same(
    model: Qwen2VLForConditionalGeneration, settings: CheckpointSettings, prompts: list[Prompt]
) -> None:
    answers = torch.randint(1, 40, (5, 60))
    mask = torch.arange(60) < torch.tensor([60, 60, 60, 2, 5])[:, None]
    batches = alike(prompts, mask)
    assert [[prompt.rows for prompt in batch] for batch in batches] == [[range(3, 5)], [range(3)]]
    _, whole = packed_log_probs(model, settings, prompts, answers, mask)
    parts = [packed_log_probs(model, settings, batch, answers, mask)[1] for batch in batches]
    torch.testing.assert_close(torch.stack(parts).sum(dim=0), whole, atol=1e-5, rtol=1e-5)
    assert alike([prompts[0], prompts[0]], mask[:3]) == [[prompts[0], prompts[0]]]
    assert alike(prompts, mask & (torch.arange(5) < 3)[:, None]) == [[prompts[0]]]
    assert alike(prompts, torch.zeros_like(mask)) == [[prompts[0]]]


def test_equal_answers_are_computed_once(
    model: Qwen2VLForConditionalGeneration, settings: CheckpointSettings, prompts: list[Prompt]
) -> None:
    answers = torch.tensor([[7, 8, 9], [7, 8, 9], [7, 8, 0], [7, 8, 9], [7, 8, 9]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]], dtype=torch.bool)
    packed, found = packed_log_probs(model, settings, prompts, answers, mask)
    assert (packed.labels != IGNORED).sum(dim=1).tolist() == [3 + 2, 3]
    assert packed.found[0].tolist() == packed.found[1].tolist()
    for prompt in prompts:
        for row in prompt.rows:
            wanted = alone(model, settings, prompt, answers[row][mask[row]].tolist())
            torch.testing.assert_close(found[row][mask[row]], wanted, atol=1e-5, rtol=1e-5)


def test_an_answer_may_say_the_picture_token(
    model: Qwen2VLForConditionalGeneration, settings: CheckpointSettings, prompts: list[Prompt]
) -> None:
    answers = torch.tensor([[7, 8, 9]] * 5)
    answers[1, 1] = settings.image_token_id
    _, found = packed_log_probs(model, settings, prompts, answers, torch.ones_like(answers, dtype=torch.bool))
    wanted = alone(model, settings, prompts[0], [7, 8, 9])
    torch.testing.assert_close(found[1, 0], wanted[0], atol=1e-5, rtol=1e-5)
    assert found[1, 1] != wanted[1]
    torch.testing.assert_close(found[0], wanted, atol=1e-5, rtol=1e-5)


def test_neighbours_share_a_prompt_only_if_their_pictures_are_equal() -> None:
    ids, grids = torch.tensor([1, 2, 3]), torch.tensor([[1, 2, 2]])
    one, other = torch.zeros(4, 6), torch.ones(4, 6)
    rows = find_prompts([ids] * 5, [one, one.clone(), other, other, one], [grids] * 5)
    assert [prompt.rows for prompt in rows] == [range(2), range(2, 4), range(4, 5)]


def test_sampled_answers_are_transformers_own_where_chance_has_no_say(
    model: Qwen2VLForConditionalGeneration, settings: CheckpointSettings, prompts: list[Prompt]
) -> None:
    layout = settings.image_token_id, settings.preprocessing.merge_size, PAD
    wanted: list[list[int]] = []
    for prompt in prompts:
        ids = prompt.ids[None]
        said = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=prompt.pixels,
            image_grid_thw=prompt.grids, mm_token_type_ids=(ids == settings.image_token_id).int(),
            max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=PAD,
        )  # fmt: skip
        wanted.append(said[0, len(prompt.ids) :].tolist())
    coldest = 1e-6
    assert sample_answers(model, prompts, *layout, [-1], 8, coldest) == [wanted[0]] * 3 + [wanted[1]] * 2
    # A prompt whose answers have ended leaves the batch: the first alone, the second alone, both.
    for ends in ([wanted[0][2]], [wanted[1][2]], [wanted[0][4], wanted[1][4]]):
        cut = [text[: next((k + 1 for k, token in enumerate(text) if token in ends), 8)] for text in wanted]
        assert sample_answers(model, prompts, *layout, ends, 8, coldest) == [cut[0]] * 3 + [cut[1]] * 2


def test_sampling_follows_the_model_s_probabilities(
    model: Qwen2VLForConditionalGeneration, settings: CheckpointSettings, prompts: list[Prompt]
) -> None:
    torch.manual_seed(1)
    layout = settings.image_token_id, settings.preprocessing.merge_size, PAD
    draws = 4000
    many = [Prompt(prompts[0].ids, prompts[0].pixels, prompts[0].grids, range(draws))]
    firsts = torch.tensor([text[0] for text in sample_answers(model, many, *layout, [-1], 1, 0.5)])
    vocabulary = model.config.text_config.vocab_size
    seen = torch.bincount(firsts, minlength=vocabulary) / draws
    end = encode(settings.tokenizer, END_OF_TURN)[0]
    ids = torch.cat([prompts[0].ids, torch.tensor([end])])[None]
    logits = model(
        input_ids=ids, pixel_values=prompts[0].pixels, image_grid_thw=prompts[0].grids,
        mm_token_type_ids=(ids == settings.image_token_id).int(),
    ).logits[0, -2]  # fmt: skip
    assert (seen - torch.softmax(logits / 0.5, dim=0)).abs().max() < 4 * 0.5 / draws**0.5


def test_between_two_tokens_the_likeliest_is_taken(
    model: Qwen2VLForConditionalGeneration, settings: CheckpointSettings, prompts: list[Prompt]
) -> None:
    torch.manual_seed(2)
    layout = settings.image_token_id, settings.preprocessing.merge_size, PAD
    many, warm = [Prompt(prompts[0].ids, prompts[0].pixels, prompts[0].grids, range(4000))], 0.3

    def likeliest(said: list[int]) -> int:
        ids = torch.cat([prompts[0].ids, torch.tensor(said, dtype=torch.long)])[None]
        logits = model(
            input_ids=ids, pixel_values=prompts[0].pixels, image_grid_thw=prompts[0].grids,
            mm_token_type_ids=(ids == settings.image_token_id).int(),
        ).logits[0, -1]  # fmt: skip
        return int(logits.argmax())

    start = likeliest([])
    second = likeliest([start])
    third = likeliest([start, second])
    for end, wanted in ((-2, {third}), (second, None)):
        texts = [text for text in sample_answers(model, many, *layout, [-1], 3, warm, (start, end)) if text[0] == start]
        assert len(texts) > 5
        assert {text[1] for text in texts} == {second}
        thirds = {text[2] for text in texts}
        assert thirds == wanted if wanted else len(thirds) > 5, "after the second token it is sampled again"


def test_of_some_tokens_the_likeliest_is_taken(
    model: Qwen2VLForConditionalGeneration, settings: CheckpointSettings, prompts: list[Prompt]
) -> None:
    layout = settings.image_token_id, settings.preprocessing.merge_size, PAD
    many = [Prompt(prompts[0].ids, prompts[0].pixels, prompts[0].grids, range(2000))]
    torch.manual_seed(3)
    free = [text[0] for text in sample_answers(model, many, *layout, [-1], 1, 1.0)]
    among = range(100, 200)
    torch.manual_seed(3)
    held = [text[0] for text in sample_answers(model, many, *layout, [-1], 1, 1.0, None, among)]
    ids = prompts[0].ids[None]
    logits = model(
        input_ids=ids, pixel_values=prompts[0].pixels, image_grid_thw=prompts[0].grids,
        mm_token_type_ids=(ids == settings.image_token_id).int(),
    ).logits[0, -1]  # fmt: skip
    best = 100 + int(logits[100:200].argmax())
    assert len(set(free) & set(among)) > 5
    assert held == [best if token in among else token for token in free], "whether one of them comes is left to chance"
