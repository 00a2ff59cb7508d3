"""Where and with what a stage was computed: versions, device, CUDA, and the attention that its
models ran with. Part of its manifest, and of nothing that makes it stale.
"""

import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Collection, Mapping
from typing import Any

from bpo.params import ROOT
from bpo.study import processes

VERSIONS = ("torch", "transformers", "trl", "peft", "accelerate", "numpy", "pillow", "bpo")
OPTIONAL = ("bitsandbytes",)  # of an extra; named where it was loaded
# Names of the attention that models of this process ran with, as transformers has them, since a
# stage began; whoever makes or switches a model adds to them.
attention: set[str] = set()


def noted(model: Any) -> Any:
    """The model, after a note of the attention of its parts."""
    names = (getattr(getattr(part, "config", None), "_attn_implementation", None)
             for part in model.modules())
    attention.update(filter(None, names))
    return model


def described() -> dict[str, Any]:
    """The environment for a manifest; None where there is no CUDA or driver, or no model ran."""
    import torch

    used = [v for v in OPTIONAL if v in sys.modules]
    return {"versions": {v: importlib.metadata.version(v) for v in (*VERSIONS, *used)},
            "python": platform.python_version(), "device": device_name(),
            "attention": ", ".join(sorted(attention)) or None, "cuda": torch.version.cuda,
            "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "processes": processes.world(), "commit": git_commit()}


def kernels(manifests: Collection[Mapping[str, Any]]) -> str:
    """"attention sdpa; CUDA 12.8; driver 570.86" of stages, for a page."""
    shown = {n: sorted({v for m in manifests for v in (m.get(n.lower()) or "").split(", ") if v})
             for n in ("attention", "CUDA", "driver")}
    return "; ".join(f"{n} {', '.join(values) or 'none'}" for n, values in shown.items()
                     if values or n != "attention")


def device_name() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"CPU {platform.machine()}, threads: {torch.get_num_threads()}"


def git_commit() -> str:
    """The commit of the kit's checkout, marked when files differ from it; "none" without git."""
    commit = _said("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    changes = _said("git", "-C", str(ROOT), "status", "--porcelain")
    return f"{commit}{' with changes' if changes else ''}" if commit else "none"


def _said(*command: str) -> str | None:
    """The first line that a command prints; None where it cannot be run, fails or is silent."""
    try:
        printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return printed.stdout.strip().split("\n")[0] or None
