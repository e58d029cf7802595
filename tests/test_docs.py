"""The pages under docs/ and README.md: every snippet runs, and the site builds without a warning."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml  # type: ignore[import-untyped]

import gemvg_edge
from bench.readme import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "BUNDLE.md", *sorted(DOCS.rglob("*.md"))]
TUTORIALS = DOCS / "tutorials"
FENCE = re.compile(r'^```([^\s`]+)(?: norun="([^"]*)")?[ ]*\n(.*?)^```[ ]*$', re.MULTILINE | re.DOTALL)
SHOWN = ("json", "text")  # languages of what is only shown
SECONDS = 60  # of one shell snippet; those that take longer belong into examples/jobs
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


class Snippet(NamedTuple):
    """A fenced piece of a page."""

    language: str
    norun: str | None  # why the tests do not run it
    code: str
    line: int


def snippets(page: Path) -> list[Snippet]:
    """All of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Snippet(found[1], found[2], found[3], text.count("\n", 0, found.start()) + 2) for found in FENCE.finditer(text)
    ]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def workplace(folder: Path) -> dict[str, str]:
    """Two pictures in the folder, and the environment of a reader who has set up the workshop."""
    for name, source in (("left.png", "scene1-a.png"), ("right.png", "scene1-b.png")):
        shutil.copyfile(ROOT / "examples" / "images" / source, folder / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "GEMVG": str(ROOT), "OMP_NUM_THREADS": "1"}


def shell(code: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """What a shell makes of it, with all that it starts ended after SECONDS."""
    command = ["bash", "-euo", "pipefail", "-c", code]
    running = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, err = running.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)
        out, err = running.communicate()
    return subprocess.CompletedProcess(command, running.returncode, out, err)


@pytest.mark.filterwarnings("ignore:OpenCV:UserWarning")  # supervision would rather have it
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python in one namespace a page; the shell of a tutorial is run by test_jobs."""
    environment, names = workplace(tmp_path), {"__name__": "docs"}
    monkeypatch.chdir(tmp_path)
    for snippet in snippets(page):
        if snippet.norun is not None:
            continue
        if snippet.language == "python":
            # Lines of an error are the page's.
            exec(compile("\n" * (snippet.line - 1) + snippet.code, str(page), "exec"), names)
        elif snippet.language == "sh" and page.parent != TUTORIALS:
            done = shell(snippet.code, tmp_path, environment)
            assert done.returncode == 0, f"{name_of(page)}:{snippet.line}: {done.stderr[-2000:]}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_is_not_run_says_why(page: Path) -> None:
    for snippet in snippets(page):
        assert snippet.language in ("python", "sh", *SHOWN), f"{name_of(page)}:{snippet.line}: {snippet.language}"
        assert snippet.norun is None or len(snippet.norun.split()) > 1, f"{name_of(page)}:{snippet.line}"
    fences = re.findall(r"^\s*(?:```|~~~)\S", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(fences) == len(snippets(page)), "a fence that the tests do not see"


def test_most_snippets_are_run() -> None:
    runnable = [s for page in PAGES for s in snippets(page) if s.language not in SHOWN]
    assert sum(s.norun is None for s in runnable) > 2 * sum(s.norun is not None for s in runnable)


def test_site_builds_without_a_warning_and_asks_nobody(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for page in (tmp_path / "site").rglob("*.html"):
        asked = re.findall(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="(?:https?:)?//[^"]*"', page.read_text())
        assert not asked, page.name
    made = (tmp_path / "site" / "reference" / "commands.html").read_text()
    assert "gemvg train sft" in made
    assert "--learning-rate" in made
    assert (tmp_path / "site" / "demo.png").read_bytes() == (ROOT / "examples" / "demo.png").read_bytes()
    assert (tmp_path / "site" / "reference" / "grounding.schema.json").is_file()


def test_links_of_pages_lead_somewhere_in_the_checkout() -> None:
    for page in (*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"):
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{name_of(page)}: {target}"


def test_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    assert citation["version"] == gemvg_edge.__version__
    assert all("name" in author or "family-names" in author for author in citation["authors"])


def _steps(workflow: Path) -> list[dict[str, Any]]:
    content = yaml.safe_load(workflow.read_text(encoding="utf-8"))
    assert {"name", True, "permissions", "jobs"} <= set(content)  # YAML 1.1 reads `on` as true
    return [step for job in content["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda file: file.name)
def test_workflows_pin_their_actions(workflow: Path) -> None:
    steps = _steps(workflow)
    assert all(("uses" in step) != ("run" in step) for step in steps)
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@(release/)?v\d+", step["uses"]) for step in steps if "uses" in step)


def test_a_tag_of_another_version_is_not_released() -> None:
    step = next(s for s in _steps(ROOT / ".github" / "workflows" / "release.yml") if "tag" in s.get("name", ""))
    for tag, code in ((f"v{gemvg_edge.__version__}", 0), ("v99.0", 1), (gemvg_edge.__version__, 1)):
        assert shell(step["run"], ROOT, {**os.environ, "GITHUB_REF_NAME": tag}).returncode == code, tag


def test_only_one_job_may_publish() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))["jobs"]
    assert [name for name, job in jobs.items() if "id-token" in job.get("permissions", {})] == ["publish"]
    assert jobs["publish"]["environment"]["name"] == "pypi"
    assert jobs["publish"]["needs"] == "build"


@pytest.mark.parametrize("form", ["bug.yml", "question.yml"])
def test_issue_forms_are_forms(form: str) -> None:
    content = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / form).read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(content)
    ids = [part["id"] for part in content["body"] if part["type"] != "markdown"]
    assert ids
    assert len(set(ids)) == len(ids)
    assert all(part["attributes"].get("label") or part["type"] == "markdown" for part in content["body"])
