"""Stages and their manifests: a notebook's heavy work, done once, resumed, and accounted for.

A stage is up to date when its parameters, its inputs and the code that shapes its result are those
of its manifest, and its files are as it left them. Otherwise the old folder is set aside and the
work runs again. The manifest is written last, by rename: a folder that has one is complete.
"""

import hashlib
import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bpo.params import ROOT, SCHEMAS, Parameters, Refusal, outputs_root
from bpo.study import processes, sources
from bpo.study.files import to_json, write_whole

MANIFEST = "manifest.json"
STARTED = "started.json"
TIMINGS = "timings.json"  # seconds differ from run to run, so they are no part of the result
MERGED = "merged"  # the folder in a study's for merged checkpoints, one below it for each method
LOCK_PATIENCE = 5.0  # seconds
SAMPLED_ABOVE = 256 * 2**20  # bytes; `file_hash` reads blocks of a file that is larger
VERSIONS = ("torch", "transformers", "trl", "peft", "accelerate", "numpy", "pillow", "bpo")


@dataclass(frozen=True)
class Result:
    """A complete stage: its folder, its manifest, and what was done to get it."""

    folder: Path
    manifest: dict[str, Any]
    done: str

    @property
    def metrics(self) -> dict[str, Any]:
        return self.manifest["metrics"]

    @property
    def timings(self) -> dict[str, float]:
        file = self.folder / TIMINGS
        return json.loads(file.read_text()) if file.is_file() else {}

    def facts(self) -> dict[str, Any]:
        """What a reader needs to trust a page, for the box at its top."""
        m = self.manifest
        versions = ", ".join(f"{k} {m['versions'][k]}" for k in ("torch", "transformers", "trl"))
        return {"study": m["study"], "seed": m["parameters"]["seed"], "this run": self.done,
                "computed": f"{m['finished']} in {m['seconds']:.0f} s on {m['device']}",
                "differs from the defaults": ", ".join(
                    f"{n} = {v}" for n, v in changed(m).items()) or "nothing",
                "inputs": ", ".join(f"{n} {h[:8]}" for n, h in m["inputs"].items()) or "none",
                "versions": versions, "commit": m["commit"]}


def changed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a stage that differ from the defaults, without the seed."""
    fields = SCHEMAS[manifest["stage"]].model_fields
    return {n: v for n, v in manifest["parameters"].items()
            if n != "seed" and (n not in fields or v != fields[n].get_default())}


def stage_folder(study: str, notebook: str) -> Path:
    return outputs_root() / study / notebook


def stage(p: Parameters, work: Callable[[Path], dict[str, Any]], *, inputs: Mapping[str, Path]
          ) -> Result:
    """The result of `work`, computed only if nothing valid is there.

    work: writes its files into the folder that it is given and returns the metrics (plain JSON).
    It is called again on the same folder after an interruption with the same key, so that it can
    go on from what it finds there. The code that shapes the result is that of its module and of
    all that this imports of the kit; comments and layout do not count.
    inputs: files or folders that the result depends on, by name.
    Under a launcher every process calls this and does its share of the work; the first one keeps
    the books. Raises Refusal when an input is missing or was edited, or another run holds the
    study.
    """
    folder = stage_folder(p.study, p.notebook)
    with ExitStack() as held:
        key, done = processes.first(lambda: _begin(p, folder, inputs, work.__module__, held))
        if done is None:
            return Result(folder, read_manifest(folder), "up to date, read again")
        began = time.monotonic()
        metrics = work(folder)
        processes.wait()
        seconds = round(time.monotonic() - began, 1)
        return processes.first(lambda: _finish(p, folder, key, inputs, metrics, seconds, done))


def _begin(p: Parameters, folder: Path, inputs: Mapping[str, Path],
           module: str, held: ExitStack) -> tuple[dict[str, Any], str | None]:
    """Takes the study's lock; the stage's key, and what is to be done (None: nothing)."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    held.enter_context(locked(
        folder.parent / ".stage.lock", f"study {p.study} is being computed by another run; "
        "wait for it to end, or write to another study with `--as`"))
    key = {"parameters": p.shaping(),
           "inputs": {n: fingerprint(path) for n, path in inputs.items()},
           "modules": sources.code(module)}
    reason = why_stale(folder, key)
    if reason is None:
        return key, None
    done = _open_folder(folder, key, reason)
    print(f"{p.notebook} is {done}")
    return key, done


