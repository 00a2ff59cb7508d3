"""What the explorers show: stored numbers without a model, new ones as the stages compute them."""

import html
import re

import ipywidgets
import pytest
import torch

from bpo.data import images
from bpo.evaluation import comparison as comparisons
from bpo.evaluation import probe
from bpo.models import checkpoint as checkpoints
from bpo.models import encoding, generate, tuned
from bpo.models.generate import Request
from bpo.params import NoiseProbability, QualitativeComparison
from bpo.reports import explorer
from bpo.study import seeds
from bpo.study.files import read_lines

STEPS = [0, 500, 999]


@pytest.fixture(scope="module")
def shared_outputs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BPO_OUTPUTS", str(tmp_path_factory.mktemp("explorer")))
        yield


@pytest.fixture(scope="module")
def analysis(shared_outputs, model_folder, data_file):
    """Parameters and result of notebook 1."""
    p = NoiseProbability(study="s", model=str(model_folder), data=str(data_file), rows=0,
                         noise_steps=STEPS, draws=2, sampled_answers=2, max_new_tokens=3)
    return p, probe.run(p)


@pytest.fixture(scope="module")
def comparison(shared_outputs, model_folder, adapters, data_file):
    """Parameters and result of notebook 4."""
    p = QualitativeComparison(study="s", model=str(model_folder), adapters=str(adapters),
                              splits={"natural": str(data_file)}, max_new_tokens=5, resamples=100,
                              calibration_data="")
    return p, comparisons.run(p)


def lines(shown):
    """The paragraphs of the cards and the caption, as text."""
    found = re.findall(r"<p>.*?</p>|<figcaption>.*?</figcaption>", shown.html)
    return [html.unescape(re.sub("<[^>]+>", "", line)) for line in found]


def test_stored_steps_show_the_stored_probabilities(analysis, checkpoint):
    p, result = analysis
    found = explorer.noise(p, result, checkpoint)
    row, step = found.children[:2]
    assert (step.value, step.min, step.max, len(row.options)) == (500, 0, 999, 2)
    stored = {x["step"]: x["answers"] for x in probe.load(result)[0]
              if (x["row"], x["draw"]) == (row.value.id, 0)}
    said = lines(found.still)
    for at in STEPS:
        (true, prior), card = stored[at], said[said.index(f"noise step {at}"):]
        chances = [torch.tensor(a["logp"]).exp().item() for a in (true, prior)]
        assert card[1:4] == [f"true answer “{true['text']}”: {chances[0]:.3g}",
                             f"prior's answer “{prior['text']}”: {chances[1]:.3g}",
                             f"any other answer: {1 - sum(chances):.3g}"]
    assert found.still.plain == (
        f"Figure: {row.value.question} At step 500, from the stored result.")


def test_other_steps_show_what_a_plain_pass_over_the_noised_image_says(analysis, checkpoint):
    p, result = analysis
    found = explorer.noise(p, result, checkpoint)
    row, candidates = found.children[0].value, probe.load(result)[1]
    batch = generate.encode_batch(checkpoint, [Request(row.id, row.prompt, row.image)])
    draw = seeds.torch_generator(p.seed, "probe noise", row.id, 0)
    clean = encoding.encode(checkpoint, encoding.prompt_text(checkpoint, row.prompt, image=True),
                            images.load(row.image))["pixel_values"]
    pixels = encoding.noised(checkpoint.processor, clean, 321, draw)
    answer = candidates[row.id]["true"][0]
    ids = encoding.answer_tokens(checkpoint, row.prompt, answer)
    tokens = torch.cat([batch["input_ids"], torch.tensor([ids])], dim=1)
    with torch.no_grad():
        logits = checkpoint.model(input_ids=tokens, attention_mask=torch.ones_like(tokens),
                                  pixel_values=pixels).logits[0]
    chain = torch.log_softmax(logits[-len(ids) - 1:-1], dim=-1)[range(len(ids)), ids]
    said = lines(found.show(row=row, step=321))
    shown = said[said.index("noise step 321") + 1].removeprefix(f"true answer “{answer}”: ")
    assert float(shown) == pytest.approx(chain.sum().exp().item(), rel=6e-3)
    assert said[-1].endswith("At step 321, computed just now by the model.")


def test_a_moved_control_draws_anew_beside_the_still_figure(analysis, comparison, checkpoint):
    moved = explorer.noise(*analysis, checkpoint)
    moved.children[1].value = 999
    assert "At step 999, from the stored result." in moved.view.value
    for found in (moved, explorer.ask(*comparison)):
        bundle = found._repr_mimebundle_()
        view = bundle["application/vnd.jupyter.widget-view+json"]["model_id"]
        assert ipywidgets.Widget.widgets[view] is found
        assert "data:image/" in bundle["text/html"] and "<script" not in bundle["text/html"]
        assert bundle["text/plain"] == repr(found.still)


