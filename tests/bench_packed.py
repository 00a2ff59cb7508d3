"""Part of `make bench`: the packed training step (`bpo.training.packed.trainer`) against TRL's own DPOTrainer.

A step is everything from rows to gradients: collator, reference, policy, backward pass. The update
of the weights is left out: it is the same for all. Two shapes: a random LLaVA in the proportions of
LLaVA-1.5-7B, and the tiny study's.
"""

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PrinterCallback,
)
from trl import DPOConfig, DPOTrainer

from bpo import params
from bpo.models import checkpoint as checkpoints
from bpo.models import encoding
from bpo.pairs import rows as pair_rows
from bpo.training import trainers
from bpo.training.packed.trainer import PackedDPOTrainer

ROUNDS = 5
SIDE, PATCH, ASKED = 336, 14, 27
LENGTHS = (30, 57, 80, 200, 400)  # tokens of an answer, its end token counted
USUAL = 57  # of the captions that models are tuned on
POSITIVES, EPOCHS = 6, 2
MATMUL = 2048

# (width, inner width, layers, heads) of language model and vision tower, which does 4 to 5% of a
# forward pass, as in the 7B model. Wide and shallow: in a narrow model attention, adapters and
# norms cost a larger share of a step than they do there. LONG is narrower, for what takes many
# steps.
STEP = (768, 2064, 3, 6), (128, 512, 2, 2)
LONG = (384, 1032, 3, 6), (64, 256, 2, 2)

READ = {"cached": "kept", "fly": "on the fly"}  # where the reference's log-probs come from
Used = Mapping[str, list[tuple[float, float]]]  # seconds of every round, of CPU and of the wall
Figures = dict[str, dict[str, object]]


def measure(world: Path) -> Figures:
    """All figures of the packed step. world: the folder of the tiny study's notebook 0."""
    with tempfile.TemporaryDirectory() as folder, checkpoints.quietly():
        out = Path(folder)
        return {**_steps(world, out), **_objective(world, out), **_runs(world, out),
                **_tiny(world, out)}


# What is measured


def _steps(world: Path, out: Path) -> Figures:
    """A packed step of one positive with K rejected answers against K of TRL's steps of a pair."""
    made = Sized(world, *STEP)
    rows = {n: made.rows(n, 2) for n in LENGTHS}
    given = [r for both in rows.values() for r in both]
    stock = made.trainer(DPOTrainer, given, out)
    packed = {"fly": made.trainer(PackedDPOTrainer, given, out, packing="always"),
              "cached": made.trainer(PackedDPOTrainer, given, out, packing="always",
                                     precompute_ref_log_probs=True)}
    found: Figures = {}
    for length, both in rows.items():
        used = _in_turn({
            **{f"pair {n}": lambda r=r: step(stock, [r]) for n, r in enumerate(both)},
            **{f"{k} {n}": lambda k=k, t=t: step(t, both[:k])
               for k in (1, 2) for n, t in packed.items()}})
        for k in (1, 2):
            for name in packed:
                found[f"packed_step_llava_{length}_k{k}_{name}"] = _figure(
                    _added(used[f"pair {n}"] for n in range(k)), used[f"{k} {name}"],
                    f"a step of a positive, {length} tokens an answer, reference {READ[name]} / "
                    f"{k} of TRL's steps of a pair")
        if length == USUAL:
            works = {"stock": lambda: [step(stock, [r]) for r in both],
                     **{n: lambda t=t: step(t, both) for n, t in packed.items()}}
            found |= _operations(works, {"stock": _added(used[f"pair {n}"] for n in range(2)),
                                         **{n: used[f"2 {n}"] for n in packed}})
            found |= _memory({"pair by pair": works["stock"],
                              "both pairs at once": lambda: step(stock, both)}, works["cached"])
    return found


def _operations(works: Mapping[str, Callable[[], object]], used: Used) -> Figures:
    """Operations of a step with K = 2, and at what share of the speed of a large matrix product it
    runs them. Attention counts as if it were not causal, which is more than is done."""
    flops = {n: _flops(work) for n, work in works.items()}
    peak = _matmul_speed()
    found: Figures = {}
    for name in works:
        if name != "stock":
            found[f"packed_flops_llava_{USUAL}_k2_{name}"] = _spread(
                [flops["stock"] / flops[name]], f"operations of two of TRL's steps / of the packed "
                f"one, reference {READ[name]} ({flops['stock'] / 1e9:.0f} / "
                f"{flops[name] / 1e9:.0f} GFLOP)")
        rates = [flops[name] / cpu / peak for cpu, _ in used[name]]
        found[f"matmul_share_llava_{USUAL}_k2_{name}"] = _spread(
            rates, f"operations a second of the step / of a product of {MATMUL}-square matrices "
                   f"({peak / 1e9:.0f} GFLOP a second)")
    return found


