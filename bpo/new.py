"""python -m bpo new NAME --model PATH --data FILE: the parameter files of a study of the user's own
model and pictures, with numbers of rows, batches and steps that fit what is there."""

import argparse
import functools
import hashlib
import math
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import yaml
from PIL import Image
from tqdm import tqdm

from bpo import check, params
from bpo.data import images
from bpo.data import rows as data_rows
from bpo.data.rows import Rejected, Row
from bpo.models import checkpoint as checkpoints
from bpo.models import encoding
from bpo.params import Refusal, short
from bpo.study import hub
from bpo.study.files import write_lines, write_whole
from bpo.study.seeds import seed_for
from bpo.study.text import pieces

TRAINING, HELD_OUT, REJECTED = "training.jsonl", "held_out.jsonl", "rejected_rows.jsonl"
PATTERN = params.ROOT / "params" / "llava-1.5-7b"  # the paper's settings, where nothing is decided
# Several candidates of a row, of which one is likely to be of use, where there are few rows.
FEW_ROWS = 1000
FEW = {"weaken_samples": 4, "weaken_temperature": 1.0, "inject_samples": 4,
       "score_candidates": True}
LARGE = 1e9  # weights
CARD = 80e9  # bytes of GPU memory, where no GPU is seen


@dataclass(frozen=True)
class Data:
    """root: the folder that image names start from.  pictures: image -> sha256 of its bytes.
    largest: (width, height) of the picture with the most pixels."""

    file: Path
    root: Path
    rows: list[Row]
    rejected: list[Rejected]
    pictures: dict[Path, str]
    largest: tuple[int, int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="the study's name, which becomes a folder of params/")
    parser.add_argument("--model", required=True, metavar="PATH",
                        help="folder of a vision-language checkpoint in Hugging Face layout, or "
                             "its name on the hub")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE",
                        help="annotated answers, in any layout that params/README.md names")
    parser.add_argument("--image-folder", type=Path, metavar="PATH",
                        help="folder that image names start from (default: each data file's own)")
    parser.add_argument("--held-out", type=Path, metavar="FILE",
                        help="annotated answers to compare on (default: a fifth of the pictures)")


def run(options: argparse.Namespace) -> int:
    """Writes the study, says what was found and decided, and checks its paths."""
    data, pictures, held_out = (
        path and hub.here(path, path.as_posix(), checkpoint=False)
        for path in (options.data, options.image_folder, options.held_out))
    print(*make(options.name, options.model, data, image_folder=pictures, held_out=held_out),
          sep="\n")
    code = check.show(options.name, {})
    if not code:
        print(f"next: python -m bpo run {options.name}")
    return code


