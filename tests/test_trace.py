"""`export.trace`, and BUNDLE.md: a runtime written from that page alone reproduces the traces of every dialect."""

from __future__ import annotations

import ast
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from export.to_onnx import main as export
from export.trace import main as trace
from export.trace_file import CHOSEN, NETWORKS, Arrays, limit_of, read_trace, text_of, write_trace
from gemvg_edge import Grounder
from gemvg_edge.bundle import FORMAT_VERSION
from gemvg_edge.engines.native.library import find_library
from gemvg_edge.errors import GemvgError
from gemvg_edge.models import DEFAULT_BUNDLE
from tests import bundle_runtime, bundle_runtime_answer, bundle_runtime_pictures, bundle_runtime_seal
from tests.checkpoints import TINY, TINY_2_5, TINY_3, TOKENIZER, edit_json, write_checkpoint
from train.vocabulary import add_locations, drop_marks

PAGE = Path(__file__).parents[1] / "BUNDLE.md"
# Of the runtime in the tests, which runs the same graphs on the same ONNX Runtime: in standard deviations of an array.
TOLERANCE = 1e-4
PARTS = (bundle_runtime, bundle_runtime_answer, bundle_runtime_pictures, bundle_runtime_seal)
STEPS = 64
BUNDLES: dict[str, list[str]] = {  # how each is exported
    "fused": [],
    "standard": ["--dialect", "standard", "--precision", "float32"],
    "plain": ["--dialect", "plain", "--precision", "float32"],
    "float16": ["--dialect", "standard", "--precision", "float16"],
    "int4": ["--weights", "int4"],
    "bare": ["--weights", "int4"],  # in locations without marks
    "windows": [],  # of Qwen2.5-VL, and its answers in pixels
    **{
        f"qwen3 {dialect}": ["--dialect", dialect, "--precision", "float32"]
        for dialect in ("fused", "standard", "plain")
    },
    "qwen3 stock": [],  # which says what it likes
    "shipped": [],
}
SOME = ("window_places_k", "place_index_k", "place_weight_k")  # arrays of some model types only
PROFILE = {
    "prompt": {"system_turn": False, "query": "Locate {query}."},
    "answer": {"coordinates": "json", "unnamed": "each"},
}
Capture = pytest.CaptureFixture[str]
Traced = tuple[Path, Path]  # a bundle, and its trace


@pytest.fixture(scope="module")
def traced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """A bundle of the kind that the test names, and its trace."""
    folder = tmp_path_factory.mktemp(request.param)
    bundle = DEFAULT_BUNDLE if request.param == "shipped" else write_random(folder, request.param)
    assert trace([str(bundle), "--out", str(folder / "trace.npz"), "--steps", str(STEPS)]) == 0
    return bundle, folder / "trace.npz"


def write_random(folder: Path, kind: str) -> Path:
    """The bundle of a random model that finds boxes."""
    checkpoint = folder / "checkpoint"
    sizes = {"windows": TINY_2_5, "qwen3": TINY_3}.get(kind.split()[0], TINY)
    model = write_checkpoint(checkpoint, sizes)
    if sizes is TINY:  # the others do so anyway, this one would say None
        none, image = (TOKENIZER.encode(word).ids[0] for word in ("None", "Image-1: "))
        with torch.no_grad():
            model.lm_head.weight[[none, image]] = model.lm_head.weight[[image, none]]
        model.save_pretrained(checkpoint)
    if kind == "bare":
        add_locations(checkpoint, folder / "locations", 30)
        checkpoint = folder / "bare"
        drop_marks(folder / "locations", checkpoint)
    if kind == "qwen3 stock":
        edit_json(checkpoint / "config.json", grounding=PROFILE)
    if kind == "windows":
        edit_json(checkpoint / "config.json", grounding={"answer": {"coordinates": "pixels"}})
    assert export([str(checkpoint), str(folder / "bundle"), *BUNDLES[kind]]) == 0
    return folder / "bundle"


