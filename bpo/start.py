"""A study of the user's own model and pictures: its parameter files, decided from what is there.

No weight is loaded. The checkpoint's config and processor are read, every row of the data is read
as notebook 2 reads it, pictures are opened, and what was found and decided is told before anything
runs. Where no held-out rows are given, some pictures are held out of the training with all their
rows, since answers about a picture that was trained on say nothing of new ones.
"""

import argparse
import functools
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from PIL import Image
from tqdm import tqdm
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from bpo import encoding, entries, images, layouts, models, params, readers, records, sizes
from bpo.params import Refusal, short
from bpo.records import Rejected, Row
from bpo.seeds import seed_for

TRAINING, HELD_OUT, REJECTED = "training.jsonl", "held_out.jsonl", "rejected_rows.jsonl"
SEED = 0
HELD_SHARE, HELD_LEAST, HELD_MOST = 0.2, 2, 500  # of the pictures
OPENED = 2000  # pictures that are opened, drawn by seed; notebook 2 opens all
NAMED = 5  # bad rows that are named on the screen
FEW_ROWS = 1000  # below it a row gets several candidates, so that one is likely to be of use
FEW_STEPS, LEAST_STEPS = 1000, 40
TOY, LARGE = 1e8, 1e9  # weights
CARD = 80e9  # bytes, where no GPU is seen
# The studies of real models have the paper's settings, those of a toy are the tiny study's.
PAPER = {"lora_rank": 32, "lora_alpha": 256, "lora_dropout": 0.05}
TINY = {"lora_rank": 16, "lora_alpha": 32, "lora_dropout": 0.0, "learning_rate": 2e-3}


@dataclass(frozen=True)
class Model:
    """A checkpoint, its weights not loaded. reader: what `encoding` asks of it, without a model."""

    folder: Path
    name: str
    shape: sizes.Shape
    precision: str
    positions: int  # tokens that it can tell the order of
    reader: models.Checkpoint


@dataclass(frozen=True)
class Data:
    """What a data set holds.

    root: the folder that image names start from, resolved.
    rows: (where its entry stands, number of its picture, category) of each row that can be used.
    pictures: what tells each picture from others, by number: a hash of its bytes, its name where
    there are too many to open.  opened: how many were.  sizes: (width, height) of those.
    longest: the row with the longest prompt and the one with the longest answer.
    """

    file: Path
    root: Path
    layout: str
    rows: list[tuple[str, int, str]]
    rejected: list[Rejected]
    pictures: dict[int, str]
    opened: int
    sizes: set[tuple[int, int]]
    example: Row
    longest: tuple[Row, Row]
    given: bool

    @property
    def distinct(self) -> set[str]:
        return set(self.pictures.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="the study's name, which becomes a folder of params/")
    parser.add_argument("--model", type=Path, required=True, metavar="PATH",
                        help="folder of a vision-language checkpoint in Hugging Face layout")
    parser.add_argument("--data", type=Path, required=True, metavar="PATH",
                        help="annotated answers, in any layout that the README names")
    parser.add_argument("--image-folder", type=Path, metavar="PATH",
                        help="folder that image names start from (default: the data's own)")
    parser.add_argument("--held-out", type=Path, metavar="PATH",
                        help="annotated answers to compare on (default: a fifth of the pictures)")


def run(options: argparse.Namespace) -> int:
    said = make(options.name, options.model, options.data, image_folder=options.image_folder,
                held_out=options.held_out)
    print(*said, f"python -m bpo check {options.name}:", sep="\n", flush=True)
    code = subprocess.run([sys.executable, "-m", "bpo", "check", options.name],
                          cwd=params.ROOT).returncode
    if not code:
        print(f"next: python -m bpo run {options.name}")
    return code


