"""Speed and memory on a GPU, as one command: `make bench-gpu`, on any CUDA machine with the kit's
torch or a nearby one (2.11 and newer). Needs no checkpoint, no data and no network.

Random weights in the shape of LLaVA-1.5-7B, in bfloat16: steps of `train()` of the packed trainer
against TRL's DPOTrainer; generation; whether the packed step has the unpacked one's loss and
gradients. What is done is on disk after each cell, in outputs/bench-gpu.json, and its tables become
a section of outputs/README.md. A cell that the memory does not hold says so, and the next one runs.

`make bench-gpu ARGS='--quick'` has smaller shapes; with `--device cpu` too it only tries the
program. Both write bench-gpu-quick.json and no section.
"""

import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # several would be taken for data parallelism
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pandas
import torch
from bench_packed import Sized
from datasets import Dataset
from helpers.models import PATCH, TEMPLATE, small_tokenizer
from helpers.trainers import dpo_trainer
from transformers import LlavaProcessor, TrainerCallback
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from trl import DPOTrainer

from bpo import params
from bpo.models import checkpoint as checkpoints
from bpo.models import generate
from bpo.models.generate import Request
from bpo.models.weakening import View
from bpo.reports import readme
from bpo.study import environment
from bpo.study.files import to_json, write_whole
from bpo.training.packed.trainer import PackedDPOTrainer

NO_MEMORY = "out of memory"
WARM = 2  # steps that are not counted; in the first the reference's log-probs are computed and kept
# (width, inner width, layers, heads) of language model and vision tower, vocabulary, picture's side
FULL = (4096, 11008, 32, 32), (1024, 4096, 24, 16), 32064, 336
SMALL = (512, 1376, 4, 8), (128, 512, 2, 2), 2048, 336  # also for float32
QUICK = (64, 172, 2, 2), (32, 64, 2, 2), 512, 56


@dataclass(frozen=True)
class Shape:
    """The rows of one step. own: what the packed trainer takes for it beside `packing`."""

    rejected: int
    answer: int  # tokens, the end token counted
    questions: int = 1  # of each image
    images: int = 2
    own: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return (f"images: {self.images}, questions of each: {self.questions}, rejected answers: "
                f"{self.rejected}, tokens of an answer: {self.answer}"
                + "".join(f", {n} = {v}" for n, v in self.own.items()))

    def rows(self, made: Sized) -> list[dict[str, Any]]:
        pictures = [made.picture() for _ in range(self.images)]
        return [r for p in pictures for _ in range(self.questions)
                for r in made.rows(self.answer, self.rejected, p)]


SHAPES = [*(Shape(k, n) for n, k in product((57, 200), (1, 2))), Shape(2, 57, questions=3),
          Shape(2, 57, questions=3, own={"share": "image"})]
FEW_SHAPES = [Shape(1, 9), Shape(2, 9, questions=3, images=1, own={"share": "image"})]
# The trainer, and whether it keeps the reference's log-probs, which TRL refuses with images.
WAYS = {"TRL": (DPOTrainer, False), "packed, on the fly": (PackedDPOTrainer, False),
        "packed, kept": (PackedDPOTrainer, True)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --quick tries the program without one")
    if options.device == "cpu" and not options.quick:
        parser.error("the full shapes want a GPU; add --quick")
    file = params.outputs_root() / f"bench-gpu{'-quick' * options.quick}.json"
    said = environment.described()
    done: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()), "quick": options.quick,
        "card": said["device"], "driver": said["driver"], "cuda": said["cuda"],
        "versions": said["versions"], "commit": said["commit"],
        "steps": [], "generation": [], "parity": []}
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, checkpoints.quietly():
        for group, cell in cells(options, Path(folder)):
            done[group].append(cell)
            write_whole(file, to_json(done, indent=1) + "\n")
            print(group, *(f"{n}: {v}" for n, v in cell.items()), sep=" | ", flush=True)
    text = tables(done)
    print(f"\n{text}\nwritten to {file}")
    if not options.quick:
        print(f"and to {readme.write_section('speed gpu', text)}")
    return 0


