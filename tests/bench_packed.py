"""Part of `make bench`: the packed training step (`bpo.training.packed.trainer`) against TRL's own
DPOTrainer.

A step is everything from rows to gradients: collator, reference, policy, backward pass. The update
of the weights is left out: it is the same for all. Two shapes: a random LLaVA in the proportions of
LLaVA-1.5-7B, and the tiny study's.
"""

import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from bench_clock import CPU, Row, faster, in_turn, row
from datasets import Dataset
from helpers.trainers import peak
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
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
SIDE, PATCH, QUESTION = 336, 14, 27
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

REFERENCE = ("kept", "on the fly")  # where the reference's log-probs come from
REJECTED = {1: "one rejected answer", 2: "two rejected answers"}
# Questions about an image, rejected answers to each, and whether they are turns.
TREES = {"three questions with two rejected answers each": (3, 2, False),
         "three questions with one rejected answer each": (3, 1, False),
         "four turns with two rejected answers each": (4, 2, True)}


def packed(world: Path) -> list[Row]:
    """Steps of one positive. world: the folder of the tiny study's notebook 0."""
    with tempfile.TemporaryDirectory() as folder, checkpoints.quietly():
        return [*_steps(world, Path(folder)), *_objective(world, Path(folder))]


def trees(world: Path) -> list[Row]:
    """A step of all rows of an image as one tree, against TRL's steps of each pair and against
    packed steps of each positive: time, and the memory that a step adds."""
    made, table = Sized(_processor(world), *STEP), []
    with tempfile.TemporaryDirectory() as folder, checkpoints.quietly():
        for name, (questions, k, turns) in TREES.items():
            rows = made.rows(USUAL, k, questions=questions, turns=turns)
            trl = made.trainer(DPOTrainer, rows, Path(folder))
            prompt, image = (made.trainer(
                PackedDPOTrainer, rows, Path(folder), packing="always", own={"share": share},
                precompute_ref_log_probs=True) for share in ("prompt", "image"))
            works = {
                "TRL's steps of the same pairs": lambda: [step(trl, [r]) for r in rows],
                "packed steps of a positive each": lambda: [
                    step(prompt, rows[n:n + k]) for n in range(0, len(rows), k)],
                "a packed step of all positives": lambda: step(prompt, rows),
                "tree": lambda: step(image, rows)}
            seconds = in_turn(works, rounds=ROUNDS)
            memory = {n: peak(work) for n, work in works.items()}
            for other in list(works)[:-1]:
                table.append(faster(f"one tree of {name}, reference kept / {other}",
                                    seconds[other], seconds["tree"]))
                table.append(row(f"memory that a step adds, one tree of {name} / {other}",
                                 [memory["tree"] / memory[other]]))
    return table


def training(world: Path) -> list[Row]:
    """A step of the tiny study, and whole runs."""
    with tempfile.TemporaryDirectory() as folder, checkpoints.quietly():
        return [*_tiny(world, Path(folder)), *_runs(world, Path(folder))]


def _steps(world: Path, out: Path) -> Iterator[Row]:
    """A packed step of one positive with one or two rejected answers against TRL's steps of as many
    pairs; of the usual length with two also memory and operations."""
    made = Sized(_processor(world), *STEP)
    rows = {n: made.rows(n, 2) for n in LENGTHS}
    given = [r for both in rows.values() for r in both]
    trl = made.trainer(DPOTrainer, given, out)
    ours = {"kept": made.trainer(PackedDPOTrainer, given, out, packing="always",
                                 precompute_ref_log_probs=True),
            "on the fly": made.trainer(PackedDPOTrainer, given, out, packing="always")}
    for length, both in rows.items():
        seconds = in_turn({
            **{n: lambda r=r: step(trl, [r]) for n, r in enumerate(both)},
            **{(k, name): lambda k=k, t=t: step(t, both[:k])
               for k, (name, t) in product(REJECTED, ours.items())}}, rounds=ROUNDS)
        for k, name in product(REJECTED, REFERENCE):
            yield faster(f"a packed step, {length} tokens an answer, {REJECTED[k]}, reference "
                         f"{name} / TRL's steps of the same pairs",
                         sum(seconds[n] for n in range(k)), seconds[k, name])
        if length == USUAL:
            works = {"TRL": lambda: [step(trl, [r]) for r in both],
                     **{name: lambda t=t: step(t, both) for name, t in ours.items()}}
            seconds = {"TRL": seconds[0] + seconds[1],
                       **{name: seconds[2, name] for name in REFERENCE}}
            yield from _memory({"the pairs one after the other": works["TRL"],
                                "both pairs in one step": lambda: step(trl, both)}, works["kept"])
            yield from _operations(works, {n: used[:, CPU] for n, used in seconds.items()})


