"""Notebook 3's work: DPO on the pairs and its SFT baselines, one adapter a method.

All methods start from the same adapter, with the same optimizer, batch and steps; what differs is
the objective and the rows. Reference log-probs are kept for all methods, later runs of the stage
and sweeps.
"""

import importlib.util
import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from pandas import DataFrame
from transformers import AutoConfig

from bpo.data import images, turns
from bpo.evaluation import metrics
from bpo.models import checkpoint as checkpoints
from bpo.models import encoding, mixing
from bpo.models.checkpoint import Checkpoint
from bpo.pairs import rows as pair_rows
from bpo.pairs.methods import learns_pairs
from bpo.params import NF4, DPOTraining, Refusal
from bpo.study import launch, processes, progress, results
from bpo.study import stage as stages
from bpo.study.files import to_json, write_whole
from bpo.training import trainers
from bpo.training.packed import trainer as packed

LOGGED = ("loss", "rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected",
          "rewards/damaged", "logps/chosen", "logps/rejected", "grad_norm", "learning_rate")
ASIDE = ("packed", "matched", "beta")  # of a method's facts: no results


def run(p: DPOTraining) -> stages.Result:
    """The stage of notebook 3: for every method adapter/, history.json and compute.json."""
    launch.start(p)
    inputs = {"model": p.path(p.model), "pairs": p.path(p.pairs)}
    return stages.stage(
        p, lambda folder: _work(p, folder), inputs=inputs,
        pictures=lambda folder: images.named({p.path(p.pairs): p.path(p.image_folder)}))


def _work(p: DPOTraining, folder: Path) -> dict[str, Any]:
    runs, rows = p.runs(), {}
    varied = {name: p.varied(name) for name in runs}
    for v in varied.values():
        if v.batch_pairs % (p.device_batch * processes.world()):
            raise Refusal(f"batch_pairs ({v.batch_pairs}) must be a multiple of device_batch "
                          f"({p.device_batch}) times the {processes.world()} processes")
    launched = [kind for kind in ("FSDP", "DEEPSPEED")
                if os.environ.get(f"ACCELERATE_USE_{kind}") == "true"]
    if p.precision == NF4 and launched:
        raise Refusal(f"precision: {NF4} weights cannot be spread by {launched[0]}; launch with "
                      "--multi_gpu, where each process holds them all, or set bfloat16")
    for name in p.trackers:
        if importlib.util.find_spec(name) is None:
            raise Refusal(f"trackers: {name} is not installed; pip install {name}, or leave "
                          "trackers empty")
    # The processor is enough to count tokens: no weights lie in memory while others train.
    checkpoint = checkpoints.load_without_weights(p.path(p.model), transform=p.image_transform)
    try:
        checkpoint.processor(text=["a"])
    except ValueError as error:
        raise Refusal(f"{p.model}: its processor takes no text without an image, and TRL tokenizes "
                      "answers alone; this family can be probed and give pairs, but not be trained"
                      ) from error
    if p.gradient_checkpointing and "DEEPSPEED" in launched:
        # There TRL takes the reentrant kind.
        config = AutoConfig.from_pretrained(p.path(p.model), trust_remote_code=False)
        if mixing.shares_keys(config):
            raise Refusal("gradient_checkpointing: under DeepSpeed it would give wrong gradients "
                          f"for {p.model}, whose layers share keys and values; turn it off, or "
                          "launch with FSDP or --multi_gpu")
    image_folder = p.path(p.image_folder)
    lines, skipped = processes.first(lambda: usable(
        checkpoint, pair_rows.read_pairs(p.path(p.pairs)), image_folder, max_tokens=p.max_tokens))
    for name, method in runs.items():
        rows[name] = pair_rows.training_rows(method, lines, image_folder, seed=p.seed,
                                             noise_step=varied[name].noise_step)
        if not rows[name]:
            needs = "; set clean_answers in notebook 2" if method == "bpo_own" else ""
            raise Refusal(f"{p.path(p.pairs)}: there is no row to train {name} on{needs}")
    pairs = len(pair_rows.to_preferences(lines, image_folder))
    references = Path("reference", trainers.batches_key(p, list(rows.values())))
    matched = {name: _matched(name, rows) for name in runs if learns_pairs(name)}
    for name in matched:
        if varied[name].reference == "sft" and not matched[name]:
            raise Refusal(f"{name} starts from its matched SFT, which is not among the methods; "
                          f"add sft_matched{runs[name].removeprefix('bpo')} to methods")
    # A pair has two answers, and the reference's; sft_compute spends what bpo does.
    steps = {n: v.steps or math.ceil(v.epochs * pairs / v.batch_pairs)
             for n, v in varied.items()}
    progress.announce((n, steps[n] * (2 if learns_pairs(n) or n == "sft_compute" else 1))
                      for n in runs if not (folder / n / "history.json").is_file())
    out = {}
    # First what others start from; last sft_compute, which spends what bpo spent.
    for name in sorted(runs, key=lambda n: (n == "sft_compute", learns_pairs(n))):
        v = varied[name]
        count = max(steps[name] if name != "sft_compute" else round(
            out["bpo"]["flops"] / out["sft_matched"]["flops_per_step"]), 1)
        start, kept = None, references
        if v.reference == "sft" and learns_pairs(name):
            start, kept = folder / matched[name] / "adapter", references / matched[name]
        if v.share != p.share:  # another order of rows has other last bits
            kept /= v.share
        others = sorted(folder.parent.glob(f"{folder.name}.old-*/{kept}"))
        history = train_method(v, name, rows[name], folder / name, steps=count,
                               references=folder / kept, others=others, start=start)
        out[name] = _facts(v, rows[name], folder / name, history, steps=count)
        if matched.get(name):
            out[name]["matched"] = matched[name]
    if processes.rank() == 0:
        results.write(folder, [
            results.Result("training", "", name, "", metric, results.Estimate(value))
            for name in runs for metric, value in out[name].items() if metric not in ASIDE])
    return {"methods": {name: out[name] for name in runs}, "rows_dropped": skipped}


