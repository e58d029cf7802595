"""A bundle for TensorRT that answers questions on a CPU, every value rounded where a GPU's kernels round it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.boxes.asking import Model, of_grounder
from export.verify_runs import exact_engines
from gemvg_edge.bundle import TOKENIZER, open_bundle
from gemvg_edge.grounder import Grounder
from gemvg_edge.opened import Limits, OpenedModel
from gemvg_edge.tokenizer import open_tokenizer


@contextmanager
def open_rounded(folder: Path) -> Iterator[Model]:
    """A bundle for TensorRT to be asked, computed on the CPU as its kernels round."""
    bundle = open_bundle(folder)
    with TemporaryDirectory() as graphs:
        seen, vision, decoder, _ = exact_engines(bundle, Path(graphs))
        tokenizer = open_tokenizer(bundle.path(TOKENIZER), "export the bundle again")
        yield of_grounder(Grounder(OpenedModel(seen.manifest, tokenizer, vision, decoder, Limits(256, 256))))
