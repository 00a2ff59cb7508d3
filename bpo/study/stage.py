"""Stages and their manifests: a notebook's heavy work, done once, resumed, and accounted for.

A stage is up to date when its parameters, its inputs and the code that shapes its result are those
of its manifest, and its files are as it left them. Otherwise the old folder is set aside and the
work runs again. The manifest is written last, by rename: a folder that has one is complete.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bpo.params import SCHEMAS, Parameters, Refusal, outputs_root
from bpo.study import environment, hub, processes, sources
from bpo.study.files import Hashes, file_hash, to_json, write_whole

MANIFEST = "manifest.json"
STARTED = "started.json"
TIMINGS = "timings.json"  # seconds differ from run to run, so they are no part of the result
MERGED = "merged"  # the folder in a study's for merged checkpoints, one below it for each method
LOCK_PATIENCE = 5.0  # seconds
HASHES = ".hashes.json"  # beside a study's stages: see `Hashes`
READ_ONLY = ContextVar("READ_ONLY", default=False)


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
                "versions": versions, "kernels": environment.kernels([m]),
                "commit": m["commit"]}


def changed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a stage that differ from the defaults, without the seed."""
    fields = SCHEMAS[manifest["stage"]].model_fields
    return {n: v for n, v in manifest["parameters"].items()
            if n != "seed" and (n not in fields or v != fields[n].get_default())}


def stage_folder(study: str, notebook: str) -> Path:
    return outputs_root() / study / notebook


@contextmanager
def read_only() -> Iterator[None]:
    """In this block a stage that is not up to date raises Refusal instead of being computed."""
    token = READ_ONLY.set(True)
    try:
        yield
    finally:
        READ_ONLY.reset(token)


def stage(p: Parameters, work: Callable[[Path], dict[str, Any]], *, inputs: Mapping[str, Path],
          pictures: Callable[[Path], Mapping[str, Path]] = lambda folder: {}) -> Result:
    """The result of `work`, computed only if nothing valid is there.

    work: writes its files into the folder that it is given and returns the metrics (plain JSON).
    It is called again on the same folder after an interruption with the same key, so that it can
    go on from what it finds there.
    inputs: files or folders that the result depends on, by name.
    pictures: the finished folder -> the users' pictures that the result depends on, by name.
    Under a launcher every process calls this and does its share of the work; the first one keeps
    the books. Raises Refusal when an input is missing or was edited, or another run holds the
    study.
    """
    folder = stage_folder(p.study, p.notebook)
    with ExitStack() as lock:
        key, done = processes.first(
            lambda: _begin(p, folder, inputs, pictures, work.__module__, lock))
        if done is None:
            return Result(folder, read_manifest(folder), "up to date, read again")
        began = time.monotonic()
        metrics = work(folder)
        processes.wait()
        return processes.first(lambda: _finish(p, folder, key, pictures, metrics, began, done))