def make(name: str, checkpoint: Path | str, file: Path, *, image_folder: Path | None = None,
         held_out: Path | None = None) -> list[str]:
    """Writes a study's folder, whole or not at all; returns what was found and decided, in lines.

    Raises Refusal when the study exists, or when no working one can be made of what was given.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise Refusal(f"{name!r}: a study's name is that of a folder: letters, digits, dots, - and "
                      "_, with a letter or a digit first")
    folder = params.params_root() / name
    for there in (folder, params.outputs_root() / name):
        if there.exists():
            raise Refusal(f"{short(there)} is there already; choose another name, or delete it")
    local = Path(checkpoint).resolve()
    loaded = hub.here(local, str(checkpoint), checkpoint=True)
    model_name = str(local if loaded == local else checkpoint)  # of the hub's, not its folder
    model, reader = read_checkpoint(loaded)
    special = encoding.special(reader.processor)
    data = read_data(file, image_folder, special)
    compared = read_data(held_out, image_folder, special) if held_out else data
    held_pictures = set(compared.pictures.values()) if held_out else draw_held_out(data)
    training = [r for r in data.rows if data.pictures[r.image] not in held_pictures]
    test = [r for r in compared.rows if compared.pictures[r.image] in held_pictures]
    if not training:
        raise Refusal(f"{compared.file}: every picture of {data.file} is in it too, so none is "
                      "left to train on; give other rows, or leave --held-out away")
    chosen = decide(model, reader, data, compared, training, test)
    chosen["2_pair_generation"]["data"] = str(folder / TRAINING)
    chosen["4_qualitative_comparison"]["splits"] = {
        "held_out": str(compared.file if held_out else folder / HELD_OUT)}
    read = {n: params.validate(params.SCHEMAS[n], params.read_yaml(PATTERN / f"{n}.yaml") | values
                               | {"study": name, "model": model_name}, where=f"params/{name}")
            for n, values in chosen.items()}
    memory = fit(model, read)
    files = {TRAINING: map(_line, training), HELD_OUT: None if held_out else map(_line, test),
             REJECTED: (r.line(data.root) for r in data.rejected) if data.rejected else None}
    _write(folder, read, files, truth=data_rows.truth_file(data.file))
    few = "; so few say little about the model" if len(held_pictures) < 30 else ""
    return [*(f"{short(d.file)}: {len(d.rows):,} rows can be used{_reasons(d.rejected)}"
              for d in ([data, compared] if held_out else [data])),
            (f"{len(training):,} rows to train on, {len(test):,} rows about "
             f"{len(held_pictures):,} held-out pictures{few}; batches for {memory / 1e9:.0f} GB of "
             "GPU memory"),
            f"{short(folder)} is written; for benchmarks copy another study's 5_benchmarks.yaml"]


def read_checkpoint(folder: Path) -> tuple[Any, checkpoints.Checkpoint]:
    """The model without memory for its weights, and its processor.

    Raises Refusal where `checkpoints.load` would fail, before gigabytes are read.
    """
    if not (folder / "config.json").is_file():
        raise Refusal(f"{folder}: there is no checkpoint (config.json is missing); --model is the "
                      "folder that one was downloaded into, not that of an adapter")
    model = checkpoints.skeleton(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise Refusal(f"{folder}: holds no weights as safetensors, and other files can run code "
                      "when they are read; get the safetensors files of this checkpoint")
    for file in files:
        try:
            safetensors.safe_open(file, "pt")
        except (safetensors.SafetensorError, OSError):
            raise Refusal(f"{file}: the weights are cut off or a pointer to them; get this file "
                          "again") from None
    transform = "pad" if model.config.model_type == "llava" else "processor"
    try:
        reader = checkpoints.load_without_weights(folder, transform=transform)
    except (OSError, ValueError) as error:
        raise Refusal(f"{folder}: the processor cannot be read: {str(error).splitlines()[0]}; get "
                      "the checkpoint's other files too") from None
    if not hasattr(reader.processor, "image_processor"):
        raise Refusal(f"{folder}: there is no image processor (preprocessor_config.json); get the "
                      "whole checkpoint")
    return model, reader


def read_data(file: Path, image_folder: Path | None, special: re.Pattern | None = None) -> Data:
    """The rows of a data set whose images can be decoded, all in memory.

    Raises Refusal when the data cannot be read, or none of its rows can be used.
    """
    file = file.parent.resolve() / file.name  # a link's own name and place, not its target's
    root = data_rows.image_root(file, image_folder)
    bar = functools.partial(tqdm, leave=False, disable=None)
    entries = list(bar(data_rows.stream(file, image_folder, special=special), desc="reading rows"))
    files = list(dict.fromkeys(row.image for row in entries if isinstance(row, Row)))
    checked = bar(images.problems(files), total=len(files), desc="opening pictures")
    problems = dict(zip(files, checked, strict=True))
    rows, rejected = [], []
    for row in entries:
        if isinstance(row, Row) and (problem := problems[row.image]):
            row = Rejected(row.id, row.where, problem, str(row.image))
        (rows if isinstance(row, Row) else rejected).append(row)
    if not rows:
        hint = data_rows.hint(data_rows.Reasons(rejected), "give --image-folder, if it is not "
                              f"{root},")
        raise Refusal(f"{file}: no row can be used{_reasons(rejected)}{hint}")
    good = [image for image in files if not problems[image]]
    return Data(file, root, rows, rejected, {image: _hash(image) for image in good},
                max(map(images.size, good), key=math.prod))


def _hash(image: Path) -> str:
    source = images.source(image)
    content = source.read_bytes() if isinstance(source, Path) else source.read()
    return hashlib.sha256(content).hexdigest()


def _reasons(rejected: Sequence[Rejected]) -> str:
    return f"; left out: {data_rows.Reasons(rejected)}" if rejected else ""


def draw_held_out(data: Data) -> set[str]:
    """The hashes of a fifth of the pictures, 2 to 500, drawn by seed; Refusal below 4 pictures."""
    pictures = set(data.pictures.values())
    if len(pictures) < 4:
        raise Refusal(f"{data.file}: {len(pictures)} pictures can be used, and 4 are needed, 2 of "
                      f"them held out{_reasons(data.rejected)}; add pictures, or give held-out "
                      "rows with --held-out")
    count = min(500, max(2, round(0.2 * len(pictures))))
    return set(sorted(pictures, key=lambda p: seed_for(0, "held out", p))[:count])


def decide(model: Any, reader: checkpoints.Checkpoint, data: Data, compared: Data,
           training: Sequence[Row], test: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """notebook -> the parameters that depend on what is there."""
    rows, few = [*training, *test], len(training) < FEW_ROWS
    config, large = model.config.get_text_config(), model.num_parameters() >= LARGE
    half = large or model.config.dtype in (torch.float16, torch.bfloat16)
    shared = {"precision": "bfloat16" if half else "float32", "image_folder": str(data.root),
              "image_transform": reader.transform}
    longest = max(rows, key=lambda r: len(r.answer))
    answer = len(encoding.answer_tokens(reader, longest.prompt, longest.answer))
    answer = min(1024, max(32, 2 ** math.ceil(math.log2(1.5 * answer))))
    longest = max(rows, key=lambda r: sum(len(m["content"]) for m in r.prompt))
    prompt = encoding.encode(reader, encoding.prompt_text(reader, longest.prompt, image=True),
                             Image.new("RGB", max(data.largest, compared.largest, key=math.prod))
                             )["input_ids"].shape[1]
    counts = Counter(r.category for r in data.rows)
    given = any(r.given for r in training)
    steps = schedule(len(training) * (2 + given))
    return {
        "1_noise_probability": {
            **shared, "data": str(data.file), "rows": min(200, len(data.rows)),
            "category": next((c for c in ("attribute", "question") if counts[c] >= 20), ""),
            "max_new_tokens": min(64, answer)},
        "2_pair_generation": {
            **shared, "rows": len(training), "max_new_tokens": answer,
            "max_words": max(350, *(len(pieces(r.answer)) for r in training)),
            "sources": ["weakened", "injected", *(["given"] if given else [])],
            **(FEW if few else {})},
        "3_dpo_training": {
            **shared, "methods": ["sft", "sft_matched", "bpo"], "gradient_checkpointing": large,
            "save_every": 20 if few else 200, **steps,
            "max_tokens": min(max(2048, 512 * math.ceil((prompt + answer) / 512)),
                              getattr(config, "max_position_embeddings", None) or 2**17)},
        "4_qualitative_comparison": {
            **shared, "image_folder": str(compared.root), "max_new_tokens": answer,
            "rows": 500 if len(test) > 500 else 0}}


def schedule(pairs: int) -> dict[str, Any]:
    """Eight batches an epoch, of at most 32 pairs as in the paper; epochs for 40 steps, at most 10
    since few pairs would be learnt by heart; a higher learning rate below 1000 steps. So few rows
    a step come from several images: only a positive's are drawn together."""
    batch = 2 ** int(math.log2(min(32, max(2, pairs / 8))))
    epochs = min(10, max(2, math.ceil(40 * batch / pairs)))
    return {"batch_pairs": batch, "device_batch": min(4, batch), "share": "prompt",
            "epochs": float(epochs),
            "learning_rate": 2e-6 if epochs * pairs >= 1000 * batch else 2e-5}


