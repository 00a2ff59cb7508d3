"""Disk, GPU memory and time of a study, by calculation from the checkpoint's config.json.

No weight is read and nothing is measured: the formulas stand in the docstrings, the assumptions in
the constants, and `lines` says so. FLOPs are tested against a count; hours and memory were never
compared with a real card.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from bpo.params import Checkpoint, DPOTraining, PairGeneration, Parameters, Refusal, outputs_root

# One NVIDIA A100 with 80 GB: dense bfloat16 FLOP a second, and bytes a second from its memory.
CARD, CARD_FLOPS, CARD_BYTES = "A100 80 GB", 312e12, 2.0e12
UTILISATION = 0.4  # of either, what such work is taken to reach
QUESTION, ANSWER = 60, 120  # tokens of a question with its template, and of an answer
REWRITING = 260  # tokens that ask the text model to rewrite an answer, without the answer
PHOTOGRAPH = (640, 480)  # the usual size of a COCO image, in pixels
WIDTH = {"float32": 4, "bfloat16": 2}  # bytes a number


@dataclass(frozen=True)
class Shape:
    """What the calculation needs to know of a vision-language checkpoint, counted in numbers.

    parameters: all weights.  language: those that every token passes, i.e. the decoder and the
    output layer without the looked-up embeddings.  vision: the rest, tower and projector.
    adapted: inputs and outputs of the decoder's linear layers, summed: LoRA weights a rank.
    cached: keys and values a token.  merged: image patches of the tower that make one token.
    """

    parameters: int
    language: int
    vision: int
    adapted: int
    cached: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    merged: int = 1


def shape(folder: Path) -> Shape:
    """The shape of a checkpoint, from its architecture built without memory for its weights.

    Raises Refusal when transformers does not know the architecture.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise Refusal(f"{folder}: config.json is not that of a vision-language model: "
                      f"{str(error).splitlines()[0]}") from None
    decoder, text = model.get_decoder(), config.get_text_config()
    head, embedded = model.get_output_embeddings().weight, decoder.get_input_embeddings().weight
    parameters = sum(w.numel() for w in model.parameters())  # a tied head counts once
    decoding = sum(w.numel() for w in decoder.parameters())
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Shape(
        parameters=parameters,
        language=decoding - embedded.numel() + head.numel(),
        vision=parameters - decoding - (head.numel() if head is not embedded else 0),
        adapted=sum(m.in_features + m.out_features for m in decoder.modules()
                    if isinstance(m, torch.nn.Linear)),
        cached=2 * text.num_hidden_layers * heads * size, layers=text.num_hidden_layers,
        hidden=text.hidden_size, intermediate=text.intermediate_size,
        vocabulary=head.shape[0],
        merged=getattr(config.vision_config, "spatial_merge_size", 1) ** 2)


def image_tokens(folder: Path, *, transform: str = "processor") -> int:
    """Tokens that a photograph of the usual size takes in the checkpoint's prompts.

    Raises Refusal when the processor cannot be loaded.
    """
    from PIL import Image

    from bpo.models import checkpoint as checkpoints
    from bpo.models import encoding

    try:
        processor = checkpoints.load_processor(folder)
    except (OSError, ValueError) as error:
        raise Refusal(f"{folder}: there is no processor: {str(error).splitlines()[0]}") from None
    image = encoding.transformed(Image.new("RGB", PHOTOGRAPH), transform, processor)
    turns = encoding.with_image([{"role": "user", "content": "?"}])
    text = processor.apply_chat_template(turns, tokenize=False)
    whole = processor(text=text, images=image, return_tensors="pt")["input_ids"].shape[1]
    # One placeholder stands in the text already.
    return whole - len(processor.tokenizer(text)["input_ids"]) + 1


def weight_bytes(of: Shape, precision: str) -> int:
    return of.parameters * WIDTH[precision]


def generation_bytes(of: Shape, precision: str, *, tokens: int) -> int:
    """Peak of decoding: the weights and the cache of all tokens that are in a batch at once.

    cache = tokens x 2 x layers x key-value heads x their size x bytes a number; the activations of
    one layer, a few GB while the prompts are read, are left out
    """
    return weight_bytes(of, precision) + tokens * of.cached * WIDTH[precision]