def cells(options: argparse.Namespace, out: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(group, measured) of every cell, each measured when it is asked for."""
    size, shapes, rounds = (QUICK, FEW_SHAPES, 1) if options.quick else (FULL, SHAPES, 5)

    def made(size: tuple = size, dtype: str = "bfloat16") -> Sized:
        text, vision, vocabulary, side = size
        return Sized(processor(), text, vision, vocabulary=vocabulary, side=side,
                     device=options.device, dtype=getattr(torch, dtype))

    for shape, saving, way in product(shapes, (False, True), WAYS):
        yield "steps", {"shape": str(shape), **asdict(shape), "gradient_checkpointing": saving,
                        "way": way, **held(lambda: steps(made(), shape, way, saving, rounds, out))}
    tokens, batches = (4, (2,)) if options.quick else (57, (8, 64))
    for mode, rows in product(("noisy", "contrast"), batches):
        yield "generation", {"way": mode, "batch": rows, "tokens": tokens,
                             **held(lambda: generation(made(), mode, rows, tokens, rounds, out))}
    small = QUICK if options.quick else SMALL
    for name, size_of, one, other in (
            ("small", small, ("always", "float32"), ("never", "float32")),
            ("small", small, ("always", "bfloat16"), ("never", "bfloat16")),
            ("small", small, ("never", "bfloat16"), ("never", "float32")),
            ("as measured", size, ("always", "bfloat16"), ("never", "bfloat16"))):
        yield "parity", {"shape": name, "of": " ".join(one), "against": " ".join(other), **held(
            lambda: parity(made, size_of, one, other, shapes[0], out))}


def processor() -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(), tokenizer=small_tokenizer(), patch_size=PATCH,
        num_additional_image_tokens=1, vision_feature_select_strategy="default",
        chat_template=TEMPLATE, image_token="<image>")


def held(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` measured; {"failed": out of memory} where the memory does not hold it."""
    free()
    try:
        return work()
    except (torch.OutOfMemoryError, MemoryError):
        return {"failed": NO_MEMORY}


def free() -> None:
    """Gives back what the work before held: trainers hold themselves in circles."""
    gc.collect()
    torch.cuda.empty_cache()


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock(TrainerCallback):
    """The ends of a training's steps; from the first counted one on, the peak of memory."""

    def __init__(self, device: str):
        self.device, self.ends = device, []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(now(self.device))
        if self.device == "cuda" and len(self.ends) == WARM:
            torch.cuda.reset_peak_memory_stats()


def steps(made: Sized, shape: Shape, way: str, saving: bool, rounds: int, out: Path
          ) -> dict[str, Any]:
    """Seconds of a step of `train()`, batch and update counted, and the bytes of its peak, weights
    counted; an epoch is one batch, so that kept log-probs are read in all counted steps."""
    (kind, kept), clock, rows = WAYS[way], Clock(made.device), shape.rows(made)
    ours = kind is PackedDPOTrainer
    with tempfile.TemporaryDirectory(dir=out) as fresh:
        trainer = made.trainer(
            kind, rows, Path(fresh), packing="always" if ours else "",
            own=shape.own if ours else {}, use_cpu=made.device == "cpu",
            bf16=made.device == "cuda", gradient_checkpointing=saving,
            per_device_train_batch_size=len(rows), num_train_epochs=WARM + rounds,
            **{"precompute_ref_log_probs": True} if kept else {})
        trainer.add_callback(clock)
        trainer.train()
    seconds = [b - a for a, b in zip(clock.ends[WARM - 1:], clock.ends[WARM:], strict=False)]
    return {"seconds": statistics.median(seconds), "all": seconds,
            "memory": torch.cuda.max_memory_allocated() if made.device == "cuda" else None}


def generation(made: Sized, mode: str, rows: int, tokens: int, rounds: int, out: Path
               ) -> dict[str, Any]:
    """Rows a second of weakened answers in one batch, images prepared beforehand."""
    checkpoint = checkpoints.Checkpoint(made.model().eval(), made.processor)
    picture = out / "picture.png"
    made.picture().save(picture)
    question = {"role": "user", "content": " ".join(made.words[:27])}
    requests = [Request(str(n), (question,), picture) for n in range(rows)]
    view, seconds = View(mode, 900), []
    inputs = generate.encode_branches(checkpoint, requests, view, seed=0)
    for _ in range(1 + rounds):
        began = now(made.device)
        generate.sample_answers(checkpoint, requests, inputs, view, seed=0, purpose="bench",
                                temperature=1.0, top_p=1.0, samples=1, max_new_tokens=tokens)
        seconds.append(now(made.device) - began)
    return {"rows_a_second": rows / statistics.median(seconds[1:])}


def parity(made: Callable[..., Sized], size: tuple, one: tuple[str, str], other: tuple[str, str],
           shape: Shape, out: Path) -> dict[str, Any]:
    """How far a loss and the gradients of the adapters are from another's, these in shares of their
    norm. Each is (packing, number format); the adapters do not start at zero."""
    found = []
    for packing, dtype in (one, other):
        of = made(size, dtype)
        rows = Dataset.from_list(shape.rows(of))
        trainer = dpo_trainer(
            PackedDPOTrainer, checkpoints.Checkpoint(of.model(), of.processor), rows, out,
            own={"packing": packing}, use_cpu=of.device == "cpu")
        inputs = trainer._prepare_inputs(trainer.data_collator(list(rows)))
        loss = trainer.compute_loss(trainer.model.train(), inputs)
        loss.backward()
        found.append((loss.item(), torch.cat([
            w.grad.flatten().double().cpu() for w in trainer.model.parameters()
            if w.grad is not None])))
        del trainer, inputs, loss
        free()  # two models need not be in memory at once
    (loss, gradients), (other_loss, other_gradients) = found
    return {"loss": other_loss, "loss_differs": abs(loss - other_loss), "gradients_differ": (
        (gradients - other_gradients).norm() / other_gradients.norm()).item()}


def tables(done: Mapping[str, Any]) -> str:
    """What was measured, as Markdown."""
    stated = {n: done["versions"][n] for n in ("torch", "transformers", "trl")}
    head = ", ".join([done["card"], *(f"{n} {done[n]}" for n in ("driver", "cuda") if done[n]),
                      *(f"{n} {v}" for n, v in stated.items()), done["date"], done["commit"]])

    def text(cell: Mapping[str, Any] | None, name: str, shown: str) -> str:
        if cell is None or cell.get(name) is None:
            return cell["failed"] if cell and "failed" in cell else "not measured"
        return shown.format(cell[name] / (1e9 if name == "memory" else 1))

    steps = []
    by = {(c["shape"], c["gradient_checkpointing"], c["way"]): c for c in done["steps"]}
    for (shape, saving, way), cell in by.items():
        trl = by[shape, saving, "TRL"]
        faster = (f"{trl['seconds'] / cell['seconds']:.2f}"
                  if "seconds" in trl and "seconds" in cell else "none")
        steps.append({"a step of": shape, "gradient checkpointing": "on" if saving else "off",
                      "trainer, reference": way if way != "TRL" else "TRL, on the fly",
                      "seconds": text(cell, "seconds", "{:.3f}"),
                      "times faster than TRL": faster,
                      "peak memory, GB": text(cell, "memory", "{:.1f}")})
    made = [{"answers to": f"{c['way']} images", "rows at once": c["batch"],
             f"rows a second, {c['tokens']} tokens": text(c, "rows_a_second", "{:.2f}")}
            for c in done["generation"]]
    agree = [{"of": c["of"], "against": c["against"], "shape": c["shape"],
              "loss differs by": text(c, "loss_differs", "{:.1e}"),
              "gradients differ by, of their norm": text(c, "gradients_differ", "{:.1e}")}
             for c in done["parity"]]
    return "\n\n".join([f"{head}.", *(readme.markdown(pandas.DataFrame(rows))
                                      for rows in (steps, made, agree))])


if __name__ == "__main__":
    sys.exit(main())
