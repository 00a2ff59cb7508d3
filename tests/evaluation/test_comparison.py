"""The comparison of methods: what each answer counts for, what the intervals allow to say, and the
whole stage on a small random model with random adapters."""

import json
import math
import weakref

import pandas
import pytest
import torch

from bpo.data import rows as data_rows
from bpo.evaluation import comparison, probe, under_noise
from bpo.models import checkpoint as checkpoints
from bpo.models import encoding, generate, tuned
from bpo.models.generate import Request
from bpo.params import QualitativeComparison, Refusal
from bpo.reports.tables import noise_views, score_tables
from bpo.study import results
from bpo.study.files import read_lines
from bpo.study.text import signed

TRUTH = {
    "vocabulary": {"objects": {"dog": ["dog", "dogs"], "cat": ["cat", "cats"],
                               "box": ["box", "boxes"]}, "colours": ["red", "blue"]},
    "images": {"0.png": {"objects": [{"name": "dog", "colour": "red"},
                                     {"name": "box", "colour": "blue"}]},
               "1.png": {"objects": [{"name": "cat", "colour": "blue"}]}},
    "rows": {"caption": {"category": "caption", "true": ["a dog"], "prior": [], "kind": None},
             "colour": {"category": "attribute", "true": ["red"], "prior": ["blue"], "kind": None},
             "typical": {"category": "attribute", "true": ["red"], "prior": ["red"], "kind": None},
             "both": {"category": "attribute", "true": ["red"], "prior": ["red", "blue"],
                      "kind": None},
             "pope": {"category": "presence", "true": ["no"], "prior": ["yes"],
                      "kind": "adversarial"},
             "plain": {"category": "presence", "true": ["yes"], "prior": [], "kind": None}}}


def line(row_id, base, bpo, *, image="0.png", p_true=None, p_prior=None):
    return {"id": row_id, "image": image, "category": "x", "question": "q ?", "annotated": "a",
            "answers": {"base": base, "bpo": bpo},
            "p_true": dict(zip(("base", "bpo"), p_true or ())),
            "logp_true": dict(zip(("base", "bpo"), map(math.log, p_true or ()))),
            "p_prior": dict(zip(("base", "bpo"), p_prior or ()))}


METHODS = ("base", "sft", "bpo")


# --- counts -------------------------------------------------------------------------------------

P = {"p_true": (0.7, 0.2), "p_prior": (0.1, 0.6)}


@pytest.mark.parametrize("row_id, base, bpo, chances, method, counts", [
    ("caption", "a dog", "a red dog and two cats", {}, "bpo",
     {"answer_words": (6, 1), "changed": (1, 1), "chair_s": (1, 1), "chair_i": (1, 2),
      "cover": (1, 2), "objects": (2, 1), "words": (6, 1)}),
    ("colour", "red", "Blue.", P, "base",
     {"answer_words": (1, 1), "changed": (0, 1), "colour_accuracy": (1, 1), "prior_rate": (0, 1),
      "p_true": (0.7, 1), "logp_true": (math.log(0.7), 1), "p_prior": (0.1, 1)}),
    ("colour", "red", "Blue.", P, "bpo",
     {"answer_words": (1, 1), "changed": (1, 1), "colour_accuracy": (0, 1), "prior_rate": (1, 1),
      "p_true": (0.2, 1), "logp_true": (math.log(0.2), 1), "p_prior": (0.6, 1)}),
    # Where the prior is right nothing counts for it.
    ("typical", "red", "blue", {}, "base",
     {"answer_words": (1, 1), "changed": (0, 1), "colour_accuracy": (1, 1)}),
    # A true answer that the prior suggests too is no prior's answer.
    ("both", "red", "blue", P, "base",
     {"answer_words": (1, 1), "changed": (0, 1), "colour_accuracy": (1, 1), "prior_rate": (0, 1),
      "p_true": (0.7, 1), "logp_true": (math.log(0.7), 1), "p_prior": (0.1, 1)}),
    ("both", "red", "blue", P, "bpo",
     {"answer_words": (1, 1), "changed": (1, 1), "colour_accuracy": (0, 1), "prior_rate": (1, 1),
      "p_true": (0.2, 1), "logp_true": (math.log(0.2), 1), "p_prior": (0.6, 1)}),
    # Without a truth only length and change are counted.
    ("unknown", "a red dog", "A red dog!", {}, "bpo", {"answer_words": (3, 1), "changed": (0, 1)})])
