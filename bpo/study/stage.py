"""Stages and their manifests: a notebook's heavy work, done once, resumed, and accounted for.

A stage is up to date when its parameters, its inputs and the code that shapes its result are those
of its manifest, and its files are as it left them. Otherwise the old folder is set aside and the
work runs again, unless one that was set aside before is this very result: then that comes back. The
manifest is written last, by rename: a folder that has one is complete.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bpo.params import SCHEMAS, Parameters, Refusal, short
from bpo.study import environment, processes, progress, sources
from bpo.study.files import Hashes, file_hash, to_json, write_whole
from bpo.study.sources import (
    MANIFEST,
    STARTED,
    TIMINGS,
    digest,
    files_of,
    fingerprint,
    read_manifest,
    require,
    stage_folder,
    touched,
)

LOCK_PATIENCE = 5.0  # seconds
UP_TO_DATE = "up to date, read again"
RESUMED = "computed on from where it was interrupted"
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

    @property
    def computed(self) -> str:
        m = self.manifest
        return f"{m['finished']} in {m['seconds']:.0f} s on {m['device']}"

    def facts(self) -> dict[str, Any]:
        """What a reader needs to trust a page, for the box at its top."""
        m = self.manifest
        versions = ", ".join(f"{k} {m['versions'][k]}" for k in ("torch", "transformers", "trl"))
        return {"study": m["study"], "seed": m["parameters"]["seed"], "this run": self.done,
                "computed": self.computed,
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
        key, done, complete = processes.first(
            lambda: _begin(p, folder, inputs, pictures, work.__module__, lock))
        began, name = time.monotonic(), f"{p.study}/{p.notebook}"
        if complete and done == UP_TO_DATE:
            with progress.part(name):
                return _told(Result(folder, read_manifest(folder), done))
        with progress.stage(name, f"{p.notebook} is {done}"):
            if complete:
                return _told(Result(folder, read_manifest(folder), done))
            metrics = work(folder)
            processes.wait()
            return _told(processes.first(
                lambda: _finish(p, folder, key, pictures, metrics, began, done)))


def _begin(p: Parameters, folder: Path, inputs: Mapping[str, Path],
           pictures: Callable[[Path], Mapping[str, Path]], module: str, lock: ExitStack
           ) -> tuple[dict[str, Any], str, bool]:
    """Takes the study's lock; the stage's key, what is done, and whether the result is there."""
    if not folder.parent.exists():  # what is refused leaves no empty study behind
        for path in inputs.values():
            require(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock.enter_context(locked(
        folder.parent / ".stage.lock", f"study {p.study} is being computed by another run; "
        "wait for it to end, or write to another study with `--as`"))
    with Hashes(folder.parent / HASHES) as hashes:
        key = {"parameters": p.shaping(),
               "inputs": {n: fingerprint(path, hashes) for n, path in inputs.items()},
               "modules": sources.code(module)}
        reason = _why_other(folder, key, pictures, hashes)
        if reason is None:
            return key, UP_TO_DATE, True
        if READ_ONLY.get():
            raise Refusal(f"{p.notebook} is not up to date: {reason}")
        done = _brought_back(folder, key, pictures, hashes)
    complete = bool(done) and (folder / MANIFEST).is_file()
    done = done or _open_folder(folder, key, reason)
    environment.attention.clear()
    return key, done, complete


def _told(result: Result) -> Result:
    """Says that a report is of another computation, where no run is about to render this one."""
    executed = result.folder.with_suffix(".ipynb")
    if (processes.rank() == 0 and progress.RUN not in os.environ and executed.is_file()
            and result.computed not in executed.read_text(encoding="utf-8")):
        print(f"The report {short(executed.with_suffix('.html'))} is of another computation of "
              "this stage. With its parameters this notebook finds that result again; "
              "python -m bpo run renders the new one.")
    return result


def _finish(p: Parameters, folder: Path, key: dict[str, Any],
            pictures: Callable[[Path], Mapping[str, Path]], metrics: dict[str, Any], began: float,
            done: str) -> Result:
    with Hashes(folder.parent / HASHES) as hashes:
        used = pictures(folder)
        result = {"pictures": {"count": len(used), "sha256": _picture_digest(used, hashes)},
                  "metrics": metrics, "outputs": {
                      f.relative_to(folder).as_posix(): hashes(f) for f in files_of(folder)}}
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
    if name := touched(folder, manifest["outputs"], hashed):
        reasons.append(f"{name} was changed after the stage had finished")
    return "; ".join(sorted(reasons)) or None


def _why_other(folder: Path, key: Mapping[str, Any],
               pictures: Callable[[Path], Mapping[str, Path]], hashes: Hashes) -> str | None:
    return why_stale(folder, key, hashes) or _other_picture(folder, pictures, hashes)


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
    return digest(f"{n} {hashes(file)}" for n, file in sorted(files.items()))


def _open_folder(folder: Path, key: Mapping[str, Any], reason: str) -> str:
    """Makes the folder ready for work: new, or the interrupted one, or the old one set aside."""
    if _interrupted(folder, key):
        return RESUMED
    if (folder / STARTED).is_file() and not (folder / MANIFEST).is_file():
        reason = "an interrupted run had other parameters, inputs or code"
    if kept := _set_aside(folder):
        reason = f"{reason} (the old result is kept in {kept})"
    folder.mkdir()
    write_whole(folder / STARTED, to_json(key))
    return f"computed, since {reason}"


def _interrupted(folder: Path, key: Mapping[str, Any]) -> bool:
    """Whether the folder holds work on this very result that did not end."""
    started = folder / STARTED
    return (started.is_file() and not (folder / MANIFEST).is_file()
            and json.loads(started.read_text(encoding="utf-8")) == json.loads(to_json(key)))


def _set_aside(folder: Path) -> str:
    """The new name of a folder that makes room; "" where there was none."""
    if not folder.exists():
        return ""
    aside = next(a for n in range(1, 10_000)
                 if not (a := folder.with_name(f"{folder.name}.old-{n}")).exists())
    folder.rename(aside)
    return aside.name


def _brought_back(folder: Path, key: Mapping[str, Any],
                  pictures: Callable[[Path], Mapping[str, Path]], hashes: Hashes) -> str:
    """Puts what was set aside before and is this very result, or work on it, into the folder's
    place and the folder aside; what was done, "" where there is no such thing."""
    if _interrupted(folder, key):
        return ""
    for aside in sorted(folder.parent.glob(f"{folder.name}.old-*")):
        with suppress(Refusal):  # one of its pictures is gone
            complete = _why_other(aside, key, pictures, hashes) is None
            if complete or _interrupted(aside, key):
                kept = _set_aside(folder)
                aside.rename(folder)
                now = f" (what was here is kept in {kept})" if kept else ""
                return (f"found again in {aside.name}" if complete else RESUMED) + now
    return ""


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
