"""One program on several processes, as a launcher such as `accelerate launch` starts them.

Rows are dealt out by rank; what must be done once is done by the first. Alone, nothing here costs
anything and no process group is made.
"""

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

Made = TypeVar("Made")


def world() -> int:
    """How many processes the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number, 0 for the first or the only one."""
    return int(os.environ.get("RANK", "0")) if world() > 1 else 0


def device() -> str:
    """Where this process's models live: its own GPU, or the CPU."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if world() > 1 else "cuda"


def _state() -> Any:
    from accelerate import PartialState

    # The first process may read a large data set while the others wait: no time-out ends that.
    return PartialState(cpu=device() == "cpu", timeout=timedelta(days=30))


def wait() -> None:
    """Returns once every process has come here."""
    if world() > 1:
        _state().wait_for_everyone()


def leave() -> None:
    """Under a launcher: ends this process, with exit code 0, once every process has come here.

    Not by the interpreter's own end: the group's threads, which a wrapped model keeps alive, may
    abort the process while it is taken apart, and the launcher then counts the run as failed.
    """
    if world() > 1:
        wait()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def first(work: Callable[[], Made]) -> Made:
    """What `work` returns, done by the first process alone and sent to the others.

    An exception of the first is raised in all of them, so that none waits for it for ever. The
    result must be picklable.
    """
    if world() == 1:
        return work()
    from accelerate.utils import broadcast_object_list

    _state()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
