"""Parameters: what is accepted, what is refused, and in which words."""

import subprocess
import sys

import pytest
import yaml
from IPython.core.interactiveshell import InteractiveShell

from bpo import params
from bpo.params import (
    DPOTraining,
    NoiseProbability,
    PairGeneration,
    QualitativeComparison,
    Refusal,
    validate,
)

STUDIES = sorted(f.name for f in (params.ROOT / "params").iterdir() if f.is_dir())


def refused(schema, **values) -> str:
    with pytest.raises(Refusal) as caught:
        validate(schema, values, where="here")
    return str(caught.value)


@pytest.mark.parametrize("schema", params.SCHEMAS.values(), ids=params.SCHEMAS)
def test_defaults_are_valid_and_belong_to_the_tiny_study(schema):
    read = validate(schema, {}, where="here")
    assert read == schema()
    own = {params.PriorOrigin: "tiny-prior", params.DoseResponse: "tiny-dose"}.get(schema, "tiny")
    assert (read.study, read.seed) == (own, 0)


@pytest.mark.parametrize("schema", params.SCHEMAS.values(), ids=params.SCHEMAS)
def test_every_parameter_says_what_it_is(schema):
    assert all(field.description for field in schema.model_fields.values())


def test_parameters_cannot_be_changed_once_read():
    with pytest.raises(ValueError, match="frozen"):
        DPOTraining().beta = 0.3


def test_a_typo_is_refused_with_the_near_name():
    message = refused(DPOTraining, lerning_rate=1e-4)
    assert "lerning_rate: no such parameter (did you mean learning_rate?)" in message
    assert "3_dpo_training: 1 problem in the parameters (here)" in message


def test_a_name_like_no_other_gets_no_suggestion():
    message = refused(DPOTraining, xyzzy=1)
    assert "xyzzy: no such parameter" in message
    assert "did you mean" not in message


def test_all_problems_come_in_one_message():
    message = refused(DPOTraining, betta=0.1, beta=-1, steps="many", gradient_checkpointing=3,
                      lora_rank=True)
    assert "5 problems" in message
    lines = [line for line in message.splitlines() if line.startswith("  - ")]
    assert sorted(line.split(":")[0].removeprefix("  - ") for line in lines) == [
        "beta", "betta", "gradient_checkpointing", "lora_rank", "steps"]


def test_a_number_written_as_text_is_a_number():
    read = validate(DPOTraining, {"learning_rate": "5e-6", "steps": "7"}, where="here")
    assert (read.learning_rate, read.steps) == (5e-6, 7)


@pytest.mark.parametrize("name", ("steps", "lora_rank", "beta", "warmup_ratio"))
def test_true_is_not_a_number(name):
    assert f"{name}: must be a number, is True" in refused(DPOTraining, **{name: True})


@pytest.mark.parametrize("name, value, words", [
    ("beta", "strong", "must be a valid number"),
    ("steps", 2.5, "must be a valid integer"),
    ("study", 5, "must be a valid string"),
    ("methods", "bpo", "must be a valid list"),
    ("precision", "float16", "must be 'float32', 'bfloat16' or 'nf4'"),
])
def test_a_wrong_type_is_refused_with_the_value(name, value, words):
    message = refused(DPOTraining, **{name: value})
    assert f"{name}: " in message and words in message
    assert f"is {value!r}" in message


@pytest.mark.parametrize("schema, name, value", [
    (DPOTraining, "beta", 0), (DPOTraining, "learning_rate", 1), (DPOTraining, "warmup_ratio", 1.1),
    (DPOTraining, "seed", -1), (DPOTraining, "seed", 2**31), (DPOTraining, "lora_rank", 0),
    (DPOTraining, "learning_rate", float("nan")), (DPOTraining, "study", "../elsewhere"),
    (DPOTraining, "methods", []), (DPOTraining, "methods", ["dpo"]),
    (PairGeneration, "weaken_steps", [1000]), (PairGeneration, "inject_top_p", 0),
    (PairGeneration, "weaken_temperature", -1), (QualitativeComparison, "resamples", 99),
    (QualitativeComparison, "splits", {}), (NoiseProbability, "noise_steps", [0]),
    (NoiseProbability, "noise_steps", [0, 1000]),
])
def test_a_value_out_of_range_is_refused(schema, name, value):
    assert f"  - {name}" in refused(schema, **{name: value})


