"""The little study, and commands that are run and killed."""

import importlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from bpo import __main__, params
from bpo.study import progress
from helpers import warm

# The tiny study with little of everything: every line of it runs, nothing is learnt well.
LITTLE = {"tower_steps": 30, "text_steps": 40, "text_documents": 800, "caption_steps": 20,
          "mixed_steps": 20, "alignment_images": 60, "preference_images": 60,
          "development_images": 12, "test_images": 20, "natural_images": 12,
          "noise_steps": "[0, 500, 999]", "steps": 4, "save_every": 2, "batch_pairs": 16,
          "device_batch": 16, "lora_rank": 4, "resamples": 200, "benchmark_images": 12,
          "probe_rows": 30}
FEW_ROWS = {"rows": 24, "noise_rows": 8}  # for a study with many methods, or one beside another


def command(*arguments: str, python: str = "") -> list[str]:
    """python: sys.executable for a fresh process, such as one that will be killed."""
    return [python or warm.python(), "-m", "bpo", *arguments]


def run_little(study: str, *, python: str = "") -> list[str]:
    overrides = [part for n, v in LITTLE.items() for part in ("-p", n, str(v))]
    return command("run", "tiny", "--as", study, *overrides, python=python)


def without_a_kernel(notebook: str, p: params.Parameters, folder: Path) -> bool:
    """What a notebook computes, in place of `__main__._execute`: tests that are not about notebooks
    spare a kernel's start."""
    module = (__main__.STAGES | __main__.TINY_STAGES)[int(notebook[0])]
    assert importlib.import_module(f"bpo.{module}").run(p).folder == folder / notebook
    return True


def environment(root: Path) -> dict[str, str]:
    inherited = {n: v for n, v in os.environ.items() if n != progress.RUN}
    return {**inherited, "BPO_OUTPUTS": str(root), "HF_HUB_OFFLINE": "1"}


def killed_until(done: Path, work: Callable[[], object], *, rng: random.Random,
                 shortest: float, longest: float) -> int:
    """Runs `work` in a process of its own, with all libraries there already, and kills it after a
    random time in seconds, again and again until `done` is there; how often it was killed."""
    kills = 0
    while not done.is_file():
        child = os.fork()
        if child == 0:
            try:
                # Bars of forked processes share a lock, and a killed one may have held it.
                tqdm.set_lock(threading.RLock())
                work()
                os._exit(0)
            except BaseException:
                os._exit(1)
        time.sleep(rng.uniform(shortest, longest))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return kills
