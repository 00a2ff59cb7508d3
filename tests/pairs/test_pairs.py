"""Pairs: prompts of injection, what methods learn from, and the whole stage of notebook 2."""

import json
import os
import random
import shutil
import subprocess
import sys
import time

import psutil
import pytest
from helpers import warm
from helpers.data import conversation
from helpers.server import completion
from helpers.study import killed_until
from PIL import ImageOps

from bpo import params
from bpo.data import check
from bpo.data import rows as data_rows
from bpo.data.rows import Row
from bpo.evaluation import metrics
from bpo.models import encoding, generate
from bpo.models.weakening import WEAKENINGS, Weakening
from bpo.pairs import candidates, injection, selection
from bpo.pairs import rows as pair_rows
from bpo.pairs import stage as pairs
from bpo.pairs.candidates import Candidates
from bpo.params import PairGeneration, Refusal
from bpo.reports.tables import pair_tables
from bpo.study.files import read_lines, write_lines

# --- prompts, layouts, files --------------------------------------------------------------------

@pytest.mark.parametrize("template, question, answer, filled", [
    ("Q {question} A {answer} W", "what ?", "red", "Q what ? A red W"),
    ("{answer} to {question} {question}", "q ?", "red", "red to q ? q ?"),
    ('{"a": {}} {x} {answer}', "q ?", "red", '{"a": {}} {x} red'),
    ("{question} : {answer}", "what is in {answer} ?", "it says {question}",
     "what is in {answer} ? : it says {question}")])
def test_a_prompt_s_places_are_filled_and_no_other_braces(template, question, answer, filled):
    row = Row("a", None, "0.png", ({"role": "user", "content": question},), answer, "attribute")
    assert injection.fill(template, row) == filled


LINES = [
    {"id": "a", "image": "0.png", "category": "x", "prompt": [{"role": "user", "content": "q ?"}],
     "chosen": "red", "rejected": [{"source": "weakened", "text": "blue"},
                                   {"source": "injected", "text": "green"}]},
    {"id": "b", "image": "1.png", "category": "x", "prompt": [{"role": "user", "content": "r ?"}],
     "chosen": "dog", "rejected": [{"source": "injected", "text": "cat"}]},
    {"id": "c", "image": "1.png", "category": "x", "prompt": [{"role": "user", "content": "s ?"}],
     "chosen": "yes", "rejected": []}]


def test_pairs_become_one_preference_row_a_rejected_answer(tmp_path):
    rows = pair_rows.to_preferences(LINES, tmp_path)
    assert rows[0] == {"id": "a", "images": [str(tmp_path / "0.png")],
                       "prompt": [{"role": "user", "content": "q ?"}],
                       "chosen": [{"role": "assistant", "content": "red"}],
                       "rejected": [{"role": "assistant", "content": "blue"}]}
    assert [r["rejected"][0]["content"] for r in rows] == ["blue", "green", "cat"]


@pytest.mark.parametrize("method, texts", [
    ("bpo", ["blue", "grey", "green", "cat"]), ("bpo_weaken", ["blue", "grey"]),
    ("bpo_inject", ["green", "cat"]), ("bpo_noisy", ["blue"]), ("bpo_crop", ["grey"]),
    ("bpo_blank", []), ("bpo_unselected", ["black"])])
def test_each_method_learns_from_its_own_rejected_answers(method, texts, tmp_path):
    lines = [LINES[0] | {"rejected": [
        {"source": "weakened", "mode": "noisy", "text": "blue"},
        {"source": "weakened", "mode": "crop", "text": "grey"},
        {"source": "injected", "mode": "endpoint", "text": "green"}],
        "unselected": [{"source": "weakened", "mode": "noisy", "text": "black"}]}, LINES[1]]
    rows = pair_rows.to_preferences(lines, tmp_path, method=method)
    assert [r["rejected"][0]["content"] for r in rows] == texts


COLOURS = [{"id": str(n), "image": f"{n}.png", "category": "colour", "prompt": [],
            "chosen": chosen, "rejected": [{"source": "weakened", "text": rejected, "step": 100 * n,
                                            "scores": {"margin": n / 10}}]}
           for n, (chosen, rejected) in enumerate([
               ("red", "blue"), ("blue", "red"), ("green", "red"), ("red", "green"),
               ("pink", "blue"), ("a red cup", "a blue cup")])]


