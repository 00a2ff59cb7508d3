"""The benchmarks with a judge: official layouts, replies as judges write them, numbers by hand; and
asking a judge: nothing paid for is lost, nothing is paid for twice."""

import json
import os
import signal
import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from helpers.server import completion, prompts, question

from bpo.evaluation import judged, metrics, official
from bpo.evaluation.judged import JUDGED, LLAVA_BENCH, MM_VET, MMHAL, TYPES
from bpo.params import Refusal
from bpo.study import stage as stages
from bpo.study.files import read_lines

VET = {
    "v1_0": {"imagename": "v1_0.png", "question": "What is x?", "answer": "-1<AND>-5",
             "capability": ["math", "ocr"]},
    "v1_1": {"imagename": "v1_1.jpg", "question": "What is {answer} here?",
             "answer": "eight <OR> 8.0", "capability": ["ocr"]},
    "v1_2": {"imagename": "v1_1.jpg", "question": "Is it ä?", "answer": "no",
             "capability": ["rec", "know", "gen", "spat"]}}
LLAVA = {
    "questions.jsonl": [
        {"question_id": 0, "image": "001.jpg", "text": "Name it.", "category": "conv"},
        {"question_id": 1, "image": "001.jpg", "text": "Describe it.", "category": "detail"},
        {"question_id": 2, "image": "002.jpg", "text": "Why?", "category": "complex"},
        {"question_id": 3, "image": "002.jpg", "text": "How many?", "category": "conv"}],
    # In another order, as no official file is: they are matched by number.
    "answers_gpt4.jsonl": [{"question_id": n, "text": f"reference {n}"} for n in (2, 0, 3, 1)],
    "context.jsonl": [{"image": "002.jpg", "caption": "Two mugs."},
                      {"image": "001.jpg", "caption": "A hill."}]}
HAL = [{"question_type": kind, "image_id": f"id{n}", "question": f"question {n}",
        "image_src": f"https://x.invalid/8/{n}_o.jpg", "image_content": ["Bus", "Car"],
        "gt_answer": f"answer {n}"} for n, kind in enumerate(TYPES)]


def write(folder, *, vet=VET, llava=None, hal=HAL):
    (folder / "mm-vet.json").write_text(json.dumps(vet))
    (folder / "response_template.json").write_text(json.dumps(hal))
    for name, lines in (LLAVA | (llava or {})).items():
        (folder / name).write_text("".join(f"{json.dumps(line)}\n" for line in lines) + "\n")
    return folder


# --- files and prompts ---------------------------------------------------------------------------

def test_the_official_files_are_read(tmp_path):
    vet, llava, hal = (JUDGED[n].load(write(tmp_path)) for n in ("mm-vet", "llava-bench", "mmhal"))
    assert [(q.id, q.image, q.kind, q.label) for q in vet] == [
        ("v1_0", "v1_0.png", "ocr math", "-1 <AND> -5"),
        ("v1_1", "v1_1.jpg", "ocr", "eight <OR> 8.0"), ("v1_2", "v1_1.jpg", "rec know gen spat",
                                                        "no")]
    assert [(q.id, q.image, q.text, q.kind, q.label, q.context) for q in llava[1:3]] == [
        ("1", "001.jpg", "Describe it.", "detail", "reference 1", "A hill."),
        ("2", "002.jpg", "Why?", "complex", "reference 2", "Two mugs.")]
    assert [q.kind for q in hal] == list(TYPES) and (len(llava), len(hal)) == (4, 8)
    assert (hal[3].id, hal[3].image, hal[3].text, hal[3].label, hal[3].context) == (
        "id3", "3_o.jpg", "question 3", "answer 3", "Bus, Car")


@pytest.mark.parametrize("name", JUDGED)
def test_a_prompt_holds_all_that_a_judge_needs_and_nothing_is_filled_in_twice(tmp_path, name):
    benchmark = JUDGED[name]
    asked = replace(benchmark.load(write(tmp_path))[1], context="a {answer} in brackets")
    answer = "a {reference} of mine {0} {}"
    text = benchmark.prompt(asked, answer)[-1]["content"]
    assert all(part in text for part in (asked.text, asked.label, answer))
    assert (asked.context in text) == (benchmark is not MM_VET)
    # LLaVA-Bench's first assistant is the reference, as in the reply's two scores.
    assert text.rindex(asked.label) < text.rindex(answer)
    blank = replace(asked, text="", label="", context="")
    assert "{" not in benchmark.prompt(blank, "")[0]["content"]


