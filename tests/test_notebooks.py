"""The notebooks: their static rules, one pass of the whole study through the command line, and what
interruption, repetition and wrong parameters do to it."""

import ast
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import nbformat
import pytest
from helpers import warm
from helpers.study import LITTLE, command, environment, run_little

from bpo import params
from bpo.evaluation import replication
from bpo.reports import page
from bpo.reports.tables import benchmark_tables, score_tables

NOTEBOOKS = sorted((params.ROOT / "notebooks").glob("*.ipynb"))
STUDY = params.study_files("tiny")  # the notebooks of the study
METHODS = ["base", *params.DPOTraining().runs()]
MEASURED = ["chair_s", "chair_i", "cover", "objects", "colour_accuracy", "p_true", "p_prior",
            "prior_rate", "pope_adversarial"]


def manifest(folder: Path, notebook: str) -> dict:
    return json.loads((folder / notebook / "manifest.json").read_text())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def study(root, little_study):
    """The little study, in a place where the tests may change it."""
    return Path(shutil.copytree(little_study, root / "little"))


def cells(notebook: Path, kind: str = "code"):
    return [c for c in nbformat.read(notebook, 4).cells if c.cell_type == kind]


def text_of(executed: Path) -> str:
    """All plain text that an executed notebook shows."""
    return "\n".join(o.get("data", {}).get("text/plain", "")
                     for c in cells(executed) for o in c.outputs)


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def test_there_is_a_notebook_for_every_schema():
    assert [n.stem for n in NOTEBOOKS] == list(params.SCHEMAS)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.stem)
class TestStaticRules:
    def test_it_defines_nothing_and_keeps_cells_short(self, notebook):
        for cell in cells(notebook):
            assert not re.search(r"^\s*(def|class) ", cell.source, re.M), cell.source
            if "parameters" not in tags(cell):
                assert len(cell.source.splitlines()) <= 15, cell.source

    def test_it_is_stored_without_results(self, notebook):
        stored = nbformat.read(notebook, 4)
        nbformat.validate(stored)
        assert stored.metadata.kernelspec.name == "python3"
        ids = [c.id for c in stored.cells]
        assert len(set(ids)) == len(ids)
        assert all(c.outputs == [] and c.execution_count is None for c in cells(notebook))

    def test_its_parameters_are_the_schema_and_the_tiny_study(self, notebook):
        first = cells(notebook)[0]
        assert tags(first) == ["parameters"]
        schema = params.SCHEMAS[notebook.stem]
        values = {}
        top, _, further = first.source.partition("# further\n")
        assert len(top.splitlines()) <= 15 or notebook.stem != "2_pair_generation"
        for line in (top + further).splitlines():
            code, _, comment = line.partition("  # ")
            name, _, literal = code.partition(" = ")
            assert comment and "=" not in comment, line
            values[name] = ast.literal_eval(literal)
            assert schema.model_fields[name].description == comment
        assert values == {n: f.get_default() for n, f in schema.model_fields.items()}
        files = params.study_files(values["study"])
        if notebook.stem != "7_replication":  # it reads studies and belongs to none
            assert values == params.read_yaml(files[notebook.stem])

    def test_it_has_one_setup_cell_and_one_headline(self, notebook):
        tagged = [t for c in cells(notebook) for t in tags(c)]
        assert tagged == ["parameters", "setup", "headline"]
        setup = cells(notebook)[1].source
        assert "globals()" in setup
        imports = [c for c in cells(notebook) if re.search(r"^(import|from) ", c.source, re.M)]
        assert imports == [cells(notebook)[1]]

    def test_no_number_in_its_prose_is_a_result(self, notebook):
        for cell in cells(notebook, "markdown"):
            assert not re.search(r"\b0\.\d\d+", cell.source), cell.source