def _matched(name: str, rows: Mapping[str, Sequence[dict]]) -> str:
    """The SFT that trains on a DPO method's positives, in their order and as often; "" if none."""
    positives = pair_rows.to_completions(rows[name])
    namesake = f"sft_matched{name.removeprefix('bpo')}"
    return next((n for n in sorted(rows, key=lambda n: (n != namesake, n == "sft"))
                 if not learns_pairs(n) and n != "sft_compute" and rows[n] == positives), "")


def usable(checkpoint: Checkpoint, lines: Sequence[dict], image_folder: Path, *,
           max_tokens: int) -> tuple[list[dict], dict[str, int]]:
    """Lines whose prompt and longest answer fit and hold none of the checkpoint's own tokens, and
    how many were dropped by reason. Cutting is worse than dropping: a cut answer trains on
    nothing, a cut image fails."""
    fitting, dropped, lengths = [], Counter(), encoding.Lengths(checkpoint)
    special = encoding.special(checkpoint.processor)
    for line in lines:
        file = image_folder / line["image"]
        if not images.exists(file):
            raise Refusal(f"{file}: the image of pair {line['id']} is missing; set image_folder to "
                          "the folder that the pairs' image names start from")
        rejected = [*line["rejected"], *line.get("unselected", ())]
        texts = [line["chosen"], *(r["text"] for r in rejected)]
        if any(metrics.normalised(t) == metrics.normalised(line["chosen"]) for t in texts[1:]):
            raise Refusal(f"pair {line['id']}: a rejected answer equals the chosen one, "
                          "which would train on nothing")
        texts += [line["own"]] if "own" in line else []
        messages = (*(m["content"] for m in line["prompt"]), *texts)
        if reason := next(filter(None, (turns.strange(t, special) for t in messages)), None):
            dropped[reason] += 1
            continue
        prompt = encoding.prompt_text(checkpoint, line["prompt"], image=True)
        answers = [encoding.answer_text(checkpoint, line["prompt"], t) for t in texts]
        if lengths(prompt, [images.size(file)], answers) <= max_tokens:
            fitting.append(line)
        else:
            dropped[f"longer than {max_tokens} tokens"] += 1
    return fitting, dict(dropped)


def train_method(p: DPOTraining, method: str, rows: Sequence[dict], folder: Path, *, steps: int,
                 references: Path, others: Sequence[Path] = (), start: Path | None = None
                 ) -> list[dict]:
    """Trains a method, from its last checkpoint if it has one, and returns its history: a record
    {step, loss, ...} an optimizer step. A method that is done is only read. references, others,
    start: see `trainers.make`."""
    history_file = folder / "history.json"
    if history_file.is_file():
        return json.loads(history_file.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    try:
        with checkpoints.quietly():
            trainer = trainers.make(p, method, rows, folder, steps=steps,
                                    references=references, others=others, start=start)
            trainer.train(resume_from_checkpoint=processes.first(
                lambda: last_checkpoint(folder / "checkpoints")))
    except packed.NotFinite as error:
        ids = ", ".join(str(rows[n]["id"]) for n in error.rows)
        raise Refusal(f"{method}: the loss is not a number at step {error.step}, on pairs {ids}; "
                      "lower learning_rate or use precision float32") from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise Refusal(f"{method}: the memory does not hold a step; lower device_batch (it is "
                      f"{p.device_batch}) or max_tokens ({p.max_tokens}), or set "
                      "gradient_checkpointing") from error
    history = [{"step": h["step"], **{k: round(h[k], 8) for k in LOGGED if k in h}}
               for h in trainer.state.log_history if "loss" in h]
    bad = [(h["step"], name) for h in history for name, value in h.items()
           if not math.isfinite(value)]
    if bad:
        raise Refusal(f"{method}: the {bad[0][1]} is not a number from step {bad[0][0]} on; "
                      "lower learning_rate or use precision float32")
    # Where a process holds a part of the weights, all of them put the adapter together.
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    whole = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
    if processes.rank() == 0:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(
            folder / "adapter", state_dict=whole, selected_adapters=["default"])
        for file in (folder / "adapter" / "adapter_config.json", folder / "adapter" / "README.md"):
            write_whole(file, file.read_text(encoding="utf-8").replace(
                str(p.path(p.model)), p.model.replace("{study}", p.study)))
        timings = folder.parent / stages.TIMINGS
        before = json.loads(timings.read_text()) if timings.is_file() else {}
        write_whole(timings, to_json({**before, method: round(time.monotonic() - began, 1)}))
        write_whole(history_file, to_json(history))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # only there to resume from
    processes.wait()
    return history


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint; a kill while one is written leaves it without its last file."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), reverse=True,
                             key=lambda c: int(c.name.removeprefix("checkpoint-"))):
        with suppress(OSError, ValueError):
            if json.loads((checkpoint / "trainer_state.json").read_text()):
                return str(checkpoint)
    return None


