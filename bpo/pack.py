"""One archive of a study to hand on: reports, manifests, parameters and adapters, and of what was
left out the count and the reason.

In it: the pages in a study's folder and its later rounds' (executed notebooks, HTML, the tables
beside them, reports.json), each stage's manifest and timings, the adapters of notebook 3 with each
method's history.json and compute.json, since these are numbers that its page draws, and the
parameter files. Left out: images, checkpoints, and all other tables (rows, pairs, answers, looks):
they quote questions and answers of the data, which may not be the packer's to share, and what the
pages say of them is in the manifests. Pictures that pages show stay in the pages.

No key leaves: a file that holds one is refused. The archive's bytes depend on the files alone, so
the hash that is printed can be published beside it; see `verify` for what hashes do not prove.
"""

import argparse
import hashlib
import html
import importlib.metadata
import json
import os
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from bpo import archives, runs, touched, verify
from bpo.archives import PACKED, Member
from bpo.params import ROOT, Refusal, outputs_root, short
from bpo.touched import REPORTS, Study

# what is packed of a stage's folder
TABLES = (f"[^/]+/{runs.MANIFEST}", f"[^/]+/{runs.TIMINGS}", r"3_dpo_training/[^/]+/adapter/[^/]+",
          r"3_dpo_training/[^/]+/(history|compute)\.json")
SET_ASIDE = "results set aside"
# kind of what is left out -> why
REASONS = {"images": "they may not be yours to share, and are the data's",
           "model weights": "they are large, and adapters belong to a checkpoint that others get "
                            "where you did",
           "tables of rows": "questions and answers of the data may not be yours to share",
           SET_ASIDE: "a newer result stands in their place",
           "other files": "no report rests on them"}
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".svg", ".npy", ".npz")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
ROWS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")