def answers(method, lines=COLOURS, **settings):
    rows = pair_rows.to_preferences(lines, params.ROOT, method=method, **settings)
    return [(r["id"], r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in rows]


def test_controls_change_one_thing_about_the_pairs():
    every = answers("bpo")
    assert answers("bpo_reversed") == [(n, r, c) for n, c, r in every]
    assert {tuple(r["images"]) for r in pair_rows.to_preferences(
        COLOURS, params.ROOT, method="bpo_blind")} == {()}
    shuffled = answers("bpo_shuffled", seed=3)
    assert [k[:2] for k in shuffled] == [k[:2] for k in every] and shuffled != every
    assert {r for *_, r in shuffled} <= {r for *_, r in every}
    assert all(c != r for _, c, r in shuffled)
    assert answers("bpo_shuffled", seed=3) == shuffled != answers("bpo_shuffled", seed=4)
    assert answers("bpo_own", [COLOURS[0] | {"own": "pink"}, COLOURS[1], COLOURS[2] | {
        "own": "Red."}]) == [("0", "pink", "blue")]
    assert answers("bpo_hard") == every[:2] and answers("bpo_easy") == every[:-3:-1][::-1]
    assert answers("bpo", noise_step=300) == [every[3]]


def test_a_random_edit_is_a_word_of_its_place_and_none_that_the_model_said():
    edits = {n: (chosen, text) for n, chosen, text in answers("bpo_edited", seed=1)}
    assert edits["0"][1] in {"green", "pink", "a"} and edits["3"][1] in {"blue", "pink", "a"}
    whole = edits["5"][1].split()  # "a red cup": only its first word has others in its place
    assert whole[1:] == ["red", "cup"] and whole[0] in {"red", "blue", "green", "pink"}
    assert all(text != chosen for chosen, text in edits.values())


def test_a_matched_sft_has_the_positives_of_its_method_in_order_and_as_often():
    for method in ("bpo_weaken", "bpo_reversed", "bpo_blind", "bpo_easy"):
        rows = pair_rows.training_rows(method, COLOURS, params.ROOT, seed=0)
        sft = pair_rows.training_rows(f"sft_matched{method.removeprefix('bpo')}", COLOURS,
                                      params.ROOT, seed=0)
        assert [(r["id"], r["images"], r["completion"]) for r in sft] == [
            (r["id"], r["images"], r["chosen"]) for r in rows]


def test_a_weight_is_a_column_where_one_is_not_1():
    weighed = [COLOURS[0] | {"rejected": [{"source": "x", "text": "blue", "weight": 2.0}]},
               COLOURS[1]]
    assert [r["weight"] for r in pair_rows.to_preferences(weighed, params.ROOT)] == [2.0, 1.0]
    assert "weight" not in pair_rows.to_preferences(COLOURS, params.ROOT)[0]


def test_preference_rows_become_completions_in_order_and_as_often(tmp_path):
    rows = pair_rows.to_completions(pair_rows.to_preferences(LINES, tmp_path))
    assert [r["completion"][0]["content"] for r in rows] == ["red", "red", "dog"]
    assert set(rows[0]) == {"id", "images", "prompt", "completion"}
    assert rows[2]["images"] == [str(tmp_path / "1.png")]


def test_pairs_are_read_as_they_were_written(tmp_path):
    write_lines(tmp_path / "pairs.jsonl", LINES)
    assert pair_rows.read_pairs(tmp_path / "pairs.jsonl") == LINES


def test_a_missing_file_of_pairs_names_its_notebook(tmp_path):
    with pytest.raises(Refusal, match=r"2_pair_generation\.ipynb"):
        pair_rows.read_pairs(tmp_path / "pairs.jsonl")


@pytest.mark.parametrize("text", ("", '{"id": "a"}\n', "5\n", "[]\n"))
def test_a_file_that_holds_no_pairs_is_refused(tmp_path, text):
    (tmp_path / "pairs.jsonl").write_text(text)
    with pytest.raises(Refusal, match="must hold lines with id, image, prompt, chosen"):
        pair_rows.read_pairs(tmp_path / "pairs.jsonl")


def test_a_broken_line_is_named(tmp_path):
    good = json.dumps(LINES[0])
    (tmp_path / "pairs.jsonl").write_text(f"{good}\n{good}\n{good[:50]}\n")
    with pytest.raises(Refusal, match="line 3 is not JSON"):
        pair_rows.read_pairs(tmp_path / "pairs.jsonl")


# --- the stage ----------------------------------------------------------------------------------

FILES = ("rows.jsonl", "rejected_rows.jsonl", "weakened-noisy-800-0.jsonl", "injected.jsonl",
         "scores.jsonl", "candidates.jsonl", "dropped.jsonl", "pairs.jsonl")


@pytest.fixture(scope="module")
def parameters(model_folder, text_folder, data_file, prompt_files, tmp_path_factory):
    # A random model hardly ever ends an answer: every second word ends this one's.
    text_model = shutil.copytree(text_folder, tmp_path_factory.mktemp("ending") / "model")
    settings = text_model / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {
        "eos_token_id": [2, *range(7, 200, 2)]}))
    return PairGeneration(study="s", model=str(model_folder), text_model=str(text_model),
                          data=str(data_file), max_new_tokens=6, batch_tokens=120, **prompt_files)


