"""What the explorers show: stored numbers without a model, computed ones as the stages compute
them, and every trouble as one sentence.
"""

import math
import re
from types import SimpleNamespace

import ipywidgets
import pytest
import torch
from PIL import Image

from bpo.data import images
from bpo.data import rows as data_rows
from bpo.evaluation import comparison as held_out
from bpo.evaluation import probe
from bpo.models import checkpoint as checkpoints
from bpo.models import encoding, generate
from bpo.models.generate import Request
from bpo.params import NoiseProbability, QualitativeComparison
from bpo.reports import explorer, explorer_cards
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
                              splits={"natural": str(data_file)}, max_new_tokens=5, resamples=100)
    return p, held_out.run(p)


@pytest.fixture(autouse=True)
def loads(monkeypatch):
    """How often a checkpoint is loaded; none is left from another test."""
    monkeypatch.setattr(explorer, "_held", {})
    seen = []
    load = checkpoints.load
    monkeypatch.setattr(checkpoints, "load", lambda *a, **k: (seen.append(a), load(*a, **k))[1])
    return seen


def parts(shown):
    """The widgets of an explorer by kind, its card and its status."""
    rows, card, status = shown.view.children[:-2], *shown.view.children[-2:]
    controls = {type(w).__name__: w for row in rows for w in row.children}
    return SimpleNamespace(**controls, card=card, status=status)


def text(widget):
    return re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", widget.value))


def terms(widget):
    """What the card lists: name -> text."""
    names = re.findall(r"<dt><bdi>(.*?)</bdi></dt>", widget.value)
    said = re.findall(r"<dd>(.*?)</dd>", widget.value)
    return dict(zip(names, (re.sub("<[^>]+>", "", s) for s in said), strict=True))


# --- notebook 1 ---------------------------------------------------------------------------------

def test_at_the_steps_of_the_stage_the_model_says_what_is_stored(analysis, checkpoint):
    p, result = analysis
    lines, candidates = probe.load(result)
    rows = {r.id: r for r in explorer.analysed(p, lines)}
    seen = 0
    for line in lines:
        if line["draw"] == 0 and line["row"] in rows:
            again = explorer.look(p, checkpoint, rows[line["row"]], line["step"],
                                  candidates[line["row"]])
            assert [(a["kind"], a["text"], a["tokens"]) for a in again] == [
                (a["kind"], a["text"], a["tokens"]) for a in line["answers"]]
            assert [a["logp"] for a in again] == pytest.approx(
                [a["logp"] for a in line["answers"]], abs=3e-5)
            seen += 1
    assert seen == len(STEPS) * len(rows) and len(rows) > 0


def test_between_them_it_says_what_a_plain_pass_over_the_noised_image_says(analysis, checkpoint):
    p, result = analysis
    lines, candidates = probe.load(result)
    row = explorer.analysed(p, lines)[0]
    found = explorer.look(p, checkpoint, row, 321, candidates[row.id])
    batch = generate.encode_batch(checkpoint, [Request(row.id, row.prompt, row.image)])
    draw = seeds.torch_generator(p.seed, "probe noise", row.id, 0)
    clean = encoding.encode(checkpoint, encoding.prompt_text(checkpoint, row.prompt, image=True),
                            images.load(row.image))["pixel_values"]
    pixels = encoding.noised(checkpoint.processor, clean, 321, draw)
    for answer in found:
        ids = encoding.answer_tokens(checkpoint, row.prompt, answer["text"])
        whole = torch.cat([batch["input_ids"], torch.tensor([ids])], dim=1)
        with torch.no_grad():
            logits = checkpoint.model(input_ids=whole, attention_mask=torch.ones_like(whole),
                                      pixel_values=pixels).logits[0]
        chain = torch.log_softmax(logits[-len(ids) - 1:-1], dim=-1)[range(len(ids)), ids]
        assert answer["logp"] == pytest.approx(chain.sum().item(), abs=3e-5)


