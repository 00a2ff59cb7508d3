"""Speed as ratios against a named baseline: interleaved runs in one process, medians of CPU time.

Run by `make bench` on the checkpoint of the tiny study; prints the rows of the README's table.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bpo import generate, models, packed, params, readers, records
from bpo.generate import Request

ROUNDS = 7
COLOURS = ["red", "yellow", "green", "blue", "white", "black"]


def ratio(baseline: Callable[[], object], ours: Callable[[], object]) -> float:
    """Median CPU seconds of the baseline over those of ours, taken in turn after a warm-up."""
    seconds: dict[str, list[float]] = {"baseline": [], "ours": []}
    for turn in range(ROUNDS + 1):
        for name, work in (("baseline", baseline), ("ours", ours)):
            began = time.process_time()
            work()
            if turn:
                seconds[name].append(time.process_time() - began)
    return statistics.median(seconds["baseline"]) / statistics.median(seconds["ours"])


def main() -> int:
    torch.set_num_threads(1)
    world = params.outputs_root() / "tiny" / "0_tiny_world"
    if not (world / "manifest.json").is_file():
        print("run `make report` first: the benchmark uses its checkpoint", file=sys.stderr)
        return 1
    checkpoint = models.load(world / "model")
    rows, _ = readers.read_rows(world / "counterfactual" / "rows.json")
    print(f"torch {torch.__version__}, 1 thread, medians of {ROUNDS} interleaved rounds, CPU time")
    print(f"six candidates on one prefix against one pass each: {_probe(checkpoint, rows):.1f}")
    print(f"decoding 64 rows in one batch against one at a time: {_decode(checkpoint, rows):.1f}")
    return 0


@torch.no_grad()
def _probe(checkpoint: models.Checkpoint, rows: list[records.Row]) -> float:
    asked = [r for r in rows if r.category == "attribute"][:64]
    batch = generate.encode_batch(checkpoint, _requests(asked))
    singles = [generate.encode_batch(checkpoint, [r]) for r in _requests(asked)]
    ids = [models.answer_ids(checkpoint, c + checkpoint.tokenizer.eos_token) for c in COLOURS]
    return ratio(lambda: [packed.weigh_unpacked(checkpoint, s, [[i]])
                          for s in singles for i in ids],
                 lambda: packed.weigh(checkpoint, batch, [ids] * len(asked)))


def _decode(checkpoint: models.Checkpoint, rows: list[records.Row]) -> float:
    requests = _requests([r for r in rows if r.category == "caption"][:64])
    batch = generate.encode_batch(checkpoint, requests)
    singles = [generate.encode_batch(checkpoint, [r]) for r in requests]
    return ratio(lambda: [generate.decode(checkpoint, s, max_new_tokens=40) for s in singles],
                 lambda: generate.decode(checkpoint, batch, max_new_tokens=40))


def _requests(rows: list[records.Row]) -> list[Request]:
    return [Request(r.id, r.prompt, Path(r.image)) for r in rows]


if __name__ == "__main__":
    sys.exit(main())