@pytest.fixture(scope="module")
def uninterrupted(parameters, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BPO_OUTPUTS", str(tmp_path_factory.mktemp("pairs")))
        result = pairs.run(parameters)
        assert pairs.run(parameters).metrics == result.metrics, "read again, the numbers differ"
    return result


def written(folder):
    return {f: (folder / f).read_bytes() for f in FILES}


def changed(parameters, **changes):
    return PairGeneration(**{**parameters.model_dump(), **changes})


def test_the_stage_writes_a_line_a_positive_and_its_audit(uninterrupted, data_file):
    rows, _ = data_rows.read_rows(data_file)
    lines = pair_rows.read_pairs(uninterrupted.folder / "pairs.jsonl")
    assert [k["id"] for k in lines] == [r.id for r in rows]
    assert [k["chosen"] for k in lines] == [r.answer for r in rows]
    dropped = read_lines(uninterrupted.folder / "dropped.jsonl")
    kept = sum(len(k["rejected"]) for k in lines)
    assert kept + len(dropped) == 2 * len(rows)
    assert kept > 0
    found = uninterrupted.metrics
    assert (found["rows"], found["pairs"], found["rows_skipped"]) == (len(rows), kept, {})
    assert found["audited"] == len(rows)
    for line in read_lines(uninterrupted.folder / "candidates.jsonl"):
        for c in line["candidates"]:
            same = metrics.normalised(c["text"]) == metrics.normalised(line["chosen"])
            assert ("scores" in c) != ("fault" in c or same or not metrics.normalised(c["text"]))
    assert sum(found[s]["kept"] for s in ("weakened", "injected")) == kept
    assert set(uninterrupted.manifest["inputs"]) == {
        "model", "text_model", "data", "truth", "describe_prompt", "question_prompt",
        "noise_words"}
    files = {*FILES, "manifest.json", "results.csv"}
    assert {f.name for f in uninterrupted.folder.iterdir()} == files


def test_rejected_answers_are_what_the_models_said(uninterrupted):
    said = {s: {x["id"]: x.get("texts") or [r["text"] for r in x["replies"]]
                for x in read_lines(uninterrupted.folder / f)}
            for s, f in (("weakened", FILES[2]), ("injected", FILES[3]))}
    for line in pair_rows.read_pairs(uninterrupted.folder / "pairs.jsonl"):
        for rejected in line["rejected"]:
            assert [rejected["text"]] == said[rejected["source"]][line["id"]]
            assert metrics.normalised(rejected["text"]) != metrics.normalised(line["chosen"])


def test_scores_are_the_model_s_log_probs_under_both_images(uninterrupted, parameters, checkpoint):
    from bpo.models import logprobs
    made, view = Candidates(parameters, uninterrupted.folder), candidates.views(parameters)[0]
    assert list(made) == read_lines(uninterrupted.folder / "candidates.jsonl")
    number, line = next((i, x) for i, x in enumerate(made) if "scores" in x["candidates"][0])
    request = made.request(number, view)
    text = encoding.answer_text(checkpoint, request.messages, line["candidates"][0]["text"])
    for name, seen in (("logp_clean", None), ("logp_noisy", view)):
        inputs = generate.encode_batch(checkpoint, [request], seen, seed=parameters.seed)
        [[alone]] = logprobs.weigh_unpacked(checkpoint, inputs,
                                            [[encoding.answer_ids(checkpoint, text)]])
        assert line["candidates"][0]["scores"][name] == pytest.approx(
            alone.logprobs.mean().item(), abs=1e-4)


def test_the_same_parameters_give_the_same_bytes_anywhere(uninterrupted, parameters, outputs):
    result = pairs.run(parameters)
    assert result.folder != uninterrupted.folder
    assert written(result.folder) == written(uninterrupted.folder)
    assert result.metrics == uninterrupted.metrics


@pytest.mark.parametrize("killed_at", (1, 4))
def test_an_interrupted_stage_goes_on_to_the_same_bytes(uninterrupted, parameters, outputs,
                                                        monkeypatch, killed_at):
    reply, calls = generate.replies, []

    def killed(*args, **options):
        calls.append(1)
        if len(calls) > killed_at:
            raise KeyboardInterrupt
        return reply(*args, **options)

    whole, counted, take_stock = [], [], check.take_stock
    monkeypatch.setattr(check, "take_stock", lambda *args, **options: (
        counted.append(1), take_stock(*args, **options)))
    monkeypatch.setattr(generate, "replies",
                        lambda *args, **options: whole.append(1) or reply(*args, **options))
    with monkeypatch.context() as patch:
        patch.setattr(generate, "replies", killed)
        with pytest.raises(KeyboardInterrupt):
            pairs.run(parameters)
    result = pairs.run(parameters)
    assert written(result.folder) == written(uninterrupted.folder)
    assert len(counted) == 1, "the rows were read and checked twice"
    again = len(whole)
    pairs.run(changed(parameters, study="other"))
    assert again == len(whole) - again - killed_at, "a batch was decoded twice"


def test_another_seed_gives_other_pairs(uninterrupted, parameters, outputs):
    result = pairs.run(changed(parameters, seed=1))
    assert written(result.folder)[FILES[2]] != written(uninterrupted.folder)[FILES[2]]


def test_another_budget_of_tokens_gives_the_same_answers(uninterrupted, parameters, outputs):
    """Not promised in general: logits may differ in their last bits. Here they do not matter."""
    result = pairs.run(changed(parameters, batch_tokens=1000))
    assert written(result.folder)[FILES[2]] == written(uninterrupted.folder)[FILES[2]]


def launching(processes, parameters, root, tmp_path, *, python=""):
    """The stage under the launcher of accelerate, in so many processes, as it begins."""
    values = {n: v for n, v in parameters.model_dump().items()
              if v != type(parameters).model_fields[n].get_default() and n != "study"}
    command = [python or warm.python(), "-m", "accelerate.commands.launch", "--multi_gpu",
               "--num_machines", "1", "--num_processes", str(processes), "--mixed_precision", "no",
               "--dynamo_backend", "no", "--main_process_port", "0",
               "-m", "bpo", "stage", "tiny", "2", "--as", "s",
               *(x for n, v in values.items() for x in ("-p", n, json.dumps(v)))]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            cwd=tmp_path, env={**os.environ, "BPO_OUTPUTS": str(root),
                                               "OMP_NUM_THREADS": "1"})


