"""Render the held-out scenes of examples/images, with their questions and true boxes in scenes.json.

    python -m bench.examples [FOLDER]

They were chosen by eye for variety among scenes that the shipped model gets right; scores are bench.accuracy's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from bench.readme import ROOT
from gemvg_edge.command import command
from train.data.record import Kind
from train.world.render import render
from train.world.samples import held_out_question
from train.world.scenes import read_scenes

SIZE = 320  # larger than what the model sees, as a camera's pictures are
# Seed of the scene (held-out ones start at a million) and the kind of the question asked of it.
SCENES: tuple[tuple[int, Kind], ...] = (
    (1_000_254, "referential"),
    (1_000_540, "semantic"),
    (1_000_500, "spatial"),
    (1_000_519, "temporal"),
    (1_000_506, "temporal"),
    (1_000_508, "reasoning"),
)


def write_examples(target: Path) -> None:
    """Write sceneN-a.png, sceneN-b.png and scenes.json."""
    target.mkdir(parents=True, exist_ok=True)
    records = []
    for n, (seed, kind) in enumerate(SCENES, 1):
        with tempfile.TemporaryDirectory() as folder:
            render(Path(folder), seed - seed % 2, scenes=2, size=SIZE, processes=1)
            scenes = {scene.seed: scene for scene in read_scenes(Path(folder))}
            asked = held_out_question(scenes[seed], scenes[seed ^ 1], kind)
            if asked is None:
                raise ValueError(f"scene {seed} does not allow a {kind} question; choose another")
            pictures, question = asked
            names = [f"scene{n}-{letter}.png" for letter in "ab"]
            for name, view in zip(names, pictures.views, strict=True):
                shutil.copyfile(Path(folder, view.file), target / name)
        boxes = [(box.image, *box) for box in question.boxes]
        records.append({"seed": seed, "kind": kind, "images": names, "query": question.text, "boxes": boxes})
    (target / "scenes.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


@command("bench.examples")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser("python -m bench.examples", description="Render the example scenes.")
    folder = "the folder to render into (default: examples/images)"
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "examples" / "images", help=folder)
    write_examples(parser.parse_args().folder)


if __name__ == "__main__":
    main()