def make(name: str, checkpoint: Path, rows: Path, *, image_folder: Path | None = None,
         held_out: Path | None = None) -> list[str]:
    """Writes a study's folder, whole; what was found and decided, in lines for people.

    Raises Refusal where there is such a study, or no working one can be made of what was given.
    """
    folder = _new_folder(name)
    model = look_at_model(checkpoint.resolve())
    top = image_folder.resolve() if image_folder else None
    data = look_at_data(rows.resolve(), top)
    given = look_at_held_out(held_out.resolve(), top) if held_out else None
    held = set() if given else _held_out(data)
    if given and not data.distinct - given.distinct:
        raise Refusal(f"{given.file}: every picture of {data.file} is in it too, so nothing would "
                      "be held out; give other rows, or leave --held-out away")
    values = decide(name, folder, model, data, given, held)
    said = [*_told_model(model), *_told_data("data", data),
            *(_told_data("held out", given) if given else []),
            *_told_decisions(folder, data, given, held, values, model)]
    _write(folder, data, given, held, values)
    return [*said, f"written   {short(folder)}"]


def _new_folder(name: str) -> Path:
    """The folder of a study that there is nothing of yet; raises Refusal."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise Refusal(f"{name!r}: a study's name is that of a folder: letters, digits, dots, - and "
                      "_, with a letter or a digit first")
    folder = params.params_root() / name
    for there in (folder, params.outputs_root() / name):
        if there.exists():
            raise Refusal(f"{short(there)} is there already; choose another name, or delete it")
    return folder


def look_at_model(folder: Path) -> Model:
    """Raises Refusal where the folder is not a checkpoint that `models.load` could load."""
    config = _config(folder)
    kind = config.get("model_type")
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise Refusal(f"{folder}: model_type is {kind!r}, " + (
            "which needs the checkpoint's own code, and such code is never run here"
            if "auto_map" in config else "which is not a vision-language model that transformers "
            f"{transformers.__version__} knows") + "; give another checkpoint")
    _check_weights(folder)
    shape = sizes.shape(folder)
    try:
        processor = models.load_processor(folder)
    except (OSError, ValueError) as error:
        raise Refusal(f"{folder}: the processor cannot be read: {str(error).splitlines()[0]}; get "
                      "the checkpoint's other files too") from None
    lost = next((what for what, there in (
        ("image processor (preprocessor_config.json)", hasattr(processor, "image_processor")),
        ("chat template", getattr(processor, "chat_template", None))) if not there), None)
    if lost:
        raise Refusal(f"{folder}: the checkpoint has no {lost}; get it whole, or one that has it")
    loaded = transformers.AutoConfig.from_pretrained(folder)
    half = loaded.dtype in (torch.float16, torch.bfloat16) or shape.parameters >= LARGE
    transform = "pad" if kind == "llava" else "processor"
    return Model(folder, ", ".join(config.get("architectures") or [kind]), shape,
                 "bfloat16" if half else "float32",
                 getattr(loaded.get_text_config(), "max_position_embeddings", None) or 2**17,
                 models.Checkpoint(None, processor, transform))


def _config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise Refusal(f"{folder}: there is no such folder; --model is the folder that a checkpoint "
                      "was downloaded into")
    file = folder / "config.json"
    if not file.is_file():
        raise Refusal(f"{folder}: holds no config.json, so it is no checkpoint" + (
            " but an adapter; merge it into its model first"
            if (folder / "adapter_config.json").is_file() else "; give the folder that has one"))
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise Refusal(f"{file}: is not a JSON object; get the checkpoint again")
    return config


def _check_weights(folder: Path) -> None:
    """Raises Refusal where the weights are not whole safetensors files; reads their headers."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [folder / name for name in sorted(named)]
    if not files:
        other = next((f.name for p in ("*.bin", "*.pt", "*.pth") for f in folder.glob(p)), None)
        raise Refusal(f"{folder}: holds no weights as safetensors"
                      + (f", only {other}, which can run code when it is read" if other else "")
                      + "; get the safetensors files of this checkpoint")
    for file in files:
        try:
            with safetensors.safe_open(file, "pt"):
                pass
        except (safetensors.SafetensorError, OSError):
            raise Refusal(f"{file}: the weights are missing, cut off or a pointer to them; get "
                          "this file again") from None


