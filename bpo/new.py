"""A study of the user's own model and pictures: its parameter files, decided from what is there.

What was found and decided is told before anything runs. Where no held-out rows are given, some
pictures are held out of the training with all their rows, since answers about a picture that was
trained on say nothing of new ones.
"""

import argparse
import functools
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bpo import check, params, survey
from bpo.data import files as entries
from bpo.data import layouts
from bpo.data import rows as data_rows
from bpo.params import DPOTraining, PairGeneration, Refusal, short
from bpo.study.files import to_json, whole, write_lines, write_whole
from bpo.study.seeds import seed_for
from bpo.survey import Data, Model, counted

TRAINING, HELD_OUT, REJECTED = "training.jsonl", "held_out.jsonl", "rejected_rows.jsonl"
HELD_SHARE, HELD_LEAST, HELD_MOST = 0.2, 2, 500  # of the pictures
FEW_ROWS = 1000  # below it a row gets several candidates, so that one is likely to be of use
FEW_STEPS, LEAST_STEPS = 1000, 40
TOY = 1e8  # weights
CARD = 80e9  # bytes, where no GPU is seen
# The studies of real models have the paper's settings, those of a toy are the tiny study's.
PAPER = {"lora_rank": 32, "lora_alpha": 256, "lora_dropout": 0.05}
TINY = {"lora_rank": 16, "lora_alpha": 32, "lora_dropout": 0.0, "learning_rate": 2e-3}


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
    model = survey.look_at_model(checkpoint.resolve())
    top = image_folder.resolve() if image_folder else None
    data = survey.look_at_data(rows.resolve(), top)
    given = survey.look_at_held_out(held_out.resolve(), top) if held_out else None
    held = set() if given else _held_out(data)
    if given and not data.distinct - given.distinct:
        raise Refusal(f"{given.file}: every picture of {data.file} is in it too, so nothing would "
                      "be held out; give other rows, or leave --held-out away")
    values = decide(name, folder, model, data, given, held)
    said = [*survey.told_model(model), *survey.told_data("data", data),
            *(survey.told_data("held out", given) if given else []),
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


def _held_out(data: Data) -> set[int]:
    """The numbers of the pictures that are held out; the same bytes under two names are one."""
    count, least = len(data.distinct), 2 * HELD_LEAST
    if count < least:
        bad = f" ({len(data.rejected)} rows cannot be used: {survey.reasons(data.rejected)})"
        raise Refusal(f"{data.file}: {counted(count, 'picture')} can be used, and {least} are "
                      f"needed, {HELD_LEAST} of them held out{bad if data.rejected else ''}; add "
                      "pictures, or give held-out rows with --held-out")
    wanted = min(HELD_MOST, max(HELD_LEAST, round(HELD_SHARE * count)))
    drawn = set(sorted(data.distinct, key=lambda x: seed_for(survey.SEED, "held out", x))[:wanted])
    return {n for n, picture in data.pictures.items() if picture in drawn}


def decide(name: str, folder: Path, model: Model, data: Data, given: Data | None, held: set[int]
           ) -> dict[str, dict[str, Any]]:
    """notebook -> its parameters, all of them, as plain values."""
    path = functools.partial(_named, study=name)
    root = path(data.root)
    compared = given or data
    training = [r for r in data.rows if r[1] not in held]
    asked = given.rows if given else [r for r in data.rows if r[1] in held]
    few, large = len(training) < FEW_ROWS, model.weights >= survey.LARGE
    sources = ["weakened", "injected", *(["given"] if data.given else [])]
    steps = _steps(len(training) * len(sources))
    longest = max(survey.answer_tokens(model, d) for d in (data, compared))
    new_tokens = min(1024, max(32, 2 ** math.ceil(math.log2(1.5 * longest))))
    most = 512 * math.ceil((max(survey.prompt_tokens(model, d) for d in (data, compared))
                            + new_tokens) / 512)
    train = {
        "pairs": "outputs/{study}/2_pair_generation/pairs.jsonl", "image_folder": root,
        "methods": ["sft", "sft_matched", "bpo"], "steps": 0, **steps, "loss": ["sigmoid"],
        "loss_weights": [1.0], "max_tokens": min(max(2048, most), model.positions),
        "gradient_checkpointing": large, "save_every": 20 if few else 200,
        **(TINY if model.weights < TOY else PAPER | {
            "learning_rate": 2e-5 if _count(steps, training, sources) < FEW_STEPS else 2e-6})}
    train["device_batch"] = _device_batch(model, train)
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
            "describe_prompt": "bpo/pairs/prompts/describe.txt",
            "question_prompt": "bpo/pairs/prompts/question.txt", "inject_samples": 4 if few else 1,
            "max_new_tokens": new_tokens, "batch_tokens": _batch_tokens(model),
            "score_candidates": few},
        "3_dpo_training": train,
        "4_qualitative_comparison": {
            "adapters": "outputs/{study}/3_dpo_training",
            "splits": {"held_out": path(given.file if given else folder / HELD_OUT)},
            "image_folder": path(compared.root), "rows": HELD_MOST if len(asked) > HELD_MOST else 0,
            "max_new_tokens": new_tokens, "batch_size": 16}}
    shared = {"study": name, "seed": survey.SEED, "model": path(model.folder),
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
    fits = (n for n in (32768, 16384, 8192, 4096) if check.generation_bytes(
        model.skeleton, PairGeneration(precision=model.precision, batch_tokens=n)) < _card())
    return next(fits, 2048)


def _device_batch(model: Model, train: dict[str, Any]) -> int:
    named = {n: train[n] for n in ("lora_rank", "max_tokens", "gradient_checkpointing")}
    fits = (n for n in (4, 2) if n <= train["batch_pairs"] and check.training_bytes(
        model.skeleton, DPOTraining(precision=model.precision, batch_pairs=n, device_batch=n,
                                    **named)) < _card())
    return next(fits, 1)


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
        trained, rest = made["rows"], len(data.rows) - made["rows"]
        said = [f"split     by picture, drawn by seed {survey.SEED}: "
                f"{counted(len(data.distinct) - out, 'picture')} ({counted(trained, 'row')}) to "
                f"train on, {counted(out, 'picture')} ({counted(rest, 'row')}) held out; written "
                f"to {TRAINING} and {HELD_OUT} of {short(folder)}"]
    out = len(given.distinct) if given else out
    if out < 30:
        said.append(f"beware    with {counted(out, 'held-out picture')} look at the answers: "
                    "intervals and differences mean little")
    count = _count(train, range(made["rows"]), made["sources"])
    tokens = max(survey.prompt_tokens(model, d, text=False) for d in (data, given or data))
    said.append(f"decided   answers of up to {made['max_new_tokens']} tokens, {tokens:,} tokens "
                f"for the largest picture; {train['batch_pairs']} pairs a step, at most "
                f"{counted(count, 'step')} in {train['epochs']:.0f} epochs, learning rate "
                f"{train['learning_rate']:.0e}")
    if not torch.cuda.is_available() and model.weights >= TOY:
        said.append(f"          no GPU is seen here: device_batch and batch_tokens are for one of "
                    f"{CARD / 1e9:.0f} GB")
    return [*said, "          no 5_benchmarks.yaml, since benchmarks need their official files: "
            "copy one of another study and set its folders, if you have them"]


def _write(folder: Path, data: Data, given: Data | None, held: set[int],
           values: dict[str, dict[str, Any]]) -> None:
    """The study's folder, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder.parent) as temporary:
        new = Path(temporary) / folder.name
        new.mkdir()
        for notebook, own in values.items():
            write_whole(new / f"{notebook}.yaml", _yaml(notebook, own))
        if not given:
            _write_split(new, data, held)
        if data.rejected:
            write_lines(new / REJECTED, (
                {"id": r.id, "where": r.where, "reason": r.reason} for r in data.rejected))
        try:
            new.rename(folder)
        except OSError:
            raise Refusal(f"{short(folder)} was made meanwhile; choose another name") from None


def _yaml(notebook: str, values: dict[str, Any]) -> str:
    fields = params.SCHEMAS[notebook].model_fields
    lines = [f"# Your own model and data, as bpo new decided — notebooks/{notebook}.ipynb"]
    for name, value in values.items():
        text = to_json(value)
        if isinstance(value, float) and "." not in text:
            text = text.replace("e", ".0e")  # YAML 1.1 reads 2e-06 as text
        lines.append(f"{name}: {text}  # {fields[name].description}")
    return "\n".join(lines) + "\n"


def _write_split(folder: Path, data: Data, held: set[int]) -> None:
    """The entries that rows are made of, as JSON lines with the ids that they have in the data, and
    the truth file, which lies beside them there."""
    pictures = {where: number for where, number, _ in data.rows}
    form = layouts.LAYOUTS[data.layout]
    with (whole(folder / TRAINING) as training,
          whole(folder / HELD_OUT) as held_out):
        for number, (where, entry) in enumerate(entries.read(data.file, data.root)):
            if where in pictures:
                entry = form.plain(entry)
                line = {n: entry[n] for n in entries.COLUMNS if n in entry}
                line["id"] = layouts.entry_id(entry, number)
                # Half a surrogate pair, which JSON can spell and UTF-8 cannot, becomes "?".
                text = json.dumps(line, ensure_ascii=False, default=str).encode(errors="replace")
                (held_out if pictures[where] in held else training).write(f"{text.decode()}\n")
    if truth := data_rows.truth_file(data.file):
        shutil.copyfile(truth, folder / truth.name)
