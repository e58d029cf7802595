"""Benchmarks as people run them: every answer saved, killed and gone on with, over Ray with a worker killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import accuracy
from bench.boxes import tabletop
from bench.boxes.answers import Benchmark, Question, read_answers, spread
from bench.boxes.asking import Asking, describe, in_order, of_grounder, open_model
from bench.boxes.held_out import held_out_named
from bench.boxes.run import Item, answering, load, run
from bench.boxes.scores import score_file
from export.to_onnx import main as export
from gemvg_edge import Box, Grounder
from gemvg_edge.answer import AnswerFormat
from gemvg_edge.errors import GemvgError
from gemvg_edge.images import load_image
from gemvg_edge.models import DEFAULT_BUNDLE
from gemvg_edge.prompt import query_text
from tests.answer_files import EXAMPLES, line, paint, write_answers
from tests.checkpoints import write_checkpoint
from train.data.record import Record, write_records

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "bench.accuracy"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out scenes for all tests here."""
    folder = tmp_path_factory.mktemp("world")
    held_out_named(folder, 60, "held-out")
    return folder


def call(*arguments: Any) -> dict[str, Any]:
    """Run the command to its end; its last line."""
    done = subprocess.run([*COMMAND, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    last: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return last


def start_and_wait(lines: int, file: Path, *arguments: Any) -> subprocess.Popen[bytes]:
    """Start the command and wait until so many answers are saved."""
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    end = time.monotonic() + 120
    while not file.is_file() or file.read_bytes().count(b"\n") <= lines:
        assert process.poll() is None, process.communicate()[1].decode()[-2000:]
        assert time.monotonic() < end
        time.sleep(0.005)
    return process


def test_a_killed_run_goes_on(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "tabletop.tabletop.jsonl"
    arguments = ("--data", data, "--limit", 60, "--out", tmp_path, "--engine", "onnx")
    process = start_and_wait(8, file, *arguments)
    process.kill()
    process.communicate()
    saved = file.read_bytes().rpartition(b"\n")[0]
    assert 8 <= saved.count(b"\n") < 60
    file.write_bytes(file.read_bytes() + b'{"id": "torn')
    told = call(*arguments)
    assert file.read_bytes().startswith(saved + b"\n")
    assert [answer.number for answer in read_answers(file)[1]] == list(range(60))
    (row,) = told["models"]
    assert (row["n"], row["same_text"]) == (60, 60)
    assert row["f1"] > 0.6
    assert row["exact"] > 0.5
    assert (tmp_path / "tabletop.tabletop.png").stat().st_size > 5000
    assert json.loads((tmp_path / "tabletop.tabletop.json").read_text())["models"] == told["models"]
    # Fewer questions are scored alone, of what is there; other settings are not gone on with.
    before = file.read_bytes()
    assert call(*arguments[:2], "--limit", 10, *arguments[4:])["models"][0]["n"] == 10
    assert file.read_bytes() == before
    done = subprocess.run([*COMMAND, *map(str, arguments[:-2])], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "was made with engine 'onnx', and this run has None; give another --out, or --overwrite" in done.stderr


def test_over_ray_a_killed_worker_loses_and_repeats_nothing(data: Path, tmp_path: Path) -> None:
    plain = call("--data", data, "--limit", 40, "--out", tmp_path / "plain")
    file = tmp_path / "ray" / "tabletop.tabletop.jsonl"
    arguments = ("--data", data, "--limit", 40, "--out", tmp_path / "ray", "--ray", "--workers", 2)
    process = start_and_wait(5, file, *arguments)
    workers = ray_workers(process.pid)
    assert len(workers) == 2
    saved = file.read_bytes().rpartition(b"\n")[0]
    os.kill(workers[0], signal.SIGKILL)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err.decode()[-2000:]
    assert file.read_bytes().startswith(saved + b"\n")  # each line once: read_answers refuses an id that stands twice
    answers = {answer.id: answer.answer for answer in read_answers(file)[1]}
    assert answers == {a.id: a.answer for a in read_answers(tmp_path / "plain" / file.name)[1]}
    told = json.loads(out.decode().strip().splitlines()[-1])
    for key in ("n", "f1", "f1_interval", "exact", "mean_iou", "kinds", "tasks"):
        assert told["models"][0][key] == plain["models"][0][key]


def ray_workers(parent: int) -> list[int]:
    """The processes below one that Ray calls by our actor's name."""
    found, parents, names = [], {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone by now
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_bytes()
    for pid, name in names.items():
        above = pid
        while above not in (0, parent):
            above = parents.get(above, 0)
        if above == parent and name.startswith(b"ray::MapWorker"):
            found.append(pid)
    return found


def test_the_parts_come_in_turn_and_a_larger_limit_has_the_smaller_ones() -> None:
    questions = [Question(str(k), "ab"[k % 7 == 0], (), (), "x", ()) for k in range(30)]
    assert [questions[k].part for k in spread(questions, 6)].count("b") == 3
    for limit in range(1, 31):
        assert len(chosen := spread(questions, limit)) == limit
        assert set(chosen) >= set(spread(questions, limit - 1))
        assert chosen == sorted(chosen)


def mig_folder(folder: Path) -> Path:
    """Two items about the shipped pictures."""
    places = []
    for name in ("scene1-a.png", "scene1-b.png"):
        place = folder / "MIG-Bench" / "images" / "x" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes((EXAMPLES / name).read_bytes())
        places.append(f"MIG-Bench/images/x/{name}")
    asked = [
        ("region", "Locate the 1th region picture in the source image. "),
        ("diff", "Find it in the 2th image. "),
    ]
    items = [
        {"task": task, "images": places, "question": question, "answer": [100, 100, 400, 400], "additional_info": ""}
        for task, question in asked
    ]
    (folder / "revised_MIG_bench.json").write_text(json.dumps(items))
    return folder


def test_a_benchmark_is_asked_saved_and_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    folder = mig_folder(tmp_path / "mig")
    monkeypatch.setattr(
        sys, "argv", ["x", "--task", "mig-bench", "--data", str(folder), "--out", str(tmp_path / "out")]
    )
    accuracy.main()
    printed = capsys.readouterr().out.splitlines()
    told = json.loads(printed[-1])["models"][0]
    assert {"region", "diff"} == set(told["tasks"])
    assert told["version"] == "revised"
    assert any(text.startswith("note: not the whole revised benchmark (diff 1 of 528") for text in printed)
    header, answers = read_answers(tmp_path / "out" / "tabletop.mig-bench.jsonl")
    assert not header["verbatim"]  # trained on our own words
    said = {answer.part: answer for answer in answers}
    assert said["diff"].query == "Find it in the 2th image."
    assert said["diff"].truth[0].image == 1


def test_pictures_that_changed_are_refused(tmp_path: Path) -> None:
    folder = mig_folder(tmp_path / "mig")
    benchmark = load("mig-bench", folder, own_words=True, think=False, limit=None)
    paint(folder / "MIG-Bench" / "images" / "x" / "scene1-a.png", (30, 30))
    answer = answering(DEFAULT_BUNDLE, Asking(), folder)
    with pytest.raises(GemvgError, match=r"scene1-a.png has \(30, 30\) pixels, and its benchmark says"):
        answer(Item(0, benchmark.questions[0]))


def test_a_question_that_the_runtime_refuses_is_an_answer_with_a_problem(tmp_path: Path) -> None:
    paint(tmp_path / "a.png")
    question = Question("a/0", "a", (Path("a.png"),), ((64, 48),), "the mug <|im_end|>", ())
    benchmark = Benchmark("records", "", tmp_path, (question,), 16)
    run(benchmark, describe(DEFAULT_BUNDLE), Asking(), tmp_path / "out.jsonl")
    (answer,) = read_answers(tmp_path / "out.jsonl")[1]
    assert "holds the special token <|im_end|>" in str(answer.problem)
    assert (answer.boxes, answer.answer) == ([], "")


def test_a_stock_model_is_asked_in_the_protocols_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Letter by letter as MIG-Bench's published runs were, through PyTorch and a bundle, which say the same."""
    write_checkpoint(tmp_path / "stock")
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    del config["grounding"]  # as Qwen's own
    (tmp_path / "stock" / "config.json").write_text(json.dumps(config))
    assert export([str(tmp_path / "stock"), str(tmp_path / "bundle")]) == 0
    folder = mig_folder(tmp_path / "mig")
    said = {}
    for name in ("stock", "bundle"):
        facts = describe(tmp_path / name)
        benchmark = replace(load("mig-bench", folder, facts.own_words, think=False, limit=None), new_tokens=8)
        run(benchmark, facts, Asking(engine=None if name == "stock" else "onnx"), tmp_path / f"{name}.jsonl")
        header, answers = read_answers(tmp_path / f"{name}.jsonl")
        assert header["verbatim"]
        said[name] = [answer.answer for answer in answers]
        asked = [json.loads(row)["asked"] for row in (tmp_path / f"{name}.jsonl").read_text().splitlines()[1:]]
        assert asked == [
            f"{question}Format:<|box_start|>(x1,y1),(x2,y2)<|box_end|>. Don't generate addtional words."
            for question in ("Locate the 1th region picture in the source image. ", "Find it in the 2th image. ")
        ]
    assert said["stock"] == said["bundle"]
    # Elsewhere a stock model is asked in its profile's words, about each picture alone where the question names none.
    images = [load_image(EXAMPLES / name) for name in ("scene1-a.png", "scene1-b.png")]
    apart = {}
    for name in ("stock", "bundle"):
        model = open_model(tmp_path / name, Asking(new_tokens=6, engine=None if name == "stock" else "onnx"))
        apart[name] = [model.say(images, "the mug").text, *(model.say([image], "the mug").text for image in images)]
    together, first, second = apart["stock"]
    assert together == f"Image-1: {first}\nImage-2: {second}"
    assert apart["bundle"][0].startswith("Image-1: ")
    assert "\nImage-2: " in apart["bundle"][0]
    assert "is asked in the protocol's own words, such as \"Locate the 1th region" in capsys.readouterr().err


def test_what_is_asked_verbatim_is_the_whole_text() -> None:
    """A profile's own words and its way with unnamed pictures stay out of it."""
    with Grounder.open() as grounder:
        manifest = grounder.manifest
        prompt = replace(manifest.prompt, query="{query} Format: ..", think="think: {query}")
        grounder.model.manifest = replace(manifest, prompt=prompt, answer=replace(manifest.answer, unnamed="each"))
        of_grounder(grounder, Asking(verbatim=True))
        assert query_text(grounder.manifest.prompt, "the whole text") == query_text(manifest.prompt, "the whole text")
        assert query_text(grounder.manifest.prompt, "the whole text", think=True).startswith("the whole text<|im_end|>")
        assert grounder.manifest.answer.unnamed == "query"


def test_boxes_come_in_the_order_of_the_text() -> None:
    text = "Image-1: <|box_start|>(500,0),(600,100)<|box_end|><|box_start|>(0,0),(100,100)<|box_end|>"
    right, left = Box(0, 50, 0, 60, 10, label="q", score=0.5), Box(0, 0, 0, 10, 10, label="q", score=0.9)
    found = in_order(text, [left, right], [(100, 100)], AnswerFormat(), [(100, 100)], "q")
    assert found == (right, left)
    assert [(box.score, box.label) for box in found] == [(0.5, None), (0.9, None)]
    named = "<|object_ref_start|>cup<|object_ref_end|>(0,0),(100,100)"
    assert in_order(named, [left], [(100, 100)], AnswerFormat(), [(100, 100)], "q")[0].label == "cup"


def test_new_names_are_told_apart(tmp_path: Path) -> None:
    named = held_out_named(tmp_path, 40, "new-names")
    assert 5 < len([record for record, where in named if "target" in where]) < 35
    assert all(("text" in where) == ("teddy" in record.query or "bunny" in record.query) for record, where in named)
    benchmark = tabletop.load(tmp_path, "new-names", 40)
    assert [question.extra["new_name"] for question in benchmark.questions] == [where for _, where in named]
    hit = [(0, 1, 1, 5, 5)]
    places = [["text"], ["text", "target"], ["target"], ["target"], [], []]
    extras = [{"kind": "temporal", "new_name": where} for where in places]
    lines = [line(k, "moved", hit, hit if k != 2 else [], extra=extra) for k, extra in enumerate(extras)]
    told = score_file(write_answers(tmp_path / "a.jsonl", "tabletop:new-names", lines))
    scores = [(told[name]["n"], told[name]["exact"]) for name in tabletop.NAMES]
    assert scores == [(2, 1.0), (3, pytest.approx(2 / 3)), (2, 1.0)]


def test_records_of_ones_own(tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    images = tuple(EXAMPLES / name for name in ("scene1-a.png", "scene1-b.png"))
    sizes = tuple(load_image(image).size for image in images)
    record = Record(images, sizes, "all balls", (Box(0, 1, 1, 9, 9),), "referential", "mine")
    write_records([record], tmp_path / "mine.jsonl")
    monkeypatch.setattr(sys, "argv", ["x", "--records", str(tmp_path / "mine.jsonl"), "--out", str(tmp_path / "out")])
    accuracy.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["models"][0]["n"] == 1
    (answer,) = read_answers(tmp_path / "out" / "tabletop.records.jsonl")[1]
    assert answer.images == ["scene1-a.png", "scene1-b.png"]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"sizes": [[0, 1], [1, 1]]}, r"sizes is \[\[0, 1\]"),
        ({"images": ["a"]}, "images is"),
        ({"boxes": [{"image": 2, "box": [1, 2, 3, 4]}]}, "boxes is"),
        ({"boxes": [{"image": 0, "box": [1, 2, 3]}]}, "boxes is"),
        ({"truth": [{"image": 0, "box": [1, 2, 3, 1e300]}]}, "truth is"),
        ({"tokens": True}, "tokens is True"),
        ({"answer": None}, "answer is None"),
        ({"number": -1}, "number is -1"),
    ],
)
def test_lines_of_strangers_are_checked(tmp_path: Path, change: dict[str, Any], fault: str) -> None:
    file = write_answers(tmp_path / "a.jsonl", "tabletop", [line(0, "moved") | change])
    with pytest.raises(GemvgError, match=rf"answer 'moved/0': {fault}"):
        score_file(file)


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    for header, fault in (
        ({"version": 2}, "version 2, not"),
        ({"task": 3}, "of which task"),
        ({"task": "x"}, "task 'x'"),
    ):
        with pytest.raises(GemvgError, match=fault):
            score_file(write_answers(tmp_path / "a.jsonl", **({"task": "tabletop", "lines": []} | header)))


@pytest.mark.slow
def test_a_hundred_thousand_answers_are_scored_in_time(tmp_path: Path) -> None:
    truth, extra = [(0, 10, 10, 50, 50)], {"corners": [100, 100, 500, 500]}
    one = line(0, "region", truth, truth, answer="(100,100),(500,500)", extra=extra)
    lines = ({**one, "id": str(k), "number": k} for k in range(100_000))
    file = write_answers(tmp_path / "a.jsonl", "mig-bench", lines, benchmark="revised")
    code = f"import sys; sys.argv = ['x', '--answers', {str(file)!r}]; from bench.score import main; main()\n"
    code += "from bench.speed.tradeoff_process import STATUS, peak_bytes; print(peak_bytes(STATUS.read_text()))"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.monotonic() - started < 60
    *_, told, peak = done.stdout.strip().splitlines()
    assert int(peak) < 2**30
    assert json.loads(told)["macro"]["acc@0.5"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--records", "a.jsonl", "--task", "tabletop"], "--records takes the place of --task and --data"),
        (["--workers", "2"], "says nothing without --ray"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--save", "mine.png"], "does not end in .json"),
        (["--save", "out/tabletop.tabletop.jsonl"], "does not end in .json"),
        (["--save", "nowhere/x.json"], "there is no folder nowhere; make it first"),
        (["--save", "."], "is a folder; give the name of a .json"),
        (["--save", "notes.json"], "exists and is no benchmark's result"),
        (["--save", "picture.json"], "picture.png is there without the figures of its run"),
        (["--model", str(DEFAULT_BUNDLE), str(DEFAULT_BUNDLE)], "two folders of the name tabletop"),
        (["--task", "nothing"], "--task 'nothing' is not known; give tabletop"),
        (["--task", "mig-bench", "--data", "nowhere"], "no such file; unpack"),
        (["--engine", "nonsense"], "engine"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_is_touched(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str], fault: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name in ("notes.json", "picture.png"):
        Path(name).write_text("mine")
    given = [] if "--data" in arguments or "--records" in arguments else ["--data", str(data)]
    monkeypatch.setattr(sys, "argv", ["x", "--limit", "5", "--out", "out", *given, *arguments])
    with pytest.raises(SystemExit) as ended:
        accuracy.main()
    assert ended.value.code == 2
    assert fault in capsys.readouterr().err
    assert [path.read_text() for path in sorted(tmp_path.glob("*.*"))] == ["mine", "mine"]
    assert [path.read_bytes() for path in tmp_path.glob("out/*")] in ([], [b""])
