"""JupyterLab on loopback, driven by a browser."""

import itertools
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat

from bpo import params
from bpo.reports.template.executed import WIDGET
from helpers.study import environment

PATIENCE = 400  # seconds for what a busy machine may be slow with
# All cells stay in the page, so that what is below the fold can be looked at.
SETTINGS = {"@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"}}


def edited(source: str, **changes: object) -> str:
    for name, value in changes.items():
        shown = value if isinstance(value, str) and value.startswith("[") else repr(value)
        source = re.sub(rf"^{name} = .*?(?=  #)", f"{name} = {shown}".replace("\\", r"\\"), source,
                        flags=re.M)
    return source


class Lab:
    """A JupyterLab server over a folder of notebooks and a browser that was never elsewhere.

    python: what runs the server and its kernels.
    """

    def __init__(self, folder: Path, outputs: Path, page, *, python: str = sys.executable):
        self.folder, self.outputs, self.page = folder, outputs, page
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.token = secrets.token_hex(16)
        self.requests: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        settings = folder.parent / "settings"
        for name, values in SETTINGS.items():
            (settings / name).parent.mkdir(parents=True, exist_ok=True)
            (settings / name).write_text(json.dumps(values))
        self.log = (folder.parent / "lab.log").open("w")
        self.server = subprocess.Popen(
            [python, "-m", "jupyterlab", "--no-browser", "--allow-root",
             f"--config={params.ROOT / 'bpo' / 'reports' / 'template' / 'lab_config.py'}",
             f"--ServerApp.port={self.port}", "--ServerApp.ip=127.0.0.1",
             f"--IdentityProvider.token={self.token}", f"--ServerApp.root_dir={folder}"],
            env={**environment(outputs), "JUPYTERLAB_SETTINGS_DIR": str(settings),
                 "JUPYTERLAB_WORKSPACES_DIR": str(folder.parent / "workspaces")},
            stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert self.server.poll() is None, (folder.parent / "lab.log").read_text()
            try:
                self.ask("GET", "api/status")
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError("JupyterLab did not start")

    def ask(self, method: str, path: str):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{path}", method=method,
                                         headers={"Authorization": f"token {self.token}"})
        with urllib.request.urlopen(request, timeout=10) as reply:
            return json.loads(reply.read() or "null")

    def open(self, name: str) -> None:
        for session in self.ask("GET", "api/sessions"):  # one kernel at a time
            self.ask("DELETE", f"api/sessions/{session['id']}")
        if name in params.SCHEMAS:  # what an earlier Run All left; others are saved in place
            self.saved(name).unlink(missing_ok=True)
        self.page.goto(f"http://127.0.0.1:{self.port}/lab/tree/{name}.ipynb?token={self.token}"
                       "&reset")
        self.idle()
        # The indicator is idle before there is a kernel, and Run All would ask for one.
        deadline = time.monotonic() + PATIENCE
        while not any(s["kernel"]["connections"] and s["kernel"]["execution_state"] == "idle"
                      for s in self.ask("GET", "api/sessions")):
            assert time.monotonic() < deadline, "no kernel became idle"
            time.sleep(0.2)
        self.page.wait_for_timeout(1500)  # menus know the notebook only a moment after the kernel

    def saved(self, name: str) -> Path:
        """Where a notebook's results are saved."""
        own = self.folder / f"{name}.ipynb"
        return self.outputs / "_lab" / own.name if name in params.SCHEMAS else own

    def idle(self) -> None:
        self.page.wait_for_selector(
            '.jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook-ExecutionIndicator'
            '[data-status="idle"]', timeout=PATIENCE * 1000)

    def menu(self, *names: str) -> None:
        self.page.locator(f'.lm-MenuBar-itemLabel:text-is("{names[0]}")').click()
        for name in names[1:]:
            self.page.locator(f'.lm-Menu-itemLabel:text-is("{name}")').first.click()

    def write_first(self, source: str) -> None:
        """Writes the first code cell of the open notebook anew."""
        cell = self.page.locator(".jp-CodeCell").first
        cell.scroll_into_view_if_needed()
        cell.locator(".cm-content").click()
        self.page.keyboard.press("Control+a")
        self.page.keyboard.insert_text(source)

    def run_all(self, name: str) -> nbformat.NotebookNode:
        """Run All, then the notebook as it was saved once every cell ran or one failed."""
        file = self.saved(name)
        before = [c.execution_count or 0 for c in code_cells(file)] if file.exists() else [0]
        self.menu("Run", "Run All Cells")
        deadline = time.monotonic() + PATIENCE
        for look in itertools.count(1):
            time.sleep(0.5)
            self.idle()
            self.page.keyboard.press("Control+s")
            time.sleep(0.5)
            saved = code_cells(file)
            counts = [c.execution_count or 0 for c in saved]
            ran = [c > max(before) for c in counts]
            if errors(saved) or all(ran):
                return nbformat.read(file, 4)
            if time.monotonic() > deadline:
                break
            if not any(ran) and look % 20 == 0:  # a busy machine may lose a click on the menu
                self.menu("Run", "Run All Cells")
        raise AssertionError(f"{name} did not end: cells ran {counts}")

    def close(self) -> None:
        os.killpg(self.server.pid, signal.SIGTERM)
        self.server.wait(20)
        self.log.close()


def code_cells(file: Path) -> list[nbformat.NotebookNode]:
    return [c for c in nbformat.read(file, 4).cells if c.cell_type == "code"]


def errors(cells: list[nbformat.NotebookNode]) -> list[str]:
    return [f"{o.ename}: {o.evalue}" for c in cells for o in c.outputs if o.output_type == "error"]


def check(saved: nbformat.NotebookNode) -> None:
    """What every saved notebook must be: run to its end, without an error, a bar, a warning or a
    widget."""
    nbformat.validate(saved)
    cells = [c for c in saved.cells if c.cell_type == "code"]
    assert errors(cells) == []
    counts = [c.execution_count for c in cells]
    assert all(counts) and counts == sorted(counts), counts
    outputs = [o for c in cells for o in c.outputs]
    assert [o.text for o in outputs if o.get("name") == "stderr"] == []
    assert not any("<progress" in o.get("data", {}).get("text/html", "") for o in outputs)
    assert not any(WIDGET in o.get("data", {}) for o in outputs), "a dead widget was saved"
    assert "widgets" not in saved.metadata
