"""SHA256SUMS of a study: the hash of each file when the index was written, and what differs now.

Anyone can check without Python: `sha256sum -c SHA256SUMS` in a study's folder, or in the folder
that its zip file was unpacked to. Hashes find what was changed by accident; whoever rewrites a
file on purpose can rewrite the list too.
"""

import argparse
import hashlib
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from bpo.params import Refusal, outputs_root, short
from bpo.study.files import SAMPLED_ABOVE, Hashes, write_whole
from bpo.study.text import visible

SUMS = "SHA256SUMS"
READ = ".sums.json"  # what `write` read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="STUDY|ZIP", help="a study's name or folder, or its zip")


def run(options: argparse.Namespace) -> int:
    study = outputs_root() / options.target
    place = study if study.exists() else Path(options.target).absolute()
    if not place.exists():
        raise Refusal(f"{options.target}: there is no such study in {short(outputs_root())}, and "
                      "no such folder or zip file; give its path")
    lines = problems(place)
    print(*map(visible, lines), f"{short(place)}: " + (
        f"differences from {SUMS}: {len(lines)}; after changes of your own, python -m bpo report "
        "STUDY writes the list again" if lines else f"every file is as {SUMS} lists it"), sep="\n")
    return int(bool(lines))


def write(folder: Path, manifests: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the list of a study's files. manifests: by stage.

    What a stage wrote is listed with the hash in its manifest, so that a later edit is found and
    little is read. Above `SAMPLED_ABOVE` bytes that hash is of samples, so those are read, but not
    again while their size and times stay.
    """
    hashes = {f"{stage}/{name}": sha256 for stage, manifest in manifests.items()
              for name, sha256 in manifest["outputs"].items()}
    with Hashes(folder / READ, lambda file: _sha256(partial(file.open, "rb"))) as whole:
        write_whole(folder / SUMS, text({
            name: hashes[name] if name in hashes and file.stat().st_size <= SAMPLED_ABOVE
            else whole(file) for name, file in files(folder).items() if name != SUMS}))


def text(hashes: Mapping[str, str]) -> str:
    """The list in the format of sha256sum, from hashes by name."""
    return "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(hashes.items()))


def read(lines: str) -> dict[str, str]:
    """Hashes by name. The file of a line that cannot be read counts as not listed."""
    return {name: sha256 for sha256, name in re.findall(r"(?m)^([0-9a-f]{64})  (.+)$", lines)}


def files(folder: Path) -> dict[str, Path]:
    """A study's files by name, without results set aside and names that begin with a dot (locks,
    temporary files). Links are followed, since a stage may lie on another disk."""
    found = {}
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [f for f in folders if not re.search(r"^\.|\.old-\d+$", f)]
        found |= {f.relative_to(folder).as_posix(): f for n in names
                  if not n.startswith(".") and (f := Path(root, n)).is_file()}
    return found


def problems(place: Path) -> list[str]:
    """A line for each file of a folder or zip file that is not as listed. A zip file is read and
    never unpacked. Raises Refusal where no list can be read."""
    with ExitStack() as stack:
        try:
            if place.is_dir():
                entries = [(n, partial(f.open, "rb")) for n, f in files(place).items()]
            else:
                archive = stack.enter_context(zipfile.ZipFile(place))
                entries = [(e.filename, partial(archive.open, e)) for e in archive.infolist()
                           if not e.is_dir()]
            top = min((n for n, _ in entries if n.split("/")[-1] == SUMS), key=len)
            entries = [(n.removeprefix(top.removesuffix(SUMS)), opener) for n, opener in entries]
            there = dict(entries)
            with there.pop(SUMS)() as stream:
                listed = read(stream.read().decode())
        except Exception:  # a damaged zip file raises of many kinds
            raise Refusal(f"{short(place)}: there is no {SUMS}, or it cannot be read; get the zip "
                          "file again, or write the list with python -m bpo report STUDY") from None
        times = Counter(n for n, _ in entries)
        return [*(f"missing: {n}" for n in sorted(listed.keys() - there.keys())),
                *(f"extra: {n}" for n in sorted(there.keys() - listed.keys())),
                *(f"twice: {n}" for n in sorted(times) if times[n] > 1),
                *(f"touched: {n}" for n in sorted(listed.keys() & there.keys())
                  if _touched(there[n], listed[n]))]


def _touched(opener: Callable[[], BinaryIO], sha256: str) -> bool:
    try:
        return _sha256(opener) != sha256
    except Exception:
        return True


def _sha256(opener: Callable[[], BinaryIO]) -> str:
    with opener() as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
