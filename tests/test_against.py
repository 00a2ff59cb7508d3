"""Two studies side by side: what differs is named, what does not is not."""

import json

import pytest
from test_studies import Rows, compared_metrics, estimate, noise_metrics, write_stage

from bpo import against
from bpo.__main__ import main
from bpo.params import Refusal


@pytest.fixture
def two(outputs):
    for name, rise, gain, draws in (("one", 0.1, 0.1, 2), ("two", 0.3, 0.1, 5)):
        write_stage(outputs / name, "1_noise_probability", noise_metrics(rise), draws=draws)
        write_stage(outputs / name, "4_qualitative_comparison", compared_metrics(gain))
    return outputs


def test_the_page_names_what_differs_and_no_more(two, capsys):
    assert main(["compare", "one", "two"]) == 0
    page = Rows(two / "one" / "against-two.html")
    assert ["draws", "2", "5", "1"] in page.rows
    assert not any("seed" in row for row in page.rows)
    assert ["change_prior", "0.100 [0.050, 0.150]", "0.300 [0.250, 0.350]"] in page.rows
    assert not any("change_true" in row[0] for row in page.rows)
    assert ["P(true answer), counterfactual images", "+0.100 [+0.090, +0.110] better",
            "+0.100 [+0.090, +0.110] better"] in page.rows
    assert "Versions, inputs and code that differ: none." in page.words
    held = json.loads((two / "one" / "against-two.json").read_text())
    assert [r["result"] for r in held["results"]] == ["change_prior"]
    assert held["same"] > 5
    index = Rows(two / "one" / "index.html")
    assert "against-two.html" in index.links
    assert "against-two.html" in capsys.readouterr().out


def test_intervals_that_overlap_are_counted_and_not_listed(two):
    file = two / "two" / "1_noise_probability" / "manifest.json"
    known = json.loads(file.read_text())
    known["metrics"]["change_prior"] = estimate(0.12)
    known["commit"] = "def"
    file.write_text(json.dumps(known))
    page = Rows(against.write("one", "two"))
    assert not any("change_prior" in row[0] for row in page.rows)
    assert "1 that differ and have an interval, 0 have" in " ".join(page.words.split())
    assert ["commit", "abc", "def", "1"] in page.rows


def test_a_difference_in_code_and_a_notebook_alone_are_said(two, outputs):
    write_stage(outputs / "two", "2_pair_generation", {"pairs": 3})
    file = two / "two" / "1_noise_probability" / "manifest.json"
    known = json.loads(file.read_text())
    known["modules"]["bpo.probe"] = "ef" * 32
    file.write_text(json.dumps(known))
    page = Rows(against.write("one", "two"))
    assert ["modules: bpo.probe", "cdcdcdcdcdcd", "efefefefefef", "1"] in page.rows
    assert "In one study alone: 2_pair_generation." in page.words


@pytest.mark.parametrize(("names", "told"), [
    (("one", "three"), "no stage has finished here"), (("one", "one"), "against itself"),
    (("one", "alone"), "no notebook in common")])
def test_what_cannot_be_compared_is_refused(two, outputs, names, told):
    write_stage(outputs / "alone", "2_pair_generation", {"pairs": 3})
    with pytest.raises(Refusal, match=told):
        against.write(*names)
    assert not list(outputs.glob("*/against-*"))
