"""The promises of the README and of the two beside it: short, its commands and files exist."""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from bpo import check, params
from bpo.__main__ import main
from bpo.evaluation import claims, comparison, replication
from bpo.params import ROOT
from bpo.reports import seen
from bpo.reports.tables import summary

FILES = [ROOT / name for name in ("README.md", "params/README.md", "outputs/README.md")]
TEXTS = {f: f.read_text(encoding="utf-8") for f in FILES}
README = TEXTS[FILES[0]]
COMMANDS = sorted({
    line.split(" #")[0].strip() for text in TEXTS.values()
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()})
TO_BE_MADE = {"params/ten/"}  # what a command of the README writes


class Parsed(Exception):
    pass


MARKED = re.compile(r"<!-- results ([\w-]+) -->\n(.*?)<!-- /results \1 -->", re.DOTALL)
JOINED = [names.split() for names in re.findall(r"<!-- results (.* .*) -->", TEXTS[FILES[2]])]
STORED = sorted(f for kind in ("csv.gz", "json")
                for f in (ROOT / "outputs" / "results").rglob(f"*.{kind}"))


def test_the_readme_is_short():
    assert len(README.encode()) <= 12_288
    assert sum(len(text.encode()) for _, text in MARKED.findall(README)) < 1_536


def test_results_are_written_from_what_is_stored_and_not_typed(tmp_path, monkeypatch):
    monkeypatch.setenv("BPO_OUTPUTS", str(tmp_path / "outputs"))
    files = {f: tmp_path / f.relative_to(ROOT) for f in (FILES[0], FILES[2])}
    for file, copy in (*files.items(), *((f, tmp_path / f.relative_to(ROOT)) for f in STORED)):
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    studies = {f.name.partition(".")[0] for f in STORED}
    alone = studies.difference(*JOINED)
    for names in (*([study] for study in alone), *JOINED):
        assert main(["results", *names]) == 0
    assert {f: copy.read_text(encoding="utf-8") for f, copy in files.items()} == {
        f: TEXTS[f] for f in files}, "python -m bpo results STUDY writes the sections again"
    assert {name for f in files for name, text in MARKED.findall(TEXTS[f]) if text} <= alone
    assert not re.search(r"\.\d{3}\b", MARKED.sub("", README))
    assert sum(f.stat().st_size for f in STORED) < 1_000_000


def stale(text: str, study: str) -> list[str]:
    """What the pictured index of a study says otherwise than its stored results."""
    frame = replication.stored(study)
    mean = replication.over_seeds(frame)
    decided = summary.on_main(replication.claims_over(frame), comparison.main_split(mean))
    signs = [c for c in decided if c.isdigit()]
    shares = [" · ".join(f"{100 * part:.0f}" for part in parts.values())
              for parts in seen.shares(mean).values()]
    rows = ["".join(row[signs]) + claims.SIGNS[row["verdict"]] for _, row in decided.iterrows()]
    said = re.sub(r"\s+", "", text)
    return [x for x in (*summary.answer(decided), *shares, *rows)
            if re.sub(r"\s+", "", x) not in said]


def test_the_gallery_says_what_is_stored():
    pictures = sorted((ROOT / "outputs" / "gallery").glob("*.webp"))
    assert sum(f.stat().st_size for f in pictures) < 400_000
    for picture in pictures:
        assert stale(picture.with_suffix(".txt").read_text(encoding="utf-8"), "tiny") == [], (
            "make gallery takes the pictures again")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_exists(command, monkeypatch, tmp_path):
    if command.startswith("make "):
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert shlex.split(command)[1] in targets
        return
    if command.startswith("hf "):  # offline it stops at its first request, not at an option
        hf = Path(sys.executable).parent / "hf"
        done = subprocess.run([hf, *shlex.split(command)[1:]], capture_output=True, text=True,
                              env={**os.environ, "HF_HUB_CACHE": str(tmp_path)})
        assert done.returncode and "Usage" not in done.stderr and "Error: Local entry" in done.stderr
        return
    command, _, written = command.partition(" > ")
    assert (ROOT / written).exists()  # what the shell writes is what the repository keeps
    start, given = command.split(" -m bpo ")
    program, _, launch = start.partition(" launch ")
    assert program == f".venv/bin/{'accelerate' if launch else 'python'}"
    parse = argparse.ArgumentParser.parse_args
    launched = launch and launch_command_parser().parse_args([*shlex.split(launch), "-m", "bpo"])

    def stop(parser, given):
        raise Parsed(parse(parser, given))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(Parsed) as parsed:
        main(shlex.split(given))
    if launch:  # as accelerate reads it, and as notebook 3 takes it
        read, *_ = _validate_launch_command(launched)
        assert read.num_processes % read.num_machines == 0
        assert read.num_machines == 1 or read.multi_gpu or read.use_fsdp
        options = parsed.value.args[0]
        p = next(p for n, p in params.read_study(options.study, check.overrides(options)).items()
                 if int(n[0]) == options.number)
        assert options.number != 3 or p.batch_pairs % (p.device_batch * read.num_processes) == 0


def test_commands_in_the_text_are_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    known = re.search(r"\{([\w,]+)\}", capsys.readouterr().out)[1].split(",")
    for text in TEXTS.values():
        assert set(re.findall(r"`bpo (\w+)", text)) <= set(known)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_links_and_files_that_it_names_exist(file):
    links = [x for x in re.findall(r"\]\(([^)#\s]+)\)", TEXTS[file]) if not x.startswith("http")]
    assert [x for x in links if not (file.parent / x).exists()] == []
    named = set(re.findall(r"(?<![\w/])(?:bpo|params|notebooks)/[\w./-]*\w/?", TEXTS[file]))
    assert [x for x in named - TO_BE_MADE if not (ROOT / x).exists()] == []


def test_what_to_change_stands_where_the_readme_says():
    rows = re.findall(r"(`\w+`(?: and `\w+`)?) (?:in|of) \[(bpo/[\w/.]+)\]", README)
    assert len(rows) == 9
    for names, file in rows:
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"\b{name}\b", (ROOT / file).read_text()), f"{name} in {file}"


def test_its_trainer_is_imported_as_it_says():
    snippet = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    compile(snippet, "README.md", "exec")
    exec("\n".join(x for x in snippet.splitlines() if x.startswith("from ")), {})
    adapted = re.search(r'target_modules=r"(.*)"\)', snippet)[1]
    layer = "model.{}.layers.0.self_attn.q_proj"
    assert re.fullmatch(adapted, layer.format("language_model"))
    assert not re.fullmatch(adapted, layer.format("vision_tower.encoder"))


@pytest.mark.study
@pytest.mark.parametrize("target, does", [
    ("report", "-m bpo run tiny\n"), ("test", "-m pytest"), ("bench", "tests/bench.py"),
    ("bench-gpu", "tests/bench_gpu.py"),
    ("lab", "-m jupyterlab --config=bpo/reports/template/lab_config.py"),
    ("replicate", "-m bpo replicate tiny --seeds 100-111"), ("help", "outputs/tiny/index.html")])
def test_make_does_what_the_readme_says(target, does):
    assert does in subprocess.run(["make", "-n", target], cwd=ROOT, text=True, check=True,
                                  capture_output=True).stdout
