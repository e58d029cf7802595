"""`gemvg ground` with many questions, stdin, folders of drawings and the budget of pixels."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from PIL import Image

from gemvg_edge.cli import main
from gemvg_edge.files import PARTIAL

SCHEMA = json.loads((Path(__file__).parents[1] / "docs" / "reference" / "grounding.schema.json").read_text())
Ground = Callable[..., int]


@pytest.fixture
def ground(fixed_answer: Path, pictures: list[str]) -> Ground:
    return lambda *more: main(["ground", *pictures, "--bundle", str(fixed_answer), *map(str, more)])


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[Any]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_several_queries_are_answered_in_turn(ground: Ground, capsys: pytest.CaptureFixture[str]) -> None:
    assert ground("--query", "the red mug", "--query", "été") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("looked in ")
    assert (lines[1], lines[4]) == ('"the red mug"', '"été"')
    assert lines[2].endswith("right.jpg  x1=80 y1=80 x2=240 y2=200  1.00")
    assert lines[5] == lines[2]
    assert ground("--query", "the red mug", "--query", "a", "--json") == 0
    assert [line["query"] for line in lines_of(capsys)] == ["the red mug", "a"]


def test_a_thousand_queries_in_one_process(
    ground: Ground, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pictures are looked at once, and each line has its answer."""
    from gemvg_edge.grounder import Grounder

    looks, look = [], Grounder._look

    def counted(self: Grounder, *given: Any) -> Any:
        looks.append(1)
        return look(self, *given)

    monkeypatch.setattr(Grounder, "_look", counted)
    queries = [json.dumps({"query": f"thing {k}", "id": k}) if k % 2 else json.dumps(f"thing {k}") for k in range(1000)]
    (tmp_path / "queries.jsonl").write_text("\n".join(queries) + "\n\n")
    assert ground("--queries", tmp_path / "queries.jsonl") == 0
    answers = lines_of(capsys)
    assert [answer["query"] for answer in answers] == [f"thing {k}" for k in range(1000)]
    assert [answer.get("id") for answer in answers] == [k if k % 2 else None for k in range(1000)]
    assert {len(answer["boxes"]) for answer in answers} == {1}
    assert len(looks) == 1
    for answer in answers[:2]:
        jsonschema.validate(answer, SCHEMA)


REFUSED = {
    "no JSON": ("mug", "line 2 of the queries is not JSON"),
    "a number": ("7", "line 2 of the queries is 7; give a text, or an object with `query`"),
    "no query": ('{"id": 3}', "give a text, or an object with `query`"),
    "an unknown field": ('{"query": "a", "boxes": 1}', "has the unknown field 'boxes'; known are id, query, think"),
    "a list as id": ('{"query": "a", "id": []}', "id is [], no text and no number"),
    "a truth as id": ('{"query": "a", "id": true}', "id is True, no text and no number"),
    "a number as think": ('{"query": "a", "think": 1}', "think is 1, not true or false"),
    "an empty query": ('""', "the query is empty"),
    "a special token": ('"<|im_end|>"', "special token <|im_end|>"),
    "a long line": ('"' + "a" * 900_000 + '"', "has more than 800000 characters; shorten it"),
    "bytes that are no text": ('"caf\udce9"', "not Unicode text"),
}