def test_the_batch_must_be_whole_device_batches():
    message = refused(DPOTraining, batch_pairs=10, device_batch=4)
    assert "batch_pairs (10) must be a multiple of device_batch (4)" in message
    assert DPOTraining(batch_pairs=12, device_batch=4).batch_pairs == 12
    message = refused(DPOTraining, batch_pairs=10, device_batch=4, loss_weights=[1.0])
    assert "2 problems" in message and message.count("\n  - ") == 2


@pytest.mark.parametrize("methods", (["sft_compute"], ["sft_compute", "bpo"],
                                     ["sft_compute", "sft_matched"]))
def test_sft_compute_needs_both_that_it_is_measured_by(methods):
    assert "name bpo and sft_matched too" in refused(DPOTraining, methods=methods)
    DPOTraining(methods=["sft_compute", "bpo", "sft_matched"])


def test_methods_and_objectives_are_named_once():
    assert "methods: a value is named twice" in refused(DPOTraining, methods=["bpo", "bpo"])
    assert "loss: a value is named twice" in refused(DPOTraining, loss=["sft", "sft"])


def test_every_objective_has_a_weight():
    message = refused(DPOTraining, loss=["sigmoid", "sft", "anchor"])
    assert "loss_weights: give one weight for each of sigmoid, sft, anchor" in message
    assert "loss" in refused(DPOTraining, loss=["dpo"], loss_weights=[1.0])


@pytest.mark.parametrize("schema, name, value, near", [
    (PairGeneration, "weaken_modes", ["nosy"], "noisy"),
    (DPOTraining, "loss", ["achor"], "anchor"), (DPOTraining, "damage", "crp", "crop"),
    (DPOTraining, "methods", ["bpo_swaped"], "bpo_swapped")])
def test_a_name_in_no_registry_is_refused_with_the_near_one(schema, name, value, near):
    message = refused(schema, **{name: value})
    assert f"  - {name}" in message and near in message.partition("did you mean")[2]


def test_a_damage_shows_one_image_and_not_another_row_s():
    for way in ("contrast", "swapped"):
        assert "damage: must be one of noisy, crop, fade, blank, is" in refused(DPOTraining, damage=way)


