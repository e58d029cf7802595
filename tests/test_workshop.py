"""`gemvg train|quantize|export|bench|plan`: the workshop's commands by the door of the runtime."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gemvg_edge import workshop
from gemvg_edge.cli import main
from gemvg_edge.workshop import FOLDERS, commands

ROOT = Path(__file__).parents[1]


def test_lists_what_can_be_run(capsys: pytest.CaptureFixture[str]) -> None:
    for stage in FOLDERS:
        assert main([stage]) == 0
        lines = capsys.readouterr().out.splitlines()[2:]
        assert len(lines) == len(commands(stage)) > 2
        assert all(len(line.split(maxsplit=1)[1]) > 20 for line in lines)
    assert "export.render_template" not in commands("export")
    assert set(commands("quantize")) == {"quantize.gptq", "quantize.rotate", "quantize.smooth"}


def test_runs_a_command_with_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "to-onnx", "nowhere", "bundle"]) == 2
    assert capsys.readouterr().err.startswith("export.to_onnx: nowhere: no such checkpoint folder")
    assert main(["plan", "--help"]) == 0
    assert "usage: " in capsys.readouterr().out


def test_an_unknown_command_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("sfft", "../x", "checkpoint", ""):
        assert main(["train", name]) == 2
        assert f"`train` has no command {name!r}; `gemvg train` lists them" in capsys.readouterr().err


def test_without_the_checkout_the_sentence_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workshop, "ROOT", tmp_path)
    assert main(["train", "sft"]) == 2
    said = capsys.readouterr().err
    assert "`train` is part of the workshop, which is gemvg-edge's repository and no part of its wheel; run" in said


def test_a_folder_of_the_same_name_is_not_run(tmp_path: Path) -> None:
    """Python would find the user's own `train` first where it starts in his folder."""
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "__init__.py").write_text("print('somebody else'); raise SystemExit(0)")
    (tmp_path / "train" / "mix.py").write_text("print('somebody else')")
    (tmp_path / "train" / "sft.py").write_text("print('somebody else')")
    done = subprocess.run(
        [sys.executable, "-m", "gemvg_edge", "train", "sft", "--help"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert f"not in {ROOT}; start from another folder" in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_a_script_of_the_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "--max-new-tokens" in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        asked = f'{script}\nCOMP_WORDS=(gemvg ground --max); COMP_CWORD=2; _shtab_gemvg; echo "${{COMPREPLY[@]}}"'
        done = subprocess.run(["bash"], input=asked, text=True, capture_output=True, check=True)
        assert done.stdout.split() == ["--max-pixels", "--max-new-tokens"]
        asked = f'{script}\nCOMP_WORDS=(gemvg quantize g); COMP_CWORD=2; _shtab_gemvg; echo "${{COMPREPLY[@]}}"'
        done = subprocess.run(["bash"], input=asked, text=True, capture_output=True, check=True)
        assert done.stdout.split() == ["gptq"]


def test_a_mistyped_command_is_told_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["trian"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert all(f"'{name}'" in said for name in ("ground", "train", "export", "plan"))


def test_completion_without_its_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "run `pip install shtab`" in capsys.readouterr().err


def test_help_groups_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for name in ("ground", "inspect", "train", "quantize", "export", "bench", "plan", "completion"):
        assert f"\n  {name} " in text
        assert f"\n                gemvg {name} " in text, "an example each"


def test_python_m_gemvg_edge_is_gemvg() -> None:
    done = subprocess.run([sys.executable, "-m", "gemvg_edge", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("gemvg-edge ")
