"""Pictures unlike those of the training: told once, and not of the model's own."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from gemvg_edge import GemvgError, Grounder
from gemvg_edge.cli import main
from gemvg_edge.familiar import STATISTICS, Familiar, statistics, unfamiliar

IMAGES = sorted((Path(__file__).parents[1] / "examples" / "images").glob("*.png"))
PHOTOGRAPHS = sorted((Path(mpl.get_data_path()) / "sample_data").glob("*.jpg"))


@pytest.fixture(scope="module")
def grounder() -> Grounder:
    return Grounder.open(threads=1)


def test_the_shipped_model_knows_its_own_scenes(grounder: Grounder, caplog: pytest.LogCaptureFixture) -> None:
    assert grounder.manifest.familiar.pictures == 4
    with caplog.at_level(logging.WARNING, "gemvg_edge"):
        for k in range(0, len(IMAGES), 2):
            grounder.look(IMAGES[k : k + 2])
    assert caplog.text == ""


def test_photographs_and_too_many_pictures_are_told_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    photograph = str(PHOTOGRAPHS[0])
    assert main(["ground", photograph, "--query", "the hat", "--query", "the man"]) == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"gemvg: {photograph} is unlike the pictures of the training (")
    assert said.endswith("boxes may mean nothing (the model tabletop)\n")
    assert main(["ground", *map(str, IMAGES[:5]), "--query", "all balls"]) == 0
    assert "5 pictures were given, and the model was trained on at most 4 at once" in capsys.readouterr().err


def test_statistics_are_what_they_say() -> None:
    chessboard = np.kron(np.indices((8, 8)).sum(axis=0) % 2, np.ones((8, 8))) * 255
    found = statistics(Image.fromarray(chessboard.astype(np.uint8)).convert("RGB"))
    assert found["brightness"] == pytest.approx(0.5)
    assert found["contrast"] == pytest.approx(0.5)
    assert found["colour"] == 0
    assert found["detail"] == pytest.approx(7 / 63)
    red = statistics(Image.new("RGB", (50, 9), (255, 0, 0)))
    assert red == {"brightness": pytest.approx(1 / 3), "contrast": 0, "colour": 1, "detail": 0}


def test_a_model_that_says_nothing_knows_all() -> None:
    pictures = [Image.new("RGB", (9, 9))] * 50
    assert unfamiliar(pictures, Familiar()) is None
    assert unfamiliar(pictures[:2], Familiar(2, brightness=(0.5, 1.0))) == (
        "images[0] is unlike the pictures of the training (brightness 0, there 0.5 to 1)"
    )


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a number": ({"colour": 0.5}, "colour is 0.5, not two numbers from 0 to 1, the lower first"),
    "turned round": ({"detail": [0.5, 0.1]}, "detail is"),
    "past 1": ({"contrast": [0, 2]}, "contrast is"),
    "fewer than none": ({"pictures": -1}, "pictures is -1"),
}


@pytest.mark.parametrize("label", BAD)
def test_refuses_ranges(label: str) -> None:
    config, message = BAD[label]
    with pytest.raises(GemvgError, match=message):
        Familiar.from_config(config)


def test_ranges_survive_their_config(grounder: Grounder) -> None:
    known = grounder.manifest.familiar
    assert Familiar.from_config(json.loads(json.dumps(known.to_config()))) == known
    assert replace(known, pictures=0) != known
    assert len(STATISTICS) == 4


def test_a_checkpoint_is_told_what_it_was_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.checkpoints import write_checkpoint
    from train.checkpoint import read_settings
    from train.familiar import main as tell
    from train.rewrite import RECORD

    write_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / RECORD).write_text('{"steps": 1}')
    command = [
        "",
        str(tmp_path / "checkpoint"),
        str(tmp_path / "told"),
        "--data",
        str(IMAGES[0].parent),
        "--pictures",
        "3",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [*command, "--against", str(PHOTOGRAPHS[0].parent), str(IMAGES[0].parent)])
        tell()
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (tmp_path / "told" / RECORD).read_text() == '{"steps": 1}', "how it was trained is still true of it"
    known = read_settings(tmp_path / "told").familiar
    assert known.pictures == said["pictures"] == 3
    assert list(known.brightness) == said["brightness"]
    assert said["outside"] == {str(PHOTOGRAPHS[0].parent): 1.0, str(IMAGES[0].parent): 0.0}
    assert unfamiliar([Image.open(path).convert("RGB") for path in IMAGES[:3]], known) is None
