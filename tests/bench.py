"""Speed as ratios against a named baseline, taken in turn in one process.

`make bench` measures everything, `make bench ARGS=probing` one group (see `GROUPS`), on the
checkpoint and data of the tiny study. Each group's table is a marked section of outputs/README.md;
outputs/bench.json holds the same rows.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import bench_packed
import numpy as np
import pandas
import torch
from bench_clock import WALL, Row, faster, in_turn, row
from transformers import DynamicCache

from bpo import params
from bpo.data import rows as data_rows
from bpo.models import checkpoint as checkpoints
from bpo.models import encoding, generate, logprobs, prefix
from bpo.models.checkpoint import Checkpoint
from bpo.models.generate import Request
from bpo.models.weakening import View
from bpo.reports import readme
from bpo.study import shards
from bpo.study.files import to_json, write_whole

ROUNDS = 7
COLOURS = ["red", "yellow", "green", "blue", "white", "black"]
NOISY = View("noisy", 800)
DECODED, TOKENS, FILE_BATCH = 1500, 40, 64
SCALES, SCALED_ROWS = (1, 16), 750


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(GROUPS))
    groups = parser.parse_args().groups or list(GROUPS)
    if unknown := set(groups) - GROUPS.keys():
        parser.error(f"no such group: {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    torch.set_num_threads(1)
    world = params.outputs_root() / "tiny" / "0_tiny_world"
    if not (world / "manifest.json").is_file():
        print("run `make report` first: the benchmark uses its checkpoint", file=sys.stderr)
        return 1
    file = params.outputs_root() / "bench.json"
    for group in groups:
        table = GROUPS[group](world)
        before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        write_whole(file, to_json(before | {group: table}, indent=1) + "\n")
        text = readme.markdown(pandas.DataFrame(table))
        section = readme.write_section(f"speed {group}", text)
        print(f"{group}\n{text}\nwritten to {file} and {section}")
    return 0


def probing(world: Path) -> list[Row]:
    checkpoint = checkpoints.load(world / "model")
    rows, _ = data_rows.read_rows(world / "counterfactual" / "rows.json")
    requests = _requests([r for r in rows if r.category == "attribute"][:64])
    batch = generate.encode_batch(checkpoint, requests)
    singles = [generate.encode_batch(checkpoint, [r]) for r in requests]
    prefix.use_attention(checkpoint.base)
    ids = [encoding.answer_ids(checkpoint, c + checkpoint.tokenizer.eos_token) for c in COLOURS]
    with torch.no_grad():
        seconds = in_turn({
            "one by one": lambda: [logprobs.weigh_unpacked(checkpoint, s, [[i]])
                                   for s in singles for i in ids],
            "ours": lambda: logprobs.weigh(checkpoint, batch, [ids] * len(requests))},
            rounds=ROUNDS)
    return [faster("probing: six candidate answers on one image and question prefix, 64 images a "
                   "forward pass / one forward pass an image and candidate",
                   seconds["one by one"], seconds["ours"])]


def generation(world: Path) -> list[Row]:
    """Weakened answers of preference rows as they come: captions, colours and presence mixed."""
    checkpoint = checkpoints.load(world / "model")
    rows, _ = data_rows.read_rows(world / "preference" / "rows.json", count=DECODED, seed=0,
                                  purpose="bench")
    requests = _requests(rows)
    prompts = np.array([len(encoding.answer_ids(checkpoint, encoding.prompt_text(
        checkpoint, r.messages, image=True))) + 16 for r in requests])
    answers = np.array([len(encoding.answer_ids(checkpoint, r.answer)) + 1 for r in rows])
    batches = shards.by_budget(prompts, answers,
                               params.PairGeneration.model_fields["batch_tokens"].default)
    reader = encoding.reader(checkpoint)
    some = requests[::20]  # one at a time takes long: a twentieth of the rows, counted so often

    def ours() -> None:
        def prepare(batch: np.ndarray) -> tuple[list[Request], dict[str, torch.Tensor]]:
            of_batch = [requests[i] for i in batch]
            return of_batch, generate.encode_branches(reader, of_batch, NOISY, seed=0)

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

    seconds = in_turn({"release": lambda: [one_at_a_time(checkpoint, r) for r in some],
                       "file order": file_order, "ours": ours}, rounds=ROUNDS)
    label = ("weakened answers, rows a second: batches by length and token budget, images read "
             "ahead / ")
    return [faster(f"{label}the release's way: one row at a time, a clean and a noised forward "
                   "pass a token", seconds["release"] * len(requests) / len(some),
                   seconds["ours"], clock=WALL),
            faster(f"{label}plain `generate` on {FILE_BATCH} rows in file order",
                   seconds["file order"], seconds["ours"], clock=WALL)]


@torch.no_grad()
def one_at_a_time(checkpoint: Checkpoint, request: Request) -> str:
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


def stage_2(world: Path) -> list[Row]:
    """The whole stage of notebook 2 on few rows and on many, each in its own process."""
    entries = json.loads((world / "preference" / "rows.json").read_text())[:SCALED_ROWS]
    used = []
    with tempfile.TemporaryDirectory() as folder:
        for times in SCALES:
            data = Path(folder) / f"rows-{times}.json"
            data.write_text(json.dumps([e | {"id": f"{e['id']} {n}"} for n in range(times)
                                        for e in entries]))
            used.append(_stage(world, data, Path(folder) / "outputs"))
    few, many = (f"{times * SCALED_ROWS:,} rows" for times in SCALES)
    (cpu, memory), (cpu_many, memory_many) = used
    return [row(f"notebook 2's whole stage on {many}, CPU time / on {few}", [cpu_many / cpu]),
            row(f"notebook 2's peak memory on {many} / on {few}", [memory_many / memory])]


def _stage(world: Path, data: Path, outputs: Path) -> tuple[float, int]:
    """CPU seconds and peak memory of the stage in a process of its own."""
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
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss


def _requests(rows: list[data_rows.Row]) -> list[Request]:
    return [Request(r.id, r.prompt, r.image, len(r.answer.split())) for r in rows]


GROUPS: dict[str, Callable[[Path], list[Row]]] = {
    "probing": probing, "generation": generation, "stage-2": stage_2,
    "training": bench_packed.training, "packed": bench_packed.packed,
    "trees": bench_packed.trees}

if __name__ == "__main__":
    sys.exit(main())
