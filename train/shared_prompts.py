"""A group's answers share their prompt: GRPO computes each question and its pictures once, not once an answer.

TRL repeats the prompt for every answer of a group, in sampling and in the loss. A multi-image prompt is far longer than
its answers, so most of a step went into computing the same thing again. Here a group is one row: the prompt, then each
answer as a branch that sees the prompt and itself, at the positions that it would have alone (the layout and the mask
of collate.py). The numbers are TRL's own (tests/test_shared_prompts.py). Knows models and tensors, not rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gemvg_edge.positions import mrope_positions, text_positions
from train.collate import IGNORED, branch_mask

ALIKE = 1.25  # how much longer a row may be than the shortest of its batch


@dataclass(frozen=True)
class Prompt:
    """One prompt and the rows of the batch that have it."""

    ids: torch.Tensor  # (tokens,), without padding
    pixels: torch.Tensor  # (patches, values a patch)
    grids: torch.Tensor  # (pictures, 3)
    rows: range


@dataclass(frozen=True)
class Packed:
    """A batch for the model, and where each row's answer lies in it."""

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor  # (prompts, length): the token that each place has to say next, or IGNORED
    found: torch.Tensor  # (rows, answer tokens): index into labels.flatten(), or -1


def find_prompts(
    ids: Sequence[torch.Tensor], pixels: Sequence[torch.Tensor], grids: Sequence[torch.Tensor]
) -> list[Prompt]:
    """The prompts of a batch's rows, from each row's ids, patches and grids; neighbours that are equal share one."""
    prompts: list[Prompt] = []
    for row, own in enumerate(zip(ids, pixels, grids, strict=True)):
        if prompts and all(map(torch.equal, own, (prompts[-1].ids, prompts[-1].pixels, prompts[-1].grids))):
            prompts[-1] = Prompt(*own, range(prompts[-1].rows.start, row + 1))
        else:
            prompts.append(Prompt(*own, range(row, row + 1)))
    return prompts


def alike(prompts: Sequence[Prompt], mask: torch.Tensor) -> list[list[Prompt]]:
    """The prompts in batches of rows of about one length, the shortest first, without those that no answer is left of.

    A batch is as wide as its widest row, and a reasoned group takes several times a direct one's places. `mask`: (rows,
    tokens), what is left of each answer. Where nothing is left at all one prompt stays; see pack.
    """
    left = {k: int(mask[p.rows.start : p.rows.stop].sum()) for k, p in enumerate(prompts)}
    lengths = {k: len(prompts[k].ids) + tokens for k, tokens in left.items() if tokens}
    batches: list[list[Prompt]] = []
    longest = 0.0
    for k in sorted(lengths, key=lengths.__getitem__) or [0]:
        if not batches or lengths[k] > longest:
            batches.append([])
            longest = ALIKE * lengths.get(k, 0)
        batches[-1].append(prompts[k])
    return batches


def pack(
    prompts: Sequence[Prompt], answers: torch.Tensor, mask: torch.Tensor, image_token_id: int, merge: int, pad_id: int
) -> Packed:
    """One row a prompt for the model, with the answers (rows, tokens) as far as their mask goes.

    A prompt without any answer left is not computed, and equal answers are computed once. A branch starts with the
    prompt's last token again, so that the place before each answer's token is always in its own branch.
    """
    texts = [tuple(row[:length]) for row, length in zip(answers.tolist(), mask.sum(dim=1).tolist(), strict=True)]
    # With nothing left at all one prompt stays, so that every process of several has a gradient to share.
    kept = [prompt for prompt in prompts if any(texts[row] for row in prompt.rows)] or [prompts[0]]
    branches = [dict.fromkeys(texts[row] for row in prompt.rows if texts[row]) for prompt in kept]
    width = max(len(p.ids) - 1 + sum(len(text) + 1 for text in own) for p, own in zip(kept, branches, strict=True))
    layouts, found = [], torch.full(answers.shape, -1)
    for number, (prompt, own) in enumerate(zip(kept, branches, strict=True)):
        stem = len(prompt.ids) - 1
        positions = _positions(prompt, image_token_id, merge)
        ids, labels = [prompt.ids[:stem]], [torch.full((stem,), IGNORED)]
        places, branch = [positions[:, :stem]], [np.zeros(stem, np.int64)]
        starts, length = {}, stem
        for k, text in enumerate(own, start=1):
            answer, starts[text] = torch.tensor(text), length
            # An answer may say the picture token; read as one, it would stand for a picture that is not there.
            ids += [prompt.ids[stem:], answer.masked_fill(answer == image_token_id, pad_id)]
            labels += [answer, torch.full((1,), IGNORED)]
            places.append(text_positions(int(positions[0, -1]), len(text) + 1))
            branch.append(np.full(len(text) + 1, k))
            length += len(text) + 1
        for row in prompt.rows:
            if text := texts[row]:
                found[row, : len(text)] = number * width + starts[text] + torch.arange(len(text))
        layouts.append((torch.cat(ids), torch.cat(labels), np.concatenate(places, axis=1), np.concatenate(branch)))
    return Packed(
        {
            "input_ids": torch.stack([_padded(row_ids, width, pad_id) for row_ids, _, _, _ in layouts]),
            "position_ids": torch.stack([_padded(torch.from_numpy(p), width, 0) for _, _, p, _ in layouts], dim=1),
            "attention_mask": torch.from_numpy(
                branch_mask(np.stack([np.pad(b, (0, width - len(b)), constant_values=-1) for *_, b in layouts]))
            )[:, None],
            "pixel_values": torch.cat([prompt.pixels for prompt in kept]),
            "image_grid_thw": torch.cat([prompt.grids for prompt in kept]),
        },
        torch.stack([_padded(row_labels, width, IGNORED) for _, row_labels, _, _ in layouts]),
        found,
    )