def test_an_answer_counts_as_by_hand(row_id, base, bpo, chances, method, counts):
    assert comparison.counts(line(row_id, base, bpo, **chances), method, TRUTH) == counts


@pytest.mark.parametrize("text, yes, right", [("No.", 0, 1), ("yes it is", 1, 0), ("a dog", 0, 0)])
def test_a_presence_question_counts_as_pope_does(text, yes, right):
    counts = comparison.counts(line("pope", text, "no"), "base", TRUTH)
    assert (counts["yes_rate"], counts["pope_adversarial"]) == ((yes, 1), (right, 1))
    assert not any(n.startswith("pope") for n in comparison.counts(line("plain", text, "no"),
                                                                   "base", TRUTH))


# --- scores -------------------------------------------------------------------------------------

LINES = [
    line("colour", "blue", "red", p_true=(0.2, 0.9), p_prior=(0.6, 0.1)),
    line("caption", "a dog and a cat", "a dog on a box"),
    line("pope", "yes", "no", image="1.png"), line("plain", "yes", "yes", image="1.png")]


@pytest.fixture(scope="module")
def scored():
    return comparison.score(LINES, TRUTH, ["base", "bpo"], seed=0, resamples=500)


@pytest.mark.parametrize("name, base, bpo", [
    ("colour_accuracy", 0, 1), ("p_true", 0.2, 0.9), ("p_prior", 0.6, 0.1), ("prior_rate", 1, 0),
    ("chair_s", 1, 0), ("chair_i", 0.5, 0), ("cover", 0.5, 1), ("pope_adversarial", 0, 1),
    ("yes_rate", 1, 0.5), ("changed", 0, 0.75), ("answer_words", 2, 2)])
def test_the_scores_are_those_by_hand(scored, name, base, bpo):
    values, contrasts = scored
    assert values["base"][name]["value"] == pytest.approx(base)
    assert values["bpo"][name]["value"] == pytest.approx(bpo)
    assert contrasts["base"]["bpo"][name]["value"] == pytest.approx(bpo - base)


def test_scores_say_what_they_are_out_of(scored):
    values, _ = scored
    assert {n: values["base"][n]["n"] for n in ("colour_accuracy", "yes_rate", "changed")} == {
        "colour_accuracy": 1, "yes_rate": 2, "changed": 4}
    assert "pope_random" not in values["base"]


def test_a_method_is_compared_with_every_baseline_but_itself(scored):
    _, contrasts = scored
    assert {a: list(m) for a, m in contrasts.items()} == {"base": ["bpo"]}
    lines = [x | {part: x[part] | ({"sft": x[part]["base"]} if x[part] else {})
                  for part in ("answers", "p_true", "logp_true", "p_prior")}
             for x in LINES]
    _, contrasts = comparison.score(lines, TRUTH, ["base", "sft", "bpo"], seed=0, resamples=200)
    assert {a: list(m) for a, m in contrasts.items()} == {"base": ["sft", "bpo"],
                                                          "sft": ["base", "bpo"]}
    # The same answers: no difference, and no doubt about it.
    same = contrasts["base"]["sft"]["chair_i"]
    assert (same["value"], same["low"], same["high"]) == (0, 0, 0)


@pytest.mark.parametrize("row_id, text, value", [
    ("colour", "Red.", 1), ("colour", "blue", 0), ("pope", "no", 1), ("pope", "yes", 0),
    ("caption", "a dog and a box", 1), ("caption", "a dog", 0.5),
    ("caption", "a dog and two cats , a cat", 0.5 - 2), ("caption", "nothing", 0),
    ("unknown", "a dog", None)])
def test_the_quality_of_an_answer_is_that_by_hand(row_id, text, value):
    assert comparison.quality(line(row_id, text, ""), "base", TRUTH) == value


@pytest.mark.parametrize("text", ("No.", "no , there is not"))
def test_a_presence_answer_is_as_good_as_pope_finds_it(text):
    asked = line("pope", text, "")
    assert comparison.counts(asked, "base", TRUTH)["pope_adversarial"] == (1, 1)
    assert comparison.quality(asked, "base", TRUTH) == 1


