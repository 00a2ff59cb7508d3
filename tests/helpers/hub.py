"""A cache laid out as the hub's, filled without it."""

import hashlib
import os
import shutil
from pathlib import Path


def publish(repo: str, folder: Path, *, kind: str = "model", revision: str = "main") -> str:
    """Puts a folder's files into the session's cache as a commit to a branch, as links to blobs;
    returns the commit."""
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    digests = {f: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    commit = hashlib.sha1("".join(digests.values()).encode()).hexdigest()
    root = Path(os.environ["HF_HUB_CACHE"]) / f"{kind}s--{repo.replace('/', '--')}"
    for name in ("blobs", "refs", f"snapshots/{commit}"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for file, digest in digests.items():
        shutil.copyfile(file, root / "blobs" / digest)
        link = root / "snapshots" / commit / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(root / "blobs" / digest, link.parent))
    (root / "refs" / revision).write_text(commit)
    return commit
