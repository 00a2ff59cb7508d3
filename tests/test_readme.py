"""The README's promises: its commands are those that the tests run, its files exist."""

import ast
import re
import subprocess

from bpo import params

README = (params.ROOT / "README.md").read_text(encoding="utf-8")
# Each command of the README and the test that runs it, or its like with less work.
COMMANDS = {
    "make report": "test_make_says_what_the_readme_says",
    "make test": "test_make_says_what_the_readme_says",
    "make lab": "test_make_says_what_the_readme_says",
    "python -m bpo run tiny": "test_every_notebook_leaves_a_complete_stage_and_a_page",
    "python -m bpo run tiny --only 3 -p beta 0.3":
        "test_one_notebook_runs_alone_with_one_parameter_changed",
    "python -m bpo run tiny -p seed 7 --as tiny-seed7":
        "test_every_notebook_leaves_a_complete_stage_and_a_page",
    "python -m bpo run tiny-round-2":
        "test_a_second_round_makes_pairs_and_trains_on_the_merged_checkpoint",
    "python -m bpo export tiny --to trl": "test_its_pairs_are_exported_for_other_tools",
    "accelerate launch --num_processes 8 -m bpo stage llava-1.5-7b 2":
        "test_several_processes_write_the_bytes_of_one",
    "accelerate launch --num_processes 8 -m bpo stage llava-1.5-7b 3":
        "test_two_launched_processes_give_the_curves_of_one",
    "papermill notebooks/3_dpo_training.ipynb out.ipynb -f params/tiny/3_dpo_training.yaml "
    "-p beta 0.3": "test_papermill_runs_a_notebook_from_anywhere",
    "python -m bpo merge tiny --method bpo":
        "test_a_merged_checkpoint_answers_as_the_adapter_through_transformers_alone",
    "python -m bpo score chair --answers captions.jsonl --truth objects.json":
        "test_the_command_prints_its_table_and_says_refusals",
    "python -m bpo score pope --answers mine.jsonl --truth coco_pope_random.json "
    "--against other.jsonl": "test_the_command_prints_its_table_and_says_refusals",
    "make replicate": "test_make_says_what_the_readme_says",
    "python -m bpo replicate tiny --seeds 5": "test_a_replication_that_is_killed_goes_on",
    "python -m bpo run tiny-prior": "test_the_notebook_runs_headless",
    "python -m bpo compare tiny tiny-seed7": "test_the_page_names_what_differs_and_no_more",
    "python -m bpo verify tiny": "test_every_file_is_listed_and_each_change_is_named",
    "python -m bpo pack tiny": "test_a_zip_holds_reports_and_adapters_and_checks_itself",
    "python -m bpo verify outputs/tiny.zip":
        "test_a_zip_holds_reports_and_adapters_and_checks_itself",
    "make pdf STUDY=tiny": "test_make_says_what_the_readme_says",
    "python -m bpo new ten --model PATH/MODEL --data PATH/PICTURES.csv": "test_ten_pictures_become_a_report",
    "python -m bpo check ten": "test_ten_pictures_become_a_report",
    "python -m bpo run ten": "test_ten_pictures_become_a_report",
    "python -m bpo check llava-1.5-7b": "test_check_names_what_a_real_study_lacks",
    "python -m bpo run llava-1.5-7b":
        "test_the_whole_study_of_a_real_model_runs_on_photographs",
}


def test_every_command_is_run_by_a_test_that_exists():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    commands = [line.split("#")[0].strip().removeprefix(".venv/bin/")
                for block in blocks for line in block.splitlines()]
    assert sorted(commands) == sorted(COMMANDS)
    tests = "".join(f.read_text() for f in (params.ROOT / "tests").glob("test_*.py"))
    for name in COMMANDS.values():
        assert f"def {name}(" in tests, name


def test_make_says_what_the_readme_says():
    def recipe(target: str) -> str:
        return subprocess.run(["make", "-n", target], cwd=params.ROOT, text=True, check=True,
                              capture_output=True).stdout

    assert "-m bpo run tiny\n" in recipe("report")
    assert "-m pytest" in recipe("test")
    assert "-m jupyterlab --config=bpo/reports/template/lab_config.py" in recipe("lab")
    assert "make pdf" in recipe("help")
    assert "-m bpo replicate tiny --seeds 5" in recipe("replicate")
    assert "tests/bench.py" in recipe("bench")
    assert "outputs/tiny/index.html" in recipe("help")


def test_the_file_map_names_files_that_exist_and_all_modules():
    block = re.search(r"## Files\n\n```\n(.*?)```", README, re.S)[1]
    named = set(re.findall(r"(?:bpo|params|tests|notebooks)/[\w./-]*", block))
    for name in named:
        assert (params.ROOT / name).exists(), name
    modules = {f"bpo/{f.name}" for f in (params.ROOT / "bpo").glob("*.py")} - {"bpo/__init__.py"}
    assert modules <= named


# A module imports from lower floors alone; nothing but notebooks 0 and 6 imports the tiny world.
FLOORS = [
    {"params", "seeds", "noise", "galleries", "ranks", "layouts", "branches", "reference",
     "objectives"},
    {"vocabulary", "records", "images", "models", "endpoint", "figures"},
    {"metrics", "runs", "entries", "shards", "encoding", "collation",
     "packed_forward", "packed_check", "scoring", "hallucination", "yes_no", "coco",
     "benchmark_figures", "report"},
    {"replication_page", "selection", "audit", "readers", "generate", "packed", "launch", "official"},
    {"pair_tables", "stock", "probe", "held_out", "candidates", "diagnostics", "judged", "answers",
     "merge"},
    {"pairs", "compare", "sizes", "trainers", "judge", "score", "explorer_cards"},
    {"export", "train", "benchmarks", "claims", "explorer", "survey"},
    {"benchmark_tables", "replication", "verify", "start"},
    {"studies", "pack"},
    {"against"},
    {"__main__"},
]


def test_modules_import_from_the_floors_below_their_own():
    modules = {f.stem: ast.parse(f.read_text()) for f in (params.ROOT / "bpo").glob("*.py")}
    assert set().union(*FLOORS) == modules.keys() - {"__init__"}
    floor = {m: n for n, named in enumerate(FLOORS) for m in named}
    for name, tree in modules.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("bpo"):
                continue
            used = ([a.name for a in node.names] if node.module == "bpo"
                    else [node.module.split(".")[1]])
            for other in set(used) - {"template"}:
                assert other in floor and floor[other] < floor[name], f"{name} imports {other}"
