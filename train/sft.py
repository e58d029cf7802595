"""Supervised fine-tuning on grounding samples with TRL's SFTTrainer, loss on the answers only.

    python -m train.sft --model runs/start --data data/tabletop/train --out runs/tabletop --steps 8000

Folder in, folder out: any Qwen2-VL checkpoint goes in, the same layout comes out, with `training.json` saying how. A
killed run that is started again with the same settings goes on from its last checkpoint, kept in `OUT.work` until the
end. From random weights it needs `--dense-weight`: see dense_head.py. Coordinates written as location tokens are
learned with soft targets, so that a near miss costs less than a far one.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.nn import functional
from transformers import Qwen2VLForConditionalGeneration
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from gemvg_edge.answer import BOX_START
from gemvg_edge.errors import GemvgError
from gemvg_edge.prompt import token_id
from train.checkpoint import CheckpointSettings, read_settings
from train.collate import IGNORED, collate
from train.dense_head import DenseHead, dense_targets, find_pointers, spread
from train.meshes import MESHES
from train.processor import load_processor
from train.tabletop import COLOURS, read_scenes
from train.tabletop_samples import TabletopSample, draw_sample, image_counts


@dataclass(frozen=True)
class SftSettings:
    """What a run is made of; the command line has one flag a field."""

    model: Path
    data: Path
    out: Path
    steps: int = 8000
    batch: int = 16
    questions: int = 6
    learning_rate: float = 8e-4
    warmup_steps: int = 200
    weight_decay: float = 0.02
    dense_weight: float = 0.3
    curriculum_share: float = 0.15
    save_steps: int = 500
    seed: int = 0
    bf16: bool = True


class GroundingTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer with our batches, soft location targets and the dense head's loss."""

    def __init__(self, *, settings: CheckpointSettings, dense_weight: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        tokenizer = settings.tokenizer
        self.locations = settings.answer_format.locations
        self.first_location = token_id(tokenizer, "<loc_0>") if self.locations else -1
        self.box_start = token_id(tokenizer, BOX_START)
        self.merge = settings.preprocessing.merge_size
        self.dense_weight = dense_weight
        self._seen_tokens = self._hidden = torch.empty(0)
        if dense_weight:
            layers = self.model.model.language_model.layers
            self.model.model.visual.register_forward_hook(self._keep_tokens)
            layers[(len(layers) - 1) // 2].register_forward_hook(self._keep_hidden)

    def _keep_tokens(self, module: Any, inputs: Any, output: Any) -> None:
        self._seen_tokens = output.pooler_output.float()  # (tokens, width); the model may run in bfloat16

    def _keep_hidden(self, module: Any, inputs: Any, output: Any) -> None:
        self._hidden = output.float()  # (batch, sequence, width)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Resume's weights. transformers 5.23 saves the hub's tensor names, and Trainer's own loader, which does not
        rename them back, would leave every weight random with no more than a warning.
        """
        state = Qwen2VLForConditionalGeneration.from_pretrained(
            resume_from_checkpoint, dtype=torch.float32
        ).state_dict()
        for file in Path(resume_from_checkpoint).glob("model*.safetensors"):
            state |= {name: tensor for name, tensor in load_file(file).items() if name.startswith("dense_head.")}
        self.model.load_state_dict(state)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Answer loss plus, while it is there, the dense head's."""
        samples, labels = inputs.pop("samples"), inputs.pop("labels")
        outputs = model(**inputs, use_cache=False)
        logits, targets = outputs.logits[:, :-1], labels[:, 1:]
        kept = targets != IGNORED
        answer = answer_loss(logits[kept].float(), targets[kept], self.first_location, self.locations)
        self._metrics["train"]["answer_loss"].append(answer.item())
        loss = answer
        if self.dense_weight:
            loss = loss + self.dense_weight * self._dense_loss(model, inputs, labels, samples)
        return (loss, outputs) if return_outputs else loss

    def _dense_loss(
        self, model: Any, inputs: dict[str, Any], labels: torch.Tensor, samples: Sequence[TabletopSample]
    ) -> torch.Tensor:
        grids = [tuple(grid) for grid in inputs["image_grid_thw"].tolist()]
        targets = dense_targets(grids, self.merge, [seen for sample in samples for seen in sample.seen])
        table = model.get_input_embeddings().weight
        rows = table[self.first_location : self.first_location + self.locations]
        tower = model.dense_head.tower_loss(self._seen_tokens, targets)
        is_visual = inputs["mm_token_type_ids"] == 1
        place = model.dense_head.place_loss(self._hidden[is_visual], targets, rows)
        pointers = find_pointers(
            inputs["input_ids"],
            labels,
            IGNORED,
            self.box_start,
            targets.cells,
            _count_on(samples),
            len(targets.centres),
        )
        point = model.dense_head.pointer_loss(self._hidden, is_visual, pointers)
        # Near 0 once the tower has collapsed to one vector, as it did at a learning rate of 1.5e-3.
        spread_now = self._seen_tokens.std(dim=0).mean() / self._seen_tokens.abs().mean()
        losses = {"tower_loss": tower, "place_loss": place, "pointer_loss": point, "visual_spread": spread_now}
        for name, value in losses.items():
            self._metrics["train"][name].append(value.item())
        loss: torch.Tensor = tower + place + point
        return loss


def answer_loss(logits: torch.Tensor, targets: torch.Tensor, first_location: int, locations: int) -> torch.Tensor:
    """Mean cross-entropy of (n, vocabulary) logits; location targets are spread over their neighbours."""
    place = targets - first_location
    is_location = (place >= 0) & (place < locations)
    losses = functional.cross_entropy(logits, targets, reduction="none")
    if is_location.any():
        soft = spread(place[is_location].float(), locations)
        log_p = torch.log_softmax(logits[is_location], dim=1)[:, first_location : first_location + locations]
        losses = losses.index_put((is_location.nonzero()[:, 0],), -(soft * log_p).sum(dim=1))
    return losses.mean()


def train(run: SftSettings) -> None:
    """Run (or resume) the whole stage and write the checkpoint folder."""
    settings = read_settings(run.model)
    work = _claim_work_folder(run)
    scenes = read_scenes(run.data)
    torch.manual_seed(run.seed)  # the dense head is random
    model = Qwen2VLForConditionalGeneration.from_pretrained(run.model, dtype=torch.float32)
    if run.dense_weight:
        model.dense_head = DenseHead(model.config.text_config.hidden_size, len(MESHES), len(COLOURS))
    processor = load_processor(run.model)

    draws = run.steps * run.batch
    dataset = Dataset.from_dict({"draw": range(draws), "pictures": image_counts(draws, run.curriculum_share, run.seed)})

    def load(rows: dict[str, list[int]]) -> dict[str, list[Any]]:
        samples = [
            draw_sample(
                scenes,
                run.data,
                pictures,
                run.questions,
                settings.answer_format,
                np.random.default_rng([run.seed, draw]),
            )
            for draw, pictures in zip(rows["draw"], rows["pictures"], strict=True)
        ]
        return {"images": [sample.images for sample in samples], "sample": samples}

    dataset.set_transform(load)
    trainer = GroundingTrainer(
        settings=settings,
        dense_weight=run.dense_weight,
        model=model,
        args=_trainer_config(run),
        train_dataset=dataset,
        processing_class=processor,
        data_collator=partial(_collate_rows, settings=settings, pad_id=processor.tokenizer.pad_token_id),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(work)))
    _save(trainer, run)
    shutil.rmtree(work)


def _collate_rows(rows: list[dict[str, Any]], settings: CheckpointSettings, pad_id: int) -> dict[str, Any]:
    samples: list[TabletopSample] = [row["sample"] for row in rows]
    return {**collate(samples, settings, pad_id), "samples": samples}


def _count_on(samples: Sequence[TabletopSample]) -> list[list[list[int]]]:
    """Each sample's wanted objects, counted over the whole batch."""
    wanted, first = [], 0
    for sample in samples:
        wanted.append([[first + k for k in question] for question in sample.wanted])
        first += sum(map(len, sample.seen))
    return wanted


def _claim_work_folder(run: SftSettings) -> Path:
    """Where checkpoints are kept meanwhile; refused if a run with other settings left it."""
    work = _work_folder(run.out)
    record, mine = work / "settings.json", json.dumps(_as_json(run), indent=1)
    if record.is_file() and record.read_text() != mine:
        raise GemvgError(f"{work} belongs to a run with other settings; delete it, or give the settings in {record}")
    work.mkdir(parents=True, exist_ok=True)
    record.write_text(mine)
    return work


def _work_folder(out: Path) -> Path:
    return out.with_name(out.name + ".work")


def _as_json(run: SftSettings) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(run).items()}


