"""Speed as ratios against a named baseline: interleaved rounds in one process, medians of CPU time.

Run by `make bench` on the checkpoint and data of the tiny study; writes outputs/bench.json and the
table of outputs/README.md. Rows of growing number run as stages of their own, for their
time and peak memory.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import bench_packed
import numpy as np
import torch
from transformers import DynamicCache

from bpo import params
from bpo.data import rows as data_rows
from bpo.data.rows import Row
from bpo.models import checkpoint as checkpoints
from bpo.models import encoding, generate, logprobs, prefix
from bpo.models.generate import Request
from bpo.models.weakening import View
from bpo.reports import summary
from bpo.study import shards
from bpo.study.files import to_json, write_whole

ROUNDS = 7
COLOURS = ["red", "yellow", "green", "blue", "white", "black"]
NOISY = View("noisy", 800)
DECODED, TOKENS, FILE_BATCH = 1500, 40, 64
SCALES, SCALED_ROWS = (1, 4, 16), 750


def ratio(baseline: Callable[[], object], ours: Callable[[], object], compared: str, *,
          clock: Callable[[], float] = time.process_time) -> dict[str, object]:
    """Seconds of the baseline over those of ours, taken in turn after a warm-up: the median of the
    rounds' ratios, the smallest and the largest. clock: CPU time, or the wall's where threads
    share the work."""
    seconds: dict[str, list[float]] = {"baseline": [], "ours": []}
    for turn in range(ROUNDS + 1):
        for name, work in (("baseline", baseline), ("ours", ours)):
            began = clock()
            work()
            if turn:
                seconds[name].append(clock() - began)
    rounds = [b / o for b, o in zip(seconds["baseline"], seconds["ours"], strict=True)]
    return {"ratio": round(statistics.median(rounds), 2), "low": round(min(rounds), 2),
            "high": round(max(rounds), 2), "n": ROUNDS, "compared": compared}


def main() -> int:
    torch.set_num_threads(1)
    world = params.outputs_root() / "tiny" / "0_tiny_world"
    if not (world / "manifest.json").is_file():
        print("run `make report` first: the benchmark uses its checkpoint", file=sys.stderr)
        return 1
    checkpoint = checkpoints.load(world / "model")
    evaluation, _ = data_rows.read_rows(world / "counterfactual" / "rows.json")
    preference, _ = data_rows.read_rows(world / "preference" / "rows.json", count=DECODED, seed=0,
                                        purpose="bench")
    found = {"probing": _probe(checkpoint, evaluation)}
    found |= _weakening(checkpoint, preference)
    found |= _scaling(world)
    found |= bench_packed.measure(world)
    file = params.outputs_root() / "bench.json"
    write_whole(file, to_json(found, indent=1) + "\n")
    print(f"torch {torch.__version__}, 1 thread; median, lowest and highest of n rounds")
    for name, row in found.items():
        print(f"{name:46} {row['ratio']:6} [{row['low']}, {row['high']}]  n {row['n']}  "
              f"{row['compared']}")
    table = [{"what / against what": row["compared"], "ratio": row["ratio"],
              "lowest – highest": f"{row['low']} – {row['high']} of {row['n']}"}
             for row in found.values()]
    section = summary.write_section("speed", summary.markdown(table))
    print(f"written to {file} and {section}")
    return 0


@torch.no_grad()
def _probe(checkpoint: checkpoints.Checkpoint, rows: list[Row]) -> dict[str, object]:
    asked = [r for r in rows if r.category == "attribute"][:64]
    batch = generate.encode_batch(checkpoint, _requests(asked))
    singles = [generate.encode_batch(checkpoint, [r]) for r in _requests(asked)]
    prefix.use_attention(checkpoint.base)
    ids = [encoding.answer_ids(checkpoint, c + checkpoint.tokenizer.eos_token) for c in COLOURS]
    return ratio(lambda: [logprobs.weigh_unpacked(checkpoint, s, [[i]])
                          for s in singles for i in ids],
                 lambda: logprobs.weigh(checkpoint, batch, [ids] * len(asked)),
                 "six candidates on one prefix, 64 images a pass / a pass an image and candidate")


def _weakening(checkpoint: checkpoints.Checkpoint, rows: list[Row]) -> dict[str, dict[str, object]]:
    """Weakened answers of preference rows as they come: captions, colours and presence mixed."""
    requests = _requests(rows)
    prompts = np.array([len(encoding.answer_ids(checkpoint, encoding.prompt_text(
        checkpoint, r.messages, image=True))) + 16 for r in requests])
    answers = np.array([len(encoding.answer_ids(checkpoint, r.answer)) + 1 for r in rows])
    reader = encoding.reader(checkpoint)
    batches = shards.by_budget(prompts, answers,
                               params.PairGeneration.model_fields["batch_tokens"].default)

    def ours() -> None:
        def prepare(batch: np.ndarray) -> tuple[list[Request], dict[str, torch.Tensor]]:
            asked = [requests[i] for i in batch]
            return asked, generate.encode_branches(reader, asked, NOISY, seed=0)

        def work(prepared: tuple[list[Request], dict[str, torch.Tensor]]) -> list[dict]:
            texts = generate.sample_answers(
                checkpoint, *prepared, NOISY, seed=0, purpose="bench", temperature=1.0, top_p=1.0,
                samples=1, max_new_tokens=TOKENS)
            return [{"id": r.id, "texts": t} for r, t in zip(prepared[0], texts, strict=True)]

        with tempfile.TemporaryDirectory() as folder:
            shards.run(Path(folder) / "weakened.jsonl", lambda: batches, work, label="bench",
                       prepare=prepare)

    def file_order() -> None:
        for at in range(0, len(requests), FILE_BATCH):
            batch = generate.encode_batch(checkpoint, requests[at:at + FILE_BATCH], NOISY, seed=0)
            with torch.no_grad():
                tokens = checkpoint.model.generate(
                    **batch, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=TOKENS)
            checkpoint.tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1]:],
                                              skip_special_tokens=True)

    some = requests[::20]  # one at a time takes long: a twentieth of the rows, counted so often

    def released() -> None:
        for request in some:
            one_at_a_time(checkpoint, request)

    slow = ratio(released, ours, "", clock=time.perf_counter)
    return {
        "weakening, the release's way": {
            **slow, **{n: round(slow[n] * len(requests) / len(some), 2)
                       for n in ("ratio", "low", "high")},
            "compared": "rows a second: sorted batches, noisy alone / one row at a time, clean "
                        "and noisy pass a token"},
        "weakening, plain batches": ratio(
            file_order, ours, f"rows a second: batches by length and budget / `generate` on "
                              f"{FILE_BATCH} rows in file order", clock=time.perf_counter)}


@torch.no_grad()
def one_at_a_time(checkpoint: checkpoints.Checkpoint, request: Request) -> str:
    """An answer as the release decodes it: batch 1, a clean and a noisy forward pass a token, each
    branch with its own cache, sampled from the contrast of both."""
    branches = [generate.encode_batch(checkpoint, [request], view, seed=0)
                for view in (None, NOISY)]
    caches = [DynamicCache(), DynamicCache()]
    masks = [b.pop("attention_mask") for b in branches]
    answer: list[int] = []
    while len(answer) < TOKENS:
        logits = [checkpoint.model(**b, attention_mask=m, past_key_values=c, use_cache=True,
                                   logits_to_keep=1).logits[:, -1].float()
                  for b, m, c in zip(branches, masks, caches, strict=True)]
        token = torch.multinomial(torch.softmax(2 * logits[1] - logits[0], dim=-1), 1)
        answer.append(token.item())
        if answer[-1] == checkpoint.tokenizer.eos_token_id:
            break
        branches = [{"input_ids": token}] * 2
        masks = [torch.cat([m, torch.ones_like(token)], dim=1) for m in masks]
    return checkpoint.tokenizer.decode(answer, skip_special_tokens=True)


def _scaling(world: Path) -> dict[str, dict[str, object]]:
    """The whole stage of notebook 2 on 1, 4 and 16 times as many rows, each in its own process."""
    used: dict[int, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        entries = json.loads((world / "preference" / "rows.json").read_text())[:SCALED_ROWS]
        for times in SCALES:
            data = Path(folder) / f"rows-{times}.json"
            data.write_text(json.dumps([e | {"id": f"{e['id']} {n}"} for n in range(times)
                                        for e in entries]))
            used[times] = _stage(world, data, Path(folder) / "outputs")
    first, rows = SCALES[0], {n: n * SCALED_ROWS for n in SCALES}
    out = {}
    for times in SCALES[1:]:
        for at, name in enumerate(("time", "peak memory")):
            value = round(used[times][at] / used[first][at], 2)
            out[f"rows x {times}, {name}"] = {
                "ratio": value, "low": value, "high": value, "n": 1,
                "compared": f"all of notebook 2's stage: {rows[times]} rows / {rows[first]} rows ("
                            + (f"{used[times][0]:.0f} s, {used[first][0]:.0f} s of CPU)" if not at
                               else f"{used[times][1]:.0f} MB, {used[first][1]:.0f} MB)")}
    return out


def _stage(world: Path, data: Path, outputs: Path) -> tuple[float, float]:
    """CPU seconds and peak memory (MB) of the stage in a process of its own."""
    given = {"model": world / "model", "text_model": world / "language_model", "data": data,
             "image_folder": world / "preference",
             "describe_prompt": world / "prompts" / "describe.txt",
             "question_prompt": world / "prompts" / "question.txt"}
    command = [sys.executable, "-m", "bpo", "stage", "tiny", "2", "--as", "scaled",
               *(x for n, v in given.items() for x in ("-p", n, str(v)))]
    process = subprocess.Popen(command, env={**os.environ, "BPO_OUTPUTS": str(outputs)},
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the stage on {data.name} failed")
    shutil.rmtree(outputs)
    unit = 1024 if sys.platform != "darwin" else 1024**2  # Linux counts in KB, macOS in bytes
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / unit


def _requests(rows: list[Row]) -> list[Request]:
    return [Request(r.id, r.prompt, r.image, len(r.answer.split())) for r in rows]


if __name__ == "__main__":
    sys.exit(main())
