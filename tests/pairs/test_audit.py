"""The audit: its measures by hand, before and after selection, and what a classifier can tell."""

import json
import random
import subprocess
import sys

import pytest

from bpo.pairs import audit
from bpo.pairs.selection import Choice

pytestmark = pytest.mark.study  # classifiers are fitted

WORDS = [f"word{n}" for n in range(30)]


def line(row_id, chosen, candidates, *, kept=None, image=None, category="caption"):
    """candidates: (source, text) or (source, text, ches), a source perhaps with mode and step;
    kept: their places, None for all."""
    made = [{"mode": "noisy", **dict(zip(("source", "mode", "step"), source.split())),
             "text": text, **({"scores": {"ches": ches[0]}} if ches else {})}
            for source, text, *ches in candidates]
    return {"id": row_id, "image": image or f"{row_id}.png", "category": category,
            "chosen": chosen, "candidates": made,
            "rejected": made if kept is None else [made[n] for n in kept]}


def unknown(line, text):
    return None


def audited(*lines, right=unknown, prior=unknown, noise_words=()):
    found = audit.audit(lines, seed=0, right=right, prior=prior, noise_words=noise_words)
    json.dumps(found, allow_nan=False)
    return found


def counted(*lines):
    counts = audit.Counts()
    for k in lines:
        counts.add(k, Choice(k["rejected"], [], []))
    return counts


def values(sides):
    return {side: found["value"] for side, found in sides.items()}


# --- counts -------------------------------------------------------------------------------------

LINES = [
    line("a", "red", [("weakened", "blue"), ("weakened", "red"), ("injected", "Blue .")],
         kept=[0, 2], category="attribute"),
    line("b", "a red dog", [("weakened", "a cat"), ("injected", "a blue dog")]),
    line("c", "yes", [("weakened", "yes"), ("injected", "")], kept=[], category="presence"),
    line("d", "a cat", [("weakened", "a fox"), ("weakened", "a gnu")], image="b.png"),
]


def test_pairs_and_positives_are_counted_by_source_and_category():
    counts = counted(*LINES)
    assert (counts.kept.total(), counts.positives) == (6, 3)
    found = counts.by_source()
    weak = found["weakened"]
    assert (weak["candidates"], weak["kept"], weak["positives"]) == (6, 4, 3)
    assert (weak["share_kept"], found["injected"]["share_kept"]) == (0.75, 0.5)
    assert weak["by_category"] == {"attribute": {"rows": 1, "kept": 1},
                                   "caption": {"rows": 2, "kept": 3},
                                   "presence": {"rows": 1, "kept": 0}}
    assert found["injected"]["by_category"]["caption"] == {"rows": 2, "kept": 1}


def test_only_sources_that_made_something_are_named():
    assert audited(*LINES).keys() == {"sources_agree", "weakened", "injected"}
    assert counted(*LINES).by_source().keys() == {"weakened", "injected"}
    assert "given" in audited(line("a", "red", [("given", "blue")]))


def test_the_audit_says_how_often_the_sources_agree():
    assert audited(*LINES)["sources_agree"] == 0.5  # blue and "Blue ."; a cat and a blue dog


def test_a_source_of_which_nothing_is_kept_has_no_measures_of_the_kept():
    one = line("a", "red", [("weakened", "red", 0.5)], kept=[])
    assert counted(one).by_source()["weakened"]["share_kept"] == 0
    found = audited(one)["weakened"]
    assert found["length_gap"]["candidates"]["n"] == 1
    for name in (*audit.STYLE, "near_duplicates", "truth_right", "displacement"):
        assert found[name]["kept"] is None, name


# --- measures, before and after -----------------------------------------------------------------

def test_the_gap_in_length_is_measured_before_and_after():
    found = audited(*LINES)
    # Words: 1 - 1, 1 - 1, 2 - 3, 1 - 1, 2 - 2, 2 - 2; kept are the first, third and last two.
    assert values(found["weakened"]["length_gap"]) == {"candidates": -0.166667, "kept": -0.25}
    # 2 - 1 (the stop stands alone), 3 - 3, 0 - 1.
    assert values(found["injected"]["length_gap"]) == {"candidates": 0, "kept": 0.5}
    assert found["weakened"]["length_gap"]["kept"]["n"] == 4