@pytest.mark.parametrize("benchmark, files, named", (
    (MM_VET, {"vet": [1]}, r"mm-vet\.json: "), (MM_VET, {"vet": {}}, r"mm-vet\.json: "),
    (MM_VET, {"vet": {"v1_7": VET["v1_0"] | {"answer": 3}}}, "v1_7: answer is '3'"),
    (MM_VET, {"vet": {"v1_7": VET["v1_0"] | {"capability": ["smell"]}}}, "capability is 'smell'"),
    (MM_VET, {"vet": {"v1_7": "text"}}, "v1_7: .*imagename"),
    (LLAVA_BENCH, {"llava": {"answers_gpt4.jsonl": LLAVA["answers_gpt4.jsonl"][1:]}},
     r"questions\.jsonl, row 3: .*answers_gpt4\.jsonl has nothing for 2"),
    (LLAVA_BENCH, {"llava": {"context.jsonl": LLAVA["context.jsonl"][:1]}},
     r"questions\.jsonl, row 1: .*context\.jsonl for 001\.jpg"),
    (LLAVA_BENCH, {"llava": {"questions.jsonl": LLAVA["questions.jsonl"][:1] * 2}}, "one twice"),
    (LLAVA_BENCH, {"llava": {"context.jsonl": [["001.jpg"]]}}, r"context\.jsonl"),
    (MMHAL, {"hal": [HAL[0], HAL[1] | {"question_type": "odd"}]}, "row 2: question_type is 'odd'"),
    (MMHAL, {"hal": [HAL[0] | {"image_content": "Bus"}]}, "row 1: image_content is 'Bus'")))
def test_a_file_that_is_not_the_official_one_is_refused(tmp_path, benchmark, files, named):
    with pytest.raises(Refusal, match=named):
        benchmark.load(write(tmp_path, **files))


@pytest.mark.parametrize("content", (b"<html>", b"\x89PNG\xff"))
@pytest.mark.parametrize("benchmark", JUDGED.values(), ids=JUDGED)
def test_another_thing_in_a_file_s_place_is_refused(tmp_path, benchmark, content):
    (write(tmp_path) / benchmark.files["questions"]).write_bytes(content)
    with pytest.raises(Refusal, match=benchmark.files["questions"]):
        benchmark.load(tmp_path)
    with pytest.raises(Refusal, match="needs images/ there; get "):
        official.require(benchmark, tmp_path)


# --- replies -------------------------------------------------------------------------------------

@pytest.mark.parametrize("benchmark, reply, score", (
    *((MM_VET, *pair) for pair in (
        ("0.5", 0.5), ("Score: 0.5", 0.5), ("score=0.3", 0.3), ("**Score:** 0.7", 0.7), ("1", 1),
        (" 0.0\n", 0), ("0.4.\n", 0.4), ("0.5\nHalf of it.", 0.5), ("Score: 0.5/1", 0.5),
        ("Only one part is there.\n\nScore: 0.5", 0.5), ("0.5 / 1.0", 0.5), ("`0.25`", 0.25),
        ("Score: 0.6. So, once more: score: 0.6", 0.6),
        ("<think>Score: 0.1? Or 0.9.</think>\n\nScore: 0.9", 0.9), ("no tag: 0.1</think>0.2", 0.2),
        *((reply, None) for reply in (
            "", "right", "Score:", "Score: 1.5", "Score: -0.5", "5", "Score: 5/10", "1/2",
            "0.5-0.7", "Score: 0.5 - 0.7", "Score: 0,5", "Score: 0.5 or score: 0.6",
            "2 of 4 are right. 0.5", "1. The answer names the hill.", "<think>Score: 0.5",
            "Score: 0.5.1", "Score: 1x", "underscore: 0.5", "Score: nan")))),
    *((MMHAL, *pair) for pair in (
        ("Rating: 4", 4), ("It makes up a dog.\nRating: 0", 0), ("**Rating**: 6", 6), ("2", 2),
        ("Rating: 4/6", 4), ("Rating: 5, without hallucination", 5), ("Rating: 4.0", 4),
        ("5 dogs are named.\nRating: 1", 1), ("Rating: 2\n\nRating: 2", 2),
        *((reply, None) for reply in (
            "", "Rating: 10", "Rating: -1", "Rating: 4.5", "Rating: 3-4", "Rating: high", "3/4",
            "Rating: 3 or 4?\nRating: 4", "4 things are right", "Rating: 40"))))))
