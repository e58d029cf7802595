"""The command `gemvg`: what it prints, and for every bad input exit code 2 and one sentence without a traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gemvg_edge import __version__, cli
from gemvg_edge.bundle import FILES, MANIFEST
from gemvg_edge.cli import main

QUERY = ["--query", "the red mug"]


@pytest.fixture
def ground(fixed_answer: Path, pictures: list[str]) -> Callable[..., int]:
    """`gemvg ground` on the two pictures, with more arguments."""
    return lambda *more: main(["ground", *pictures, *QUERY, "--bundle", str(fixed_answer), *map(str, more)])


def test_prints_one_line_a_box(
    ground: Callable[..., int], pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ground() == 0
    output = capsys.readouterr()
    box, times = output.out.splitlines()
    assert box == f"{pictures[1]}  x1=80 y1=80 x2=240 y2=200  1.00"
    assert times.startswith(tuple("0123456789"))
    assert times.endswith("tokens)")
    assert output.err == ""


def test_json_is_one_object_and_says_the_same(
    ground: Callable[..., int], pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ground("--json", "--threads", 1) == 0
    output = json.loads(capsys.readouterr().out)
    corners = {"x1": 80.0, "y1": 80.0, "x2": 240.0, "y2": 200.0}
    assert output["boxes"] == [{"image": 1, **corners, "label": "the red mug", "score": pytest.approx(1)}]
    assert [(image["name"], image["width"], image["height"]) for image in output["images"]] == [
        (pictures[0], 80, 40),
        (pictures[1], 400, 200),
    ]
    assert output["text"] == "Image-2: <|box_start|><loc_8><loc_16><loc_24><loc_40><|box_end|>"
    assert (output["thinking"], output["problem"], output["timings"]["answer_tokens"]) == ("", None, 12)


def test_draws(ground: Callable[..., int], tmp_path: Path) -> None:
    target = tmp_path / "found.png"
    assert ground("--draw", target) == 0
    with Image.open(target) as sheet:
        assert sheet.size == (80 + 8 + 400, 200)
        # The box is 80, 80, 240, 200 in the second picture, which starts 88 pixels from the left.
        assert sheet.getpixel((88 + 80, 150)) == (255, 0, 160)
        assert sheet.getpixel((88 + 160, 150)) != (255, 0, 160)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.png", "left.png", "right.jpg"]


@pytest.mark.parametrize("ending", [".jpg", ".WEBP", ".bmp"])
def test_draws_in_other_formats(ending: str, ground: Callable[..., int], tmp_path: Path) -> None:
    assert ground("--draw", tmp_path / f"found{ending}") == 0
    with Image.open(tmp_path / f"found{ending}") as sheet:
        assert sheet.width == 488


DRAWN_ONTO: dict[str, tuple[str, list[str], str]] = {
    "an input": ("left.png", ["--overwrite"], "left.png, which is read; give another place"),
    "an input by another way": ("sub/../left.png", ["--overwrite"], "left.png, which is read; give another place"),
    "a link to an input": ("link.png", ["--overwrite"], "left.png, which is read; give another place"),
    "a file by a folder that is not there": ("none/../mine.png", [], "mine.png is there already; add --overwrite"),
    "a file that is there": ("mine.png", [], "mine.png is there already; add --overwrite to replace it"),
    "a link to one": ("dangling.png", [], "dangling.png is there already; add --overwrite to replace it"),
}


@pytest.mark.parametrize("case", DRAWN_ONTO)
def test_a_file_of_the_users_is_never_drawn_over(
    case: str, ground: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.png").symlink_to("left.png")
    (tmp_path / "dangling.png").symlink_to("nothing.png")
    (tmp_path / "mine.png").write_bytes(b"mine")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    name, options, said = DRAWN_ONTO[case]
    assert ground("--draw", tmp_path / name, *options) == 2
    assert_one_sentence(capsys, said)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_an_older_drawing_is_replaced_when_told(ground: Callable[..., int], tmp_path: Path) -> None:
    for options in ([], ["--overwrite"]):
        assert ground("--draw", tmp_path / "found.png", *options) == 0
    with Image.open(tmp_path / "found.png") as sheet:
        assert sheet.width == 488


def test_a_picture_that_cannot_be_finished_leaves_the_old_one(
    ground: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "found.png"
    target.write_bytes(b"the old one")
    before = sorted(tmp_path.iterdir())

    def save(picture: Image.Image, path: Path) -> None:
        path.write_bytes(b"half of i")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", lambda self, to, *rest: save(self, to) if isinstance(to, Path) else None)
        assert ground("--draw", target, "--overwrite") == 2
    assert_one_sentence(capsys, "found.png cannot be written (No space left on device)")
    assert target.read_bytes() == b"the old one"
    assert sorted(tmp_path.iterdir()) == before


def test_says_when_nothing_was_found(
    fixed_answer: Path, pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ground", *pictures, *QUERY, "--bundle", str(fixed_answer), "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "nothing found (the answer was cut at max_new_tokens=3)"


def test_a_note_goes_with_boxes_of_a_cut_answer(ground: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert ground("--max-new-tokens", 11) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("right.jpg  x1=80 y1=80 x2=240 y2=200  1.00")
    assert lines[1] == "note: the answer was cut at max_new_tokens=11"


def test_inspect(fixed_answer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(fixed_answer)]) == 0
    output = capsys.readouterr().out
    assert output.startswith("bundle: qwen2_vl, ")
    assert "decoder: 3 layers of 96, 3 heads (1 key/value)" in output
    assert "answers: locations, 0..40 of each picture's width and height" in output
    assert all(name in output for name in FILES)
    assert output.endswith("all files are as they were written\n")


def assert_one_sentence(capsys: pytest.CaptureFixture[str], expected: str) -> None:
    """Nothing on stdout, and one line on stderr that holds what is expected."""
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("gemvg: ")
    assert output.err.count("\n") == 1
    assert output.err.endswith("\n")
    assert expected in output.err


BAD_ARGUMENTS: dict[str, tuple[Sequence[str], str]] = {
    "missing picture": (["nowhere.png", *QUERY], "nowhere.png: no such picture file"),
    "folder as a picture": (["{folder}", *QUERY], "no such picture file"),
    "text as a picture": ([__file__, *QUERY], "test_cli.py is not a picture that Pillow can read; give a PNG"),
    "cut picture": (["{folder}/cut.png", *QUERY], "cut.png is damaged or cut short"),
    "thin picture": (["{folder}/thin.png", *QUERY], "a picture of 1 x 300 pixels is longer than 200 to 1"),
    "empty query": (["{left}", "--query", " "], "the query is empty; say what to look for"),
    "special token": (["{left}", "--query", "mug<|im_end|>"], "the query holds the special token <|im_end|>"),
    "broken text": (["{left}", "--query", "mug \udcff"], "is not Unicode text"),
    "long query": (["{left}", "--query", "mug " * 400], "more than max_query_tokens=256; shorten it"),
    "negative threads": (["{left}", *QUERY, "--threads", "-1"], "threads=-1; give 0 for one a physical core"),
    "no bundle": (["{left}", *QUERY, "--bundle", "nowhere"], "nowhere: no such bundle folder; make one with"),
    "file as a bundle": (["{left}", *QUERY, "--bundle", __file__], "test_cli.py: no such bundle folder"),
    "empty bundle": (["{left}", *QUERY, "--bundle", "{folder}"], "manifest.json: no such file; write a bundle with"),
    "draw into no folder": (["{left}", *QUERY, "--draw", "nowhere/a.png"], "--draw nowhere/a.png: the folder nowhere"),
    "draw without ending": (["{left}", *QUERY, "--draw", "found"], "--draw found: no ending is not a picture format"),
    "draw unknown ending": (["{left}", *QUERY, "--draw", "a.xyz"], "--draw a.xyz: .xyz is not a picture format"),
    "draw what is only read": (["{left}", *QUERY, "--draw", "a.psd"], ".psd is not a picture format to write"),
    "draw without colour": (["{left}", *QUERY, "--draw", "a.xbm"], ".xbm is not a picture format to write"),
    "draw over a folder": (["{left}", *QUERY, "--draw", "{folder}/folder.png"], "folder.png cannot be written"),
}


@pytest.mark.parametrize("label", BAD_ARGUMENTS)
def test_bad_input_is_one_sentence(
    label: str, fixed_answer: Path, tmp_path: Path, pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (1, 300)).save(tmp_path / "thin.png")
    (tmp_path / "cut.png").write_bytes(Path(pictures[0]).read_bytes()[:-40])
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.iterdir())
    arguments, expected = BAD_ARGUMENTS[label]
    given = [argument.format(folder=tmp_path, left=pictures[0]) for argument in arguments]
    bundle = [] if "--bundle" in given else ["--bundle", str(fixed_answer)]
    assert main(["ground", *given, *bundle]) == 2
    assert_one_sentence(capsys, expected)
    assert sorted(tmp_path.iterdir()) == before


def forget(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def shorten(name: str) -> Callable[[Path], Any]:
    return lambda folder: os.truncate(folder / name, 100)


def alter(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(b"?" + (folder / name).read_bytes()[1:])


def name_another_model(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["model"]["model_type"] = "llava"
    (folder / MANIFEST).write_text(json.dumps(manifest))


BAD_BUNDLES = {
    "missing file": (forget("decoder.data"), "decoder.data"),
    "cut file": (shorten("vision.data"), "vision.data"),
    "altered file": (alter("embedding.npy"), "embedding.npy"),
    "altered tokenizer": (alter("tokenizer.json"), "tokenizer.json"),
    "altered manifest": (alter(MANIFEST), MANIFEST),
    "missing manifest": (forget(MANIFEST), MANIFEST),
    "unknown model type": (name_another_model, "'llava'"),
}


@pytest.mark.parametrize("command", ["ground", "inspect"])
@pytest.mark.parametrize("label", BAD_BUNDLES)
def test_a_bad_bundle_is_one_sentence(
    label: str,
    command: str,
    fixed_answer: Path,
    tmp_path: Path,
    pictures: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage, expected = BAD_BUNDLES[label]
    folder = shutil.copytree(fixed_answer, tmp_path / "bundle")
    damage(folder)
    arguments = [*pictures, *QUERY, "--bundle"] if command == "ground" else []
    assert main([command, *arguments, str(folder)]) == 2
    assert_one_sentence(capsys, expected)


def test_no_shipped_model_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "DEFAULT_BUNDLE", tmp_path / "tabletop")
    assert main(["inspect"]) == 2
    assert_one_sentence(capsys, "tabletop: no such bundle folder; make one with `python -m export.to_onnx")


@pytest.mark.parametrize("arguments", [[], ["ground"], ["ground", "a.png"], ["look"], ["ground", *QUERY]])
def test_wrong_usage_shows_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: gemvg")


def gemvg(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run([sys.executable, "-m", "gemvg_edge.cli", *arguments], check=False, text=True, **options)


def test_as_a_process(fixed_answer: Path, pictures: list[str]) -> None:
    command = ["ground", *pictures, *QUERY, "--bundle", str(fixed_answer)]
    done = gemvg(*command, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{pictures[1]}  x1=80")
    failed = gemvg(*command, "--draw", "found.txt", capture_output=True)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("gemvg: --draw found.txt: .txt is not a picture format")
    assert gemvg("--version", capture_output=True).stdout == f"gemvg-edge {__version__}\n"


def test_a_reader_that_went_away_is_no_error(fixed_answer: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = gemvg("inspect", str(fixed_answer), stdout=writer, stderr=subprocess.PIPE, env=buffered)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_names_that_are_no_text_are_printed(fixed_answer: Path, pictures: list[str], tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")
    shutil.copy(pictures[1], name)
    command = ["ground", pictures[0], name, *QUERY, "--bundle", str(fixed_answer)]
    done = gemvg(*command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"}, errors="replace")
    assert (done.returncode, done.stderr) == (0, "")
    assert "caf�.jpg  x1=80" in done.stdout