def _trainer_config(run: SftSettings) -> SFTConfig:
    return SFTConfig(
        output_dir=str(_work_folder(run.out)),
        max_steps=run.steps,
        per_device_train_batch_size=run.batch,
        learning_rate=run.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": run.steps * 2 // 5, "min_lr_ratio": 0.02},
        warmup_steps=run.warmup_steps,
        weight_decay=run.weight_decay,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        bf16=run.bf16,
        use_cpu=not torch.cuda.is_available(),
        activation_checkpointing=False,
        max_length=None,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        dataloader_num_workers=1,
        dataloader_prefetch_factor=4,
        save_steps=run.save_steps,
        save_total_limit=2,
        logging_steps=50,
        report_to=["tensorboard"],
        seed=run.seed,
    )


def _save(trainer: GroundingTrainer, run: SftSettings) -> None:
    """Write the checkpoint without the dense head, beside the target first so that a crash leaves no half folder."""
    if run.dense_weight:
        del trainer.model.dense_head
    partial_folder = run.out.with_name(run.out.name + ".partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    trainer.model.save_pretrained(partial_folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"):
        if (run.model / name).is_file():
            shutil.copyfile(run.model / name, partial_folder / name)
    log = [entry for entry in trainer.state.log_history if "answer_loss" in entry][::20]
    record = {**_as_json(run), "log": log}
    (partial_folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    shutil.rmtree(run.out, ignore_errors=True)
    partial_folder.rename(run.out)


def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(description="Supervised fine-tuning on tabletop scenes.")
    for name, field in SftSettings.__dataclass_fields__.items():
        flag = "--" + name.replace("_", "-")
        if field.type == "Path":
            parser.add_argument(flag, type=Path, required=True)
        elif field.type == "bool":
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default)
        else:
            parser.add_argument(flag, type={"int": int, "float": float}[str(field.type)], default=field.default)
    run = SftSettings(**vars(parser.parse_args()))
    try:
        train(run)
    except (GemvgError, FileNotFoundError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
