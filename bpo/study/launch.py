"""A stage computed by the processes that `accelerate launch` starts, on behalf of a notebook."""

import os
import re
import shlex
import subprocess
import sys

import yaml

from bpo import params
from bpo.params import Parameters, Refusal
from bpo.study import processes
from bpo.study import stage as stages
from bpo.study.files import write_whole

SHOWN_LINES = 15


def start(p: Parameters) -> None:
    """Has the stage of these parameters computed as `p.launch` says, if it says anything; the
    caller then finds it up to date. What the processes print goes to N_name.launch.log.

    p.launch: arguments of `accelerate launch`; files in them are named from the project's root.
    Raises Refusal with the end of the log when the processes fail.
    """
    if not p.launch or processes.world() > 1 or stages.READ_ONLY.get():
        return
    folder = stages.stage_folder(p.study, p.notebook)
    folder.parent.mkdir(parents=True, exist_ok=True)
    given, log = (folder.with_name(f"{folder.name}.launch.{end}") for end in ("yaml", "log"))
    write_whole(given, yaml.safe_dump(p.model_dump(mode="json") | {"launch": ""}))
    print(f"{p.notebook} is with accelerate launch {p.launch}: {log.name}")
    with log.open("wb") as out:
        code = subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", *shlex.split(p.launch),
             "-m", "bpo", "stage", p.study, p.notebook.split("_")[0], "--parameters", str(given)],
            stdout=out, stderr=subprocess.STDOUT, cwd=params.ROOT,
            env=os.environ | {"BPO_OUTPUTS": str(params.outputs_root())}).returncode
    if code:
        # What the launcher adds, once a process has failed, says nothing of why.
        printed = re.split(r"^[WE]\d{4} ", log.read_text(encoding="utf-8", errors="replace"),
                        maxsplit=1, flags=re.MULTILINE)[0]
        raise Refusal("\n".join([f"launch: the processes ended with exit code {code}; what they "
                                 f"printed is in {log}, its end:",
                                 *printed.splitlines()[-SHOWN_LINES:]]))
    given.unlink()
