"""What the tests share: a small random checkpoint, a text model and a data set about coloured
discs, built once a session in plain Hugging Face and LLaVA layouts, without `bpo.tiny`.
"""

import atexit
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_CACHE"] = tempfile.mkdtemp(prefix="hub-")  # never the user's own
atexit.register(shutil.rmtree, os.environ["HF_HUB_CACHE"], ignore_errors=True)
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

if "BPO_TORCHVISION" in os.environ:  # `make families`: before transformers looks for it
    sys.path.append(os.environ["BPO_TORCHVISION"])
    from helpers import torchvision_operators  # noqa: F401

import pytest
import torch
from filelock import FileLock
from helpers import warm
from helpers.data import COLOURS, THINGS, conversation, picture
from helpers.models import PATCH, SIDE, TEMPLATE, TEXT_TEMPLATE, save, small_tokenizer, text_sizes
from helpers.study import environment, run_little
from peft import get_peft_model
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from bpo.models import checkpoint as checkpoints
from bpo.study.seeds import torch_generator

gc.freeze()  # what the libraries hold: a collection took a quarter of a second for it
pytest_plugins = ("helpers.server",)  # its fixtures
# Fixtures that make or load a model.
LOADED = {"little_study", "model_folder", "text_folder"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each test's ring, and their order.

    Rings: `slow` by its own mark, `study` where it loads a model or reads the little study, `fast`
    otherwise. Files with slow tests come first, so that processes which share the files end at one
    time; while the first file that needs the little study makes it, the others do not wait for it.
    """
    for item in items:
        if not item.get_closest_marker("slow"):
            loads = item.get_closest_marker("study") or not LOADED.isdisjoint(item.fixturenames)
            item.add_marker("study" if loads else "fast")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    needing = slow & {item.path for item in items if "little_study" in item.fixturenames}
    first = min(needing, default=None)
    items.sort(key=lambda item: (item.path not in slow, item.path != first, item.path in needing))


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, with nothing that it would ask the network for by itself."""
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")  # those of the Makefile
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("Chromium is not installed")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=[
            "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync"])
        yield started
        started.close()


@pytest.fixture(scope="session")
def little_study(tmp_path_factory) -> Path:
    """The little study, run once for all processes that run tests: copy it, do not change it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    root = root / "shared"
    root.mkdir(exist_ok=True)
    with FileLock(root / ".lock"):
        if not (root / "done").is_file():
            done = subprocess.run(run_little("little"), env=environment(root), cwd=root, text=True,
                                  capture_output=True)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "index.html" in done.stdout
            (root / "done").touch()
    return root / "little"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A random LLaVA whose answers depend on its image and its question."""
    tokenizer = small_tokenizer()
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer=tokenizer, patch_size=PATCH, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", chat_template=TEMPLATE, image_token="<image>")
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                              num_attention_heads=2, image_size=SIDE, patch_size=PATCH,
                              projection_dim=32, initializer_range=0.2)
    config = LlavaConfig(
        vision_config=vision, text_config=text_sizes(tokenizer), vision_feature_layer=-1,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default", image_seq_length=(SIDE // PATCH) ** 2,
        tie_word_embeddings=False, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(11)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # random projections are weak: let the picture be heard
        for weight in model.model.multi_modal_projector.parameters():
            weight.normal_(0, 0.5)
    return save(model, processor, tmp_path_factory.mktemp("llava") / "model")


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """The folder of a family's random checkpoint, by its name, written when first asked for."""
    from helpers.families import TIMM, TORCHVISION, WRITERS

    written = {}

    def folder(family: str) -> Path:
        for package, needing in (("torchvision", TORCHVISION | TIMM), ("timm", TIMM)):
            if family in needing and importlib.util.find_spec(package) is None:
                pytest.skip(f"it needs {package}: `make families` installs it for the tests and "
                            "runs them")
        if family not in written:
            written[family] = tmp_path_factory.mktemp(family)
            torch.manual_seed(3)
            WRITERS[family](written[family])
        return written[family]

    return folder


@pytest.fixture(scope="session")
def seven_billion(tmp_path_factory) -> Path:
    """LLaVA-1.5-7B's config.json alone, no weights."""
    folder = tmp_path_factory.mktemp("config")
    LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, image_size=336,
                                       num_hidden_layers=24, num_attention_heads=16, patch_size=14),
        text_config=LlamaConfig(vocab_size=32064, hidden_size=4096, intermediate_size=11008,
                                num_hidden_layers=32, num_attention_heads=32),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> Path:
    """A random Llama with the same tokenizer, whose chat template takes plain strings."""
    tokenizer = small_tokenizer()
    tokenizer.chat_template = TEXT_TEMPLATE
    torch.manual_seed(12)
    return save(LlamaForCausalLM(text_sizes(tokenizer)), tokenizer,
                tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="session")