def launched(*given, **settings):
    with launching(*given, **settings) as launcher:
        out, errors = launcher.communicate(timeout=300)
    return subprocess.CompletedProcess(launcher.args, launcher.returncode, out, errors)


@pytest.mark.slow
@pytest.mark.parametrize("processes, temperature", [(2, 1.0), (3, 1.0), (2, 0.0)])
def test_several_processes_write_the_bytes_of_one(parameters, outputs, tmp_path, processes,
                                                  temperature):
    p = changed(parameters, weaken_temperature=temperature, inject_temperature=temperature)
    alone = pairs.run(p)
    fresh = sys.executable if temperature == 0 else ""
    done = launched(processes, p, tmp_path / "out", tmp_path, python=fresh)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "out" / "s" / "2_pair_generation"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["processes"] == processes
    assert written(folder) == written(alone.folder)
    assert manifest["metrics"] == alone.metrics


@pytest.mark.slow
def test_eight_processes_that_were_killed_twice_write_the_bytes_of_one(parameters, data_file,
                                                                       outputs, tmp_path):
    """First one of the eight dies, and the launcher ends the others; then all of them and it."""
    entries = json.loads(data_file.read_text())
    (tmp_path / "rows.json").write_text(json.dumps(
        [conversation(f"{e['id']} {n}", e["image"],
                      " ".join(("a", "the")[int(bit)] for bit in f"{n:08b}"),
                      e["conversations"][1]["value"]) for n in range(167) for e in entries]))
    p = changed(parameters, data=str(tmp_path / "rows.json"), image_folder=str(data_file.parent),
                sources=["weakened"], score_candidates=False, rows=2000, batch_tokens=400,
                max_new_tokens=3)
    whole = pairs.run(p)
    folder = tmp_path / "out" / "s" / "2_pair_generation"

    def done():
        return sum(f.read_bytes().count(b"\n") for f in folder.glob("shards/*.jsonl"))

    def started():
        return [x for x in psutil.process_iter(["cmdline"])
                if str(tmp_path / "rows.json") in " ".join(x.info["cmdline"] or ())]

    for rows, victims in ((300, 1), (1000, 9)):
        launcher = launching(8, p, tmp_path / "out", tmp_path)
        # Before the launcher had ended the first round's, they may have come as far as the second's.
        while launcher.poll() is None and (done() < rows or len(started()) < 1 + 8):
            time.sleep(0.05)
        for process in sorted(started(), key=lambda x: x.create_time())[-victims:]:
            process.kill()
        launcher.communicate(timeout=60)
        assert launcher.returncode and not (folder / "weakened-noisy-800-0.jsonl").exists()
    done = launched(8, p, tmp_path / "out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    names = [f for f in FILES if f not in ("injected.jsonl", "scores.jsonl")]
    assert {f: (folder / f).read_bytes() for f in names} == {
        f: (whole.folder / f).read_bytes() for f in names}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["processes"], manifest["metrics"]) == (8, whole.metrics)
    assert manifest["metrics"]["rows"] == 2000


