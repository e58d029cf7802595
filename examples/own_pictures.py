"""Stand-in for pictures of your own: rendered tables whose things are labelled in words that no shipped model knows.

    python -m train.world.render rendered --scenes 60 --first-seed 500000
    python examples/own_pictures.py rendered shop --held-out 10

Writes two COCO folders, `shop/train` and `shop/held-out`, as an export of CVAT or Label Studio lies on a disk. The last
scenes are held out. With data of your own you need none of this.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from gemvg_edge.command import command
from gemvg_edge.errors import GemvgError
from train.world.scenes import Scene, read_scenes

# What a shop could call its wares. A model of the shipped kind has to learn these words.
WARES = {"mug": "beaker", "bowl": "dish", "ball": "sphere", "duck": "bird", "book": "tome", "cone": "hat"}


@command("examples.own_pictures")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser("own_pictures.py", description="Write rendered scenes as two COCO folders.")
    parser.add_argument("scenes", type=Path, help="the folder that train.world.render wrote")
    parser.add_argument("out", type=Path, help="the folder to write; it must not be there")
    parser.add_argument("--held-out", type=int, metavar="N", default=10, help="scenes of the second folder")
    args = parser.parse_args()
    if args.out.exists():
        raise GemvgError(f"{args.out} is there already; give another place, or take it away")
    scenes = read_scenes(args.scenes)
    if not 0 < args.held_out < len(scenes):
        raise GemvgError(f"--held-out {args.held_out} of {len(scenes)} scenes leaves one of the two folders empty")
    write_coco(scenes[: -args.held_out], args.scenes, args.out / "train")
    write_coco(scenes[-args.held_out :], args.scenes, args.out / "held-out")


def write_coco(scenes: list[Scene], source: Path, out: Path) -> None:
    """Pictures and labels of some scenes, laid out as COCO is."""
    ids = {ware: k for k, ware in enumerate(WARES.values(), 1)}
    content: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
    content["categories"] = [{"id": k, "name": ware} for ware, k in ids.items()]
    pictures = out / "train2017"  # the name that COCO's own folder has
    pictures.mkdir(parents=True)
    for scene in scenes:
        for view in scene.views:
            image = len(content["images"]) + 1
            name = Path(view.file).name
            shutil.copyfile(source / view.file, pictures / name)
            content["images"].append({"id": image, "file_name": name, "width": view.width, "height": view.height})
            for (kind, _), box in zip(scene.things, view.boxes, strict=True):
                if box is not None and kind in WARES:
                    x1, y1, x2, y2 = box
                    annotation: dict[str, Any] = {
                        "id": len(content["annotations"]) + 1,
                        "image_id": image,
                        "iscrowd": 0,
                    }
                    annotation |= {"category_id": ids[WARES[kind]], "bbox": [x1, y1, x2 - x1, y2 - y1]}
                    content["annotations"].append(annotation)
    (out / "annotations").mkdir()
    (out / "annotations" / "instances_train2017.json").write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    main()
