"""GRPO end to end at tiny scale: what TRL computes for our groups, what is dropped, and a kill that changes nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gemvg_edge.answer import AnswerFormat
from gemvg_edge.boxes import Box
from gemvg_edge.errors import GemvgError
from gemvg_edge.images import load_image, patchify, resize
from gemvg_edge.prompt import END_OF_TURN, encode, encode_prefix, encode_query
from tests.checkpoints import write_checkpoint
from tests.training import StopAt, weights
from train import grpo
from train.checkpoint import read_settings
from train.data.record import Record, read_records, write_records
from train.grpo import GrpoSettings, main, make_trainer, train, trainer_config
from train.grpo_trainer import GroundingGRPOTrainer, has_spread, in_boxes, merged
from train.rewards import Terms
from train.small_model import write_small_model

# TRL 1.16 still asks transformers 5.23 under the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> GrpoSettings:
    folder, rng = tmp_path_factory.mktemp("grpo"), np.random.default_rng(0)
    write_checkpoint(folder / "start")
    records = []
    for k, pictures in enumerate((1, 2, 3, 1)):
        paths = [folder / f"{k}-{i}.png" for i in range(pictures)]
        for i, path in enumerate(paths):
            Image.fromarray(rng.integers(0, 256, (60, 90 - 20 * i, 3), dtype=np.uint8)).save(path)
        sizes = tuple((90 - 20 * i, 60) for i in range(pictures))
        records.append(Record(tuple(paths), sizes, f"mug {k}", (Box(0, 9, 6, 45, 30),), "referential", "test"))
    write_records(records, folder / "records.jsonl")
    return GrpoSettings(
        model=folder / "start", data=folder / "records.jsonl", out=folder / "out", steps=4, batch=2, generations=4,
        device_batch=4, learning_rate=1e-3, max_new_tokens=6, save_steps=2, bf16=False,
    )  # fmt: skip


def by_letters(text: str, *args: Any, **kwargs: Any) -> Terms:
    """A reward that random answers differ in."""
    return Terms(format=len(text) % 2, iou=len(set(text)) / 50, image=text.count("a") / 50, count=0.0)


def trainer_of(run: GrpoSettings) -> GroundingGRPOTrainer:
    records = [record for record in read_records(run.data) if isinstance(record, Record)]
    trainer = make_trainer(run, trainer_config(run), read_settings(run.model), records)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps  # as its loop would
    return trainer


def one_batch(trainer: GroundingGRPOTrainer) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows = next(iter(trainer.get_train_dataloader()))
    return rows, trainer._generate_and_score_completions(rows)


def changed(run: GrpoSettings, **settings: Any) -> GrpoSettings:
    """The same run under another name."""
    return replace(run, out=run.out.with_name("-".join(map(str, settings.values()))), **settings)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_killed_run_ends_where_an_unbroken_one_does(
    run: GrpoSettings, lora_rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpo, "score", by_letters)
    run = changed(run, lora_rank=lora_rank)
    train(run)
    unbroken, before = weights(run.out), weights(run.model)
    assert unbroken.keys() == before.keys()
    moved = {name for name, start in before.items() if not torch.equal(unbroken[name], start)}
    assert any("language_model.layers" in name for name in moved)
    assert not any("visual" in name for name in moved)

    broken = replace(run, out=run.out.with_name(f"broken {lora_rank}"))
    trainer = GroundingGRPOTrainer
    with monkeypatch.context() as patch:
        patch.setattr(grpo, "GroundingGRPOTrainer", lambda **kwargs: trainer(callbacks=[StopAt(3)], **kwargs))
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    assert not broken.out.exists()
    half = broken.out.with_name(broken.out.name + ".work") / "checkpoint-9"  # a second kill, while it was saving
    half.mkdir()
    (half / "trainer_state.json").write_text('{"global_step"')
    with pytest.raises(GemvgError, match="other settings"):
        train(replace(broken, learning_rate=1.0))
    train(broken)
    for name, tensor in weights(broken.out).items():
        torch.testing.assert_close(tensor, unbroken[name], atol=1e-6, rtol=1e-5, msg=name)
    logs = [json.loads((folder / "training.json").read_text())["log"] for folder in (run.out, broken.out)]
    assert [entry["reward"] for entry in logs[0][:4]] == pytest.approx([entry["reward"] for entry in logs[1][:4]])
    assert logs[0][0]["reward"] > 0


def test_a_run_killed_after_its_last_step_is_only_written(run: GrpoSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    run = changed(run, seed=5)
    monkeypatch.setattr(grpo, "score", by_letters)
    with monkeypatch.context() as patch:
        patch.setattr(grpo, "finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(run)
    monkeypatch.setattr(GroundingGRPOTrainer, "training_step", None)
    train(run)
    start = weights(run.model)
    assert any(not torch.equal(tensor, start[name]) for name, tensor in weights(run.out).items())


def test_probabilities_are_those_of_the_runtimes_prompt(run: GrpoSettings) -> None:
    """Prompts of one and of three pictures lie padded in one batch; each must score as it does alone."""
    trainer, settings = trainer_of(changed(run, seed=2)), read_settings(run.model)
    rows, output = one_batch(trainer)
    assert len({len(row["record"].images) for row in rows}) == 2
    assert len({row["mode"] for row in rows}) == 2
    named = {key: output[key] for key in ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")}
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], torch.ones_like(output["completion_ids"])], dim=1)
    length = output["completion_ids"].shape[1]
    with torch.no_grad():
        found, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, length, **named)
    for k, row in enumerate(rows):
        pairs = [patchify(resize(load_image(p), settings.preprocessing), settings.preprocessing) for p in row["record"].images]  # noqa: E501  # fmt: skip
        grids = [grid for _, grid in pairs]
        prefix = encode_prefix(settings.tokenizer, settings.template, grids, 2)
        think = row["mode"] == "cot"
        query = encode_query(settings.tokenizer, settings.template, settings.answer_format, row["record"].query, think)
        prompt = torch.from_numpy(np.concatenate([prefix, query]))
        sequence = torch.cat([prompt, output["completion_ids"][k]])[None]
        with torch.no_grad():
            logits = trainer.model(
                input_ids=sequence,
                pixel_values=torch.from_numpy(np.concatenate([patches for patches, _ in pairs])),
                image_grid_thw=torch.tensor(grids),
                mm_token_type_ids=(sequence == settings.image_token_id).int(),
            ).logits[0, len(prompt) - 1 : -1]
        wanted = torch.log_softmax(logits, dim=-1).gather(1, output["completion_ids"][k][:, None])[:, 0]
        torch.testing.assert_close(found[k], wanted, atol=1e-4, rtol=1e-4)


def group_scores(values: list[list[float]]) -> Any:
    """Scores that go through the groups' answers in turn, whatever was said: the IoU term of each."""
    flat = iter([value for _ in range(5) for group in values for value in group])  # TRL asks once a term

    def scored(*args: Any, **kwargs: Any) -> Terms:
        return Terms(format=0.0, iou=next(flat), image=0.0, count=0.0)

    return scored