@pytest.mark.slow
def test_the_notebook_starts_the_processes_that_it_is_told_to(parameters, outputs, warm_launches):
    result = pairs.run(changed(parameters, launch="--multi_gpu --num_machines 1 --num_processes 2 "
                               "--mixed_precision no --dynamo_backend no --main_process_port 0"))
    assert (result.done, result.manifest["processes"]) == ("up to date, read again", 2)
    assert written(result.folder) == written(pairs.run(changed(parameters, study="alone")).folder)


@pytest.mark.slow
def test_a_refusal_of_the_first_process_ends_them_all(parameters, tmp_path):
    done = launched(2, changed(parameters, max_bad_share=0.0, data=str(tmp_path / "rows.json")),
                    tmp_path / "out", tmp_path)
    assert done.returncode == 1
    assert f"{tmp_path / 'rows.json'}: there is no such file or folder" in done.stderr


KILLS = 200


@pytest.mark.slow
def test_two_hundred_kills_at_any_time_leave_the_bytes_of_a_run_without_one(
        parameters, data_file, outputs, tmp_path):
    entries = json.loads(data_file.read_text())
    (tmp_path / "rows.json").write_text(json.dumps(
        [conversation(f"{e['id']} {n}", e["image"],
                      "the " * n + e["conversations"][0]["value"].removeprefix("<image>\n"),
                      e["conversations"][1]["value"]) for n in range(8) for e in entries]))
    p = changed(parameters, data=str(tmp_path / "rows.json"), image_folder=str(data_file.parent))
    whole = pairs.run(changed(p, study="whole"))
    rng, kills, ends = random.Random(0), 0, 0
    while kills < KILLS:
        study = changed(p, study=f"killed-{ends}")
        folder = outputs / study.study / study.notebook
        kills += killed_until(folder / "manifest.json", lambda: pairs.run(study), rng=rng,
                              shortest=0.05, longest=0.7)
        ends += 1
        result = pairs.run(study)
        assert result.done == "up to date, read again"
        assert written(folder) == written(whole.folder)
        assert result.metrics == whole.metrics
        assert not list(folder.parent.glob("*.old-*")), "a killed run was thrown away"
    assert ends > 1


def test_several_samples_and_draws_give_several_candidates_and_one_is_kept(parameters, outputs):
    result = pairs.run(changed(
        parameters, sources=["weakened"], weaken_modes=["noisy", "crop", "blank", "swapped"],
        weaken_steps=[500, 900], weaken_draws=2, weaken_samples=2, rows=4,
        select={"image": 1.0, "length": 0.5}))
    made = read_lines(result.folder / "candidates.jsonl")
    for line in made:
        groups = [(c["mode"], c.get("step"), c["draw"]) for c in line["candidates"]]
        assert len(groups) == 2 * (2 * 2 + 2 + 1 + 2)
        assert len(set(groups)) == len(groups) // 2
    lines = pair_rows.read_pairs(result.folder / "pairs.jsonl")
    for line in lines:
        groups = [(r["mode"], r.get("step")) for r in line["rejected"]]
        assert len(set(groups)) == len(groups)
        assert [(r["mode"], r.get("step")) for r in line["unselected"]] == groups
    assert any(line["unselected"] != line["rejected"] for line in lines)
    ways = pair_tables.ways(result)
    assert "4 positives" in ways.plain and "<details" not in ways.html  # one way alone is folded
    drop = result.metrics["weakened"]["dropped"]
    assert drop["not selected"] > 0
    # What selection is for: the kept are liked more by the prior, and less by the image.
    gain = {side: [c["scores"]["logp_noisy"] - c["scores"]["logp_clean"] for x in lines
                   for c in x[side] if "scores" in c]
            for lines, side in ((made, "candidates"),
                                (pair_rows.read_pairs(result.folder / "pairs.jsonl"), "rejected"))}
    assert (sum(gain["rejected"]) / len(gain["rejected"])
            > sum(gain["candidates"]) / len(gain["candidates"]))


