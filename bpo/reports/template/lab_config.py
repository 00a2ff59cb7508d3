"""What `make lab` tells JupyterLab: saved notebooks hold no bars and no widgets that are dead when
they are opened again, nothing is asked of the network, and what kernels say is encrypted."""

from pathlib import Path
from typing import Any

from bpo.reports.template import executed


def tidy(model: dict[str, Any], **_: Any) -> None:
    """Before a save: bars and widget views leave the file; the open notebook keeps them."""
    if model["type"] == "notebook" and model.get("content"):
        import nbformat

        notebook = nbformat.from_dict(model["content"])
        executed.drop_progress(notebook)
        model["content"] = notebook


c = get_config()  # noqa: F821  (jupyter puts it there)
c.ContentsManager.pre_save_hook = tidy
c.LabApp.news_url = None
# Where overrides.json says that the question about news need not be asked.
c.LabApp.app_settings_dir = str(Path(__file__).resolve().parent / "lab_settings")
c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"
c.LabApp.extension_manager = "readonly"
c.KernelManager.transport_encryption = "auto"