def test_parameters_are_checked_without_torch():
    code = ("import sys; from bpo import params; params.read_study('tiny-weakening'); "
            "sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("steps", ([100, 500], [0, 500, 100], [0, 500, 500]))
def test_noise_steps_rise_from_the_clean_image(steps):
    assert "noise_steps: must rise from 0" in refused(NoiseProbability, noise_steps=steps)


@pytest.mark.parametrize("values", (
    {"question": "what colour?"}, {"question": "what colour?", "true_answers": ["red"]},
    {"true_answers": ["red"], "prior_answers": ["blue"]}, {"true_answers": ["red"]}))
def test_a_question_comes_with_its_answers(values):
    assert "give all three or none" in refused(NoiseProbability, **values)


def test_the_study_and_what_is_only_shown_do_not_shape_a_result():
    shaping = PairGeneration(study="other", gallery=9).shaping()
    assert shaping == PairGeneration().shaping()
    assert "weaken_steps" in shaping and "seed" in shaping
    assert PairGeneration(weaken_steps=[5]).shaping() != shaping


# --- files --------------------------------------------------------------------------------------

def write(folder, name, text):
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.yaml"
    file.write_text(text)
    return file


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project root of its own with a study of two files."""
    monkeypatch.setattr(params, "ROOT", tmp_path)
    write(tmp_path / "params" / "mine", "2_pair_generation", "study: mine\nseed: 3\n")
    write(tmp_path / "params" / "mine", "3_dpo_training", "study: mine\nseed: 3\nbeta: 0.2\n")
    return tmp_path


@pytest.mark.parametrize("study", STUDIES)
def test_every_file_in_params_loads_and_names_every_parameter(study):
    read = params.read_study(study)
    for name, file in params.study_files(study).items():
        assert list(yaml.safe_load(file.read_text())) == list(params.SCHEMAS[name].model_fields)
        assert read[name].study == study


def test_the_files_of_the_tiny_study_hold_the_defaults():
    for name, read in params.read_study("tiny").items():
        assert read == params.SCHEMAS[name]()


def test_a_study_is_read_from_its_files(project):
    read = params.read_study("mine")
    assert list(read) == ["2_pair_generation", "3_dpo_training"]
    assert (read["3_dpo_training"].beta, read["2_pair_generation"].seed) == (0.2, 3)


def test_a_key_written_twice_is_refused(project):
    file = write(project / "params" / "mine", "3_dpo_training", "beta: 0.1\nseed: 0\nbeta: 0.3\n")
    with pytest.raises(Refusal, match="beta is written more than once"):
        params.read_yaml(file)
    file.write_text("splits: {a: x, a: y}\n")
    with pytest.raises(Refusal, match="a is written more than once"):
        params.read_yaml(file)


@pytest.mark.parametrize("text", ("beta: [1\n", "- beta\n", "", "just words\n"))
def test_a_file_of_another_shape_is_refused(tmp_path, text):
    with pytest.raises(Refusal, match="broken.yaml"):
        params.read_yaml(write(tmp_path, "broken", text))
    with pytest.raises(Refusal, match="no such parameter file"):
        params.read_yaml(tmp_path / "none.yaml")


def test_a_key_that_yaml_does_not_read_as_text_is_refused(project):
    # YAML reads a bare `on` as true.
    write(project / "params" / "mine", "3_dpo_training", "study: mine\nseed: 3\non: 5\n")
    with pytest.raises(Refusal):
        params.read_study("mine")


def test_yaml_cannot_make_python_objects(tmp_path):
    file = write(tmp_path, "bad", "beta: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(Refusal, match="not valid YAML"):
        params.read_yaml(file)


def test_an_unknown_study_is_refused_with_the_known_ones(project):
    with pytest.raises(Refusal, match=r"params/yours: no such study\. There is: mine"):
        params.read_study("yours")


def test_a_file_that_belongs_to_no_notebook_is_refused(project):
    write(project / "params" / "mine", "9_more", "seed: 3\n")
    with pytest.raises(Refusal, match=r"9_more\.yaml: no notebook has that name"):
        params.read_study("mine")


def test_overrides_go_to_every_notebook_that_has_the_name(project):
    read = params.read_study("mine", {"beta": "0.5", "seed": 8})
    assert read["3_dpo_training"].beta == 0.5
    assert {p.seed for p in read.values()} == {8}


def test_an_override_that_no_notebook_knows_is_refused(project):
    with pytest.raises(Refusal, match=r"-p betta: no notebook .* \(did you mean beta\?\)"):
        params.read_study("mine", {"betta": 0.5})


@pytest.mark.parametrize("key, value", [("seed", "4"), ("study", "yours"), ("model", "elsewhere"),
                                        ("precision", "bfloat16")])
def test_keys_that_notebooks_share_must_agree(project, key, value):
    shared = {"study": "mine", "seed": "3"} | {key: value}
    write(project / "params" / "mine", "3_dpo_training",
          "".join(f"{k}: {v}\n" for k, v in shared.items()))
    with pytest.raises(Refusal, match=f"{key} must be the same in all files, is .*2_pair_gener"):
        params.read_study("mine")


def test_the_problems_of_all_files_come_in_one_message(project):
    write(project / "params" / "mine", "2_pair_generation", "study: mine\nseed: 3\nrowz: 1\n")
    write(project / "params" / "mine", "3_dpo_training", "study: mine\nseed: 3\nbeta: -1\n")
    with pytest.raises(Refusal) as caught:
        params.read_study("mine")
    assert "rowz: no such parameter (did you mean rows?)" in str(caught.value)
    assert "beta: must be greater than 0" in str(caught.value)


# --- notebooks ----------------------------------------------------------------------------------

CELL = "study = 'mine'  # name of the study\nbeta = 0.2  # strength\nsteps = 5  # steps"


def kernel(*cells):
    """The globals of a kernel after these cells, with IPython's history `In`."""
    namespace = {"In": [""], "__name__": "__main__", "_": None}
    for cell in cells:
        namespace["In"].append(cell)
        exec(cell, namespace)
    return namespace


def test_a_notebook_is_read_from_its_parameters_cell():
    read = params.read(DPOTraining, kernel(CELL, "import math"))
    assert (read.study, read.beta, read.steps) == ("mine", 0.2, 5)


def test_the_injected_cell_goes_over_the_parameters_cell():
    read = params.read(DPOTraining, kernel(CELL, "# Parameters\nbeta = 0.4\n"))
    assert (read.beta, read.steps) == (0.4, 5)


TYPO, INJECTED_TYPO = CELL.replace("steps =", "stepps ="), "# Parameters\nbetta = 0.4\n"


@pytest.mark.parametrize("cells, refused", (
    ([CELL, INJECTED_TYPO], r"betta: no such parameter \(did you mean beta\?\)"),
    ([TYPO], "stepps: no such parameter"),
    ([TYPO, "# Parameters\nbeta = 0.4\n"], "stepps: no such parameter"),
    ([CELL, "import math", TYPO], "stepps: no such parameter"),
    ([TYPO, "import math", CELL], ""),
    ([CELL, INJECTED_TYPO, INJECTED_TYPO.replace("tt", "t"), CELL], "")))
def test_an_unknown_name_is_refused_until_its_cell_is_corrected(cells, refused):
    if refused:
        with pytest.raises(Refusal, match=refused):
            params.read(DPOTraining, kernel(*cells))
    else:
        assert params.read(DPOTraining, kernel(*cells)).steps == 5


@pytest.mark.parametrize("cell", (
    "x = 3", "x = 3\ny = 'text'", "found = dict(a=1)", "for i in range(3):\n    last = i",
    "a, b = 1, 2", "# a comment alone", "def f():\n    return 1"))
def test_scratch_variables_are_no_parameters(cell):
    assert params.read(DPOTraining, kernel(CELL, cell)).steps == 5


def test_a_scratch_variable_with_a_parameter_s_name_does_not_become_its_value():
    namespace = kernel("rows = 7  # rows to use", "rows = [n * 2 for n in range(3)]")
    assert params.read(PairGeneration, namespace).rows == 7


def test_the_set_up_cell_can_be_run_again_after_later_cells():
    namespace = kernel(CELL)
    first = params.read(DPOTraining, namespace)
    for cell in ("p = object()", "result = [1, 2]", "n = 3", "import json"):
        namespace["In"].append(cell)
        exec(cell, namespace)
    assert params.read(DPOTraining, namespace) == first


def test_a_parameter_edited_in_a_later_cell_counts():
    assert params.read(DPOTraining, kernel(CELL, "import math", "beta = 0.9")).beta == 0.9


def test_without_a_kernel_every_public_name_is_a_parameter():
    assert params.read(DPOTraining, {"beta": 0.7, "_private": 1, "__name__": "x"}).beta == 0.7
    with pytest.raises(Refusal, match="other: no such parameter"):
        params.read(DPOTraining, {"other": 1})


def test_a_refusal_is_shown_without_a_stack_trace(capsys):
    assert Refusal("one\ntwo")._render_traceback_() == ["one", "two"]
    shell = InteractiveShell()
    shell.run_cell("from bpo.params import Refusal\nraise Refusal('beta: too much\\nlook here')")
    shown = "".join(capsys.readouterr())
    assert "beta: too much\nlook here" in shown
    assert "Traceback" not in shown and "raise Refusal" not in shown


# --- paths --------------------------------------------------------------------------------------

def test_paths_start_at_the_project_and_outputs_at_the_outputs(outputs, tmp_path):
    assert params.resolve("data/x", study="s") == params.ROOT / "data" / "x"
    assert params.resolve("outputs/{study}/a", study="s") == outputs / "s" / "a"
    assert params.resolve(str(tmp_path / "{study}"), study="s") == tmp_path / "s"
    assert DPOTraining(study="t").path("outputs/{study}/a") == outputs / "t" / "a"


def test_outputs_lie_in_the_project_unless_redirected(monkeypatch):
    monkeypatch.delenv("BPO_OUTPUTS", raising=False)
    assert params.outputs_root() == params.ROOT / "outputs"
    assert params.resolve("outputs/x", study="s") == params.ROOT / "outputs" / "x"


def test_paths_do_not_depend_on_where_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert params.resolve("data/x", study="s") == params.ROOT / "data" / "x"


def test_a_path_in_the_project_or_the_outputs_is_kept_as_it_stays_right_when_they_move(
        outputs, tmp_path):
    root = params.ROOT
    typed = {str(outputs / "s" / "rows.json"): "", str(root / "params" / "x.json"): "a",
             str(root / "outputs" / "x.json"): "b", str(tmp_path / "y.json"): "c", "~/z.json": "d"}
    p = validate(PairGeneration, {"data": typed, "image_folder": str(outputs), "study": "s"},
                 where="here")
    assert list(p.data) == ["outputs/s/rows.json", "params/x.json", str(root / "outputs/x.json"),
                            str(tmp_path / "y.json"), "~/z.json"]
    assert [p.path(a) for a in p.data] == [p.path(b) for b in typed]
    assert p.path(p.image_folder) == outputs


def test_benchmarks_are_those_of_the_registries(monkeypatch):
    from bpo.evaluation.judged import JUDGED

    message = refused(params.Benchmarks, folders={"chiar": "data"})
    assert ("must be one of chair, object-halbench, pope, amber, mm-vet, llava-bench, mmhal"
            in message)
    assert "did you mean chair?" in message
    monkeypatch.setitem(JUDGED, "mine", JUDGED["mmhal"])
    assert validate(params.Benchmarks, {"folders": {"mine": "data"}}, where="here")