def test_a_single_score_is_read_or_none_is(benchmark, reply, score):
    assert benchmark.parse(reply) == (None if score is None else (score,))


@pytest.mark.parametrize("reply, scores", (
    ("8 7", (8, 7)), ("8 7\nThe first is better. Score: 3", (8, 7)), ("8,7", (8, 7)),
    ("9.5 1\n", (9.5, 1)), ("**8 7**\n\nBoth", (8, 7)), ("\n 8  7 \nx", (8, 7)),
    ("8/10 7/10", (8, 7)), ("Scores: 8 7", (8, 7)), ("<think>9 9</think>\n6 5", (6, 5)),
    *((reply, None) for reply in (
        "", "8", "8 7 6", "0 7", "8 11", "-8 7", "8-7", "Both are good.\n8 7", "8 seven",
        "8/100 7/100", "<think>8 7", "8 7 because", "1.2.3 4"))))
def test_the_two_scores_of_llava_bench_are_read(reply, scores):
    assert LLAVA_BENCH.parse(reply) == scores


# --- numbers, worked out by hand -----------------------------------------------------------------

def values(benchmark, folder, replies):
    """metric -> (value, n) over a list of replies for each question, by the shared bootstrap."""
    counted = []
    for asked, texts in zip(benchmark.load(folder), replies, strict=True):
        scores = [s for s in map(benchmark.parse, texts) if s is not None]
        counted.append((asked.image, benchmark.counts(asked, scores)))
    assert {n for _, count in counted for n in count} <= benchmark.metrics.keys()
    ratios = metrics.tabled(counted, benchmark.metrics)
    weights = metrics.bootstrap_weights(len(ratios["unscored"]), 50, np.random.default_rng(0))
    return {n: (e["value"], e["n"]) for n, e in metrics.estimates(ratios, weights, {}).items()}


def test_mm_vet_is_the_mean_mark_in_all_and_by_ability(tmp_path):
    found = values(MM_VET, write(tmp_path), [["0.5", "Score: 1.0"], ["0.25"], ["1"]])
    # 0.75, 0.25 and 1: ocr is the first two, math the first, the other four the last.
    assert found == {"total": (pytest.approx(2 / 3, abs=1e-6), 3), "ocr": (0.5, 2),
                     "math": (0.75, 1), "rec": (1, 1), "know": (1, 1), "gen": (1, 1),
                     "spat": (1, 1), "unscored": (0, 3)}
    found = values(MM_VET, tmp_path, [["hm"], ["0.25", "hm"], ["1.0"]])
    assert found["total"] == (0.625, 2) and found["ocr"] == (0.25, 1) and "math" not in found
    assert found["unscored"] == (pytest.approx(1 / 3, abs=1e-6), 3)


def test_llava_bench_is_a_ratio_of_sums_and_a_tie_is_one(tmp_path):
    found = values(LLAVA_BENCH, write(tmp_path),
                   [["8 7\nwhy"], ["9 9"], ["10 5", "8 6", "no"], ["4 1"]])
    # Third question: 9 and 5.5. Not the mean of the questions' ratios, which is 0.68.
    assert found["total"] == (0.75, 30)
    assert found["conv"][0] == pytest.approx(8 / 12, abs=1e-6) and found["detail"][0] == 1
    assert found["complex"][0] == pytest.approx(5.5 / 9, abs=1e-6)
    assert found["reference_score"] == (7.5, 4) and found["answer_score"] == (5.625, 4)


def test_mmhal_has_the_mean_rating_and_the_share_below_three(tmp_path):
    replies = [["Rating: 6"], ["Rating: 3"], ["Rating: 2"], ["Rating: 0"], ["Rating: 5"],
               ["Rating: 2", "Rating: 4"], ["none"], ["Rating: 1"]]
    found = values(MMHAL, write(tmp_path), replies)
    # 6 3 2 0 5 3 - 1, and 0 0 1 1 0 1/2 - 1: by the mean of its repeats the sixth would count as 0.
    assert found["rating"] == (pytest.approx(20 / 7, abs=1e-6), 7)
    assert found["hallucination"] == (0.5, 7) and found["unscored"] == (0.125, 8)
    assert [found[t][0] for t in TYPES if t in found] == [6, 3, 2, 0, 5, 3, 1]


# --- asking a judge ------------------------------------------------------------------------------

