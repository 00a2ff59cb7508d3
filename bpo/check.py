"""python -m bpo check STUDY: reads the study's parameter files, says which of their paths are
missing, which of the first rows of data can be used, and how much memory and disk the study takes,
by calculation from the checkpoint's config.json."""

import argparse
import functools
import importlib.util
import itertools
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from bpo import params
from bpo.data import rows as data_rows
from bpo.params import NF4, DPOTraining, PairGeneration, Parameters, Refusal
from bpo.reports import measure
from bpo.study import hub, sources
from bpo.study import stage as stages

ANNOTATED = ("data", "splits", "calibration_data", "probe_data")
ROWS = 100  # of annotated data that are read and whose images are opened
WIDTH = {"float32": 4, "bfloat16": 2, NF4: 2}  # bytes of a number in computing


def add_study(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study")
    parser.add_argument("-p", nargs=2, action="append", default=[], dest="overrides",
                        metavar=("NAME", "VALUE"), help="override a parameter wherever it is")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_study(parser)
    parser.add_argument("--measure", action="store_true", help=f"run {measure.ROWS} rows and "
                        f"{measure.STEPS} steps of each stage, and say what the whole takes")


def overrides(options: argparse.Namespace) -> dict[str, Any]:
    """The values given with -p, read as YAML, and the study's name given with --as."""
    name = {"study": options.name} if getattr(options, "name", None) else {}
    return {n: yaml.safe_load(v) if v else "" for n, v in options.overrides} | name


def run(options: argparse.Namespace) -> int:
    """`show`, and what was measured if that is asked for and nothing is missing."""
    changed = overrides(options)
    missing = show(options.study, changed)
    if options.measure and not missing:
        with hub.cache_only():
            print("\n".join(measure.table(params.read_study(options.study, changed))))
    return missing


@hub.cache_only()
def show(study: str, changed: Mapping[str, Any]) -> int:
    """Prints every file of a study with its paths; returns 1 if one of them is missing. Nothing is
    fetched from the hub. changed: parameters to override."""
    read, missing = params.read_study(study, changed), 0
    for name, p in read.items():
        print(f"params/{study}/{name}.yaml: {len(type(p).model_fields)} parameters are good")
        for field, path, note, lost in findings(p, read):
            if not note and field.partition(".")[0] in ANNOTATED:
                note, lost = rows_there(p, field, path)
            print(f"  {field:24} {path}  {note or _size(path)}")
            missing += lost
        if getattr(p, "decoder", ""):
            text, lost = decoder(p)
            print(f"  {'decoder':24} {p.decoder}  {text}")
            missing += lost
    for name, text in memory(study, read).items():
        print(f"{name:10}{text}")
    if missing:
        print(f"{missing} of the paths are missing or hold nothing that can be used: get them, or "
              "set the parameters to where they are", file=sys.stderr)
    return int(missing > 0)


def paths(p: Parameters) -> Iterator[tuple[str, str]]:
    """(parameter, value) of every path that a notebook reads; empty ones are left out."""
    for name in params.PATHS:
        value = getattr(p, name, "")
        if name == "text_model" and value and p.endpoint:
            continue
        if name == "data" and isinstance(value, dict):  # file -> its folder below image_folder
            values = [(name, file) for file in value]
            values += [("images", f"{p.image_folder}/{below}") for below in value.values() if below]
        elif isinstance(value, dict):
            values = [(f"{name}.{n}", v) for n, v in value.items()]
        else:
            values = [(name, value)]
        yield from ((n, v) for n, v in values if v)


def rows_there(p: Parameters, field: str, path: Path) -> tuple[str, bool]:
    """What of the first rows of annotated data can be used, for people, and whether none can."""
    folder, below = getattr(p, "image_folder", ""), ""
    if field == "probe_data":
        folder = p.probe_image_folder
    elif field == "data" and isinstance(p.data, dict):
        below = next(b for f, b in p.data.items() if p.path(f) == path)
    root = p.optional_path(folder)
    try:
        first = list(itertools.islice(data_rows.stream(
            path, root / below if root else None, special=_special(p)), ROWS))
    except Refusal as refusal:
        return f"CANNOT BE READ: {refusal}", True
    rows = [r for r in first if isinstance(r, data_rows.Row)]
    good, bad = data_rows.open_images(rows)
    reasons = data_rows.Reasons(r for r in first if isinstance(r, data_rows.Rejected)) + bad
    note = (f"{_size(path)}, layout {data_rows.layout(path)}: {len(good)} of the first "
            f"{len(first)} rows can be used")
    left_out = f"; left out: {reasons}{data_rows.hint(reasons)}" if reasons else ""
    return note + left_out, not good


def findings(p: Parameters, read: dict[str, Parameters]) -> list[tuple[str, Path, str, bool]]:
    """(parameter, path, note, whether something is missing) of every path of a notebook.

    note: which notebook of the study (`read`) writes the path, or what is missing; "" if it is
    there. What a notebook writes is not missing before it has run.
    """
    found = []
    for field, value in paths(p):
        try:
            path = p.path(value)
        except Refusal as refusal:  # a name of the hub that is not to be had
            found.append((field, Path(value), f"MISSING: {refusal}", True))
            continue
        writer = next((n for n, q in read.items()
                       if path.is_relative_to(stages.stage_folder(q.study, n))), None)
        note, missing = "", False
        if not path.exists() and writer:
            note = f"written by {writer}"
        elif not path.exists():
            note, missing = ": ".join(filter(None, ("MISSING", sources.written_by(path)))), True
        elif field.startswith("folders.") and not writer:
            from bpo.evaluation import benchmarks, official  # here, since they bring torch

            benchmark = benchmarks.KNOWN[field.removeprefix("folders.")]
            if lost := official.missing(benchmark, path):
                note, missing = f"lacks {', '.join(lost)}: {benchmark.fetch}", True
        found.append((field, path, note, missing))
    return found


def decoder(p: PairGeneration) -> tuple[str, bool]:
    """What the server of notebook 2 says that it serves, for people, and whether it is of no use.
    Its checkpoint may lie elsewhere there: then only the prompts' lengths tell, with each reply."""
    from bpo.models import checkpoint, served  # here, since they bring torch
    from bpo.pairs import injection

    try:
        served.require_family(checkpoint.family(p.path(p.model)))
        said = served.server(injection.decoder(p), p)
    except Refusal as refusal:
        return f"CANNOT BE USED: {refusal}", True
    root = said.get("root", said["model"])
    whose = ("the study's model" if root in (p.model, str(p.path(p.model))) else
             f"which is to be {p.model}; lengths of prompts are compared with every reply")
    return f"{said['engine']} serves {root}, {whose}", False


def _special(p: Parameters) -> re.Pattern | None:
    """The checkpoint's own tokens; None where it cannot be read, as the line about it says."""
    from bpo.models import encoding  # here, since it brings torch

    try:
        return encoding.special_in(p.path(p.model))
    except (Refusal, OSError, ValueError):
        return None


@functools.cache
def _size(path: Path) -> str:
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    size = sum(f.stat().st_size for f in files)
    return f"{size / 1e6:,.1f} MB" if size > 1e5 else f"{size:,} bytes"


def memory(study: str, read: dict[str, Parameters]) -> dict[str, str]:
    """What pairs and training take, for people, and how to measure their time; nothing while the
    checkpoint is not there."""
    making, training = read.get(PairGeneration.notebook), read.get(DPOTraining.notebook)
    if not making or not training:
        return {}
    from bpo.models import checkpoint as checkpoints  # here, since it brings torch

    try:
        folder = making.path(making.model)
        if not (folder / "config.json").is_file():
            return {}
        model = checkpoints.skeleton(folder)
    except Refusal as refusal:
        return {"memory": f"not known: {refusal}"}
    weights = model.num_parameters()
    return {
        "weights": f"{weights:,}, {_gb(weights_bytes(model, making.precision))} in "
                   f"{making.precision} (all sizes by calculation)" + (
                       "" if making.precision != NF4 or importlib.util.find_spec("bitsandbytes")
                       else "; bitsandbytes is MISSING: pip install -e '.[nf4]'"),
        "pairs": f"{_gb(generation_bytes(model, making))} of GPU memory: weights and key-value "
                 f"cache of batch_tokens = {making.batch_tokens:,}",
        "training": f"{_gb(training_bytes(model, training))} of GPU memory at most: device_batch = "
                    f"{training.device_batch} pairs of max_tokens = {training.max_tokens:,}",
        "disk": f"{_gb(disk_bytes(model, training))} for adapters and checkpoints",
        "time": f"python -m bpo check {study} --measure runs a little of each stage and says"}


def weights_bytes(model: Any, precision: str) -> int:
    """The weights; of nf4 the decoder's linear layers have 4 bits a weight, and for each 64 a scale
    of 8 bits, whose own scale, 32 bits, is shared by 256 of them."""
    if precision != NF4:
        return WIDTH[precision] * model.num_parameters()
    from bpo.models import checkpoint as checkpoints  # here, since it brings torch

    small = sum(m.weight.numel() for m in checkpoints.linear_layers(model)[1].values())
    return 2 * (model.num_parameters() - small) + int(
        small * (1 / 2 + 1 / 64 + 4 / (64 * 256)))


def generation_bytes(model: Any, p: PairGeneration) -> int:
    """Peak of decoding: the weights, and keys and values of all tokens in a batch. One layer's
    activations, a few GB while the prompts are read, are left out."""
    text = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cached = 2 * text.num_hidden_layers * heads * size  # numbers a token
    return weights_bytes(model, p.precision) + WIDTH[p.precision] * p.batch_tokens * cached


def adapter_weights(model: Any, rank: int) -> int:
    """LoRA weights: `rank` for each input and output of the layers that have an adapter."""
    from bpo.models import checkpoint as checkpoints  # here, since it brings torch

    return rank * sum(m.in_features + m.out_features
                      for m in checkpoints.linear_layers(model)[1].values())


def training_bytes(model: Any, p: DPOTraining) -> int:
    """Peak of a training step on 2 x device_batch sequences of max_tokens.

    The weights; the adapter in float32 with its gradient and Adam's two moments, 16 bytes a weight;
    each layer's activations, which are 12 hidden + 4 intermediate numbers a token and, for the
    adapters' dropout, 2 (6 hidden + intermediate) in float32; with checkpointing those of one
    layer, and the input of every layer; logits and their gradient in float32.
    """
    text, width = model.config.get_text_config(), WIDTH[p.precision]
    hidden, layers = text.hidden_size, text.num_hidden_layers
    a_layer = (width * (12 * hidden + 4 * text.intermediate_size)
               + 8 * (6 * hidden + text.intermediate_size))
    activations = (layers * width * hidden + a_layer if p.gradient_checkpointing
                   else layers * a_layer)
    return (weights_bytes(model, p.precision) + 16 * adapter_weights(model, p.lora_rank)
            + 2 * p.device_batch * p.max_tokens * (activations + 8 * text.vocab_size))


def disk_bytes(model: Any, p: DPOTraining) -> int:
    """An adapter a method, and two checkpoints to resume from, each with Adam's two moments."""
    return 4 * adapter_weights(model, p.lora_rank) * (len(p.methods) + 2 * 3)


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
