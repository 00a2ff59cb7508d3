"""Pairs: which rejected answers are kept, what the audit says of them, and the whole stage."""

import json

import pytest

from bpo import generate, metrics, pairs, records
from bpo.params import PairGeneration, Refusal
from bpo.records import Row


def row(row_id, answer, *, image="0.png", category="attribute", question="what colour ?"):
    return Row(row_id, None, image, ({"role": "user", "content": question},), answer, category)


# --- joining ------------------------------------------------------------------------------------

def test_a_positive_keeps_a_list_of_its_useful_rejected_answers():
    rows = [row("a", "red"), row("b", "a red dog")]
    lines, dropped = pairs.join(rows, {"weakened": {"a": "blue", "b": "a red cat"},
                                       "injected": {"a": "green", "b": "a blue dog"}})
    assert dropped == []
    assert lines[0] == {"id": "a", "image": "0.png", "category": "attribute",
                        "prompt": [{"role": "user", "content": "what colour ?"}], "chosen": "red",
                        "rejected": [{"source": "weakened", "text": "blue"},
                                     {"source": "injected", "text": "green"}]}
    assert [r["text"] for r in lines[1]["rejected"]] == ["a red cat", "a blue dog"]


@pytest.mark.parametrize("text, reason", [
    ("A red dog.", "equal to the annotation"), ("a Red dog", "equal but for case and punctuation"),
    (" A, red   dog!", "equal but for case and punctuation"), ("", "empty"), (" ... ", "empty")])
def test_an_answer_that_would_train_on_nothing_is_dropped_with_its_reason(text, reason):
    lines, dropped = pairs.join([row("a", "A red dog.")], {"weakened": {"a": text},
                                                           "injected": {"a": "a blue dog"}})
    assert dropped == [{"id": "a", "category": "attribute", "source": "weakened", "text": text,
                        "reason": reason}]
    assert [r["source"] for r in lines[0]["rejected"]] == ["injected"]


def test_a_positive_without_a_rejected_answer_stays():
    lines, dropped = pairs.join([row("a", "red")], {"weakened": {"a": "red"},
                                                    "injected": {"a": "Red!"}})
    assert [(k["id"], k["rejected"]) for k in lines] == [("a", [])]
    assert len(dropped) == 2


# --- the audit ----------------------------------------------------------------------------------

TRUTH = {
    "vocabulary": {"objects": {"dog": ["dog", "dogs"], "cat": ["cat", "cats"]},
                   "colours": ["red", "blue"]},
    "images": {"0.png": {"objects": [{"name": "dog", "colour": "red"}]},
               "1.png": {"objects": [{"name": "cat", "colour": "blue"}]}},
    "rows": {"colour": {"category": "attribute", "true": ["red"], "prior": ["blue"], "kind": None},
             "caption": {"category": "caption", "true": ["x"], "prior": [], "kind": None},
             "yes": {"category": "presence", "true": ["yes"], "prior": [], "kind": None}}}
LONG = "there is a red dog on a mat in the house of my friend"


@pytest.fixture
def audited():
    rows = [row("colour", "red"), row("caption", LONG, category="caption"),
            row("yes", "yes", image="1.png", category="presence"),
            row("unknown", "red", image="1.png")]
    made = {"weakened": {"colour": "blue", "caption": "a dog", "yes": "yes",
                         "unknown": "a red one"},
            "injected": {"colour": "blue .", "caption": LONG.replace("dog", "cat"), "yes": "",
                         "unknown": "blue"}}
    lines, dropped = pairs.join(rows, made)
    return pairs.audit(lines, dropped, TRUTH, seed=0)


def test_the_audit_counts_pairs_and_positives(audited):
    assert (audited["pairs"], audited["positives"]) == (6, 3)
    assert (audited["weakened"]["kept"], audited["weakened"]["share_kept"]) == (3, 0.75)
    assert audited["weakened"]["dropped"] == {"equal to the annotation": 1}
    assert audited["injected"]["dropped"] == {"empty": 1}


def test_the_audit_counts_by_category(audited):
    assert audited["weakened"]["by_category"] == {
        "attribute": {"rows": 2, "kept": 2}, "caption": {"rows": 1, "kept": 1},
        "presence": {"rows": 1, "kept": 0}}
    table = pairs.audit_table(audited)
    assert {"source": "injected", "category": "presence", "rows": 1, "kept": 0,
            "share kept": "0.00"} in table
    assert len(table) == 6


def test_the_audit_measures_the_gap_in_length(audited):
    # Words: 1 - 1, 2 - 14, 3 - 1; and 2 - 1 (the stop stands alone), 14 - 14, 1 - 1.
    assert audited["weakened"]["length_gap"]["value"] == pytest.approx(-10 / 3, abs=1e-6)
    assert audited["injected"]["length_gap"]["value"] == pytest.approx(1 / 3, abs=1e-6)
    assert audited["weakened"]["length_gap"]["n"] == 3


def test_the_audit_finds_near_duplicates(audited):
    # One word of fourteen differs: 13 / 14 of the words match.
    assert audited["injected"]["near_duplicates"]["value"] == pytest.approx(1 / 3, abs=1e-6)
    assert audited["weakened"]["near_duplicates"]["value"] == 0