SCORES = {"a": "Score: 0.5", "b": "1.0", "c": "0.0", "d": "0.25",
          "e": "Score: 0.75, \u2028 nearly. ä", "f": "0.9"}
ALL = [[(0.5,)], [(1.0,)], [(0.0,)], [(0.25,)], [(0.75,)], [(0.9,)]]


def scored(number, body):
    return completion(SCORES[question(body)])


def ask(endpoint, folder, *texts, **changes):
    return [found for found, _ in judgements(endpoint, folder, *texts, **changes)]


def judgements(endpoint, folder, *texts, **changes):
    settings = {"temperature": 0.2, "repeats": 1, "attempts": 1} | changes
    return judged.ask(endpoint, folder, MM_VET, prompts(*texts), **settings,
                      names=[(f"question {t}", f"method {n}") for n, t in enumerate(texts)])


@pytest.fixture
def judge(server):
    server.reply = scored
    return server


def test_scores_come_in_the_order_of_the_prompts(endpoint, judge, tmp_path):
    found = ask(endpoint, tmp_path / "new", *"dabd", repeats=2)
    assert found == [[(0.25,)] * 2, [(0.5,)] * 2, [(1.0,)] * 2, [(0.25,)] * 2]
    assert Counter(judge.questions()) == {"d": 2, "a": 2, "b": 2}, "asked twice, paid once"
    body = judge.seen[0][2]
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.2, 1.0, 64)
    seeds = {b["seed"] for _, _, b in judge.seen}
    assert len(seeds) == 6 and all(0 <= s < 2**31 for s in seeds)


def test_a_reply_belongs_to_its_prompt_model_and_settings(
        endpoint, judge, tmp_path, monkeypatch):
    first = ask(endpoint, tmp_path, "a")
    for changes in ({"temperature": 0.3}, {"repeats": 2}):
        ask(endpoint, tmp_path, "a", **changes)
    ask(replace(endpoint, model="other"), tmp_path, "a")
    assert len(judge.seen) == 4
    # A rerun asks nobody: it needs no server and no key.
    monkeypatch.delenv("TEST_KEY")
    gone = replace(endpoint, url="https://models.invalid/v1")
    assert ask(gone, tmp_path, "a", attempts=3) == first and len(judge.seen) == 4
    with pytest.raises(Refusal, match="no key"):
        ask(gone, tmp_path, *"ab")


def test_what_cannot_be_read_is_asked_again_and_then_is_unscored(endpoint, judge, tmp_path):
    left = iter(("hm", "0.0", "hm", "hm", "hm"))
    judge.reply = lambda number, body: completion(next(left))
    one, none = (ask(replace(endpoint, at_once=1), tmp_path, text, attempts=3) for text in "ab")
    assert one == [[(0.0,)]] and none == [[]]
    assert Counter(judge.questions()) == {"a": 2, "b": 3}
    assert len({b["seed"] for _, _, b in judge.seen}) == 5


def test_each_reply_is_on_the_disk_before_the_next_question(
        endpoint, judge, tmp_path, monkeypatch):
    synced, sizes, fsync = [], [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda n: synced.append(os.fstat(n).st_size) or fsync(n))

    def look(number, body):
        sizes.append(file.stat().st_size if file.exists() else 0)
        return scored(number, body)

    judge.reply, file = look, tmp_path / judged.REPLIES
    ask(replace(endpoint, at_once=1), tmp_path, *"abc")
    assert synced[:2] == sizes[1:] and 0 == sizes[0] < sizes[1] < sizes[2] < synced[2]


def test_a_failure_keeps_what_came_and_the_rest_alone_is_asked_later(endpoint, judge, tmp_path):
    def busy(number, body):
        while len(judge.seen) < 3:
            time.sleep(0.01)
        if question(body) == "b":
            return 503, {}, {"error": "busy"}
        time.sleep(0.3)  # under way while b fails
        return scored(number, body)

    judge.reply = busy
    with pytest.raises(Refusal, match="HTTP 503: busy; 2 of this batch's 6 had been answered"):
        ask(replace(endpoint, at_once=3, retries=0), tmp_path, *"abcdef")
    judge.reply = scored
    assert ask(endpoint, tmp_path, *"abcdef") == ALL
    assert sorted(judge.questions()) == list("abbcdef")


