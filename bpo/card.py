"""The card of an export: README.md with what the pairs are, how they were made, and their limits.

A data set card as hubs read it: YAML, then Markdown. It holds no time and no machine's paths, so
the same pairs give the same bytes. What models, data sets and parameters say is shown as text only.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from bpo.galleries import visible
from bpo.params import SOURCES
from bpo.records import to_json

HARMLESS = re.compile(r"[\w ,.:/{}\[\]\"()=+?-]+", re.ASCII)
LONGEST = 300  # characters of a shown text
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"),
         (10**7, "1M<n<10M"))
DATA_FILES = {"trl": "train.parquet", "bpo": "pairs.json", "llama-factory": "pairs.json",
              "ms-swift": "pairs.jsonl", "parquet": "train.parquet"}
MEANINGS = {
    "weakened": "what the multimodal model answers while its image is noised or damaged",
    "injected": "the chosen answer, rewritten by a language model with plausible mistakes",
    "given": "the rejected answer that the source data set came with",
}
_PARQUET = """```python
from datasets import load_dataset

pairs = load_dataset("parquet", data_files="train.parquet", split="train")
print(len(pairs), pairs[0])
```"""
_JSON = """```python
import json
from pathlib import Path

from PIL import Image

rows = json.loads(Path("pairs.json").read_text(encoding="utf-8"))
print(len(rows), Image.open(rows[0]{key}).size)
```"""
USAGE = {
    "trl": f"""{_PARQUET}

`images` opens as pictures, and TRL's `DPOTrainer` takes `pairs` as its `train_dataset`. Set
`max_length=None`: cutting a row with an image breaks it.""",
    "bpo": f"""{_JSON.format(key='["image"]')}

A row is a question with its `completions`: the annotated answer (`gt`, score 1) and the rejected
ones (score 0): `mllm-hal` from the weakened image, `llm-hal` from error injection, `given` from
the source data set. A trainer pairs completions of different score. `prompt` is `<image>`, a line
break and the question; where there were earlier turns, each turn follows on a line of its own
behind `USER:`, `ASSISTANT:` or `SYSTEM:`. A trainer that adds an image marker itself must be given
`prompt` without its first line.""",
    "llama-factory": f"""{_JSON.format(key='["images"][0]')}

In a training file of LLaMA-Factory: `stage: dpo`, `dataset: pairs`, and this folder as
`dataset_dir` and `media_dir`.""",
    "ms-swift": """```python
import json

from PIL import Image

with open("pairs.jsonl", encoding="utf-8") as lines:
    row = json.loads(next(lines))
print(row["rejected_response"], Image.open(row["images"][0]).size)
```

For ms-swift: `swift rlhf --rlhf_type dpo --dataset pairs.jsonl`, run from this folder, since image
paths start at the working directory.""",
    "parquet": f"""{_PARQUET}

