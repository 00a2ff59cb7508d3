"""python -m bpo check STUDY --measure: time, memory and disk of each stage, from a few rows and
steps on the study's own checkpoint and data, each stage in a process of its own.

What a stage does once (loading, reading all data, hashes) is told apart from its rows by the parts
that it counts (`progress.ended`): rows and steps alone are multiplied. The run is written below a
folder of its own, which goes away, so results of the study stay as they are.
"""

import importlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from bpo import params
from bpo.params import (
    Benchmarks,
    DPOTraining,
    NoiseProbability,
    PairGeneration,
    Parameters,
    Refusal,
)
from bpo.study import environment, progress, sources
from bpo.study.files import to_json, write_whole
from bpo.study.text import duration

# The module whose `run` is a notebook's stage.
STAGES = {1: "evaluation.probe", 2: "pairs.stage", 3: "training.stage",
          4: "evaluation.comparison", 5: "evaluation.benchmarks"}
ROWS, STEPS = 8, 3  # of the steps the first warms up, and counts its operations
FITS = 0.9  # the share of a device's memory that what is advised may take
ONCE = ("drawing rows", "checking rows")  # parts that read all data, however few rows are used


def table(read: dict[str, Parameters]) -> list[str]:
    """The lines of what a study takes; raises Refusal where a stage cannot be run."""
    stages = {n: p for n, p in read.items() if int(n[0]) in STAGES}
    training = stages.get(DPOTraining.notebook)
    rows = max(ROWS, training.device_batch if training else 0)  # a step's pairs come from them
    params.outputs_root().mkdir(parents=True, exist_ok=True)
    lines, made = [_row("stage", "time", "of it once", "memory", "disk", "measured on")], {}
    with tempfile.TemporaryDirectory(prefix=".measure-", dir=params.outputs_root()) as folder:
        for name, p in stages.items():
            short = shortened(p, list(stages), rows)
            took = _ran(name, short, Path(folder))
            lines.append(line(p, params.validate(type(p), short, where=name), took, made))
            if p is training:
                other = short | {"gradient_checkpointing": not p.gradient_checkpointing}
                pairs = Path(folder, p.study, PairGeneration.notebook, "pairs.jsonl")
                other |= {"pairs": str(pairs)} if pairs.is_file() else {}
                try:
                    other = _ran(name, other, Path(folder, "other"))
                except Refusal as refusal:  # the memory may not hold it
                    other = {"failed": str(refusal)}
                lines += advice(p, {p.gradient_checkpointing: took,
                                     not p.gradient_checkpointing: other})
    return [f"measured in one process on {took['device']}:", *lines]


def shortened(p: Parameters, stages: list[str], rows: int) -> dict[str, Any]:
    """The values of a stage's short run: few rows and steps, in one process, asking no judge. What
    no measured stage writes is read where the study has it."""
    def rooted(value: Any) -> Any:
        if isinstance(value, dict):
            return {n: rooted(v) for n, v in value.items()}
        path = params.resolve(value, study=p.study)
        if not value or any(path.is_relative_to(sources.stage_folder(p.study, n)) for n in stages):
            return value
        if not path.exists() and (command := sources.written_by(path)):
            raise Refusal(f"{path} is not there yet, and measuring needs it: {command}")
        return str(path) if path.exists() else value  # a name of the hub stays one

    values = p.model_dump(mode="json")
    for n in (n for n in (*params.PATHS, "probe_image_folder") if n in values):
        several = n == "data" and isinstance(values[n], dict)  # file -> folder below image_folder
        values[n] = ({rooted(file): below for file, below in values[n].items()} if several
                     else rooted(values[n]))
    few = {"rows": rows, "questions": ROWS, "probe_rows": ROWS}  # 0: all
    few = {n: min(v, values.get(n) or v) for n, v in few.items()}
    few |= {"noise_rows": min(ROWS, values.get("noise_rows", 0)), "judge": "", "launch": "",
            "trackers": []}
    if isinstance(p, DPOTraining):
        few |= {"steps": STEPS, "batch_pairs": p.device_batch, "save_every": 1, "variants": {
            name: {n: v for n, v in changes.items() if n not in ("steps", "epochs", "batch_pairs")}
            for name, changes in p.variants.items()}}
    return values | {n: v for n, v in few.items() if n in values}


