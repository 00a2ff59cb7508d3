"""Answers of a real vLLM server on this machine's CPU (`make vllm` makes its environment, and
`make test ARGS='-m vllm'` runs this ring alone)."""

import json
import os
import signal
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from helpers.qwen import write_qwen
from helpers.server import free_port
from PIL import Image, ImageDraw

from bpo.pairs import stage as pairs
from bpo.params import ROOT, PairGeneration, Refusal
from bpo.study.files import read_lines

PYTHON = Path(os.environ.get("BPO_VLLM", ROOT / ".vllm" / "bin" / "python"))
pytestmark = [pytest.mark.vllm, pytest.mark.skipif(
    not PYTHON.is_file(), reason="there is no vLLM here: `make vllm` installs it")]
COLOURS = ("red", "blue", "green", "yellow", "black")
FILES = ("weakened-noisy-800-0.jsonl", "clean.jsonl")


class Server:
    """A vLLM server of a checkpoint; `stop` kills it with all of its processes."""

    def __init__(self, model, log, *arguments):
        self.url, self.log = f"http://127.0.0.1:{free_port()}/v1", log
        self.process = subprocess.Popen(
            [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host",
             "127.0.0.1", "--port", self.url.split(":")[2].removesuffix("/v1"), "--dtype",
             "float32", "--enable-mm-embeds", "--limit-mm-per-prompt", '{"image":0}',
             "--generation-config", "vllm", "--enforce-eager", "--max-model-len", "512",
             *arguments],
            stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True,
            env={n: v for n, v in os.environ.items() if n != "PYTHONPATH"} | {
                "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"})
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.url}/models", timeout=5).read()
                return
            except OSError:
                assert self.process.poll() is None, log.read_text()[-3000:]
                time.sleep(1)
        raise TimeoutError(log.read_text()[-3000:])

    def stop(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A hundred questions about a hundred pictures of a disc."""
    folder = tmp_path_factory.mktemp("hundred")
    lines = []
    for n in range(100):
        picture = Image.new("RGB", (56, 56), COLOURS[n // 5 % 5])
        ImageDraw.Draw(picture).ellipse((n % 30, 5, n % 30 + 25, 30), fill=COLOURS[n % 5])
        picture.save(folder / f"{n}.png")
        lines.append({"id": str(n), "image": f"{n}.png", "conversations": [
            {"from": "human", "value": "<image>\nwhat is it ?" if n % 2 else "<image>\nwhat ?"},
            {"from": "gpt", "value": "a disc"}]})
    (folder / "rows.json").write_text(json.dumps(lines))
    return folder / "rows.json"


@pytest.fixture(scope="module", params=["llava", "qwen2.5-vl"])
def model(request, tmp_path_factory):
    if request.param == "llava":
        return request.getfixturevalue("model_folder")
    folder = tmp_path_factory.mktemp("qwen") / "model"
    folder.mkdir()
    write_qwen(folder)
    return folder


def parameters(model, rows, study, **rest):
    return PairGeneration(
        study=study, model=str(model), data=str(rows), text_model="", sources=["weakened"],
        weaken_temperature=0.0, max_new_tokens=12, score_candidates=False, clean_answers=True,
        endpoint_retries=0, batch_tokens=2000, **rest)


@pytest.fixture(scope="module")
def alone(model, rows, tmp_path_factory):
    """The answers of transformers, greedy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BPO_OUTPUTS", str(tmp_path_factory.mktemp("alone")))
        return pairs.run(parameters(model, rows, "alone")).folder


def same(folder, alone):
    """How many of the 200 answers are those of transformers."""
    return sum(a == b for name in FILES for a, b in zip(
        read_lines(folder / name), read_lines(alone / name), strict=True))


def test_greedy_answers_are_those_of_transformers_and_survive_the_server_s_death(
        model, rows, alone, outputs, tmp_path):
    server = Server(model, tmp_path / "log")
    p = parameters(model, rows, "served", decoder=server.url)
    asked = outputs / "served" / "2_pair_generation" / "asked"

    def kill_midway():
        while sum(f.read_bytes().count(b"\n") for f in asked.glob("*")) < 40:
            time.sleep(0.05)
        server.stop()

    killer = threading.Thread(target=kill_midway, daemon=True)
    killer.start()
    with pytest.raises(Refusal, match="what was written so far is kept"):
        pairs.run(p)
    killer.join()
    kept = {line["key"]: line for f in asked.glob("weakened*") for line in read_lines(f)}
    assert len(kept) >= 40
    server = Server(model, tmp_path / "log")
    try:
        folder = pairs.run(p.model_copy(update={"decoder": server.url})).folder
        metrics = urllib.request.urlopen(server.url.removesuffix("/v1") + "/metrics").read().decode()
    finally:
        server.stop()
    assert same(folder, alone) == 200
    counted = sum(float(line.rsplit(" ", 1)[1]) for line in metrics.splitlines()
                  if line.startswith("vllm:request_success_total"))
    assert counted == 200 - len(kept)


def test_two_ranks_give_the_same_answers(model, rows, alone, outputs, tmp_path):
    server = Server(model, tmp_path / "log", "--data-parallel-size", "2")
    try:
        folder = pairs.run(parameters(model, rows, "ranks", decoder=server.url)).folder
    finally:
        server.stop()
    assert same(folder, alone) == 200
