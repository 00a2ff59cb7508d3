"""The tiny models: stock Hugging Face classes with small sizes and a word-level tokenizer."""

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

from bpo.study.seeds import seed_for
from bpo.tiny.drawing import SIDE
from bpo.tiny.language import vocabulary

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


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; words are separated by white space."""
    words = [*SPECIAL.values(), IMAGE_TOKEN, *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)},
                                           unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([*SPECIAL.values(), IMAGE_TOKEN])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **SPECIAL, extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left", model_max_length=256, clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE)


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Scales the short side to 64 pixels, crops the centre, normalises as CLIP does."""
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(
        image_processor=image_processor, tokenizer=tokenizer, patch_size=PATCH,
        num_additional_image_tokens=1, vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE, image_token=IMAGE_TOKEN)


def text_config(tokenizer: PreTrainedTokenizerFast, *, width: int, layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.06,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)


def vision_config(*, width: int, layers: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, image_size=SIDE, patch_size=PATCH, projection_dim=width)


def build_language_model(tokenizer: PreTrainedTokenizerFast, *, width: int, layers: int,
                         seed: int) -> LlamaForCausalLM:
    """An untrained Llama, its weights drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "language model weights"))
        return LlamaForCausalLM(text_config(tokenizer, width=width, layers=layers))


def build_multimodal_model(tokenizer: PreTrainedTokenizerFast, *, text: LlamaConfig,
                           vision_width: int, vision_layers: int,
                           seed: int) -> LlavaForConditionalGeneration:
    """An untrained Llava, its weights drawn from `seed`; image features come from the tower's last
    layer but one, without the class token."""
    config = LlavaConfig(
        vision_config=vision_config(width=vision_width, layers=vision_layers), text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), vision_feature_layer=-2,
        vision_feature_select_strategy="default", image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "multimodal model weights"))
        return LlavaForConditionalGeneration(config)


def adopt_language_model(model: LlavaForConditionalGeneration, language: LlamaForCausalLM) -> None:
    """Copy the text model's weights into the multimodal model; both heads are tied."""
    model.model.language_model.load_state_dict(language.model.state_dict())


def pixel_values(processor: LlavaProcessor, images: np.ndarray) -> torch.Tensor:
    """Pictures (n, 64, 64, 3), uint8, as the processor normalises them: (n, 3, 64, 64) float32.

    Equal to the processor's own output for pictures of this size, by a table of the 256 values.
    """
    mean = np.array(processor.image_processor.image_mean, dtype=np.float32)
    std = np.array(processor.image_processor.image_std, dtype=np.float32)
    table = (np.arange(256, dtype=np.float32)[:, None] / 255 - mean) / std
    return torch.from_numpy(np.stack([table[:, c][images[..., c]] for c in range(3)], axis=1))


def save_checkpoint(model, processing, folder: Path) -> None:
    """`model` and its processor or tokenizer in the plain Hugging Face layout, greedy decoding."""
    tokenizer = getattr(processing, "tokenizer", processing)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, do_sample=False)
    model.save_pretrained(folder)
    processing.save_pretrained(folder)