def _memory(baselines: dict[str, Callable[[], object]], ours: Callable[[], object]
            ) -> Iterator[Row]:
    """Peak memory that a step adds."""
    memory = peak(ours)
    for name, work in baselines.items():
        yield row(f"memory that a step with two rejected answers of {USUAL} tokens adds / TRL's "
                  f"with {name}", [memory / peak(work)])


def _operations(works: dict[str, Callable[[], object]], cpu: dict[str, Any]) -> Iterator[Row]:
    """Operations of a step, and at what share of the speed of a large matrix product it runs them.
    Attention counts as if it were not causal, which is more than is done."""
    flops = {name: _flops(work) for name, work in works.items()}
    for name in REFERENCE:
        yield row(f"operations of TRL's two steps of a pair, {USUAL} tokens an answer / of the "
                  f"packed step of both, reference {name}", [flops["TRL"] / flops[name]])
    a, b = torch.rand(2, MATMUL, MATMUL)
    product_cpu = in_turn({"product": lambda: a @ b}, rounds=ROUNDS)["product"][:, CPU]
    peak = 2 * MATMUL**3 / product_cpu.min()
    for name, whose in (("TRL", "TRL's step"),
                        *((n, f"the packed step, reference {n}") for n in REFERENCE)):
        yield row(f"operations a second of {whose} / of a large matrix product",
                  flops[name] / cpu[name] / peak)


def _objective(world: Path, out: Path) -> Iterator[Row]:
    """mDPO. TRL has none, so the baseline is this trainer unpacked; it computes the chosen answer
    with the damaged image twice a pair, where once would do."""
    made = Sized(_processor(world), *LONG)
    damaged = made.picture()
    rows = [{**r, "damaged_images": [damaged]} for r in made.rows(USUAL, 2)]
    ways = {n: made.trainer(PackedDPOTrainer, rows, out, packing=n, loss_type=["mdpo"],
                            precompute_ref_log_probs=True) for n in ("never", "always")}
    for k in REJECTED:
        seconds = in_turn({
            (way, name): lambda t=t, name=name: step(t, rows[:k], forget=name == "on the fly")
            for (way, t), name in product(ways.items(), REFERENCE)}, rounds=ROUNDS)
        for name in REFERENCE:
            yield faster(f"mDPO's step, {REJECTED[k]}, reference {name} / the same unpacked",
                         seconds["never", name], seconds["always", name])


def _runs(world: Path, out: Path) -> Iterator[Row]:
    """A run of two epochs from the making of model and trainer to its end, the cost of the kept
    log-probs in it, against TRL's with the same arguments. The comparison that packing = "auto"
    makes once a run is not in it."""
    made = Sized(_processor(world), *LONG)
    for k in REJECTED:
        rows = [r for _ in range(POSITIVES) for r in made.rows(USUAL, k)]

        def run(kind: type[DPOTrainer], **settings: Any) -> None:
            with tempfile.TemporaryDirectory(dir=out) as fresh:  # nothing kept of the last round
                made.trainer(kind, rows, Path(fresh), per_device_train_batch_size=k,
                             num_train_epochs=EPOCHS, **settings).train()

        seconds = in_turn({
            "TRL": lambda: run(DPOTrainer),
            "packed": lambda: run(PackedDPOTrainer, packing="always",
                                  precompute_ref_log_probs=True)}, rounds=ROUNDS)
        yield faster(f"two epochs of training, {REJECTED[k]} of {USUAL} tokens a positive, the "
                     "making of model and kept log-probs counted / TRL's `train()`",
                     seconds["TRL"], seconds["packed"])


def _tiny(world: Path, out: Path) -> Iterator[Row]:
    """A step of the tiny study's trainer on one of its batches, whose positives have one or two
    rejected answers, opening of the images counted, against TRL's with the same arguments."""
    p = params.read_study("tiny")["3_dpo_training"]
    lines = pair_rows.read_pairs(p.path(p.pairs))
    rows = pair_rows.to_preferences(lines, p.path(p.image_folder))[:p.device_batch]
    ours = trainers.make(p, "bpo", rows, out / "tiny", steps=1,
                         references=out / "tiny" / "reference")
    checkpoint = checkpoints.load(p.path(p.model), precision=p.precision,
                                  transform=p.image_transform)
    trl = DPOTrainer(checkpoint.model, args=ours.args, train_dataset=ours.train_dataset,
                     processing_class=checkpoint.processor, peft_config=checkpoints.adapter_config(
                         checkpoint.model, rank=p.lora_rank, alpha=p.lora_alpha,
                         dropout=p.lora_dropout))
    ours.counted_steps = 0

    def work(trainer: DPOTrainer, **how: Any) -> Callable[[], None]:
        return lambda: step(trainer, trainer.train_dataset.__getitems__(list(range(len(rows)))),
                            **how)

    seconds = in_turn({"TRL": work(trl), "kept": work(ours),
                       "on the fly": work(ours, forget=True)}, rounds=ROUNDS)
    for name in REFERENCE:
        yield faster(f"training step of the tiny study, {len(rows)} pairs, reference {name} / "
                     "TRL's step of these pairs", seconds["TRL"], seconds[name])