@pytest.mark.parametrize("mode", ("contrast", "reverse_contrast"))
def test_contrasts_make_pairs_too(parameters, outputs, mode):
    result = pairs.run(changed(parameters, sources=["weakened"], weaken_modes=[mode], rows=3,
                               score_candidates=False))
    assert (result.folder / f"weakened-{mode}-800-0.jsonl").is_file()
    assert result.metrics["rows"] == 3 and result.metrics["weakened"]["candidates"] == 3


REPLIES = (  # what an endpoint replies, the text that is taken from it, or why none is
    (completion("<think>hm</think>Sure! Here is it:\n\n\"a wrong cat\""), "a wrong cat", None),
    (completion("a wrong dog"), "a wrong dog", None),
    (completion("I'm sorry, but I can't help with that."), None, "reply that refuses"),
    (completion("1. a cat\n2. a dog"), None, "reply of several answers"),
    (completion("a wrong", "length"), None, "reply cut off"),
    (completion("<think>a wrong"), None, "reply of thoughts alone"),
    (completion(None), None, "empty"),
    ((400, {}, {"error": "filtered"}), None, "request refused, HTTP 400"))


@pytest.fixture
def injected(parameters, endpoint, server, outputs):
    """Runs the stage with 12 rewrites of a server that gives replies in turn, after its check."""
    def run(*replies):
        left = iter([completion("yes"), *replies])
        server.reply = lambda number, body: next(left)
        server.seen.clear()
        return pairs.run(changed(
            parameters, sources=["injected"], endpoint=server.url, endpoint_model="m",
            endpoint_key_variable="TEST_KEY", endpoint_requests=1, endpoint_retries=0,
            score_candidates=False))
    return run


def test_an_endpoint_s_replies_are_cleaned_or_dropped_and_counted(injected, server):
    replies = [r for r, _, _ in REPLIES]
    with pytest.raises(Refusal, match="HTTP 503: busy; 1 of this batch's 4 had been answered"):
        injected(*replies[:5], (503, {}, {"error": "busy"}))
    result = injected(*replies[5:], *[completion("a wrong dog")] * 4)
    assert len(server.seen) == 1 + 7, "what was answered is not asked again"
    made = [line["candidates"][0] for line in read_lines(result.folder / "candidates.jsonl")]
    for candidate, (_, text, why) in zip(made, REPLIES, strict=False):
        assert candidate.get("fault") == (why if why != "empty" else None)
        assert text in (None, candidate["text"])
    found = result.metrics["injected"]
    assert found["dropped"] == {why: 1 for _, _, why in REPLIES if why}
    # What is no answer is not measured as one.
    assert (found["candidates"], found["near_duplicates"]["candidates"]["n"]) == (12, 7)
    assert "reply that refuses" in pair_tables.dropped(result.metrics).plain


def test_an_endpoint_that_refuses_every_row_ends_the_run_and_is_asked_again(injected, server):
    with pytest.raises(Refusal, match="model m: refused, HTTP 400: too long; change what it"):
        injected(*[(400, {}, {"error": "too long"})] * 12)
    assert injected(*[completion("a wrong dog")] * 12).metrics["injected"]["kept"] == 12


def test_a_new_way_of_weakening_is_one_entry(parameters, outputs, monkeypatch):
    """By its name alone: the parameters take it, answers come, and a method learns from them."""
    monkeypatch.setitem(WEAKENINGS, "mirrored", Weakening(
        "mirrored", "left and right change places",
        picture=lambda image, draw: ImageOps.mirror(image)))
    p = params.validate(PairGeneration, parameters.model_dump() | {
        "weaken_modes": ["mirrored"], "sources": ["weakened"], "rows": 3}, where="here")
    result = pairs.run(p)
    assert len(read_lines(result.folder / "weakened-mirrored-0.jsonl")) == 3
    lines = pair_rows.read_pairs(result.folder / "pairs.jsonl")
    assert {r["mode"] for x in lines for r in x["rejected"]} == {"mirrored"}
    [method] = params.DPOTraining(methods=["bpo_mirrored"]).methods
    texts = [r["rejected"][0]["content"]
             for r in pair_rows.to_preferences(lines, outputs, method=method)]
    assert texts == [r["text"] for x in lines for r in x["rejected"]]