def test_stored_steps_need_no_model_and_others_load_it_once(analysis, loads, checkpoint,
                                                            monkeypatch):
    p, result = analysis
    cards = []
    draw = explorer_cards.at_step
    monkeypatch.setattr(explorer_cards, "at_step", lambda *a: (cards.append(a), draw(*a))[1])
    shown = explorer.noise(p, result)
    w = parts(shown)
    assert w.IntSlider.value == 500 and text(w.status).strip() == (
        "Step 500: from the stored result.")
    first = w.card.value
    w.IntSlider.value = 999
    assert "Noise step 999, signal to noise" in text(w.card) and w.card.value != first
    w.Dropdown.value = 1
    assert loads == []
    lines, _ = probe.load(result)
    row = explorer.analysed(p, lines)[1]
    stored = next(x for x in lines if (x["row"], x["step"], x["draw"]) == (row.id, 999, 0))
    image, question, step, answers, curve = cards[-1]
    assert (question, step, answers) == (row.question, 999, stored["answers"])
    assert [s for s, _ in curve] == STEPS and curve[-1][1] == answers
    # The picture is what the model sees: its noised pixels back in colours.
    how = checkpoint.processor.image_processor
    clean = generate.encode_batch(checkpoint, [Request("x", row.prompt, row.image)])["pixel_values"]
    drawn = seeds.torch_generator(p.seed, "probe noise", row.id, 0)
    mean, std = (torch.tensor(x)[:, None, None] for x in (how.image_mean, how.image_std))
    pixels = encoding.noised(checkpoint.processor, clean, 999, drawn)[0] * std + mean
    shown = torch.tensor(list(image.getdata())).T.reshape(3, *pixels.shape[1:]) / 255
    assert (shown - pixels.clamp(0, 1)).abs().max() < 0.003

    w.IntSlider.value = 998
    assert text(w.status).strip() == "Step 998: computed just now by the model."
    assert cards[-1][2:4] == (998, explorer.look(p, checkpoint, row, 998,
                                                 probe.load(result)[1][row.id]))
    w.IntSlider.value = 997
    explorer.noise(p, result)
    assert len(loads) == 1


def test_a_trouble_of_a_widget_is_one_sentence_in_it(analysis, monkeypatch):
    p, result = analysis
    w = parts(explorer.noise(p, result))

    def broken(*_, **__):
        raise RuntimeError("no <memory> left\nand a trace")

    monkeypatch.setattr(checkpoints, "load", broken)
    before = w.card.value
    w.IntSlider.value = 3
    assert "This did not work: RuntimeError: no &lt;memory&gt; left<" in w.status.value
    assert w.card.value == before
    w.IntSlider.value = 0
    assert text(w.status).strip() == "Step 0: from the stored result."


def test_one_output_holds_the_widgets_and_the_still_figure(analysis, comparison, loads):
    for shown in (explorer.noise(*analysis), explorer.ask(*comparison)):
        bundle = shown._repr_mimebundle_()
        view = bundle["application/vnd.jupyter.widget-view+json"]["model_id"]
        assert ipywidgets.Widget.widgets[view] is shown.view
        assert "Run this cell in JupyterLab" in bundle["text/html"]
        assert "data:image/" in bundle["text/html"] and "<script" not in bundle["text/html"]
        assert bundle["text/plain"] == repr(shown.still)
    assert loads == []
    still = explorer.noise(*analysis).still.html
    assert [int(s) for s in re.findall(r"<strong>step (\d+)</strong>", still)] == STEPS