def run(arguments: list[str], capsys: Capture) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = trace(arguments)
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("traced", BUNDLES, indirect=True)
def test_a_runtime_written_from_the_page_reproduces_the_trace(traced: Traced) -> None:
    check_reproduced(*traced)
    stock = json.loads((traced[0] / "manifest.json").read_text())["answer"]["unnamed"] != "refuse"
    assert stock or len(read_trace(traced[1])["boxes"]) > 0


def check_reproduced(bundle: Path, file: Path) -> None:
    theirs = read_trace(file)
    ours = bundle_runtime.run(bundle, theirs)
    assert set(ours) == set(theirs) - {"about"}
    for name, array in theirs.items():
        if name == "about":
            continue
        assert ours[name].shape == array.shape, name
        if np.issubdtype(array.dtype, np.float32):
            scale = array.std() if limit_of(name, TOLERANCE) == TOLERANCE else 1
            assert np.abs(ours[name] - array).max() <= max(limit_of(name, TOLERANCE), 1e-6) * scale, name
        else:
            np.testing.assert_array_equal(ours[name], array, name)


def test_that_runtime_has_nothing_of_ours() -> None:
    names = set[str]()
    for module in PARTS:
        tree = ast.parse(Path(str(module.__file__)).read_text())
        names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    theirs = {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}
    assert theirs == {"numpy", "onnxruntime", "tokenizers", *(part.__name__ for part in PARTS[1:])}


@pytest.mark.parametrize("traced", ["fused", "windows", "qwen3 fused", "shipped"], indirect=True)
def test_the_page_lists_the_arrays(traced: Traced) -> None:
    arrays = read_trace(traced[1])
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| `\[(.*?)\]` \| (\S+) \|", PAGE.read_text(), re.MULTILINE)
    sizes: dict[str, int] = {}
    listed = []
    for name, dtype, dims, limit in rows:
        for k in ("0", "1") if name.endswith("_k") else ("",):
            here = name.removesuffix("k") + k
            if name in SOME and here not in arrays:
                continue
            listed.append(here)
            array = arrays[here]
            names = [dim.replace("_k", f"_{k}") for dim in dims.split(", ")]
            assert (str(array.dtype), array.ndim) == (dtype, len(names)), here
            for dim, size in zip(names, array.shape, strict=True):
                assert size == (int(dim) if dim.isdigit() else sizes.setdefault(dim, size)), (here, dim)
            allowed = limit_of(here, -1)
            kind = "chosen" if here in CHOSEN else {-1.0: "network", 0.0: "exact"}.get(allowed, f"{allowed:g}")
            assert here == "about" or kind == limit, here
    assert set(listed) == set(arrays)
    made = dict.fromkeys(re.sub(r"_\d$", "_k", name) for name in arrays)
    assert list(made) == [name for name, *_ in rows if name in made], "in the order that they are made in"


@pytest.mark.parametrize("traced", ["fused", "shipped"], indirect=True)
def test_the_same_bundle_gives_the_same_bytes(traced: Traced, tmp_path: Path, capsys: Capture) -> None:
    code, result = run([str(traced[0]), "--out", str(tmp_path / "again.npz"), "--steps", str(STEPS)], capsys)
    assert (tmp_path / "again.npz").read_bytes() == traced[1].read_bytes()
    assert (code, result["engine"], result["bytes"]) == (0, "onnx", traced[1].stat().st_size)
    assert result["bundle_sha256"] == json.loads((traced[0] / "manifest.json").read_text())["sha256"]
    with np.load(traced[1]) as plain:
        assert len(plain.files) == result["arrays"]


@pytest.mark.parametrize("traced", ["shipped"], indirect=True)
def test_it_is_what_the_grounder_answers(traced: Traced) -> None:
    arrays = read_trace(traced[1])
    grounder = Grounder.open(traced[0], engine="onnx")
    scene = grounder.look([Image.fromarray(arrays[f"picture_{k}"]) for k in range(2)])
    answer = scene.ground(text_of(arrays["question"]))
    assert answer.text == text_of(arrays["answer_text"])
    assert [box.image for box in answer.boxes] == arrays["box_pictures"].tolist()
    assert [list(box) for box in answer.boxes] == arrays["boxes"].tolist()