def test_rejected_answers_that_the_data_brings_are_taken(parameters, data_file, outputs, tmp_path):
    image = next((data_file.parent / "images").iterdir())
    (tmp_path / "rows.json").write_text(json.dumps([
        {"question": "what colour ?", "chosen": "red", "rejected": "blue",
         "image": image.name}]))
    result = pairs.run(changed(parameters, data=str(tmp_path / "rows.json"), sources=["given"],
                               image_folder=str(image.parent)))
    [line] = pair_rows.read_pairs(result.folder / "pairs.jsonl")
    assert [(r["source"], r["text"]) for r in line["rejected"]] == [("given", "blue")]
    assert result.metrics["given"]["kept"] == 1


def test_several_data_files_become_one_set(parameters, data_file, outputs, tmp_path):
    entries = json.loads(data_file.read_text())
    (tmp_path / "a.json").write_text(json.dumps(entries[:3]))
    (tmp_path / "b.json").write_text(json.dumps(
        [e | {"image": e["image"].removeprefix("images/")} for e in entries[:2]]))
    result = pairs.run(changed(
        parameters, data={str(tmp_path / "a.json"): "", str(tmp_path / "b.json"): "images"},
        image_folder=str(data_file.parent), score_candidates=False))
    lines = pair_rows.read_pairs(result.folder / "pairs.jsonl")
    assert [k["id"] for k in lines] == ["a/caption-0", "a/attribute-0", "a/presence-0",
                                        "b/caption-0", "b/attribute-0"]
    assert len({k["image"] for k in lines}) == 1
    assert {"data a.json", "data b.json"} <= set(result.manifest["inputs"])


def test_swapping_needs_two_images(parameters, data_file, outputs, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(json.loads(data_file.read_text())[:3]))
    with pytest.raises(Refusal, match="swapped needs rows with different images"):
        pairs.run(changed(parameters, data=str(tmp_path / "rows.json"), weaken_modes=["swapped"],
                          image_folder=str(data_file.parent)))


def test_the_checkpoint_itself_injects_errors_where_no_text_model_is_named(parameters, outputs):
    result = pairs.run(changed(parameters, text_model="", rows=3))
    assert result.metrics["rows"] == 3
    assert len(read_lines(result.folder / "injected.jsonl")) == 3
    assert "text_model" not in result.manifest["inputs"]


def test_descriptions_and_other_answers_have_a_prompt_each(parameters, outputs, monkeypatch):
    asked, right = [], generate.encode_branches
    monkeypatch.setattr(generate, "encode_branches", lambda checkpoint, requests, view, **options: (
        asked.extend(requests), right(checkpoint, requests, view, **options))[1])
    pairs.run(changed(parameters, sources=["injected"], score_candidates=False))
    told = {r.id: r.messages[-1]["content"] for r in asked}
    assert len(told) == 12
    for row_id, text in told.items():
        starts = "rewrite this wrong" if row_id.startswith("caption") else "question what"
        assert text.startswith(starts) or row_id.startswith("presence")
    assert told["presence-0"].startswith("question is there")


def test_long_answers_are_left_out_listed_and_counted(parameters, outputs):
    result = pairs.run(changed(parameters, max_words=3, score_candidates=False))
    assert {k["category"] for k in pair_rows.read_pairs(result.folder / "pairs.jsonl")} == {
        "attribute", "presence"}
    assert result.metrics["rows_skipped"] == {"answer longer than 3 words": 4}
    listed = read_lines(result.folder / "rejected_rows.jsonl")
    assert [x["id"] for x in listed] == [f"caption-{n}" for n in range(4)]


def test_a_limit_that_drops_every_row_is_refused(parameters, data_file, outputs, tmp_path):
    entries = [e for e in json.loads(data_file.read_text()) if e["id"].startswith("caption")]
    (tmp_path / "rows.json").write_text(json.dumps(entries))
    with pytest.raises(Refusal, match="4 answer longer than 3 words"):
        pairs.run(changed(parameters, data=str(tmp_path / "rows.json"), max_words=3,
                          image_folder=str(data_file.parent)))


@pytest.mark.parametrize("wrong, said", [
    ({"weaken_steps": [0]}, "step 0 is the clean image"),
    ({"weaken_modes": ["noisy", "noisy"]}, "weaken_modes: a value is named twice"),
    ({"data": {"a.json": ""}, "image_folder": ""}, "must be named when data names several files"),
    ({"endpoint": "http://127.0.0.1:1/v1"}, "endpoint_model: must be named"),
    ({"select": {"image": 1.0}, "score_candidates": False}, "the score image needs"),
    ({"weaken_samples": 2, "weaken_temperature": 0.0}, "would all be the same"),
    ({"select": {"magic": 1.0}}, "select")])