def test_a_card_shows_probabilities_of_whole_answers_and_what_is_left():
    def answers(true, prior):
        return [{"kind": kind, "text": f"<{kind}>", "logp": math.log(chance)}
                for kind, chance in (("true", true), ("prior", prior))]

    curve = [(0, answers(0.5, 0.25)), (999, answers(0.2, 0.0003))]
    card = explorer_cards.at_step(Image.new("RGB", (8, 8)), "a <i> ?", 999, answers(0.2, 0.0003),
                                  curve).html
    shown = [text(SimpleNamespace(value=row)) for row in card.split("margin-top:.5em")[1:]]
    assert [re.findall(r"true answer|prior's answer|any other answer|\d[.e]\S+", row.split("%")[0]
                       )[:2] for row in shown] == [
        ["true answer", "0.200"], ["prior's answer", "3e-04"], ["any other answer", "0.800"]]
    assert re.findall(r"width:(\d+\.\d)%", card) == ["20.0", "0.0", "80.0"]
    sure = explorer_cards.still_at_step(Image.new("RGB", (8, 8)), 0, answers(0.7, 0.25))
    assert re.findall(r"width:(\d+\.\d)%", sure) == ["70.0", "25.0", "5.0"]
    assert "a &lt;i&gt; ?" in card and "&lt;true&gt;" in card and "<i>" not in card
    assert re.findall('polyline points="(.*?)"', card) == ["0.0,42.0 360.0,67.2",
                                                           "0.0,63.0 360.0,84.0"]
    assert re.findall('cx="(.*?)" cy="(.*?)"', card) == [("360.0", "67.2"), ("360.0", "84.0")]


# --- notebook 4 ---------------------------------------------------------------------------------

def test_stored_answers_are_shown_until_one_asks(comparison, loads):
    p, result = comparison
    w = parts(explorer.ask(p, result))
    lines = {x["id"]: x for x in read_lines(result.folder / "answers-natural.jsonl")}
    rows = explorer.offered(p, "natural", list(lines.values()))
    for n, row in enumerate(rows):
        w.Dropdown.value = n
        assert w.Text.value == row.question
        answers = lines[row.id]["answers"]
        assert {m: t for m, t in terms(w.card).items() if m in answers} == {
            m: a or "–" for m, a in answers.items()}
    assert loads == [] and len(rows) == len(lines)


def test_a_question_is_answered_by_the_base_and_by_every_adapter(comparison, model_folder, adapters,
                                                                 loads):
    p, result = comparison
    w = parts(explorer.ask(p, result))
    lines = read_lines(result.folder / "answers-natural.jsonl")
    row = explorer.offered(p, "natural", lines)[0]
    w.Text.value = "  is there a <b>cat</b> ? "
    w.Button.click()
    assert "Answered just now" in text(w.status) and not w.Button.disabled
    assert "is there a &lt;b&gt;cat&lt;/b&gt; ?" in w.card.value and "<b>" not in w.card.value
    asked = [Request("x", ({"role": "user", "content": "is there a <b>cat</b> ?"},), row.image)]
    plain = checkpoints.load(model_folder)
    tuned = checkpoints.load_adapters(checkpoints.load(model_folder), {"x": adapters / "bpo" / "adapter"})
    said = [generate.decode(m, generate.encode_batch(m, asked), max_new_tokens=5)[0]
            for m in (plain, tuned)]
    shown = terms(w.card)
    assert (shown["base"], shown["bpo"]) == tuple(a or "–" for a in said)
    assert list(shown) == ["in the image", *lines[0]["answers"]]
    loads.clear()
    w.Text.value = "is there a dog ?"
    w.Button.click()
    assert "is there a dog ?" in w.card.value and loads == []


def test_no_question_is_no_answer(comparison, loads):
    w = parts(explorer.ask(*comparison))
    before = w.card.value
    w.Text.value = "  "
    w.Button.click()
    assert text(w.status).strip() == "There is no question: type one, then press Ask."
    assert not w.Button.disabled and loads == [] and w.card.value == before


def test_words_are_marked_by_what_is_known_of_the_image(comparison, data_file):
    p, result = comparison
    lines = read_lines(result.folder / "answers-natural.jsonl")
    truth = data_rows.read_truth(data_file)
    row = next(r for r in explorer.offered(p, "natural", lines) if r.id == "attribute-1")
    answers = {"base": "a green box and a disc", "bpo": "red"}

    def wrong(question, truth=truth):
        return explorer.wrong_words(row, question, answers, lines=lines, truth=truth)

    # Its own question: the true colour is green. Another: only objects can be wrong.
    assert wrong("what colour is the box ?")["bpo"] == {"red"}
    assert wrong("what do you see ?") == {"base": {"disc"}, "bpo": set()}
    nothing = {"images": {}, "rows": {}, "vocabulary": {"objects": {}, "colours": []}}
    assert wrong("what do you see ?", nothing) == {"base": set(), "bpo": set()}