@pytest.mark.parametrize("traced", ["fused", "int4", "windows", "qwen3 fused", "qwen3 plain", "shipped"], indirect=True)
def test_an_engine_passes(traced: Traced, capsys: Capture) -> None:
    code, result = run([str(traced[0]), "--check", str(traced[1])], capsys)
    assert (code, result["passed"], result["first_off"], result["differences"]) == (0, True, None, {})
    foreign = {"window_places_0", "place_index_0"} & set(read_trace(traced[1]))  # to our native engine
    if foreign or find_library() is None:
        return
    code, result = run([str(traced[0]), "--check", str(traced[1]), "--engine", "native"], capsys)
    assert (code, result["passed"], result["engine"], result["trace_engine"]) == (0, True, "native", "onnx")
    assert set(result["differences"]) <= {*NETWORKS, "visual_tokens_0", "visual_tokens_1"}
    assert result["differences"]


@pytest.mark.parametrize("traced", ["fused"], indirect=True)
def test_another_dialect_passes_with_the_same_trace(traced: Traced, tmp_path: Path, capsys: Capture) -> None:
    kind = ["--dialect", "plain", "--precision", "float32"]
    assert export([str(traced[0].parent / "checkpoint"), str(tmp_path / "plain"), *kind]) == 0
    code, result = run([str(tmp_path / "plain"), "--check", str(traced[1])], capsys)
    assert (code, result["passed"], result["same_bundle"], result["tolerance"]) == (0, True, False, 1e-3)
    assert 0 < max(result["differences"].values()) < 1e-3


def change(name: str, by: float) -> Callable[[Arrays], object]:
    return lambda arrays: arrays.update({name: (arrays[name] + by).astype(arrays[name].dtype)})


OFF: dict[str, tuple[Callable[[Arrays], object], str | None]] = {
    "other tokens": (change("visual_tokens_1", 0.1), "visual_tokens_1"),
    "a little": (change("visual_tokens_1", 1e-5), None),
    "patches": (change("patches_0", 1e-3), "patches_0"),
    "one pixel": (change("resized_1", 1), "resized_1"),
    "positions": (change("positions", 1), "positions"),
    "boxes": (change("boxes", 1e-9), "boxes"),
    "no number": (change("cos", np.nan), "cos"),
    "another kind": (lambda a: a.update(cos=a["cos"].astype(np.float64)), "cos"),
    "another choice": (lambda a: a["answer_ids"].__setitem__(2, 0), "answer_ids"),
    "one less": (lambda a: a.pop("sin"), "sin"),
    "one more": (lambda a: a.update(more=a["sin"]), "more"),
}


@pytest.mark.parametrize("case", OFF)
@pytest.mark.parametrize("traced", ["fused"], indirect=True)
def test_the_first_that_is_off_is_named(traced: Traced, tmp_path: Path, capsys: Capture, case: str) -> None:
    arrays, (spoil, named) = read_trace(traced[1]), OFF[case]
    spoil(arrays)
    write_trace(tmp_path / "spoilt.npz", arrays)
    code, result = run([str(traced[0]), "--check", str(tmp_path / "spoilt.npz")], capsys)
    assert (code, result["passed"], result["first_off"]) == (int(named is not None), named is None, named)


def test_only_traces_are_replaced(tmp_path: Path, capsys: Capture) -> None:
    bundle, out = tmp_path / "bundle", tmp_path / "trace.npz"
    shutil.copytree(DEFAULT_BUNDLE, bundle)
    out.write_bytes(b"somebody's")
    assert trace([str(bundle), "--out", str(out)]) == 2
    assert "is there already and no trace; add --overwrite" in capsys.readouterr().err
    assert out.read_bytes() == b"somebody's"
    for more in (["--overwrite"], []):
        assert trace([str(bundle), "--out", str(out), "--steps", "4", *more]) == 0
    assert "trace.npz" in {path.name for path in tmp_path.iterdir()} == {"bundle", "trace.npz"}


