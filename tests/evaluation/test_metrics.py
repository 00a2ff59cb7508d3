"""Metrics on cases worked out by hand, and their bootstrap intervals."""

import numpy as np
import pytest

from bpo.evaluation import metrics
from bpo.study import results

VOCABULARY = {"dog": ["dog", "dogs", "puppy"], "hot dog": ["hot dog", "hot dogs"],
              "cat": ["cat", "cats"], "dining table": ["dining table", "table"],
              "lamp": ["lamp", "table lamp"]}


@pytest.mark.parametrize("text, present, wrong", [
    ("a dog and two Cats", {"dog"}, {"cats"}), ("a dog", {"dog"}, set()),
    ("a hot dog", {"hot dog"}, set()), ("a hot dog", set(), {"hot", "dog"}),
    ("the big picture", set(), set()),
    # A phrase of an absent object, of which a part names a present one; half a phrase.
    ("a hot dog", {"dog"}, {"hot", "dog"}), ("a hot day", {"cat"}, set())])
def test_the_words_of_absent_objects_are_marked(text, present, wrong):
    assert metrics.wrong_object_words(text, VOCABULARY, present) == wrong


COLOURS = ("red", "blue")
SCENE = [{"name": "dog", "colour": "red"}, {"name": "cat", "colour": "blue"},
         {"name": "hot dog", "colour": "red"}]


@pytest.mark.parametrize("text, right", [
    ("A red dog and a blue cat.", True), ("a dog", True), ("a blue dog", False),
    ("a red cat", False), ("a red dog and a table", False), ("nothing", False), ("red", False),
    ("", False), ("the blue day of a red dog", True), ("a red hot dog", True),
    ("a blue hot dog", False)])
def test_a_caption_is_right_if_all_it_names_is_there_in_its_colour(text, right):
    assert metrics.caption_is_right(text, VOCABULARY, COLOURS, SCENE) is right


@pytest.mark.parametrize("text, plain", [
    ("  A  Red,  DOG! ", "a red dog"), ("it's 5", "it's 5"), ("…", "..."), ("", ""), ("红", "红")])
def test_an_answer_is_normalised_to_its_words(text, plain):
    assert metrics.normalised(text) == plain


# --- intervals ----------------------------------------------------------------------------------

def weights(images, resamples=2000, seed=0):
    return metrics.bootstrap_weights(images, resamples, np.random.default_rng(seed))


def test_counts_are_summed_by_image():
    assert metrics.by_image([("a", (1, 2)), ("b", (0, 1)), ("a", (3, 4.5))]) == {
        "a": (4, 6.5), "b": (0, 1)}


def test_each_resample_draws_as_many_images_as_there_are():
    drawn = weights(7, 500)
    assert drawn.shape == (500, 7)
    assert (drawn.sum(1) == 7).all()
    assert abs(drawn.mean() - 1) < 1e-9 and drawn.std() > 0.5


@pytest.mark.parametrize("ratios, value, low, high, n", [
    # 30 over 60, not a mean of anything else
    ({f"{i:02}": (i % 3, 2.0) for i in range(30)}, 0.5, 0.35, 0.65, 60),
    ({"a": (9, 9), "b": (0, 1)}, 0.9, 0, 1, 10),  # large images weigh more
    ({"a": (1, 2), "b": (0, 0)}, 0.5, 0.5, 0.5, 2),  # images without a count do not move it
    ({str(i): (0.0, 1) for i in range(9)}, 0, 0, 0, 9),  # all images agree
    ({str(i): (1.0, 1) for i in range(9)}, 1, 1, 1, 9)])
def test_an_estimate_is_a_ratio_of_sums_inside_its_interval(ratios, value, low, high, n):
    found = metrics.estimate(ratios, weights(len(ratios)))
    assert (found["value"], found["n"]) == (value, n)
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=0.03)


def test_the_interval_narrows_with_more_images():
    def width(n):
        found = metrics.estimate({f"{i:04}": (i % 2, 1) for i in range(n)}, weights(n))
        return found["high"] - found["low"]

    # A share of one half: 2 x 1.96 x sqrt(0.25 / n).
    assert width(400) == pytest.approx(0.098, abs=0.012)
    assert width(25) > 3 * width(400)


def test_out_of_nothing_there_is_no_value():
    nothing = {"value": None, "low": None, "high": None, "n": 0}
    empty = {"a": (0, 0), "b": (0, 0)}
    assert metrics.estimate(empty, weights(2)) == nothing
    assert metrics.difference(empty, {"a": (1, 1), "b": (1, 1)}, weights(2)) == {
        **nothing, "p": None}


def test_columns_are_images_in_sorted_order():
    only_b = np.array([[0, 2]])
    found = metrics.estimate({"b": (3, 4), "a": (1, 4)}, only_b)
    assert (found["value"], found["low"]) == (0.5, 0.75)


