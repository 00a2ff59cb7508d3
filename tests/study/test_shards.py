"""Work on rows: cut into batches, dealt out, killed at any time, and the same bytes at the end."""

import random
import time
from dataclasses import dataclass

import numpy as np
import pytest
from helpers.study import killed_until

from bpo.params import Refusal
from bpo.study import processes, shards
from bpo.study.files import read_lines
from bpo.study.seeds import torch_generator


@dataclass
class Item:
    id: str
    length: int = 0


class Killed(Exception):
    pass


class Work:
    """Makes a record a row; remembers what it was asked for and can be killed at a batch."""

    def __init__(self, killed_at=None):
        self.killed_at, self.asked = killed_at, []

    def __call__(self, batch):
        if len(self.asked) == self.killed_at:
            raise Killed
        self.asked.append(list(batch))
        return [{"id": f"row {row}", "text": f"ä {row}\u2028\r\n\t"} for row in batch]


BATCHES = [np.array(b) for b in ([5, 2, 0], [1, 6, 3], [4])]


def run(file, work=None, batches=BATCHES):
    shards.run(file, lambda: batches, work or Work(), label="x")
    return file.read_bytes()


# --- batches ------------------------------------------------------------------------------------

def test_long_answers_come_first_whatever_the_order_of_the_items():
    items = [Item("a", 1), Item("b", 5), Item("c", 3), Item("d", 5), Item("e", 2)]
    batches = shards.by_length(items, 2)
    assert [[items[i].id for i in b] for b in batches] == [["b", "d"], ["c", "e"], ["a"]]
    turned = items[::-1]
    assert [[turned[i].id for i in b] for b in shards.by_length(turned, 2)] == [
        ["b", "d"], ["c", "e"], ["a"]]


def test_a_plan_fills_a_budget_of_tokens_with_rows_of_one_length():
    prompts, answers = np.array([10, 10, 12, 10, 10, 50]), np.array([30, 2, 2, 30, 28, 2])
    batches = [b.tolist() for b in shards.by_budget(prompts, answers, 80)]
    assert batches == [[0, 3], [4], [5], [2, 1]]
    for batch in batches:
        cost = len(batch) * (prompts[batch].max() + answers[batch].max())
        assert cost <= 80 or len(batch) == 1
    assert [b.tolist() for b in shards.by_budget(prompts[:1], answers[:1], 5)] == [[0]]
    assert shards.by_budget(prompts[:0], answers[:0], 5) == []


# --- resuming -----------------------------------------------------------------------------------

def test_records_come_in_the_order_of_the_rows(tmp_path):
    work = Work()
    run(tmp_path / "x.jsonl", work)
    assert work.asked == [[5, 2, 0], [1, 6, 3], [4]]
    found = read_lines(tmp_path / "x.jsonl")
    assert [r["id"] for r in found] == [f"row {n}" for n in range(7)]
    assert found[3]["text"] == "ä 3\u2028\r\n\t"
    assert [f.name for f in tmp_path.iterdir()] == ["x.jsonl"], "shards are left behind"


def test_a_finished_file_is_not_made_again(tmp_path):
    first, again = run(tmp_path / "x.jsonl"), Work()
    assert run(tmp_path / "x.jsonl", again) == first
    assert again.asked == []


@pytest.mark.parametrize("killed_at", (0, 1, 2))
def test_a_resumed_run_writes_the_same_bytes_and_repeats_no_batch(tmp_path, killed_at):
    with pytest.raises(Killed):
        run(tmp_path / "x.jsonl", Work(killed_at))
    assert not (tmp_path / "x.jsonl").exists()
    work = Work()
    assert run(tmp_path / "x.jsonl", work) == run(tmp_path / "y.jsonl")
    assert len(work.asked) == 3 - killed_at


