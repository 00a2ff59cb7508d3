"""The index of a study and the list of all studies: numbers as the manifests hold them."""

import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from pandas import DataFrame

from bpo import params
from bpo.evaluation import claims, comparison, replication
from bpo.reports import index as studies
from bpo.reports import page as report
from bpo.reports import seen
from bpo.reports.tables import summary
from bpo.study import results, verify
from bpo.study.results import OPEN, Estimate, Result


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
        "parameters": {"seed": 3, "question": "", **parameters}, "inputs": {"model": "ab" * 32},
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
    found = {r[0]: r[1:] for r in page.rows}
    assert found["measure"] == ["bpo − base", "bpo − sft_matched", "base", "bpo"]
    assert found["P(true answer) ↑, counterfactual images, n 40"] == [
        "+0.100 [+0.090, +0.110] better", "–", "0.50", "0.60"]
    assert found["P(prior's answer) ↓, counterfactual images, n 40"][0].endswith(" worse")
    assert found["cover ↑, counterfactual images, n 40"][0] == "0.000 [−0.010, +0.010]"
    words = re.sub(r"\s+", " ", page.words)
    for told in ("draws = 5", "122 s in all, on CPU", "model abababab", "torch 2.13.0",
                 "sha256sum -c SHA256SUMS", "it came to <b>pass</b>"):
        assert told in words, told
    assert "../index.html" in page.links
    assert verify.problems(study) == []


def test_the_index_answers_and_says_how_sure_it_is(study):
    """The verdict, what it is out of, claims with signs; the same in the head, for a preview."""
    page = Rows(studies.index(study))
    words = re.sub(r"\s+", " ", page.words)
    assert "Does BPO make the model look at the picture? Mixed." in words
    assert ("BPO raises the true answer's probability, raises that of the usual, wrong answer and "
            "shows no difference in objects named.") in words
    assert "One training run, seed 3: verdicts are by 95 % intervals over images" in words
    signs = {r[0].strip(): r[1:] for r in page.rows}
    assert signs["Raises P(true answer)"] == ["+", "+0.100 [+0.090, +0.110]"]
    assert signs["Lowers P(prior's answer)"] == ["−", "+0.100 [+0.090, +0.110]"]
    assert signs["Noise lowers P(true answer) step 999"][0] == "+"
    head = (study / "index.html").read_text()
    title = "Does BPO make the model look at the picture? Mixed · study one"
    assert f"<title>{title}</title>" in head and f'og:title" content="{title}"' in head
    assert re.search('og:description" content="Mixed. Against the untuned model', head)


def test_seeds_of_a_replication_are_a_matrix(outputs):
    """Also where nothing but what was stored is there."""
    for seed, gain in ((4, 0.1), (5, 0.1), (6, -0.2)):
        write_stage(outputs / f"one-seed{seed}", "1_noise_probability", noise(0.1), seed=seed)
        write_stage(outputs / f"one-seed{seed}", "4_qualitative_comparison", compared(gain),
                    seed=seed)
    assert studies.seeds_of("one") == {s: f"one-seed{s}" for s in (4, 5, 6)}
    replication.store("one", replication.read(studies.seeds_of("one")))
    for name, there in (("one-seed5", True), ("one", False)):
        if not there:
            for seed in (4, 5, 6):
                shutil.rmtree(outputs / f"one-seed{seed}")
        (outputs / name).mkdir(exist_ok=True)
        page = Rows(studies.index(outputs / name))
        signs = {r[0].strip(): "".join(r[1:]) for r in page.rows}
        assert signs["claim"] == "456all" and signs["Raises P(true answer)"] == "++−o"
        words = re.sub(r"\s+", " ", page.words)
        assert "No difference seen." in words and "3 training runs, seeds 4 to 6" in words
        assert "What training changed, mean of 3 seeds" in words and "+0.100" not in words


def verdicts(**given):
    """`summary.on_main`'s frame of one study: NAME_MEASURE=verdict, NAME base, own or harm."""
    says = {"true": "Raises P(true answer)", "prior": "Lowers P(prior's answer)",
            "chair": "Hallucinates less", "cover": "Says as much",
            "pope": "Yes and no are no worse", "words": "Captions keep their length"}
    claim = {"base": "2", "own": "3", "harm": claims.HARM}
    return DataFrame([{
        "claim": claim[of], "says": says[measure], "method": "bpo", "verdict": verdict,
        "against": "sft_matched" if of == "own" else "base",
        "decides": "length in words" if measure == "words" else measure}
        for (of, measure), verdict in ((tuple(n.split("_")), v) for n, v in given.items())])


