"""Work on many rows that can be killed at any time and dealt out to any number of processes.

Rows are cut into batches once, from the rows alone (`by_length`, `by_budget`). Each process appends
the records of its batches to a shard of its own, a batch in one durable write; whoever comes next,
in whatever number, reads all shards and goes on with the batches that are not there whole. At the
end the shards become one file in the order of the rows. A batch gives the same records wherever it
is computed, so one process, three, and a killed run that is resumed by two write the same bytes.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bpo.params import Refusal
from bpo.study import processes, progress
from bpo.study.files import read_lines, to_json, whole

Item = TypeVar("Item")


def by_length(items: Sequence[Any], batch_size: int) -> list[np.ndarray]:
    """Batches of the items' numbers, longest answers first: those of a batch end at about the same
    time. An item has a `length` and an `id`."""
    order = sorted(range(len(items)), key=lambda i: (-items[i].length, items[i].id))
    return [np.array(order[i:i + batch_size]) for i in range(0, len(order), batch_size)]


def by_budget(prompt_tokens: np.ndarray, answer_tokens: np.ndarray, budget: int
              ) -> list[np.ndarray]:
    """Batches of row numbers, longest answers first, that fill a budget of tokens.

    prompt_tokens, answer_tokens: (rows,) lengths, the answers' a guess. A batch costs its rows
    times its longest prompt and longest answer, as padding makes it; one row may cost more than
    the budget alone. Depends on the lengths only, never on how many processes there are.
    """
    order = np.lexsort((np.arange(len(answer_tokens)), -prompt_tokens, -answer_tokens))
    batches, start, widest = [], 0, 0
    for at, row in enumerate(order):
        widest = max(widest, int(prompt_tokens[row]))
        if at > start and (at + 1 - start) * (widest + int(answer_tokens[order[start]])) > budget:
            batches.append(order[start:at])
            start, widest = at, int(prompt_tokens[row])
    return [*batches, order[start:]] if len(order) else []


def run(file: Path, plan: Callable[[], Sequence[np.ndarray]], work: Callable[[Any], list[dict]], *,
        label: str, prepare: Callable[[np.ndarray], Any] = lambda batch: batch) -> None:
    """Writes `file`, one JSON line a row in the order of the rows; nothing to do if it is there.

    plan: gives the batches, arrays of row numbers that cover 0 .. rows - 1 once. It is not asked
    for a file that is there: a plan may need a model's tokenizer.
    work: what `prepare` made of a batch -> one record a row of it. Called by the process that the
    batch was dealt to.
    prepare: runs in a thread, a batch ahead, so that images are read while the model is at work.
    """
    if processes.first(file.is_file):
        with progress.part(label):
            return
    batches = plan()
    rows = sum(map(len, batches))
    folder = file.parent / "shards"
    # The first alone looks, and tells the others: another machine may see a shared folder late.
    left = processes.first(lambda: _left(folder, file.stem, batches))
    assigned = left[processes.rank()::processes.world()]
    before = rows - sum(map(len, left))
    with ((folder / f"{file.stem}.{processes.rank()}.jsonl").open("ab") as shard,
          progress.part(label, rows, done=before, unit="rows") as advance):
        for batch, prepared in _ahead(assigned, prepare):
            lines = [f"{row}\t{to_json(record)}\n"
                     for row, record in zip(batch.tolist(), work(prepared), strict=True)]
            shard.write("".join(lines).encode())
            shard.flush()
            os.fsync(shard.fileno())
            # The others are about as far: their rows count too, or the time left would be wrong.
            advance(len(batch) * processes.world())
    processes.wait()
    processes.first(lambda: _merge(folder, file, rows))


def _ahead(batches: Sequence[np.ndarray], prepare: Callable[[np.ndarray], Any]
           ) -> Iterator[tuple[np.ndarray, Any]]:
    """Each batch with what was prepared of it, while the next one is being prepared."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(prepare, batches[0]) if batches else None
        for number, batch in enumerate(batches):
            prepared = coming.result()
            if number + 1 < len(batches):
                coming = pool.submit(prepare, batches[number + 1])
            yield batch, prepared


def run_on(file: Path, items: Sequence[Item], batch_size: int,
           work: Callable[[list[Item]], list[dict]], *, label: str) -> list[dict]:
    """The records of a list of items, one each in their order, from `file` or made now."""
    run(file, lambda: by_length(items, batch_size), lambda batch: work([items[i] for i in batch]),
        label=label)
    return read_lines(file)


def _shards(folder: Path, stem: str) -> list[Path]:
    """Those in the folder's listing, and those of the processes of now, which it may lack yet."""
    listed = {f for f in folder.glob(f"{stem}.*.jsonl")
              if f.name.removeprefix(f"{stem}.").removesuffix(".jsonl").isdigit()}
    own = {folder / f"{stem}.{rank}.jsonl" for rank in range(processes.world())}
    return sorted(f for f in listed | own if f.is_file())


def _left(folder: Path, stem: str, batches: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The batches that are not there whole. Cuts off whatever a kill left behind the last whole
    record of each shard."""
    folder.mkdir(exist_ok=True)
    done = np.zeros(sum(map(len, batches)), dtype=bool)
    for shard in _shards(folder, stem):
        end = 0
        for row, offset, length in _records(shard):
            done[row] = True
            end = offset + length
        os.truncate(shard, end)
    return [b for b in batches if not done[b].all()]


def _records(shard: Path) -> Iterator[tuple[int, int, int]]:
    """(row, offset, length in bytes) of the records of a shard, up to one that is not whole."""
    offset = 0
    with shard.open("rb") as stream:
        for line in stream:
            row, tab, record = line.partition(b"\t")
            try:
                json.loads(record)
                number = int(row)
            except ValueError:
                return
            if not tab or not line.endswith(b"\n"):
                return
            yield number, offset, len(line)
            offset += len(line)


def _merge(folder: Path, file: Path, rows: int) -> None:
    """One file in the order of the rows, by rename; the shards go afterwards.

    Ten bytes a row are held: the shard and the place in it. Raises Refusal where a row is in none.
    """
    shards = _shards(folder, file.stem)
    shard, place = np.full(rows, len(shards), dtype=np.uint16), np.zeros(rows, dtype=np.uint64)
    for number, path in enumerate(shards):
        for row, offset, _ in _records(path):
            shard[row], place[row] = number, offset
    if missing := int((shard == len(shards)).sum()):
        raise Refusal(f"{folder}: {missing} of {rows} rows of {file.name} are in no shard; all "
                      "machines must see one folder of outputs: mend that, then run this again")
    with ExitStack() as stack:
        streams = [stack.enter_context(path.open("rb")) for path in shards]
        out = stack.enter_context(whole(file))
        for row in range(rows):
            stream = streams[shard[row]]
            stream.seek(int(place[row]))
            out.write(stream.readline().partition(b"\t")[2].decode())
    for path in shards:
        path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
