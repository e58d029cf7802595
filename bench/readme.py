"""Write the tables of README.md, docs/results.md and the shipped model's card from bench/results/; none is typed.

    python -m bench.readme [--check]

A table stands between `<!-- results: NAME -->` and `<!-- end -->`. With `--check` nothing is written and a stale file
is an error, which is how the tests use it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.boxes.scoring import gain_text
from bench.speed.report import growth
from bench.speed.report import markdown as latency
from bench.speed.tradeoff_report import front_table
from bench.tables import service
from bench.tables.answers import calibration, constrained
from bench.tables.boxes import compared, kinds, mig_bench, models, new_names, score_speed, with_interval
from bench.tables.engines import engine_builds, engines
from bench.tables.markdown import table
from bench.tables.plan import plan, plan_7b
from bench.tables.training import further, sampled, stages, train_step
from gemvg_edge.command import command

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "gemvg_edge" / "models" / "tabletop" / "README.md")
REPEATED = ("accuracy",)  # a table that stands on several pages; any other would be two to read for one

Result = dict[str, Any]


def compression(result: Result) -> str:
    """What each way to compress does to weights, next tokens and boxes."""
    rows = [
        [
            row["name"],
            f"{row['bytes'] / 1e6:.2f}",
            f"{100 * row['weight_error']:.2f}",
            "" if row["kl"] is None else f"{row['kl']:.4f}",
            f"{row['f1']:.3f}",
            "" if row["kl"] == 0 else gain_text(row["f1_gain"], row["f1_gain_interval"]),
            f"{row['mean_iou']:.3f}",
            f"{row['image_accuracy']:.3f}",
            f"{row['same_text']} / {row['n']}",
        ]
        for row in result["rows"]
    ]
    head = ["weights", "MB", "weight error, %", "KL, nats a token", "F1@0.5", "less float32 [95 %]", "mean IoU"]
    head += ["image accuracy", "same text as float32"]
    note = f"`{result['model']}`, groups of {result['group_size']}. "
    return table(head, rows) + "\n\n" + note + _machine(result)


def interchange(result: Result) -> str:
    """Logits of one side's checkpoints in the other's hands."""
    rows = [
        [row["writer"], row["case"], f"{row['largest_difference']:.0e}", f"{row['largest_logit']:.1f}"]
        for row in result["rows"]
    ]
    head = ["written by", "what", "largest difference of logits", "largest logit"]
    return table(head, rows) + "\n\n" + f"`{result['model']}`. " + _machine(result)


def memory(result: Result) -> str:
    """Peaks of quantising, export and grounding at Qwen2-VL-2B's size."""
    rows = [
        ["GPTQ to int4 (`quantize.gptq`)", f"{result['quantize_peak_gib']:.2f}", f"{result['quantize_seconds']:.0f}"],
        ["export to int4 (`export.to_onnx`)", f"{result['export_peak_gib']:.2f}", f"{result['export_seconds']:.0f}"],
        [
            "ground two 448 x 448 pictures (`gemvg ground`)",
            f"{result['ground_peak_gib']:.2f}",
            f"{result['ground_seconds']:.0f}",
        ],
    ]
    sizes = f"Checkpoint {result['checkpoint_gb']:.2f} GB (bfloat16), bundle {result['bundle_gb']:.2f} GB. "
    sizes += (
        f"GPTQ saw {result['quantize_samples']} prompts of {result['quantize_tokens']} tokens in all and took "
        f"{result['quantize_layer_seconds']:.1f} s a decoder layer; by the count of multiplications a layer of the 7B "
        f"takes {result['quantize_layer_seconds_7b']:.0f} s, and its 28 layers "
        f"{28 * result['quantize_layer_seconds_7b'] / 60:.0f} minutes. "
    )
    return table(["whole process", "peak memory, GiB", "seconds"], rows) + "\n\n" + sizes + _machine(result)


def vision_layout(result: Result) -> str:
    """Milliseconds of the vision tower, pictures grouped by shape against one ragged sequence."""
    rows = [
        [row["pictures"], f"{row['grouped_ms']:.0f}", f"{row['ragged_ms']:.0f}", f"{row['ragged_over_grouped']:.2f}"]
        for row in result["rows"]
    ]
    return table(["pictures", "grouped, ms", "ragged, ms", "ragged / grouped"], rows) + "\n\n" + _machine(result)


def pruning(result: Result) -> str:
    """What fewer visual tokens cost in boxes, each way at each share."""
    rows = [
        [
            f"`{row['name']}`",
            f"{row['share']:g}",
            f"{row['tokens']:.0f}",
            with_interval(row, "f1"),
            "" if row["share"] == 1 else gain_text(row["f1_gain"], row["f1_gain_interval"]),
            f"{row['mean_iou']:.3f}",
            f"{row['image_accuracy']:.3f}",
        ]
        for row in result["rows"]
    ]
    head = ["way", "share", "visual tokens", "F1@0.5", "less all tokens [95 %]", "mean IoU"]
    note = f"`{result['model']}`, {result['questions']} questions; `random` is over {result['seeds']} seeds. "
    return table([*head, "image accuracy"], rows) + "\n\n" + note + _machine(result)