def _finish(p: Parameters, folder: Path, key: dict[str, Any], inputs: Mapping[str, Path],
            metrics: dict[str, Any], seconds: float, done: str) -> Result:
    manifest = {"stage": p.notebook, "study": p.study, **key,
                "paths": {n: noted_path(path) for n, path in inputs.items()}, "metrics": metrics,
                "outputs": {str(f.relative_to(folder)): file_hash(f) for f in _files(folder)},
                "versions": {v: importlib.metadata.version(v) for v in VERSIONS},
                "python": platform.python_version(), "device": device_name(),
                "processes": processes.world(), "commit": git_commit(),
                "finished": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
                "seconds": seconds}
    write_whole(folder / MANIFEST, to_json(manifest, indent=1) + "\n")
    (folder / STARTED).unlink()
    return Result(folder, manifest, done)


def why_stale(folder: Path, key: Mapping[str, Any]) -> str | None:
    """None when the folder holds this very result, else the reason, for people."""
    if not (folder / MANIFEST).is_file():
        return "there was no result yet"
    manifest = read_manifest(folder)
    reasons = []
    for name in key["parameters"].keys() | manifest["parameters"].keys():
        old, new = manifest["parameters"].get(name), key["parameters"].get(name)
        if old != new:
            reasons.append(f"{name} {old} -> {new}")
    reasons += [f"input {n} changed" for n in key["inputs"].keys() | manifest["inputs"].keys()
                if manifest["inputs"].get(n) != key["inputs"].get(n)]
    reasons += [f"code of {n} changed" for n in key["modules"].keys() | manifest["modules"].keys()
                if manifest["modules"].get(n) != key["modules"].get(n)]
    touched = _touched(folder, manifest)
    if touched:
        reasons.append(f"{touched} was changed after the stage had finished")
    return "; ".join(sorted(reasons)) or None


def _open_folder(folder: Path, key: Mapping[str, Any], reason: str) -> str:
    """Makes the folder ready for work: new, or the interrupted one, or the old one set aside."""
    started = folder / STARTED
    if started.is_file() and not (folder / MANIFEST).is_file():
        if json.loads(started.read_text()) == json.loads(to_json(key)):
            return "computed on from where it was interrupted"
        reason = "an interrupted run had other parameters, inputs or code"
    if folder.exists():
        aside = next(a for n in range(1, 10_000)
                     if not (a := folder.with_name(f"{folder.name}.old-{n}")).exists())
        folder.rename(aside)
        reason = f"{reason} (the old result is kept in {aside.name})"
    folder.mkdir()
    write_whole(started, to_json(key))
    return f"computed, since {reason}"


def noted_path(path: Path) -> str:
    """A path as a manifest keeps it, for who wants to look again: outputs/... from the root of the
    outputs, else from the project's root, else absolute. No part of what makes a stage stale."""
    path = path.absolute()
    if path.is_relative_to(outputs_root()):
        return (Path("outputs") / path.relative_to(outputs_root())).as_posix()
    inside = path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[:1] != ("outputs",)
    return (path.relative_to(ROOT) if inside else path).as_posix()