def look_at_data(file: Path, image_folder: Path | None) -> Data:
    """The rows of a data set and its pictures, up to OPENED of them opened.

    Raises Refusal when the data cannot be read or none of its rows can be used.
    """
    root = readers.image_root(file, image_folder)
    layout = readers.layout(file)
    rows, rejected, numbers, names = [], [], {}, []
    firsts: list[Row] = []
    longest = None
    given = False
    for where, row in tqdm(readers.located(file, root), desc="reading rows", unit=" rows",
                           leave=False, disable=None):
        if isinstance(row, Rejected):
            rejected.append(row)
            continue
        if row.image not in numbers:
            numbers[row.image] = len(names)
            names.append(row.image_name)
            firsts += [row] if len(firsts) < OPENED else []
        longest = longest or (row, row)
        longest = (max(longest[0], row, key=_prompt_length),
                   max(longest[1], row, key=lambda r: len(r.answer)))
        given |= bool(row.given)
        rows.append((where, numbers[row.image], row.category, row.id))
    some = sorted(numbers, key=lambda f: seed_for(SEED, "opened", names[numbers[f]]))[:OPENED]
    files = sorted(some, key=numbers.get)
    problems = {numbers[f]: reason for f, reason in zip(files, tqdm(
        images.problems(files), total=len(files), desc="opening pictures", leave=False,
                                 disable=None), strict=True) if reason}
    rejected += [Rejected(name, where, problems[n]) for where, n, _, name in rows if n in problems]
    rows = [(where, n, category) for where, n, category, _ in rows if n not in problems]
    if not rows:
        raise Refusal(f"{file}: none of its {len(rejected)} rows can be used: {_reasons(rejected)}"
                      f"; image names start from {root}, give --image-folder if that is wrong")
    opened = [f for f in files if numbers[f] not in problems]
    whole = len(files) == len(numbers)
    return Data(file, root, layout, rows, rejected,
                {n: _digest(f) if whole else names[n] for f, n in numbers.items()
                 if n not in problems},
                len(opened), {_size(f) for f in opened},
                next((r for r in firsts if numbers[r.image] not in problems), firsts[0]),
                longest, given)


def look_at_held_out(file: Path, image_folder: Path | None) -> Data:
    """As `look_at_data`; held-out pictures may lie below the image folder or beside their rows."""
    try:
        return look_at_data(file, image_folder)
    except Refusal:
        if image_folder is None:
            raise
    return look_at_data(file, None)


def _prompt_length(row: Row) -> int:
    return sum(len(m["content"]) for m in row.prompt)


def _digest(file: Path) -> str:
    source = images.source(file)
    data = source.read_bytes() if isinstance(source, Path) else source.read()
    return hashlib.sha256(data).hexdigest()


def _size(file: Path) -> tuple[int, int]:
    with Image.open(images.source(file), formats=images.FORMATS) as image:
        return image.size


def _reasons(rejected: Sequence[Rejected]) -> str:
    return readers.told(Counter(r.reason for r in rejected))


def _held_out(data: Data) -> set[int]:
    """The numbers of the pictures that are held out; the same bytes under two names are one."""
    count, least = len(data.distinct), 2 * HELD_LEAST
    if count < least:
        bad = f" ({len(data.rejected)} rows cannot be used: {_reasons(data.rejected)})"
        raise Refusal(f"{data.file}: {_n(count, 'picture')} can be used, and {least} are needed, "
                      f"{HELD_LEAST} of them held out{bad if data.rejected else ''}; add pictures, "
                      "or give held-out rows with --held-out")
    wanted = min(HELD_MOST, max(HELD_LEAST, round(HELD_SHARE * count)))
    drawn = set(sorted(data.distinct, key=lambda x: seed_for(SEED, "held out", x))[:wanted])
    return {n for n, picture in data.pictures.items() if picture in drawn}


