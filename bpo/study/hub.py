"""Names of the Hugging Face hub where a folder can stand: OWNER/NAME, OWNER/NAME@REVISION, and
datasets/OWNER/NAME@REVISION/FILE. Files come from huggingface_hub's own cache, and into it."""

import functools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from bpo.params import Refusal

NAME = re.compile(r"(datasets/)?(\w[\w.-]*/\w[\w.-]*)(?:@([\w.-]+))?(?:/(.+))?")
# Of a checkpoint, what is read: weights as safetensors, texts of configuration and tokenizer.
CHECKPOINT = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
OTHER_FORMATS = ("*/*.safetensors", "onnx/*", "original/*")
CACHE_ONLY = ContextVar("CACHE_ONLY", default=False)


@contextmanager
def cache_only() -> Iterator[None]:
    """In this block nothing is fetched: what the cache lacks is refused, as offline."""
    token = CACHE_ONLY.set(True)
    try:
        yield
    finally:
        CACHE_ONLY.reset(token)


def path(name: str, *, checkpoint: bool) -> Path | None:
    """The cache's folder or file of a hub name; None for a text that is none. A checkpoint is
    OWNER/NAME, data begin with datasets/. Online, what is missing or newer is fetched first.

    Raises Refusal where it is not to be had, with the command that fetches it.
    """
    match = NAME.fullmatch(name)
    if not match or checkpoint == bool(match[1]) or (checkpoint and match[4]):
        return None
    return _path("model" if checkpoint else "dataset", match[2], match[3], match[4] or "",
                 CACHE_ONLY.get())


def here(local: Path, name: str, *, checkpoint: bool) -> Path:
    """A path that is there, else what the cache has under the name, else the path all the same.
    Raises Refusal as `path` does."""
    return local if local.exists() else path(name, checkpoint=checkpoint) or local


@functools.cache
def _path(kind: str, repo: str, revision: str | None, inside: str, cached: bool) -> Path:
    """One look a process: a branch that moves in between moves nothing under a running stage."""
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.constants import is_offline_mode

    wanted: dict = {"allow_patterns": list(CHECKPOINT), "ignore_patterns": list(OTHER_FORMATS)}
    if kind == "dataset":
        wanted = {"allow_patterns": [inside, f"{inside}/*"]} if inside else {}
    offline = cached or is_offline_mode()
    try:
        folder = Path(snapshot_download(repo, repo_type=kind, revision=revision,
                                        local_files_only=offline, **wanted))
    except errors.GatedRepoError:
        raise Refusal(f"{repo}: the hub gives this {kind} to those who accepted its terms: do so "
                      "on its page, then log in with `hf auth login`") from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise Refusal(f"{repo}: the hub has no such {kind}"
                      f"{f', or no revision {revision}' if revision else ''}, and no such folder "
                      "is here") from None
    except (errors.HfHubHTTPError, OSError) as error:
        why = "" if offline else f" ({str(error).splitlines()[0]})"
        raise Refusal(f"{repo}: neither is there such a folder nor is this {kind} whole in the "
                      f"hub's cache{why}; {_command(kind, repo, revision, inside)}") from None
    if lost := _missing(folder, inside, kind):
        raise Refusal(f"{repo}: {lost} is missing in the hub's cache; "
                      f"{_command(kind, repo, revision, inside)}")
    return folder / inside


def _command(kind: str, repo: str, revision: str | None, inside: str) -> str:
    parts = ["fetch it with: hf download", repo, *([inside] if inside else []),
             *(["--repo-type dataset"] if kind == "dataset" else []),
             *([f"--revision {revision}"] if revision else []),
             *(f"--include '{p}'" for p in CHECKPOINT if kind == "model")]
    return " ".join(parts)


def _missing(folder: Path, inside: str, kind: str) -> str | None:
    """The first file of a snapshot that is wanted and not there."""
    wanted = [inside] if inside else []
    if kind == "model":
        index = folder / "model.safetensors.index.json"
        weights = (json.loads(index.read_text())["weight_map"].values() if index.is_file()
                   else ["model.safetensors"])
        wanted = ["config.json", *sorted(set(weights))]
    return next((n for n in wanted if not (folder / n).exists()), None)


def _snapshot(path: Path) -> Path | None:
    """The snapshot of the cache that a path lies in."""
    return next((p for p in (path, *path.parents) if p.parent.name == "snapshots"
                 and p.parent.parent.name.startswith(("models--", "datasets--"))), None)


def revision(path: Path) -> str | None:
    """OWNER/NAME@COMMIT/FILE of what lies in a snapshot of the cache: a commit's files do not
    change. None for other paths."""
    if (snapshot := _snapshot(path)) is None:
        return None
    repo = snapshot.parent.parent.name.partition("--")[2].replace("--", "/")
    return f"{repo}@{snapshot.name}/{path.relative_to(snapshot).as_posix()}".removesuffix("/.")


def contents(root: Path) -> Path:
    """Where the files below a resolved folder really are: the cache's snapshots hold links."""
    snapshot = _snapshot(root)
    return root if snapshot is None else snapshot.parent.parent / "blobs"
