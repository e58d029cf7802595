"""What every training stage shares: a command line made from its settings, a folder to work in, one that comes out.

A stage writes its checkpoints to `OUT.work` and OUT itself only at the end, all or nothing. Started again with the same
settings and inputs, a killed stage goes on from its last checkpoint; with others it is refused. tyro makes the command
line, since it reads meaning, type, choices and default of a flag from the one place where the setting is written.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from gemvg_edge.command import command, finite_number, one_line, seed_number, whole_number
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file, refuse_inputs
from train.checkpoint import CONFIG
from train.curves import draw_curves
from train.hub import checkpoint_folder
from train.load import DENSE_PREFIX, check_finite, load_qwen2_vl
from train.output_folder import CONTENTS, REPLACES, WORK, check_target, fingerprint, left_work, marked, replaced_by
from train.result import keep_grounding, set_budget, write_weights
from train.rewrite import DENSE_HEAD, RECORD, write_json, writing

PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
LOGGED = 40  # entries of the log that training.json keeps, about
CHECKPOINTS = ("model", "teacher", "base")  # the settings that may name a checkpoint by its hub id
UNRECORDED = ("overwrite", "ray", "workers")  # the settings that say nothing of the result

Settings = TypeVar("Settings")


def _reader(read: Callable[[str], Any], shown: str) -> PrimitiveConstructorSpec[Any]:
    """How tyro reads one word, by a function that was made for argparse."""

    def from_words(words: list[str]) -> Any:
        try:
            return read(words[0])
        except argparse.ArgumentTypeError as error:
            raise ValueError(str(error)) from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=shown,
        instance_from_str=from_words,
        is_instance=lambda value: True,
        str_from_instance=lambda value: ["none" if value is None else str(value)],
    )


# tyro's own readers take NaN, and numbers that the libraries below count wrongly.
READERS = {
    int: _reader(whole_number, "N"),
    float: _reader(finite_number, "N"),
    str: _reader(str, "NAME"),
    Path: _reader(Path, "PATH"),
    Path | None: _reader(Path, "PATH"),
    int | None: _reader(whole_number, "N"),
    str | None: _reader(str, "NAME"),
}
Seed = Annotated[int, _reader(seed_number, "N")]  # what random numbers start from
Switch = tyro.conf.FlagCreatePairsOff[bool]  # off unless its flag is given


def parse_settings(settings: type[Settings], name: str, description: str) -> Settings:
    """Read the command line of the command `name`: a flag a field of the dataclass, its help the comment there."""
    readers = ConstructorRegistry()

    @readers.primitive_rule
    def read(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        return READERS.get(info.type)

    return tyro.cli(settings, prog=f"python -m {name}", description=description, registry=readers)


def run_stage(name: str, settings: type[Settings], description: str, train: Callable[[Settings], None]) -> None:
    """A stage's whole command line, as `gemvg_edge.command` has it."""
    command(name)(lambda: train(from_hub(parse_settings(settings, name, description))))()


def from_hub(run: Settings) -> Settings:
    """The same run with the folders of checkpoints that were given by a hub id."""
    given: dict[str, Any] = {name: value for name, value in vars(run).items() if name in CHECKPOINTS}
    return replace(run, **{name: checkpoint_folder(path) for name, path in given.items() if path})  # type: ignore[type-var]


def usable_device(name: str) -> str:
    """What torch calls a device, `auto` too; GemvgError for one that it cannot compute on here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        raise GemvgError(f"--device {name} cannot be used here ({one_line(error)[:200]}); give cpu or cuda") from None
    return name


def settings_json(run: Any) -> dict[str, Any]:
    """A run's settings as plain JSON values."""
    settings = {key: value for key, value in vars(run).items() if key not in UNRECORDED}
    return {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}


def bfloat16_pays() -> bool:
    """Whether this machine computes faster in bfloat16: any GPU, and CPUs with AVX-512.

    A CPU without it turns every bfloat16 product into a plain loop: twenty times slower than float32 on a Zen 3.
    """
    return torch.cuda.is_available() or torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def work_folder(out: Path) -> Path:
    """Where a stage that will write `out` keeps its checkpoints meanwhile."""
    real = Path(os.path.realpath(out))  # gives `.` and links their name
    return real.with_name(real.name + ".work")


