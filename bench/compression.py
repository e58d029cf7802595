"""What compression does to boxes: one float checkpoint quantised in every way, all asked the same held-out questions.

    python -m bench.compression checkpoints/tabletop [QUANTISED ...] [--save bench/results/compression.json]

Each row is a checkpoint that quantize.gptq writes (kept in `--work`, with its scores, so that a killed run goes on);
GPTQ checkpoints given after the float one are rows too. Weights are compared with the float ones, next-token
distributions by KL on the true answers, boxes with the truth, texts with the float model's. `W8A8` also rounds what
each linear layer of vision tower and decoder is given, to 8 bits a token. Writes a Markdown table and a plot beside
the JSON, which is the last line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

KL_QUESTIONS, AT_ONCE = 500, 8
REFERENCE = "float"


@dataclass(frozen=True)
class Row:
    """One way to compress: options of quantize.gptq, none for the float model itself."""

    name: str
    options: dict[str, Any] | None
    first: str = ""  # what is done to the float model before: smooth or rotate
    activations: bool = False  # what linear layers are given is rounded to 8 bits a token


W8 = {"bits": 8, "group_size": -1, "vision_bits": 8, "method": "rtn"}
SHIPPED = {"vision_bits": 8, "head_bits": 8, "embedding_bits": 8}
ROWS = (
    Row(REFERENCE, None),
    Row("RTN int4", {"method": "rtn"}),
    Row("GPTQ int4, text", {"calibration": "text"}),
    Row("GPTQ int4", {}),
    Row("RTN int3", {"method": "rtn", "bits": 3}),
    Row("GPTQ int3, text", {"calibration": "text", "bits": 3}),
    Row("GPTQ int3", {"bits": 3}),
    Row("W8A8", W8, activations=True),
    Row("W8A8, smoothed", W8, "smooth", activations=True),
    Row("W8A8, rotated", W8, "rotate", activations=True),
    Row("shipped", SHIPPED),
)


@dataclass(frozen=True)
class Reference:
    """The float model, the questions, and what it says to them."""

    folder: Path
    records: list[Record]
    logits: list[torch.Tensor]  # of KL_QUESTIONS, in batches: (answer tokens, vocabulary)
    row: dict[str, Any]


def make_checkpoint(row: Row, reference: Path, work: Path, group_size: int) -> Path:
    """The row's checkpoint; one that is there is kept."""
    if row.options is None:
        return reference
    source = reference
    if row.first:
        source = work / row.first
        if not source.is_dir():
            smooth(Smoothing(reference, source)) if row.first == "smooth" else rotate(Rotation(reference, source))
    out = work / row.name.replace(", ", ".").replace(" ", "-").lower()
    if not out.is_dir():
        quantize(Settings(source, out, **{"group_size": group_size, **row.options}))
    return out


def score(row: Row, folder: Path, reference: Path, records: Sequence[Record], start: dict[str, Any] | None) -> Any:
    """One checkpoint's figures, and what comparing others with it needs."""
    grounder = TorchGrounder.open(folder)
    if row.activations:
        round_activations(grounder.model)
    texts = [answers[0] for _, answers, _ in sample_texts(grounder, records, False, 1, 0.0, row.name)]
    boxes = [
        read_answer(text, record.sizes, grounder.settings.answer_format).boxes
        for text, record in zip(texts, records, strict=True)
    ]
    counts = count(boxes, [record.boxes for record in records])
    return grounder, texts, counts