def fingerprint(path: Path) -> str:
    """sha256 of what lies at a path; raises Refusal if nothing does or a stage's file was edited.

    Below an earlier stage's folder the hashes come from its manifest, after the files were
    compared with it. Elsewhere: a file's content, or names, sizes and contents of a folder's
    files, where of a file above 256 MB only 64 blocks spread over it are read.
    """
    owner = owning_stage(path)
    if owner is None:
        if not path.exists():
            command = written_by(path)
            raise Refusal(f"{path} is not there yet: {command}" if command
                          else f"{path}: there is no such file or folder")
        if path.is_file():
            return file_hash(path)
        return _digest(f"{f.relative_to(path)} {file_hash(f)}" for f in _files(path))
    if not (owner / MANIFEST).is_file():
        raise Refusal(f"{path} is not there yet: run notebooks/{owner.name}.ipynb first "
                      f"({written_by(path)})")
    manifest = read_manifest(owner)
    mine = below(manifest["outputs"], "" if path == owner else str(path.relative_to(owner)))
    if not mine:
        wrote = sorted({n.split("/")[0] for n in manifest["outputs"]})
        raise Refusal(f"{path}: the stage {owner.name} did not write this; "
                      f"it wrote {', '.join(wrote)}")
    touched = _touched(owner, {"outputs": mine})
    if touched:
        raise Refusal(f"{owner / touched} was changed after the stage that wrote it had finished: "
                      f"put the original back, or run notebooks/{owner.name}.ipynb again")
    return listed_digest(mine)


def below(hashes: Mapping[str, str], inside: str) -> dict[str, str]:
    """Those of a manifest's outputs that are or lie below a path in the stage's folder; all for "".
    """
    return {n: h for n, h in hashes.items()
            if not inside or n == inside or n.startswith(f"{inside}/")}


def listed_digest(hashes: Mapping[str, str]) -> str:
    """The fingerprint of a stage's files, from their hashes in its manifest."""
    return _digest(f"{n} {h}" for n, h in hashes.items())


def owning_stage(path: Path) -> Path | None:
    """The stage folder that a path lies in, if it lies below outputs/<study>/<notebook>."""
    root = outputs_root()
    if not path.is_relative_to(root):
        return None
    parts = path.relative_to(root).parts
    return root / parts[0] / parts[1] if len(parts) > 1 and parts[1] in SCHEMAS else None


def written_by(path: Path) -> str:
    """The command that writes what lies at a path below outputs/<study>/<notebook> or
    outputs/<study>/merged/<method>; "" for other paths."""
    if owner := owning_stage(path):
        return f"python -m bpo run {owner.parent.name} --only {owner.name.split('_')[0]}"
    root = outputs_root()
    parts = path.relative_to(root).parts if path.is_relative_to(root) else ()
    if len(parts) > 2 and parts[1] == MERGED:
        return f"python -m bpo merge {parts[0]} --method {parts[2]}"
    return ""


def _touched(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    for name, known in manifest["outputs"].items():
        if not (folder / name).is_file() or file_hash(folder / name) != known:
            return name
    return None


def _files(folder: Path) -> list[Path]:
    """The files of a result; what a kill left under a temporary name is none."""
    return sorted(f for f in folder.rglob("*") if f.is_file()
                  and f.relative_to(folder).parts not in ((MANIFEST,), (STARTED,), (TIMINGS,))
                  and not (f.name.startswith(".") and f.name.endswith(".tmp")))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished stage."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def _digest(lines: Iterator[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def file_hash(file: Path) -> str:
    """sha256 of a file; above 256 MB of its size and 64 blocks of 1 MB spread evenly over it."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= SAMPLED_ABOVE:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for block in range(64):
            stream.seek((size - 2**20) * block // 63)
            digest.update(stream.read(2**20))
    return digest.hexdigest()


def device_name() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"CPU {platform.machine()}, threads: {torch.get_num_threads()}"


def git_commit() -> str:
    """The commit of the kit's checkout, marked when files differ from it; "none" without git."""
    command = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*command, "rev-parse", "--short=12", "HEAD"], check=True,
                                capture_output=True, text=True).stdout.strip()
        dirty = subprocess.run([*command, "status", "--porcelain"], check=True,
                               capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return commit + (" with changes" if dirty else "")


@contextmanager
def locked(file: Path, message: str) -> Iterator[None]:
    """Holds a lock file for the block; raises Refusal(message) when another process holds it.

    The lock ends with the process that holds it, so a killed run leaves nothing to clean up. The
    kernel of a killed run notices within seconds that it is alone, so that long is waited for.
    """
    lock = FileLock(file, timeout=LOCK_PATIENCE)
    try:
        lock.acquire()
    except Timeout:
        raise Refusal(message) from None
    try:
        yield
    finally:
        lock.release()
