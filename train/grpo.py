"""GRPO on grounding records with TRL's GRPOTrainer: groups of sampled answers, scored by rewards.py.

    python -m train.grpo --model runs/cot-sft --data data/rl.jsonl --out runs/gemvg --steps 1000
    accelerate launch --config_file zero3.yaml -m train.grpo ... --vllm     # the 7B on several GPUs

Folder in, folder out, as in sft.py: any Qwen2-VL checkpoint goes in, the same layout comes out, with `training.json`
saying how, and a killed run that is started again with the same settings goes on from its last checkpoint.

GeM-VG is known to mix reasoning and direct answers in this stage, not how. Ours: each group of answers is asked for
one of the two (`--cot-share`), never for both, so that a group's rewards compare. Further than plain GRPO:
  * a group whose rewards are all equal is left out of the loss, its normaliser and the KL term (after DAPO, which
    samples others in its place; we do not, so such a step is smaller), and with `--min-spread` one whose rewards are
    nearly equal too: answers that differ by a pixel teach little and cost as much to learn from;
  * `--difficulty` multiplies a group's advantages by exp(1 - its mean IoU reward). UniVG-R1 multiplies the loss, and
    takes the mean over all that a device holds; ours is each group's own, so it does not depend on the batch's layout.
  * `--reward-scale batch` divides advantages by the whole batch's standard deviation (PPO Lite). With `group`, answers
    that differ by a pixel weigh as much as answers that differ by the object;
  * `--no-learn-boxes` leaves what stands between a box's two tokens (without marks: its locations) out of the loss and,
    where this process samples itself, takes the likeliest coordinates. Chance in coordinates says little about which
    thing is right, and it is most of the chance in a small model's answers, and so of the gradient's noise.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from trl import GRPOConfig

from gemvg_edge.errors import GemvgError
from gemvg_edge.prompt import END_OF_TURN
from train.checkpoint import CheckpointSettings, read_trainable
from train.data.record import Mode, Record, Tally, keep_good, read_records
from train.data.sizes import keep_measured
from train.grpo_trainer import TERMS, GroundingGRPOTrainer
from train.load import load_qwen2_vl
from train.prompt_groups import END_OF_TEXT, group_dataset, group_processor
from train.rewards import RewardWeights, score
from train.stage import (
    Seed,
    Switch,
    bfloat16_pays,
    check_out,
    finish,
    last_checkpoint,
    lora,
    run_stage,
    work_folder,
    working,
)

Scale = Literal["group", "batch", "none"]  # TRL's scale_rewards
Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class GrpoSettings:
    """What a run is made of; the command line has one flag a field."""

    model: Path  # the checkpoint folder to start from
    data: Path  # a .jsonl of records to be asked about
    out: Path  # the checkpoint folder to write
    steps: int = 1000  # updates of the weights
    batch: int = 16  # groups a step, over all devices
    generations: int = 8  # answers a group, at least 2 (8: UniVG-R1)
    device_batch: int = 8  # answers that a device holds in one forward pass
    learning_rate: float = 1e-6  # the largest step of the optimiser (1e-6: UniVG-R1, MG-Thinker)
    schedule: Schedule = "constant"  # of the learning rate; linear and cosine end at nothing
    beta: float = 0.01  # weight of the KL term (0.01: MG-Thinker); 0 needs no reference model
    temperature: float = 1.0  # of the sampled answers (1: MG-Thinker)
    max_new_tokens: int = 512  # length of an answer at most, in tokens
    cot_share: float = 0.5  # share of the groups that are asked to reason, 0 to 1
    difficulty: bool = False  # multiply a group's advantages by exp(1 - its mean IoU reward)
    min_spread: float = 0.0  # leave out groups whose best reward is no more than this above their worst, 0 to 1
    thought_weight: float = 0.0  # what the words of the reasoning earn, where the records hold the true one
    reward_scale: Scale = "group"  # whose deviation divides advantages: GRPO's, PPO Lite's, or none (Dr. GRPO)
    learn_boxes: bool = True  # off: only words are sampled and learned, boxes are the likeliest ones
    freeze_vision: bool = True  # leave the vision tower as it is (UniVG-R1)
    lora_rank: int = 0  # rank of the adapters that are trained; 0 trains the weights themselves
    optimizer: str = "adamw_torch"  # a name of transformers' own, such as adamw_torch or adamw_8bit
    checkpointing: bool = False  # compute activations again rather than keep them: less memory, more time
    vllm: bool = False  # sample the answers with vLLM, which must be installed
    save_steps: int = 50  # steps from one checkpoint to the next, which is what a kill may cost
    seed: Seed = 0  # what random numbers start from
    bf16: bool = True  # compute in bfloat16 where the machine is faster in it
    overwrite: Switch = False  # replace a finished result that is at --out


def reward_functions(settings: CheckpointSettings) -> list[Callable[..., list[float]]]:
    """The terms as TRL calls and logs them, in the order of RewardWeights.

    They read the token ids: TRL's own text has lost the box tokens, which are special in Qwen2-VL's tokenizer.
    """

    def named(term: str) -> Callable[..., list[float]]:
        def reward(
            completion_ids: list[list[int]], record: list[Record], mode: list[Mode], log_metric: Any, **others: Any
        ) -> list[float]:
            values = []
            for ids, wanted, how in zip(completion_ids, record, mode, strict=True):
                text = settings.tokenizer.decode(ids, skip_special_tokens=False)
                finished = text.endswith((END_OF_TURN, END_OF_TEXT))
                about = text, wanted.boxes, wanted.sizes, settings.answer_format
                resized = settings.resized(wanted.sizes)
                terms = score(*about, how, finished=finished, resized=resized, reasoning=wanted.thinking)
                values.append(float(attrgetter(term)(terms)))
                log_metric(f"{term}/{how}", values[-1])
            return values

        reward.__name__ = term
        return reward

    return [named(term) for term in TERMS]


def read_wanted(data: Path) -> tuple[list[Record], list[str]]:
    """The records that can be rewarded, and lines that say how many there are and why others are not."""
    tally = Tally()
    good = list(keep_good(keep_measured(read_records(data)), tally))
    records = [record for record in good if record.kind != "understanding"]
    if not records:
        raise GemvgError(f"{data} has no record with boxes; GRPO has nothing to reward")
    return records, [*tally.lines(), f"{len(good) - len(records)} of them left out: answered in words, not in boxes"]


def train(run: GrpoSettings) -> None:
    """Run (or resume) the whole stage and write the checkpoint folder."""
    if run.generations < 2 or min(run.steps, run.batch, run.device_batch, run.max_new_tokens, run.save_steps) < 1:
        raise GemvgError("--generations must be at least 2, and every other count at least 1")
    if not 0 <= run.cot_share <= 1:
        raise GemvgError(f"--cot-share must be between 0 and 1, not {run.cot_share}")
    if run.thought_weight < 0:
        raise GemvgError(f"--thought-weight must be at least 0, not {run.thought_weight}")
    if not 0 <= run.min_spread < 1:
        raise GemvgError(f"--min-spread must be at least 0 and below 1, not {run.min_spread}")
    for name, known in (("reward_scale", get_args(Scale)), ("schedule", get_args(Schedule))):
        if (value := getattr(run, name)) not in known:
            raise GemvgError(f"--{name.replace('_', '-')} must be one of {', '.join(known)}, not {value!r}")
    if run.vllm and not find_spec("vllm"):
        raise GemvgError("--vllm needs vllm, which is not installed: `pip install --group train-gpu`")
    check_out(run)
    settings = read_trainable(run.model)
    config = trainer_config(run)  # before the model: under DeepSpeed's ZeRO-3 it decides how weights are loaded
    records, lines = read_wanted(run.data)
    if config.process_index == 0:
        print("\n".join(lines), file=sys.stderr)
    with working(run) as work:
        trainer = make_trainer(run, config, settings, records)
        trainer.train(resume_from_checkpoint=last_checkpoint(work))
        finish(trainer, run, "reward")


def make_trainer(
    run: GrpoSettings, config: GRPOConfig, settings: CheckpointSettings, records: Sequence[Record]
) -> GroundingGRPOTrainer:
    """The trainer with its model, data and rewards."""
    model = load_qwen2_vl(run.model)
    model.model.visual.requires_grad_(not run.freeze_vision)
    return GroundingGRPOTrainer(
        difficulty=run.difficulty,
        min_spread=run.min_spread,
        learn_boxes=run.learn_boxes,
        answer_format=settings.answer_format,
        model=model,
        reward_funcs=reward_functions(settings),
        args=config,
        train_dataset=group_dataset(records, settings, run.steps * run.batch, run.cot_share, run.seed),
        processing_class=group_processor(run.model, settings),
        peft_config=lora(run.lora_rank),
    )


def trainer_config(run: GrpoSettings) -> GRPOConfig:
    """The run as TRL takes it: on-policy, one update a generation, every token of the kept groups counting the same."""
    held = run.device_batch * int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun and accelerate launch set it
    if run.batch * run.generations % held:
        raise GemvgError(
            f"{run.batch} groups of {run.generations} answers cannot be shared out {held} at a time; "
            "change --batch, --generations or --device-batch"
        )
    weights = astuple(RewardWeights(thought=run.thought_weight))
    return GRPOConfig(
        output_dir=str(work_folder(run.out)),
        max_steps=run.steps,
        per_device_train_batch_size=run.device_batch,
        gradient_accumulation_steps=run.batch * run.generations // held,
        num_generations=run.generations,
        max_completion_length=run.max_new_tokens,
        temperature=run.temperature,
        beta=run.beta,
        reward_weights=[weight / sum(weights) for weight in weights],
        scale_rewards=run.reward_scale,
        learning_rate=run.learning_rate,
        lr_scheduler_type=run.schedule,
        optim=run.optimizer,
        bf16=run.bf16 and bfloat16_pays(),
        use_cpu=not torch.cuda.is_available(),
        activation_checkpointing=run.checkpointing,
        use_vllm=run.vllm,
        vllm_mode="colocate",  # a server of vLLM's would want prompts that are expanded
        shuffle_dataset=False,  # drawn already
        save_steps=run.save_steps,
        save_total_limit=2,
        logging_steps=1,
        report_to=["tensorboard"],
        seed=run.seed,
    )


def main() -> None:
    """Command line; see the module's first lines."""
    run_stage("train.grpo", GrpoSettings, "GRPO on grounding records.", train)


if __name__ == "__main__":
    main()
