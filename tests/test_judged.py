"""The benchmarks with a judge: official layouts, replies as judges write them, numbers by hand."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from bpo import metrics, official
from bpo.judged import JUDGED, LLAVA_BENCH, MM_VET, MMHAL, TYPES
from bpo.params import Refusal

VET = {
    "v1_0": {"imagename": "v1_0.png", "question": "What is x?", "answer": "-1<AND>-5",
             "imagesource": "made up", "capability": ["math", "ocr"]},
    "v1_1": {"imagename": "v1_1.jpg", "question": "What is {answer} here?",
             "answer": "eight <OR> 8.0", "imagesource": "made up", "capability": ["ocr"]},
    "v1_2": {"imagename": "v1_1.jpg", "question": "Is it ä?", "answer": "no",
             "imagesource": "made up", "capability": ["rec", "know", "gen", "spat"]}}
LLAVA = {
    "questions.jsonl": [
        {"question_id": 0, "image": "001.jpg", "text": "Name it.", "category": "conv"},
        {"question_id": 1, "image": "001.jpg", "text": "Describe it.", "category": "detail"},
        {"question_id": 2, "image": "002.jpg", "text": "Why?", "category": "complex"},
        {"question_id": 3, "image": "002.jpg", "text": "How many?", "category": "conv"}],
    # In another order, as no official file is: they are matched by number.
    "answers_gpt4.jsonl": [
        {"question_id": n, "prompt": "p", "answer_id": "a", "model_id": "gpt-4-0314",
         "metadata": {}, "text": f"reference {n}"} for n in (2, 0, 3, 1)],
    "context.jsonl": [{"id": "002", "image": "002.jpg", "caption": "Two mugs."},
                      {"id": "001", "image": "001.jpg", "caption": "A hill."}]}
HAL = [{"question_type": kind, "question_topic": "outdoor", "image_id": f"id{n}",
        "image_src": f"https://x.invalid/8/{n}_o.jpg", "image_content": ["Bus", "Car"],
        "question": f"question {n}", "gt_answer": f"answer {n}", "model_answer": ""}
       for n, kind in enumerate(TYPES)]


def write(folder, *, vet=VET, llava=LLAVA, hal=HAL):
    (folder / "mm-vet.json").write_text(json.dumps(vet))
    (folder / "response_template.json").write_text(json.dumps(hal))
    for name, lines in llava.items():
        (folder / name).write_text("".join(f"{json.dumps(line)}\n" for line in lines) + "\n")
    return folder


# --- files and prompts ---------------------------------------------------------------------------

def test_mm_vet_is_read_from_its_file(tmp_path):
    first, second, third = MM_VET.load(write(tmp_path))
    assert (first.id, first.image, first.text) == ("v1_0", "v1_0.png", "What is x?")
    assert (first.label, second.label, third.label) == ("-1 <AND> -5", "eight <OR> 8.0", "no")
    assert (first.kind, second.kind, third.kind) == ("ocr math", "ocr", "rec know gen spat")


def test_llava_bench_joins_its_three_files(tmp_path):
    questions = LLAVA_BENCH.load(write(tmp_path))
    assert [(q.id, q.image, q.text, q.kind, q.label, q.context) for q in questions[1:3]] == [
        ("1", "001.jpg", "Describe it.", "detail", "reference 1", "A hill."),
        ("2", "002.jpg", "Why?", "complex", "reference 2", "Two mugs.")]
    assert len(questions) == 4


def test_mmhal_names_its_images_by_the_end_of_their_address(tmp_path):
    questions = MMHAL.load(write(tmp_path))
    assert [q.kind for q in questions] == list(TYPES) and len(TYPES) == 8
    q = questions[3]
    assert (q.id, q.image, q.text, q.label, q.context) == (
        "id3", "3_o.jpg", "question 3", "answer 3", "Bus, Car")


@pytest.mark.parametrize("name", JUDGED)
def test_a_prompt_holds_all_that_a_judge_needs_and_nothing_is_filled_in_twice(tmp_path, name):
    benchmark = JUDGED[name]
    question = replace(benchmark.load(write(tmp_path))[1], context="a {answer} in brackets")
    answer = "a {reference} of mine {0} {}"
    message, = benchmark.prompt(question, answer)
    assert message["role"] == "user"
    text = message["content"]
    for part in (question.text, question.label, answer):
        assert part in text
    assert (question.context in text) == (benchmark is not MM_VET)
    assert text.rindex(question.label) < text.rindex(answer) or benchmark is LLAVA_BENCH
    for place in ("{question}", "{context}"):
        assert place not in text
    blank = replace(question, text="", label="", context="")
    assert text.count("{answer}") == question.text.count("{answer}") + (benchmark is not MM_VET)
    assert "{" not in benchmark.prompt(blank, "")[0]["content"]


def test_what_llava_bench_calls_the_first_answer_is_the_reference(tmp_path):
    question = LLAVA_BENCH.load(write(tmp_path))[0]
    text = LLAVA_BENCH.prompt(question, "mine")[0]["content"]
    assert text.index("assistant 1:\nreference 0") < text.index("assistant 2:\nmine")


def without(record, name):
    return {k: v for k, v in record.items() if k != name}


@pytest.mark.parametrize("benchmark, files, said", (
    (MM_VET, {"vet": [1]}, r"mm-vet\.json: is not the JSON"),
    (MM_VET, {"vet": {}}, r"mm-vet\.json: has no question"),
    (MM_VET, {"vet": {"v1_7": without(VET["v1_0"], "imagename")}}, "v1_7: 'imagename'"),
    (MM_VET, {"vet": {"v1_7": VET["v1_0"] | {"answer": 3}}}, "v1_7: 'answer'"),
    (MM_VET, {"vet": {"v1_7": VET["v1_0"] | {"capability": ["ocr", "smell"]}}},
     "v1_7: 'smell' is none of rec, ocr, know, gen, spat, math"),
    (MM_VET, {"vet": {"v1_7": "text"}}, "v1_7: 'capability'"),
    (LLAVA_BENCH, {"llava": LLAVA | {"answers_gpt4.jsonl": LLAVA["answers_gpt4.jsonl"][1:]}},
     r"questions\.jsonl, line 3: .*answers_gpt4\.jsonl has nothing for 2"),
    (LLAVA_BENCH, {"llava": LLAVA | {"context.jsonl": LLAVA["context.jsonl"][:1]}},
     r"questions\.jsonl, line 1: .*context\.jsonl has nothing for '001\.jpg'"),
    (LLAVA_BENCH, {"llava": LLAVA | {"questions.jsonl": [LLAVA["questions.jsonl"][0]] * 2}},
     "one twice"),
    (LLAVA_BENCH, {"llava": LLAVA | {"questions.jsonl": [
        LLAVA["questions.jsonl"][0] | {"category": "llava_bench_conv"}]}},
     "line 1: 'llava_bench_conv' is none of conv, detail, complex"),
    (LLAVA_BENCH, {"llava": LLAVA | {"context.jsonl": [["001.jpg"]]}},
     r"context\.jsonl, line 1: is not the JSON"),
    (MMHAL, {"hal": {"a": 1}}, r"response_template\.json: is not the JSON"),
    (MMHAL, {"hal": [HAL[0], HAL[1] | {"question_type": "odd"}]}, "question 2: 'odd' is none of"),
    (MMHAL, {"hal": [without(HAL[0], "gt_answer")]}, "question 1: 'gt_answer'"),
    (MMHAL, {"hal": [HAL[0] | {"image_content": "Bus"}]}, "question 1: 'image_content'")))
def test_a_file_that_is_not_the_official_one_is_refused(tmp_path, benchmark, files, said):
    with pytest.raises(Refusal, match=said) as refusal:
        benchmark.load(write(tmp_path, **files))
    assert "again" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("content, said", ((b"<html>", "is not the JSON"),
                                           (b"\x89PNG\xff", "is no text")))
@pytest.mark.parametrize("benchmark", JUDGED.values(), ids=JUDGED)
def test_another_thing_in_a_file_s_place_is_refused(tmp_path, benchmark, content, said):
    (write(tmp_path) / benchmark.files["questions"]).write_bytes(content)
    with pytest.raises(Refusal, match=said):
        benchmark.load(tmp_path)


# --- replies -------------------------------------------------------------------------------------

@pytest.mark.parametrize("reply, score", (
    ("0.5", 0.5), ("Score: 0.5", 0.5), ("score=0.3", 0.3), ("**Score:** 0.7", 0.7), ("1", 1),
    ("**Score: 1.0**", 1), (" 0.0\n", 0), ("0.4.\n", 0.4), ("1.", 1), ("0.5\nHalf of it.", 0.5),
    ("Only one part is there.\n\nScore: 0.5", 0.5), ("Score: 0.5/1", 0.5), ("0.5 / 1.0", 0.5),
    ("Score: 0.6. So, once more: score: 0.6", 0.6), ("`0.25`", 0.25),
    ("<think>Score: 0.1? Or Score: 0.9.</think>\n\nScore: 0.9", 0.9),
    ("no tag at the start: 0.1</think>0.2", 0.2)))
def test_a_mark_of_mm_vet_is_read(reply, score):
    assert MM_VET.parse(reply) == (score,)


@pytest.mark.parametrize("reply", (
    "", "right", "Score:", "Score: 1.5", "Score: -0.5", "-0.1", "5", "Score: 8", "Score: 5/10",
    "1/2", "Score: 1/2", "0.5-0.7", "Score: 0.5 - 0.7", "Score: 0,5", "Score: 0.5 or score: 0.6",
    "1 of the two parts is there", "2 of 4 are right. 0.5", "1. The answer names the hill.",
    "<think>Score: 0.5", "Score: 0.5.1", "Score: 1x", "underscore: 0.5", "Score: nan"))
def test_what_holds_no_single_mark_of_mm_vet_is_not_read(reply):
    assert MM_VET.parse(reply) is None


@pytest.mark.parametrize("reply, scores", (
    ("8 7", (8, 7)), ("8 7\nThe first is better. Score: 3", (8, 7)), ("8,7", (8, 7)),
    ("8, 7", (8, 7)), ("9.5 1\n", (9.5, 1)), ("10 10", (10, 10)), ("**8 7**\n\nBoth", (8, 7)),
    ("\n 8  7 \nx", (8, 7)), ("8/10 7/10", (8, 7)), ("Scores: 8 7", (8, 7)), ("8; 7.", (8, 7)),
    ("<think>9 9</think>\n6 5", (6, 5))))
def test_the_two_scores_of_llava_bench_are_read(reply, scores):
    assert LLAVA_BENCH.parse(reply) == scores


@pytest.mark.parametrize("reply", (
    "", "8", "8 7 6", "0 7", "8 11", "-8 7", "8-7", "87", "Both are good.\n8 7", "8 seven",
    "8/100 7/100", "Assistant 1: 8", "<think>8 7", "8 7 because", "1.2.3 4"))
def test_what_does_not_begin_with_two_scores_is_not_read(reply):
    assert LLAVA_BENCH.parse(reply) is None


@pytest.mark.parametrize("reply, score", (
    ("Rating: 4", 4), ("It makes up a dog.\nRating: 0", 0), ("**Rating**: 6", 6), ("rating: 3.", 3),
    ("Rating: 4/6", 4), ("Rating: 5, very informative, without hallucination", 5), ("2", 2),
    ("Rating: 4.0", 4), ("5 dogs are named.\nRating: 1", 1), ("Rating: 2\n\nRating: 2", 2)))
def test_a_rating_of_mmhal_is_read(reply, score):
    assert MMHAL.parse(reply) == (score,)


@pytest.mark.parametrize("reply", (
    "", "Rating: 10", "Rating: 7", "Rating: -1", "Rating: 4.5", "Rating: 3-4", "Rating: 3 or 4?\n"
    "Rating: 4", "Rating: high", "4 things are right", "Rating: 40", "The rating is good", "3/4"))
def test_what_holds_no_single_rating_of_mmhal_is_not_read(reply):
    assert MMHAL.parse(reply) is None


# --- numbers, worked out by hand -----------------------------------------------------------------

def values(benchmark, folder, replies):
    """metric -> (value, n) over a list of replies for each question, by the shared bootstrap."""
    found = {}
    for question, mine in zip(benchmark.load(folder), replies, strict=True):
        scores = [s for s in map(benchmark.parse, mine) if s is not None]
        for name, count in benchmark.counts(question, scores).items():
            found.setdefault(name, []).append((question.image, count))
    assert found.keys() <= benchmark.metrics.keys()
    out = {}
    for name, counts in found.items():
        ratios = metrics.by_image(counts)
        weights = metrics.bootstrap_weights(len(ratios), 50, np.random.default_rng(0))
        estimate = metrics.estimate(ratios, weights)
        out[name] = (estimate["value"], estimate["n"])
    return out


def test_mm_vet_is_the_mean_mark_in_all_and_by_ability(tmp_path):
    found = values(MM_VET, write(tmp_path), [["0.5", "Score: 1.0"], ["0.25"], ["1"]])
    # 0.75, 0.25 and 1: ocr is the first two, math the first, the other four the last.
    assert found == {"total": (pytest.approx(2 / 3, abs=1e-6), 3), "ocr": (0.5, 2),
                     "math": (0.75, 1), "rec": (1, 1), "know": (1, 1), "gen": (1, 1),
                     "spat": (1, 1), "unscored": (0, 3)}


def test_a_question_without_a_mark_is_in_no_mean_and_is_counted(tmp_path):
    found = values(MM_VET, write(tmp_path), [["hm"], ["0.25", "hm"], ["1.0"]])
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
    assert found["unscored"] == (0, 4)
    found = values(LLAVA_BENCH, write(tmp_path), [["8 7"], ["0 0"], ["?"], ["8 1"]])
    assert found["total"] == (0.5, 16) and found["unscored"] == (0.5, 4)
    assert not {"detail", "complex"} & found.keys()


def test_mmhal_has_the_mean_rating_and_the_share_below_three(tmp_path):
    replies = [["Rating: 6"], ["Rating: 3"], ["Rating: 2"], ["Rating: 0"], ["Rating: 5"],
               ["Rating: 2", "Rating: 4"], ["none"], ["Rating: 1"]]
    found = values(MMHAL, write(tmp_path), replies)
    # 6 3 2 0 5 3 - 1, and 0 0 1 1 0 1/2 - 1: by the mean of its repeats the sixth would count as 0.
    assert found["rating"] == (pytest.approx(20 / 7, abs=1e-6), 7)
    assert found["hallucination"] == (0.5, 7) and found["unscored"] == (0.125, 8)
    assert [found[t][0] for t in TYPES if t in found] == [6, 3, 2, 0, 5, 3, 1]
    assert "holistic" not in found


@pytest.mark.parametrize("benchmark", JUDGED.values(), ids=JUDGED)
def test_what_a_folder_lacks_is_told_as_for_the_other_benchmarks(tmp_path, benchmark):
    with pytest.raises(Refusal, match=f"{re.escape(benchmark.title)} needs .*, images/ there; "
                                      "get "):
        official.require(benchmark, tmp_path)
    (write(tmp_path) / "images").mkdir()
    official.require(benchmark, tmp_path)
    assert benchmark.metrics["unscored"].more is False and "arXiv" in benchmark.about