def checkpoint(model_folder) -> checkpoints.Checkpoint:
    """The random LLaVA, loaded. Tests that change it load their own."""
    return checkpoints.load(model_folder)


@pytest.fixture(scope="session")
def text_checkpoint(text_folder) -> checkpoints.Checkpoint:
    return checkpoints.load_text_model(text_folder)


@pytest.fixture(scope="session")
def adapters(model_folder, tmp_path_factory):
    """Three random adapters, as notebook 3 lays them: sft does nothing, the others differ."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)  # PEFT draws the other half of each adapter
    for method, size in (("sft", 0.0), ("bpo", 0.4), ("bpo_weaken", 0.4)):
        model = checkpoints.load(model_folder).model
        config = checkpoints.adapter_config(model, rank=4, alpha=8, dropout=0)
        tuned = get_peft_model(model, config)
        draw = torch_generator(0, method)
        with torch.no_grad():
            for name, weight in tuned.named_parameters():
                if "lora_B" in name:
                    weight.copy_(size * torch.randn(weight.shape, generator=draw))
        tuned.save_pretrained(folder / method / "adapter")
    return folder


@pytest.fixture(scope="session")
def data_file(tmp_path_factory) -> Path:
    """rows.json, truth.json and images/: four images with a caption, a colour and a presence row
    each. The truth holds the layout that records, probe, pairs and held_out read."""
    folder = tmp_path_factory.mktemp("data") / "rows"
    (folder / "images").mkdir(parents=True)
    rows, images, truths = [], {}, {}
    for number, (thing, colour) in enumerate(zip(THINGS, COLOURS, strict=True)):
        # Sizes differ so that nothing can rely on all images having one.
        name = f"images/{number}.png"
        picture(thing, colour, number, (40, 40) if number % 2 else (48, 40)).save(folder / name)
        images[name] = {"objects": [{"name": thing, "colour": colour, "cell": 0}]}
        other = THINGS[(number + 1) % 4]
        prior = list(COLOURS)[(number + 1) % 4]
        for category, question, answer, rival, kind in (
                ("caption", "describe the picture",
                 f"this shows a {'big ' * number}{colour} {thing} on the mat", [], None),
                ("attribute", f"what colour is the {thing} ?", colour, [prior], None),
                ("presence", f"is there a {other} ?", "no", ["yes"], "adversarial")):
            row_id = f"{category}-{number}"
            rows.append(conversation(row_id, name, question, answer))
            truths[row_id] = {"category": category, "true": [answer], "prior": rival,
                              "kind": kind}
    vocabulary = {"objects": {t: [t, "boxes" if t == "box" else f"{t}s"] for t in THINGS},
                  "colours": list(COLOURS)}
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "truth.json").write_text(json.dumps(
        {"vocabulary": vocabulary, "images": images, "rows": truths}))
    return folder / "rows.json"


@pytest.fixture(scope="session")
def untold_file(data_file, tmp_path_factory) -> Path:
    """The same rows without a truth file, with images elsewhere: needs image_folder."""
    file = tmp_path_factory.mktemp("untold") / "rows.json"
    file.write_text(data_file.read_text())
    return file


@pytest.fixture
def outputs(tmp_path, monkeypatch) -> Path:
    """An empty root of outputs for one test."""
    root = tmp_path / "outputs"
    monkeypatch.setenv("BPO_OUTPUTS", str(root))
    return root


@pytest.fixture
def warm_launches(monkeypatch) -> None:
    """Processes that the library starts are forked from a warm one."""
    monkeypatch.setattr(sys, "executable", warm.python())


@pytest.fixture(scope="session")
def prompt_files(tmp_path_factory) -> dict[str, str]:
    """The two prompts of error injection, in words that the tokenizer knows."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "describe.txt").write_text("rewrite this wrong {question} : {answer}\nanswer")
    (folder / "question.txt").write_text("question {question} answer {answer}\nwrong answer")
    return {"describe_prompt": str(folder / "describe.txt"),
            "question_prompt": str(folder / "question.txt")}
