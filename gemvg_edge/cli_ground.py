"""`gemvg ground`: pictures from files or stdin, queries from arguments, files or stdin; lines, JSON or drawings out."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image

from gemvg_edge.command import one_line
from gemvg_edge.draw import draw_boxes, side_by_side
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_folder, printable, refuse_inputs, refuse_present, replacing, unreadable
from gemvg_edge.grounder import Grounder
from gemvg_edge.grounding import Grounding
from gemvg_edge.images import load_image
from gemvg_edge.json_object import parse_json, short
from gemvg_edge.prompt import MAX_QUERY, check_query
from gemvg_edge.scene import Scene

STDIN = "-"
LARGEST = 2**28  # bytes of a picture on stdin
SKIPPED = 100  # times LONGEST: a line that has not ended by then never will
STEM = 60  # characters of a picture's name in that of its drawing
LONGEST = 8 * MAX_QUERY  # characters of a line of queries: JSON may write a character as six


class Asked(NamedTuple):
    """A line of a file of queries."""

    query: str
    think: bool


def ground(options: argparse.Namespace) -> int:
    """The command; its exit code."""
    _check(options)
    targets = _targets(options) if options.draw is not None else []
    pictures = [_load(name) for name in options.images]
    with Grounder.open(
        options.bundle,
        engine=options.engine,
        threads=options.threads,
        max_pixels=options.max_pixels,
        max_new_tokens=options.max_new_tokens,
        cache_bytes=0,  # one look in all
    ) as grounder:
        scene = grounder.look(pictures, timeout=options.timeout)
        if options.queries is not None:
            return _answer_lines(scene, options)
        groundings = [scene.ground(query, think=options.think, timeout=options.timeout) for query in options.query]
    if targets:
        drawn = draw_boxes(pictures, groundings)
        for picture, target in zip(drawn if len(targets) > 1 else [side_by_side(drawn)], targets, strict=True):
            _save(picture, target, options.overwrite)
    several = len(groundings) > 1
    if several and not options.json:
        t = scene.timings
        print(
            f"looked in {t.look_ms:.0f} ms: preprocess {t.preprocess_ms:.0f}, vision {t.vision_ms:.0f}, "
            f"prefill {t.image_prefill_ms:.0f} ({t.image_tokens} tokens)"
        )
    for grounding in groundings:
        if options.json:
            print(grounding.to_json())
        else:
            _print_lines(grounding, several)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuse, before any work, arguments that do not fit each other."""
    for query in options.query:
        check_query(query)
    if options.queries is not None and options.draw is not None:
        raise GemvgError("--draw shows the answers to --query, not those to --queries; give one of them")
    if [*options.images, options.queries].count(STDIN) > 1:
        raise GemvgError("- stands for stdin and can be given once, for one picture or for --queries")
    if options.queries not in (None, STDIN) and (
        not os.path.exists(options.queries) or is_folder(Path(options.queries))
    ):
        raise GemvgError(f"{printable(options.queries)}: no such file of queries")


def _load(name: str) -> Image.Image:
    if name != STDIN:
        return load_image(name)
    data = _stdin().read(LARGEST + 1)
    if len(data) > LARGEST:
        raise GemvgError(f"stdin has more than {LARGEST} bytes; give the picture as a file")
    return load_image(data, "stdin")


def _stdin() -> BinaryIO:
    if sys.stdin is None:  # Python's own mark of a descriptor that was closed at the start
        raise GemvgError("stdin is closed; pipe something in, or give the name of a file")
    return sys.stdin.buffer


def _answer_lines(scene: Scene, options: argparse.Namespace) -> int:
    """A line of JSON for each line of queries, as soon as it is known; 2 where any was refused."""
    asked = refused = 0
    for number, line in _lines(options.queries):
        asked += 1
        content: dict[str, Any] = {}
        try:
            one = _read_line(line, number, options.think, content)
            content |= {"query": one.query}
            content |= scene.ground(one.query, think=one.think, timeout=options.timeout).to_dict()
        except GemvgError as error:
            refused += 1
            content["error"] = one_line(error)
        print(json.dumps(content), flush=True)
    if refused:
        raise GemvgError(f"{refused} of {asked} queries were refused; the lines with `error` say why")
    return 0