def test_the_audit_finds_rejected_answers_that_are_right(audited):
    # "a dog" is a right caption of an image with a dog; "unknown" is in no truth.
    assert audited["weakened"]["truth_right"] == pytest.approx(
        audited["weakened"]["truth_right"] | {"value": 1 / 2, "n": 2})
    assert audited["injected"]["truth_right"]["value"] == 0


def test_the_audit_says_how_often_the_sources_agree(audited):
    assert audited["sources_agree"] == pytest.approx(1 / 3, abs=1e-6)  # blue and "blue ."


def test_without_a_truth_file_nothing_is_said_of_it():
    lines, dropped = pairs.join([row("a", "red")], {"weakened": {"a": "blue"},
                                                    "injected": {"a": "red"}})
    found = pairs.audit(lines, dropped, {"vocabulary": {}, "images": {}, "rows": {}}, seed=0)
    assert found["weakened"]["truth_right"] is None
    assert found["injected"]["length_gap"] is None
    assert (found["injected"]["kept"], found["sources_agree"]) == (0, 0)


# --- prompts, layouts, files --------------------------------------------------------------------

def test_a_prompt_s_places_are_filled():
    asked = row("a", "red", question="what colour ?")
    assert pairs.fill("Q {question} A {answer} W", asked) == "Q what colour ? A red W"
    assert pairs.fill("{question} {question} {answer}", asked) == "what colour ? what colour ? red"


def test_other_braces_stay_as_they_are():
    assert pairs.fill('{"a": {}} {x} {answer}', row("a", "red")) == '{"a": {}} {x} red'


def test_braces_in_the_data_are_not_filled():
    braces = row("a", "it says {question}", question="what is in {answer} ?")
    assert pairs.fill("{question} : {answer}", braces) == \
        "what is in {answer} ? : it says {question}"


def test_the_question_may_stand_behind_the_answer():
    assert pairs.fill("{answer} to {question}", row("a", "red", question="q ?")) == "red to q ?"


LINES = [
    {"id": "a", "image": "0.png", "category": "x", "prompt": [{"role": "user", "content": "q ?"}],
     "chosen": "red", "rejected": [{"source": "weakened", "text": "blue"},
                                   {"source": "injected", "text": "green"}]},
    {"id": "b", "image": "1.png", "category": "x", "prompt": [{"role": "user", "content": "r ?"}],
     "chosen": "dog", "rejected": [{"source": "injected", "text": "cat"}]},
    {"id": "c", "image": "1.png", "category": "x", "prompt": [{"role": "user", "content": "s ?"}],
     "chosen": "yes", "rejected": []}]


def test_pairs_become_one_preference_row_a_rejected_answer(tmp_path):
    rows = pairs.to_preferences(LINES, tmp_path)
    assert rows[0] == {"images": [str(tmp_path / "0.png")],
                       "prompt": [{"role": "user", "content": "q ?"}],
                       "chosen": [{"role": "assistant", "content": "red"}],
                       "rejected": [{"role": "assistant", "content": "blue"}]}
    assert [r["rejected"][0]["content"] for r in rows] == ["blue", "green", "cat"]
    weak = pairs.to_preferences(LINES, tmp_path, sources=("weakened",))
    assert [r["rejected"][0]["content"] for r in weak] == ["blue"]


def test_preference_rows_become_completions_in_order_and_as_often(tmp_path):
    rows = pairs.to_completions(pairs.to_preferences(LINES, tmp_path))
    assert [r["completion"][0]["content"] for r in rows] == ["red", "red", "dog"]
    assert set(rows[0]) == {"images", "prompt", "completion"}
    assert rows[2]["images"] == [str(tmp_path / "1.png")]


def test_pairs_are_read_as_they_were_written(tmp_path):
    records.write_lines(tmp_path / "pairs.jsonl", LINES)
    assert pairs.read_pairs(tmp_path / "pairs.jsonl") == LINES


def test_a_missing_file_of_pairs_names_its_notebook(tmp_path):
    with pytest.raises(Refusal, match=r"2_pair_generation\.ipynb"):
        pairs.read_pairs(tmp_path / "pairs.jsonl")


@pytest.mark.parametrize("text", ("", '{"id": "a"}\n', "5\n", "[]\n"))
def test_a_file_that_holds_no_pairs_is_refused(tmp_path, text):
    (tmp_path / "pairs.jsonl").write_text(text)
    with pytest.raises(Refusal, match="must hold lines with id, image, prompt, chosen"):
        pairs.read_pairs(tmp_path / "pairs.jsonl")


def test_a_broken_line_is_named(tmp_path):
    good = json.dumps(LINES[0])
    (tmp_path / "pairs.jsonl").write_text(f"{good}\n{good}\n{good[:50]}\n")
    with pytest.raises(Refusal, match="line 3 is not JSON"):
        pairs.read_pairs(tmp_path / "pairs.jsonl")


# --- the stage ----------------------------------------------------------------------------------