@pytest.mark.parametrize("row_id, text, words", [
    ("colour", "Red", set()), ("colour", "dark blue", {"dark", "blue"}),
    ("caption", "a dog and cats", {"cats"}), ("unknown", "a dog", set()),
    ("caption", "a Blue dog, a blue cat, a blue box, red", {("blue", "dog"), "cat"})])
def test_wrong_words_are_marked(row_id, text, words):
    assert score_tables.wrong_words(line(row_id, text, ""), "base", TRUTH) == words


@pytest.mark.parametrize("base, sft, bpo, sentence", [
    # the first follows the habit and bpo mends it, the second is right and bpo loses it
    ("blue red blue green", "blue red blue red", "red blue blue red",
     "Of 4 colour questions on x images to which the usual answer is wrong, base gives the usual "
     "one to 2 and the true one to 1; bpo now answers 1 of those 2 truly and has lost 1 of those "
     "1; sft now answers 0 of those 2 truly and has lost 0 of those 1."),
    (None, None, "red blue", "No truth file tells of a usual answer to the 2 x questions: those "
     "below are drawn by seed. bpo answers 1 of 2 otherwise than base.")])
def test_how_often_the_habit_is_followed_is_counted(base, sft, bpo, sentence):
    if base is None:
        lines = [line("unknown", "red", text) for text in bpo.split()]
    else:
        measured, chances = ("p_true", "p_prior", "logp_true"), dict.fromkeys(METHODS, 0.5)
        lines = [line("colour", "", "") | {"answers": dict(zip(METHODS, texts, strict=True)),
                                           **dict.fromkeys(measured, chances)}
                 for texts in zip(base.split(), sft.split(), bpo.split(), strict=True)]
    methods = METHODS if base else ("base", "bpo")
    assert score_tables.habit(lines, methods, TRUTH, "x").plain == sentence


# --- what may be said ---------------------------------------------------------------------------

def written(folder, values, contrasts, split="natural"):
    """The results of a comparison as notebook 4 reads them."""
    folder = folder / QualitativeComparison.notebook
    folder.mkdir(exist_ok=True)
    results.write(folder, results.compared(split, values, contrasts, comparison.METRICS))
    return results.read(folder)


def with_differences(folder, **intervals):
    """The results of a comparison whose differences of bpo to base are these intervals."""
    levels = {n: {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9} for n in intervals}
    contrasts = {n: {"value": (low + high) / 2, "low": low, "high": high, "n": 9}
                 for n, (low, high) in intervals.items()}
    tuned_levels = {n: e | {"value": 0.5 + contrasts[n]["value"]} for n, e in levels.items()}
    return written(folder, {"base": levels, "bpo": tuned_levels}, {"base": {"bpo": contrasts}})


@pytest.mark.parametrize("name, interval, reading", [
    ("cover", (0.1, 0.2), "better"), ("cover", (-0.2, -0.1), "worse"),
    ("chair_i", (0.1, 0.2), "worse"), ("chair_i", (-0.2, -0.1), "better"),
    ("cover", (-0.1, 0.2), "no difference seen"), ("chair_i", (0, 0.2), "no difference seen"),
    ("p_prior", (-0.3, -0.2), "better"), ("words", (0.1, 0.2), "")])
def test_an_interval_is_read_by_whether_more_is_better(name, interval, reading, tmp_path):
    rows = score_tables.differences(with_differences(tmp_path, **{name: interval}))
    assert rows[["label", "reading"]].values.tolist() == [[comparison.METRICS[name][0], reading]]


@pytest.mark.parametrize("intervals, reading", [
    ({"cover": (0.1, 0.2), "chair_i": (0.1, 0.2), "colour_accuracy": (-0.1, 0.1),
      "chair_s": (-0.2, -0.1)},
     "better in cover (0.50 → 0.65), CHAIRs (0.50 → 0.35), worse in CHAIRi (0.50 → 0.65); no "
     "difference seen in 1 of 4 measures"),
    ({"cover": (-0.2, -0.1)},
     "better in nothing, worse in cover (0.50 → 0.35); no difference seen in 0 of 1 measures"),
    ({"words": (0.1, 0.2)}, "not to be judged without a truth file")])