@pytest.mark.parametrize("name, chosen, answer, gap", [
    ("characters_gap", "a red dog.", "some cats", 4 - 7 / 3),  # 8 / 2 letters and 7 / 3
    ("type_token_gap", "a red dog", "A dog, a dog", 2 / 4 - 1),
    ("sentences_gap", "a dog. It costs 3.50, it sits!", "a dog", 1 - 2),
    ("sentences_gap", "a dog", "A dog ... Where? Here.", 3 - 1),
    ("commas_gap", "a dog, a cat", "a dog, a cat, a gnu", 2 / 6 - 1 / 4)])
def test_a_gap_in_style_is_the_one_by_hand(name, chosen, answer, gap):
    found = audited(line("a", chosen, [("given", answer)]))["given"][name]
    assert found["kept"]["value"] == pytest.approx(gap, abs=1e-6)


def test_an_answer_without_words_is_left_out_of_what_is_counted_by_the_word():
    found = audited(line("a", "red", [("given", "..."), ("given", "blues")]))["given"]
    for name in ("characters_gap", "type_token_gap", "commas_gap"):
        assert found[name]["candidates"]["n"] == 1
    assert found["characters_gap"]["candidates"]["value"] == 2
    assert found["length_gap"]["candidates"]["n"] == 2


def test_near_duplicates_have_nine_tenths_of_their_words_in_order():
    chosen = "one two three four five six seven eight nine ten"
    nine = chosen.replace("ten", "zebra").upper()  # 9 of 10 match: 18 / 20
    eight = chosen.replace("ten", "zebra").replace("nine", "gnu")
    turned = " ".join(reversed(chosen.split()))  # all words, but one in order
    found = audited(line("a", chosen, [("weakened", t) for t in (nine, eight, turned, "zebra")],
                         kept=[1, 2]))["weakened"]["near_duplicates"]
    assert values(found) == {"candidates": 0.25, "kept": 0}


def test_answers_in_truth_right_are_a_share_of_those_whose_truth_is_known():
    truth = {("a", "blue"): False, ("a", "red"): True, ("b", "a cat"): True}
    found = audited(*LINES, right=lambda k, text: truth.get((k["id"], text)))
    assert values(found["weakened"]["truth_right"]) == {
        "candidates": pytest.approx(2 / 3, abs=1e-6), "kept": 0.5}
    assert found["weakened"]["truth_right"]["kept"]["n"] == 2
    assert found["injected"]["truth_right"] == {"candidates": None, "kept": None}


def test_the_interval_is_over_images():
    # Ten answers of one image are one draw: with two images that differ, it is as wide as can be.
    def made(images):
        return [line(str(n), "one", [("weakened", "one" if n % 2 else "one two")],
                     image=images(n)) for n in range(40)]

    few = audited(*made(lambda n: str(n % 2)))["weakened"]["length_gap"]["kept"]
    many = audited(*made(str))["weakened"]["length_gap"]["kept"]
    assert (few["value"], few["low"], few["high"], few["n"]) == (0.5, 0, 1, 40)
    assert 0.3 < many["low"] < many["value"] < many["high"] < 0.7


def test_displacement_is_that_of_the_scored_answers():
    found = audited(line("a", "red", [("weakened", f"x{n}", float(n - 5)) for n in range(11)],
                         kept=[9, 10]),
                    line("b", "red", [("weakened", "blue"), ("injected", "blue")]))
    before, after = found["weakened"]["displacement"].values()
    # -5 to 5: the mean is 0, five of eleven are above it, and 95 % of the way up is 4.5.
    assert (before["mean"]["value"], before["mean"]["n"], before["percentile_95"]) == (0, 11, 4.5)
    assert before["above_zero"]["value"] == pytest.approx(5 / 11, abs=1e-6)
    assert (after["mean"]["value"], after["above_zero"]["value"]) == (4.5, 1)
    assert found["injected"]["displacement"] == {"candidates": None, "kept": None}