def fit(model: Any, read: dict[str, params.Parameters]) -> float:
    """Halves the batches of notebooks 2 and 3 until they fit the GPU; returns its bytes."""
    gpu = torch.cuda.is_available()
    memory = torch.cuda.get_device_properties(0).total_memory if gpu else CARD
    for notebook, field, least, needed in (
            ("2_pair_generation", "batch_tokens", 2048, check.generation_bytes),
            ("3_dpo_training", "device_batch", 1, check.training_bytes)):
        while (size := getattr(read[notebook], field)) > least and (
                needed(model, read[notebook]) > 0.9 * memory):
            read[notebook] = read[notebook].model_copy(update={field: size // 2})
    return memory


def _write(folder: Path, read: dict[str, params.Parameters],
           files: dict[str, Iterable[dict] | None], *, truth: Path | None) -> None:
    """The study's folder, whole or not at all. files: name -> its lines, None for no file."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder.parent) as temporary:
        new = Path(temporary) / folder.name
        new.mkdir()
        for notebook, p in read.items():
            fields = type(p).model_fields
            write_whole(new / f"{notebook}.yaml", "".join(
                f"{n}: {_yaml(v)}  # {fields[n].description}\n"
                for n, v in p.model_dump(mode="json").items()))
        for name, lines in files.items():
            if lines is not None:
                write_lines(new / name, lines)
        if truth:
            shutil.copyfile(truth, new / truth.name)
        new.rename(folder)


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True
                          ).removesuffix("...\n").strip()


def _line(row: Row) -> dict[str, Any]:
    """The row in the layout of BPO's release, which holds all that a row has."""
    return {"id": row.id, "image": row.image_name, "prompt": list(row.prompt), "completions": [
        {"type": "gt", "response": row.answer},
        *({"type": "given", "response": text} for text in row.given)]}