def _ran(name: str, values: dict[str, Any], root: Path) -> dict[str, Any]:
    """What a stage took in a process of its own that writes below `root`: see `main`."""
    file = root / f"{name}.yaml"
    root.mkdir(exist_ok=True)
    write_whole(file, yaml.safe_dump(values))
    done = subprocess.run(
        [sys.executable, "-m", "bpo.reports.measure", str(file)], cwd=params.ROOT, text=True,
        capture_output=True, env=os.environ | {"BPO_OUTPUTS": str(root), "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1:] or [f"ended with exit code {done.returncode}"]
        raise Refusal(f"{name} could not be measured: {why[0]}")
    return json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))


def line(p: Parameters, short: Parameters, took: dict[str, Any], made: dict[str, float]) -> str:
    """A stage's line: what it does once, and its parts as often as the study has their units.
    took: see `main`. made: how often the study has the short run's pairs, which notebook 2's line
    tells notebook 3's; 1 of pairs from elsewhere, for all of them are read."""
    grown, text = _grown(p, short, took, made)
    parts = {n: part for n, part in took["parts"].items() if n in grown}
    seconds = took["once"] + sum(spent * grown[n] for n, (_, spent) in parts.items())
    whole = sum(units * grown[n] for n, (units, _) in parts.items())
    more = (made["pairs"] if isinstance(p, DPOTraining)
            else whole / max(sum(units for units, _ in parts.values()), 1))
    return _row(p.notebook, duration(seconds), duration(took["once"]), _size(took["memory"]),
                _size(took["disk"] + took["disk_rows"] * more), text)


def _grown(p: Parameters, short: Parameters, took: dict[str, Any], made: dict[str, float]
           ) -> tuple[dict[str, float], str]:
    """label of a part -> how often the study has what was done of it; and what was run."""
    from bpo.evaluation import benchmarks, comparison, diagnostics, probe  # here: they bring torch

    units, as_long = {n: count for n, (count, _) in took["parts"].items()}, "as long as these"
    if isinstance(p, NoiseProbability):
        rows, few = (len(probe.to_look_at(q)[0]) for q in (p, short))
        return dict.fromkeys(units, rows / few), f"{few:,} of {rows:,} rows, {as_long}"
    if isinstance(p, PairGeneration):
        there = int(units[ONCE[0]])
        rows, few = (min(q.rows or there, there) for q in (p, short))
        made["pairs"] = rows / few
        return (dict.fromkeys(units.keys() - {*ONCE}, rows / few),
                f"{few:,} of {rows:,} rows, {as_long}")
    if isinstance(p, DPOTraining):
        methods = took["metrics"]["methods"]
        pairs = made.setdefault("pairs", 1.0) * max(m["rows"] for m in methods.values())
        varied = {n: p.varied(n) for n in methods}
        steps = {n: v.steps or math.ceil(v.epochs * pairs / v.batch_pairs)
                 for n, v in varied.items()}
        if "sft_compute" in steps:  # it spends what bpo spends
            steps["sft_compute"] = round(
                steps["bpo"] * methods["sft_compute"]["steps"] / methods["bpo"]["steps"])
        batch = {n: min(p.device_batch, m["rows"]) for n, m in methods.items()}
        return ({n: steps[n] * varied[n].batch_pairs / batch[n] / units[n] for n in steps},
                f"{STEPS} batches of {max(batch.values())} pairs a method, {as_long}; the study "
                f"has up to {max(steps.values()):,} steps of {p.batch_pairs}")
    if isinstance(p, Benchmarks):
        grown, total = {"answers weighed": p.probe_rows / short.probe_rows}, 0
        for name, benchmark in benchmarks.chosen(p).items():
            loaded = benchmark.load(p.path(p.folders[name]))
            there = len(getattr(loaded, "questions", loaded))
            asked = min(p.questions or there, there)
            total += asked
            grown |= {x: min(asked, diagnostics.AGAIN if x.endswith(("again", "format")) else asked)
                      / n for x, n in units.items() if x.startswith(f"{benchmark.title} questions")}
        return grown, f"{short.questions} questions a benchmark of {total:,} in all, {as_long}"
    noise = p.noise_rows / max(short.noise_rows, 1)
    grown, text = {"steps of noise": noise, probe.BLIND: noise}, []
    for split in (*p.splits, *[comparison.CALIBRATION] * bool(p.calibration_data)):
        rows, few = (len(comparison.read_split(q, split)[0]) for q in (p, short))
        grown |= {x: rows / few for x in units if x.endswith(f"-{split} questions")}
        text.append(f"{few:,} of {rows:,} rows of {split}")
    return grown, f"{', '.join(text)}, {as_long}"