@pytest.mark.slow
class TestTheWholeStudy:
    def test_every_notebook_leaves_a_complete_stage_and_a_page(self, study):
        for notebook in STUDY:
            m = manifest(study, notebook)
            assert m["stage"] == notebook and m["study"] == "little" and m["metrics"]
            assert {"parameters", "inputs", "outputs", "modules", "versions", "device", "commit",
                    "seconds"} <= m.keys()
            page = (study / f"{notebook}.html").read_text()
            assert len(page) < 3_000_000
            assert not re.search(r"(?:src|href)=[\"']?https?:", page)
            assert "This run failed" not in page
            executed = nbformat.read(study / f"{notebook}.ipynb", 4)
            outputs = [o for c in executed.cells if c.cell_type == "code" for o in c.outputs]
            assert all(o.output_type != "error" for o in outputs)
            assert not any("\r" in o.get("text", "") for o in outputs)
            assert "data:image/" in page
        index = (study / "index.html").read_text()
        assert index.count("complete") >= 6 and "4_qualitative_comparison.html" in index
        assert "bpo − sft_matched" in index and "AMBER, n" in index

    def test_no_two_data_sets_or_benchmarks_share_a_picture(self, study):
        world = study / "0_tiny_world"
        splits = ("preference", "development", "counterfactual", "natural")
        pictures = [f.read_bytes() for place in (
            *(f"{split}/images" for split in splits), "benchmarks/chair/val2014",
            "benchmarks/object-halbench/images", "benchmarks/amber/image")
            for f in (world / place).iterdir()]
        assert len(set(pictures)) == len(pictures) == 60 + 12 + 20 + 12 + 3 * 12
        pope, chair = ({f.read_bytes() for f in (world / f"benchmarks/{b}/val2014").iterdir()}
                       for b in ("pope", "chair"))
        assert pope == chair

    def test_what_is_done_by_hand_is_what_the_stages_stored(self, study):
        text = text_of(study / "1_noise_probability.ipynb")
        differs = re.search(r"stored differ by at most (\S+)\.", text)[1]
        assert float(differs.replace("−", "-")) < 1e-4
        text = text_of(study / "2_pair_generation.ipynb")
        answers = re.search(r"Sampled by hand: “(.+)”; stored: “(.+)”\. They", text)
        assert answers[1] == answers[2]
        text = text_of(study / "3_dpo_training.ipynb")
        said = r"DPO by hand (\S+), the others (\S+), first line of history.json (\S+)\."
        dpo, others, line = map(float, re.search(said, text).groups())
        history = json.loads((study / "3_dpo_training/bpo/history.json").read_text())
        assert dpo == pytest.approx(math.log(2), abs=1e-6) and others > 0
        assert dpo + others == pytest.approx(line, abs=2e-6) == history[0]["loss"]
        by_hand, stored = re.search(r"by hand: (\S+) in .* adapter: (\S+)\.", text).groups()
        assert by_hand == stored
        text = text_of(study / "4_qualitative_comparison.ipynb")
        by_hand, stored = re.search(r"CHAIRi (\S+); stored: (\S+)\.", text).groups()
        assert by_hand == stored

    def test_pairs_have_one_line_a_positive(self, study):
        lines = [json.loads(x) for x in
                 (study / "2_pair_generation" / "pairs.jsonl").read_text().splitlines()]
        found = manifest(study, "2_pair_generation")["metrics"]
        assert len(lines) == found["rows"] == 120
        assert sum(len(x["rejected"]) for x in lines) == found["pairs"] > 0
        for line in lines:
            assert len({r["source"] for r in line["rejected"]}) == len(line["rejected"])
            assert all(r["text"] != line["chosen"] for r in line["rejected"])
        dropped = (study / "2_pair_generation" / "dropped.jsonl").read_text().splitlines()
        assert len(dropped) + found["pairs"] == 2 * 120  # a caption and a colour of each image

    def test_every_method_has_an_adapter_and_an_equal_budget(self, study):
        found = manifest(study, "3_dpo_training")["metrics"]["methods"]
        assert list(found) == METHODS[1:]
        for method, facts in found.items():
            folder = study / "3_dpo_training" / method
            assert (folder / "adapter" / "adapter_model.safetensors").is_file()
            assert not (folder / "checkpoints").exists()
            history = json.loads((folder / "history.json").read_text())
            assert [h["step"] for h in history] == list(range(1, facts["steps"] + 1))
            if method != "sft_compute":
                assert facts["steps"] == 4
        assert found["sft_matched"]["rows"] == found["bpo"]["rows"]
        spent = found["sft_compute"]["flops"] / found["bpo"]["flops"]
        step = found["sft_matched"]["flops_per_step"] / found["bpo"]["flops"]
        assert abs(spent - 1) <= step

    def test_every_method_is_measured_on_both_splits_and_every_benchmark(self, study):
        found = manifest(study, "4_qualitative_comparison")["metrics"]
        for split in ("counterfactual", "natural"):
            assert list(found[split]) == METHODS
            for e in (found[split][method][name] for method in METHODS for name in MEASURED):
                assert e["value"] is None or e["low"] <= e["value"] <= e["high"] and e["n"] > 0
        found = manifest(study, "5_benchmarks")["metrics"]
        assert list(found["benchmarks"]) == ["chair", "object-halbench", "pope", "amber"]
        for name, values in found["benchmarks"].items():
            assert list(values) == METHODS
            lines = (study / "5_benchmarks" / f"answers-{name}.jsonl").read_text().splitlines()
            assert len(lines) == found["settings"][name]["questions"]
        page = (study / "5_benchmarks.html").read_text()
        assert "Numbers that others published" in page and "CHAIRi" in page

    def test_answers_of_the_notebook_score_the_same_alone(self, study, root, tmp_path):
        lines = [json.loads(x) for x in
                 (study / "5_benchmarks" / "answers-chair.jsonl").read_text().splitlines()]
        mine = tmp_path / "mine.jsonl"
        mine.write_text("".join(json.dumps({"image_id": x["image"], "caption": x["answers"]["bpo"]})
                                + "\n" for x in lines))
        chair = study / "0_tiny_world" / "benchmarks" / "chair"
        done = subprocess.run(command(
            "score", "chair", "--answers", str(mine), "--json", "--synonyms",
            str(chair / "synonyms.txt"), "--truth",
            str(chair / "annotations" / "instances_val2014.json")),
            env=environment(root), text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        alone = json.loads(done.stdout)["metrics"]
        whole = manifest(study, "5_benchmarks")["metrics"]["benchmarks"]["chair"]["bpo"]
        for name in ("chair_s", "chair_i", "cover", "words"):
            assert alone[name]["value"] == whole[name]["value"], name

    def test_a_run_killed_twice_ends_with_the_bytes_of_one_that_was_not(self, study, root):
        killed = root / "killed"
        for notebook in list(STUDY)[:2]:  # as far as notebook 1 it was not killed
            shutil.copytree(study / notebook, killed / notebook)
        _kill_when(root, killed / "2_pair_generation" / "shards" / "weakened-noisy-800-0.0.jsonl",
                   lambda f: f.is_file() and f.stat().st_size > 0)
        assert not (killed / "2_pair_generation" / "manifest.json").exists()
        _kill_when(root, killed / "3_dpo_training" / "bpo" / "checkpoints",
                   lambda f: bool(list(f.glob("checkpoint-*/trainer_state.json"))))
        assert not (killed / "3_dpo_training" / "manifest.json").exists()
        for number in ("3", "4"):
            done = subprocess.run([*run_little("killed"), "--only", number], env=environment(root),
                                  text=True, capture_output=True)
            assert done.returncode == 0, done.stderr
        for name in ("2_pair_generation/pairs.jsonl",
                     "2_pair_generation/weakened-noisy-800-0.jsonl",
                     "3_dpo_training/bpo/history.json",
                     "3_dpo_training/bpo/adapter/adapter_model.safetensors",
                     "4_qualitative_comparison/answers-counterfactual.jsonl",
                     "4_qualitative_comparison/results.csv"):
            assert (killed / name).read_bytes() == (study / name).read_bytes(), name
        for notebook in list(STUDY)[:-1]:
            assert manifest(killed, notebook)["metrics"] == manifest(study, notebook)["metrics"]
        shutil.copytree(study / "5_benchmarks", killed / "5_benchmarks")
        done = subprocess.run(command("compare", "little", "killed"), env=environment(root),
                              text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        page = (study / "against-killed.html").read_text()
        shared = re.search(r"the intervals of 0 of (\d+) numbers do not meet", page)
        assert int(shared[1]) > 50

    def test_its_pairs_are_exported_for_other_tools(self, study, root):
        for layout in ("trl", "bpo"):
            done = subprocess.run(command("export", "little", "--to", layout),
                                  env=environment(root), text=True, capture_output=True)
            assert done.returncode == 0, done.stderr
            assert (study / "exports" / layout / "README.md").is_file()
        rows = datasets.load_dataset("parquet", split="train", cache_dir=str(root / "cache"),
                                     data_files=str(study / "exports" / "trl" / "*.parquet"))
        found = manifest(study, "2_pair_generation")["metrics"]
        assert len(rows) == found["pairs"]
        assert rows[0]["images"][0].size == (64, 64)

    def test_a_stage_is_found_up_to_date_without_a_kernel(self, study, root):
        overrides = [x for n, v in LITTLE.items() for x in ("-p", n, str(v))]
        done = subprocess.run(command("stage", "tiny", "2", "--as", "little", *overrides),
                              env=environment(root), text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("up to date, read again")

    def test_a_second_run_executes_no_notebook_that_would_come_out_the_same(self, study, root):
        files = [study / f"{n}{end}" for n in STUDY for end in (".ipynb", ".html")]
        before = {f: f.read_bytes() for f in files}
        (study / "1_noise_probability.html").write_text("edited")
        done = subprocess.run(run_little("little"), env=environment(root), text=True,
                              capture_output=True)
        assert done.returncode == 0, done.stderr
        assert re.findall("— (.*): as it was", done.stdout) == list(STUDY)
        assert {f: f.read_bytes() for f in files} == before

    def test_one_notebook_runs_alone_with_one_parameter_changed(self, study, root):
        again = [*run_little("little"), "--only", "1", "-p", "draws", "1"]
        done = subprocess.run(again, env=environment(root), text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert "2_pair_generation" not in done.stdout
        assert manifest(study, "1_noise_probability")["parameters"]["draws"] == 1
        assert "draws 2 -&gt; 1" in (study / "1_noise_probability.html").read_text()

    def test_papermill_runs_a_notebook_from_anywhere(self, study, root, tmp_path):
        done = _papermill("3_dpo_training", tmp_path / "out.ipynb", root, tmp_path, "-f",
                          str(params.ROOT / "params/tiny/3_dpo_training.yaml"), "-p", "beta", "0.3",
                          "-p", "study", "little", "-p", "steps", "1", "-p", "lora_rank", "4",
                          "-y", "methods: [bpo_weaken]", python=sys.executable)
        assert done.returncode == 0, done.stderr
        again = manifest(study, "3_dpo_training")
        assert again["parameters"]["beta"] == 0.3
        assert (study / "3_dpo_training.old-1" / "manifest.json").is_file()
        assert "beta 0.1 -> 0.3" in (tmp_path / "out.ipynb").read_text()


def _papermill(notebook: str, out: Path, root: Path, cwd: Path, *arguments: str,
               python: str = ""):
    return subprocess.run(
        [python or warm.python(), "-m", "papermill", "--no-progress-bar",
         str(params.ROOT / "notebooks" / f"{notebook}.ipynb"), str(out), *arguments],
        env=environment(root), cwd=cwd, text=True, capture_output=True)


def _kill_when(root: Path, watched: Path, ready) -> None:
    """Starts the study and kills it, and its kernel, as soon as `watched` is ready."""
    process = subprocess.Popen([*run_little("killed", python=sys.executable), "--from", "2"],
                               env=environment(root), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not ready(watched):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, f"{watched} did not appear"
        time.sleep(0.01)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    for pid in [process.pid, *map(int, children.stdout.split())]:
        os.kill(pid, signal.SIGKILL)
    process.wait()


@pytest.mark.study
def test_a_misspelt_parameter_is_refused_before_anything_is_loaded(tmp_path):
    done = _papermill("3_dpo_training", tmp_path / "out.ipynb", tmp_path, tmp_path, "-p", "bata",
                      "0.3")
    assert done.returncode == 1
    assert "bata: no such parameter (did you mean beta?)" in done.stderr
    executed = nbformat.read(tmp_path / "out.ipynb", 4)
    error = next(o for c in executed.cells if c.cell_type == "code" for o in c.outputs
                 if o.output_type == "error")
    assert error.traceback[0].startswith("3_dpo_training: 1 problem in the parameters")
    assert not any("Traceback" in line or "File " in line for line in error.traceback)
    assert not list(tmp_path.glob("*/3_dpo_training"))


@pytest.mark.study
def test_a_missing_earlier_stage_names_the_notebook_to_run(tmp_path):
    done = _papermill("1_noise_probability", tmp_path / "out.ipynb", tmp_path, tmp_path)
    assert done.returncode == 1
    assert "run notebooks/0_tiny_world.ipynb first" in done.stderr


@pytest.mark.study
def test_a_failed_run_leaves_a_readable_page_and_a_non_zero_exit(tmp_path):
    done = subprocess.run(command("run", "tiny", "--only", "2"), env=environment(tmp_path),
                          text=True, capture_output=True)
    assert done.returncode == 1
    assert "run notebooks/0_tiny_world.ipynb first" in done.stderr
    assert "Traceback" not in done.stderr
    page = (tmp_path / "tiny" / "2_pair_generation.html").read_text()
    assert "This run failed" in page and "run notebooks/0_tiny_world.ipynb first" in page
    assert "failed" in (tmp_path / "tiny" / "index.html").read_text()


@pytest.mark.parametrize("notebook", ("4_qualitative_comparison", "5_benchmarks"))
def test_the_headline_of_a_study_without_sft_says_each_comparison_once(notebook):
    stored = replication.stored("tiny").query("seed == 100")
    source = next(c.source for c in cells(params.ROOT / "notebooks" / f"{notebook}.ipynb")
                  if "headline" in tags(c))
    found = []
    for frame in (stored, stored[~stored["method"].str.startswith("sft")
                                 & ~stored["against"].str.startswith("sft")]):
        *before, last = ast.parse(source).body
        names = {"report": page, "score_tables": score_tables, "frame": frame, "method": "bpo",
                 "benchmark_tables": benchmark_tables, "split": "counterfactual",
                 "against": score_tables.rivals(frame)}
        exec(compile(ast.Module(before, []), notebook, "exec"), names)
        found.append(eval(compile(ast.Expression(last.value), notebook, "eval"), names).plain)
    both, alone = found
    assert "Against sft_matched" in both and both.startswith(alone.split(".")[0])
    assert "gainst base" in alone and "Against" not in alone
