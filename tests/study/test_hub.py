"""Names of the hub in place of folders: from its cache, whole, by commit; or refused with what
fetches them."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import hub as cache
from PIL import Image

from bpo import check, params
from bpo.__main__ import main
from bpo.data import images
from bpo.data import rows as data_rows
from bpo.params import NoiseProbability, Refusal
from bpo.study import hub
from bpo.study import stage as stages


@pytest.fixture(autouse=True)
def fresh_look():
    hub._path.cache_clear()


def at(name: str, **rest) -> NoiseProbability:
    return NoiseProbability(study="s", model=name, **rest)


def test_a_checkpoint_s_name_is_its_folder_in_the_cache(model_folder):
    commit = cache.publish("team/small", model_folder)
    tagged = cache.publish("team/small", model_folder, revision="v1.0")
    for name in ("team/small", "team/small@v1.0", f"team/small@{commit}"):
        folder = at(name).path(name)
        assert folder.name == commit == tagged and (folder / "config.json").is_file()
        assert stages.fingerprint(folder) == f"team/small@{commit}"
        assert stages.fingerprint(folder / "config.json") == f"team/small@{commit}/config.json"


def test_a_folder_of_that_name_comes_first(model_folder, monkeypatch, tmp_path):
    cache.publish("team/both", model_folder)
    (tmp_path / "team" / "both").mkdir(parents=True)
    monkeypatch.setattr(params, "ROOT", tmp_path)
    assert at("team/both").path("team/both") == tmp_path / "team" / "both"


def test_only_what_may_name_a_checkpoint_is_looked_up_as_one(model_folder):
    cache.publish("team/data", model_folder)
    p = at("team/data", data="team/data")
    assert p.path("pictures/train") == params.ROOT / "pictures" / "train"
    assert at("x", data="team/data").path("team/data") == params.ROOT / "team" / "data"


def test_another_commit_makes_a_stage_stale(model_folder, tmp_path):
    cache.publish("team/moves", model_folder)
    before = stages.fingerprint(at("team/moves").path("team/moves"))
    changed = shutil.copytree(model_folder, tmp_path / "changed")
    (changed / "generation_config.json").write_text("{}")
    cache.publish("team/moves", changed)
    hub._path.cache_clear()
    assert stages.fingerprint(at("team/moves").path("team/moves")) != before


@pytest.mark.parametrize("name, sentence", [
    ("team/none", "hf download team/none --include"),
    ("team/none@v2", "hf download team/none --revision v2 --include"),
    ("team/cut", "model.safetensors is missing in the hub's cache; fetch it with: hf download")])
def test_what_is_not_there_is_refused_with_what_fetches_it(name, sentence, model_folder, tmp_path):
    cut = shutil.copytree(model_folder, tmp_path / "cut",
                          ignore=shutil.ignore_patterns("*.safetensors"))
    cache.publish("team/cut", cut)
    with pytest.raises(Refusal, match=sentence.replace("(", ".")):
        at(name).path(name)


def test_a_study_s_check_says_what_is_missing(outputs, capsys):
    assert check.show("llava-1.5-7b", {"model": "team/nowhere"}) == 1
    told = capsys.readouterr().out
    assert "team/nowhere  MISSING: team/nowhere: neither is there such a folder" in told


def test_data_and_their_pictures_come_from_the_cache(tmp_path):
    (tmp_path / "train").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "train" / "1.png")
    (tmp_path / "rows.json").write_text(json.dumps([{"id": "1", "image": "train/1.png",
        "conversations": [{"from": "human", "value": "<image>\nwhat ?"},
                          {"from": "gpt", "value": "red"}]}]))
    commit = cache.publish("team/rows", tmp_path, kind="dataset")
    file = at("x").path("datasets/team/rows/rows.json")
    rows, skipped = data_rows.read_rows(file)
    assert not skipped and images.load(rows[0].image).size == (8, 8)
    assert stages.fingerprint(file) == f"team/rows@{commit}/rows.json"
    with pytest.raises(Refusal, match="hf download team/rows other.json --repo-type dataset"):
        at("x").path("datasets/team/rows/other.json")


def test_a_link_out_of_the_cache_is_no_picture(tmp_path):
    """The cache's links lead to its blobs; one that leads elsewhere is refused as in any folder."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "secret.png").write_bytes(b"x")
    (tmp_path / "rows.json").write_text("[]")
    cache.publish("team/links", tmp_path, kind="dataset")
    root = at("x").path("datasets/team/links/rows.json").parent
    (root / "out.png").symlink_to(tmp_path / "a" / "secret.png")
    assert images.place(root, "out.png") is None
    assert images.place(root, "a/secret.png") is not None


def test_a_study_is_made_with_the_name(model_folder, data_file, tmp_path, monkeypatch):
    monkeypatch.setenv("BPO_PARAMS", str(tmp_path / "params"))
    monkeypatch.setenv("BPO_OUTPUTS", str(tmp_path / "outputs"))
    cache.publish("team/named", model_folder)
    cache.publish("team/rows", data_file.parent, kind="dataset")
    assert main(["new", "mine", "--model", "team/named", "--data",
                 f"datasets/team/rows/{data_file.name}"]) == 0
    read = params.read_study("mine")
    assert read["1_noise_probability"].model == "team/named"
    assert Path(read["2_pair_generation"].image_folder).parent.name == "snapshots"


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's interface as a download uses; `folder` is its one repository."""

    def do_GET(self):
        files = {f.relative_to(self.folder).as_posix(): f for f in self.folder.rglob("*")
                 if f.is_file()}
        content, headers = b"", {}
        if "/tree/" in self.path:
            content = json.dumps([{"type": "file", "path": n, "size": f.stat().st_size,
                                   "oid": "0" * 40} for n, f in files.items()]).encode()
        elif self.path.startswith("/api/"):
            content = json.dumps({"id": "team/online", "sha": "c" * 40, "siblings": [
                {"rfilename": n} for n in files]}).encode()
        elif (name := self.path.split("/resolve/")[-1].partition("/")[2]) in files:
            content = files[name].read_bytes()
            headers = {"ETag": f'"{len(content)}-{name.replace("/", "-")}"',
                       "X-Repo-Commit": "c" * 40}
        self.send_response(200 if content else 404)
        for key, value in ({"Content-Type": "application/json"} | headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


def test_online_a_checkpoint_is_fetched_without_files_that_could_run_code(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "repository")
    for name in ("pytorch_model.bin", "modeling_own.py", "onnx/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"never read")
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), type("One", (Hub,), {"folder": folder}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    program = ("from bpo.params import NoiseProbability\n"
               "print(NoiseProbability(study='s', model='team/online').path('team/online'))")
    done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, env={
        **os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1"})
    server.shutdown()
    assert done.returncode == 0, done.stderr
    got = tmp_path / "cache" / "models--team--online" / "snapshots" / ("c" * 40)
    assert done.stdout.strip().endswith(str(got))
    assert {f.relative_to(got).as_posix() for f in got.rglob("*") if f.is_file()} == {
        f.name for f in model_folder.iterdir()}