def runaway_tokens(budget: int, *, image: int, longest: int) -> int:
    """Tokens in a batch if it was planned for answers of a word and all run to the longest one."""
    prompt = image + QUESTION
    return max(1, budget // (prompt + 2)) * (prompt + longest)


def adapter_weights(of: Shape, rank: int) -> int:
    return rank * of.adapted


def training_bytes(of: Shape, precision: str, *, rank: int, sequences: int, tokens: int,
                   answers: int, checkpointing: bool) -> int:
    """Peak of a training step on `sequences` of `tokens` each, `answers` of them trained on.

    weights, and the adapter in float32 with gradient and Adam's two moments (16 bytes a weight);
    every layer's input kept (bytes x hidden a token), and one layer while it is recomputed:
    12 hidden + 4 intermediate numbers a token, and for the adapters' dropout 2 (6 hidden +
    intermediate) in float32; without checkpointing, that of all layers;
    logits and their gradient in float32 at the answers' positions.
    """
    width, count = WIDTH[precision], sequences * tokens
    layer = count * (width * (12 * of.hidden + 4 * of.intermediate)
                     + 8 * (6 * of.hidden + of.intermediate))
    kept = of.layers * count * width * of.hidden + layer if checkpointing else of.layers * layer
    return (weight_bytes(of, precision) + 16 * adapter_weights(of, rank) + kept
            + 8 * sequences * answers * of.vocabulary)


def answer_seconds(of: Shape, precision: str, *, image: int, prompt: int, answer: int,
                   batch_tokens: int) -> float:
    """Seconds of one card for one decoded answer, its share of a batch.

    The prompt is bound by arithmetic, 2 FLOP a weight and token (and a patch in the tower); each
    further token reads all weights once a batch and the row's own cache, and is bound by that.
    """
    rows = max(1, batch_tokens // (image + prompt + answer))
    flops = 2 * of.language * (image + prompt) + 2 * of.vision * image * of.merged
    read = answer * WIDTH[precision] * (of.parameters / rows
                                        + of.cached * (image + prompt + answer / 2))
    return (flops / CARD_FLOPS + read / CARD_BYTES) / UTILISATION


def pair_flops(of: Shape, *, image: int) -> float:
    """FLOP of DPO on one pair: two sequences, each with its image.

    A weight and token: policy forward 2, forward again for checkpointing 2, reference forward 2,
    backward 2 (the base is frozen: gradients pass through it, none is taken of its weights), so 8.
    The tower goes forward for policy and reference. Attention's own products are left out, below
    5 % at these lengths.
    """
    tokens = image + QUESTION + ANSWER
    return 2 * (8 * of.language * tokens + 4 * of.vision * image * of.merged)


def packed_flops(of: Shape, *, image: int, rejected: int, reference: float) -> float:
    """FLOP of DPO on one positive with so many rejected answers, packed: the image and the question
    once for all answers, and the reference in this share of the steps; terms as in `pair_flops`."""
    tokens = image + QUESTION + (1 + rejected) * ANSWER
    return (6 + 2 * reference) * of.language * tokens + 2 * of.vision * image * of.merged


def positive_flops(of: Shape, *, image: int) -> float:
    """FLOP of SFT on one positive: one sequence; as `pair_flops` without the reference."""
    return 6 * of.language * (image + QUESTION + ANSWER) + 2 * of.vision * image * of.merged


def card_hours(flops: float) -> float:
    return flops / (CARD_FLOPS * UTILISATION) / 3600


def pairs_a_row(p: PairGeneration) -> int:
    """Rejected answers that a row gets at most."""
    return sum(_answers(p).values())


def _answers(p: PairGeneration) -> dict[str, int]:
    """Source -> rejected answers that a row gets of it at most (of given ones, one)."""
    ways = {"weakened": len(p.weaken_modes), "injected": 1, "given": 1}
    return {s: ways[s] * p.keep for s in p.sources}


def lines(read: dict[str, Parameters]) -> list[str]:
    """What a study takes, in words; nothing while its checkpoint's config.json is not there, or
    for a checkpoint that a notebook makes."""
    named = next((p for p in read.values() if isinstance(p, Checkpoint)), None)
    if named is None:
        return []
    folder, precision = named.path(named.model), named.precision
    if not (folder / "config.json").is_file() or folder.is_relative_to(outputs_root()):
        return []
    try:
        of, image = shape(folder), image_tokens(folder, transform=named.image_transform)
    except Refusal as refusal:
        return [f"sizes are not known: {refusal}"]
    out = [
        f"by calculation, not measured: one {CARD} at {UTILISATION:.0%} of its "
        f"{CARD_FLOPS / 1e12:.0f} TFLOP/s and {CARD_BYTES / 1e12:.1f} TB/s; questions of "
        f"{QUESTION} tokens, answers of {ANSWER}, images of {PHOTOGRAPH[0]} x {PHOTOGRAPH[1]} "
        f"pixels ({image} tokens)",
        f"  {'weights':16} {of.parameters / 1e9:.2f} billion, "
        f"{_gb(weight_bytes(of, precision))} in {precision}"]
    making, training = read.get(PairGeneration.notebook), read.get(DPOTraining.notebook)
    if making is not None:
        out.append(_making(making, of, image))
    if training is not None:
        out += _training(training, making, of, image)
    return out


def _making(p: PairGeneration, of: Shape, image: int) -> str:
    from bpo.pairs import candidates

    def seconds(**tokens: int) -> float:
        return answer_seconds(of, p.precision, batch_tokens=p.batch_tokens, **tokens)

    spent, made, views = 0.0, 0, candidates.views(p)
    if "weakened" in p.sources:
        made += len(views) * p.weaken_samples
        spent += sum(1 + v.two_branches for v in views) * p.weaken_samples * seconds(
            image=image, prompt=QUESTION, answer=ANSWER)
    if "injected" in p.sources:
        made += p.inject_samples
        if not p.endpoint:  # a text model of its own is taken to be as large
            spent += p.inject_samples * seconds(image=0, prompt=REWRITING + ANSWER, answer=ANSWER)
    if p.score_candidates:  # all answers of a row behind its prompt, under two images
        spent += 2 * seconds(image=image, prompt=QUESTION + (1 + made) * ANSWER, answer=0)
    rows = p.rows or 1000
    most = runaway_tokens(p.batch_tokens, image=image, longest=p.max_new_tokens)
    planned, worst = (_gb(generation_bytes(of, p.precision, tokens=t))
                      for t in (p.batch_tokens, most))
    return (f"  {'pairs':16} {planned} of GPU memory, {worst} if every answer ran to "
            f"{p.max_new_tokens} tokens; {spent * rows / 3600:,.1f} GPU hours for {rows:,} rows")


def _training(p: DPOTraining, making: PairGeneration | None, of: Shape, image: int) -> list[str]:
    peak = training_bytes(
        of, p.precision, rank=p.lora_rank, sequences=2 * p.device_batch, tokens=p.max_tokens,
        answers=max(1, p.max_tokens - image - QUESTION), checkpointing=p.gradient_checkpointing)
    # An adapter a method, and two checkpoints to resume from, each with Adam's two moments.
    disk = 4 * adapter_weights(of, p.lora_rank) * (len(p.methods) + 2 * 3)
    out = [f"  {'training':16} {_gb(peak)} of GPU memory for {p.device_batch} pairs of "
           f"{p.max_tokens:,} tokens at once; {_gb(disk)} of disk for adapters and checkpoints"]
    rows = making.rows if making is not None else 0
    if not p.steps and not rows:
        return out
    steps = p.steps or math.ceil(p.epochs * rows * pairs_a_row(making) / p.batch_pairs)
    hours = {m: card_hours(_flops_a_row(p, making, of, image, steps=steps, method=m)
                           * p.batch_pairs * steps) for m in p.methods}
    told = ", ".join(f"{m} {h:,.0f}" for m, h in hours.items())
    return [*out, f"  {'':16} {steps:,} steps a method; GPU hours: {told}; "
                  f"{sum(hours.values()):,.0f} in all"]


def _flops_a_row(p: DPOTraining, making: PairGeneration | None, of: Shape, image: int, *,
                 steps: int, method: str) -> float:
    """FLOP that a method spends on a pair, or on a positive if it learns from those alone."""
    if not method.startswith("bpo") and method != "sft_compute":  # that one spends what bpo does
        return positive_flops(of, image=image)
    if p.packing == "never" or making is None:
        return pair_flops(of, image=image)
    kinds = _answers(making)
    all_of_a_row = dict.fromkeys(("bpo", "bpo_unselected", "sft_compute"), sum(kinds.values()))
    known = {**all_of_a_row, "bpo_weaken": kinds.get("weakened"),
             "bpo_inject": kinds.get("injected")}
    rejected = known.get(method) or making.keep
    passes = steps * p.batch_pairs / (making.rows * rejected) if making.rows else 1
    return packed_flops(of, image=image, rejected=rejected,
                        reference=1 / max(1.0, passes)) / rejected


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
