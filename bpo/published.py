"""Numbers that others published, each with its source, to stand beside a user's own.

None of them is a result of this kit. A number that an endpoint judged is only to be set beside one
of the same judge, which an own run seldom has.
"""

from dataclasses import asdict, dataclass
from typing import Any

BPO = "arXiv 2403.08730"
SECOND_HAND = "as a secondary source quotes it"
JUDGED = "judged by GPT-4"
MDPO = "as quoted for mDPO: base, DPO, mDPO on LLaVA-1.5-7B"


@dataclass(frozen=True)
class Published:
    """One number. `value` is in per cent or points of 100, as the benchmark is written."""

    what: str
    model: str
    benchmark: str
    value: float
    source: str
    note: str = ""


NUMBERS = (
    *(Published(what, f"LLaVA-1.5-{size}", "MM-Vet", value, BPO, f"{JUDGED}; {SECOND_HAND}")
      for size, values in (("7B", (31.7, 33.3, 36.8)), ("13B", (36.8, 38.3, 41.4)))
      for what, value in zip(("untuned", "SFT", "BPO"), values, strict=True)),
    Published("BPO, the released adapter", "LLaVA-1.5-7B", "MM-Vet", 33.3,
              "a user of the released code", "its authors report 36.8"),
    *(Published(what, "LLaVA-1.5-7B", benchmark, value, "the mDPO paper", note)
      for benchmark, values, note in (
          ("Object HalBench, responses with a wrong object", (54.7, 49.0, 35.7), MDPO),
          ("AMBER Hal", (34.7, 34.5, 24.5), f"{MDPO}; its price is cover"))
      for what, value in zip(("untuned", "DPO", "mDPO"), values, strict=True)),
    *(Published("SeVa", f"LLaVA-1.5-7B, noise step {step}", benchmark, value, "the SeVa paper",
                f"{JUDGED}; label-free pairs, 16 k")
      for step, values in ((500, (70.7, 35.5)), (800, (72.2, 37.2)))
      for benchmark, value in zip(("LLaVA-Bench (in the Wild)", "MM-Vet"), values, strict=True)),
)


def rows(benchmark: str = "") -> list[dict[str, Any]]:
    """[{what, model, benchmark, value, source, note}], of one benchmark by the start of its name or
    of all."""
    return [asdict(n) for n in NUMBERS if n.benchmark.startswith(benchmark)]