FILES = ("pairs.jsonl", "dropped.jsonl", "weakened.jsonl", "injected.jsonl")


@pytest.fixture(scope="module")
def parameters(model_folder, text_folder, data_file, prompt_files):
    return PairGeneration(study="s", model=str(model_folder), text_model=str(text_folder),
                          data=str(data_file), max_new_tokens=6, batch_size=5, **prompt_files)


@pytest.fixture(scope="module")
def uninterrupted(parameters, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BPO_OUTPUTS", str(tmp_path_factory.mktemp("pairs")))
        result = pairs.run(parameters)
        assert pairs.run(parameters).metrics == result.metrics, "read again, the numbers differ"
    return result


def written(result):
    return {f: (result.folder / f).read_bytes() for f in FILES}


def test_the_stage_writes_a_line_a_positive_and_its_audit(uninterrupted, data_file):
    rows, _ = records.read_rows(data_file)
    lines = pairs.read_pairs(uninterrupted.folder / "pairs.jsonl")
    assert [k["id"] for k in lines] == [r.id for r in rows]
    assert [k["chosen"] for k in lines] == [r.answer for r in rows]
    dropped = records.read_lines(uninterrupted.folder / "dropped.jsonl")
    kept = sum(len(k["rejected"]) for k in lines)
    assert kept + len(dropped) == 2 * len(rows)
    assert kept > 0
    found = uninterrupted.metrics
    assert (found["rows"], found["pairs"], found["rows_skipped"]) == (len(rows), kept, {})
    assert set(uninterrupted.manifest["inputs"]) == {
        "model", "text_model", "data", "truth", "describe_prompt", "question_prompt"}


def test_rejected_answers_are_what_the_models_said(uninterrupted):
    said = {s: {x["id"]: x["text"] for x in records.read_lines(uninterrupted.folder / f"{s}.jsonl")}
            for s in pairs.SOURCES}
    for line in pairs.read_pairs(uninterrupted.folder / "pairs.jsonl"):
        for rejected in line["rejected"]:
            assert rejected["text"] == said[rejected["source"]][line["id"]]
            assert metrics.normalised(rejected["text"]) != metrics.normalised(line["chosen"])


def test_the_same_parameters_give_the_same_bytes_anywhere(uninterrupted, parameters, outputs):
    result = pairs.run(parameters)
    assert result.folder != uninterrupted.folder
    assert written(result) == written(uninterrupted)
    assert result.metrics == uninterrupted.metrics


@pytest.mark.parametrize("killed_at", (1, 4))
def test_an_interrupted_stage_goes_on_to_the_same_bytes(uninterrupted, parameters, outputs,
                                                        monkeypatch, killed_at):
    decode, calls = generate.decode, []

    def killed(*args, **options):
        calls.append(1)
        if len(calls) > killed_at:
            raise KeyboardInterrupt
        return decode(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "decode", killed)
        with pytest.raises(KeyboardInterrupt):
            pairs.run(parameters)
    counted = []
    monkeypatch.setattr(generate, "decode",
                        lambda *args, **options: counted.append(1) or decode(*args, **options))
    result = pairs.run(parameters)
    assert len(counted) == 6 - killed_at  # three batches of each source, none made twice
    assert written(result) == written(uninterrupted)


def test_another_seed_gives_other_pairs(uninterrupted, parameters, outputs):
    result = pairs.run(parameters.model_copy(update={"seed": 1}))
    assert written(result)["weakened.jsonl"] != written(uninterrupted)["weakened.jsonl"]


def test_the_checkpoint_itself_injects_errors_where_no_text_model_is_named(parameters, outputs):
    result = pairs.run(parameters.model_copy(update={"text_model": "", "rows": 3}))
    assert result.metrics["rows"] == 3
    assert len(records.read_lines(result.folder / "injected.jsonl")) == 3
    assert "text_model" not in result.manifest["inputs"]


def test_long_answers_are_dropped_and_counted(parameters):
    rows, skipped = pairs.read_annotated(parameters.model_copy(update={"max_words": 3}))
    assert {r.category for r in rows} == {"attribute", "presence"}
    assert skipped == {"answer longer than 3 words": 4}


def test_a_limit_that_drops_every_row_is_refused(parameters, data_file, outputs, tmp_path):
    entries = [e for e in json.loads(data_file.read_text()) if e["id"].startswith("caption")]
    (tmp_path / "rows.json").write_text(json.dumps(entries))
    changes = {"data": str(tmp_path / "rows.json"), "image_folder": str(data_file.parent),
               "max_words": 3}
    with pytest.raises(Refusal, match="every answer is longer than max_words = 3"):
        pairs.run(parameters.model_copy(update=changes))


def test_the_gallery_shows_pairs_with_both_rejected_answers(uninterrupted, parameters):
    cards = pairs.examples(parameters.model_copy(update={"gallery": 2}), uninterrupted)
    assert len(cards) == 2
    for card in cards:
        assert [r["source"] for r in card["rejected"]] == ["weakened", "injected"]
        assert card["image"].mode == "RGB" and card["noised"].size == (32, 32)
