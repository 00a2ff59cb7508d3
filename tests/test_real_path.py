"""The studies of real models, run whole and as they stand: a copy of the project, the published
data layouts below its data/, and random checkpoints in the layouts of the real ones."""

import base64
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from helpers import hub, warm
from helpers.qwen import LLAVAR, SHAREGPT4V, trained_tokenizer, write_qwen
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from bpo import params
from bpo.evaluation import benchmarks
from bpo.models import checkpoint as checkpoints
from bpo.models import encoding, generate, logprobs, noise
from bpo.models.generate import Request
from bpo.models.weakening import View
from bpo.training import trainers

# The turns of the public LLaVA-1.5 layout: no end token behind an answer, a space instead.
LLAVA_CHAT = ("{% for m in messages %}{{ m['role'].upper() + ': ' }}"
              "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
              "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }} {% endfor %}"
              "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")
CAPTIONS = [("flower", 2, "The image shows a flower with pink petals before dark green leaves."),
            ("china", 3, "The image shows a pavilion with a curved roof among trees.")]
FOUND = 10  # answers whose image is there


def write_llava(folder):
    """A LLaVA-1.5 of two thin layers with the image side of the real one: 576 image tokens."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained_tokenizer(["<unk>", "<s>", "</s>", "<pad>", "<image>"]),
        unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"})
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 336},
                              crop_size={"height": 336, "width": 336}),
        tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=LLAVA_CHAT, image_token="<image>",
    ).save_pretrained(folder)
    torch.manual_seed(0)
    LlavaForConditionalGeneration(LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                       num_attention_heads=2, image_size=336, patch_size=14),
        text_config=LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128,
                                num_hidden_layers=2, num_attention_heads=2,
                                eos_token_id=tokenizer.eos_token_id,
                                pad_token_id=tokenizer.pad_token_id,
                                bos_token_id=tokenizer.bos_token_id),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2, vision_feature_select_strategy="default")).save_pretrained(folder)


def photograph(name: str) -> Image.Image:
    from skimage import data as photographs
    from sklearn.datasets import load_sample_image

    pixels = (load_sample_image(f"{name}.jpg") if name in ("china", "flower")
              else getattr(photographs, name)())
    picture = Image.fromarray(np.asarray(pixels))
    picture.thumbnail((200, 200))
    return picture.convert("RGB")


def write_benchmarks(root):
    """The seven benchmarks' official files, about two photographs."""
    shown = {42: "coffee", 139: "chelsea"}
    names = {k: f"COCO_val2014_{k:012d}.jpg" for k in shown}

    def file(path, content):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        lines = isinstance(content, tuple)
        (root / path).write_text("\n".join(map(json.dumps, content)) if lines
                                 else json.dumps(content))

    for k, picture in shown.items():
        for path in (f"chair/val2014/{names[k]}", f"pope/val2014/{names[k]}",
                     f"amber/image/AMBER_{k}.jpg", f"mm-vet/images/v1_{k}.jpg",
                     f"llava-bench/images/{k:03d}.jpg", f"mmhal/images/{k}_o.jpg"):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            photograph(picture).save(root / path)
    for name in ("chair", "object-halbench"):
        file(f"{name}/annotations/instances_val2014.json", {
            "images": [{"id": k, "file_name": n} for k, n in names.items()],
            "annotations": [{"id": 1, "image_id": 42, "category_id": 47},
                            {"id": 2, "image_id": 139, "category_id": 17}],
            "categories": [{"id": 47, "name": "cup"}, {"id": 17, "name": "cat"}]})
        file(f"{name}/annotations/captions_val2014.json", {"annotations": [
            {"id": 3, "image_id": 42, "caption": "A cup of coffee and a spoon on a table."},
            {"id": 4, "image_id": 139, "caption": "A cat looks up."}]})
    file("object-halbench/obj_halbench_300_with_image.jsonl", tuple(
        {"image_id": k, "question": "Describe the image in detail.", "image": base64.b64encode(
            (root / f"chair/val2014/{n}").read_bytes()).decode()} for k, n in names.items()))
    for kind in ("random", "popular", "adversarial"):
        file(f"pope/coco_pope_{kind}.json", tuple(
            {"question_id": q, "image": names[k], "text": f"Is there a {thing} in the image?",
             "label": "yes" if (k, thing) in ((42, "cup"), (139, "cat")) else "no"}
            for q, (k, thing) in enumerate([(42, "cup"), (42, "dog"), (139, "cat"), (139, "bed")],
                                           start=1)))
    file("amber/query/query_generative.json", [
        {"id": k, "image": f"AMBER_{k}.jpg", "query": "Describe this image."} for k in shown])
    file("amber/query/query_discriminative.json", [
        {"id": 1005, "image": "AMBER_42.jpg", "query": "Is the cup red in this image?"},
        {"id": 1006, "image": "AMBER_139.jpg", "query": "Is there a dog in this image?"}])
    file("amber/annotations.json", [
        {"id": 42, "type": "generative", "truth": ["cup", "table"], "hallu": ["plate"]},
        {"id": 139, "type": "generative", "truth": ["cat"], "hallu": ["dog"]},
        {"id": 1005, "type": "discriminative-attribute-state", "truth": "yes"},
        {"id": 1006, "type": "discriminative-hallucination", "truth": "no"}])
    file("amber/relation.json", {"cup": ["mug"], "table": ["desk"], "cat": [], "dog": [],
                                 "plate": []})
    (root / "amber" / "safe_words.txt").write_text("light\n")
    file("mm-vet/mm-vet.json", {f"v1_{k}": {
        "imagename": f"v1_{k}.jpg", "question": "What is it?", "answer": "a photograph",
        "imagesource": "", "capability": ["rec"]} for k in shown})
    file("llava-bench/questions.jsonl", tuple(
        {"question_id": q, "image": f"{k:03d}.jpg", "text": "What is it?", "category": "conv"}
        for q, k in enumerate(shown)))
    file("llava-bench/answers_gpt4.jsonl", tuple(
        {"question_id": q, "text": "A photograph."} for q, _ in enumerate(shown)))
    file("llava-bench/context.jsonl", tuple(
        {"id": f"{k:03d}", "image": f"{k:03d}.jpg", "caption": "A photograph."} for k in shown))
    file("mmhal/response_template.json", [
        {"question_type": "attribute", "question_topic": "indoor", "image_id": str(k),
         "image_src": f"photographs/{k}_o.jpg", "image_content": ["Cup"],
         "question": "What is it?", "gt_answer": "A cup.", "model_answer": ""} for k in shown])


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with data/ as the README says that it lies."""
    root = tmp_path_factory.mktemp("project")
    for name in ("bpo", "notebooks", "params"):
        shutil.copytree(params.ROOT / name, root / name,
                        ignore=shutil.ignore_patterns("__pycache__"))
    data = root / "data"
    for file, rows, below in (
            ("sharegpt4v/sharegpt4v_instruct_gpt4-vision_cap100k.json", SHAREGPT4V, ""),
            ("LLaVAR/llava_instruct_150k_llavar_16k.json", LLAVAR, "coco/train2017")):
        (data / file).parent.mkdir(parents=True)
        (data / file).write_text(json.dumps([
            {"id": name.rsplit("/")[-1].removesuffix(".jpg"), "image": name, "conversations": [
                {"from": "human" if i % 2 == 0 else "gpt",
                 "value": text if i else f"<image>\n{text}"}
                for i, text in enumerate(text for turn in turns for text in turn)]}
            for _, name, turns in rows]))
        for picture, name, _ in rows:
            if "not-fetched" not in name:
                (data / below / name).parent.mkdir(parents=True, exist_ok=True)
                photograph(picture).save(data / below / name)
    (data / "cc_sbu_align" / "image").mkdir(parents=True)
    for picture, number, _ in CAPTIONS:
        photograph(picture).save(data / "cc_sbu_align" / "image" / f"{number}.jpg")
    (data / "cc_sbu_align" / "filter_cap.json").write_text(json.dumps({"annotations": [
        {"image_id": str(number), "caption": caption} for _, number, caption in CAPTIONS]}))
    write_benchmarks(data / "benchmarks")
    for name, write in (("llava-1.5-7b-hf", write_llava), ("Qwen2.5-VL-7B-Instruct", write_qwen)):
        (data / name).mkdir()
        write(data / name)
        # Many tokens end an answer: a random model would go on to the limit, which is no reply.
        settings = json.loads((data / name / "generation_config.json").read_text())
        ends = np.ravel(settings["eos_token_id"]).tolist()
        (data / name / "generation_config.json").write_text(json.dumps(
            settings | {"eos_token_id": [*ends, *range(7, 200, 2)]}))
    for repo, name in (("llava-hf/llava-1.5-7b-hf", "llava-1.5-7b-hf"),
                       ("llava-hf/llava-1.5-13b-hf", "llava-1.5-7b-hf"),  # one layout
                       ("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen2.5-VL-7B-Instruct")):
        hub.publish(repo, data / name)
    return root


LESS_WORK = {"rows": 0, "max_new_tokens": 8, "noise_steps": "[0, 700, 999]", "sampled_answers": 2,
             "steps": 1, "device_batch": 1, "batch_pairs": 2, "resamples": 100, "questions": 2}


def environment(project) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(project), "HF_HUB_OFFLINE": "1"}


def bpo(project, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([warm.python(), "-m", "bpo", *arguments], cwd=project, text=True,
                          capture_output=True, env=environment(project))


@pytest.mark.slow
@pytest.mark.parametrize("study", ("llava-1.5-7b", "llava-1.5-13b", "qwen2.5-vl-7b"))
def test_the_whole_study_of_a_real_model_runs_on_photographs(project, study):
    checked = bpo(project, "check", study)
    assert checked.returncode == 0 and "MISSING" not in checked.stdout, checked.stdout
    assert checked.stdout.count("of GPU memory") == 2
    less = [x for n, v in LESS_WORK.items() for x in ("-p", n, str(v))]
    if study == "llava-1.5-7b":
        done = bpo(project, "run", study, *less)
    else:  # the others' stages without a kernel, but for a notebook that draws what the model sees
        stages = [["stage", study, n[0], *less] for n in params.study_files(study)]
        program = f"from bpo.__main__ import main\nassert not any(map(main, {stages}))"
        done = subprocess.run([warm.python(), "-c", program], cwd=project, text=True,
                              capture_output=True, env=environment(project))
        if study == "qwen2.5-vl-7b" and not done.returncode:
            done = bpo(project, "run", study, *less, "--only", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = project / "outputs" / study
    found = {n: json.loads((folder / n / "manifest.json").read_text()) for n in
             params.study_files(study)}
    probed, made, trained, compared, scored = (m["metrics"] for m in found.values())
    assert len(probed["p_true"]) == 3 and probed["images"] > 0
    assert made["rows"] == FOUND and made["rows_skipped"] == {"image file is missing": 1}
    assert made["weakened"]["kept"] > 0 and made["injected"]["kept"] > 0
    pairs = [json.loads(x) for x in
             (folder / "2_pair_generation" / "pairs.jsonl").read_text().splitlines()]
    assert {p["category"] for p in pairs} == {"question", "presence", "caption"}
    assert {p["image"] for p in pairs} == {
        name if "/" in name else f"coco/train2017/{name}" for _, name, _ in SHAREGPT4V + LLAVAR
        if "not-fetched" not in name}
    methods = params.read_study(study)["3_dpo_training"].methods
    assert set(trained["methods"]) == set(methods)
    for method in methods:
        adapter = json.loads((folder / "3_dpo_training" / method / "adapter" /
                              "adapter_config.json").read_text())
        assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (32, 256, 0.05)
        assert "language_model" in adapter["target_modules"]
    assert set(compared["captions"]) == {"base", *methods}
    assert "changed" in compared["captions"]["bpo"]
    assert set(scored["benchmarks"]) == {"chair", "object-halbench", "pope", "amber"}
    assert set(scored["settings"]) == set(benchmarks.KNOWN)
    assert set(scored["benchmarks"]["pope"]) == {"base", *methods}
    assert (folder / "5_benchmarks" / "answers-mm-vet.jsonl").is_file()
    # stages alone, as the 13B study's are run here, leave no pages
    assert (folder / "index.html").is_file() is (study != "llava-1.5-13b")


@pytest.mark.slow
def test_a_real_study_is_measured_on_its_checkpoint_of_the_hub(project):
    done = bpo(project, "check", "llava-1.5-7b", "--measure", *(x for n, v in {
        "max_new_tokens": 4, "noise_steps": "[0, 999]", "resamples": 100, "precision": "float32",
        "methods": ["sft_matched", "bpo"]}.items() for x in ("-p", n, str(v))))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line[:1].isdigit()}
    assert list(lines) == list(params.study_files("llava-1.5-7b"))
    # all rows are read, one of which has no image
    assert f" 8 of {FOUND + 1} rows, as long as these" in lines["2_pair_generation"]
    assert "batches of 4 pairs a method, as long as these; the study has up to" in (
        lines["3_dpo_training"])
    assert "set gradient_checkpointing " in done.stdout
    assert not list((project / "outputs").glob(".measure-*"))


@pytest.mark.parametrize("study", ["llava-1.5-7b", "llava-1.5-13b", "qwen2.5-vl-7b"])
def test_a_study_of_a_real_model_has_the_settings_of_the_paper(study):
    read = params.read_study(study)
    made, trained = read["2_pair_generation"], read["3_dpo_training"]
    assert (made.weaken_modes, made.weaken_steps, made.weaken_temperature) == (["noisy"], [900], .2)
    assert (made.inject_temperature, made.inject_top_p, made.max_new_tokens) == (0.8, 0.95, 1024)
    assert (made.select, made.keep, made.score_candidates) == ({}, 1, False)
    assert (trained.lora_rank, trained.lora_alpha, trained.lora_dropout) == (32, 256, 0.05)
    assert (trained.learning_rate, trained.beta, trained.loss) == (2e-6, 0.1, ["sigmoid"])
    assert (trained.epochs, trained.batch_pairs, trained.max_tokens) == (2, 32, 2048)


@pytest.fixture(scope="module")
def qwen(project):
    return checkpoints.load(project / "data" / "Qwen2.5-VL-7B-Instruct")


@pytest.fixture(scope="module")
def asked(project):
    """Questions of other lengths on images of other sizes."""
    folder = project / "data" / "coco" / "train2017"
    files = sorted(folder.glob("*.jpg"))
    return [Request(f"row-{i}", ({"role": "user", "content": "What is it? " * (i + 1)},), file,
                    other=files[i - 1]) for i, file in enumerate(files)]


def test_a_processor_without_its_video_side_gives_the_prompts_and_pixels_of_its_parts(qwen, asked):
    text = encoding.prompt_text(qwen, asked[0].messages, image=True)
    image = Image.open(asked[0].image)
    row = encoding.encode(qwen, text, image)
    parts = qwen.processor.image_processor(images=image, return_tensors="pt")
    assert torch.equal(row["pixel_values"], parts["pixel_values"])
    assert torch.equal(row["image_grid_thw"], parts["image_grid_thw"])
    count = int(parts["image_grid_thw"].prod()) // 4
    spelt = text.replace("<|image_pad|>", "<|image_pad|>" * count)
    assert row["input_ids"][0].tolist() == qwen.tokenizer(spelt)["input_ids"]
    assert text.startswith("<|im_start|>system\n") and text.count("<|image_pad|>") == 1


@pytest.mark.parametrize("view", [None, View("noisy", 900), View("contrast", 900), View("swapped")])
def test_images_of_other_sizes_decode_in_a_batch_as_alone(qwen, asked, view):
    def drawn(requests):
        inputs = generate.encode_branches(qwen, requests, view, seed=0)
        return generate.sample_answers(qwen, requests, inputs, view, seed=0, purpose="test",
                                       samples=2, temperature=1.0, top_p=1.0, max_new_tokens=8)

    assert drawn(asked) == [drawn([r])[0] for r in asked]


def test_all_frames_of_a_still_image_get_the_same_noise_at_its_full_strength(qwen, asked):
    clean, noised = (generate.encode_batch(qwen, asked[:1], v, seed=0)["pixel_values"]
                     for v in (None, View("noisy", 900)))
    share = noise.alpha_bars()[900].item()
    frames = (noised - share**0.5 * clean).unflatten(1, (3, 2, -1))
    assert torch.allclose(frames[:, :, 0], frames[:, :, 1], atol=1e-6)
    # The model adds the frames up: independent draws would leave .71 of the noise.
    assert frames.mean(2).std().item() == pytest.approx((1 - share) ** 0.5, rel=0.03)


@torch.no_grad()
def test_positions_in_three_dimensions_are_packed_with_the_log_probs_of_trl_s_collator(
        qwen, asked, capsys):
    answers = ["A cat.", "No dog is here"]
    ids = [[encoding.answer_tokens(qwen, r.messages, a)
            for a in answers] for r in asked]
    batch = generate.encode_batch(qwen, asked, None, seed=0)
    assert logprobs.choose(qwen, batch, ids) is logprobs.weigh
    assert capsys.readouterr().out == ""
    # TRL's collator, with its own padding, comes to the same log-probs.
    rows = [{"images": [str(r.image)], "prompt": list(r.messages),
             **{n: [{"role": "assistant", "content": a}]
                for n, a in zip(("chosen", "rejected"), answers, strict=True)}} for r in asked]
    rendering = trainers.Rendering(qwen, params.DPOTraining(study="s", model="m"))
    collated = DataCollatorForVisionPreference(qwen.processor)([rendering.row(r) for r in rows])
    answered = collated.pop("completion_mask")[:, 1:]
    chains = qwen.model(**collated).logits[:, :-1].log_softmax(-1).gather(
        -1, collated["input_ids"][:, 1:, None])[..., 0]
    for weigh in (logprobs.weigh, logprobs.weigh_unpacked):
        weighed = weigh(qwen, batch, ids)
        mine = [row[k].logprobs.sum() for k in range(2) for row in weighed]
        torch.testing.assert_close((chains * answered).sum(1), torch.stack(mine), atol=1e-4,
                                   rtol=0)


def test_adapters_of_a_model_with_a_tower_of_linear_layers_stay_in_its_language_model(qwen):
    adapted = checkpoints.adapter_config(qwen.base, rank=2, alpha=4, dropout=0.0).target_modules
    hit = {n for n, _ in qwen.base.named_modules() if re.fullmatch(adapted, n)}
    assert len(hit) == 2 * 7 and not any("visual" in n for n in hit)
