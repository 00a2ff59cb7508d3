"""What `make lab` tells JupyterLab: the kit's notebooks are saved without results, which go to a
copy below outputs/, so that git sees edits alone; nothing is asked of the network, and what kernels
say is encrypted."""

import warnings
from pathlib import Path
from typing import Any

from bpo.params import SCHEMAS, outputs_root
from bpo.reports.template import executed


def tidy(model: dict[str, Any], path: str, **_: Any) -> None:
    """Before a save: bars and widget views leave the file, and of the kit's notebooks all results
    go to outputs/_lab/ instead. The open notebook keeps everything."""
    if model["type"] == "notebook" and model.get("content"):
        import nbformat

        notebook = nbformat.from_dict(model["content"])
        executed.drop_progress(notebook)
        if Path(path).stem in SCHEMAS:
            copy = outputs_root() / "_lab" / Path(path).name  # no study can have that name
            copy.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(notebook, copy)
            executed.drop_results(notebook)
        model["content"] = notebook


# JupyterLab reads this file twice, and would warn of it.
warnings.filterwarnings("ignore", "Overriding existing pre_save_hook")
c = get_config()  # noqa: F821  (jupyter puts it there)
c.ContentsManager.pre_save_hook = tidy
c.LabApp.news_url = None
# Where overrides.json says that the question about news need not be asked.
c.LabApp.app_settings_dir = str(Path(__file__).resolve().parent / "lab_settings")
c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"
c.LabApp.extension_manager = "readonly"
c.KernelManager.transport_encryption = "auto"