@pytest.mark.parametrize("lost", (1, 5, 30, 60))
def test_half_a_batch_is_made_again(tmp_path, lost):
    with pytest.raises(Killed):
        run(tmp_path / "x.jsonl", Work(2))
    shard = tmp_path / "shards" / "x.0.jsonl"
    shard.write_bytes(shard.read_bytes()[:-lost])
    work = Work()
    assert run(tmp_path / "x.jsonl", work) == run(tmp_path / "y.jsonl")
    assert work.asked == [[1, 6, 3], [4]]


@pytest.mark.parametrize("rubbish", (b"\0\0\0\n", b"{", b'4\t{"id": "row 4", "te', b"\n",
                                     b"x\t{}\n"))
def test_what_a_kill_leaves_behind_the_last_whole_record_is_cut_off(tmp_path, rubbish):
    with pytest.raises(Killed):
        run(tmp_path / "x.jsonl", Work(1))
    with (tmp_path / "shards" / "x.0.jsonl").open("ab") as stream:
        stream.write(rubbish)
    assert run(tmp_path / "x.jsonl") == run(tmp_path / "y.jsonl")


def test_files_whose_names_begin_alike_keep_their_shards_apart(tmp_path):
    for name in ("x.jsonl", "x.1.jsonl", "x-800.jsonl"):
        with pytest.raises(Killed):
            run(tmp_path / name, Work(1))
    whole = run(tmp_path / "y.jsonl")
    assert all(run(tmp_path / n) == whole for n in ("x-800.jsonl", "x.jsonl", "x.1.jsonl"))


def as_one_of(monkeypatch, rank, world):
    """This process as one of several that do not run at the same time."""
    monkeypatch.setattr(processes, "rank", lambda: rank)
    monkeypatch.setattr(processes, "world", lambda: world)
    monkeypatch.setattr(processes, "wait", lambda: None)
    monkeypatch.setattr(processes, "first", lambda work: work())
    if rank:
        monkeypatch.setattr(shards, "_merge", lambda *_: None)


def test_another_number_of_processes_goes_on_from_the_shards_of_the_first(tmp_path, monkeypatch):
    whole = run(tmp_path / "y.jsonl")
    with monkeypatch.context() as patch:
        as_one_of(patch, 1, 2)
        second = Work()
        shards.run(tmp_path / "x.jsonl", lambda: BATCHES, second, label="x")
    assert second.asked == [[1, 6, 3]], "the second of two has the second batch"
    work = Work()
    assert run(tmp_path / "x.jsonl", work) == whole
    assert work.asked == [[5, 2, 0], [4]]


def test_rows_of_a_machine_that_writes_elsewhere_are_missed(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        as_one_of(patch, 1, 2)
        (tmp_path / "elsewhere").mkdir()
        shards.run(tmp_path / "elsewhere" / "x.jsonl", lambda: BATCHES, Work(), label="x")
    as_one_of(monkeypatch, 0, 2)
    with pytest.raises(Refusal, match="3 of 7 rows of x.jsonl are in no shard"):
        run(tmp_path / "x.jsonl")


# --- kills --------------------------------------------------------------------------------------

ROWS, KILLS = 400, 60


def slow(batch):
    """A record a row, seeded by the row; a batch takes about ten milliseconds."""
    time.sleep(0.01)
    return [{"id": str(row), "draw": torch_generator(0, "x", row).initial_seed()} for row in batch]


@pytest.mark.slow
def test_kills_at_any_time_leave_the_bytes_of_a_run_without_one(tmp_path):
    batches = shards.by_budget(np.full(ROWS, 3), np.arange(ROWS) % 17, 60)
    whole = run(tmp_path / "whole.jsonl", slow, batches)
    rng, kills, ends = random.Random(0), 0, 0
    while kills < KILLS:
        file = tmp_path / f"killed-{ends}.jsonl"
        # The end of the run, where shards become one file, is hit too.
        kills += killed_until(file, lambda: shards.run(file, lambda: batches, slow, label="x"),
                              rng=rng, shortest=0.001, longest=0.12)
        ends += 1
        assert run(file, slow, batches) == whole
    assert ends > 1