def test_parameters_that_do_not_fit_together_are_refused(wrong, said):
    with pytest.raises(Refusal, match=said):
        params.validate(PairGeneration, wrong, where="here")


def test_the_gallery_shows_pairs_with_the_most_rejected_answers_of_each_category(
        uninterrupted, parameters):
    cards = pairs.examples(parameters.model_copy(update={"gallery": 3}), uninterrupted)
    assert [c["category"] for c in cards] == ["attribute", "caption", "presence"]
    for card in cards:
        assert [r["source"] for r in card["rejected"]] == ["weakened", "injected"]
        assert card["image"].mode == "RGB" and card["weakened"].size == (32, 32)


def rows_of(shown):
    return shown.plain.splitlines()[2:]


def test_the_tables_have_a_row_for_everything_that_was_counted(uninterrupted, parameters):
    found = uninterrupted.metrics
    assert pair_tables.sources(found) == ["weakened", "injected"]
    assert len(rows_of(pair_tables.kept(found))) == 6
    assert sum(int(r.split()[-1]) for r in rows_of(pair_tables.dropped(found))[1:]) == (
        2 * 12 - found["pairs"])
    length = next(r for r in rows_of(pair_tables.checks(found)) if "words more than the" in r)
    assert length.count("[") == 4
    assert {r.split()[0] for r in rows_of(pair_tables.shortcuts(found))} == {"weakened", "injected"}
    assert [r.split()[0] for r in rows_of(pair_tables.displacement(found))] == [
        "weakened", "injected"]
    assert [r.split()[0] for r in rows_of(pair_tables.scores(parameters))[1:]] == list(
        params.SCORES)
    assert len(rows_of(pair_tables.weakenings(parameters))[1:]) == len(WEAKENINGS)
    shown = pair_tables.headline(found).plain
    assert f"{found['pairs']} pairs from 12" in shown
    for source in ("weakened", "injected"):
        prior = found[source]["is_prior"]["kept"]
        assert f"of {prior['n']}) of the {source} pairs" in shown
    assert "weakened, attribute: 100% (4 of 4); " in pair_tables.longer(found).plain
    assert "in one way, noisy-800" in pair_tables.ways(uninterrupted).plain


def test_one_row_by_hand_ends_as_the_stage_stored_it(uninterrupted, parameters):
    number, view = pairs.example(parameters, uninterrupted), candidates.views(parameters)[0]
    made = Candidates(parameters, uninterrupted.folder)
    request, stored = made.request(number, view), made[number]["candidates"][0]["text"]
    inputs = generate.encode_branches(made.model, [request], view, seed=parameters.seed)
    sampled = made.answers(made.model, [request], inputs, view)[0]["texts"]
    assert sampled == [stored]
    assert "They are the same." in pair_tables.agreement(parameters, made[number], sampled).plain
    other = pair_tables.agreement(parameters, made[number], ["another"]).plain
    assert f"“another”; stored: “{stored}”. They differ" in other
    choice = selection.choose(parameters, made[number], pairs.truth(parameters))
    for row in rows_of(pair_tables.outcomes(uninterrupted, number, choice)):
        assert row.count("kept") in (0, 2)
    assert [c["text"] for c in choice.kept] == [
        r["text"] for r in pair_rows.read_pairs(uninterrupted.folder / "pairs.jsonl")[number][
            "rejected"]]


def test_figures_show_every_way_of_weakening_and_every_kept_answer(
        uninterrupted, parameters, data_file, outputs, tmp_path):
    pictures = pairs.weakened_pictures(parameters, uninterrupted, 0)
    assert list(pictures) == ["clean", *WEAKENINGS]
    assert pictures["noisy"].size == (32, 32) and len({p.tobytes() for p in pictures.values()}) == 6
    assert "step 800" in pair_tables.weakening_strip(parameters, uninterrupted, 0).plain
    kept = {s: uninterrupted.metrics[s]["kept"] for s in ("weakened", "injected")}
    shown = pair_tables.length_gaps(uninterrupted).plain
    assert all(f"n = {n}" in shown for n in kept.values())
    (tmp_path / "rows.json").write_text(json.dumps(json.loads(data_file.read_text())[:3]))
    alone = changed(parameters, data=str(tmp_path / "rows.json"), sources=["injected"],
                    image_folder=str(data_file.parent), score_candidates=False)
    assert list(pairs.weakened_pictures(alone, pairs.run(alone), 0)) == [
        "clean", *(n for n in WEAKENINGS if n != "swapped")]