def _lines(source: str) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, with their numbers from 1; one that is too long is cut, and so no JSON."""
    if source == STDIN:
        yield from _numbered(io.TextIOWrapper(_stdin(), encoding="utf-8-sig", errors="surrogateescape"))
        return
    try:
        with Path(source).open(encoding="utf-8-sig", errors="surrogateescape") as file:
            yield from _numbered(file)
    except (OSError, ValueError) as error:
        if isinstance(error, GemvgError):
            raise
        raise unreadable(Path(source), error) from None


def _numbered(file: io.TextIOBase | io.TextIOWrapper) -> Iterator[tuple[int, str]]:
    number = 0
    while line := file.readline(LONGEST):
        number += 1
        if line.strip():
            yield number, line
        for _ in range(SKIPPED):
            if len(line) < LONGEST or line.endswith("\n"):
                break
            line = file.readline(LONGEST)
        else:
            raise GemvgError(f"line {number} of the queries does not end; give JSON Lines")


def _read_line(line: str, number: int, think: bool, told: dict[str, Any]) -> Asked:
    """What a line asks; its id, as soon as it is known, goes into `told`."""
    if len(line) == LONGEST and not line.endswith("\n"):
        raise GemvgError(f"line {number} of the queries has more than {LONGEST} characters; shorten it")
    try:
        content = parse_json(line)
    except ValueError as error:
        raise GemvgError(f'line {number} of the queries is not JSON ({error}); write it as "..." or {{...}}') from None
    if isinstance(content, str):
        return Asked(content, think)
    if isinstance(content, dict) and content.get("id") is not None:
        if type(content["id"]) not in (str, int, float):
            raise GemvgError(f"line {number} of the queries: id is {short(content['id'])}, no text and no number")
        told["id"] = content["id"]
    if not isinstance(content, dict) or not isinstance(content.get("query"), str):
        raise GemvgError(f"line {number} of the queries is {short(content)}; give a text, or an object with `query`")
    if unknown := sorted(set(content) - {"query", "id", "think"}):
        raise GemvgError(
            f"line {number} of the queries has the unknown field {short(unknown[0])}; known are id, query, think"
        )
    thinks = content.get("think", think)
    if not isinstance(thinks, bool):
        raise GemvgError(f"line {number} of the queries: think is {short(thinks)}, not true or false")
    return Asked(content["query"], thinks)


def _print_lines(grounding: Grounding, several: bool) -> None:
    """What people read of an answer; of several, the look is told before."""
    if several:
        print(json.dumps(grounding.query, ensure_ascii=False))
    for box in grounding.boxes:
        label = "" if box.label in (None, grounding.query) else f"  {printable(str(box.label))}"
        score = "" if box.score is None else f"  {box.score:.2f}"
        corners = f"x1={box.x1:.0f} y1={box.y1:.0f} x2={box.x2:.0f} y2={box.y2:.0f}"
        print(f"{grounding.pictures[box.image].name}  {corners}{label}{score}")
    if not grounding.boxes:
        print(f"nothing found ({grounding.problem})" if grounding.problem else "nothing found")
    elif grounding.problem:
        print(f"note: {grounding.problem}")
    t = grounding.timings
    if several:
        phases = f"prefill {t.query_prefill_ms:.0f}, decode {t.decode_ms:.0f} ({t.answer_tokens} tokens)"
        print(f"{t.answer_ms:.0f} ms: {phases}")
        return
    print(
        f"{t.total_ms:.0f} ms: preprocess {t.preprocess_ms:.0f}, vision {t.vision_ms:.0f}, "
        f"prefill {t.image_prefill_ms + t.query_prefill_ms:.0f}, decode {t.decode_ms:.0f} ({t.answer_tokens} tokens)"
    )


def _targets(options: argparse.Namespace) -> list[Path]:
    """The files that --draw writes: one for all pictures, or one for each in a folder."""
    path: Path = options.draw
    inputs = [Path(name) for name in options.images if name != STDIN]
    if is_folder(Path(os.path.realpath(path))) and path.suffix.lower() not in Image.registered_extensions():
        stems = [Path(name).stem[:STEM] if name != STDIN else "stdin" for name in options.images]
        targets = [path / f"{k}-{stem}.png" for k, stem in enumerate(stems, 1)]
    else:
        targets = [path]
    for target in targets:
        _check_target(target, inputs, options.overwrite)
    return targets


def _check_target(path: Path, inputs: Iterable[Path], overwrite: bool) -> None:
    """Refuse, before any work, a picture that cannot be written, or whose writing would lose a file of the user's."""
    refuse_inputs(path, inputs, "--draw")
    real = Path(os.path.realpath(path))  # where the writing ends up: `nowhere/../a.png` is a.png
    if is_folder(real):
        raise GemvgError(f"--draw {printable(path)} cannot be written (it is a folder); give the name of a picture")
    if not overwrite:
        refuse_present(path, "--draw")
    if not is_folder(real.parent):
        raise GemvgError(f"--draw {printable(path)}: the folder {printable(path.parent)} does not exist; make it first")
    file_format = Image.registered_extensions().get(path.suffix.lower())
    try:
        # Pillow reads more formats than it writes, and some it writes without colour.
        Image.new("RGB", (1, 1)).save(io.BytesIO(), file_format or "")
    except (KeyError, OSError, ValueError):
        ending = path.suffix or "no ending"
        raise GemvgError(
            f"--draw {printable(path)}: {ending} is not a picture format to write; use .png or .jpg"
        ) from None


def _save(picture: Image.Image, path: Path, overwrite: bool) -> None:
    with replacing(path, overwrite) as partial:
        try:
            picture.save(partial)
        except Exception as error:  # each of Pillow's formats has limits and words of its own
            if isinstance(error, OSError) and error.errno is not None:  # the disk's
                raise
            raise GemvgError(
                f"--draw {printable(path)}: {picture.width} x {picture.height} pixels cannot be written as "
                f"{path.suffix} ({one_line(error) or type(error).__name__}); use .png"
            ) from None
