"""A random Qwen2.5-VL in the layout that is published, and the texts that train tokenizers."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizing
from tokenizers.trainers import BpeTrainer
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

# The turns of Qwen2.5-VL: a system turn of its own, content as text or as parts.
QWEN_CHAT = (
    "{% if messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
                "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
CLIP_COLOURS = {"image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711]}
# photograph: (name as the data sets write it, question and answer turns)
SHAREGPT4V = [
    ("chelsea", "coco/train2017/000000000009.jpg", [
        ("What do you see?", "A close view of a tabby cat that looks past the camera with green "
         "eyes, its whiskers long and white, its fur brown and grey in stripes.")]),
    ("rocket", "sam/images/sa_1.jpg", [
        ("Describe this.", "A rocket stands on its pad, a tower with arms beside it, and clouds of "
         "white vapour hang low over the ground in the light of the evening sky.")]),
    ("coffee", "wikiart/images/not-fetched.jpg", [("What is it?", "A cup of coffee.")]),
]
LLAVAR = [
    ("astronaut", "000000033471.jpg", [
        ("Who is in the picture?", "An astronaut in an orange suit, smiling."),
        ("Is there a flag?", "Yes"), ("What colour is the suit?", "Orange")]),
    ("coffee", "000000052846.jpg", [
        ("What stands on the table?", "A cup of coffee on a saucer with a spoon."),
        ("What colour is the cup?", "Dark red"), ("Is it the sea?", "No")]),
    ("page", "000000600001.jpg", [
        ("What does the text speak of?", "Regions of an image."), ("Is it printed?", "Yes")]),
]


def trained_tokenizer(special: list[str]) -> Tokenizer:
    core = Tokenizer(tokenizing.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        [text for *_, turns in SHAREGPT4V + LLAVAR for turn in turns for text in turn],
        BpeTrainer(vocab_size=600, special_tokens=special,
                   initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return core


def write_qwen(folder: Path, *, heads: int = 4) -> None:
    """A Qwen2.5-VL of two thin layers, its files as they are published: a flat config, the image
    processor's settings and a chat template, no file for videos."""
    core = trained_tokenizer([])
    core.add_special_tokens(QWEN_SPECIAL)
    end, start, stop, opened, closed, vision, image, video = map(core.token_to_id, QWEN_SPECIAL)
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
        "bos_token_id": end, "eos_token_id": stop, "vision_start_token_id": opened,
        "vision_end_token_id": closed, "vision_token_id": vision, "image_token_id": image,
        "video_token_id": video, "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 128,
        "num_attention_heads": heads, "num_hidden_layers": 2, "num_key_value_heads": 2,
        "max_position_embeddings": 128000, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [n * 4 // heads for n in (2, 3, 3)]},
        "initializer_range": 0.1, "tie_word_embeddings": False, "use_sliding_window": False,
        "torch_dtype": "bfloat16",
        "vocab_size": core.get_vocab_size(),
        "vision_config": {
            "depth": 2, "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 64,
            "num_heads": 2, "in_chans": 3, "out_hidden_size": 64, "patch_size": 14,
            "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112,
            "fullatt_block_indexes": [1], "tokens_per_second": 2, "temporal_patch_size": 2}}
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))
    model.generation_config = GenerationConfig(eos_token_id=[stop, end], pad_token_id=end)
    model.save_pretrained(folder)
    core.save(str(folder / "tokenizer.json"))
    for name, content in {
        "config.json": config,
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "unk_token": None,
            "pad_token": "<|endoftext|>", "bos_token": None, "model_max_length": 131072,
            "additional_special_tokens": QWEN_SPECIAL[1:], "chat_template": QWEN_CHAT},
        "chat_template.json": {"chat_template": QWEN_CHAT},
        "preprocessor_config.json": {
            "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2,
            "merge_size": 2, **CLIP_COLOURS, "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor"}}.items():
        (folder / name).write_text(json.dumps(content))
