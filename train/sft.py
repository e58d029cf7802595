"""Supervised fine-tuning on grounding samples with TRL's SFTTrainer, loss on the answers only: GeM-VG's stages 1 and 2.

    python -m train.sft --model runs/start --data data/world/train --out runs/stage1
    python -m train.sft --model runs/stage1 --data data/world/train --out runs/stage2 --cot-share 0.4

Folder in, folder out: any Qwen2-VL checkpoint goes in, the same layout comes out, with `training.json` saying how. Data
is a folder of rendered scenes (train.world.render) or a .jsonl of records (train.data). Stage 1 is short answers alone,
stage 2 mixes reasoning in. A killed run that is started again with the same settings goes on from its last checkpoint.
From random weights it needs `--dense-weight`: see train/world/dense_head.py. Several GPUs:
`accelerate launch -m train.sft ...`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import get_worker_info
from trl import SFTConfig

from gemvg_edge.errors import GemvgError
from train.checkpoint import CheckpointSettings, read_trainable
from train.collate import collate
from train.data.samples import grouped_order, read_short, record_sample
from train.load import load_qwen2_vl
from train.precision import attending, check_memory, in_4bit
from train.processor import load_processor
from train.rewrite import DTYPES
from train.stage import (
    Seed,
    Switch,
    bfloat16_pays,
    check_out,
    end_with_parent,
    finish,
    last_checkpoint,
    lora,
    run_stage,
    work_folder,
    working,
)
from train.trainer import GroundingTrainer
from train.world.dense_loss import DenseLoss
from train.world.samples import draw_sample
from train.world.scenes import read_scenes
from train.world.tower import TowerTrainer

SCHEDULES = {"wsd": "warmup_stable_decay", "cosine": "cosine"}


@dataclass(frozen=True)
class SftSettings:
    """What a run is made of; the command line has one flag a field."""

    model: Path  # the checkpoint folder to start from
    data: Path  # a folder of rendered scenes, or a .jsonl of records
    out: Path  # the checkpoint folder to write
    steps: int = 8000  # updates of the weights
    batch: int = 16  # samples that a device holds in one pass
    accumulate: int = 1  # passes that make up a step
    questions: int = 8  # questions about each set of pictures; rendered scenes only
    cot_share: float = 0.0  # share of the questions that ask for reasoning, 0 to 1; rendered scenes only
    brief_share: float = 0.0  # share of the reasoning that is the conclusion alone, 0 to 1; rendered scenes only
    one_picture: bool = False  # ask of one picture alone, by names and colours; rendered scenes only
    conclusion_weight: float = 1.0  # how much the last sentence of reasoning counts in the loss, beside all else
    learning_rate: float = 8e-4  # the largest step of the optimiser
    schedule: Literal["wsd", "cosine"] = "wsd"  # of the learning rate; wsd: constant, then down at the end
    warmup_steps: int = 100  # steps until the learning rate is reached
    decay_share: float = 0.4  # share of the steps in which it goes down, 0 to 1; wsd only
    weight_decay: float = 0.02  # how fast weights shrink that nothing holds, in learning rates
    muon: bool = False  # train matrices with Muon, all else with AdamW; off: AdamW alone
    dense_weight: float = 0.0  # weight of the dense head's loss, which random weights need; 0: no dense head
    tower_only: bool = False  # train the vision tower alone, by its part of the dense head's loss
    lora_rank: int = 0  # rank of the adapters that are trained; 0 trains the weights themselves
    dtype: Literal["float32", "bfloat16"] = "float32"  # what weights are held in; bfloat16 halves their memory
    load_in_4bit: bool = False  # hold the weights in 4 bits (QLoRA); needs --lora-rank, a GPU and bitsandbytes
    attention: Literal["sdpa", "math", "eager", "flash_attention_2"] = "sdpa"  # whose; math: sdpa, not fused
    max_pixels: int | None = None  # of a picture, after resizing; as the result will have it (default: the model's)
    max_length: int | None = None  # leave out records of more tokens than this (default: none)
    freeze_vision: bool = False  # leave the vision tower as it is
    checkpointing: bool = False  # compute activations again rather than keep them: less memory, more time
    save_steps: int = 250  # steps from one checkpoint to the next, which is what a kill may cost
    seed: Seed = 0  # what random numbers start from
    bf16: bool = True  # compute in bfloat16 where the machine is faster in it
    overwrite: Switch = False  # replace a finished result that is at --out


def train(run: SftSettings, trainer_class: type[GroundingTrainer] = GroundingTrainer, **extra: Any) -> None:
    """Run (or resume) the whole stage and write the checkpoint folder; `extra` is what a trainer class of its own
    needs (train.distill).
    """
    check(run)
    if run.tower_only:
        trainer_class = TowerTrainer
    settings = read_trainable(run.model)
    settings = replace(settings, preprocessing=settings.preprocessing.within(run.max_pixels))
    dataset = load_data(run, settings)
    with working(run) as work, attending(run.attention):
        processor = load_processor(run.model)
        config = trainer_config(run)  # before the model: under DeepSpeed's ZeRO-3 it decides how weights are loaded
        model = load_model(run)
        trainer = trainer_class(
            **extra,
            settings=settings,
            side_losses=DenseLoss(model, run.model, settings) if run.dense_weight else None,
            side_weight=run.dense_weight,
            muon=run.muon,
            model=model,
            args=config,
            train_dataset=dataset,
            processing_class=processor,
            data_collator=partial(
                collate_rows,
                settings=settings,
                pad_id=processor.tokenizer.pad_token_id,
                conclusion_weight=run.conclusion_weight,
            ),
            peft_config=lora(run.lora_rank),
        )
        trainer.train(resume_from_checkpoint=last_checkpoint(work))
        finish(trainer, run, "tower_loss" if run.tower_only else "answer_loss", run.dtype, run.max_pixels)


def check(run: SftSettings) -> None:
    """Refuse settings that cannot work."""
    check_out(run)
    for name in ("steps", "batch", "accumulate", "questions", "save_steps"):
        if getattr(run, name) < 1:
            raise GemvgError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(run, name)}")
    for name in ("cot_share", "brief_share"):
        if not 0 <= getattr(run, name) <= 1:
            raise GemvgError(f"--{name.replace('_', '-')} must be between 0 and 1, not {getattr(run, name)}")
    if run.schedule not in SCHEDULES:
        raise GemvgError(f"--schedule must be one of {', '.join(SCHEDULES)}, not {run.schedule}")
    if run.conclusion_weight <= 0:
        raise GemvgError(f"--conclusion-weight must be more than 0, not {run.conclusion_weight}")
    check_memory(run)
    if run.one_picture and (run.data.suffix == ".jsonl" or run.cot_share):
        raise GemvgError("--one-picture needs rendered scenes as --data and no --cot-share")
    if run.dense_weight and (run.data.suffix == ".jsonl" or run.lora_rank):
        raise GemvgError("--dense-weight needs rendered scenes as --data and no --lora-rank")
    if run.tower_only and (not run.dense_weight or run.freeze_vision or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        raise GemvgError("--tower-only needs --dense-weight, a tower that is not frozen and one process")


def load_model(run: SftSettings) -> Any:
    """The checkpoint in the run's format; of float32, autocast computes in bfloat16."""
    torch.manual_seed(run.seed)  # a new dense head, which comes next, is random
    quantized = {"quantization_config": in_4bit(), "device_map": {"": 0}} if run.load_in_4bit else {}
    attention = "sdpa" if run.attention == "math" else run.attention
    model = load_qwen2_vl(run.model, DTYPES[run.dtype], attn_implementation=attention, **quantized)
    if run.freeze_vision:
        model.model.visual.requires_grad_(False)
    if run.tower_only:
        model.requires_grad_(False)
        model.model.visual.requires_grad_(True)
    return model