def _positions(prompt: Prompt, image_token_id: int, merge: int) -> Any:
    grids = [(int(t), int(h), int(w)) for t, h, w in prompt.grids.tolist()]
    return mrope_positions(prompt.ids.cpu().numpy(), image_token_id, grids, merge)


def _padded(values: torch.Tensor, width: int, value: int) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, width - values.shape[-1]), value=value)


def unpack(values: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Values of the model's places (prompts, length) -> those of each row's answer (rows, tokens), 0 elsewhere."""
    found = packed.found.to(values.device)
    return values.flatten()[found.clamp(min=0)].masked_fill(found < 0, 0.0)


@torch.no_grad()
def sample_answers(
    model: Any,
    prompts: Sequence[Prompt],
    image_token_id: int,
    merge: int,
    pad_id: int,
    end_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    greedy_between: tuple[int, int] | None = None,
    greedy_among: range = range(0),
) -> list[list[int]]:
    """One sampled answer a row, in the rows' order.

    A prompt's answers grow side by side as branches over its one set of keys and values, where a copy for each would be
    read at every token; a prompt whose answers have all ended leaves the batch. `greedy_between` are two tokens: after
    the first and up to the second the likeliest token is taken instead of a sampled one. Of neighbouring ids
    `greedy_among` the likeliest is taken wherever one of them is sampled.
    """
    device = model.device
    width, branches = max(len(prompt.ids) for prompt in prompts), max(len(prompt.rows) for prompt in prompts)
    ids, mask = torch.full((len(prompts), width), pad_id), torch.zeros(len(prompts), width, dtype=torch.long)
    positions = torch.zeros(3, len(prompts), width, dtype=torch.long)
    for k, prompt in enumerate(prompts):
        ids[k, -len(prompt.ids) :], mask[k, -len(prompt.ids) :] = prompt.ids, 1
        positions[:, k, -len(prompt.ids) :] = torch.from_numpy(_positions(prompt, image_token_id, merge))
    output = model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=positions.to(device),
        pixel_values=torch.cat([prompt.pixels for prompt in prompts]).to(device),
        image_grid_thw=torch.cat([prompt.grids for prompt in prompts]).to(device),
        use_cache=True,
        logits_to_keep=1,
    )
    cache, logits = output.past_key_values, output.logits[:, -1:].expand(-1, branches, -1)
    seen = mask.to(device, torch.bool)[:, None, None].expand(-1, 1, branches, -1)  # (prompts, 1, queries, keys)
    itself = torch.eye(branches, dtype=torch.bool, device=device).expand(len(prompts), 1, -1, -1)
    place, ends = positions[0, :, -1:].to(device), torch.tensor(list(end_ids), device=device)
    rows = torch.tensor([len(prompt.rows) for prompt in prompts], device=device)
    running = torch.arange(branches, device=device) < rows[:, None]
    greedy = torch.zeros_like(running)
    left = torch.arange(len(prompts), device=device)  # prompts that still have an answer to end
    said: list[torch.Tensor] = []
    while len(left) and len(said) < max_new_tokens:
        if said:
            seen, place = torch.cat([seen, itself[: len(left)]], dim=3), place + 1
            logits = model(
                input_ids=said[-1][left],
                attention_mask=seen,
                position_ids=place.expand(3, -1, branches),
                past_key_values=cache,
                use_cache=True,
            ).logits
        drawn = torch.multinomial(torch.softmax(logits.float() / temperature, dim=-1).flatten(0, 1), 1)
        drawn = logits.argmax(dim=-1).where(greedy, drawn.view(running.shape)).where(running, pad_id)
        if greedy_among:
            best = logits[..., greedy_among.start : greedy_among.stop].argmax(dim=-1) + greedy_among.start
            drawn = best.where((drawn >= greedy_among.start) & (drawn < greedy_among.stop), drawn)
        said.append(torch.full((len(prompts), branches), pad_id, device=device))
        said[-1][left] = drawn
        running = running & ~torch.isin(drawn, ends)
        if greedy_between:
            greedy = (greedy | (drawn == greedy_between[0])) & (drawn != greedy_between[1])
        if not (goes_on := running.any(dim=1)).all():
            cache.batch_select_indices(goes_on.nonzero()[:, 0])
            left, running, seen, place = left[goes_on], running[goes_on], seen[goes_on], place[goes_on]
            greedy = greedy[goes_on]
    texts = torch.stack(said, dim=2).tolist()
    answers = [text for prompt, group in zip(prompts, texts, strict=True) for text in group[: len(prompt.rows)]]
    cut = (next((k + 1 for k, token in enumerate(text) if token in end_ids), len(text)) for text in answers)
    return [text[:length] for text, length in zip(answers, cut, strict=True)]