def _begin(p: Parameters, folder: Path, inputs: Mapping[str, Path],
           pictures: Callable[[Path], Mapping[str, Path]], module: str, lock: ExitStack
           ) -> tuple[dict[str, Any], str | None]:
    """Takes the study's lock; the stage's key, and what is to be done (None: nothing)."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock.enter_context(locked(
        folder.parent / ".stage.lock", f"study {p.study} is being computed by another run; "
        "wait for it to end, or write to another study with `--as`"))
    with Hashes(folder.parent / HASHES) as hashes:
        key = {"parameters": p.shaping(),
               "inputs": {n: fingerprint(path, hashes) for n, path in inputs.items()},
               "modules": sources.code(module)}
        reason = why_stale(folder, key, hashes) or _other_picture(folder, pictures, hashes)
    if reason is None:
        return key, None
    if READ_ONLY.get():
        raise Refusal(f"{p.notebook} is not up to date: {reason}")
    done = _open_folder(folder, key, reason)
    environment.attention.clear()
    print(f"{p.notebook} is {done}")
    return key, done


def _finish(p: Parameters, folder: Path, key: dict[str, Any],
            pictures: Callable[[Path], Mapping[str, Path]], metrics: dict[str, Any], began: float,
            done: str) -> Result:
    with Hashes(folder.parent / HASHES) as hashes:
        used = pictures(folder)
        result = {"pictures": {"count": len(used), "sha256": _picture_digest(used, hashes)},
                  "metrics": metrics,
                  "outputs": {f.relative_to(folder).as_posix(): hashes(f) for f in _files(folder)}}
    manifest = {"stage": p.notebook, "study": p.study, **key, **result, **environment.described(),
                "finished": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
                "seconds": round(time.monotonic() - began, 1)}
    write_whole(folder / MANIFEST, to_json(manifest, indent=1) + "\n")
    (folder / STARTED).unlink()
    return Result(folder, manifest, done)


def why_stale(folder: Path, key: Mapping[str, Any], hashed: Callable[[Path], str] = file_hash
              ) -> str | None:
    """None when the folder holds this very result, else the reason, for people."""
    if not (folder / MANIFEST).is_file():
        return "there was no result yet"
    manifest = read_manifest(folder)

    def differences(part: str, text: str) -> list[str]:
        old, new = manifest[part], key[part]
        return [text.format(n, old.get(n), new.get(n)) for n in old.keys() | new.keys()
                if old.get(n) != new.get(n)]

    reasons = [*differences("parameters", "{} {} -> {}"),
               *differences("inputs", "input {} changed"),
               *differences("modules", "code of {} changed")]
    if touched := _touched(folder, manifest["outputs"], hashed):
        reasons.append(f"{touched} was changed after the stage had finished")
    return "; ".join(sorted(reasons)) or None


def _other_picture(folder: Path, pictures: Callable[[Path], Mapping[str, Path]], hashes: Hashes
                   ) -> str | None:
    """None where the pictures of a finished stage are as it read them, else which is not. Raises
    Refusal where one is gone: computing again would leave it out."""
    listed = read_manifest(folder).get("pictures")
    if not listed:  # of an earlier version of the kit
        return None
    files = pictures(folder)
    if gone := next((f for f in files.values() if not f.is_file()), None):
        raise Refusal(f"{gone}: this picture is gone, and {folder.name} was computed from it: put "
                      f"it back, or move {folder} away to compute without it")
    if _picture_digest(files, hashes) == listed["sha256"]:
        return None
    return f"picture {next((n for n, f in files.items() if f in hashes.changed), 'file')} changed"


def _picture_digest(files: Mapping[str, Path], hashes: Hashes) -> str:
    return _digest(f"{n} {hashes(file)}" for n, file in sorted(files.items()))


def _open_folder(folder: Path, key: Mapping[str, Any], reason: str) -> str:
    """Makes the folder ready for work: new, or the interrupted one, or the old one set aside."""
    started = folder / STARTED
    if started.is_file() and not (folder / MANIFEST).is_file():
        if json.loads(started.read_text(encoding="utf-8")) == json.loads(to_json(key)):
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


def fingerprint(path: Path, hashed: Callable[[Path], str] = file_hash) -> str:
    """sha256 of what lies at a path; raises Refusal if nothing does or a stage's file was edited.

    Below an earlier stage's folder the hashes come from its manifest, after the files were
    compared with it. Elsewhere: a file's content, or names, sizes and contents of a folder's
    files, where of a file above 256 MB only 64 blocks spread over it are read. What the hub's
    cache holds is told by its commit.
    """
    owner = owning_stage(path)
    if owner is None:
        if revision := hub.revision(path):
            return revision
        if not path.exists():
            command = written_by(path)
            raise Refusal(f"{path} is not there yet: {command}" if command
                          else f"{path}: there is no such file or folder")
        if path.is_file():
            return hashed(path)
        return _digest(f"{f.relative_to(path).as_posix()} {hashed(f)}" for f in _files(path))
    if not (owner / MANIFEST).is_file():
        raise Refusal(f"{path} is not there yet: run notebooks/{owner.name}.ipynb first "
                      f"({written_by(path)})")
    outputs = read_manifest(owner)["outputs"]
    hashes = {n: h for n, h in outputs.items() if (owner / n).is_relative_to(path)}
    if not hashes:
        wrote = ", ".join(sorted({n.split("/")[0] for n in outputs}))
        raise Refusal(f"{path}: the stage {owner.name} did not write this; it wrote {wrote}")
    if touched := _touched(owner, hashes, hashed):
        raise Refusal(f"{owner / touched} was changed after the stage that wrote it had finished: "
                      f"put the original back, or run notebooks/{owner.name}.ipynb again")
    return _digest(f"{n} {h}" for n, h in hashes.items())


def _below_outputs(path: Path) -> tuple[str, ...]:
    root = outputs_root()
    return path.relative_to(root).parts if path.is_relative_to(root) else ()


def owning_stage(path: Path) -> Path | None:
    """The stage folder that a path lies in, if it lies below outputs/<study>/<notebook>."""
    parts = _below_outputs(path)
    return stage_folder(*parts[:2]) if len(parts) > 1 and parts[1] in SCHEMAS else None


def written_by(path: Path) -> str:
    """The command that writes what lies at a path below outputs/<study>/<notebook> or
    outputs/<study>/merged/<method>; "" for other paths."""
    parts = _below_outputs(path)
    if owning_stage(path):
        return f"python -m bpo run {parts[0]} --only {parts[1].split('_')[0]}"
    if len(parts) > 2 and parts[1] == MERGED:
        return f"python -m bpo merge {parts[0]} --method {parts[2]}"
    return ""


def _touched(folder: Path, hashes: Mapping[str, str], hashed: Callable[[Path], str]
             ) -> str | None:
    """The first of a stage's files that is gone or has another hash."""
    return next((n for n, sha256 in hashes.items()
                 if not (folder / n).is_file() or hashed(folder / n) != sha256), None)


def _files(folder: Path) -> list[Path]:
    """The files of a result; what a kill left under a temporary name is none."""
    return sorted(f for f in folder.rglob("*") if f.is_file()
                  and f.relative_to(folder).parts not in ((MANIFEST,), (STARTED,), (TIMINGS,))
                  and not (f.name.startswith(".") and f.name.endswith(".tmp")))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished stage."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@contextmanager
def locked(file: Path, message: str) -> Iterator[None]:
    """Holds a lock file for the block; raises Refusal(message) when another process holds it.

    The lock ends with the process that holds it, so a killed run leaves nothing to clean up. The
    kernel of a killed run notices within seconds that it is alone, so that long is waited for.
    """
    try:
        lock = FileLock(file, timeout=LOCK_PATIENCE).acquire()
    except Timeout:
        raise Refusal(message) from None
    with lock:
        yield
