"""The command line: python -m bpo run | stage | replicate | results | power | report STUDY, and the
commands of other modules (`MODULES`)."""

import argparse
import importlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bpo import check, params
from bpo.params import Refusal, short
from bpo.reports import index as studies
from bpo.reports import page as report
from bpo.reports.measure import STAGES
from bpo.study import processes, progress
from bpo.study import stage as stages

# Those of the tiny world are for its notebooks alone: no command computes them without a kernel.
TINY_STAGES = {0: "tiny.stage", 6: "tiny.prior", 8: "tiny.dose"}
WRITERS = {6: "tiny.tables", 8: "tiny.dose"}  # of sections on studies of several worlds
# command -> its module (`add_arguments`, `run`), imported for it alone, and what it does
MODULES = {
    "new": ("new", "write the parameters of a study of your own model and data"),
    "check": ("check", "read a study's parameters, say what is missing, and the memory"),
    "verify": ("study.verify", "name what in a study or its zip is not as in SHA256SUMS"),
    "pack": ("reports.pack", "make one zip file of a study's reports, parameters and adapters"),
    "export": ("pairs.export", "write a study's pairs in another tool's layout"),
    "merge": ("training.merge", "write what a method trained as a plain checkpoint"),
    "score": ("evaluation.score", "score answers to a public benchmark")}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code. A refusal is one message and exit code 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m bpo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, work: Any, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text)
        command.set_defaults(work=work)
        return command

    run = add("run", _run, "run a study's notebooks and render their reports")
    stage = add("stage", _stage, "compute one notebook's stage without a kernel, also under "
                                 "`accelerate launch -m bpo stage STUDY N`")
    pages = add("report", _report, "render the executed notebooks again")
    replicate = add("replicate", _replicate,
                    "run a study for several seeds and tell what holds over them")
    tables = add("results", _results, "write the README's tables from a stored replication")
    power = add("power", _power, "say how many seeds a difference needs")
    compare = add("compare", _compare, "write a page of what differs between two studies")
    pages.add_argument("--address", default="", help="the folder's URL, for previews of links")
    for command in (run, stage, replicate):
        check.add_study(command)
    for command in (pages, tables, power, compare):
        command.add_argument("study")
    for command in (run, stage):
        command.add_argument("--as", dest="name", help="the results' name, if not the study's")
    stage.add_argument("number", type=int, metavar="N", help="the notebook's number")
    stage.add_argument("--parameters", type=Path, metavar="FILE", help="the notebook's parameters, "
                       "in place of the study's")
    run.add_argument("--only", type=int, metavar="N", help="run notebook N alone")
    run.add_argument("--from", type=int, dest="first", metavar="N", help="start at notebook N")
    compare.add_argument("other", help="the second study")
    tables.add_argument("others", nargs="*", metavar="OTHER", help="further ones: in one table")
    tables.add_argument("--against", default="", metavar="METHOD", help="compare with this one")
    replicate.add_argument("--seeds", default="5", metavar="SEEDS", help="a count from the study's "
                           "own seed upwards (default: 5), a range (100-111) or a list (100,103)")
    replicate.add_argument("--jobs", type=int, default=1, metavar="N",
                           help="seeds that run at once, each with outputs/STUDY-seedN.log")
    power.add_argument("--metric", action="append", dest="metrics", metavar="NAME")
    power.add_argument("--against", action="append", dest="baselines", metavar="METHOD")
    power.add_argument("--difference", type=float, help="the true difference (default: 0.01)")
    for name, (module, text) in MODULES.items():
        command = add(name, None, text)
        if arguments[:1] == [name]:
            imported = importlib.import_module(f"bpo.{module}")
            imported.add_arguments(command)
            command.set_defaults(work=imported.run)
    options = parser.parse_args(arguments)
    try:
        return options.work(options)
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    return _run_study(options.study, check.overrides(options), only=options.only,
                      first=options.first)


def _run_study(study: str, overrides: dict[str, Any], *, only: int | None = None,
               first: int | None = None) -> int:
    """Executes the notebooks in order, each into outputs/<study>/, rendering each as it ends."""
    read = params.read_study(study, overrides)
    chosen = [n for n in read if only in (None, int(n[0])) and int(n[0]) >= (first or 0)]
    if not chosen:
        raise Refusal(f"study {study} has no such notebook; it has {', '.join(read)}")
    lost = [f"{name}: {field} {path}  {note}" for name in chosen
            for field, path, note, missing in check.findings(read[name], read) if missing]
    if lost:
        raise Refusal("missing, so nothing was run:\n  " + "\n  ".join(lost))
    name = next(iter(read.values())).study
    folder = params.outputs_root() / name
    folder.mkdir(parents=True, exist_ok=True)
    with stages.locked(folder / ".run.lock", f"study {name} is being run by another process; "
                       "wait for it to end, or give this run another name with --as"):
        done = all(_execute(notebook, read[notebook], folder) for notebook in chosen)
        index = studies.index(folder)
    if done:
        print(f"the report is {short(index)}")
    return int(not done)


