"""Iterated rounds: what each is given, the merged model it starts from, and the table over them."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import safetensors
import torch
from conftest import LITTLE, without_a_kernel
from peft import get_peft_model
from test_pages import VIEWS, check

from bpo import __main__, generate, models, params, rounds, runs
from bpo.generate import Request
from bpo.params import Refusal
from bpo.readers import read_rows
from bpo.records import read_lines


def planned(**overrides):
    return rounds.planned(params.read_study("tiny", {"study": "mine", "rounds": 3, **overrides}))


def test_a_study_of_one_round_plans_no_more():
    assert rounds.planned(params.read_study("tiny")) == []


def test_a_later_round_has_its_own_pairs_adapters_and_model_and_the_first_study_s_world(outputs):
    second, third = planned(beta=0.3)
    assert list(third) == ["2_pair_generation", "3_dpo_training", "4_qualitative_comparison"]
    pair, training, compared = third.values()
    its = outputs / "mine.round-3"
    for p in third.values():
        assert p.study == "mine.round-3" and p.path(p.model) == its / "model"
    assert training.path(training.pairs) == its / "2_pair_generation/pairs.jsonl"
    assert compared.path(compared.adapters) == its / "3_dpo_training"
    world = outputs / "mine/0_tiny_world"
    assert pair.path(pair.data) == world / "preference/rows.json"
    assert pair.path(pair.text_model) == world / "language_model"
    assert training.path(training.image_folder) == world / "preference"
    assert compared.path(compared.splits["natural"]) == world / "natural/rows.json"
    assert training.beta == 0.3 and second["3_dpo_training"].study == "mine.round-2"
    # Parameters hold no path of a machine, so that results can be moved.
    assert str(outputs) not in json.dumps([p.model_dump() for p in third.values()])


def test_an_empty_text_model_stays_the_round_s_own_and_several_files_the_first_study_s(outputs):
    pair = rounds.in_round(params.PairGeneration(
        study="mine", text_model="", image_folder="outputs/{study}/0_tiny_world",
        data={"outputs/{study}/0_tiny_world/preference/rows.json": "preference"}), 2)
    assert pair.text_model == "" and pair.image_folder == "outputs/mine/0_tiny_world"
    assert list(pair.data) == ["outputs/mine/0_tiny_world/preference/rows.json"]


def test_a_path_written_out_is_the_round_s_own_too(outputs):
    training = planned(pairs="outputs/mine/2_pair_generation/pairs.jsonl")[0]["3_dpo_training"]
    assert training.path(training.pairs) == outputs / "mine.round-2/2_pair_generation/pairs.jsonl"


@pytest.mark.parametrize("overrides, words", [
    ({"methods": ["sft", "bpo_weaken"]}, "methods does not name it; add bpo"),
    ({"pairs": "data/pairs.jsonl"}, "3_dpo_training takes data/pairs.jsonl"),
    ({"adapters": "outputs/other/3_dpo_training"}, "each round makes its own adapters"),
])
def test_rounds_that_could_not_start_are_refused(overrides, words, outputs):
    with pytest.raises(Refusal, match=re.escape(words)):
        planned(**overrides)
    assert not outputs.exists()


def test_a_study_without_pair_generation_has_no_rounds(outputs):
    read = params.read_study("tiny", {"rounds": 2})
    del read["2_pair_generation"]
    with pytest.raises(Refusal, match="has no 2_pair_generation.yaml"):
        rounds.planned(read)


def test_the_number_of_rounds_makes_no_stage_stale():
    assert "rounds" not in params.read_study("tiny", {"rounds": 2})["3_dpo_training"].shaping()


@pytest.fixture(scope="module")
def adapter(model_folder, tmp_path_factory):
    """A random adapter whose change is large."""
    return random_adapter(model_folder, tmp_path_factory.mktemp("adapter") / "adapter", seed=5)


def random_adapter(model_folder, folder, *, seed):
    base = models.load(model_folder).model
    torch.manual_seed(seed)
    tuned = get_peft_model(base, models.adapter_config(base, rank=4, alpha=8, dropout=0.0))
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:  # starts at zero: an adapter that changes nothing
                weight.normal_(0, 0.1)
    tuned.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(checkpoint, data_file):
    asked = [Request(r.id, r.prompt, r.image) for r in read_rows(data_file)[0][:3]]
    return checkpoint.model(**generate.encode_batch(checkpoint, asked)).logits.float()


def test_a_merged_checkpoint_is_plain_and_answers_as_the_adapter(model_folder, adapter, data_file,
                                                                 tmp_path):
    (tmp_path / ".merging").mkdir()  # what an interrupted merge leaves
    (tmp_path / ".merging" / "half").write_text("")
    models.merge(model_folder, adapter, tmp_path)
    names = {f.name for f in tmp_path.iterdir()}
    assert {"model.safetensors", "config.json"} <= names
    assert not names & {"adapter_config.json", ".merging", "half"}
    merged = logits(models.load(tmp_path), data_file)
    tuned = logits(models.load_adapters(models.load(model_folder), {"x": adapter}), data_file)
    base = logits(models.load(model_folder), data_file)
    assert torch.allclose(merged, tuned, atol=1e-4)
    assert (tuned - base).abs().max() > 0.1
    assert models.load(tmp_path).processor.chat_template == models.load(
        model_folder).processor.chat_template


def test_a_merged_checkpoint_is_saved_in_the_study_s_number_format(model_folder, adapter, tmp_path):
    models.merge(model_folder, adapter, tmp_path, precision="bfloat16")
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as saved:
        assert {saved.get_tensor(n).dtype for n in saved.keys()} == {torch.bfloat16}


def finished(study, notebook, metrics, outputs=()):
    """A stage's folder with a manifest, as if its notebook had run."""
    folder = runs.stage_folder(study, notebook)
    folder.mkdir(parents=True, exist_ok=True)
    hashes = {str(f.relative_to(folder)): runs.file_hash(f) for f in outputs}
    (folder / runs.MANIFEST).write_text(json.dumps({"metrics": metrics, "outputs": hashes}))