def _facts(p: DPOTraining, rows: Sequence[dict], folder: Path, history: Sequence[dict], *,
           steps: int) -> dict[str, Any]:
    """What the manifest holds of a method. FLOPs of an optimizer step are the mean of the counted
    ones without the reference; those of the run have it once for each row."""
    first, last = history[0], history[-1]
    counted = json.loads((folder / "compute.json").read_text())
    batches = counted["batches"] * p.device_batch / p.batch_pairs  # optimizer steps counted
    flops = counted["flops"] / batches * steps
    flops += counted["reference"] / batches * min(steps, len(rows) / p.batch_pairs)
    facts = {"rows": len(rows), "steps": steps, "flops_per_step": counted["flops"] / batches,
             "flops": flops, "loss_first": first["loss"], "loss_last": last["loss"]}
    facts |= {n: v for n, v in counted.items() if n == "packed"}
    if "logps/chosen" in last:
        # One batch is noisy: the end is the mean of the last tenth of the run.
        tenth = history[-max(len(history) // 10, 1):]
        ends = {n: sum(h[f"rewards/{n}"] for h in tenth) / len(tenth)
                for n in ("margins", "accuracies", "chosen", "rejected")}
        # The reward is beta times the log-ratio to the reference, so dividing by beta gives the
        # change of the answer's log-probability without the noise of which rows came up.
        facts |= {"beta": p.beta, "margin_last": round(ends["margins"], 6),
                  "accuracy_last": round(ends["accuracies"], 6),
                  "chosen_change": round(round(ends["chosen"], 6) / p.beta, 6),
                  "rejected_change": round(round(ends["rejected"], 6) / p.beta, 6)}
    return facts


def histories(result: stages.Result) -> dict[str, list[dict]]:
    """method -> a record {step, loss, ...} an optimizer step. DPO methods also have "chosen"
    and "rejected": the mean change of the answers' log-probability against the reference, nats."""
    out = {m: json.loads((result.folder / m / "history.json").read_text())
           for m in result.metrics["methods"]}
    for method, history in out.items():
        for record in (h for h in history if "rewards/chosen" in h):
            beta = result.metrics["methods"][method]["beta"]
            record |= {n: record[f"rewards/{n}"] / beta for n in ("chosen", "rejected")}
    return out


def example(p: DPOTraining, result: stages.Result) -> tuple[str, dict]:
    """For notebook 3's part by hand: the first method that learns from pairs (the first of all
    where none does) and the first pair, in TRL's layout."""
    methods = list(result.metrics["methods"])
    method = next(filter(learns_pairs, methods), methods[0])
    rows = pair_rows.training_rows(
        p.runs()[method] if learns_pairs(method) else "bpo", pair_rows.read_pairs(p.path(p.pairs)),
        p.path(p.image_folder), seed=p.seed, noise_step=p.varied(method).noise_step)
    if not rows:
        raise Refusal(f"{p.path(p.pairs)}: no pair has a rejected answer, so there is none to show")
    return method, rows[0]


def first_loss(p: DPOTraining, result: stages.Result, method: str, *, dpo: float) -> DataFrame:
    """What the first line of a method's history.json adds up: a row for DPO, for the others, and
    for the line itself.

    dpo: DPO's loss of a pair before training, which is that of every pair. The other objectives
    are means over the first batch; theirs is what the line says beyond DPO.
    """
    p = p.varied(method)
    weights = (dict(zip(p.loss, p.loss_weights, strict=True)) if learns_pairs(method)
               else {"sft": 1.0})
    stored = histories(result)[method][0]["loss"]
    plain = weights.pop("sigmoid", 0.0) * dpo
    rows = [("sigmoid, by hand", plain), (", ".join(weights) or "no other", stored - plain),
            ("first line of history.json", stored)]
    return DataFrame(rows, columns=["objective, times its weight", "at step 1"])