@pytest.mark.parametrize("given, word, told", [
    ({"base_true": claims.HOLDS, "base_chair": claims.HOLDS}, "Yes", "names fewer objects that"),
    ({"base_true": claims.HOLDS, "base_chair": OPEN}, "Partly", "no difference in objects not"),
    ({"base_true": claims.HOLDS, "harm_pope": claims.FAILS}, "Yes, at a price",
     "Worse than before: pope."),
    # a longer caption is neither better nor worse
    ({"base_true": claims.HOLDS, "harm_words": claims.FAILS}, "Yes", "BPO raises the true"),
    ({"base_true": OPEN, "base_cover": claims.HOLDS}, "No difference seen", "more of the objects"),
    ({"base_true": claims.FAILS, "base_prior": OPEN, "harm_pope": claims.FAILS}, "No",
     "lowers the true"),
    ({"base_true": claims.FAILS, "base_prior": claims.HOLDS}, "Mixed", "lowers that of the usual"),
    ({"base_true": claims.HOLDS, "own_true": claims.HOLDS}, "Yes",
     "the same is seen in the true answer"),
    ({"base_true": claims.HOLDS, "own_true": OPEN}, "Yes, but no more than SFT",
     "alone, it shows no difference in the"),
    ({"base_true": claims.HOLDS, "own_true": OPEN, "harm_pope": claims.FAILS},
     "Yes, at a price, and no more than SFT", "Worse than before: pope."),
    ({"own_true": claims.HOLDS}, "", "")])
def test_an_answer_says_what_the_verdicts_say(given, word, told):
    found, sentence = summary.answer(verdicts(**given))
    assert found == word and told in sentence


def looks(row: str, *chances: tuple[float, float]) -> list[dict]:
    """Lines of looks.jsonl: P(true), P(prior) at steps 0, 1 ..., the last of them in two draws."""
    places = [(step, 0, c) for step, c in enumerate(chances)] + [(len(chances) - 1, 1, chances[-1])]
    return [{"row": row, "step": step, "draw": draw, "answers": [
        {"kind": kind, "logp": math.log(p), "tokens": 2}
        for kind, p in zip(("true", "prior"), both, strict=True)]} for step, draw, both in places]


@pytest.mark.parametrize("known", [True, False])
def test_the_picture_shown_is_the_median_of_those_that_go_from_true_to_prior(known):
    lines = [*looks("stays", (0.9, 0.01), (0.8, 0.1)), *looks("prior", (0.2, 0.7), (0.1, 0.8)),
             *looks("most", (0.9, 0.05), (0.05, 0.9)), *looks("median", (0.7, 0.2), (0.2, 0.7)),
             *looks("least", (0.6, 0.3), (0.3, 0.6))]
    chosen, courses = seen.typical(lines, known=known)
    assert chosen == "median"
    assert courses == {("true", "true"): 1, ("prior", "prior"): 1, ("true", "prior"): 3}
    assert seen.typical(lines[:3], known=known)[0] == "stays"


def test_shares_are_left_out_where_questions_differ():
    rows = [Result("counterfactual", "attribute", m, "", n, Estimate(v, n=count))
            for m, both in (("base", (0.5, 0.3)), ("bpo", (0.6, 0.1)))
            for n, v, count in zip(("colour_accuracy", "prior_rate"), both, (40, 40), strict=True)]
    frame = DataFrame([{**vars(r), **vars(r.estimate), "notebook": "4_qualitative_comparison"}
                       for r in rows])
    assert seen.shares(frame, 0.9) == {
        "its eye alone": {"true": 0.9, "other": pytest.approx(0.1)},
        "untuned model": {"true": 0.5, "prior": 0.3, "other": pytest.approx(0.2)},
        "BPO": {"true": 0.6, "prior": 0.1, "other": pytest.approx(0.3)}}
    frame.loc[1, "n"] = 30
    assert seen.shares(frame) == {}


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
