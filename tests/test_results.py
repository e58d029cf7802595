"""Where a benchmark may keep its result."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from bench.results import check_result, result_file, save_result
from gemvg_edge.errors import GemvgError


def test_only_a_result_is_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "records.jsonl"
    for content in ('{"images": ["a.png"], "query": "the mug"}\n', '{"a": 1}\n{"b": 2}\n', "notes", ""):
        mine.write_text(content)
        with pytest.raises(GemvgError, match="exists and is no benchmark's result; give another place"):
            check_result(mine)
    with pytest.raises(GemvgError, match="is a folder"):
        check_result(tmp_path)
    with pytest.raises(argparse.ArgumentTypeError, match="is a folder; give the name"):
        result_file(str(tmp_path))
    result = result_file(str(tmp_path / "result.json"))
    save_result({"f1": 0.5}, result)
    assert result_file(str(result)) == result
