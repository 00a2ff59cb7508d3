"""The tiny models: stock Hugging Face classes with small sizes and a word-level tokenizer."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from bpo.params import TinyWorld
from bpo.study import environment
from bpo.study.seeds import seed_for
from bpo.tiny.drawing import SIDE, draw_scene
from bpo.tiny.language import vocabulary
from bpo.tiny.world import Scene

PATCH = 16  # pixels
IMAGE_TOKENS = (SIDE // PATCH) ** 2
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
IMAGE_TOKEN = "<image>"
# One conversation: <s>user: <image>\nQUESTION\nassistant: ANSWER</s>
CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}{{ message['role'] + ':' }}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ ' <image>\n' }}"
    "{% elif loop.first %}{{ ' ' + part['text'] }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '</s>' if message['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}")


def image_prompt(question: str) -> str:
    """A question about an image as the chat template gives it, with the image's tokens."""
    return f"<s>user: {IMAGE_TOKEN * IMAGE_TOKENS}\n{question}\nassistant:"


def build_processor() -> LlavaProcessor:
    """Text: one token a word, words are separated by white space. Images: scales the short side to
    64 pixels, crops the centre, normalises as CLIP does."""
    words = [*SPECIAL.values(), IMAGE_TOKEN, *vocabulary()]
    by_word = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)},
                                         unk_token=SPECIAL["unk_token"]))
    by_word.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    by_word.add_special_tokens([*SPECIAL.values(), IMAGE_TOKEN])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=by_word, **SPECIAL, extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left", model_max_length=256, clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE)
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE},
                                              crop_size={"height": SIDE, "width": SIDE}),
        tokenizer=tokenizer, patch_size=PATCH, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN)


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {n: getattr(tokenizer, n) for n in ("bos_token_id", "eos_token_id", "pad_token_id")}


def text_config(tokenizer: PreTrainedTokenizerFast, p: TinyWorld) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=p.text_width, intermediate_size=2 * p.text_width,
        num_hidden_layers=p.text_layers, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.06,
        **special_ids(tokenizer))


def build_language_model(tokenizer: PreTrainedTokenizerFast, p: TinyWorld) -> LlamaForCausalLM:
    """An untrained Llama, its weights drawn from the study's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(p.seed, "language model weights"))
        return environment.noted(LlamaForCausalLM(text_config(tokenizer, p)))


def build_multimodal_model(tokenizer: PreTrainedTokenizerFast, p: TinyWorld
                           ) -> LlavaForConditionalGeneration:
    """An untrained Llava, its weights drawn from the study's seed; image features come from the
    tower's last layer but one, without the class token."""
    vision = CLIPVisionConfig(
        hidden_size=p.vision_width, intermediate_size=2 * p.vision_width,
        num_hidden_layers=p.vision_layers, num_attention_heads=4, image_size=SIDE,
        patch_size=PATCH, projection_dim=p.vision_width)
    config = LlavaConfig(
        vision_config=vision, text_config=text_config(tokenizer, p),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), vision_feature_layer=-2,
        vision_feature_select_strategy="default", image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True, **special_ids(tokenizer))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(p.seed, "multimodal model weights"))
        return environment.noted(LlavaForConditionalGeneration(config))


def pixel_values(processor: LlavaProcessor, scenes: Sequence[Scene]) -> torch.Tensor:
    """Pictures of the scenes as the processor normalises them, (n, 3, 64, 64) float32: equal to its
    own output, by a table of the 256 values."""
    images = np.stack([np.asarray(draw_scene(scene)) for scene in scenes])  # (n, 64, 64, 3)
    mean, std = (np.array(values, dtype=np.float32) for values in (
        processor.image_processor.image_mean, processor.image_processor.image_std))
    table = (np.arange(256, dtype=np.float32)[:, None] / 255 - mean) / std
    normalised = table[images, range(3)].transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(normalised))


def save_checkpoint(model, processing, folder: Path) -> None:
    """`model` and its processor or tokenizer in the plain Hugging Face layout, greedy decoding."""
    tokenizer = getattr(processing, "tokenizer", processing)
    model.generation_config = GenerationConfig(do_sample=False, **special_ids(tokenizer))
    model.save_pretrained(folder)
    processing.save_pretrained(folder)
