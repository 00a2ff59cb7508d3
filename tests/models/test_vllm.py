"""Answers of a real vLLM server on this machine's CPU (`make vllm` makes its environment, and
`make test ARGS='-m vllm'` runs this ring alone)."""

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers.qwen import write_qwen
from helpers.server import free_port
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig, LlavaConfig, LlavaForConditionalGeneration

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
                "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
                "VLLM_SERVER_DEV_MODE": "1"})
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.url}/models", timeout=5).read()
                return
            except OSError:
                assert self.alive(), log.read_text()[-3000:]
                time.sleep(1)
        raise TimeoutError(log.read_text()[-3000:])

    def alive(self):
        return self.process.poll() is None

    def stop(self):
        with suppress(ProcessLookupError):
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


def write_llava(folder, like):
    """The tests' LLaVA with a head of 32, since vLLM knows no shorter one on a CPU."""
    shutil.copytree(like, folder, dirs_exist_ok=True)
    config = LlavaConfig.from_pretrained(like)
    config.text_config.hidden_size, config.text_config.head_dim = 64, 32
    torch.manual_seed(11)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for weight in model.model.multi_modal_projector.parameters():
            weight.normal_(0, 0.5)
    model.generation_config = GenerationConfig(eos_token_id=[2, 3], pad_token_id=0)
    model.save_pretrained(folder)


def end_often(folder, end, word):
    """A checkpoint that ends its answer where it would have said a word, with an end that the
    generation config names and the tokenizer does not."""
    file, words = folder / "model.safetensors", AutoTokenizer.from_pretrained(folder)
    weights, (end, word) = load_file(file), words.convert_tokens_to_ids([end, word])
    named = GenerationConfig.from_pretrained(folder).eos_token_id
    assert end in named and words.eos_token_id in named and words.eos_token_id != end
    head = next(w for name, w in weights.items() if name.endswith("lm_head.weight"))
    head[end] = 1.01 * head[word]
    save_file(weights, file, metadata={"format": "pt"})


@pytest.fixture(scope="module", params=["llava", "qwen2.5-vl"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "llava":
        write_llava(folder, request.getfixturevalue("model_folder"))
        end_often(folder, "<unk>", "green")
    else:
        write_qwen(folder, heads=2)
        end_often(folder, "<|endoftext|>", "R")
    return folder


def parameters(model, rows, study, **rest):
    return PairGeneration(
        study=study, model=str(model), data=str(rows), text_model="", sources=["weakened"],
        weaken_temperature=0.0, max_new_tokens=12, clean_answers=True, endpoint_retries=0,
        batch_tokens=2000, **rest)


@pytest.fixture(scope="module")
def alone(model, rows, tmp_path_factory):
    """The answers of transformers, greedy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BPO_OUTPUTS", str(tmp_path_factory.mktemp("alone")))
        return pairs.run(parameters(model, rows, "alone")).folder


def same(folder, alone):
    """How many of the 200 answers are those of transformers; and log-probs of the same text have to
    be."""
    def text(line):
        # Of bytes that make no character transformers writes U+FFFD, and vLLM nothing.
        return [t.replace("\ufffd", "").strip() for t in line.get("texts", [line.get("text")])]

    ours, theirs = ({name: list(read_lines(place / name)) for name in (*FILES, "scores.jsonl")}
                    for place in (folder, alone))
    weighed = [(a, b) for said, other_said, one, other in zip(
                   ours[FILES[0]], theirs[FILES[0]], ours["scores.jsonl"], theirs["scores.jsonl"],
                   strict=True) if said == other_said
               for a, b in zip(one["scores"], other["scores"], strict=True) if a or b]
    assert len(weighed) > 40
    for a, b in weighed:
        assert a == pytest.approx({n: v for n, v in b.items() if n != "ches"}, abs=1e-4)
    return sum(text(a) == text(b) for name in FILES
               for a, b in zip(ours[name], theirs[name], strict=True))


def test_greedy_answers_are_those_of_transformers_and_survive_the_server_s_death(
        model, rows, alone, outputs, tmp_path):
    server = Server(model, tmp_path / "log")
    p = parameters(model, rows, "served", decoder=server.url)
    asked = outputs / "served" / "2_pair_generation" / "asked"

    def kill_midway():
        while server.alive() and sum(f.read_bytes().count(b"\n") for f in asked.glob("*")) < 40:
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
        done = pairs.run(p.model_copy(update={"decoder": server.url}))
        metrics = urllib.request.urlopen(f"{server.url[:-3]}/metrics").read().decode()
    finally:
        server.stop()
    assert same(done.folder, alone) == 200
    assert done.metrics["decoder"] | {
        "engine": "vllm 0.32.0", "dtype": "torch.float32", "tensor_parallel_size": "1",
        "generation_config": "vllm", "features": "float32"} == done.metrics["decoder"]
    ended = {re.search('finished_reason="(\\w+)"', line)[1]: float(line.rsplit(" ", 1)[1])
             for line in metrics.splitlines() if line.startswith("vllm:request_success_total")}
    assert ended["stop"] > 10 and ended["length"] > 10
    weighed = sum(2 * (1 + sum(map(bool, line["scores"])))
                  for line in read_lines(done.folder / "scores.jsonl"))
    assert sum(ended.values()) == 200 - len(kept) + weighed


def test_two_ranks_give_the_same_answers(model, rows, alone, outputs, tmp_path):
    server = Server(model, tmp_path / "log", "--data-parallel-size", "2")
    try:
        folder = pairs.run(parameters(model, rows, "ranks", decoder=server.url)).folder
    finally:
        server.stop()
    assert same(folder, alone) == 200
