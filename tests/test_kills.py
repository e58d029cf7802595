"""A kill at each change of a name on the disk, over an older result: old, new, or mended by the rerun."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from export.bundle_writer import Recipe, write_bundle
from export.weights import Scheme
from gemvg_edge.bundle import open_bundle
from gemvg_edge.errors import GemvgError
from quantize import gptq
from quantize.checkpoint import open_checkpoint
from tests.checkpoints import TINY, write_checkpoint
from tests.killed import Killed, every_kill
from train import sft, stage
from train.small_model import write_small_model
from train.student import make_student
from train.world.render import render

SMALL = {
    "text_config": TINY["text_config"] | {"num_hidden_layers": 1, "intermediate_size": 96},
    "vision_config": TINY["vision_config"] | {"depth": 1},
}
FOREIGN = {".git/config": b"[core]", "README.md": b"card", "lost+found/1": b""}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    write_checkpoint(folder / "checkpoint", SMALL)
    return folder / "checkpoint"


def digests(folder: Path) -> dict[str, str]:
    """Of every file of a folder but the marks of ours and what others keep there."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_relative_to(folder / ".git")]
    names = {str(path.relative_to(folder)): path for path in files}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in names.items()
        if name not in (*FOREIGN, "quantization.json") and not name.startswith(".gemvg-edge")  # that has times
    }


def put_foreign(folder: Path) -> None:
    for name, content in FOREIGN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def check_kills(
    target: Path,
    write_old: Callable[[], object],
    write_new: Callable[[], object],
    is_whole: Callable[[], bool],
    before: Callable[[], object] = lambda: None,
) -> Iterator[int]:
    """Kill `write_new`, which needs what `before` makes, at each change, over what `write_old` wrote beside others'."""
    before()
    write_new()
    new = digests(target)
    shutil.rmtree(target)
    before()
    write_old()
    put_foreign(target)
    old, kept = digests(target), target.with_name("kept")
    shutil.copytree(target, kept)
    outcomes = []

    def start() -> None:
        for path in target.parent.glob(f"{target.name}*"):
            shutil.rmtree(path)
        shutil.copytree(kept, target)
        before()

    for number in every_kill(write_new, start):
        left = digests(target)
        outcomes.append("new" if left == new else "old" if left == old else "to be mended")
        assert is_whole() == (outcomes[-1] != "to be mended")
        yield number
        write_new()
        assert digests(target) == new
        assert all((target / name).read_bytes() == content for name, content in FOREIGN.items())
        assert {path.name for path in target.parent.glob(f"{target.name}*")} == {target.name}
        assert not (target / ".gemvg-edge.partial").exists()
    assert set(outcomes) == {"old", "to be mended", "new"}


def opens(read: Callable[[], object]) -> bool:
    try:
        read()
    except GemvgError:
        return False
    return True


def test_an_export_is_killed(checkpoint: Path, tmp_path: Path) -> None:
    opened, target = open_checkpoint(checkpoint), tmp_path / "bundle"
    int4 = Recipe(decoder=Scheme(4, 32))
    for _ in check_kills(
        target,
        lambda: write_bundle(opened, target, int4),
        lambda: write_bundle(opened, target, Recipe(), overwrite=True),
        lambda: opens(lambda: open_bundle(target)),
    ):
        pass


def test_gptq_is_killed(checkpoint: Path, tmp_path: Path) -> None:
    run = gptq.Settings(checkpoint, tmp_path / "int4", group_size=32, method="rtn", device="cpu", overwrite=True)
    for _ in check_kills(
        run.out,
        lambda: gptq.quantize(replace(run, bits=8)),
        lambda: gptq.quantize(run),
        lambda: opens(lambda: open_checkpoint(run.out)),
    ):
        pass


def test_the_finish_of_training_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From where the last step is done; up to there a run is resumed from its checkpoints (tests/test_sft.py)."""
    write_small_model(tmp_path / "whole", seed=1)
    make_student(tmp_path / "whole", tmp_path / "start", decoder_layers=1, vision_layers=1, intermediate=8)
    render(tmp_path / "data", first_seed=0, scenes=2, size=64, processes=1)
    run = sft.SftSettings(
        model=tmp_path / "start", data=tmp_path / "data", out=tmp_path / "out", steps=1, batch=1, questions=1,
        warmup_steps=0, bf16=False, save_steps=1, overwrite=True,
    )  # fmt: skip
    trained: list[Any] = []

    def note(*arguments: Any) -> None:
        trained[:] = arguments
        raise Killed

    monkeypatch.setattr(sft, "finish", note)
    # The drawing takes most of the time and is shown elsewhere.
    monkeypatch.setattr(stage, "draw_curves", lambda log, file: file.write_bytes(b"new"))
    with pytest.raises(Killed):
        sft.train(run)
    ready = shutil.copytree(tmp_path / "out.work", tmp_path / "ready")
    for path in (ready / "checkpoint-1").iterdir():  # each would be one more kill while the work is taken away
        if path.name != "trainer_state.json":
            path.unlink()

    def finish() -> None:
        with stage.working(run):
            stage.finish(*trained)

    def write_old() -> None:
        finish()
        (run.out / "curves.png").write_bytes(b"old")

    def make_ready() -> None:
        shutil.copytree(ready, tmp_path / "out.work", dirs_exist_ok=True)

    for _ in check_kills(
        run.out, write_old, finish, lambda: opens(lambda: open_checkpoint(run.out)), before=make_ready
    ):
        if not (tmp_path / "out.work" / "checkpoint-1").exists():
            make_ready()  # what was killed while it took its work away is trained anew