@contextmanager
def working(run: Any) -> Iterator[Path]:
    """The work folder of a run: kept where the run is killed or fails, and taken away when all went well.

    GemvgError, before anything is written, where OUT may not be; and where the folder is another run's: of other
    settings, or of inputs that have changed since. Of several processes the first does all that.
    """
    work = work_folder(run.out)
    if os.environ.get("RANK", "0") != "0":
        yield work
        return
    paths = check_out(run)
    replaces = {REPLACES: fingerprint(run.out)} if run.overwrite else {}
    with marked(work, {"format": WORK, **_identity(run, paths), **replaces}, keep=True):
        try:
            yield work
        except (SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
                raise
            raise unwritten(run.out, error) from None


def unwritten(out: Path, error: Exception) -> GemvgError:
    """The sentence for a run that the disk stopped."""
    kept = work_folder(out)
    return GemvgError(
        f"{out} cannot be written ({one_line(error)}); what is done is kept in {kept}, make room and start again"
    )


def check_out(run: Any) -> list[Path]:
    """The paths that a run reads; GemvgError where OUT or its work folder would destroy one, or something not ours.

    A finished result may be replaced with `--overwrite`, and where it is this run's own, which was killed after it.
    """
    paths = [value for name, value in vars(run).items() if isinstance(value, Path) and name != "out"]
    check_target(run.out, CONFIG, paths, overwrite=may_replace(run))
    for path in paths:
        if Path(os.path.realpath(path)) in Path(os.path.realpath(run.out)).parents:
            raise GemvgError(f"--out {run.out} lies in {path}, which is read; give a place beside it")
    refuse_inputs(work_folder(run.out), paths)
    return paths


def may_replace(run: Any) -> bool:
    """Whether what is at OUT may go: it was said so when the run began, or this very run wrote it before a kill."""
    if run.overwrite or not left_work(work := work_folder(run.out)):
        return bool(run.overwrite)
    if (named := replaced_by(work)) and named == fingerprint(run.out):
        return True
    try:
        record = json.loads((run.out / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    mine = {key: value for key, value in settings_json(run).items() if key != "device"}  # `auto` is resolved meanwhile
    return isinstance(record, dict) and all(record.get(key) == value for key, value in mine.items())


def _identity(run: Any, paths: Sequence[Path]) -> dict[str, Any]:
    """What makes a run the same as an earlier one: settings, with whole paths, and what lies there."""
    settings = {key: value for key, value in vars(run).items() if key not in UNRECORDED}
    whole = {key: os.path.realpath(value) if isinstance(value, Path) else value for key, value in settings.items()}
    # Of each process's share of the weights and its place in the data no other number can make use.
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    whole["num_processes"] = processes if processes > 1 else None
    return {**whole, **{f"{CONTENTS}{os.path.realpath(path)}": fingerprint(path) for path in paths}}


def end_with_parent() -> None:
    """Have a data loader's process end when the one that it works for is killed.

    By itself it would wait for ever to hand over a batch that nobody takes, and keep the run's folder and memory.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def last_checkpoint(work: Path) -> str | None:
    """The newest checkpoint that was written to its end: Trainer writes trainer_state.json last.

    transformers' get_last_checkpoint takes the newest folder, and a run killed while saving could never go on.
    """
    by_step = sorted(work.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]), reverse=True)
    return next((str(folder) for folder in by_step if _is_whole(folder)), None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def lora(rank: int) -> Any:
    """LoRA on every linear layer of the decoder, or None; alpha twice the rank, as is common."""
    if not rank:
        return None
    from peft import LoraConfig

    layers = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers, task_type="CAUSAL_LM")


def load_weights(model: Any, checkpoint: str) -> None:
    """Put a Trainer checkpoint's weights into a Qwen2-VL model that is training.

    transformers 5.23 saves the hub's tensor names, and Trainer's own loader, which does not rename them back, would
    leave every weight random with no more than a warning. A dense head's are ours and saved as they are.
    """
    state = load_qwen2_vl(Path(checkpoint)).state_dict()
    model.load_state_dict(state | _tensors(Path(checkpoint), DENSE_PREFIX))


def _tensors(checkpoint: Path, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of a Trainer checkpoint whose names start so."""
    files = (load_file(file) for file in checkpoint.glob("model*.safetensors"))
    return {name: tensor for tensors in files for name, tensor in tensors.items() if name.startswith(prefix)}


def load_dense_head(head: torch.nn.Module, checkpoint: Path) -> None:
    """Go on with the dense head that the stage before left beside its checkpoint, if it did."""
    file = checkpoint / DENSE_HEAD
    if is_file(file):
        try:
            head.load_state_dict(load_file(file))
        except (RuntimeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise GemvgError(
                f"{file} is no dense head for this model ({reason}); delete it to begin a new one"
            ) from None
        check_finite(head, file)


def finish(trainer: Any, run: Any, figure: str, dtype: str = "float32", max_pixels: int | None = None) -> None:
    """Write the stage's checkpoint folder with its learning curves, all or nothing.

    `figure` is what the log's entries of training have, `dtype` that of weights that adapters are merged into,
    `max_pixels` the budget of a picture that was trained with, if not the model's. A dense head, which only training
    needs, goes into a file of its own for the next stage.
    """
    final = work_folder(run.out) / "final"
    if trainer.accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)  # a killed run's
    trainer.save_model(str(final))  # by every process: it gathers weights that lie spread over them
    if not trainer.accelerator.is_main_process:
        return
    log = [entry for entry in trainer.state.log_history if figure in entry]
    with writing(run.model, run.out, overwrite=may_replace(run)) as folder:
        head = write_weights(final, run.model, folder, dtype)
        keep_grounding(folder)
        set_budget(folder, max_pixels)
        if head:
            (folder / DENSE_HEAD).parent.mkdir(exist_ok=True)
            save_file(head, folder / DENSE_HEAD)
        write_json(folder / RECORD, {**settings_json(run), "log": log[:: max(1, len(log) // LOGGED)]})
        draw_curves(log, folder / "curves.png")
