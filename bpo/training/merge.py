"""What a method of notebook 3 learnt, as a plain checkpoint that loads as any other: the model with
its adapter merged in.
"""

import argparse
import json
from pathlib import Path

from bpo.models import checkpoint as checkpoints
from bpo.params import DPOTraining, Refusal, outputs_root, short
from bpo.study import sources
from bpo.study import stage as stages
from bpo.study.files import to_json, write_whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study")
    parser.add_argument("--method", required=True, help="a method that notebook 3 trained")
    parser.add_argument("--to", type=Path, metavar="FOLDER",
                        help="default: outputs/STUDY/merged/METHOD")


def run(options: argparse.Namespace) -> int:
    folder = write(options.study, method=options.method, to=options.to)
    print(f"the merged checkpoint is {short(folder)}")
    return 0


def write(study: str, *, method: str, to: Path | None = None) -> Path:
    """Writes the merged checkpoint of a finished training, by default into
    outputs/<study>/merged/<method>/, over that of an earlier training; its folder.

    Model and number format are those that notebook 3's manifest names, so that a study of another
    name or a second round merges alike. Raises Refusal when nothing was trained, the method is not
    among what was, the model or the adapter changed since, or the folder holds other things.
    """
    stage = stages.stage_folder(study, DPOTraining.notebook)
    if not (stage / stages.MANIFEST).is_file():
        raise Refusal(f"{stage}: no training has finished here; python -m bpo run {study}")
    manifest = stages.read_manifest(stage)
    if method not in manifest["metrics"]["methods"]:
        raise Refusal(f"{stage}: no method {method} was trained here; there is "
                      + ", ".join(manifest["metrics"]["methods"]))
    p = DPOTraining(study=study, **manifest["parameters"])
    base, adapter = p.path(p.model), stage / method / "adapter"
    made_of = {"study": study, "method": method, "precision": p.precision,
               "model": stages.fingerprint(base), "adapter": stages.fingerprint(adapter)}
    if made_of["model"] != manifest["inputs"]["model"]:
        raise Refusal(f"{base}: the model was changed after {study} was trained on it; put the "
                      "original back, or train again")
    folder = to or outputs_root() / study / sources.MERGED / method
    _make_ready(folder, made_of)
    checkpoints.merge(base, adapter, folder, precision=p.precision)
    return folder


def _make_ready(folder: Path, made_of: dict[str, str]) -> None:
    """Makes the folder. An earlier merge of the same study and method may be in it, finished or
    not: its weights go if they are of another training. Raises Refusal where anything else is."""
    file = folder / checkpoints.MERGED
    if folder.exists() and not folder.is_dir():
        raise Refusal(f"{folder} is a file; name a folder with --to")
    names = sorted(f.name for f in folder.iterdir()) if folder.is_dir() else []
    before = json.loads(file.read_text()) if file.is_file() else {}
    if names and any(before.get(n) != made_of[n] for n in ("study", "method")):
        raise Refusal(f"{folder} holds other things ({', '.join(names[:3])}"
                      f"{', ...' if len(names) > 3 else ''}): empty it, or name another folder "
                      "with --to")
    if before != made_of:  # config.json goes first: without it, what is left is no checkpoint
        for old in [folder / "config.json", *folder.glob("model*.safetensors*")]:
            old.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(file, to_json(made_of, indent=1) + "\n")