def _execute(notebook: str, p: params.Parameters, folder: Path, *, name: str = "") -> bool:
    """One notebook through papermill, cleaned and rendered; False when it failed. One that would
    come out as it is already is only rendered.

    name: the executed notebook's, if not the notebook's own.
    """
    out = folder / f"{name or notebook}.ipynb"
    if _as_it_was(out, p):
        report.html_page(out)
        print(f"— {notebook}: as it was", flush=True)
        return True
    import papermill
    from traitlets.config import Config

    print(f"— {notebook}", flush=True)
    began, message = time.monotonic(), None
    # papermill fills the name it is given while it runs: a killed run must not leave half a report.
    running = folder / f".{out.stem}.running.ipynb"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ[progress.RUN] = "terminal" if sys.stderr.isatty() else "page"
    try:
        papermill.execute_notebook(
            params.ROOT / "notebooks" / f"{notebook}.ipynb", running, cwd=str(folder),
            parameters=p.model_dump(mode="json"), kernel_name="python3", progress_bar=False,
            shutdown_kernel="immediate",  # one that is asked to go may print that as an error
            # nobody else on a shared machine reads along; "auto": as far as the kernel knows how
            config=Config(KernelManager={"transport_encryption": "auto"}),
            **({"stderr_file": sys.stderr} if sys.stderr.isatty() else {}))
    except papermill.exceptions.PapermillExecutionError as error:
        message = report.plain("\n".join(error.traceback)) or f"{error.ename}: {error.evalue}"
    report.clean_notebook(running, None if message else p)
    running.replace(out)
    report.html_page(out)
    if message:
        print(f"{message}\n{notebook} failed; its report so far is "
              f"{short(out.with_suffix('.html'))}", file=sys.stderr)
        return False
    print(f"  {time.monotonic() - began:.0f} s, {short(out.with_suffix('.html'))}", flush=True)
    return True


def _as_it_was(executed: Path, p: params.Parameters) -> bool:
    """Whether executing a notebook again would give what is there: it bears the stamp of what it
    would be made from, and its stage is up to date."""
    if not executed.is_file() or not report.bears_stamp(executed, p):
        return False
    module = (STAGES | TINY_STAGES)[int(p.notebook[0])]
    try:
        with stages.read_only():
            importlib.import_module(f"bpo.{module}").run(p)
    except Refusal:
        return False
    return True


def _stage(options: argparse.Namespace) -> int:
    """The work of one notebook, in this process's share; its notebook then finds it up to date."""
    study, number, file = options.study, options.number, options.parameters
    if file is None:
        read = params.read_study(study, check.overrides(options))
    else:
        values = params.read_yaml(file) | check.overrides(options)
        read = {n: params.validate(schema, values, where=str(file))
                for n, schema in params.SCHEMAS.items() if int(n[0]) == number}
    name = next((n for n in read if int(n[0]) == number), None)
    if name is None or number not in STAGES:
        raise Refusal(f"study {study} has no stage {number} for this command; it has " + (
            ", ".join(n for n in read if int(n[0]) in STAGES) or "none: run its notebooks"))
    if processes.world() > 1 and number not in (2, 3):
        raise Refusal(f"{name} runs in one process: start it without a launcher, "
                      f"python -m bpo stage {study} {number}")
    result = importlib.import_module(f"bpo.{STAGES[number]}").run(read[name])
    if processes.rank() == 0:
        print(f"{result.done}: {short(result.folder / stages.MANIFEST)}")
    processes.leave()
    return 0