def test_the_reading_is_one_phrase(intervals, reading, tmp_path):
    frame = with_differences(tmp_path, **intervals)
    assert score_tables.reading(frame, "natural", "base") == reading
    said, = score_tables.readings(frame)
    assert said.plain == f"bpo against base, natural images: {reading}."


def test_levels_and_differences_stand_in_one_table_that_says_what_each_is_out_of(tmp_path):
    frame = with_differences(tmp_path, cover=(0.1, 0.2), chair_i=(-0.1, 0.1), words=(0.1, 0.2))
    table = score_tables.main_table(frame, "natural", score_tables.rivals(frame))
    assert table.plain.splitlines()[0] == "Table: natural images"
    for told in ("cover, 9 objects ↑", "CHAIRi, 9 named objects ↓", "bpo − base",
                 "+0.150 [+0.100, +0.200] better", "0.000 [−0.100, +0.100]"):
        assert told in table.plain
    assert "words" not in table.plain


LEVEL = {"cover": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}}


def test_the_page_is_about_bpo_on_counterfactual_images_where_there_are(tmp_path):
    frame = written(tmp_path, {"base": LEVEL, "sft": LEVEL}, {})
    assert (comparison.main_split(frame), score_tables.main_method(frame)) == ("natural", "sft")
    other = written(tmp_path, dict.fromkeys(("base", "bpo", "sft"), LEVEL), {}, "counterfactual")
    both = pandas.concat([frame, other])
    assert comparison.main_split(both) == "counterfactual"
    assert score_tables.main_method(both) == "bpo"
    assert score_tables.baselines(both) == ["base", "sft"]


@pytest.mark.parametrize("methods, control", [
    (("sft", "sft_compute", "sft_matched"), "sft_matched"), (("sft_compute", "sft"), "sft"),
    (("bpo",), "base")])
def test_the_sharpest_control_comes_first(methods, control, tmp_path):
    frame = written(tmp_path, dict.fromkeys(("base", *methods), LEVEL), {})
    assert score_tables.control(frame) == control


def test_tables_show_values_with_intervals_and_counts(scored, tmp_path):
    frame = written(tmp_path, *scored)
    shown = {t.plain.splitlines()[0]: t for t in score_tables.level_tables(frame)}
    assert list(shown) == [f"Table: natural images, {category} questions"
                           for category in ("caption", "attribute", "presence", "any")]
    levels = score_tables.levels(frame).query("category == 'attribute'")
    rows = score_tables.pivoted(levels, "method", "label")
    assert list(rows["method"]) == ["base", "bpo"]
    assert rows["P(true answer)"][1] == "0.90 [0.90, 0.90]"
    assert "yes answers 2" in shown["Table: natural images, presence questions"].html
    assert "yes answers" not in set(score_tables.judged(score_tables.levels(frame))["label"])


# --- the stage ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def parameters(model_folder, adapters, data_file):
    return QualitativeComparison(
        study="s", model=str(model_folder), adapters=str(adapters), max_new_tokens=5, batch_size=5,
        splits={"natural": str(data_file)}, calibration_data="", resamples=200, gallery=4)


