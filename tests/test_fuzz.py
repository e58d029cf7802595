"""A few mutated inputs for every reader of strangers' files; `python -m tests.fuzz NAME` goes on for minutes."""

from __future__ import annotations

import pytest

from tests.fuzz.drive import open_target, run_mutated, run_seeds, targets
from tests.fuzz.guided import run_guided
from tests.fuzz.mutations import KINDS, Edit, mutate

EXAMPLES = 60


@pytest.mark.parametrize("name", targets())
def test_a_reader_takes_what_comes(name: str) -> None:
    target = open_target(name)
    assert run_seeds(target) > 2
    run_mutated(target, EXAMPLES, 0, lambda data: print(f"failing input: {data!r}"))


def test_every_mutation_changes_something() -> None:
    data, other = b'{"layers": 28, "heads": 16}', b"0123456789abcdef"
    for kind in KINDS:
        assert mutate(data, [Edit(kind, 0.3, 5, 3)], [other]) != data, kind
        assert isinstance(mutate(b"", [Edit(kind, 0.3, 5, 3)], [b""]), bytes)


def test_a_guided_run_tries_inputs_and_finds_no_fault() -> None:
    pytest.importorskip("atheris", reason="has no wheel for this machine")
    count, found = run_guided("answers", seconds=1, number=0)
    assert count > 500
    assert found == []