def decide(name: str, folder: Path, model: Model, data: Data, given: Data | None, held: set[int]
           ) -> dict[str, dict[str, Any]]:
    """notebook -> its parameters, all of them, as plain values."""
    path = functools.partial(_named, study=name)
    root = path(data.root)
    compared = given or data
    training = [r for r in data.rows if r[1] not in held]
    asked = given.rows if given else [r for r in data.rows if r[1] in held]
    few, large = len(training) < FEW_ROWS, model.shape.parameters >= LARGE
    sources = ["weakened", "injected", *(["given"] if data.given else [])]
    steps = _steps(len(training) * len(sources))
    longest = max(_answer_tokens(model, d) for d in (data, compared))
    new_tokens = min(1024, max(32, 2 ** math.ceil(math.log2(1.5 * longest))))
    most = 512 * math.ceil((max(_prompt_tokens(model, d) for d in (data, compared))
                            + new_tokens) / 512)
    train = {
        "pairs": "outputs/{study}/2_pair_generation/pairs.jsonl", "image_folder": root,
        "methods": ["sft", "sft_matched", "bpo"], "steps": 0, **steps, "loss": ["sigmoid"],
        "loss_weights": [1.0], "max_tokens": min(max(2048, most), model.positions),
        "gradient_checkpointing": large, "save_every": 20 if few else 200,
        **(TINY if model.shape.parameters < TOY else PAPER | {
            "learning_rate": 2e-5 if _count(steps, training, sources) < FEW_STEPS else 2e-6})}
    train["device_batch"] = _device_batch(model, train, answers=new_tokens)
    values = {
        "1_noise_probability": {
            "data": path(data.file), "image_folder": root, "rows": min(200, len(data.rows)),
            "category": _probed(data), "sampled_answers": 20,
            "max_new_tokens": min(64, new_tokens), "batch_size": 8},
        "2_pair_generation": {
            "data": path(data.file if given else folder / TRAINING), "image_folder": root,
            "rows": len(training), "max_words": max(350, len(data.longest[1].answer.split())),
            "max_bad_share": 1.0 if given and len(data.rejected) > len(data.rows) else 0.5,
            "sources": sources, "weaken_steps": [900], "weaken_samples": 4 if few else 1,
            "weaken_temperature": 1.0 if few else 0.2, "text_model": "",
            "describe_prompt": "bpo/prompts/describe.txt",
            "question_prompt": "bpo/prompts/question.txt", "inject_samples": 4 if few else 1,
            "max_new_tokens": new_tokens, "batch_tokens": _batch_tokens(model),
            "score_candidates": few},
        "3_dpo_training": train,
        "4_qualitative_comparison": {
            "adapters": "outputs/{study}/3_dpo_training",
            "splits": {"held_out": path(given.file if given else folder / HELD_OUT)},
            "image_folder": path(compared.root), "rows": HELD_MOST if len(asked) > HELD_MOST else 0,
            "max_new_tokens": new_tokens, "batch_size": 16}}
    shared = {"study": name, "seed": SEED, "model": path(model.folder),
              "precision": model.precision, "image_transform": model.reader.transform}
    return {n: params.validate(params.SCHEMAS[n], shared | own, where=f"params/{name}").model_dump(
        mode="json") for n, own in values.items()}


def _named(path: Path, *, study: str) -> str:
    """A path as a parameter that finds it from anywhere: from the project's root, if it is in
    there. What lies below outputs/ is named whole, since BPO_OUTPUTS moves that name."""
    inside = path.is_relative_to(params.ROOT) and not path.is_relative_to(params.ROOT / "outputs")
    text = str(path.relative_to(params.ROOT) if inside else path)
    if params.resolve(text, study=study) != path:
        raise Refusal(f"{path}: {{study}} in a path stands for the study's name; rename the folder")
    return text


def _steps(pairs: int) -> dict[str, Any]:
    """Batches of which an epoch has eight, up to the paper's 32, and epochs enough for some steps;
    of few pairs not so many that they are learnt by heart."""
    batch = 2 ** int(math.log2(min(32, max(2, pairs / 8))))
    return {"batch_pairs": batch,
            "epochs": float(min(10, max(2, math.ceil(LEAST_STEPS * batch / pairs))))}