BAD: dict[str, tuple[list[str], str]] = {
    "in the bundle": (["--out", "{bundle}/trace.npz"], "lies in the bundle, which holds its own files only"),
    "a file of the bundle": (["--out", "{bundle}/manifest.json", "--overwrite"], "which is read"),
    "no trace to check": (["--check", "{bundle}/nothing.npz"], "no such trace"),
    "another file": (["--check", "{bundle}/embedding.npy"], "is not a trace"),
    "no steps": (["--steps", "0"], "--steps 0 is not 1 to 4096"),
    "another engine": (["--engine", "tensorrt"], "holds ONNX graphs"),
    "no question": (["--query", " "], "the query is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, case: str) -> None:
    arguments, said = BAD[case]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DEFAULT_BUNDLE, tmp_path / "bundle")
    assert trace(["bundle", *(word.format(bundle="bundle") for word in arguments)]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert len(message.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


KINDS: dict[str, tuple[Callable[[Arrays], object], str]] = {
    "no pictures": (lambda a: [a.pop("picture_0"), a.pop("picture_1")], "picture_0"),
    "a grey picture": (lambda a: a.update(picture_1=a["picture_1"][:, :, 0]), "picture_1"),
    "no token": (lambda a: a.update(free_ids=a["free_ids"][:0]), "free_ids"),
    "no question": (lambda a: a.pop("question"), "question"),
    "a question of other bytes": (lambda a: a.update(question=np.array([255, 254], np.uint8)), "question"),
    "no logits": (lambda a: a.pop("free_logits"), "free_logits"),
    "too few logits": (lambda a: a.update(answer_logits=a["answer_logits"][:1]), "answer_logits"),
    "logits of one row": (lambda a: a.update(free_logits=a["free_logits"][0]), "free_logits"),
    "logits that are text": (lambda a: a.update(free_logits=a["free_logits"].astype("U8")), "free_logits"),
}


def test_a_trace_that_would_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.trace_file.MOST_BYTES", 1000)
    write_trace(tmp_path / "large.npz", {"about": np.zeros(1001, np.uint8)})
    with pytest.raises(GemvgError, match=r"large.npz is not a trace \(its arrays take 0.0 GiB, and 0 are read\)"):
        read_trace(tmp_path / "large.npz")


@pytest.mark.parametrize("case", KINDS)
@pytest.mark.parametrize("traced", ["shipped"], indirect=True)
def test_a_trace_without_a_start(traced: Traced, tmp_path: Path, capsys: Capture, case: str) -> None:
    arrays, (spoil, named) = read_trace(traced[1]), KINDS[case]
    spoil(arrays)
    write_trace(tmp_path / "spoilt.npz", arrays)
    assert trace([str(traced[0]), "--check", str(tmp_path / "spoilt.npz")]) == 2
    assert f"the trace's {named} is missing or of another kind; write it again" in capsys.readouterr().err


def test_the_page_is_of_this_version() -> None:
    assert f"This is `format_version` {FORMAT_VERSION};" in " ".join(PAGE.read_text().split())


def test_no_bundle_and_a_damaged_trace(tmp_path: Path, capsys: Capture) -> None:
    assert trace([str(tmp_path / "nowhere")]) == 2
    assert "no such" in capsys.readouterr().err
    write_trace(
        tmp_path / "old.npz", {"about": np.frombuffer(b'{"format": "gemvg-edge-trace", "version": 0}', np.uint8)}
    )
    assert trace([str(DEFAULT_BUNDLE), "--check", str(tmp_path / "old.npz")]) == 2
    assert "is gemvg-edge-trace 0, not gemvg-edge-trace 1" in capsys.readouterr().err
