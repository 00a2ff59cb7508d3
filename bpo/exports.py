"""Pairs in the layouts that other tools load: TRL, the paper's release, LLaMA-Factory, ms-swift,
and flat parquet for hubs and notebooks. Lines are streamed, so memory does not grow with their
number. The files are in writers.py, the card in card.py; nothing here makes or judges a pair.
"""

import difflib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from bpo import card, runs
from bpo.card import Tally
from bpo.params import Refusal
from bpo.writers import WRITERS, Images

LAYOUTS = {
    "trl": "parquet with images inside, as TRL's DPOTrainer takes it",
    "bpo": "the JSON layout of the paper's release: a list of scored answers for each question",
    "llama-factory": "ShareGPT ranking JSON with its dataset_info.json, for LLaMA-Factory",
    "ms-swift": "JSON lines with rejected_response, for ms-swift's RLHF",
    "parquet": "flat parquet with images inside, for hubs and notebooks",
}
ALTERNATING = ("llama-factory", "ms-swift")  # these skip or refuse a row whose turns do not
UNPAIRED = ("bpo",)  # these have a place for a positive without a rejected answer
MEDIA_TAGS = ("<image>", "<video>", "<audio>")
TAGGED = "`<image>`, `<video>` or `<audio>`, where trainers put media"


def export(stage: Path, to: str, *, image_folder: Path) -> Path:
    """Writes the pairs of a complete notebook 2 into outputs/<study>/exports/<to>; returns that.

    stage: outputs/<study>/2_pair_generation.  to: a name of LAYOUTS.  image_folder: the folder that
    the pairs' image names start from. An older export of that name goes once the new one is whole.
    Raises Refusal when the layout is unknown, the stage is not complete or was edited, an image is
    missing or there is no pair to write.
    """
    if to not in LAYOUTS:
        near = difflib.get_close_matches(to, LAYOUTS, n=1)
        raise Refusal(f"{to}: there is no such export layout"
                      + (f" (did you mean {near[0]}?)" if near else "")
                      + f"; there is {', '.join(LAYOUTS)}")
    stage = stage.resolve()
    study = stage.parent
    if not (stage / runs.MANIFEST).is_file():
        raise Refusal(f"{stage} is not complete: make the pairs first (python -m bpo run "
                      f"{study.name} --only 2)")
    folder = study / "exports" / to
    work = folder.with_name(f".{to}.tmp")
    with runs.locked(study / ".stage.lock", f"study {study.name} is being computed or exported by "
                     "another run; wait for it to end"):
        runs.fingerprint(stage / "pairs.jsonl")  # refuses pairs that were edited
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            _write(stage, to, image_folder, work)
            _replace(folder, work)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def _write(stage: Path, to: str, image_folder: Path, work: Path) -> None:
    file, tally = stage / "pairs.jsonl", Tally()
    WRITERS[to](usable(read_lines(file), tally, to=to), Images(image_folder, work), work)
    if not tally.pairs:
        reasons = "; ".join(f"{r}: {n}" for r, n in sorted(tally.left_out.items()))
        raise Refusal(f"{file}: there is no pair to export ({reasons or 'the file is empty'}); "
                      "change the parameters of notebook 2 and run it again")
    manifest = json.loads((stage / runs.MANIFEST).read_text(encoding="utf-8"))
    hashes = {f.name: file_hash(f) for f in sorted(work.iterdir()) if f.is_file()}
    text = card.write(manifest, tally, study=stage.parent.name, layout=to, about=LAYOUTS[to],
                      hashes=hashes)
    (work / "README.md").write_text(text, encoding="utf-8")


def _replace(folder: Path, work: Path) -> None:
    os.sync()  # the new export is on the disk, all of it, before the old one goes
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    work.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def file_hash(file: Path) -> str:
    """sha256 of all of a file, as sha256sum prints it."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_lines(file: Path) -> Iterator[dict]:
    """The lines of a pairs.jsonl one at a time; raises Refusal at the first that is none."""
    with file.open(encoding="utf-8") as stream:
        for number, text in enumerate(stream, start=1):
            try:
                line = json.loads(text)
                known = {"id", "image", "category", "prompt", "chosen", "rejected"} <= line.keys()
            except (ValueError, AttributeError):
                known = False
            if not known:
                raise Refusal(f"{file}: line {number} does not hold id, image, category, prompt, "
                              "chosen and rejected; run notebook 2 again")
            yield line


def usable(lines: Iterable[dict], tally: Tally, *, to: str) -> Iterator[dict]:
    """The lines with the rejected answers that a layout can hold; the tally counts them all."""
    for line in lines:
        tally.positives += 1
        reason, rejected = None, []
        if any(map(_tagged, (line["chosen"], *(m["content"] for m in line["prompt"])))):
            reason = f"positives whose text has {TAGGED}"
        elif to in ALTERNATING and not alternates(line["prompt"]):
            reason = "positives whose turns do not alternate"
        else:
            for answer in line["rejected"]:
                if _tagged(answer["text"]):
                    tally.left_out[f"rejected answers that have {TAGGED}"] += 1
                elif answer["text"] == line["chosen"]:
                    tally.left_out["rejected answers that equal the chosen one"] += 1
                else:
                    rejected.append(answer)
            if not rejected and to not in UNPAIRED:
                reason = "positives without a rejected answer"
        if reason:
            tally.left_out[reason] += 1
            continue
        tally.take({**line, "rejected": rejected})
        yield {**line, "rejected": rejected}


def _tagged(text: str) -> bool:
    return any(tag in text for tag in MEDIA_TAGS)


def alternates(prompt: list[dict[str, str]]) -> bool:
    """Whether user and assistant take turns, the user first and last and nobody silent, after at
    most one system message."""
    turns = prompt[1:] if prompt and prompt[0]["role"] == "system" else prompt
    return len(turns) % 2 == 1 and all(
        m["role"] == ("assistant" if number % 2 else "user") and m["content"].strip()
        for number, m in enumerate(turns))