@pytest.fixture(scope="module")
def result(parameters, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BPO_OUTPUTS", str(tmp_path_factory.mktemp("compare")))
        found = comparison.run(parameters)
        assert comparison.run(parameters).metrics == found.metrics, "read again, they differ"
    return found


@pytest.fixture(scope="module")
def lines(result):
    return read_lines(result.folder / "answers-natural.jsonl")


def test_every_method_answers_every_question(lines, data_file):
    assert {x["id"] for x in lines} == {r.id for r in data_rows.read_rows(data_file)[0]}
    assert all(set(x["answers"]) == {"base", "sft", "bpo", "bpo_weaken"} for x in lines)


def requests_of(data_file):
    return {r.id: Request(r.id, r.prompt, r.image) for r in data_rows.read_rows(data_file)[0]}


def test_base_answers_are_those_of_the_plain_model(lines, data_file, checkpoint):
    requests = requests_of(data_file)
    plain = generate.decode(checkpoint, generate.encode_batch(
        checkpoint, [requests[x["id"]] for x in lines]), max_new_tokens=5)
    assert [x["answers"]["base"] for x in lines] == plain


@pytest.mark.parametrize("method", ("bpo", "bpo_weaken"))
def test_a_method_s_answers_are_those_of_its_adapter_alone(lines, data_file, model_folder, adapters,
                                                           method):
    adapted = checkpoints.load_adapters(checkpoints.load(model_folder),
                                        {"x": adapters / method / "adapter"})
    requests = requests_of(data_file)
    alone = generate.decode(adapted, generate.encode_batch(
        adapted, [requests[x["id"]] for x in lines]), max_new_tokens=5)
    assert [x["answers"][method] for x in lines] == alone
    assert alone != [x["answers"]["base"] for x in lines]


def test_adapters_that_differ_give_other_probabilities(lines):
    probed = [x for x in lines if x["p_true"]]
    assert {x["category"] for x in probed} == {"attribute"} and len(probed) == 4
    for x in probed:
        assert x["p_true"]["sft"] == pytest.approx(x["p_true"]["base"], abs=2e-6)
        assert len({x["p_true"][m] for m in ("base", "bpo", "bpo_weaken")}) == 3
        assert all(0 <= p <= 1 for p in (*x["p_true"].values(), *x["p_prior"].values()))


def test_the_probability_is_that_of_the_whole_answer_with_its_end(lines, data_file, checkpoint):
    asked = next(x for x in lines if x["id"] == "attribute-2")
    request = requests_of(data_file)["attribute-2"]
    batch = generate.encode_batch(checkpoint, [request])
    ids = encoding.answer_tokens(checkpoint, request.messages, "blue")
    assert ids[-1] == checkpoint.tokenizer.eos_token_id
    with torch.no_grad():
        whole = torch.cat([batch["input_ids"], torch.tensor([ids])], dim=1)
        logits = checkpoint.model(input_ids=whole, attention_mask=torch.ones_like(whole),
                                  pixel_values=batch["pixel_values"]).logits[0]
    chain = torch.log_softmax(logits[-len(ids) - 1:-1], dim=-1)[range(len(ids)), ids]
    assert asked["p_true"]["base"] == pytest.approx(chain.sum().exp().item(), abs=2e-6)


def test_the_metrics_are_the_scores_of_the_answers(result, lines, data_file):
    methods = ["base", "bpo", "bpo_weaken", "sft"]
    values, contrasts = comparison.score(lines, data_rows.read_truth(data_file), methods, seed=0,
                                         resamples=200)
    assert list(result.metrics["natural"]) == methods
    assert result.metrics["natural"] == values
    assert result.metrics["differences"]["natural"] == contrasts


def test_a_method_that_changes_nothing_is_told_apart_in_nothing(result):
    rows = results.read(result.folder).query("method == 'sft' and against == 'base'").dropna(
        subset="value")
    assert {e.reading() for e in results.estimates(rows)} == {"no difference seen", ""}
    assert result.metrics["natural"]["sft"]["changed"]["value"] == 0
    assert result.metrics["natural"]["bpo"]["changed"]["value"] > 0


def test_an_interrupted_comparison_goes_on_to_the_same_bytes(result, parameters, outputs,
                                                             monkeypatch):
    right, calls = comparison._ask, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return right(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(comparison, "_ask", killed)
        comparison.run(parameters)
    again = comparison.run(parameters)
    name = "answers-natural.jsonl"
    assert (again.folder / name).read_bytes() == (result.folder / name).read_bytes()


@pytest.fixture(scope="module")
def beside_a_rival(parameters, model_folder, data_file, tmp_path_factory):
    """The same comparison, calibrated, beside a rival: the base itself, loaded a second time."""
    loaded, right = [], checkpoints.load

    def load(*given, **settings):
        assert not any(model() for model in loaded), "two models lie in memory together"
        checkpoint = right(*given, **settings)
        loaded.append(weakref.ref(checkpoint.model))
        return checkpoint

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BPO_OUTPUTS", str(tmp_path_factory.mktemp("rival")))
        patch.setattr(checkpoints, "load", load)
        found = comparison.run(parameters.model_copy(update={
            "rival": str(model_folder), "calibration_data": str(data_file)}))
    assert len(loaded) == 2
    return found


def test_the_curves_under_noise_are_notebook_1_s_for_the_base(result, parameters, beside_a_rival,
                                                              outputs):
    probed = probe.run(under_noise.probing(parameters).model_copy(update={"sampled_answers": 1}))
    frame = results.read(result.folder).query("category == 'noise'")
    base = frame.query("method == 'base' and against == ''").set_index("metric")["value"]
    for measure in ("p_true", "p_prior", "logp_true", "logp_prior"):
        assert [base[f"{measure}_at_{step}"] for step in parameters.noise_steps] == pytest.approx(
            probed.metrics[measure], abs=1e-5)
    other = frame.query("method == 'bpo' and against == ''").set_index("metric")["value"]
    assert other["p_true_at_999"] > 1.1 * base["p_true_at_999"]
    beyond = frame.query("method == 'bpo' and against == 'base'").set_index("metric")["value"]
    assert beyond["p_true_at_999"] == pytest.approx(other["p_true_at_999"] - base["p_true_at_999"],
                                                    abs=1e-5)
    assert frame["more_is_better"].isna().all()
    lines = read_lines(beside_a_rival.folder / "rival-under_noise.jsonl")
    ours = read_lines(result.folder / "answers-under_noise.jsonl")
    assert [x["p_true"]["rival"] for x in lines] == [x["p_true"]["base"] for x in ours]


def test_no_row_is_weighed_under_noise_where_none_is_wanted(parameters, outputs):
    folder = comparison.run(parameters.model_copy(update={"noise_rows": 0, "rows": 2})).folder
    assert "noise" not in set(results.read(folder)["category"])
    assert not [f.name for f in folder.iterdir() if "noise" in f.name]


def test_a_rival_is_a_method_and_a_baseline(beside_a_rival, result):
    frame = results.read(beside_a_rival.folder)
    assert list(beside_a_rival.metrics["natural"]) == ["base", "rival", "bpo", "bpo_weaken", "sft"]
    same = frame.query("method == 'rival' and against == 'base'")
    assert set(same["value"].dropna()) == {0} and len(same) > 10
    rows = frame.query("method == 'bpo' and against == 'rival' and metric == 'p_true'")
    assert results.estimates(rows) == results.estimates(
        frame.query("method == 'bpo' and against == 'base' and metric == 'p_true'"))
    assert score_tables.main_method(frame) == "bpo" and "rival" in score_tables.baselines(frame)
    for method, values in result.metrics["natural"].items():
        assert {n: beside_a_rival.metrics["natural"][method][n] for n in values} == values


def test_the_base_as_confident_as_a_method_stands_beside_it(beside_a_rival):
    frame = results.read(beside_a_rival.folder).query("category == 'sharpening'")
    assert beside_a_rival.metrics["temperatures"]["base"] == pytest.approx(1, abs=1e-5)
    levels = frame.query("against == ''").set_index(["method", "metric"])["value"]
    assert levels["bpo", "temperature"] == beside_a_rival.metrics["temperatures"]["bpo"] != 1
    beyond = frame.query("against == 'base_sharpened'").set_index(["method", "metric"])["value"]
    assert set(beyond.index.get_level_values(0)) == {"rival", "bpo", "bpo_weaken", "sft"}
    for name in ("p_true", "p_prior", "logp_true"):
        assert beyond["bpo", name] == pytest.approx(
            levels["bpo", f"among_{name}"] - levels["bpo", f"matched_{name}"], abs=2e-6)
    *_, said = score_tables.sharpening(results.read(beside_a_rival.folder), "natural")
    assert signed(levels['bpo', 'among_p_true'] - levels['base', 'among_p_true']) in said.plain


def test_calibration_needs_a_colour_question(parameters, untold_file, data_file, outputs):
    with pytest.raises(Refusal, match="calibration_data: none of its rows is a colour question"):
        comparison.run(parameters.model_copy(update={
            "calibration_data": str(untold_file), "image_folder": str(data_file.parent)}))
    with pytest.raises(ValueError, match="choose another one"):
        QualitativeComparison(splits={"calibration": "x"})


def test_methods_come_in_the_order_in_which_they_were_trained(model_folder, adapters, tmp_path):
    for method in ("bpo", "sft", "bpo_weaken"):
        (tmp_path / method).symlink_to(adapters / method)
    (tmp_path / "manifest.json").write_text(json.dumps(
        {"metrics": {"methods": {"sft": {}, "bpo_weaken": {}, "bpo": {}}}}))
    _, names = tuned.load_methods(QualitativeComparison(
            study="s", model=str(model_folder), adapters=str(tmp_path)))
    assert names == ["base", "sft", "bpo_weaken", "bpo"]


def test_a_folder_without_adapters_is_refused(model_folder, tmp_path):
    with pytest.raises(Refusal, match="3_dpo_training writes them"):
        tuned.load_methods(QualitativeComparison(
            study="s", model=str(model_folder), adapters=str(tmp_path)))


def test_an_adapter_of_another_model_is_refused(model_folder, adapters, tmp_path):
    folder = tmp_path / "bpo" / "adapter"
    folder.mkdir(parents=True)
    for file in (adapters / "bpo" / "adapter").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 2}))
    with pytest.raises(Refusal, match="trained on another model"):
        tuned.load_methods(QualitativeComparison(
            study="s", model=str(model_folder), adapters=str(tmp_path)))


