"""Dockerfiles, and docs/howto/deploy.md's unit and proxy: what they name is there. No image is built here."""

from __future__ import annotations

import fnmatch
import http.server
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest

from bench.readme import ROOT
from gemvg_edge.serve.settings import Settings
from tests.test_docs import snippets

FILES = [ROOT / "Dockerfile", ROOT / "Dockerfile.jetson"]
PAGE = ROOT / "docs" / "howto" / "deploy.md"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def instructions(file: Path) -> list[tuple[str, str]]:
    """What a Dockerfile says, comments and broken lines put together."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = [line.split(maxsplit=1) for line in whole.splitlines() if line.strip()]
    return [(name, rest) for name, rest in found]


def of(file: Path, name: str) -> list[str]:
    return [rest for one, rest in instructions(file) if one == name]


def sent(path: str) -> bool:
    """Whether .dockerignore lets a file of the checkout through: its last pattern that fits decides."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if line and not line.startswith("#"):
            parts = [path, *map(str, Path(path).parents)]  # a folder's pattern is for all in it
            names = [Path(part).name for part in parts] if "**/" in line else []
            if any(fnmatch.fnmatch(part, pattern) for part in (*parts[:-1], *names)):
                kept = line.startswith("!")
    return kept


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_is_copied_is_there(file: Path) -> None:
    copied = [rest.split()[:-1] for rest in of(file, "COPY") if not rest.startswith("--from=")]
    sources = [source for rest in copied for source in rest]
    assert {"pyproject.toml", "hatch_build.py", "gemvg_edge"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists()
        assert sent(source), source
    named = {PROJECT["readme"], *PROJECT["license-files"]}  # a wheel is not built without them
    assert named <= set(sources)


def test_nothing_of_this_machine_is_sent() -> None:
    for path in ("gemvg_edge/engines/native/libgemvg-x86_64-avx2.so", "gemvg_edge/__pycache__/cli.pyc", ".git/config",
                 "runs/mine/model.safetensors", "data/a.json", ".venv/bin/python", "docs/index.md"):  # fmt: skip
        assert not sent(path), path
    for path in ("gemvg_edge/engines/native/src/engine.cpp", "gemvg_edge/models/tabletop/decoder.data"):
        assert sent(path), path


@pytest.mark.parametrize(("file", "extras"), [(FILES[0], {"onnx", "serve"}), (FILES[1], {"jetpack6", "serve"})])
def test_extras_exist(file: Path, extras: set[str]) -> None:
    text = file.read_text(encoding="utf-8")
    assert {name for found in re.findall(r"\.whl\)\[([^]]+)\]", text) for name in found.split(",")} == extras
    assert extras <= set(PROJECT["optional-dependencies"])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_an_image_runs_as_nobody_in_particular(file: Path) -> None:
    said = instructions(file)
    assert of(file, "USER")[-1] not in ("root", "0")
    assert said.index(("EXPOSE", "8000")) > max(k for k, (name, _) in enumerate(said) if name in ("FROM", "USER"))
    assert Settings().port == 8000
    command = json.loads(of(file, "ENTRYPOINT")[0]) + json.loads(of(file, "CMD")[0])
    assert command[:2] == ["gemvg", "serve"]
    help_text = subprocess.run(
        [sys.executable, "-m", "gemvg_edge.cli", "serve", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert all(word in help_text for word in command if word.startswith("--"))
    assert "ORT_DISABLE_TELEMETRY=1" in of(file, "ENV")[-1] or "onnx" not in file.read_text(encoding="utf-8")
    assert "NOT YET BUILT" in file.read_text(encoding="utf-8").split("FROM")[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_health_check(file: Path, status: int, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *said: object) -> None:
            """Nothing."""

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    command = json.loads(of(file, "HEALTHCHECK")[0].partition(" CMD ")[2])
    assert command[0] in ("python", "python3")
    script = command[2].replace("8000", str(server.server_port))
    try:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=20)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert (done.returncode, done.stderr, asked) == (code, "", ["/healthz"])


def shown(first: str) -> str:
    """The text on the page that begins so."""
    return next(one.code for one in snippets(PAGE) if one.language == "text" and one.code.startswith(first))


def test_unit_starts_what_there_is() -> None:
    unit = dict(line.split("=", 1) for line in shown("[Unit]").splitlines() if re.match(r"[A-Z]\w+=", line))
    command = shlex.split(unit["ExecStart"])
    assert command[1] == "serve"
    help_text = subprocess.run(
        [sys.executable, "-m", "gemvg_edge.cli", "serve", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert all(word in help_text for word in command if word.startswith("--"))
    credential = unit["LoadCredential"].split(":")[0]
    assert f"${{CREDENTIALS_DIRECTORY}}/{credential}" in command
    assert int(unit["TimeoutStopSec"]) > Settings().drain
    assert "ORT_DISABLE_TELEMETRY=1" in unit["Environment"].split()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_reads_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "gemvg.service"
    unit.write_text(shown("[Unit]").replace("/opt/gemvg/bin/gemvg", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    ours = [line for line in done.stderr.splitlines() if "gemvg" in line]
    assert (done.returncode, ours) == (0, [])


def test_proxy_passes_what_the_service_takes() -> None:
    proxy = shown("server {")
    size = re.search(r"client_max_body_size (\d+)m;", proxy)
    assert size is not None
    assert int(size[1]) * 2**20 == Settings().max_bytes
    read = re.search(r"proxy_read_timeout (\d+)s;", proxy)
    assert read is not None
    assert int(read[1]) > Settings().timeout
    assert f"http://{Settings().host}:{Settings().port}" in proxy
    name = re.search(r"server_name (\S+);", proxy)
    assert name is not None
    assert f"--allow-host {name[1]}\n" in shown("[Unit]")