def test_a_group_without_spread_counts_for_nothing(run: GrpoSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo, "score", group_scores([[0.3, 0.3, 0.3, 0.3], [0.1, 0.2, 0.2, 0.2]]))
    trainer = trainer_of(changed(run, seed=1))
    _, output = one_batch(trainer)
    mask, advantages = output["completion_mask"], output["advantages"]
    assert not mask[:4].any()
    assert mask[4:].any(dim=1).all()
    assert output["num_items_in_batch"] == mask.sum()
    assert not advantages[:4].any()
    assert advantages[4] < 0 < advantages[5]
    assert trainer._metrics["train"]["groups/dropped"] == [0.5]

    both = {**output, "ref_per_token_logps": torch.zeros_like(mask, dtype=torch.float32)}
    loss = trainer._compute_loss(trainer.model, both)
    both["ref_per_token_logps"][:4] = -3.0  # a dropped group is in no KL term either
    torch.testing.assert_close(trainer._compute_loss(trainer.model, both), loss)


def test_difficult_groups_weigh_more(run: GrpoSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [[0.0, 0.1, 0.0, 0.1], [0.8, 0.9, 0.8, 0.9]]
    advantages = []
    for difficulty in (False, True):
        monkeypatch.setattr(grpo, "score", group_scores(values))
        advantages.append(one_batch(trainer_of(changed(run, difficulty=difficulty)))[1]["advantages"])
    factors = (advantages[1] / advantages[0]).tolist()
    assert factors == pytest.approx([np.exp(1 - 0.05)] * 4 + [np.exp(1 - 0.85)] * 4)


def test_a_batch_scale_keeps_small_differences_small(run: GrpoSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [[0.0, 1.0, 0.0, 1.0], [0.80, 0.81, 0.80, 0.81]]
    sizes = {}
    for scale in ("group", "batch"):
        monkeypatch.setattr(grpo, "score", group_scores(values))
        advantages = one_batch(trainer_of(changed(run, reward_scale=scale)))[1]["advantages"].abs()
        sizes[scale] = (advantages[:4].mean() / advantages[4:].mean()).item()
    assert sizes == pytest.approx({"group": 1.0, "batch": 100.0}, rel=0.1)


def test_spread_is_more_than_rounding() -> None:
    rewards = torch.tensor([[0.3, 0.1 + 0.2, 0.3], [0.3, 0.3, 0.31], [0.0, 0.0, 0.0]])
    assert has_spread(rewards).tolist() == [False, True, False]
    assert has_spread(rewards, least=0.02).tolist() == [False, False, False]


def test_boxes_can_be_left_out_of_the_loss(run: GrpoSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo, "score", by_letters)
    _, whole = one_batch(trainer_of(changed(run, seed=8)))
    trainer = trainer_of(changed(run, seed=8, learn_boxes=False))
    start, end = trainer._box_ids = tuple(whole["completion_ids"][0, :2].tolist())
    _, words = one_batch(trainer)
    left = words["completion_mask"] * words["tool_mask"]
    assert words["num_items_in_batch"] == left.sum()
    assert "tool_mask" not in whole
    inside = in_boxes(words["completion_ids"], start, end)
    assert inside.any()
    assert torch.equal(words["tool_mask"].bool(), ~inside)


def test_what_lies_in_boxes() -> None:
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(0, 5, (40, 12)))  # 1 starts a box, 2 ends it, well-formed or not
    for row, found in zip(ids.tolist(), in_boxes(ids, 1, 2).tolist(), strict=True):
        inside, wanted = False, []
        for token in row:
            wanted.append(inside)
            inside = (inside or token == 1) and token != 2
        assert found == wanted


def test_boxes_without_marks_are_left_out_of_the_loss_by_their_locations(
    run: GrpoSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpo, "score", by_letters)
    trainer = trainer_of(changed(run, seed=8, learn_boxes=False))
    trainer._locations = range(40, 300)  # of the random model's words
    _, words = one_batch(trainer)
    inside = (words["completion_ids"] >= 40) & (words["completion_ids"] < 300)
    assert inside.any()
    assert not inside.all()
    assert torch.equal(words["tool_mask"].bool(), ~inside)


def test_answers_are_sampled_with_the_adapters_folded_in(run: GrpoSettings) -> None:
    trainer = trainer_of(changed(run, lora_rank=2, seed=7))
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)  # as they are before the first step they change nothing
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    ids = torch.arange(5)[None]
    with torch.no_grad():
        apart = trainer.model(input_ids=ids).logits
        with merged(trainer.model):
            folded = trainer.model(input_ids=ids).logits
        with trainer.model.disable_adapter():
            assert not torch.allclose(apart, trainer.model(input_ids=ids).logits, atol=1e-3)
    torch.testing.assert_close(folded, apart, atol=1e-5, rtol=1e-5)
    for name, weight in trainer.model.named_parameters():
        torch.testing.assert_close(weight, before[name], atol=1e-6, rtol=0, msg=name)


