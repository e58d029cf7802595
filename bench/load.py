"""`gemvg serve` under load: 16 clients, some of which leave or send nonsense; every answer has to be the right one.

    python -m bench.load [--requests 1000] [--clients 16] [--save bench/results/load.json]

First each request by itself, from one client: the right answers. Then all clients at once: forms, JSON and chats of
pictures of many sizes, every tenth request broken off and every tenth malformed; queue and memory are read meanwhile.
Last, throughput: whole requests alone, by a plain loop over a Grounder in this process and by the service, in turns.
Nothing is cached, as with a camera's pictures. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.results import result_file, save_result
from bench.service.clients import LEFT, Clients
from bench.service.requests import Ask, Sent, as_chat, as_form, as_json, boxes_of, draw_asks, malformed
from bench.service.running import Running, memory_in, serving
from gemvg_edge import Grounder
from gemvg_edge.command import command, whole_number

MODEL = "tabletop"
FLAGS = ("--cache-bytes", "0")
WRONG = "malformed"
BLOCKS = 5  # turns of loop and service


def watch(running: Running, over: threading.Event, seen: list[dict[str, float]]) -> None:
    """Queue and memory, now and then."""
    while not over.wait(0.25):
        found = running.metrics()
        memory = {f"{name}_mb": size / 1e6 for name, size in memory_in(found).items()}
        seen.append({"queue": found["gemvg_queue_length"], **memory})


def mixed(asks: Sequence[Ask], count: int) -> list[tuple[Sent, str]]:
    """So many requests of all kinds; the k-th is about ask k modulo their number."""
    rng, requests = random.Random(1), []
    for number in range(count):
        ask = asks[number % len(asks)]
        how = LEFT if number % 10 == 3 else WRONG if number % 10 == 7 else "whole"
        sent = malformed(ask, rng) if how == WRONG else (as_form, as_json, lambda a: as_chat(a, MODEL))[number % 3](ask)
        requests.append((sent, how))
    return requests


def robustness(asks: Sequence[Ask], count: int, clients: int) -> dict[str, Any]:
    """Everything at once; what was answered and how."""
    with serving(*FLAGS) as running:
        requests = mixed(asks, count)
        alone = Clients(running, 1)
        alone.send(requests)
        seen: list[dict[str, float]] = []
        over = threading.Event()
        watcher = threading.Thread(target=watch, args=(running, over, seen))
        watcher.start()
        all_clients = Clients(running, clients)
        seconds = all_clients.send(requests)
        over.set()
        watcher.join()
        time.sleep(0.5)
        after = running.metrics()
    tally: Counter[str] = Counter()
    for number, (_, how) in enumerate(requests):
        if how == LEFT:
            tally["left"] += 1
            continue
        status, content, _ = all_clients.results[number]
        if how == WRONG:
            tally["refused" if 400 <= status < 500 and content["error"]["message"] else "wrongly answered"] += 1
        elif status == 200:
            tally["right" if boxes_of(content) == boxes_of(alone.results[number][1]) else "wrong"] += 1
        else:
            tally[f"status {status}"] += 1
    times = sorted(t for n, (_, how) in enumerate(requests) if how == "whole" for t in [all_clients.results[n][2]])
    middle = len(seen) // 3
    memory = {
        name: {"first_third_mb": max(s[name] for s in seen[:middle]), "last_mb": seen[-1][name]}
        for name in seen[-1]
        if name.endswith("_mb")
    }
    return {
        "requests": count, "clients": clients, "seconds": seconds, "tally": dict(tally),
        "longest_queue": max(s["queue"] for s in seen), "restarts": after["gemvg_worker_restarts"],
        "left_running": after["gemvg_running"] + after["gemvg_queue_length"],
        "p50_ms": 1e3 * times[len(times) // 2], "p99_ms": 1e3 * times[int(len(times) * 0.99)], "memory": memory,
    }  # fmt: skip


def busy(asks: Sequence[Ask], clients: int) -> dict[str, Any]:
    """More clients than a short queue takes: the rest is told when to come again, and nobody gets a wrong answer."""
    with serving(*FLAGS, "--max-queue", "4") as running:
        many = Clients(running, 4 * clients)
        many.send([(as_form(ask), "whole") for ask in asks])
        statuses = Counter(str(status) for status, _, _ in many.results.values())
    return {"clients": 4 * clients, "max_queue": 4, "statuses": dict(statuses)}


def throughput(asks: Sequence[Ask], clients: int) -> dict[str, Any]:
    """Requests a second: a plain loop, and the service with one client and with all, in turns."""
    forms = [(as_form(ask), "whole") for ask in asks]
    names = ("loop", "service, one client", f"service, {clients} clients", f"two workers, {clients} clients")
    per_second: dict[str, list[float]] = {name: [] for name in names}
    with (
        Grounder.open(cache_bytes=0) as grounder,
        serving(*FLAGS) as running,
        serving(*FLAGS, "--workers", "2") as two,
    ):

        def loop() -> float:
            started = time.perf_counter()
            for ask in asks:
                grounder.look(list(ask.pictures)).ground(list(ask.queries))
            return time.perf_counter() - started

        ways: list[Callable[[], float]] = [loop, lambda: Clients(running, 1).send(forms)]
        ways += [lambda: Clients(running, clients).send(forms), lambda: Clients(two, clients).send(forms)]
        for way in ways:
            way()  # once for nothing
        for _ in tqdm(range(BLOCKS), desc="throughput", leave=False):
            for name, way in zip(per_second, ways, strict=True):
                per_second[name].append(len(asks) / way())
    rows = []
    for name, values in per_second.items():
        shares = np.array(values) / np.array(per_second["loop"])
        rows.append({"name": name, "per_second": statistics.median(values), "share_of_loop": float(np.median(shares)),
                     "least_share": float(shares.min()), "most_share": float(shares.max())})  # fmt: skip
    return {"requests": len(asks), "blocks": BLOCKS, "rows": rows}


@command("bench.load")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser("python -m bench.load", description="The service under load.")
    add = parser.add_argument
    add("--requests", type=whole_number, metavar="N", default=1000, help="requests in all (default: %(default)s)")
    add("--clients", type=whole_number, metavar="N", default=16, help="clients at once (default: %(default)s)")
    saved = "keep the JSON here too, such as bench/results/load.json (default: print it alone)"
    add("--save", type=result_file, metavar="FILE", help=saved)
    args = parser.parse_args()
    if args.requests < 50 or not 1 <= args.clients <= 64:
        parser.error("--requests must be at least 50, and --clients 1 to 64")
    asks = draw_asks(min(200, args.requests))
    result = {
        "robustness": robustness(asks, args.requests, args.clients),
        "busy": busy(asks, args.clients),
        "throughput": throughput(asks, args.clients),
    }
    for part, content in result.items():
        print(part, json.dumps(content, indent=1))
    save_result(result, args.save)


if __name__ == "__main__":
    main()
