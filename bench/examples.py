"""Render the held-out scenes of examples/images, with their questions and true boxes in scenes.json.

    python -m bench.examples [FOLDER]

They were chosen by eye for variety among scenes that the shipped model gets right; scores are bench.accuracy's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import astuple
from pathlib import Path

import numpy as np

from bench.readme import ROOT
from train.queries import ask
from train.tabletop import read_scenes, render

SIZE = 320  # larger than what the model sees, as a camera's pictures are
# Seed of the scene (held-out ones start at a million) and of the question asked of it.
SCENES = ((1_000_506, 4), (1_000_541, 3), (1_000_531, 2), (1_000_521, 1), (1_000_540, 1), (1_000_518, 3))


def write_examples(target: Path) -> None:
    """Write sceneN-a.png, sceneN-b.png and scenes.json."""
    target.mkdir(parents=True, exist_ok=True)
    records = []
    for n, (seed, question) in enumerate(SCENES, 1):
        with tempfile.TemporaryDirectory() as folder:
            render(Path(folder), seed, scenes=1, cameras=2, size=SIZE, processes=1)
            (scene,) = read_scenes(Path(folder))
            query = ask(scene, scene.views, np.random.default_rng([seed, question]))
            names = [f"scene{n}-{letter}.png" for letter in "ab"]
            for name, view in zip(names, scene.views, strict=True):
                shutil.copyfile(Path(folder, view.file), target / name)
        boxes = [astuple(box) for box in query.boxes]
        records.append({"seed": seed, "images": names, "query": query.text, "boxes": boxes})
    (target / "scenes.json").write_text(json.dumps(records, indent=1) + "\n")


def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(description="Render the example scenes.")
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "examples" / "images")
    write_examples(parser.parse_args().folder)


if __name__ == "__main__":
    main()