def trained(model_folder, study, *, seed):
    """A study whose notebook 3 left a random adapter."""
    adapter = random_adapter(model_folder, runs.stage_folder(study, "3_dpo_training") / "bpo"
                             / "adapter", seed=seed)
    finished(study, "3_dpo_training", {}, adapter.iterdir())


def test_a_round_s_model_is_merged_once_and_again_only_for_another_adapter(model_folder, outputs):
    trained(model_folder, "mine", seed=5)
    read = params.read_study("tiny", {"study": "mine", "rounds": 2, "model": str(model_folder)})
    after, = rounds.planned(read)
    result = rounds.merge(read, after)
    assert result.folder == outputs / "mine.round-2" / "model"
    pair = after["2_pair_generation"]
    assert pair.path(pair.model) == result.folder
    assert result.manifest["inputs"] == {
        "model": runs.fingerprint(model_folder),
        "adapter": runs.fingerprint(outputs / "mine/3_dpo_training/bpo/adapter")}
    first = runs.fingerprint(result.folder)
    assert rounds.merge(read, after).done == "up to date, read again"
    trained(model_folder, "mine", seed=6)
    assert "input adapter changed" in rounds.merge(read, after).done
    assert runs.fingerprint(result.folder) != first
    trained(model_folder, "mine", seed=5)
    rounds.merge(read, after)
    assert runs.fingerprint(result.folder) == first  # so that nothing behind it is stale


def estimate(value, n=40):
    return {"value": value, "low": value - 0.05, "high": value + 0.05, "n": n}


def compared(base, tuned, change, *, spread=0.02):
    """Metrics of notebook 4 for one split: P(true answer), and P(prior's answer) at its rest."""
    difference = {"value": change, "low": change - spread, "high": change + spread, "n": 40}
    none = {"value": None, "low": None, "high": None, "n": 0}
    return {"natural": {"base": {"p_true": estimate(base), "p_prior": estimate(1 - base),
                                 "chair_s": none, "changed": estimate(0.0)},
                        "bpo": {"p_true": estimate(tuned), "p_prior": estimate(1 - tuned),
                                "chair_s": none, "changed": estimate(0.5)}},
            "differences": {"natural": {"base": {"bpo": {
                "p_true": difference, "p_prior": {**difference, "value": -change,
                                                  "low": -change - spread,
                                                  "high": -change + spread}}}}}}


