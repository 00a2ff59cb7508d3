"""What the pairs of a finished notebook 2 allow to say, as tables for people.

Everything here is read from the stage's metrics; nothing is computed anew.
"""

from typing import Any

from bpo.pairs import selection
from bpo.params import SOURCES
from bpo.study import text as texts

CHECKS = {"truth_right": "share in truth right",
          "near_duplicates": "share nearly equal to the chosen answer",
          "length_gap": "words more than the chosen answer",
          "sentences_gap": "sentences more",
          "characters_gap": "characters a word more",
          "commas_gap": "commas a word more",
          "type_token_gap": "type-token ratio (different words a word) more"}
SIDES = {"candidates": "as made", "kept": "as kept"}

Found = dict[str, Any]
Table = list[dict[str, Any]]


def sources(found: Found) -> list[str]:
    """The sources that candidates came from, in the kit's order."""
    return [s for s in SOURCES if s in found]


def kept(found: Found) -> Table:
    """One row a source and category: how many annotated rows, and how many rejected answers."""
    return [{"source": source, "category": category, "rows": n["rows"], "kept": n["kept"],
             "kept a row": f"{n['kept'] / n['rows']:.2f}"}
            for source in sources(found)
            for category, n in found[source]["by_category"].items()]


def dropped(found: Found) -> Table:
    """One row a reason: candidates that were dropped, rows that could not be used."""
    out = [{"what": f"{s} candidate", "reason": reason, "how many": n} for s in sources(found)
           for reason, n in found[s]["dropped"].items()]
    return out + [{"what": "row of the data", "reason": reason, "how many": n}
                  for reason, n in found["rows_skipped"].items()]


def checks(found: Found) -> Table:
    """One row a measure, two columns a source: the candidates as made, and those kept."""
    return [{"measure": label} | {f"{s}, {words}": _text(found[s].get(name, {}).get(side))
                                  for s in sources(found) for side, words in SIDES.items()}
            for name, label in CHECKS.items()]


def agreement(found: Found) -> str:
    """How often sources gave the same answer; empty where there is only one."""
    if len(sources(found)) < 2:
        return ""
    return (f" Two sources gave the same answer in {found['sources_agree']:.0%} of the positives "
            "that have answers of several.")


def shortcuts(found: Found) -> Table:
    """One row a source and category: how well a text-only classifier tells chosen from rejected."""
    out = []
    for source in sources(found):
        for side, words in SIDES.items():
            whole = (found["shortcut"].get(source) or {}).get(side)
            parts = {"all": whole, **((whole or {}).get("by_category") or {})}
            out += [{"source": source, "answers": words, "category": category,
                     "pairs": part["pairs"] if part else "–",
                     "accuracy from the text": _text(part and part["text"]),
                     "from its length alone": _text(part and part["length"])}
                    for category, part in parts.items()]
    return out


def displacement(found: Found) -> Table:
    """One row a source: CHES of the kept pairs; empty where candidates were not scored."""
    out = []
    for source in sources(found):
        ches = found[source].get("displacement", {}).get("kept")
        if ches:
            out.append({"source": source, "mean CHES": _text(ches["mean"]),
                        "share above 0": _text(ches["above_zero"]),
                        "95th percentile": f"{ches['percentile_95']:.2f}"})
    return out


def scores() -> Table:
    """The scores that `select` may weigh, and what each means."""
    return [{"score": name, "meaning": meaning} for name, meaning in selection.SCORES.items()]


def _text(e: dict[str, Any] | None) -> str:
    if e is None or e["value"] is None:
        return "not known"
    return texts.estimate(e["value"], e["low"], e["high"])