def test_rewards_read_the_tokens_and_know_what_was_cut_off(run: GrpoSettings) -> None:
    settings = replace(read_settings(run.model), answer_format=AnswerFormat())
    record = next(record for record in read_records(run.data) if isinstance(record, Record))
    right = "Image-1: <|box_start|>(100,100),(500,500)<|box_end|>"
    ids = [encode(settings.tokenizer, text) for text in (right + END_OF_TURN, right, "None" + END_OF_TURN)]
    logged: list[str] = []
    rewards = {
        reward.__name__: reward(ids, [record] * 3, ["direct"] * 3, log_metric=lambda name, value: logged.append(name))
        for reward in grpo.reward_functions(settings)
    }
    ended, right_one = [1, 0, 1], [1, 0, 0]
    wanted = {"format": ended, "iou": right_one, "image": right_one, "count": right_one, "thought": ended}
    assert rewards == wanted
    assert logged == [f"{term}/direct" for term in rewards for _ in range(3)]


def test_it_learns_what_is_rewarded(run: GrpoSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewarded for short tokens, it comes to write them."""
    monkeypatch.setattr(grpo, "score", lambda text, *a, **k: Terms(0.0, 1 / max(1, len(text)), 0.0, 0.0))
    run = changed(run, steps=25, beta=0.0, learning_rate=3e-3, freeze_vision=False)
    train(run)
    rewards = [entry["reward"] for entry in json.loads((run.out / "training.json").read_text())["log"][:25]]
    assert np.mean(rewards[-5:]) > 1.3 * np.mean(rewards[:5])


def test_the_learning_rate_follows_its_schedule(run: GrpoSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo, "score", by_letters)
    rates = {}
    for schedule in ("constant", "linear"):
        train(way := changed(run, schedule=schedule, steps=3))
        log = json.loads((way.out / "training.json").read_text())["log"][:3]
        rates[schedule] = [entry["learning_rate"] / run.learning_rate for entry in log]
    assert rates["constant"] == pytest.approx([1, 1, 1])
    assert rates["linear"] == pytest.approx([1, 2 / 3, 1 / 3])


def test_what_cannot_be_run_is_refused(
    run: GrpoSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong in (replace(run, generations=1), replace(run, steps=0), replace(run, cot_share=2)):
        with pytest.raises(GemvgError, match=r"--(generations|cot-share) must"):
            train(wrong)
    with pytest.raises(GemvgError, match="--min-spread must be at least 0 and below 1, not 1"):
        train(replace(run, min_spread=1))
    with pytest.raises(GemvgError, match="--reward-scale must be one of group, batch, none, not 'std'"):
        train(replace(run, reward_scale="std"))  # type: ignore[arg-type]
    with pytest.raises(GemvgError, match="--schedule must be one of constant, linear, cosine, not 'wsd'"):
        train(replace(run, schedule="wsd"))  # type: ignore[arg-type]
    with pytest.raises(GemvgError, match="cannot be shared out 3 at a time"):
        train(replace(run, device_batch=3))
    monkeypatch.setattr(grpo, "find_spec", lambda name: None)
    with pytest.raises(GemvgError, match="vllm, which is not installed"):
        train(replace(run, vllm=True))
    words = Record((Path("a.png"),), ((9, 9),), "what is it?", (), "understanding", "test", words="a mug")
    write_records([words], tmp_path / "words.jsonl")
    with pytest.raises(GemvgError, match="no record with boxes"):
        train(replace(run, data=tmp_path / "words.jsonl"))
    gone, out = tmp_path / "gone.jsonl", tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["grpo", f"--model={run.model}", f"--data={gone}", f"--out={out}"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "gone.jsonl: no such file" in capsys.readouterr().err
    assert not out.exists()


def test_the_small_model_from_the_command_line(
    run: GrpoSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_small_model(tmp_path / "small", seed=0)
    flags = ["--steps=1", "--batch=1", "--generations=2", "--device-batch=2", "--max-new-tokens=3", "--cot-share=1"]
    folders = [f"--model={tmp_path / 'small'}", f"--data={run.data}", f"--out={tmp_path / 'out'}"]
    monkeypatch.setattr("sys.argv", ["grpo", *folders, *flags])
    main()
    read_settings(tmp_path / "out")
    assert weights(tmp_path / "out").keys() == weights(tmp_path / "small").keys()
    assert json.loads((tmp_path / "out" / "training.json").read_text())["cot_share"] == 1
