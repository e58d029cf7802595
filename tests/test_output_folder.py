"""What the workshop writes into folders: only what it wrote is ever replaced or deleted, whenever it is killed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.bundle_folder import new_bundle_folder
from gemvg_edge.bundle import MANIFEST
from gemvg_edge.errors import GemvgError
from tests.killed import every_kill
from train.output_folder import CONTENTS, MARK, STAGING, WORK, check_target, claim, fingerprint, marked, new_folder

KEY = "config.json"
# What people's folders hold beside a result.
BESIDE = {".git/config": "[core]", ".gitattributes": "*.onnx", ".DS_Store": "", ".cache/x/y": "1", ".nfs0001": "",
          "lost+found/1": "", "LICENSE": "mine", "README.md": "card"}  # fmt: skip


def write_files(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def read_files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def result(target: Path, files: dict[str, str], overwrite: bool = True) -> None:
    with new_folder(target, KEY, overwrite=overwrite) as folder:
        write_files(folder, files)


OLD = {KEY: "old", "model.safetensors": "old", "training/head": "old", "old-only": "old"}
NEW = {KEY: "new", "model.safetensors": "new", "model-2.safetensors": "new"}


def without_mark(files: dict[str, str]) -> dict[str, str]:
    return {name: text for name, text in files.items() if name != MARK}


@pytest.mark.parametrize("before", [None, {}, OLD], ids=["nothing", "an empty folder", "an older result"])
def test_a_kill_at_any_moment_leaves_old_new_or_what_a_rerun_mends(
    tmp_path: Path, before: dict[str, str] | None
) -> None:
    target, seen = tmp_path / "out", set()

    def start() -> None:
        shutil.rmtree(target, ignore_errors=True)
        if before is not None:
            target.mkdir()
            write_files(target, BESIDE)
        if before:
            result(target, before)

    for _ in every_kill(lambda: result(target, NEW), start):
        left = {name: text for name, text in read_files(target).items() if not name.startswith((".gem", STAGING))}
        ours = {name: text for name, text in left.items() if name not in BESIDE}
        # Whoever finds the key finds all of one result; without it nobody takes the folder for one.
        assert ours == NEW or ours == (before or {}) or KEY not in ours
        seen.add("new" if ours == NEW else "old" if ours == before else "no key")
        assert before is None or left.items() >= BESIDE.items()
        result(target, NEW)
        assert without_mark(read_files(target)) == NEW | (BESIDE if before is not None else {})
    assert seen >= {"new", "no key"} | ({"old"} if before else set())


@pytest.mark.parametrize("changed", [False, True])
def test_a_kill_while_work_is_taken_away_never_ends_in_a_dead_end(tmp_path: Path, changed: bool) -> None:
    work = tmp_path / "out.work"

    def run(settings: int = 1) -> None:
        with marked(work, {"format": "gemvg-edge-work", "settings": settings}, keep=True):
            if not (work / "parts" / "a").exists():
                write_files(work, {"activations": "1", "parts/a": "1", "parts/b": "1"})
            assert (work / "parts" / "b").exists()
            assert (work / "activations").exists()

    for _ in every_kill(run, lambda: None):
        mark = work / MARK
        if changed and mark.exists() and '"removing"' not in mark.read_text():
            continue  # a run of other settings is refused while there is something to go on with
        run(2 if changed else 1)
        assert not work.exists()


def put_beside_ours(name: str) -> Callable[[Path], None]:
    def put(out: Path) -> None:
        result(out, OLD)
        write_files(out, {name: "x"})

    return put


FOREIGN: dict[str, Callable[[Path], object]] = {
    "a project with a config.json of its own": lambda out: write_files(out, {KEY: "{}", "src/main.py": "x"}),
    "a config.json alone": lambda out: write_files(out, {KEY: "{}"}),
    "a file": lambda out: out.write_text("mine"),
    "a dangling link's file": lambda out: out.symlink_to(out.parent / "src"),
    "an empty folder of theirs": lambda out: (out / "src").mkdir(parents=True),
    "a link to their folder": lambda out: shutil.copytree(out.parent / "links", out, symlinks=True),
    "theirs beside ours": put_beside_ours("notes.txt"),
    "theirs in a folder of ours": put_beside_ours("training/notes"),
    "a mark that is no mark": lambda out: write_files(out, {MARK: '{"files": ["src/main.py"]}', "src/main.py": "x"}),
    "a mark that points outside": lambda out: write_files(
        out, {MARK: '{"format": "gemvg-edge-result", "files": ["../data/x", "/etc/x"]}', "data/x": "x"}
    ),
    "a partial folder of theirs": lambda out: write_files(out, {f"{STAGING}/x": "x"}),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_we_did_not_write_is_refused_and_stays(case: str, tmp_path: Path) -> None:
    write_files(tmp_path, {"data/x": "x", "links/.gitattributes": ""})
    (tmp_path / "links" / "training").symlink_to(tmp_path / "data")
    out = tmp_path / "out"
    FOREIGN[case](out)
    if case == "a dangling link's file":
        (tmp_path / "src").write_text("mine")
    before = read_files(tmp_path)
    with pytest.raises(GemvgError, match=r"(holds|is a file|not ours)"):
        result(out, NEW)
    assert read_files(tmp_path) == before


def test_a_link_is_followed_and_the_folder_itself_stays(tmp_path: Path) -> None:
    """As it must be where the folder is a mount point: it is never renamed."""
    real = tmp_path / "volume"
    real.mkdir()
    (tmp_path / "out").symlink_to(real)
    inode = real.stat().st_ino
    for files in (OLD, NEW):
        result(tmp_path / "out", files)
        assert without_mark(read_files(real)) == files
    assert real.stat().st_ino == inode
    assert (tmp_path / "out").is_symlink()


@pytest.mark.parametrize("given", ["model", "model/.", "link", "sub/../model", ""], ids=repr)
def test_an_input_is_never_the_output(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, {"model/config.json": "{}", "sub/x": ""})
    (tmp_path / "link").symlink_to(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GemvgError, match=r"(is|holds) .*model, which is read"):
        check_target(Path(given), KEY, [Path("model")])


def test_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with new_folder(tmp_path / "out", KEY) as folder:
            write_files(folder, NEW)
            (folder / KEY).chmod(0o600)  # as safetensors' files are
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "out").iterdir()} == {"0o640"}


def test_two_runs_do_not_write_to_one_place(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out", KEY) as folder:
        write_files(folder, NEW)
        with pytest.raises(GemvgError, match="used by another run"):
            result(tmp_path / "out", OLD)
    assert without_mark(read_files(tmp_path / "out")) == NEW


THEIRS: dict[str, Callable[[Path], object]] = {
    "a file of theirs": lambda folder: write_files(folder, {"notes.txt": "x"}),
    "a finished result of ours": lambda folder: result(folder, OLD),
    "a mark without sense": lambda folder: write_files(folder, {MARK: "{", "notes.txt": "x"}),
    "their own partial": lambda folder: write_files(folder, {"checkpoint-1/x": "x"}),
}


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("case", THEIRS)
def test_a_folder_to_work_in_is_ours_or_empty(case: str, keep: bool, tmp_path: Path) -> None:
    """As OUT.work of a run, and as --folder of a benchmark, which is taken away at the end."""
    THEIRS[case](tmp_path / "work")
    before = read_files(tmp_path)
    with (
        pytest.raises(GemvgError, match="was not made by gemvg-edge to work in"),
        marked(tmp_path / "work", {"format": WORK}, keep=keep),
    ):
        pass
    assert read_files(tmp_path) == before


def test_a_fingerprint_tells_contents(tmp_path: Path) -> None:
    write_files(tmp_path, {"model/a.safetensors": "1", "model/x.png": "1", "records.jsonl": "{}"})
    before = [fingerprint(tmp_path / name) for name in ("model", "records.jsonl", "none")]
    assert before[2] == ""
    assert before == [fingerprint(tmp_path / name) for name in ("model", "records.jsonl", "none")]
    write_files(tmp_path, {"model/a.safetensors": "2", "records.jsonl": "[]"})
    assert not {fingerprint(tmp_path / "model"), fingerprint(tmp_path / "records.jsonl")} & set(before)


def test_a_bundle_beside_what_people_keep_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    write_files(target, BESIDE)
    for content in ("one", "two"):
        with new_bundle_folder(target, ("vision.engine",), overwrite=content == "two") as folder:
            write_files(folder, {"vision.engine": content, MANIFEST: '{"format": "gemvg-edge-bundle"}'})
    assert read_files(target).items() >= BESIDE.items()
    assert set(read_files(target)) == {*BESIDE, "vision.engine", MANIFEST}
    assert (target / "vision.engine").read_text() == "two"


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a mark can be written then, and what fills the disk must go all the same."""
    result(tmp_path / "out", OLD)
    writing = Path.write_text

    def full(path: Path, *arguments: Any, **named: Any) -> int:
        if path.name.endswith(".partial"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return writing(path, *arguments, **named)

    before = read_files(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(GemvgError, match=r"out cannot be written .No space left on device"):
            result(tmp_path / "out", NEW)
    assert read_files(tmp_path) == before


def test_a_finished_result_is_replaced_only_when_that_is_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result(out, OLD, overwrite=False)
    with pytest.raises(GemvgError, match=r"out holds a finished result; add --overwrite to replace it, or give anoth"):
        result(out, NEW, overwrite=False)
    assert without_mark(read_files(out)) == OLD
    (out / KEY).unlink()  # as a kill leaves it
    result(out, NEW, overwrite=False)
    assert without_mark(read_files(out)) == NEW
    (out / "notes.txt").write_text("mine")
    with pytest.raises(GemvgError, match=r"holds notes.txt, which gemvg-edge did not write"):
        result(out, OLD, overwrite=False)


DIFFERENCES: dict[str, tuple[dict[str, Any], str]] = {
    "a number": ({"group_size": 32}, "--group-size was 128, now 32"),
    "two": ({"group_size": 32, "model": "/b"}, "--model was /a, now /b; --group-size was 128, now 32"),
    "a path that was not given": ({"records": "/r"}, "--records was not given, now /r"),
    "what lies at a path": ({f"{CONTENTS}/a": "e" * 64}, "the contents of /a changed"),
    "another path": ({"model": "/b", f"{CONTENTS}/a": None, f"{CONTENTS}/b": "e"}, "--model was /a, now /b"),
    "a setting of another release": ({"search": True}, "--search was not given, now True"),
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_what_differs_is_said_in_flags(case: str, tmp_path: Path) -> None:
    change, said = DIFFERENCES[case]
    before = {"format": WORK, "model": "/a", "group_size": 128, "records": None, f"{CONTENTS}/a": "d" * 64}
    now = {key: value for key, value in (before | change).items() if value is not None or key == "records"}
    claim(tmp_path / "work", before, keep=True).close()
    (tmp_path / "work" / "part").touch()
    with pytest.raises(GemvgError) as caught:
        claim(tmp_path / "work", now, keep=True)
    assert f"belongs to a run with other settings ({said}); delete it" in str(caught.value)