def _memory(stock: Mapping[str, Callable[[], object]], ours: Callable[[], object]) -> Figures:
    """Peak memory that a step with K = 2 adds."""
    packed = _peak(ours)
    found: Figures = {}
    for name, work in stock.items():
        peak = _peak(work)
        found[f"packed_memory_llava_{USUAL}_k2_{name.replace(' ', '_')}"] = _spread(
            [packed / peak], f"memory that a packed step adds / TRL's, {name} "
            f"({packed / 1e6:.0f} / {peak / 1e6:.0f} MB)")
    return found


def _objective(world: Path, out: Path) -> Figures:
    """mDPO with K = 1 and 2. TRL has none, so the baseline is this trainer unpacked; it computes
    the chosen answer with the damaged image twice a pair, where once would do."""
    made = Sized(world, *LONG)
    rows = made.rows(USUAL, 2)
    damaged = made.picture()
    rows = [{**r, "damaged_images": [damaged]} for r in rows]
    settings = dict(loss_type=["mdpo"], precompute_ref_log_probs=True)
    ways = {n: made.trainer(PackedDPOTrainer, rows, out, packing=n, **settings)
            for n in ("never", "always")}
    found: Figures = {}
    for k in (1, 2):
        used = _in_turn({
            f"{way} {name}": lambda t=t, name=name: step(t, rows[:k], forget=name == "fly")
            for way, t in ways.items() for name in READ})
        for name in READ:
            found[f"packed_mdpo_llava_{USUAL}_k{k}_{name}"] = _figure(
                used[f"never {name}"], used[f"always {name}"],
                f"a step of a positive, reference {READ[name]} / the same unpacked")
    return found


def _runs(world: Path, out: Path) -> Figures:
    """A run of two epochs from the making of model and trainer to its end, the cache's cost in
    it, against TRL's with the same arguments. The comparison that packing = "auto" makes once a run
    is not in it."""
    made = Sized(world, *LONG)
    found: Figures = {}
    for k in (1, 2):
        rows = [r for _ in range(POSITIVES) for r in made.rows(USUAL, k)]
        settings = dict(per_device_train_batch_size=k, num_train_epochs=EPOCHS)

        made_for = {"stock": (DPOTrainer, {}),
                    "packed": (PackedDPOTrainer, {"packing": "always",
                                                  "precompute_ref_log_probs": True})}

        def run(name: str) -> None:
            kind, own = made_for[name]
            with tempfile.TemporaryDirectory(dir=out) as fresh:  # no cache of the last round
                made.trainer(kind, rows, Path(fresh), **settings, **own).train()

        used = _in_turn({n: lambda n=n: run(n) for n in made_for})
        found[f"packed_run_llava_{USUAL}_k{k}"] = _figure(
            used["stock"], used["packed"], f"{EPOCHS} epochs over {POSITIVES} positives of {k} "
            "pairs, the reference's cache counted / TRL's train()")
    return found


def _tiny(world: Path, out: Path) -> Figures:
    """A step of the tiny study's trainer on one of its batches, whose positives have one or two
    rejected answers, opening of the images counted, against TRL's with the same arguments."""
    p = params.read_study("tiny")["3_dpo_training"]
    lines = pair_rows.read_pairs(p.path(p.pairs))
    rows = pair_rows.to_preferences(lines, p.path(p.image_folder))[:p.device_batch]
    ours = trainers.make(p, "bpo", rows, out / "tiny", steps=1, references=out / "tiny" / "reference")
    checkpoint = checkpoints.load(p.path(p.model), precision=p.precision, transform=p.image_transform)
    stock = DPOTrainer(checkpoint.model, args=ours.args, train_dataset=ours.train_dataset,
                       processing_class=checkpoint.processor, peft_config=checkpoints.adapter_config(
                           checkpoint.model, rank=p.lora_rank, alpha=p.lora_alpha,
                           dropout=p.lora_dropout))
    ours.counted_steps = 0
    numbers = list(range(len(rows)))

    def work(trainer: DPOTrainer, **how: Any) -> Callable[[], None]:
        return lambda: step(trainer, trainer.train_dataset.__getitems__(numbers), **how)

    used = _in_turn({"stock": work(stock), "cached": work(ours), "fly": work(ours, forget=True)})
    positives = len({r["id"] for r in rows})
    return {f"packed_step_tiny_{name}": _figure(
        used["stock"], used[name], f"a step of {len(rows)} pairs of {positives} positives, "
        f"reference {READ[name]} / TRL's step of these pairs") for name in READ}


# Models, rows and steps