@pytest.fixture
def three_rounds(outputs):
    """Manifests of a study whose second round gains and whose third cannot be told."""
    for study, kept, metrics in (("mine", 90, compared(0.4, 0.5, 0.1)),
                                 ("mine.round-2", 70, compared(0.5, 0.6, 0.1)),
                                 ("mine.round-3", 30, compared(0.603, 0.61, 0.01))):
        finished(study, "2_pair_generation", {
            "rows": 100, "positives": kept - 5, "pairs": kept,
            "weakened": {"candidates": 100, "kept": kept, "positives": kept}})
        finished(study, "3_dpo_training", {"methods": {"bpo": {"steps": 8, "rows": kept}}})
        finished(study, "4_qualitative_comparison", metrics)
    return "mine"


def test_the_table_follows_each_metric_from_the_base_through_the_rounds(three_rounds):
    rows = rounds.table(three_rounds, rounds=3)
    assert {(r["split"], r["metric"]) for r in rows} == {("natural", "P(true answer)"),
                                                         ("natural", "P(prior's answer)")}
    mine = [r for r in rows if r["metric"] == "P(true answer)"]
    assert [(r["round"], r["value"]) for r in mine] == [(0, 0.4), (1, 0.5), (2, 0.6), (3, 0.61)]
    assert mine[2]["low"] == pytest.approx(0.55) and mine[2]["n"] == 40
    assert mine[0]["change"] is None
    assert [r["change"]["reading"] for r in mine[1:]] == ["better", "better", "cannot be told"]
    assert [r["change"]["value"] for r in mine[1:]] == [0.1, 0.1, 0.01]
    prior = [r["change"]["reading"] for r in rows if r["metric"] == "P(prior's answer)"
             if r["round"]]
    assert prior == ["better", "better", "cannot be told"]  # less of it is better


def test_pairs_are_counted_and_merging_is_checked_over_the_rounds(three_rounds):
    counts = rounds.pair_counts(three_rounds, rounds=3)
    assert [(k["round"], k["pairs"], k["positives"]) for k in counts] == [(1, 90, 85), (2, 70, 65),
                                                                         (3, 30, 25)]
    assert counts[2]["weakened"] == {"candidates": 100, "kept": 30} and counts[2]["steps"] == 8
    # 0.6 after round 2, 0.603 before round 3; answers that differ from base have another base.
    assert rounds.merging_moved(three_rounds, rounds=3) == pytest.approx(0.003)
    assert rounds.merging_moved(three_rounds, rounds=2) == 0


def test_an_incomplete_round_is_named(three_rounds):
    with pytest.raises(Refusal, match="round 4 of study mine is not complete"):
        rounds.table(three_rounds, rounds=4)


def test_the_page_holds_the_tables_and_says_what_they_are_not(three_rounds, outputs):
    told = "\n".join(map(str, rounds.write(three_rounds, rounds=3)))
    page = (outputs / "mine" / "rounds.html").read_text()
    assert not re.search(r"(?:src|href)=[\"']?https?:|<script", page)
    for text in (told, page):
        assert "without a correction for multiple looks" in text
        assert "The parameters are the same in each" in text
        text = re.sub(r"</?(?:span|bdi)\b[^>]*>", "", text)
        assert "0.600 [0.550, 0.650]" in text and "+0.100 [+0.080, +0.120] better" in text
        assert "30 of 100" in text and "0.0030" in text
    assert "natural: the model after each round" in told and "<" not in told
    held = json.loads((outputs / "mine" / "rounds.json").read_text())
    assert held["measures"] == rounds.table(three_rounds, rounds=3)
    assert held["pairs"][0]["pairs"] == 90 and len(held["comparisons"]) == 3


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_axe_has_nothing_serious_to_say(three_rounds, outputs, browser, width, scheme):
    rounds.write(three_rounds, rounds=3)
    check(browser, [outputs / "mine" / "rounds.html"], width, scheme)


def test_a_table_is_no_longer_shown_once_a_comparison_has_changed(three_rounds, outputs):
    assert rounds.written("mine") is None
    rounds.write(three_rounds, rounds=3)
    assert rounds.written("mine")["rounds"] == 3
    finished("mine.round-2", "4_qualitative_comparison", compared(0.5, 0.7, 0.2))
    assert rounds.written("mine") is None


TWO_ROUNDS = LITTLE | {
    "rows": 20, "noise_steps": "[0, 999]", "draws": 1, "learning_rate": 0.02, "save_every": 4,
    "methods": "[bpo]", "weaken_modes": "[noisy, blank]", "resamples": 100, "rounds": 2}