@pytest.mark.parametrize("label", REFUSED)
def test_a_line_that_is_refused_stops_no_other(
    label: str, ground: Ground, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line, message = REFUSED[label]
    text = f'"the mug"\n{line}\n"the cup"\n'
    (tmp_path / "queries.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert ground("--queries", tmp_path / "queries.jsonl") == 2
    captured = capsys.readouterr()
    first, second, third = map(json.loads, captured.out.splitlines())
    assert [answer["query"] for answer in (first, third)] == ["the mug", "the cup"]
    assert message in second["error"]
    assert "boxes" not in second
    assert captured.err == "gemvg: 1 of 3 queries were refused; the lines with `error` say why\n"


def test_stdin_is_a_picture_or_the_queries(fixed_answer: Path, pictures: list[str]) -> None:
    command = [sys.executable, "-m", "gemvg_edge", "ground", "--bundle", str(fixed_answer)]
    piped = subprocess.run(
        [*command, pictures[0], "-", "--query", "the mug"],
        input=Path(pictures[1]).read_bytes(),
        capture_output=True,
        check=True,
    )
    assert piped.stdout.decode().startswith("stdin  x1=80 y1=80 x2=240 y2=200")
    with subprocess.Popen(
        [*command, *pictures, "--queries", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for query in ("the mug", "the cup"):  # each is answered before the next is asked
            process.stdin.write(json.dumps(query) + "\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["query"] == query
        process.stdin.close()
    assert process.returncode == 0


def test_a_refused_line_keeps_its_id(ground: Ground, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "queries.jsonl").write_text('{"id": 8, "query": "mug", "x": 1}\n{"id": "b", "query": ""}\n')
    assert ground("--queries", tmp_path / "queries.jsonl") == 2
    assert [answer["id"] for answer in lines_of(capsys)] == [8, "b"]


def test_queries_may_come_through_a_pipe_with_a_name(
    ground: Ground, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text('"the mug"\n'), daemon=True)
    writer.start()
    assert ground("--queries", tmp_path / "pipe") == 0
    writer.join()
    assert lines_of(capsys)[0]["query"] == "the mug"


def test_a_line_that_never_ends_is_given_up(ground: Ground, capsys: pytest.CaptureFixture[str]) -> None:
    assert ground("--queries", "/dev/zero") == 2
    assert "line 1 of the queries does not end; give JSON Lines" in capsys.readouterr().err


def test_a_file_that_comes_meanwhile_is_not_drawn_over(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gemvg_edge import cli_ground, draw_boxes

    target = tmp_path / "out.png"

    def slowly(*given: Any) -> Any:
        target.write_text("precious")
        return draw_boxes(*given)

    monkeypatch.setattr(cli_ground, "draw_boxes", slowly)
    before = {*tmp_path.iterdir(), target}
    assert ground("--query", "the mug", "--draw", target) == 2
    assert "out.png has come to be there meanwhile, so it is left alone" in capsys.readouterr().err
    assert target.read_text() == "precious"
    assert {*tmp_path.iterdir()} == before


def test_a_link_where_the_drawing_is_prepared_is_not_followed(ground: Ground, tmp_path: Path) -> None:
    name = hashlib.sha256(b"out.png").hexdigest()[:12]
    (tmp_path / "victim.txt").write_text("precious")
    (tmp_path / f"{PARTIAL}{name}.png").symlink_to("victim.txt")
    assert ground("--query", "the mug", "--draw", tmp_path / "out.png") == 0
    assert (tmp_path / "victim.txt").read_text() == "precious"
    assert not (tmp_path / "out.png").is_symlink()
    here = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(PARTIAL))
    assert here == ["left.png", "out.png", "right.jpg", "victim.txt"]


BAD = {
    "an empty query after a good one": (["--query", "a", "--query", " "], "the query is empty"),
    "no name of queries": (["--queries", ""], "no such file of queries"),
    "a folder of queries": (["--queries", "/"], "/: no such file of queries"),
    "no such file": (["--queries", "nowhere.jsonl"], "nowhere.jsonl: no such file of queries"),
    "drawing of many": (["--queries", __file__, "--draw", "a.png"], "--draw shows the answers to --query"),
    "few pixels": (
        ["--query", "a", "--max-pixels", "1"],
        "max_pixels=1; give a whole number of pixels a picture, 784 (one",
    ),
    "no new tokens": (["--query", "a", "--max-new-tokens", "0"], "max_new_tokens=0 must be at least 1"),
    "too little time": (["--query", "a", "--timeout", "1e-6"], "no answer within timeout=1e-06 s"),
    "another engine": (["--query", "a", "--engine", "tensorrt"], "ONNX graphs, which engine='tensorrt' does not"),
}


@pytest.mark.parametrize("label", BAD)
def test_bad_arguments_are_one_sentence(label: str, ground: Ground, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = BAD[label]
    assert ground(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("gemvg: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_stdin_is_given_once(pictures: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["-", "-", "--query", "a"], [*pictures, "-", "--queries", "-"]):
        assert main(["ground", *arguments]) == 2
        assert "- stands for stdin and can be given once" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value"), [("timeout", "0"), ("timeout", "-1"), ("timeout", "nan"), ("timeout", "soon"), ("draw", "")]
)
def test_wrong_values_show_the_usage(flag: str, value: str, ground: Ground, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        ground("--query", "a", f"--{flag}", value)
    assert caught.value.code == 2
    assert f"--{flag}" in capsys.readouterr().err


def test_draws_into_the_current_folder(ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ground("--query", "a", "--draw", ".") == 0
    assert (tmp_path / "1-left.png").is_file()


def test_each_picture_is_drawn_into_a_folder(
    ground: Ground, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "drawn").mkdir()
    for options, code in (([], 0), ([], 2), (["--overwrite"], 0)):
        assert ground("--query", "the mug", "--query", "the cup", "--draw", tmp_path / "drawn", *options) == code
    assert "drawn/1-left.png is there already; add --overwrite" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["1-left.png", "2-right.png"]
    with Image.open(tmp_path / "drawn" / "2-right.png") as picture:
        assert picture.size == (400, 200)
        first, second = picture.getpixel((80, 150)), picture.getpixel((77, 150))
    assert (first, second) == ((255, 0, 160), (0, 150, 255)), "each query has its colour, side by side"


def test_the_budget_of_pixels_decides_the_tokens(ground: Ground, capsys: pytest.CaptureFixture[str]) -> None:
    counts = []
    for pixels in (784, 4000, 40_000):
        assert ground("--query", "a", "--json", "--max-pixels", pixels) == 0
        counts.append(lines_of(capsys)[0]["timings"]["image_tokens"])
    assert counts == sorted(set(counts))


def test_says_what_it_does_when_asked(ground: Ground, capsys: pytest.CaptureFixture[str]) -> None:
    assert ground("--query", "the mug", "--verbose") == 0
    said = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in said] == ["opened", "looked", "'the"]
    assert ground("--query", "the mug") == 0
    assert capsys.readouterr().err == ""


def test_large_pictures_are_told_to_be_slow(fixed_answer: Path, caplog: pytest.LogCaptureFixture) -> None:
    from gemvg_edge import Grounder

    grounder = Grounder.open(fixed_answer, max_pixels=2**20)
    with caplog.at_level("WARNING", "gemvg_edge"):
        for _ in range(2):
            grounder.look([Image.new("RGB", (1100, 900))] * 2)
    assert len(caplog.records) == 1, "once"
    assert "2 pictures take 2496 tokens, and their cache up to 2 MiB" in caplog.text
    assert "give a lower max_pixels than 1048576, such as 401408" in caplog.text


def test_a_picture_on_stdin_that_is_none(
    fixed_answer: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"no picture")))
    assert main(["ground", "-", "--query", "a", "--bundle", str(fixed_answer)]) == 2
    assert "stdin (10 bytes) is not a picture that Pillow can read" in capsys.readouterr().err


def test_a_closed_stdin_is_one_sentence(
    pictures: list[str], fixed_answer: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    for arguments in (["-", "--query", "a"], [pictures[0], "--queries", "-"]):
        assert main(["ground", *arguments, "--bundle", str(fixed_answer)]) == 2
        assert "stdin is closed; pipe something in, or give the name of a file" in capsys.readouterr().err