# Models, rows and steps


def _processor(world: Path) -> Any:
    return checkpoints.load_processor(world / "model")


class Sized:
    """Random LLaVAs of one size, each with a fresh adapter, and rows for them.

    vocabulary: of the model; 0 gives the output layer the share that it has in the 7B model,
    whatever words there are. side: of a picture, in pixels.
    """

    def __init__(self, processor: Any, text: Sequence[int], vision: Sequence[int], *,
                 vocabulary: int = 0, side: int = SIDE, device: str = "cpu",
                 dtype: torch.dtype = torch.float32):
        self.text, self.vision, self.draw = text, vision, random.Random(0)
        self.vocabulary, self.side = vocabulary or text[0] * 2 // 3, side
        self.device, self.dtype = device, dtype
        self.processor = processor
        self.processor.image_processor.size = {"shortest_edge": side}
        self.processor.image_processor.crop_size = {"height": side, "width": side}
        self.processor.patch_size = PATCH
        tokenizer = self.processor.tokenizer
        tokenizer.model_max_length = 4096
        self.words = sorted(tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens))

    def model(self) -> LlavaForConditionalGeneration:
        tokenizer = self.processor.tokenizer
        width, inner, layers, heads = self.text
        text = LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=width, intermediate_size=inner,
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=False)
        width, inner, layers, heads = self.vision
        vision = CLIPVisionConfig(
            hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=heads, image_size=self.side, patch_size=PATCH)
        torch.manual_seed(0)
        with torch.device(self.device):
            return AutoModelForImageTextToText.from_config(LlavaConfig(
                text_config=text, vision_config=vision,
                image_seq_length=(self.side // PATCH) ** 2,
                image_token_index=tokenizer.convert_tokens_to_ids("<image>")), dtype=self.dtype)

    def picture(self) -> Image.Image:
        side = self.side
        return Image.frombytes("RGB", (side, side), self.draw.randbytes(side * side * 3))

    def rows(self, length: int, k: int, picture: Image.Image | None = None, *,
             questions: int = 1, turns: bool = False) -> list[dict[str, Any]]:
        """Positives about one picture, a new one if none is given, with k rejected answers each,
        all of `length` tokens with the end token. turns: each follows the last one and its chosen
        answer."""
        def sentence(words: int) -> str:
            return " ".join(self.draw.choices(self.words, k=words))

        reader = checkpoints.Checkpoint(None, self.processor)
        picture, before, rows = picture or self.picture(), [], []
        for _ in range(questions):
            asked = [*before, {"role": "user", "content": sentence(QUESTION)}]
            prompt = encoding.prompt_text(reader, asked, image=True)
            said = [sentence(length - 1) for _ in range(k + 1)]
            chosen, *rejected = (encoding.answer_text(reader, asked, text) for text in said)
            rows += [{"images": [picture], "prompt": prompt, "chosen": chosen, "rejected": text}
                     for text in rejected]
            before = [*asked, {"role": "assistant", "content": said[0]}] if turns else []
        return rows

    def trainer(self, kind: type[DPOTrainer], rows: list[dict[str, Any]], out: Path, *,
                packing: str = "", own: Mapping[str, Any] = MappingProxyType({}), **settings: Any
                ) -> DPOTrainer:
        """A trainer of the kind on a fresh model. packing, own: what the packed one alone takes;
        settings: TRL's."""
        model = self.model()
        args = DPOConfig(str(out), **{**dict(
            use_cpu=True, bf16=False, report_to="none", max_length=None, save_strategy="no",
            logging_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
            per_device_train_batch_size=1), **settings})
        how = {**own, **({"packing": packing} if packing else {})}
        trainer = kind(model, args=args, train_dataset=Dataset.from_list(rows),
                       processing_class=self.processor, peft_config=checkpoints.adapter_config(
                           model, rank=16, alpha=32, dropout=0.0), **how)
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


def _flops(work: Callable[[], object]) -> int:
    with trainers.FlopCounter() as counter:
        work()
    return counter.total