@pytest.mark.slow
class TestTwoRounds:
    @pytest.fixture(scope="class")
    def root(self, tmp_path_factory, little_study):
        root = tmp_path_factory.mktemp("outputs")
        # The tiny world is the same: it is read again.
        shutil.copytree(little_study / "0_tiny_world", root / "mine" / "0_tiny_world")
        return root

    def run(self, root, *arguments):
        overrides = [part for n, v in TWO_ROUNDS.items() for part in ("-p", n, str(v))]
        return subprocess.run(
            [sys.executable, "-m", "bpo", "run", "tiny", "--as", "mine", *overrides, *arguments],
            env={**os.environ, "BPO_OUTPUTS": str(root)}, text=True, capture_output=True)

    @pytest.fixture(scope="class")
    def told(self, root):
        done = self.run(root)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def manifests(self, root):
        files = [*root.glob("mine/*/manifest.json"), *root.glob("mine.round-2/*/manifest.json")]
        return {str(f.relative_to(root)): json.loads(f.read_text()) for f in files}

    def test_the_second_round_starts_from_the_model_that_the_first_tuned(self, root, told,
                                                                         monkeypatch):
        monkeypatch.setenv("BPO_OUTPUTS", str(root))
        m = self.manifests(root)
        assert len(m) == 6 + 4
        merged = runs.fingerprint(root / "mine.round-2" / "model")
        for notebook in rounds.NOTEBOOKS:
            its = m[f"mine.round-2/{notebook}/manifest.json"]
            assert its["inputs"]["model"] == merged
            assert m[f"mine/{notebook}/manifest.json"]["inputs"]["model"] != merged
        first, second = (m[f"{s}/2_pair_generation/manifest.json"]["inputs"]
                         for s in ("mine", "mine.round-2"))
        assert {n: h for n, h in first.items() if n != "model"} == {
            n: h for n, h in second.items() if n != "model"}  # the same data, prompts, text model
        assert m["mine.round-2/model/manifest.json"]["inputs"] == {
            "model": first["model"],
            "adapter": runs.fingerprint(root / "mine/3_dpo_training/bpo/adapter")}

    def test_its_negatives_come_from_the_tuned_model(self, root, told):
        for name, same in (("weakened-noisy-800-0.jsonl", False), ("injected.jsonl", True)):
            before, after = (read_lines(root / s / "2_pair_generation" / name)
                             for s in ("mine", "mine.round-2"))
            assert [x["id"] for x in before] == [x["id"] for x in after]
            assert (before == after) is same, name

    def test_the_base_of_the_second_round_is_the_tuned_model_of_the_first(self, root, told):
        before, after = (read_lines(root / s / "4_qualitative_comparison/answers-natural.jsonl")
                         for s in ("mine", "mine.round-2"))
        assert [x["answers"]["bpo"] for x in before] == [x["answers"]["base"] for x in after]
        assert [x["answers"]["bpo"] for x in before] != [x["answers"]["base"] for x in before]

    def test_one_table_over_rounds_stands_beside_the_study(self, root, told):
        assert "natural: the model after each round" in told
        held = json.loads((root / "mine" / "rounds.json").read_text())
        assert held["rounds"] == 2 and {r["round"] for r in held["measures"]} == {0, 1, 2}
        assert held["merging_moved"] < 0.001
        assert 'href="rounds.html"' in (root / "mine" / "index.html").read_text()
        assert "mine.round-2" in (root / "mine.round-2" / "index.html").read_text()

    def test_a_second_run_computes_nothing(self, root, told, monkeypatch):
        before = {f: f.stat().st_mtime_ns for f in root.glob("*/*/manifest.json")}
        monkeypatch.setenv("BPO_OUTPUTS", str(root))
        ran = []

        def execute(notebook, p, folder):
            ran.append((folder.name, notebook))
            return without_a_kernel(notebook, p, folder)

        monkeypatch.setattr(__main__, "_execute", execute)
        overrides = [part for n, v in TWO_ROUNDS.items() for part in ("-p", n, str(v))]
        for start in ((), ("--from", "4")):
            ran.clear()
            assert __main__.main(["run", "tiny", "--as", "mine", *overrides, *start]) == 0
            assert ("mine.round-2", "3_dpo_training") in ran  # a later round follows whole
            assert (("mine", "3_dpo_training") in ran) is (not start)
        assert (root / "mine.round-2" / "model").is_dir()
        assert before == {f: f.stat().st_mtime_ns for f in root.glob("*/*/manifest.json")}
        assert not list(root.glob("*/*.old-*"))
