"""Files of a model's answers, as tools of evaluation write them: which field holds the answers, and
not the truth that may stand beside them. What the answers are to is `evaluation.score`'s matter.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bpo.data import files
from bpo.params import Refusal
from bpo.study.text import normalised

# Fields of a model's answers in files that may hold the truth beside them; and those that hold
# answers in files without any of these, and references or questions in the others.
ANSWERS = tuple("prediction predictions pred predict model_answer model_response model_output "
                "model_prediction pred_answer pred_text predicted_answer prediction_text generated "
                "generated_text generated_answer generated_caption response responses output "
                "outputs completion generation hypothesis reply filtered_resps resps".split())
TEXTS = ("caption", "answer", "text")


def read(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Where each entry of a file stands, and the entry, with lmms-eval's "doc" spread out."""
    if not file.is_file():
        raise Refusal(f"{file}: there is no such file of answers")
    if file.suffix.lower() in (".xlsx", ".xls", ".ods"):
        raise Refusal(f"{file}: is a spreadsheet; save it as CSV or TSV")
    rows = []
    for row, entry in files.read(file, file.parent):
        if not isinstance(entry, dict):
            raise Refusal(f"{file.parent / row}: is no JSON object or no whole row of a table")
        inside = entry.get("doc") if isinstance(entry.get("doc"), dict) else {}
        rows.append((str(file.parent / row), {"_".join(name.lower().split()): value
                                              for name, value in {**inside, **entry}.items()}))
    return rows


def field(file: Path, rows: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> str:
    """The field of a file that holds the model's answers, never the labels or references beside.

    Raises Refusal where there is none, or where there are several that differ.
    """
    filled = [n for n in fields if any(entry.get(n) is not None for entry in rows)]
    found = next(filter(None, ([n for n in names if n in of] for of in (filled, fields)
                               for names in (ANSWERS, TEXTS))), [])
    asked = {str(entry["text"]) for entry in rows if entry.get("text") is not None}
    if len(found) > 1 and "text" in found and (len(asked) == 1 < len(rows)
                                               or all("?" in t for t in asked)):
        found.remove("text")  # the question
    if not found:
        raise Refusal(f"{file}: its fields are {', '.join(fields) or 'none'}; the answers must be "
                      f"in one of {', '.join((*TEXTS, *ANSWERS[:6]))} and the like; give the "
                      "field's name by --field")
    if any(len({normalised(str(_single(entry[n]))) for n in found if entry.get(n) is not None}) > 1
           for entry in rows):
        seen = " or ".join(f"{n} ({str(_single(rows[0].get(n)))[:30]!r} first)" for n in found)
        raise Refusal(f"{file}: the model's answers may be in {seen}; say which by --field NAME")
    return found[0]


def _single(value: Any) -> Any:
    """What lists of one hold."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value


def text(entry: Mapping[str, Any], name: str, where: str, *, yes_no: bool = False) -> str:
    """An entry's answer; "" for a missing one. yes_no: true and false are answers too."""
    if name not in entry:
        raise Refusal(f"{where}: has no {name}, which holds the answers of the other rows")
    value = _single(entry[name])
    if value is None or isinstance(value, float) and math.isnan(value):
        return ""
    if not isinstance(value, str) and not (yes_no and isinstance(value, bool)):
        raise Refusal(f"{where}: the answer {name} must be a text, is {str(value)[:40]}")
    return str(value)
