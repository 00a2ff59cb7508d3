"""Part of `make bench`: works timed in turn, and the rows of the tables that come of it."""

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

CPU, WALL = 0, 1
Row = dict[str, str]


def in_turn(works: Mapping[object, Callable[[], object]], *, rounds: int
            ) -> dict[object, np.ndarray]:
    """(rounds, 2) seconds of every work, of CPU and of the wall, taken in turn after a warm-up."""
    seconds: dict[object, list[tuple[float, float]]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            cpu, wall = time.process_time(), time.perf_counter()
            work()
            if turn:
                seconds[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return {name: np.array(of_work) for name, of_work in seconds.items()}


def row(label: str, ratios: Sequence[float]) -> Row:
    """label: what is compared, " / ", and with what."""
    low, middle, high = (f"{value:.3g}" for value in np.percentile(ratios, [0, 50, 100]))
    return {"what / against what": label, "ratio": middle,
            "lowest – highest": f"{low} – {high} of {len(ratios)}"}


def faster(label: str, baseline: np.ndarray, ours: np.ndarray, *, clock: int = CPU) -> Row:
    """How many times less time ours takes than the baseline, round by round."""
    return row(label, baseline[:, clock] / ours[:, clock])