def _replicate(options: argparse.Namespace) -> int:
    """The study for several seeds, each a study of its own, then what holds over them. A seed that
    is complete is only read, so that a replication that was stopped goes on where it was."""
    study, overrides = options.study, check.overrides(options)
    for name in ("seed", "study"):
        if name in overrides:
            raise Refusal(f"-p {name}: replicate sets {name} itself; leave it out")
    read = params.read_study(study, overrides)
    compared = read.get(params.QualitativeComparison.notebook)
    if compared is None:
        raise Refusal(f"study {study} has no {params.QualitativeComparison.notebook}.yaml, which "
                      "a replication is about; write one, or run the study for each seed")
    from bpo.evaluation import replication  # here, since transformers comes with them
    from bpo.reports import readme

    names = replication.studies(compared.study, replication.seeds(options.seeds, compared.seed),
                                compared.seed)
    if options.jobs > 1:
        _at_once(options, names)
    again = "then give the same command again: what is complete is only read"
    for seed, name in names.items():
        print(f"— seed {seed}: study {name}", flush=True)
        try:
            failed = _run_study(study, {**overrides, "study": name, "seed": seed})
        except Refusal as refusal:
            raise Refusal(f"{refusal}\nseed {seed} (study {name}) could not run, so the "
                          f"replication stopped; mend it, {again}") from None
        if failed:
            raise Refusal(f"seed {seed} (study {name}) failed, so the replication stopped; mend "
                          f"what its report names, {again}")
    p = params.Replication(study=compared.study, seed=compared.seed, studies=list(names.values()))
    failed = _read_results(p)
    if not failed:
        stored = replication.store(p.study, replication.read(names))
        print(f"all seeds are in {short(stored)}, the tables over them in "
              f"{short(readme.write_results(p.study))}")
    return failed


def _at_once(options: argparse.Namespace, names: dict[int, str]) -> None:
    """Runs seeds in processes of their own. How each ended is not looked at: the run that follows
    finds what is complete, and says what failed."""
    given = [x for pair in options.overrides for x in ("-p", *pair)]

    def run(seed: int) -> None:
        log = params.outputs_root() / f"{names[seed]}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        print(f"— seed {seed}: see {short(log)}", flush=True)
        with log.open("wb") as stream:
            subprocess.run([sys.executable, "-m", "bpo", "run", options.study, "--as", names[seed],
                            *given, "-p", "seed", str(seed)], stdout=stream, stderr=stream)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(run, names))


def _results(options: argparse.Namespace) -> int:
    folder = params.params_root() / options.study
    module = importlib.import_module("bpo." + next(
        (m for n, m in WRITERS.items() if [*folder.glob(f"{n}_*.yaml")]), "reports.readme"))
    file = (module.write_joined([options.study, *options.others], options.against)
            if options.others or options.against else module.write_results(options.study))
    print(f"the tables over seeds are in {short(file)}")
    return 0


def _power(options: argparse.Namespace) -> int:
    """How many seeds a difference needs, from the seeds at hand."""
    from bpo.evaluation import replication  # here, since transformers comes with it
    from bpo.reports.tables import summary

    given = {n: v for n in ("metrics", "baselines", "difference")
             if (v := getattr(options, n)) is not None}
    p = params.validate(params.Replication, {"study": options.study, **given}, where="bpo power")
    print(summary.power(replication.every_seed(p), p).to_string(index=False))
    print(f"true difference {p.difference:g}, two-sided paired t test over seeds at 5 %, power .8")
    return 0


def _compare(options: argparse.Namespace) -> int:
    """Notebook 7 on one study beside another: what they did differently, and what came out."""
    study, other = options.study, options.other
    for name in (study, other):
        if not list((params.outputs_root() / name).glob(f"*/{stages.MANIFEST}")):
            raise Refusal(f"outputs/{name}: nothing has finished there; python -m bpo run {name}")
    return _read_results(params.Replication(study=study, studies=[study], other=other),
                         name=f"{studies.AGAINST}{other}")


def _read_results(p: params.Replication, *, name: str = "") -> int:
    """Notebook 7, which computes no stage, into the first study's folder."""
    folder = params.outputs_root() / p.study
    folder.mkdir(parents=True, exist_ok=True)  # no seed of a replication need be the study itself
    done = _execute(p.notebook, p, folder, name=name)
    studies.index(folder)
    return int(not done)


def _report(options: argparse.Namespace) -> int:
    """Renders all executed notebooks of a study and its index again."""
    folder = params.outputs_root() / options.study
    notebooks = [f for n in params.SCHEMAS if (f := folder / f"{n}.ipynb").is_file()]
    if not notebooks:
        raise Refusal(f"{folder}: no notebook was executed here yet; "
                      f"python -m bpo run {options.study}")
    for notebook in notebooks:
        report.html_page(notebook)
    print(f"the report is {short(studies.index(folder, address=options.address.rstrip('/')))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