def test_the_same_lines_have_the_same_audit_in_any_order():
    assert audited(*LINES) == audited(*reversed(LINES))


WAYS = [  # of each, by hand: equal, of noise, the prior's, longer, words more; as made and as kept
    line("a", "red", [("weakened noisy 500", "red"), ("weakened noisy 900", "Blue."),
                      ("weakened noisy 900", "a blurry, noisy image"), ("injected", "blue")],
         kept=[1, 2, 3], category="attribute"),
    line("b", "a blurry dog", [("weakened noisy 500", "a blurry cat"), ("weakened crop", "A dog"),
                               ("weakened noisy 900", "the picture is Out of\n focus")])]


@pytest.mark.parametrize("way, measure, candidates, kept", [
    ("noisy-500", "equal", 1 / 2, 0), ("noisy-900", "equal", 0, 0),
    ("noisy-500", "of_noise", 0, 0),  # "blurry" is said of the chosen dog as well
    ("noisy-900", "of_noise", 2 / 3, 2 / 3), ("crop", "of_noise", 0, 0),
    ("noisy-900", "is_prior", 1 / 2, 1 / 2), ("noisy-500", "is_prior", 0, None),
    ("noisy-900", "longer", 2 / 3, 2 / 3), ("crop", "length_gap", -1, -1),
    ("noisy-900", "length_gap", 2, 2), ("crop", "truth_right", None, None)])
def test_weakened_answers_are_measured_by_way_and_step(way, measure, candidates, kept):
    found = audited(*WAYS, noise_words=["blurry", "out of focus", ""],
                    prior=lambda k, text: text in ("Blue.", "red") if k["id"] == "a" else None)
    assert list(found["weakened"]["ways"]) == ["noisy-500", "noisy-900", "crop"]
    assert found["injected"]["ways"] == {}
    sides = found["weakened"]["ways"][way][measure]
    assert {side: e and e["value"] for side, e in sides.items()} == {
        "candidates": pytest.approx(candidates, abs=1e-6), "kept": pytest.approx(kept, abs=1e-6)}


def test_results_name_ways_and_categories():
    found = audited(*WAYS)
    for source, counts in counted(*WAYS).by_source().items():
        found[source] |= counts
    rows = {(r.split_or_benchmark, r.category, r.method, r.metric): r.estimate.value
            for r in audit.tidy(found | {"shortcut": {}})}
    assert rows["candidates", "audit", "weakened noisy-500", "equal"] == 0.5
    assert rows["kept", "audit attribute", "injected", "longer"] == 0
    assert rows["kept", "audit caption", "weakened", "length_gap"] == pytest.approx(2 / 3, abs=1e-6)
    assert not [key for key in rows if key[3] in ("of_noise", "is_prior", "truth_right")]


# --- the classifier -----------------------------------------------------------------------------

def sentence(rng, words=8):
    return " ".join(rng.choices(WORDS, k=words))


def told_apart(lines, *, seed=0):
    found = audit.shortcut(lines, seed=seed)
    json.dumps(found, allow_nan=False)
    return found["weakened"]


@pytest.fixture(scope="module")
def alike():
    rng = random.Random(0)
    return [line(str(n), sentence(rng), [("weakened", sentence(rng)),
                                         ("weakened", sentence(rng) + " indeed")], kept=[0],
                 image=str(n % 60), category="caption" if n % 2 else "question")
            for n in range(240)]


def test_texts_of_one_kind_are_not_told_apart(alike):
    found = told_apart(alike)["kept"]
    assert (found["pairs"], found["images"], found["text"]["n"]) == (240, 60, 480)
    assert found["text"]["low"] < 0.5 < found["text"]["high"]
    assert 0.4 < found["text"]["value"] < 0.6
    assert found["length"] == {"value": 0.5, "low": 0.5, "high": 0.5, "n": 480}


def test_a_tell_tale_word_is_seen_and_selection_may_take_it_away(alike):
    found = told_apart([k | {"rejected": k["candidates"][1:]} for k in alike])
    assert found["kept"]["text"]["low"] > 0.9 and found["kept"]["length"]["low"] > 0.9
    assert 0.6 < found["candidates"]["text"]["value"] < 0.9  # every second one has the word


