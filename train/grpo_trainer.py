"""TRL's GRPOTrainer for grounding: pictures opened late, whole groups weighed, and prompts computed once a group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from itertools import pairwise
from typing import Any

import torch
from peft import PeftModel
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid

from gemvg_edge.answer import AnswerFormat
from gemvg_edge.answer_pieces import BOX_END, BOX_START
from gemvg_edge.images import load_image
from train.rewards import Terms
from train.shared_prompts import alike, find_prompts, pack, sample_answers, unpack
from train.stage import load_weights

TERMS = tuple(field.name for field in fields(Terms))  # in the order of RewardWeights, too


class GroundingGRPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """GRPOTrainer that opens pictures when they are asked about and weighs whole groups."""

    def __init__(
        self, *, difficulty: bool, min_spread: float, learn_boxes: bool, answer_format: AnswerFormat, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.difficulty, self.min_spread, self.learn_boxes = difficulty, min_spread, learn_boxes
        find = self.processing_class.tokenizer.convert_tokens_to_ids
        self._box_ids = find(BOX_START), find(BOX_END)
        # Where boxes have no marks, they are all that is written in locations.
        self._locations = range(0)
        if not answer_format.marks:
            self._locations = range(first := find("<loc_0>"), first + answer_format.locations)
        self._scores = torch.empty(0)
        self._parts: list[dict[str, Any]] = []  # of the last generation, one a device batch

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Resume's weights; see load_weights. Adapters and FSDP's files keep their names, so Trainer reads those."""
        if isinstance(self.model, PeftModel) or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(self.model, resume_from_checkpoint)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """TRL's, but the answers stay in order, so that a group meets its prompt in one device batch."""
        batches, number = self.args.steps_per_generation, self._step % self.args.steps_per_generation
        if number == 0 or not self._parts:
            whole = split_pixel_values_by_grid(self._generate_and_score_completions(generation_batch))
            self._parts = [unsplit_pixel_values_by_grid(part) for part in split_tensor_dict(whole, batches)]
        return self._parts[number]

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **pictures: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """TRL's, with each prompt computed once for all its answers; see shared_prompts.py."""
        named = {name: pictures[name] for name in ("pixel_values", "image_grid_thw", "num_images")}
        split = split_pixel_values_by_grid(named)
        seen, stem = attention_mask.bool(), input_ids.shape[1] - logits_to_keep
        ids = [row[kept].cpu() for row, kept in zip(input_ids[:, :stem], seen[:, :stem], strict=True)]
        logps, entropies = [], []
        size = batch_size or len(ids)
        for start in range(0, len(ids), size):
            part = slice(start, start + size)
            prompts = find_prompts(ids[part], split["pixel_values"][part], split["image_grid_thw"][part])
            answers, left = input_ids[part, stem:], seen[part, stem:]
            # Several processes run the model as often as each other: ZeRO-3 gathers weights at every run.
            batches = [prompts] if self.accelerator.num_processes > 1 else alike(prompts, left)
            of_batches = []
            for batch in batches:
                packed = pack(batch, answers, left, *self._layout)
                inputs = {name: tensor.to(input_ids.device) for name, tensor in packed.inputs.items()}
                with self.accelerator.autocast():
                    outputs = model(**inputs, shift_labels=packed.labels.to(input_ids.device), fused_lm_head=True)
                found = [outputs.log_probs, *([outputs.entropy] if compute_entropy else [])]
                of_batches.append([unpack(values, packed) for values in found])
            whole = [torch.stack(values).sum(dim=0) for values in zip(*of_batches, strict=True)]
            logps.append(whole[0])
            entropies += whole[1:]
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, None

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[list[list[int]], Any]:
        """Answers to each prompt; one process prefills a group's prompt once, several leave it to vLLM or TRL."""
        if self.use_vllm:
            # TRL 1.16 hands over ids that are expanded already, and pictures, for which vLLM expands them once more
            # (huggingface/trl 6294, 6401). What is learned from keeps TRL's own ids: these are not given back.
            prompt_ids = [one_token_a_picture(row, self.processing_class.image_token_id) for row in prompt_ids]
        if self.use_vllm or self.accelerator.num_processes > 1:
            answers: tuple[list[list[int]], Any] = super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, *args, **kwargs
            )
            return answers
        named = {name: torch.as_tensor(multimodal_fields[name]) for name in ("pixel_values", "image_grid_thw")}
        split = split_pixel_values_by_grid({**named, "num_images": [len(row) for row in images]})
        prompts = find_prompts(
            [torch.tensor(row) for row in prompt_ids], split["pixel_values"], split["image_grid_thw"]
        )
        checkpointing = self.args.gradient_checkpointing_kwargs
        with unwrap_model_for_generation(
            self.model_wrapped, self.accelerator, gradient_checkpointing_kwargs=checkpointing
        ) as model:
            limits = self.eos_token_ids, self.max_completion_length, self.temperature
            with merged(model):
                greedy = (None, range(0)) if self.learn_boxes else (self._box_ids, self._locations)
                return sample_answers(model, prompts, *self._layout, *limits, *greedy), None

    @property
    def _layout(self) -> tuple[int, int, int]:
        """What the layout of a row depends on: the picture token, merged patches and the padding."""
        processor = self.processing_class
        return processor.image_token_id, processor.image_processor.merge_size, processor.tokenizer.pad_token_id

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._scores = super()._calculate_rewards(*args, **kwargs)  # (answers of all devices, terms)
        return self._scores

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's, then what is this stage's own about whole groups; a group may lie across devices."""
        records = {row["draw"]: row["record"] for row in inputs}
        opened = {draw: [load_image(path) for path in record.images] for draw, record in records.items()}
        inputs = [{**row, "images": opened[row["draw"]]} for row in inputs]
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        scores = self._scores.view(-1, self.num_generations, len(TERMS))  # (groups, answers, terms)
        kept = has_spread(scores @ self.reward_weights.to(scores.device), self.min_spread)
        weight = kept.float()
        if self.difficulty:
            weight = weight * torch.exp(1 - scores[..., TERMS.index("iou")].mean(dim=1))
        first = self.accelerator.process_index * len(inputs)
        mine = slice(first, first + len(inputs))
        output["advantages"] = output["advantages"] * weight.repeat_interleave(self.num_generations)[mine]
        mask = output["completion_mask"] * kept.repeat_interleave(self.num_generations)[mine, None]
        output["completion_mask"] = mask
        if not self.learn_boxes:
            output["tool_mask"] = (~in_boxes(output["completion_ids"], *self._box_ids, self._locations)).int()
            mask = mask * output["tool_mask"]  # TRL leaves these tokens out of the loss
        output["num_items_in_batch"] = self.accelerator.gather(mask.sum()).sum()
        self._metrics["train"]["groups/dropped"].append(1 - kept.float().mean().item())
        self._metrics["train"]["groups/weight"].append(weight.mean().item())
        return output


def one_token_a_picture(ids: Sequence[int], image_token: int) -> list[int]:
    """A prompt's ids with each run of image tokens as a single one, as a prompt has them before pictures are cut.

    Runs of two pictures never touch: each stands between its own start and end.
    """
    return [*ids[:1], *(token for last, token in pairwise(ids) if not last == token == image_token)]


@contextmanager
def merged(model: Any) -> Iterator[None]:
    """Adapters folded into the weights that they adapt, while nothing is learned: half the products a layer."""
    if not isinstance(model, PeftModel):
        yield
        return
    model.merge_adapter()
    try:
        yield
    finally:
        model.unmerge_adapter()


def has_spread(rewards: torch.Tensor, least: float = 0.0) -> torch.Tensor:
    """Which groups (groups, answers) have rewards that differ by more than `least`, and by more than rounding."""
    return rewards.amax(dim=1) - rewards.amin(dim=1) > max(least, 1e-6)


def in_boxes(ids: torch.Tensor, start: int, end: int, locations: range = range(0)) -> torch.Tensor:
    """Which tokens (answers, tokens) come after a box's first token, up to and with its last one, or are `locations`.

    Without marks how many boxes there are is still learned, by what ends their line.
    """
    number = torch.arange(ids.shape[1], device=ids.device)
    started = torch.where(ids == start, number, -1).cummax(dim=1).values
    ended = torch.where(ids == end, number, -1).cummax(dim=1).values
    between = torch.nn.functional.pad((started > ended)[:, :-1], (1, 0))
    return between | (ids >= locations.start) & (ids < locations.stop)