def _count(steps: dict[str, Any], rows: Sequence[Any], sources: Sequence[str]) -> int:
    """Optimizer steps if every row gets a pair of each source."""
    return math.ceil(steps["epochs"] * len(rows) * len(sources) / steps["batch_pairs"])


def _probed(data: Data) -> str:
    """The category whose answers notebook 1 weighs: short ones, where there are enough."""
    found = Counter(category for *_, category in data.rows)
    return next((c for c in ("attribute", "question") if found[c] >= 20), "")


def _card() -> float:
    """Bytes of the GPU's memory that may be planned with."""
    there = torch.cuda.is_available()
    return 0.9 * (torch.cuda.get_device_properties(0).total_memory if there else CARD)


def _batch_tokens(model: Model) -> int:
    fits = (n for n in (32768, 16384, 8192, 4096)
            if sizes.generation_bytes(model.shape, model.precision, tokens=n) < _card())
    return next(fits, 2048)


def _device_batch(model: Model, train: dict[str, Any], *, answers: int) -> int:
    fits = (n for n in (4, 2) if n <= train["batch_pairs"] and sizes.training_bytes(
        model.shape, model.precision, rank=train["lora_rank"], sequences=2 * n,
        tokens=train["max_tokens"], answers=answers,
        checkpointing=train["gradient_checkpointing"]) < _card())
    return next(fits, 1)


def _answer_tokens(model: Model, data: Data) -> int:
    row = data.longest[1]
    return len(encoding.answer_tokens(model.reader, row.prompt, row.answer))


def _prompt_tokens(model: Model, data: Data, *, text: bool = True) -> int:
    """Tokens of the longest prompt with the largest picture, or (text False) of the picture."""
    prompt = encoding.prompt_text(model.reader, data.longest[0].prompt, image=True)
    largest = Image.new("RGB", max(data.sizes, key=math.prod))
    whole = encoding.encode(model.reader, prompt, largest)["input_ids"].shape[1]
    # One placeholder stands in the text already.
    return whole if text else whole - len(encoding.answer_ids(model.reader, prompt)) + 1


def _told_model(model: Model) -> list[str]:
    weights = model.shape.parameters
    count = f"{weights / 1e9:.2f} billion" if weights >= LARGE else f"{weights / 1e6:.1f} million"
    return [f"model     {short(model.folder)}: {model.name}, {count} weights, safetensors; "
            f"precision {model.precision}, image_transform {model.reader.transform}"]


def _told_data(title: str, data: Data) -> list[str]:
    total = len(data.rows) + len(data.rejected)
    found = Counter(category for *_, category in data.rows)
    wide, high = zip(*data.sizes, strict=True)
    looked = f"{data.opened:,} opened" if data.opened < len(data.pictures) else "all opened"
    said = [
        f"{title:10}{short(data.file)}: {len(data.rows):,} of {_n(total, 'row')} can be used, "
        f"about {_n(len(data.distinct), 'picture')} ({looked}, {min(wide)} to {max(wide)} pixels "
        f"wide, {min(high)} to {max(high)} high)",
        f"          layout {data.layout}: {layouts.LAYOUTS[data.layout].shape}",
        "          categories: " + ", ".join(f"{n:,} {c}" for c, n in found.most_common()),
        f"          for instance {data.example.image_name}: {_cut(data.example.question)!r} "
        f"answered {_cut(data.example.answer)!r}"]
    if data.rejected:
        said += [f"          {_n(len(data.rejected), 'row')} left out: {_reasons(data.rejected)}",
                 *(f"            {r.where}: {r.reason}" for r in data.rejected[:NAMED]),
                 *(["            ..."] if len(data.rejected) > NAMED else [])]
    return said


