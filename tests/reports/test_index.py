"""The index of a study and the list of all studies: numbers as the manifests hold them."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from bpo import params
from bpo.evaluation import comparison
from bpo.reports import index as studies
from bpo.reports import page as report
from bpo.study import results, verify
from bpo.study.results import Estimate, Result


def estimate(value: float, half: float = 0.05) -> Estimate:
    return Estimate(value, value - half, value + half, 40)


def noise(rise: float) -> list[Result]:
    return [Result("step 999", "noise", "base", "", "p_true", estimate(0.5)),
            Result("step 999", "noise", "base", "step 0", "p_true", estimate(-0.2)),
            Result("step 999", "noise", "base", "step 0", "p_prior", estimate(rise))]


def compared(gain: float) -> list[Result]:
    """base and bpo on one split; P(true answer) of bpo is `gain` above base's."""
    def result(method: str, against: str, metric: str, e: Estimate) -> Result:
        _, category, more = comparison.METRICS[metric]
        return Result("counterfactual", category, method, against, metric,
                      replace(e, more_is_better=more))

    levels = [result(m, "", n, estimate(0.5 + (gain if m == "bpo" else 0)))
              for m in ("base", "sft_matched", "bpo") for n in studies.COMPARED]
    apart = {"p_true": estimate(gain, 0.01), "p_prior": estimate(gain, 0.01),
             "cover": estimate(0.0004, 0.01), "chair_i": Estimate(None)}
    return levels + [result("bpo", "base", n, e) for n, e in apart.items()]


def write_stage(folder, notebook: str, table: list[Result], **parameters: object) -> None:
    (folder / notebook).mkdir(parents=True)
    results.write(folder / notebook, table)
    (folder / notebook / "manifest.json").write_text(json.dumps({
        "stage": notebook, "study": folder.name, "metrics": {}, "outputs": {},
        "parameters": {"seed": 3, **parameters}, "inputs": {"model": "ab" * 32},
        "modules": {"bpo.evaluation.probe": "cd" * 32}, "versions": {"torch": "2.13.0"},
        "python": "3.11", "device": "CPU", "processes": 1, "commit": "abc", "seconds": 61.0,
        "finished": "2026-01-31 10:00 UTC"}))
    said = report.say("it came to {x}", x="<b>pass</b>")
    nbformat.write(new_notebook(cells=[new_code_cell("x", outputs=[new_output(
        "display_data", data={"text/html": said._repr_html_(), "text/plain": repr(said)})])]),
        folder / f"{notebook}.ipynb")


@pytest.fixture
def study(outputs):
    """A study of notebooks 1 and 4, whose rise is 0.125 and whose gain is 0.1."""
    write_stage(outputs / "one", "1_noise_probability", noise(0.125), draws=5)
    write_stage(outputs / "one", "4_qualitative_comparison", compared(0.1))
    return outputs / "one"


class Rows(HTMLParser):
    """The tables of a page as lists of texts, and its links."""

    def __init__(self, page):
        super().__init__()
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self.words = ""
        self.inside = False
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True
        if tag == "a":
            self.links.append(dict(attrs)["href"])

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data
        self.words += data


def test_the_index_shows_numbers_with_intervals_and_the_facts(study):
    page = Rows(studies.index(study))
    head, *rows = page.rows
    assert head == ["measure", "base", "bpo", "bpo − base", "bpo − sft_matched"]
    found = {r[0]: r[1:] for r in rows}
    assert found["P(true answer), counterfactual images"] == [
        "0.50 [0.45, 0.55]", "0.60 [0.55, 0.65]", "+0.100 [+0.090, +0.110] better", "–"]
    assert found["P(prior's answer), counterfactual images"][2].endswith(" worse")
    assert found["cover, counterfactual images"][2] == "0.000 [−0.010, +0.010]"
    assert found["CHAIRi, counterfactual images"][2] == "–"
    words = re.sub(r"\s+", " ", page.words)
    assert "changes by −0.200 [−0.250, −0.150], that of the prior's answer by +0.125" in words
    for told in ("draws = 5", "122 s in all, on CPU", "model abababab", "torch 2.13.0",
                 "sha256sum -c SHA256SUMS", "it came to <b>pass</b>"):
        assert told in words, told
    assert "../index.html" in page.links
    assert verify.problems(study) == []


def test_a_study_without_tables_of_results_says_which_notebook_to_run(study, outputs):
    (study / "4_qualitative_comparison" / "results.csv").unlink()
    for page in (Rows(studies.index(study)), Rows(outputs / "index.html")):
        words = re.sub(r"\s+", " ", page.words)
        assert "results.csv is not there: run notebooks/4_qualitative_comparison.ipynb" in words


def test_the_list_of_studies_names_each_and_the_failed(study, outputs):
    write_stage(outputs / "two", "1_noise_probability", noise(-0.4))
    error = new_output("error", ename="Refusal", evalue="bad", traceback=[])
    nbformat.write(new_notebook(cells=[new_code_cell("x", outputs=[error])]),
                   outputs / "two" / "1_noise_probability.ipynb")
    studies.index(study)
    studies.index(outputs / "two")
    page = Rows(outputs / "index.html")
    assert page.links == ["one/index.html", "two/index.html"]
    words = re.sub(r"\s+", " ", page.words)
    assert "1 complete, 1 failed" in words and "failed: Noise and probability" in words
    assert "under noise P(prior's answer) −0.400 [−0.450, −0.350]" in words
    assert "notebooks 1, 4" in words


def test_a_study_without_any_stage_has_an_index(outputs):
    (outputs / "none").mkdir(parents=True)
    page = Rows(studies.index(outputs / "none"))
    assert page.rows == [] and "Study" in page.words


def test_a_study_that_only_failed_is_listed(outputs):
    (outputs / "bad").mkdir(parents=True)
    error = new_output("error", ename="Refusal", evalue="no data", traceback=[])
    nbformat.write(new_notebook(cells=[new_code_cell("x", outputs=[error])]),
                   outputs / "bad" / "1_noise_probability.ipynb")
    studies.index(outputs / "bad")
    page = Rows(outputs / "index.html")
    assert page.links == ["bad/index.html"] and "failed: Noise and probability" in page.words


def test_every_notebook_has_a_title():
    assert studies.TITLES.keys() == params.SCHEMAS.keys()