SHORTEST_KEY = 8  # characters: "EMPTY" and the like are what local servers take for a key
# Not after a character of base64, where any four letters come up in a picture sooner or later.
SHAPES = re.compile(
    rb"(?<![A-Za-z0-9+/])(?:sk-(?=[\w-]*\d)(?=[\w-]*[A-Za-z])[\w-]{20,}|hf_[A-Za-z0-9]{20,}"
    rb"|(?:AKIA|ASIA)[0-9A-Z]{16}(?![0-9A-Za-z])|gh[oprsu]_[A-Za-z0-9]{30,}"
    rb"|github_pat_\w{30,}|AIza[\w-]{35}|xox[abprs]-[\w-]{20,})"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----")
PICTURE = re.compile(rb"data:image/(?!svg)[a-z+.-]+;base64,([A-Za-z0-9+/=]{16,})"
                     rb'|"image/(?!svg)[a-z]+": *"([A-Za-z0-9+/=]{16,})')
HOMES = re.compile(rb"(?:/home|/Users|/root|[A-Za-z]:(?:\\){1,4}Users)[/\\][^/\\\s\"'<>]*")
BLOCK, OVERLAP = 2**24, 2**12  # bytes that are searched at once, and again with the next ones


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study")
    parser.add_argument("--to", type=Path, metavar="FILE", help="default: outputs/STUDY.zip")


def run(options: argparse.Namespace) -> int:
    file, held = write(options.study, to=options.to)
    for line in _told(held):
        print(line)
    with archives.opened(file) as archive:
        print(f"sha256 of {file.name}: {archive.sha256}")
        print(f"sha256 of {PACKED}: {archive.members[PACKED].sha256()}")
    print("publish one of them beside the archive: who can rewrite an archive can rewrite the "
          "hashes in it")
    print(f"the archive is {short(file)}: {file.stat().st_size / 1e6:,.1f} MB; python -m bpo "
          f"verify {short(file)} rechecks it anywhere")
    return 0


def write(study: str, *, to: Path | None = None) -> tuple[Path, dict[str, Any]]:
    """Writes the archive of a study and its later rounds; its file, and what PACKED.json holds.

    Raises Refusal when there is no such study or no complete stage in it, it is being run, a file
    holds a key, or the archive's folder is not there.
    """
    folder = outputs_root() / study
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", study) or not folder.is_dir():
        known = sorted(f.name for f in outputs_root().glob("*") if f.is_dir())
        raise Refusal(f"{study}: no such study in {short(outputs_root())}; there is "
                      f"{', '.join(known) or 'none'}")
    file = to or outputs_root() / f"{study}.zip"
    if not file.parent.is_dir():
        raise Refusal(f"{file}: its folder is not there; make it, or name another file with --to")
    if file.is_dir():
        raise Refusal(f"{file} is a folder; name a file with --to")
    folders = verify.with_rounds(folder)
    with verify.at_rest(folders):
        files, left = _chosen(folders)
        if not any(n.endswith(f"/{runs.MANIFEST}") for n in files):
            raise Refusal(f"{short(folder)}: no stage of this study is complete; run one first "
                          f"(python -m bpo run {study})")
        _refuse_keys(files)
        _refuse_touched(study, files, folders)
        held = {"format": archives.FORMAT, "kit": importlib.metadata.version("bpo"),
                "study": study, "studies": [f.name for f in folders],
                "files": {n: {"sha256": m.sha256(), "bytes": m.size} for n, m in files.items()},
                "left_out": left, "pictures": len(set(_pictures(files))),
                "folders_named": sorted(n for n, m in files.items() if _names_folders(m))}
        packed = archives.in_memory(archives.text(held).encode())
        archives.write(file, {**files, PACKED: packed}, below=f"{study}.packed")
    return file, held


def _chosen(folders: Iterable[Path]) -> tuple[dict[str, Member], list[dict[str, Any]]]:
    """The files of an archive by name, and of each kind that is left out {what, why, files,
    bytes}."""
    chosen, left = {}, {kind: [] for kind in REASONS}
    for folder in folders:
        files = archives.files_below(folder)
        study = Study(folder.name, files, folder)
        for name, member in files.items():
            own = name in study.pages or name == REPORTS
            if own or (name.split("/")[0] in study.stages
                       and any(re.fullmatch(t, name) for t in TABLES)):
                chosen[f"{folder.name}/{name}"] = member
            elif not any(part.startswith(".") for part in name.split("/")):
                left[_kind(name)].append(member.size)
        parameters = archives.files_below(ROOT / "params" / folder.name)
        chosen |= {f"params/{folder.name}/{n}": m for n, m in parameters.items()
                   if "/" not in n and n.endswith(".yaml")}
    return dict(sorted(chosen.items())), [
        {"what": kind, "why": REASONS[kind], "files": len(sizes), "bytes": sum(sizes)}
        for kind, sizes in left.items() if sizes]


def _kind(name: str) -> str:
    if ".old-" in name.split("/")[0]:
        return SET_ASIDE
    kinds = {"images": IMAGES, "model weights": WEIGHTS, "tables of rows": ROWS}
    return next((k for k, ends in kinds.items() if name.lower().endswith(ends)), "other files")


def _refuse_keys(files: Mapping[str, Member]) -> None:
    """Raises Refusal when a file holds a key; the message names the file and never the key."""
    keys = {form.encode(): variable for variable in _key_variables(files)
            for form in _forms(os.environ.get(variable, "").strip())}
    for name, member in files.items():
        for block in _blocks(member):
            for form, variable in keys.items():
                if form in block:
                    raise Refusal(f"{name} holds the value of the environment variable {variable}, "
                                  "a key: nothing was packed; take it out there (a new key is "
                                  "safer), run that notebook again and pack then")
            if SHAPES.search(block):
                raise Refusal(f"{name} holds something that is shaped like a key: nothing was "
                              "packed; take it out there (and get a new key if it was one), run "
                              "that notebook again and pack then")


def _refuse_touched(study: str, files: Mapping[str, Member], folders: Iterable[Path]) -> None:
    packed = [Study(f.name, touched.inside(files, f.name), None) for f in folders]
    problems = [p for line in touched.lines(packed) for p in line.problems]
    if problems:
        raise Refusal(f"{study} was touched, so nothing was packed (python -m bpo verify {study} "
                      f"tells all): {problems[0]}")


def _key_variables(files: Mapping[str, Member]) -> list[str]:
    """The environment variables that hold keys: by their names, or since a parameter says so."""
    named = {v for v in os.environ if v.upper().endswith(("_API_KEY", "_TOKEN"))}
    for name, member in files.items():
        if name.endswith(f"/{runs.MANIFEST}"):
            values = _read(name, member, json.loads).get("parameters")
        elif name.startswith("params/"):
            values = _read(name, member, yaml.safe_load)
        else:
            continue
        named |= {v for n, v in (values or {}).items()
                  if n.endswith("key_variable") and isinstance(v, str)}
    return sorted(named)


def _read(name: str, member: Member, reader: Any) -> dict[str, Any]:
    try:
        held = reader(member.read())
        if isinstance(held, dict):
            return held
    except (ValueError, RecursionError, yaml.YAMLError):
        pass
    raise Refusal(f"{name} cannot be read: python -m bpo verify STUDY says what was touched, pack "
                  "when that is mended")


def _forms(key: str) -> set[str]:
    """A key as text, JSON, a page and an address write it; none of what is too short for one."""
    escaped = json.dumps(key)[1:-1]
    return {key, escaped, html.escape(key), html.escape(escaped), urllib.parse.quote(key, safe="")
            } if len(key) >= SHORTEST_KEY else set()


def _blocks(member: Member) -> Iterator[bytes]:
    """A file's bytes in blocks that overlap, so that nothing lies between two of them."""
    with member.open() as stream:
        tail = b""
        while block := stream.read(BLOCK):
            yield tail + block
            tail = block[-OVERLAP:]


def _pictures(files: Mapping[str, Member]) -> Iterator[bytes]:
    """A hash of each picture that a page or notebook shows, diagrams not counted."""
    for name, member in files.items():
        if name.endswith((".html", ".ipynb")):
            for found in PICTURE.finditer(member.read()):
                yield hashlib.sha256(found[1] or found[2]).digest()


def _names_folders(member: Member) -> bool:
    """Whether a file names folders of the machine that packs it, or anyone's home folder."""
    here = {str(p).encode() for p in (ROOT, outputs_root(), Path.home()) if len(p.parts) > 1}
    return any(HOMES.search(block) or any(h in block for h in here) for block in _blocks(member))


def _told(held: Mapping[str, Any]) -> Iterator[str]:
    size = sum(f["bytes"] for f in held["files"].values())
    yield f"packed: {len(held['files'])} files, {size / 1e6:,.1f} MB"
    for kind in held["left_out"]:
        yield (f"left out: {kind['files']} {kind['what']}, {kind['bytes'] / 1e6:,.1f} MB "
               f"({kind['why']})")
    if held["pictures"]:
        yield f"the reports show {held['pictures']} pictures: look whether you may share them"
    if named := held["folders_named"]:
        yield (f"{len(named)} files name folders of a machine, such as {named[0]}: look whether "
               "you mind; hashed files are not rewritten")