def test_a_torn_last_line_is_cut_off_and_a_damaged_one_named(endpoint, judge, tmp_path):
    alone, file = replace(endpoint, at_once=1), tmp_path / judged.REPLIES
    expected = ask(alone, tmp_path, *"abe")
    content = file.read_bytes()
    begin, letter = content[:-1].rindex(b"\n") + 1, content.rindex("ä".encode())
    for cut in (begin, begin + 1, letter + 1, len(content) - 1):
        file.write_bytes(content[:cut])
        judge.seen.clear()
        assert ask(alone, tmp_path, *"abe") == expected
        assert judge.questions() == ["e"] and file.read_bytes() == content
    first, *others = content.splitlines(keepends=True)
    for line in (b"{}", b"[1]", b'{"key": "x"}', b"\xff"):
        file.write_bytes(first + line + b"\n" + b"".join(others))
        with pytest.raises(Refusal, match=r"replies\.jsonl, line 2: "):
            ask(endpoint, tmp_path, "a")


@pytest.mark.parametrize("reply, why", (
    (completion("rubbish"), "no single score in the reply"),
    (completion("Score: 0.5 or 0.7"), "no single score in the reply"),
    (completion("half"), "no single score in the reply"), (completion(None), "empty reply"),
    (completion("Score:", "length"), "reply cut off"),
    (completion("<think>Score: 0.5"), "reply of thoughts alone"),
    (completion("<think>hm</think>"), "reply of thoughts alone"),
    (completion("", "content_filter"), "reply stopped by a filter"),
    ((200, {}, {"id": "x", "choices": []}), "empty reply"),
    ((400, {}, {"error": "no"}), "request refused, HTTP 400")))
def test_an_answer_without_a_score_has_its_reason_and_the_others_go_on(
        endpoint, judge, tmp_path, reply, why):
    judge.reply = lambda number, body: reply if question(body) == "b" else scored(number, body)
    assert judgements(endpoint, tmp_path, *"abc", attempts=2) == [
        ([(0.5,)], ""), ([], why), ([(0.0,)], "")]
    refused = reply[0] != 200
    assert Counter(judge.questions()) == {"a": 1, "b": 1 if refused else 2, "c": 1}
    lines = {x["question"]: x for x in read_lines(tmp_path / judged.REPLIES)}
    assert lines["question a"] | {"key": 0} == {
        "key": 0, "model": "some/model", "benchmark": "mm-vet", "question": "question a",
        "methods": ["method 0"], "status": 200, "finish_reason": "stop", "reply": "Score: 0.5"}
    assert lines["question b"]["status"] == reply[0]
    # The next run asks again what was refused, and nothing else.
    judge.seen.clear()
    judge.reply = scored
    assert ask(endpoint, tmp_path, *"abc", attempts=2) == [
        [(0.5,)], [(1.0,)] if refused else [], [(0.0,)]]
    assert judge.questions() == ["b"] * refused


def test_a_judge_that_refuses_everything_ends_the_run_and_is_asked_again(
        endpoint, judge, tmp_path):
    judge.reply = lambda number, body: (400, {}, {"error": {"message": "no such model"}})
    with pytest.raises(Refusal, match="refused, HTTP 400: no such model; change what it names"):
        ask(endpoint, tmp_path, *"abc", attempts=3)
    assert sorted(judge.questions()) == list("abc")
    judge.reply = scored
    assert ask(endpoint, tmp_path, *"abc") == ALL[:3]


def test_two_processes_do_not_pay_for_the_same(endpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "LOCK_PATIENCE", 0)
    with (stages.locked(tmp_path / ".replies.lock", ""),
          pytest.raises(Refusal, match="another process asks a judge")):
        ask(endpoint, tmp_path, "a")


@pytest.mark.parametrize("at_once", (1, 3))
def test_a_killed_process_goes_on_and_has_paid_once_for_each_reply(
        endpoint, judge, tmp_path, at_once):
    held, client = threading.Semaphore(0), replace(endpoint, at_once=at_once, retries=0)

    def hold_after_three(number, body):
        if number >= 3:
            held.release()
            judge.ended.wait(20)
        return scored(number, body)

    judge.reply = hold_after_three
    child = os.fork()
    if child == 0:
        try:
            ask(client, tmp_path, *"abcdef")
        finally:
            os._exit(1)
    for _ in range(at_once):  # each worker asks on when its reply is on the disk
        assert held.acquire(timeout=30)
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    judge.reply = scored
    asked = len(judge.seen)
    assert (tmp_path / judged.REPLIES).read_bytes().count(b"\n") == 3
    assert ask(client, tmp_path, *"abcdef") == ALL and len(judge.seen) == asked + 3