class Sized:
    """Random LLaVAs of one size, each with a fresh adapter, and rows for them."""

    def __init__(self, world: Path, text: Sequence[int], vision: Sequence[int]):
        self.text, self.vision, self.draw = text, vision, random.Random(0)
        self.processor = checkpoints.load_processor(world / "model")
        self.processor.image_processor.size = {"shortest_edge": SIDE}
        self.processor.image_processor.crop_size = {"height": SIDE, "width": SIDE}
        self.processor.patch_size = PATCH
        tokenizer = self.processor.tokenizer
        tokenizer.model_max_length = 4096
        self.words = sorted(tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens))

    def model(self) -> LlavaForConditionalGeneration:
        """The output layer has the share that it has in the 7B model, whatever words there are."""
        tokenizer = self.processor.tokenizer
        width, inner, layers, heads = self.text
        text = LlamaConfig(
            vocab_size=width * 2 // 3, hidden_size=width, intermediate_size=inner,
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=False)
        width, inner, layers, heads = self.vision
        vision = CLIPVisionConfig(
            hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=heads, image_size=SIDE, patch_size=PATCH)
        torch.manual_seed(0)
        return LlavaForConditionalGeneration(LlavaConfig(
            text_config=text, vision_config=vision, image_seq_length=(SIDE // PATCH) ** 2,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>")))

    def picture(self) -> Image.Image:
        return Image.frombytes("RGB", (SIDE, SIDE), self.draw.randbytes(SIDE * SIDE * 3))

    def rows(self, length: int, k: int) -> list[dict[str, Any]]:
        """A positive with k rejected answers, all of `length` tokens with the end token."""
        def said(words: int) -> str:
            return " ".join(self.draw.choices(self.words, k=words))

        known = checkpoints.Checkpoint(None, self.processor)
        asked = [{"role": "user", "content": said(ASKED)}]
        prompt = encoding.prompt_text(known, asked, image=True)
        picture, *answers = self.picture(), *(
            encoding.answer_text(known, asked, said(length - 1))
            for _ in range(k + 1))
        return [{"images": [picture], "prompt": prompt, "chosen": answers[0], "rejected": rejected}
                for rejected in answers[1:]]

    def trainer(self, kind: type[DPOTrainer], rows: list[dict[str, Any]], out: Path, *,
                packing: str = "", **settings: Any) -> DPOTrainer:
        """A trainer of the kind on a fresh model."""
        model = self.model()
        args = DPOConfig(str(out), **{**dict(
            use_cpu=True, bf16=False, report_to="none", max_length=None, save_strategy="no",
            logging_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
            per_device_train_batch_size=1), **settings})
        own = {"packing": packing} if packing else {}
        trainer = kind(model, args=args, train_dataset=Dataset.from_list(rows),
                       processing_class=self.processor, peft_config=checkpoints.adapter_config(
                           model, rank=16, alpha=32, dropout=0.0), **own)
        trainer.remove_callback(PrinterCallback)
        return trainer


def step(trainer: DPOTrainer, rows: Sequence[dict[str, Any]], *, forget: bool = False) -> None:
    """One step on the rows; forget: without the reference's log-probs that are kept so far."""
    if forget:
        trainer.cache.answers.clear()
    trainer.model.train()
    inputs = trainer._prepare_inputs(trainer.data_collator([dict(r) for r in rows]))
    trainer.compute_loss(trainer.model, inputs).backward()
    trainer.model.zero_grad()


# Clocks and counters


def _in_turn(works: Mapping[str, Callable[[], object]]) -> Used:
    """Seconds of every work in every round, taken in turn after a warm-up."""
    used: dict[str, list[tuple[float, float]]] = {n: [] for n in works}
    for turn in range(ROUNDS + 1):
        for name, work in works.items():
            cpu, wall = time.process_time(), time.perf_counter()
            work()
            if turn:
                used[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return used


def _added(parts: Iterable[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Seconds of works that follow each other in a round."""
    return [tuple(map(sum, zip(*each, strict=True))) for each in zip(*parts, strict=True)]


def _figure(baseline: Sequence[tuple[float, float]], ours: Sequence[tuple[float, float]],
            compared: str) -> dict[str, object]:
    """Baseline's CPU time over ours, in the form of the other figures; the wall's as "wall"."""
    cpu, wall = ([b[at] / o[at] for b, o in zip(baseline, ours, strict=True)] for at in (0, 1))
    theirs, mine = (statistics.median(cpu for cpu, _ in side) for side in (baseline, ours))
    return {**_spread(cpu, f"{compared} ({theirs:.2f} / {mine:.2f} s of CPU)"),
            "wall": round(statistics.median(wall), 2)}


def _spread(values: Sequence[float], compared: str) -> dict[str, object]:
    return {"ratio": round(statistics.median(values), 2), "low": round(min(values), 2),
            "high": round(max(values), 2), "n": len(values), "compared": compared}


def _flops(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False, custom_mapping=trainers.ATTENTION) as counter:
        work()
    return counter.get_total_flops()


def _matmul_speed() -> float:
    """Operations a second of CPU time of a large product, the best of the rounds."""
    a, b = torch.rand(2, MATMUL, MATMUL)
    seconds = _in_turn({"product": lambda: a @ b})["product"]
    return 2 * MATMUL**3 / min(cpu for cpu, _ in seconds)


def _peak(work: Callable[[], object]) -> int:
    """Bytes at the worst moment of a work beyond those held before it: all that torch's allocator
    hands out and takes back, as its profiler records it, inside operations too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profile:
        work()
    held = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