def test_the_difference_to_itself_is_exactly_zero():
    ratios = {str(i): (i % 5 / 7, 1) for i in range(40)}
    found = metrics.difference(ratios, dict(ratios), weights(40))
    assert (found["value"], found["low"], found["high"], found["n"]) == (0, 0, 0, 40)


def test_a_difference_is_paired_by_image():
    # Images differ wildly, but one side is always 0.1 better: the pairing takes the rest out.
    base = {f"{i:02}": (i % 10, 1) for i in range(40)}
    better = {i: (top + 0.1, 1) for i, (top, _) in base.items()}
    found = metrics.difference(better, base, weights(40))
    assert found["value"] == pytest.approx(0.1)
    assert found["low"] == pytest.approx(0.1) and found["high"] == pytest.approx(0.1)
    assert metrics.difference(base, better, weights(40))["value"] == pytest.approx(-0.1)


def test_a_difference_of_other_images_is_refused():
    with pytest.raises(ValueError, match="same images"):
        metrics.difference({"a": (1, 1)}, {"b": (1, 1)}, weights(1))


# --- differences by chance ----------------------------------------------------------------------

ONE_IN = np.array([[1, 0, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])  # a, a, a, b, c


@pytest.mark.parametrize("mine, p", [
    # Differences of a, b, c; the five resamples draw a, a, a, b, c; p is (1 + 2 x fewer) / 6.
    ((2, 2, 2), 1 / 6), ((-2, -2, -2), 1 / 6), ((2, -1, 1), 3 / 6), ((2, -1, -1), 5 / 6),
    ((-2, 1, 1), 5 / 6), ((2, 0, 0), 5 / 6), ((0, 0, 0), 1.0), ((0, 0, 1), 1.0)])
def test_p_is_counted_from_the_resamples_beyond_zero(mine, p):
    ratios = {n: (v, 1) for n, v in zip("abc", mine, strict=True)}
    found = metrics.difference(ratios, dict.fromkeys("abc", (0, 1)), ONE_IN)
    assert found["p"] == pytest.approx(p, abs=1e-6)


def test_resamples_without_a_value_are_not_counted_in_p():
    ratios = {"a": (2, 1), "b": (1, 1), "c": (0, 0)}
    found = metrics.difference(ratios, dict.fromkeys("abc", (0, 1)), ONE_IN)
    assert found["p"] == pytest.approx(1 / 5)


def test_p_is_small_for_what_all_images_show_and_large_for_nothing():
    base = {f"{i:03}": (i % 10, 10) for i in range(200)}
    better = {n: (top + 1 + i % 2, 10) for i, (n, (top, _)) in enumerate(base.items())}
    mixed = {n: (top + (-1) ** i, 10) for i, (n, (top, _)) in enumerate(base.items())}
    assert metrics.difference(better, base, weights(200))["p"] == pytest.approx(1 / 2001, abs=1e-6)
    assert metrics.difference(mixed, base, weights(200))["p"] > 0.5


def test_chance_gives_a_p_below_a_tenth_about_a_tenth_of_the_time():
    rng = np.random.default_rng(3)
    drawn = weights(60, 500)
    ps = [metrics.difference({f"{i:02}": (v, 1) for i, v in enumerate(rng.normal(size=60))},
                             {f"{i:02}": (v, 1) for i, v in enumerate(rng.normal(size=60))},
                             drawn)["p"] for _ in range(300)]
    assert 0.05 < np.mean(np.array(ps) < 0.1) < 0.16


@pytest.mark.parametrize("ps, adjusted", [
    ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]), ([0.5, 0.6], [1.0, 1.0]), ([], []),
    ([0.02], [0.02]), ([None, 0.02, None, 0.01], [None, 0.02, None, 0.02]), ([None], [None])])
def test_holm_adjusts_as_by_hand(ps, adjusted):
    assert results.holm(ps) == pytest.approx(adjusted)


def test_numbers_made_of_several_metrics_are_of_what_both_sides_measured():
    weights = metrics.bootstrap_weights(2, 50, np.random.default_rng(0))
    mine = metrics.tabled([("a", {"x": (1, 2), "y": (1, 1)}), ("b", {"x": (1, 2)})],
                          ["x", "y", "z"])
    assert mine == {"x": {"a": (1, 2), "b": (1, 2)}, "y": {"a": (1, 1), "b": (0, 0)}}
    made = {"sum": (("x", "y"), lambda x, y: x + y), "lost": (("x", "z"), lambda x, z: x + z)}
    found = metrics.estimates(mine, weights, made)
    assert list(found) == ["x", "y", "sum"]
    assert (found["x"]["value"], found["sum"]["value"], found["sum"]["n"]) == (0.5, 1.5, 1)
    other = metrics.tabled([("a", {"x": (0, 2)}), ("b", {"x": (0, 2)})], ["x", "y"])
    assert list(metrics.differences(mine, other, weights, made)) == ["x"]
    assert metrics.differences(mine, other, weights, made)["x"]["value"] == 0.5
    both = metrics.differences(mine, mine, weights, made)
    assert both["sum"]["value"] == 0 and both["sum"]["p"] == 1