def advice(p: DPOTraining, ran: dict[bool, dict[str, Any]]) -> list[str]:
    """What notebook 3 takes with gradient_checkpointing and without it, and which to set."""
    lines, fits, room = [], {}, ran[p.gradient_checkpointing]["room"]
    for value, took in ran.items():
        text = took.get("failed")
        if not text:
            units, seconds = map(sum, zip(*took["parts"].values(), strict=True))
            text = (f"{_size(took['memory'])}, {seconds / units:.3g} s for a batch of "
                    f"{p.device_batch} pairs")
            if took["memory"] and took["memory"] <= FITS * room:
                fits[value] = seconds / units
        lines.append(f"  gradient_checkpointing {str(value).lower()}: {text}")
    if not fits:
        return [*lines, f"  neither leaves a tenth of the device's {_size(room)}: lower "
                f"device_batch from {p.device_batch}"]
    best = str(min(fits, key=fits.get)).lower()
    return [*lines, f"  set gradient_checkpointing {best}: the faster that leaves a tenth of the "
            f"device's {_size(room)}, with pairs as long as these"]


def _row(*cells: str) -> str:
    return "{:26}{:>14}{:>14}{:>11}{:>11}  {}".format(*cells)


def _size(size: float | None) -> str:
    if size is None:
        return "not known"
    return f"{size / 1e6:,.1f} MB" if size < 1e8 else f"{size / 1e9:,.1f} GB"


def main() -> None:
    """Runs the stage of a parameter file and writes beside it what it took: seconds of all that
    happens `once`; of its parts the units and the seconds of these; bytes of memory, of files that
    grow with the rows (`disk_rows`), and of others."""
    file = Path(sys.argv[1])
    p = params.validate(params.SCHEMAS[file.stem], params.read_yaml(file), where=str(file))
    module = importlib.import_module(f"bpo.{STAGES[int(file.stem[0])]}")
    began = time.monotonic()
    try:
        result = module.run(p)
    except Refusal as refusal:
        sys.exit(str(refusal))
    once, parts = time.monotonic() - began, {}
    for part in progress.ended:
        warm = part.unit == "steps"
        units, seconds = part.done - part.spared - warm, part.spent - part.first * warm
        before = parts.get(part.label, (0, 0))
        parts[part.label] = (before[0] + units, before[1] + seconds)
        once -= seconds if part.label not in ONCE else 0
    sizes = {f: f.stat().st_size for f in sources.files_of(result.folder)}
    rows = sum(n for f, n in sizes.items() if f.suffix == ".jsonl" or "reference" in f.parts)
    # While a method trains: two checkpoints, each with the adapter and Adam's two moments.
    resuming = max((6 * n for f, n in sizes.items() if f.suffix == ".safetensors"
                    and "adapter" in f.parts), default=0)
    memory, room = _memory()
    write_whole(file.with_suffix(".json"), to_json({
        "once": once, "parts": parts, "metrics": result.metrics, "memory": memory, "room": room,
        "device": environment.device_name(), "disk_rows": rows,
        "disk": sum(sizes.values()) - rows + resuming}))


def _memory() -> tuple[int | None, int]:
    """Bytes that this process held at its worst moment, and that its device has: of the GPU's
    memory, without one of the machine's (None where the system does not tell)."""
    import torch

    if torch.cuda.is_available():
        return (torch.cuda.max_memory_allocated(),
                torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.is_file() else None
    return (int(peak[1]) * 1024 if peak else None,
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if peak else 0)


if __name__ == "__main__":
    main()