def dialects(result: Result) -> str:
    """The largest difference to PyTorch of each output, and what a target's parser would refuse."""
    rows = [
        [
            f"{row['model']}, {row['weights']}",
            f"`{row['dialect']}`",
            *(f"{row[kind]:.0e}" if kind in row else "" for kind in ("vision", "prefill", "decode", "batch")),
            "" if row["with_8_bit_activations"] is None else f"{row['with_8_bit_activations']:.2f}",
            str(row["unparsed"]) if row["dialect"] != "fused" else "",
        ]
        for row in result["rows"]
    ]
    head = [
        "model, weights",
        "dialect",
        "vision",
        "prefill",
        "decode",
        "batch",
        "as it runs on a CPU",
        "nodes unparsed",
    ]
    return table(head, rows) + "\n\n" + f"Tolerance {result['tolerance']:g}. " + _machine(result)


def export_speed(result: Result) -> str:
    """What a float16 export costs beside a copy."""
    rows = [
        [f"`--precision float16 --dialect {row['dialect']}`", f"{row['peak_gib']:.2f}", f"{row['seconds']:.1f}",
         f"{row['over_copy']:.2f}"]
        for row in result["rows"]
    ]  # fmt: skip
    spread = f"{result['fastest_copy']:.1f} to {result['slowest_copy']:.1f}"
    copy = f"Checkpoint {result['checkpoint_gb']:.2f} GB, copied in {result['copy_seconds']:.1f} s ({spread}); "
    copy += f"medians of {result['rounds']} exports, each after a copy. "
    head = ["export", "peak memory, GiB", "seconds", "times the copy"]
    return table(head, rows) + "\n\n" + copy + _machine(result)


SECTIONS: dict[str, tuple[str, Callable[[Result], str]]] = {
    "accuracy": ("accuracy.json", lambda result: models(result) + "\n\n" + _machine(result)),
    "kinds": ("accuracy.json", kinds),
    "new names": ("accuracy_new_names.json", new_names),
    "mig bench migician": ("mig_bench_migician.json", mig_bench),
    "mig bench qwen2 vl": ("mig_bench_qwen2_vl.json", mig_bench),
    "int4": ("compare_int4.json", compared),
    "score speed": ("score_speed.json", lambda result: score_speed(result) + _machine(result)),
    "worlds": ("worlds.json", lambda result: stages(result) + _machine(result)),
    "train step": ("train_step.json", lambda result: train_step(result) + _machine(result)),
    "furnished": ("furnished.json", lambda result: stages(result) + _machine(result)),
    "bare": ("bare.json", lambda result: stages(result) + _machine(result)),
    "stages": ("stages.json", lambda result: stages(result) + _machine(result)),
    "further": ("further.json", lambda result: further(result) + _machine(result)),
    "reasoned": ("reasoned.json", lambda result: further(result) + _machine(result)),
    "reasoned shipped": ("reasoned_shipped.json", lambda result: further(result) + _machine(result)),
    "sampled": ("sampled.json", lambda result: sampled(result) + _machine(result)),
    "constrained": ("constrained.json", lambda result: constrained(result) + _machine(result)),
    "calibration": ("calibration.json", lambda result: calibration(result) + _machine(result)),
    "compression": ("compression.json", compression),
    "compression tensorrt": ("compression_tensorrt.json", compression),
    "interchange": ("interchange.json", interchange),
    "memory": ("memory.json", memory),
    "pruning": ("pruning.json", pruning),
    "dialects": ("dialects.json", dialects),
    "engines": ("engines.json", engines),
    "engine builds": ("engines.json", lambda result: engine_builds(result) + "\n\n" + _machine(result)),
    "latency": ("latency.json", latency),
    "latency growth": ("latency_growth.json", growth),
    "latency pruned": ("latency_pruned.json", latency),
    "export speed": ("export_speed.json", export_speed),
    "plan": ("plan.json", plan),
    "plan 7b": ("plan_qwen2_vl_7b_orin_nano.json", plan_7b),
    "tradeoff": ("tradeoff.json", front_table),
    "vision layout": ("vision_layout.json", vision_layout),
    "load": ("load.json", lambda result: service.load(result) + _machine(result)),
    "workers": ("workers.json", lambda result: service.workers(result) + _machine(result)),
    "host": ("host.json", lambda result: service.host(result) + "\n\n" + _machine(result)),
    "wheel": ("wheel.json", lambda result: service.wheel(result) + _machine(result)),
}


def render(page: str) -> str:
    """The page with every marked table written anew."""

    def write(match: re.Match[str]) -> str:
        file, section = SECTIONS[match[1]]
        body = section(json.loads((RESULTS / file).read_text(encoding="utf-8")))
        return f"<!-- results: {match[1]} -->\n{body}\n<!-- end -->"

    return re.sub(r"<!-- results: ([\w ]+) -->\n.*?<!-- end -->", write, page, flags=re.DOTALL)


def _machine(result: Result) -> str:
    machine = result["machine"]
    return f"Measured on {machine['processor']}, {machine['cores']} cores, Python {machine['python']}."


@command("bench.readme")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser("python -m bench.readme", description="Regenerate the measured tables.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is stale")
    check = parser.parse_args().check
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (fresh := render(text)) != text:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(fresh, encoding="utf-8")
    print(f"{'stale' if check else 'written'}: {', '.join(stale) or 'none'}")
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