@pytest.mark.parametrize("change", (str.capitalize, "{}.".format, "{} yes".format,
                                    lambda text: " ".join(text.split()[::-1])))
def test_a_difference_in_style_or_order_of_words_is_seen(change):
    rng = random.Random(1)
    ordered = [f"a {' '.join(sorted(sentence(rng).split()))}" for _ in range(200)]
    found = told_apart([line(str(n), text, [("weakened", change(ordered[-n]))])
                        for n, text in enumerate(ordered)])["kept"]
    assert found["text"]["low"] > 0.85


def test_length_alone_is_reported_beside_the_words():
    rng = random.Random(2)
    swap = [line(str(n), f"{sentence(rng)} good", [("weakened", f"{sentence(rng)} bad")])
            for n in range(100)]
    longer = [line(str(n), sentence(rng), [("weakened", sentence(rng, 12))]) for n in range(100)]
    assert told_apart(swap)["kept"]["text"]["low"] > 0.9
    assert told_apart(swap)["kept"]["length"]["value"] == 0.5
    assert told_apart(longer)["kept"]["length"]["value"] == 1
    assert told_apart(longer)["kept"]["text"]["value"] == 1, "the words hide the length"


def test_nothing_is_learnt_from_the_same_image():
    # Each image has texts of its own, six times over: learnt by heart where a fold splits images.
    def repeated(image):
        return [line(str(n), f"chosen{n // 6} of six", [("weakened", f"rejected{n // 6} of six")],
                     image=image(n)) for n in range(120)]

    assert told_apart(repeated(lambda n: str(n // 6)))["kept"]["text"]["value"] == 0.5
    assert told_apart(repeated(str))["kept"]["text"]["value"] > 0.9


def test_each_category_has_a_classifier_of_its_own():
    # "zebra" is right of a caption and wrong of a question: only apart does it tell anything.
    rng = random.Random(3)
    lines = []
    for n in range(400):
        plain, marked = sentence(rng), f"{sentence(rng, 7)} zebra"
        caption = n % 2 == 0
        lines.append(line(str(n), marked if caption else plain,
                          [("weakened", plain if caption else marked)],
                          category="caption" if caption else "question"))
    lines += [line(f"few{n}", "yes", [("weakened", "no")], category="presence") for n in range(19)]
    found = told_apart(lines)["kept"]
    assert found["by_category"].keys() == {"caption", "question", "presence"}
    assert found["by_category"]["caption"]["text"]["low"] > 0.9
    assert found["by_category"]["question"]["pairs"] == 200
    assert found["by_category"]["presence"] is None
    assert found["text"]["value"] < 0.75


def test_the_seed_draws_the_audit_s_intervals(alike):
    first, again, other = (audit.audit(
        alike, seed=s, right=unknown, prior=unknown, noise_words=())["weakened"]
                           for s in (0, 0, 1))
    assert first == again
    first, other = (f["type_token_gap"]["kept"] for f in (first, other))
    assert first["value"] == other["value"] and first["low"] != other["low"]


def test_too_few_pairs_or_images_tell_nothing(alike):
    assert told_apart(alike[:19])["kept"] is None
    assert told_apart(alike[:20])["kept"]["pairs"] == 20
    assert told_apart([k | {"image": str(n % 4)} for n, k in enumerate(alike)])["kept"] is None
    assert audit.shortcut([k | {"rejected": []} for k in alike], seed=0)["weakened"]["kept"] is None


def test_the_seed_draws_the_folds_and_the_interval(alike):
    first, again, other = (told_apart(alike[:80], seed=s) for s in (0, 0, 1))
    assert again == first
    text, changed = first["kept"]["text"], other["kept"]["text"]
    assert text["value"] != changed["value"]
    assert text["high"] - text["low"] != changed["high"] - changed["low"]


def test_scikit_learn_is_imported_only_when_the_classifier_is_asked():
    code = "import sys, bpo.pairs.audit; sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