def test_no_output_widget_lets_a_headless_run_wait_for_ever(analysis, comparison, checkpoint):
    """nbclient answers an Output widget's messages on the channel on which it awaits the reply."""
    ipywidgets.Widget.close_all()
    explorer.noise(*analysis, checkpoint)
    explorer.ask(*comparison)
    made = list(ipywidgets.Widget.widgets.values())
    assert made and not any(isinstance(w, ipywidgets.Output) for w in made)


def test_what_a_control_breaks_is_said_in_the_view(comparison, monkeypatch):
    found = explorer.ask(*comparison)
    monkeypatch.setattr(explorer.images, "load", lambda _: 1 / 0)
    found.children[1].value = " "
    assert "ZeroDivisionError: division by zero" in found.view.value


def test_stored_answers_are_shown_until_one_asks(comparison, monkeypatch):
    p, result = comparison
    monkeypatch.setattr(tuned, "load_methods", None)  # no model is needed
    found = explorer.ask(p, result)
    stored = {x["id"]: x for x in read_lines(result.folder / "answers-natural.jsonl")}
    choices = [value for _, value in found.children[0].options]
    assert sorted(row.id for _, row in choices) == sorted(stored)
    for split, row in choices:
        said = lines(found.show(row=(split, row), question=" ", step=0))
        answers = said[-4:]
        assert stored[row.id]["annotated"] in said[0]
        assert all(shown.startswith(f"{m}{text}") for shown, (m, text) in
                   zip(answers, stored[row.id]["answers"].items(), strict=True))


def test_a_question_is_answered_by_the_base_and_by_every_adapter(comparison, model_folder, adapters,
                                                                 monkeypatch):
    p, result = comparison
    found = explorer.ask(p, result)
    chosen = found.children[0].value
    shown = found.show(row=chosen, question="  is there a <b>cat</b> ? ", step=0)
    assert "is there a &lt;b&gt;cat&lt;/b&gt; ?" in shown.html and "<b>" not in shown.html
    request = Request("x", ({"role": "user", "content": "is there a <b>cat</b> ?"},),
                      chosen[1].image)
    base = checkpoints.load(model_folder)
    adapted = checkpoints.load_adapters(checkpoints.load(model_folder),
                                      {"x": adapters / "bpo" / "adapter"})
    said = [generate.decode(m, generate.encode_batch(m, [request]), max_new_tokens=5)[0]
            for m in (base, adapted)]
    truth, *answers = lines(shown)
    assert truth.startswith("truthin the image: ")
    assert (answers[0], answers[1]) == (f"base{said[0]}", f"bpo{said[1]}")
    assert len(answers) == 4
    monkeypatch.setattr(tuned, "load_methods", None)  # the model is loaded once
    assert "is there a dog ?" in found.show(row=chosen, question="is there a dog ?", step=0).html


def test_the_true_and_the_prior_s_answer_have_their_probabilities_clean_and_noised(comparison):
    p, result = comparison
    found = explorer.ask(p, result)
    options = {v[1].id: v for _, v in found.children[0].options}
    caption, colour = options["caption-1"], options["attribute-1"]
    stored = {x["id"]: x for x in read_lines(result.folder / "answers-natural.jsonl")}
    noised = {(x["row"], x["step"]): x for x in read_lines(result.folder / "answers-under_noise.jsonl")}

    def chances(question, row, step):
        html = found.show(row=row, question=question, step=step).html
        return list(map(float, re.findall(r"<span>([\d.]+)</span>", html)))

    question = colour[1].question
    assert question in found.children[1].options
    for step in (0, p.noise_steps[-1]):
        line = stored["attribute-1"] if step == 0 else noised["attribute-1", step]
        expected = [x for m in line["p_true"] for x in (line["p_true"][m], line["p_prior"][m])]
        # Asked of the image's own row, or of another row of the same image.
        for row in (caption, colour):
            assert chances(question, row, step) == pytest.approx(expected, abs=6e-3)
    assert chances("is there a dog ?", colour, 0) == []


def test_objects_and_colours_that_are_not_in_the_image_are_marked(comparison, monkeypatch):
    found = explorer.ask(*comparison)
    chosen = next(v for _, v in found.children[0].options if v[1].id == "caption-1")
    monkeypatch.setattr(generate, "decode", lambda *_, **__: ["a red box and a red disc"])
    marked = found.show(row=chosen, question="what do you see ?", step=0).html
    assert re.findall('<mark class="wrong">(.*?)</mark>', marked) == ["red", "disc"] * 4