A row is a pair. `id` is that of the annotated answer, a slash and the number of its rejected
answer, from 0; `history` holds the turns before `question`; `mode` is how the source made
the answer.""",
}


@dataclass
class Tally:
    """What an export took and what it left out."""

    positives: int = 0  # lines read
    rows: int = 0  # lines written
    pairs: int = 0  # their rejected answers
    kinds: Counter = field(default_factory=Counter)  # (source, mode, category) -> pairs
    left_out: Counter = field(default_factory=Counter)  # what and why -> how many
    example: dict[str, Any] | None = None  # the first line with a pair

    def take(self, line: dict[str, Any]) -> None:
        self.rows += 1
        self.pairs += len(line["rejected"])
        self.kinds.update((a["source"], a.get("mode") or "", line["category"])
                          for a in line["rejected"])
        if self.example is None and line["rejected"]:
            self.example = line


def literal(value: Any) -> str:
    """A value as text that neither Markdown, HTML nor TeX reads as anything else, on one line.

    A harmless text becomes a code span; of others, all but letters, digits, spaces, commas and
    hyphens become character references, so that nothing is a tag, a link or a formula. Long texts
    are cut; numbers stay as they are.
    """
    if isinstance(value, int | float):
        return to_json(value)
    text = value if isinstance(value, str) else to_json(value)
    if not text:
        return "(empty)"
    text = visible(text if len(text) <= LONGEST else text[:LONGEST] + " ...")
    text = re.sub(r"[\n\t\u2028\u2029]", " ", text)
    if HARMLESS.fullmatch(text):
        return f"`{text}`"
    return "<code>" + "".join(c if c.isalnum() or c in " ,-" else f"&#{ord(c)};"
                              for c in text) + "</code>"


def public(value: Any) -> Any:
    """A parameter without what is nobody's business: the folders above a file, the name and
    password in a URL."""
    if isinstance(value, Mapping):
        return {public(k): public(v) for k, v in value.items()}
    if isinstance(value, list):
        return [public(v) for v in value]
    if isinstance(value, str) and "://" in value:
        return re.sub(r"\?.*", "", re.sub(r"//[^/]*@", "//", value), flags=re.DOTALL)
    if isinstance(value, str) and re.match(r"/|~|[A-Za-z]:[\\/]|\.\.", value):
        return ".../" + re.split(r"[\\/]", value.rstrip("/\\"))[-1]
    return value


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |"
                     for row in (head, ["---"] * len(head), *rows))


def write(manifest: Mapping[str, Any], tally: Tally, *, study: str, layout: str, about: str,
          hashes: Mapping[str, str]) -> str:
    """The card of an export, from the manifest of notebook 2 and what was exported.

    hashes: data file -> sha256.
    """
    count = tally.rows if layout == "bpo" else tally.pairs
    size = next((name for limit, name in SIZES if count < limit), "n>10M")
    head = {"pretty_name": f"Preference pairs of study {study}", "license": "unknown",
            "task_categories": ["image-text-to-text"], "size_categories": [size],
            "tags": ["preference", "dpo", "multimodal", "synthetic"],
            "configs": [{"config_name": "default", "data_files": [
                {"split": "train", "path": DATA_FILES[layout]}]}]}
    return "\n\n".join((
        "---\n" + yaml.safe_dump(head, sort_keys=False, allow_unicode=True) + "---",
        f"# Preference pairs of study {literal(study)}",
        f"Layout `{layout}`: {about}. Each pair is an image, a question, a *chosen* answer, which "
        "is the source data set's annotation, and a *rejected* one, which is to show what a "
        "multimodal model says from habit and not from the image. They were made by Bootstrapped "
        "Preference Optimization ([arXiv 2403.08730](https://arxiv.org/abs/2403.08730)).",
        "The licence is not known here: it is that of the source images and answers, and of what "
        "the models that wrote the rejected answers allow.",
        *_contents(tally), "## How to load it\n\nRun here, in this folder:", USAGE[layout],
        *_limits(manifest["metrics"]), *_making(manifest), "## Files",
        _table(("file", "sha256"), [(f"`{n}`", f"`{h}`") for n, h in hashes.items()]))) + "\n"


def _contents(tally: Tally) -> list[str]:
    sources = [s for s in SOURCES if any(kind[0] == s for kind in tally.kinds)]
    out = ["## What is in it",
           f"{tally.pairs} pairs from {tally.rows} of {tally.positives} annotated answers.",
           _table(("source", "mode", "category", "pairs"),
                  [(source, literal(mode) if mode else "-", literal(category), n)
                   for (source, mode, category), n in sorted(tally.kinds.items())]),
           "\n".join(f"- {source}: {MEANINGS[source]}" for source in sources)]
    if tally.left_out:
        out.append("Left out:\n\n" + "\n".join(
            f"- {what}: {n}" for what, n in sorted(tally.left_out.items())))
    else:
        out.append("Nothing was left out.")
    line, answer = tally.example, tally.example["rejected"][0]
    out += ["The first pair:", _table(("", "text"), [
        ("question", literal(line["prompt"][-1]["content"])), ("chosen", literal(line["chosen"])),
        (f"rejected ({answer['source']})", literal(answer["text"]))])]
    return out


def _limits(metrics: Mapping[str, Any]) -> list[str]:
    right = {s: (metrics.get(s, {}).get("truth_right") or {}).get("kept") for s in SOURCES}
    known = {s: share for s, share in right.items() if share and share["n"]}
    out = ["Nobody has read the rejected answers that models wrote. Some are as right as the "
           "chosen one, and training on those teaches the wrong thing."]
    out += [f"Of the {source} answers that notebook 2 kept, {share['value']:.1%} are in truth "
            f"right (95 % interval {share['low']:.1%} to {share['high']:.1%}, out of "
            f"{share['n']} whose truth is known)." for source, share in known.items()]
    if not known:
        out.append("How many is not known: the source data has no truth to compare with.")
    out.append("Images are those of the source, byte for byte. This kit turns them upright by "
               "their EXIF tag, lays transparent ones on white and scales 16-bit grey to 8 bits; "
               "another tool may not.")
    return ["## Limits", "\n".join(f"- {text}" for text in out)]


def _making(manifest: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{n} {v}" for n, v in manifest["versions"].items())
    return ["## How the pairs were made",
            f"Notebook 2 of the kit `bpo` with these parameters; {literal(versions)}, commit "
            f"{literal(manifest['commit'])}, on {literal(manifest['device'])}.",
            _table(("parameter", "value"), [(f"`{n}`", literal(public(v)))
                                            for n, v in manifest["parameters"].items()]),
            "What went in, by its hash:",
            _table(("input", "sha256"), [(literal(public(n)), f"`{h}`")
                                         for n, h in manifest["inputs"].items()])]
