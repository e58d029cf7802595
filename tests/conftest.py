"""Settings and tiny bundles shared by all tests. Heavy imports wait for the first test that needs them."""

from __future__ import annotations

import os
import resource
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may ask a hub, before transformers reads this
# The first example of a kind loads or builds things, so a deadline would only measure the machine.
settings.register_profile("gemvg", deadline=None)
settings.load_profile("gemvg")


SLOWEST = ("test_pipeline", "test_true_widths", "test_dialects", "test_engine_reading")
LARGEST = 4 * 2**30  # bytes that a process may hold, or the tests would not run on a laptop of 8 GB


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: several processes share the files in this order."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.stem not in SLOWEST, item.path not in slow))


def used() -> tuple[float, int]:
    """CPU seconds of this process and all that it started and saw end, and the bytes that the largest of them held."""
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    unit = 1 if sys.platform == "darwin" else 1024
    return sum(one.ru_utime + one.ru_stime for one in own), unit * max(one.ru_maxrss for one in own)


@pytest.hookimpl(trylast=True)  # after xdist has seen its processes end
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail where a process grew too large."""
    if used()[1] > LARGEST and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what the run took."""
    seconds, held = used()
    terminalreporter.write_line(f"{seconds / 60:.1f} CPU minutes; the largest process held {held / 1e9:.2f} GB.")
    if held > LARGEST:
        terminalreporter.write_line(f"That is more than {LARGEST / 1e9:.2f} GB: the run fails.", red=True)


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tiny Qwen2-VL with random weights as transformers' model, and its bundle; it writes nonsense without end."""
    from tests.checkpoints import write_checkpoint

    folder = tmp_path_factory.mktemp("random")
    model = write_checkpoint(folder / "checkpoint")
    return model, export_bundle(folder)


@pytest.fixture(scope="session")
def fixed_answer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a model that answers every question with the box <loc_8><loc_16><loc_24><loc_40> in Image-2."""
    answer = "Image-2: <|box_start|><loc_8><loc_16><loc_24><loc_40><|box_end|>"
    return write_fixed_answer(tmp_path_factory.mktemp("fixed"), answer)


def write_fixed_answer(folder: Path, answer: str, **answer_format: Any) -> Path:
    """The bundle of a model that answers every question so, in 41 locations; no token may come twice.

    Attention and feed-forward parts are switched off, and the head follows each token by the next one of the answer.
    """
    import torch

    from tests.checkpoints import edit_json, write_checkpoint
    from tests.tokenizers_small import small_tokenizer

    checkpoint = folder / "checkpoint"
    model = write_checkpoint(checkpoint)
    tokenizer = small_tokenizer(locations=41)
    # The prompt ends with a new line.
    chain = tokenizer.encode(f"\n{answer}<|im_end|>", add_special_tokens=False).ids
    assert len(set(chain)) == len(chain)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.language_model.norm.weight.fill_(1)
        model.lm_head.weight.zero_()
        embeddings = model.model.language_model.embed_tokens.weight
        for token, following in pairwise(chain):
            model.lm_head.weight[following] = embeddings[token]
    model.save_pretrained(checkpoint)
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    written = {"coordinates": "locations", "locations": 41, **answer_format}
    edit_json(checkpoint / "config.json", grounding={"answer": written})
    return export_bundle(folder)


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    """Two files, the second of 400 x 200 pixels; the model of `fixed_answer` finds a box in that one."""
    from PIL import Image

    files = [str(tmp_path / "left.png"), str(tmp_path / "right.jpg")]
    Image.new("RGB", (80, 40), "teal").save(files[0])
    Image.new("RGB", (400, 200), "gold").save(files[1])
    return files


def export_bundle(folder: Path) -> Path:
    """`folder`/checkpoint -> `folder`/bundle."""
    from export.to_onnx import main as export

    assert export([str(folder / "checkpoint"), str(folder / "bundle")]) == 0
    return folder / "bundle"
