"""Does a model fit a device, and how long would it take there? Planned before anything is exported.

    python -m bench.plan --model qwen2-vl-7b --device jetson-orin-nano-8gb [--pictures 2] [--tokens 256 1024]
    python -m bench.plan --check [--save bench/results/plan.json]

`--model` is a checkpoint folder (its weights are not read) or a shape of model_shapes.json. Memory is added up part by
part; times are a roofline (roofline.py) whose two efficiencies are fitted on every other row of published.json.
`--check` prints how far off it is on the rows between, which the fit never saw. Nothing here was measured by us, and
the kernels that were measured are TensorRT Edge-LLM's. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from bench.fit import roofline
from bench.fit.roofline import DecoderShape, Device, Efficiency, Point, Precision, Shape, VisionShape
from bench.results import result_file, save_result
from bench.tables.plan import PARTS
from bench.tables.plan import plan as check_table
from bench.tables.plan import plan_7b as plan_table
from gemvg_edge.command import command, whole_number
from gemvg_edge.engines.placement import scene_slots
from gemvg_edge.errors import GemvgError
from quantize.model_config import read_config

FOLDER = Path(__file__).with_name("fit")
DEVICES, SHAPES, PUBLISHED = (FOLDER / name for name in ("devices.json", "model_shapes.json", "published.json"))
GB = 1e9
# What `quantize.gptq` makes: nothing, its default, and the recipe of the shipped bundle.
RECIPES = (
    Precision("float16", "float16"),
    Precision("int4 decoder, float16 rest", "int4"),
    Precision("int4 decoder, int8 rest", "int4", head="int8", embedding="int8", vision="int8"),
)
BUDGETS = (256, 512, 1024, 2048)  # visual tokens a picture
TEXT_TOKENS = 100  # template and question
ANSWER_TOKENS = 100  # five boxes in digits, about 19 tokens each
# CUDA's context, engine and workspace: TensorRT Edge-LLM's installation guide asks for 2 GB beside the model, and its
# published peaks are weights, cache and 1.4-1.5 GB.
RUNTIME = 2 * GB
TIGHT = 0.5 * GB  # less to spare than this is within what these assumptions can be wrong by


@dataclass(frozen=True)
class Measured:
    """A published time, with the row and the phase that it is of."""

    row: dict[str, Any]
    phase: str
    point: Point


def read_devices() -> dict[str, Device]:
    """The devices of devices.json by name."""
    return {
        name: _device(name, entry) for name, entry in json.loads(DEVICES.read_text(encoding="utf-8"))["devices"].items()
    }


def _device(name: str, entry: dict[str, Any]) -> Device:
    return Device(
        name,
        usable=entry["usable_gib"]["value"] * 2**30,
        system=entry["system_gib"]["value"] * 2**30,
        bandwidth=entry["bandwidth_gbs"]["value"] * 1e9,
        peak={kind: number["value"] * 1e12 for kind, number in entry["peak"].items()},
    )


def find_device(name: str) -> Device:
    """A device by its name; GemvgError lists the names."""
    devices = read_devices()
    if name not in devices:
        raise GemvgError(f"no device {name!r} in {DEVICES.name}; known are {', '.join(devices)}")
    return devices[name]


def read_shapes() -> dict[str, Shape]:
    """The models of model_shapes.json by name."""
    return {
        name: Shape(name, DecoderShape(**s["decoder"]), VisionShape(**s["vision"]), s["max_visual_tokens"])
        for name, s in json.loads(SHAPES.read_text(encoding="utf-8"))["shapes"].items()
    }


def find_shape(model: str) -> Shape:
    """The shape of a checkpoint folder, or one of model_shapes.json by its name."""
    shapes = read_shapes()
    if model in shapes:
        return shapes[model]
    if not Path(model).is_dir():
        raise GemvgError(f"{model}: neither a checkpoint folder nor a known shape ({', '.join(shapes)})")
    return roofline.shape_of(read_config(Path(model)), Path(model).resolve().name)


def read_measured(super_mode: bool = False) -> list[Measured]:
    """Every published time that the roofline has a model of; rows are fitted on and held out in turn.

    With `super_mode` the rows of a device that has one are taken as measured in it.
    """
    devices, shapes, measured = read_devices(), read_shapes(), []
    rows = [
        row for row in json.loads(PUBLISHED.read_text(encoding="utf-8"))["rows"] if "prefill" not in row["left_out"]
    ]
    for k, row in enumerate(rows):
        faster = f"{row['device']}-super"
        device = devices[faster if super_mode and faster in devices else row["device"]]
        shape, precision = shapes[row["model"]], _published_precision(row)
        works = {
            "prefill": (roofline.prefill_work(shape, precision, row["prompt_tokens"]), row["prefill_ms"] / 1e3),
            "decode": (roofline.decode_work(shape, precision, row["past_tokens"]), 1 / row["decode_tokens_per_s"]),
        }
        if row["vision_ms"]:
            works["vision"] = roofline.vision_work(shape, precision, row["visual_tokens"]), row["vision_ms"] / 1e3
        for phase, (work, seconds) in works.items():
            if phase not in row["left_out"]:
                measured.append(Measured(row, phase, Point(work, device, seconds, fitted=k % 2 == 0)))
    return measured


def _published_precision(row: dict[str, Any]) -> Precision:
    return Precision(row["decoder"], row["decoder"], head=row["head"], vision=row["vision"])


def check() -> dict[str, Any]:
    """Fit on one half of the published rows and predict all of them."""
    measured = read_measured()
    points = [m.point for m in measured]
    swapped = [replace(point, fitted=not point.fitted) for point in points]
    in_super_mode = [m.point for m in read_measured(super_mode=True)]
    efficiency = roofline.fit(points)
    rows = [
        {
            **{key: m.row[key] for key in ("device", "model", "decoder", "version", "benchmark")},
            "phase": m.phase,
            "published_ms": 1e3 * m.point.seconds,
            "predicted_ms": 1e3 * m.point.work.seconds(m.point.device, efficiency),
            "error": roofline.relative_error(m.point, efficiency),
            "fitted": m.point.fitted,
        }
        for m in measured
    ]
    held_out = [row for row in rows if not row["fitted"]]
    by_phase = {
        phase: median(abs(row["error"]) for row in held_out if row["phase"] == phase)
        for phase in ("vision", "prefill", "decode")
    }
    return {
        "efficiency": {"compute": efficiency.compute, "bandwidth": efficiency.bandwidth},
        "median_error": roofline.held_out_error(points),
        "median_error_of_phases": by_phase,
        "median_error_halves_swapped": roofline.held_out_error(swapped),
        "median_error_super_mode": roofline.held_out_error(in_super_mode),
        "held_out": len(held_out),
        "rows": rows,
        "memory": _check_memory(),
        "left_out": _left_out(),
    }


def _check_memory() -> list[dict[str, Any]]:
    published, shapes = json.loads(PUBLISHED.read_text(encoding="utf-8")), read_shapes()
    rows = []
    for row in published["rows"]:
        if row["memory_mb"] and "memory" not in row["left_out"]:
            shape = shapes[row["model"]]
            weights = sum(roofline.weight_bytes(shape, _published_precision(row)).values())
            parts = weights + published["cache_tokens"] * shape.decoder.cache_bytes
            sizes = {"published_gb": row["memory_mb"] / 1e3, "weights_and_cache_gb": parts / GB}
            planned = (parts + RUNTIME) / GB
            errors = {"planned_gb": planned, "error": planned / sizes["published_gb"] - 1}
            rows.append({"device": row["device"], "model": row["model"]} | sizes | errors)
    return rows


def _left_out() -> list[dict[str, Any]]:
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    what: dict[str, list[str]] = {reason: [] for reason in published["reasons"]}
    for row in published["rows"]:
        for phase, reason in row["left_out"].items():
            what[reason].append(f"{phase} of {row['model']} {row['decoder']} {row['version']} on {row['device']}")
    return [{"reason": published["reasons"][reason], "what": entries} for reason, entries in what.items()]


def plan(shape: Shape, device: Device, pictures: int = 2, budgets: Sequence[int] = BUDGETS) -> dict[str, Any]:
    """Memory by part and the times of each phase, for every recipe and size of the pictures."""
    if pictures < 1 or min(budgets) < 1:
        raise GemvgError(f"{pictures} pictures of {min(budgets)} visual tokens; there must be at least one of each")
    efficiency = roofline.fit([m.point for m in read_measured()])
    capped = sorted({min(budget, shape.max_visual_tokens) for budget in budgets})
    entry = json.loads(DEVICES.read_text(encoding="utf-8"))["devices"][device.name]
    result = {
        "model": shape.name,
        "device": device.name,
        "title": entry["title"],
        "note": entry["note"],
        "pictures": pictures,
        "text_tokens": TEXT_TOKENS,
        "answer_tokens": ANSWER_TOKENS,
        "usable_gb": device.usable / GB,
        "system_gb": device.system / GB,
        "runtime_gb": RUNTIME / GB,
        "cache_gb_a_thousand_tokens": 1000 * shape.decoder.cache_bytes / GB,
        "pixels_a_token": shape.vision.pixels_a_token,
        "efficiency": {"compute": efficiency.compute, "bandwidth": efficiency.bandwidth},
        "recipes": [
            {
                "name": recipe.name,
                "stored": {part: getattr(recipe, part) for part in PARTS},
                "weights_gb": {part: size / GB for part, size in roofline.weight_bytes(shape, recipe).items()},
                "building_gb": roofline.building_bytes(shape, recipe) / GB,
                "budgets": [
                    _memory(shape, device, recipe, pictures, tokens)
                    | _times(shape, device, recipe, efficiency, pictures, tokens)
                    for tokens in capped
                ],
            }
            for recipe in RECIPES
        ],
    }
    if result["recipes"][-1]["budgets"][-1]["verdict"] == "fits":
        return result
    return result | {"changes": _changes(shape, device, pictures, capped)}


def _changes(shape: Shape, device: Device, pictures: int, budgets: Sequence[int]) -> dict[str, Any]:
    """What else could be done where the smallest recipe does not fit with room to spare."""
    recipe, further = RECIPES[-1], []
    for part in ("head", "embedding", "vision"):  # each on top of the one before
        recipe = replace(recipe, **{part: "int4"})
        room = _memory(shape, device, recipe, pictures, budgets[0])
        further.append({"part": part, "visual_tokens": budgets[0], "spare_gb": room["spare_gb"]})

    def fits(other: Shape, there: Device) -> bool:
        return bool(_memory(other, there, RECIPES[-1], pictures, budgets[-1])["verdict"] == "fits")

    size = sum(roofline.weight_bytes(shape, RECIPES[0]).values())
    smaller = [s for s in read_shapes().values() if sum(roofline.weight_bytes(s, RECIPES[0]).values()) < size]
    return {
        "further": further,
        "devices": [name for name, there in read_devices().items() if fits(shape, there)],
        "models": [other.name for other in smaller if fits(other, device)],
    }


def _memory(shape: Shape, device: Device, recipe: Precision, pictures: int, tokens: int) -> dict[str, Any]:
    prompt = pictures * tokens + TEXT_TOKENS
    cache = scene_slots(pictures, tokens) * shape.decoder.cache_bytes
    activations = roofline.activation_bytes(shape, prompt, tokens)
    needed = sum(roofline.weight_bytes(shape, recipe).values()) + cache + activations + RUNTIME
    spare = device.usable - device.system - needed
    return {
        "visual_tokens": tokens,
        "prompt_tokens": prompt,
        "cache_gb": cache / GB,
        "activations_gb": activations / GB,
        "needed_gb": needed / GB,
        "spare_gb": spare / GB,
        "verdict": "fits" if spare >= TIGHT else "tight" if spare >= 0 else "does not fit",
    }


def _times(
    shape: Shape, device: Device, recipe: Precision, efficiency: Efficiency, pictures: int, tokens: int
) -> dict[str, float]:
    prompt = pictures * tokens + TEXT_TOKENS
    vision = roofline.vision_work(shape, recipe, tokens, pictures).seconds(device, efficiency)
    prefill = roofline.prefill_work(shape, recipe, prompt).seconds(device, efficiency)
    # A step of our engines reads the whole cache, however few of its places are taken.
    token = roofline.decode_work(shape, recipe, scene_slots(pictures, tokens)).seconds(device, efficiency)
    answer = vision + prefill + ANSWER_TOKENS * token
    return {"vision_ms": 1e3 * vision, "prefill_ms": 1e3 * prefill, "decode_ms": 1e3 * token, "answer_s": answer}


@command("bench.plan")
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(
        "python -m bench.plan", description="Does a model fit a device, and how long would it take there?"
    )
    parser.add_argument("--model", help="a checkpoint folder, or a shape such as qwen2-vl-7b (needed without --check)")
    parser.add_argument(
        "--device", help="a name from bench/fit/devices.json, such as jetson-orin-nano-8gb (needed without --check)"
    )
    parser.add_argument(
        "--pictures", type=whole_number, metavar="N", default=2, help="pictures of a scene (default: %(default)s)"
    )
    tokens = f"visual tokens a picture, a row each (default: {' '.join(map(str, BUDGETS))})"
    parser.add_argument("--tokens", type=whole_number, nargs="+", metavar="N", default=BUDGETS, help=tokens)
    parser.add_argument("--check", action="store_true", help="predict what others published")
    saved = "keep the JSON here too, such as bench/results/plan.json (default: print it alone)"
    parser.add_argument("--save", type=result_file, metavar="FILE", help=saved)
    args = parser.parse_args(arguments)
    if not args.check and not (args.model and args.device):
        parser.error("give --model and --device, or --check")
    if args.check:
        result = check()
        print(check_table(result))
    else:
        result = plan(find_shape(args.model), find_device(args.device), args.pictures, args.tokens)
        print(plan_table(result))
    save_result(result, args.save)


if __name__ == "__main__":
    main()