def _told_decisions(folder: Path, data: Data, given: Data | None, held: set[int],
                    values: dict[str, dict[str, Any]], model: Model) -> list[str]:
    made, train = values["2_pair_generation"], values["3_dpo_training"]
    said = []
    if given:
        both = len(data.distinct & given.distinct)
        if both:
            said = [f"beware    {both:,} of {len(given.distinct):,} held-out pictures are in the "
                    "training data too: answers about those say nothing of new pictures"]
    else:
        out = len({data.pictures[n] for n in held})
        said = [f"split     by picture, drawn by seed {SEED}: "
                f"{_n(len(data.distinct) - out, 'picture')} ({_n(made['rows'], 'row')}) to train "
                f"on, {_n(out, 'picture')} ({_n(len(data.rows) - made['rows'], 'row')}) held out; "
                f"written to {TRAINING} and {HELD_OUT} of {short(folder)}"]
    out = len(given.distinct) if given else out
    if out < 30:
        said.append(f"beware    with {_n(out, 'held-out picture')} look at the answers: intervals "
                    "and differences mean little")
    count = _count(train, range(made["rows"]), made["sources"])
    tokens = max(_prompt_tokens(model, d, text=False) for d in (data, given or data))
    said.append(f"decided   answers of up to {made['max_new_tokens']} tokens, {tokens:,} tokens "
                f"for the largest picture; {train['batch_pairs']} pairs a step, at most "
                f"{_n(count, 'step')} in {train['epochs']:.0f} epochs, learning rate "
                f"{train['learning_rate']:.0e}")
    if not torch.cuda.is_available() and model.shape.parameters >= TOY:
        said.append(f"          no GPU is seen here: device_batch and batch_tokens are for one of "
                    f"{CARD / 1e9:.0f} GB")
    return [*said, "          no 5_benchmarks.yaml, since benchmarks need their official files: "
            "copy one of another study and set its folders, if you have them"]


def _n(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'s' * (count != 1)}"


def _cut(text: str) -> str:
    return textwrap.shorten(text, 80, placeholder=" ...")


def _write(folder: Path, data: Data, given: Data | None, held: set[int],
           values: dict[str, dict[str, Any]]) -> None:
    """The study's folder, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder.parent) as temporary:
        new = Path(temporary) / folder.name
        new.mkdir()
        for notebook, own in values.items():
            records.write_whole(new / f"{notebook}.yaml", _yaml(notebook, own))
        if not given:
            _write_split(new, data, held)
        if data.rejected:
            records.write_lines(new / REJECTED, (
                {"id": r.id, "where": r.where, "reason": r.reason} for r in data.rejected))
        try:
            new.rename(folder)
        except OSError:
            raise Refusal(f"{short(folder)} was made meanwhile; choose another name") from None


def _yaml(notebook: str, values: dict[str, Any]) -> str:
    fields = params.SCHEMAS[notebook].model_fields
    lines = [f"# Your own model and data, as bpo new decided — notebooks/{notebook}.ipynb"]
    for name, value in values.items():
        text = records.to_json(value)
        if isinstance(value, float) and "." not in text:
            text = text.replace("e", ".0e")  # YAML 1.1 reads 2e-06 as text
        lines.append(f"{name}: {text}  # {fields[name].description}")
    return "\n".join(lines) + "\n"


def _write_split(folder: Path, data: Data, held: set[int]) -> None:
    """The entries that rows are made of, as JSON lines with the ids that they have in the data, and
    the truth file, which lies beside them there."""
    pictures = {where: number for where, number, _ in data.rows}
    form = layouts.LAYOUTS[data.layout]
    with (records.whole(folder / TRAINING) as training,
          records.whole(folder / HELD_OUT) as held_out):
        for number, (where, entry) in enumerate(entries.read(data.file, data.root)):
            if where in pictures:
                entry = form.plain(entry)
                line = {n: entry[n] for n in entries.COLUMNS if n in entry}
                line["id"] = layouts.entry_id(entry, number)
                # Half a surrogate pair, which JSON can spell and UTF-8 cannot, becomes "?".
                text = json.dumps(line, ensure_ascii=False, default=str).encode(errors="replace")
                (held_out if pictures[where] in held else training).write(f"{text.decode()}\n")
    if truth := records.truth_file(data.file):
        shutil.copyfile(truth, folder / truth.name)
