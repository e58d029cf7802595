"""Compare two models' answers to the same questions: paired gains with intervals, McNemar's test, what changed.

    python -m bench.compare runs/accuracy/mine.mig-bench.jsonl runs/accuracy/mine.int4.mig-bench.jsonl

What is needed to say that a change, such as int4, did not hurt: a loss larger than the interval's lower end is ruled
out. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.boxes.answers import read_answers
from bench.boxes.differences import compare
from bench.boxes.scoring import gain_text
from bench.results import result_file, save_result
from gemvg_edge.command import command, whole_number
from gemvg_edge.files import printable
from gemvg_edge.json_object import short


@command("bench.compare")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser("python -m bench.compare", description="Compare answers to the same questions.")
    parser.add_argument("a", type=Path, help="a .jsonl of bench.accuracy: what the other is held against")
    parser.add_argument("b", type=Path, help="another one, to the same questions")
    many = "how many questions that changed are shown each way (default: %(default)s)"
    parser.add_argument("--show", type=whole_number, metavar="N", default=5, help=many)
    saved = "keep the JSON here too (default: print it alone)"
    parser.add_argument("--save", type=result_file, metavar="FILE", help=saved)
    args = parser.parse_args()
    told = compare(args.a, args.b)
    print("\n".join(lines(told)))
    for way, which in (("lost", "right in A alone"), ("gained", "right in B alone")):
        if told[way] and args.show > 0:
            print(f"{which}, {told['by']}: {len(told[way])}")
            print("\n".join(_shown(told[way][: args.show], args.a, args.b)))
    save_result(told, args.save, exact=True)


def lines(told: dict[str, Any]) -> Iterator[str]:
    """The comparison for people."""
    left = f", {told['only_a']} of A's and {told['only_b']} of B's left out" if told["only_a"] or told["only_b"] else ""
    yield f"A {printable(told['a'])}, B {printable(told['b'])}: {told['n']} questions of {told['task']} in both{left}"
    yield f"{told['same_text']} answers are the same letter by letter"
    for name, row in told["values"].items():
        test = f"  McNemar p {row['p']:.3g}, {row['lost']} lost, {row['gained']} gained" if "p" in row else ""
        yield f"{name:<22} {row['a']:.3f} -> {row['b']:.3f}  {gain_text(row['gain'], row['interval'])}{test}"
    for part, row in told["tasks"].items():
        if row["gain"] is not None:
            yield f"  {printable(part):<20} {row['n']:>6}  {told['by']} {gain_text(row['gain'], row['interval'])}"


def _shown(names: list[str], a: Path, b: Path) -> Iterator[str]:
    texts = [{said.id: said for said in read_answers(file)[1] if said.id in names} for file in (a, b)]
    for name in names:
        yield f"  {printable(name)}  {short(texts[0][name].query)}"
        yield from (f"    {side} {short(said[name].answer)}" for side, said in zip("AB", texts, strict=True))


if __name__ == "__main__":
    main()
