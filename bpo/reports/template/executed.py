"""What a page and the index read from an executed notebook, and what they leave out of it."""

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

from bpo.params import ROOT, Parameters
from bpo.reports.template import terms
from bpo.reports.template.filters import anchor, strip_ansi
from bpo.study import stage as stages
from bpo.study.files import file_hash
from bpo.study.text import duration

if TYPE_CHECKING:
    import nbformat

WIDGET = "application/vnd.jupyter.widget-view+json"


def drop_progress(notebook: "nbformat.NotebookNode") -> None:
    """Take text bars, widgets and their state out of the notebook. Where a widget brings a still
    figure, that stays."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_progress(output)]
            for output in cell.outputs:
                output.get("data", {}).pop(WIDGET, None)


def drop_results(notebook: "nbformat.NotebookNode") -> None:
    """Leave what people write, as it was before the notebook ran: cells, tags and language."""
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None


def _is_progress(output: "nbformat.NotebookNode") -> bool:
    if output.output_type == "stream":
        return re.search(r"\r(?!\n)", output.text) is not None
    data = output.get("data", {})
    # transformers' trainer shows its bar as an HTML element
    return (WIDGET in data and "text/html" not in data) or "<progress" in data.get("text/html", "")


def failure(notebook: "nbformat.NotebookNode") -> dict[str, Any] | None:
    """The first error: {"cell": its execution count, "message"}; None where all cells ran."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for place, cell in enumerate(code, start=1):
        for output in cell.outputs:
            if output.output_type == "error":
                return {"cell": cell.execution_count or place,
                        "message": strip_ansi(output.evalue or output.ename)}
    return None


def last_sentence(notebook: "nbformat.NotebookNode") -> str:
    """The plain text of the last thing said with `report.say`, unfolded; "" if nothing was."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    said = [output.data["text/plain"] for output in outputs
            if re.search('^<div class="bpo mathjax_ignore say"',
                         output.get("data", {}).get("text/html", ""), re.M)]
    return said[-1] if said else ""


def title(notebook: "nbformat.NotebookNode") -> str:
    """The first heading as plain text; "" if there is none."""
    for cell in notebook.cells:
        heading = cell.cell_type == "markdown" and re.search(r"^#+ +(.+)$", cell.source, re.M)
        if heading:
            return re.sub(r"[*`$]", "", heading[1]).strip()
    return ""


def contents(notebook: "nbformat.NotebookNode") -> dict[str, str]:
    """id -> text of the second-level headings, for the page's contents."""
    headings = [re.sub(r"[*`]", "", found) for cell in notebook.cells
                if cell.cell_type == "markdown"
                for found in re.findall(r"^## +(.+)$", cell.source, re.M)]
    return {anchor(heading): heading for heading in headings}


def terms_of(notebook: "nbformat.NotebookNode") -> dict[str, str]:
    """The terms that its prose and its results use, with their meanings."""
    shown = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    shown += [output.get("data", {}).get("text/plain", "")
              for cell in notebook.cells for output in cell.get("outputs", [])]
    return terms.used("\n".join(shown))


def when(notebook: "nbformat.NotebookNode") -> str:
    """"executed 2026-01-31 10:22 UTC in 34 s", from what papermill noted; "" if it did not."""
    run = notebook.metadata.get("papermill", {})
    if not (run.get("start_time") and run.get("duration")):
        return ""
    return f"executed {run['start_time'][:16].replace('T', ' ')} UTC in {duration(run['duration'])}"


def stamp(notebook: "nbformat.NotebookNode", p: Parameters) -> str:
    """A hash of what an executed notebook was made from and of what it holds: the kit's code, the
    notebook in the project, the parameters, the stage's manifest, the executed cells. "" for a
    notebook that computes no stage."""
    manifest = stages.stage_folder(p.study, p.notebook) / stages.MANIFEST
    if not manifest.is_file():
        return ""
    code = [f for f in sorted((ROOT / "bpo").rglob("*")) if f.is_file() and f.suffix != ".pyc"]
    files = [*code, ROOT / "notebooks" / f"{p.notebook}.ipynb", manifest]
    parts = [*map(file_hash, files), p.model_dump_json(),
             json.dumps(notebook.cells, sort_keys=True)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