def test_data_without_a_truth_file_is_measured_by_length_and_change(parameters, untold_file,
                                                                    data_file, outputs):
    p = parameters.model_copy(update={"splits": {"held_out": str(untold_file)},
                                      "image_folder": str(data_file.parent), "rows": 5})
    found = comparison.run(p)
    assert set(found.metrics["held_out"]["base"]) == {"answer_words", "changed"}
    assert found.metrics["held_out"]["base"]["changed"]["n"] == 5
    frame = results.read(found.folder)
    assert comparison.main_split(frame) == "held_out"
    assert set(score_tables.levels(frame)["category"]) == {"any"}
    assert score_tables.difference_figure(frame, "held_out", score_tables.rivals(frame))
    assert score_tables.main_table(frame, "held_out", score_tables.rivals(frame))
    assert noise_views.curves_under_noise(frame, score_tables.rivals(frame)).plain.startswith(
        "Figure: held_out images, ")
    counted, gallery = score_tables.side_by_side(p, found, frame)
    assert counted.plain.startswith("No truth file tells of a usual answer to the 5 held_out")
    assert gallery.html.count(score_tables.DRAWN) == 4 and "what is usual" not in gallery.html


def test_the_gallery_shows_what_is_against_the_habit_beside_seed_drawn_questions(
        parameters, result, monkeypatch):
    """Whatever the tuned models answer; with the probabilities of base, control and method."""
    frame, shown = results.read(result.folder), []
    truth = data_rows.read_truth(parameters.path(parameters.splits["natural"]))
    monkeypatch.setattr(score_tables, "read_lines", lambda file: [
        x | {"answers": x["answers"] | {"base": usual}}
        for x in read_lines(file) for usual in truth["rows"][x["id"]]["prior"] or [""]])
    monkeypatch.setattr(score_tables.cards, "comparison_gallery", shown.extend)
    score_tables.side_by_side(parameters, result, frame)
    assert [x["origin"] for x in shown] == [score_tables.AGAINST] * 2 + [score_tables.DRAWN] * 2
    for x in shown[:2]:
        assert x["usual"] not in ("", x["truth"]) and list(x["answers"]) == ["base", "sft", "bpo"]
        assert x["answers"]["base"]["kind"] == "prior"
        assert all(0 <= p <= 1 for a in x["answers"].values() for p in a["chances"])


def test_a_method_is_set_against_the_sft_on_its_own_positives_alone():
    methods = ("base", "sft_matched", "sft_matched_weaken", "bpo", "bpo_weaken")
    counted = {m: [(str(image), {"cover": (n + image, 10)}) for image in range(4)]
               for n, m in enumerate(methods)}
    _, differences = comparison.scored(
        counted, ["cover"], seed=0, resamples=100,
        matched={"bpo": "sft_matched", "bpo_weaken": "sft_matched_weaken"})
    assert {against: set(of) for against, of in differences.items()} == {
        "base": set(methods[1:]), "sft_matched": {"base", "sft_matched_weaken", "bpo"},
        "sft_matched_weaken": {"bpo_weaken"}}
    assert differences["sft_matched_weaken"]["bpo_weaken"]["cover"]["value"] == pytest.approx(0.2)