def load_data(run: SftSettings, settings: CheckpointSettings) -> Dataset:
    """One row a draw; a row becomes a sample (pictures and all) when it is asked for."""
    # Each device takes its batches in turn from this one list, in the order it has.
    world = int(os.environ.get("WORLD_SIZE", "1"))
    draws = run.steps * run.batch * run.accumulate * world
    if run.data.suffix == ".jsonl":
        records, lengths = read_short(run.data, settings, run.max_length)
        order = grouped_order(lengths, run.batch * world, draws, run.seed)

        def load(rows: dict[str, list[int]]) -> dict[str, list[Any]]:
            drawn = [records[order[k]] for k in rows["draw"]]
            return {"sample": [record_sample(r, settings.answer_format, settings.resized(r.sizes)) for r in drawn]}
    else:
        scenes = {scene.seed: scene for scene in read_scenes(run.data)}

        def load(rows: dict[str, list[int]]) -> dict[str, list[Any]]:
            dice = (np.random.default_rng([run.seed, draw]) for draw in rows["draw"])
            each = (run.questions, run.cot_share, settings.answer_format)
            return {
                "sample": [draw_sample(scenes, run.data, *each, rng, run.brief_share, run.one_picture) for rng in dice]
            }

    def with_images(rows: dict[str, list[int]]) -> dict[str, list[Any]]:
        loaded = load(rows)
        return {"images": [sample.images for sample in loaded["sample"]], **loaded}  # TRL looks for pictures

    dataset = Dataset.from_dict({"draw": range(draws)})
    dataset.set_transform(with_images)
    return dataset


def collate_rows(
    rows: list[dict[str, Any]], settings: CheckpointSettings, pad_id: int, conclusion_weight: float = 1.0
) -> dict[str, Any]:
    """A batch of the dataset's rows; the samples ride along for losses that a stage adds."""
    if get_worker_info():
        end_with_parent()
    samples = [row["sample"] for row in rows]
    return {**collate(samples, settings, pad_id, conclusion_weight), "samples": samples}


def trainer_config(run: SftSettings) -> SFTConfig:
    """TRL's settings of a run."""
    decay = {"num_decay_steps": int(run.steps * run.decay_share), "min_lr_ratio": 0.02}
    return SFTConfig(
        output_dir=str(work_folder(run.out)),
        max_steps=run.steps,
        per_device_train_batch_size=run.batch,
        gradient_accumulation_steps=run.accumulate,
        learning_rate=run.learning_rate,
        lr_scheduler_type=SCHEDULES[run.schedule],
        lr_scheduler_kwargs=decay if run.schedule == "wsd" else {},
        warmup_steps=run.warmup_steps,
        weight_decay=run.weight_decay,
        max_grad_norm=1.0,
        bf16=run.bf16 and bfloat16_pays(),
        use_cpu=not torch.cuda.is_available(),
        activation_checkpointing=run.checkpointing,
        max_length=None,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        dataloader_num_workers=1,
        dataloader_prefetch_factor=4,
        save_steps=run.save_steps,
        save_total_limit=2,
        logging_steps=25,
        report_to=["tensorboard"],
        seed=run.seed,
    )


def main() -> None:
    """Command line; see the module's first lines."""
    run_stage("train.sft", SftSettings, "Supervised fine-tuning on grounding samples.", train)


if __name__ == "__main__":
    main()
