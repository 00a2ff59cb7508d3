"""Random checkpoints of two thin layers, of the families that transformers reads images with."""

import json

import torch
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    AyaVisionProcessor,
    CLIPVisionConfig,
    Cohere2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3nAudioFeatureExtractor,
    Gemma3nConfig,
    Gemma3nForConditionalGeneration,
    Gemma3nProcessor,
    Gemma3Processor,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaProcessor,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    Molmo2Config,
    Molmo2ForConditionalGeneration,
    Ovis2Config,
    Ovis2ForConditionalGeneration,
    Ovis2Processor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from helpers.qwen import trained_tokenizer, write_qwen

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
CELLS = [f"<row_{r + 1}_col_{c + 1}>" for r in range(6) for c in range(6)]
TILED = ["<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *CELLS]  # Idefics3's
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
          "num_attention_heads": 2, "image_size": 32, "patch_size": 8, "initializer_range": 0.2}
SIGLIP = {n: v for n, v in VISION.items() if n != "initializer_range"}


def chat(image: str) -> str:
    return ("<s>{% for m in messages %}{{ m['role'] + ': ' }}{% for c in m['content'] %}"
            "{% if c['type'] == 'image' %}" + image + "{% else %}{{ c['text'] }}{% endif %}"
            "{% endfor %}{{ '</s>' if m['role'] == 'assistant' else '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}")


def tokenizer(*extra: str, behind: bool = False, **named: str) -> PreTrainedTokenizerFast:
    """behind: the named tokens that are not among `extra` come after all words."""
    first = [*extra, *([] if behind else named.values())]
    return PreTrainedTokenizerFast(
        tokenizer_object=trained_tokenizer([*SPECIAL, *first]),
        **dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True)),
        extra_special_tokens=named or None)


def sizes(words: PreTrainedTokenizerFast) -> dict:
    return {"vocab_size": len(words), "hidden_size": 48, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "max_position_embeddings": 1024, "initializer_range": 0.2,
            **{f"{n}_token_id": getattr(words, f"{n}_token_id") for n in ("pad", "bos", "eos")}}


def write(folder, model, processor):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_parts(folder, model, images, words, *, processor: str, video: str, **settings):
    """The files of a processor that reads videos too: it cannot be made here as a whole."""
    for part in (model, images, words):
        part.save_pretrained(folder)
    for name, content in (
            ("processor_config.json", {"processor_class": processor, **settings}),
            ("video_preprocessor_config.json", {"video_processor_type": video})):
        (folder / name).write_text(json.dumps(content))


def write_llava(folder):
    words = tokenizer(image_token="<image>")
    write(folder, LlavaForConditionalGeneration(LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**sizes(words)),
        image_token_index=words.image_token_id, vision_feature_layer=-1)),
        LlavaProcessor(
            CLIPImageProcessorPil(size={"shortest_edge": 32},
                                  crop_size={"height": 32, "width": 32}),
            words, patch_size=8, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, chat_template=chat("<image>\n")))


def write_llava_next(folder):
    """Images in tiles that their shape chooses, with rows of image tokens that end in a vector."""
    words = tokenizer(image_token="<image>")
    pinpoints = [[32, 64], [64, 32], [64, 64]]
    write(folder, LlavaNextForConditionalGeneration(LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**sizes(words)),
        image_token_index=words.image_token_id, image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1)),
        LlavaNextProcessor(
            LlavaNextImageProcessorPil(size={"shortest_edge": 32}, image_grid_pinpoints=pinpoints,
                                       crop_size={"height": 32, "width": 32}),
            words, patch_size=8, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, chat_template=chat("<image>\n")))


def write_idefics3(folder):
    """Images in tiles, padded to the most tiles of a batch."""
    words = tokenizer(*TILED, image_token="<image>")
    write(folder, Idefics3ForConditionalGeneration(Idefics3Config(
        vision_config=VISION, text_config=LlamaConfig(**sizes(words)), scale_factor=2,
        image_token_id=words.image_token_id, pad_token_id=words.pad_token_id)),
        Idefics3Processor(
            Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={
                "longest_edge": 32}), words, image_seq_len=4, chat_template=chat("<image>")))


def write_smolvlm(folder):
    """As Idefics3, with a model and image processor of its own."""
    words = tokenizer(*TILED, image_token="<image>")
    words.chat_template = chat("<image>")
    write_parts(folder, SmolVLMForConditionalGeneration(SmolVLMConfig(
        vision_config=VISION, text_config=LlamaConfig(**sizes(words)), scale_factor=2,
        image_token_id=words.image_token_id)),
        SmolVLMImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        words, processor="SmolVLMProcessor", video="SmolVLMVideoProcessor", image_seq_len=4)


def write_internvl(folder):
    """Images in tiles that their shape chooses, all tiles of a batch in one row."""
    words = tokenizer(start_image_token="<img>", end_image_token="</img>", video_token="<video>",
                      context_image_token="<IMG_CONTEXT>")
    words.chat_template = chat("<IMG_CONTEXT>\n")
    write_parts(folder, InternVLForConditionalGeneration(InternVLConfig(
        vision_config=VISION, text_config=Qwen2Config(**sizes(words)), image_seq_length=4,
        image_token_id=words.context_image_token_id)),
        GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, max_patches=4),
        words, processor="InternVLProcessor", video="InternVLVideoProcessor", image_seq_length=4)


def write_ovis2(folder):
    """Images as words of a visual vocabulary; tokens mark rows and columns of tiles."""
    marks = ["<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    words = tokenizer(*marks, image_token="<image>")
    atom, *others = words.convert_tokens_to_ids(marks)
    write(folder, Ovis2ForConditionalGeneration(Ovis2Config(
        vision_config={**VISION, "vocab_size": 40, "hidden_stride": 2},
        text_config=Qwen2Config(**sizes(words)), image_token_id=atom,
        visual_indicator_token_ids=others, vocab_size=len(words), hidden_size=48)),
        Ovis2Processor(Ovis2ImageProcessorPil(size={"height": 32, "width": 32},
                                              crop_to_patches=True, max_patches=4),
                       words, image_seq_length=4, chat_template=chat("<image>\n")))


def write_gemma3(folder):
    """An image's tokens see each other in both directions; one of two layers has a window."""
    words = tokenizer(boi_token="<start_of_image>", eoi_token="<end_of_image>",
                      image_token="<image_soft_token>")
    model = Gemma3ForConditionalGeneration(Gemma3Config(
        vision_config=SiglipVisionConfig(**SIGLIP),
        text_config={**sizes(words), "head_dim": 24, "query_pre_attn_scalar": 24,
                     "sliding_window": 512,
                     "layer_types": ["sliding_attention", "full_attention"]},
        mm_tokens_per_image=4, boi_token_index=words.boi_token_id, initializer_range=0.2,
        eoi_token_index=words.eoi_token_id, image_token_index=words.image_token_id))
    with torch.no_grad():  # it starts at zero, which makes all images one and their masks no matter
        model.model.multi_modal_projector.mm_input_projection_weight.normal_(0, 0.2)
    write(folder, model, Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 32, "width": 32}), words, image_seq_length=4,
        chat_template=chat("<start_of_image>")))


def write_idefics2(folder):
    """Images of their own shape behind a resampler, padded to the largest of a batch."""
    words = tokenizer("<end_of_utterance>", image_token="<image>",
                      image_boundary_token="<fake_token_around_image>")
    write(folder, Idefics2ForConditionalGeneration(Idefics2Config(
        vision_config=VISION, text_config=LlamaConfig(**sizes(words)),
        perceiver_config={"hidden_size": 48, "resampler_n_latents": 4, "resampler_depth": 1,
                          "resampler_n_heads": 2, "resampler_head_dim": 16,
                          "num_key_value_heads": 1, "initializer_range": 0.2},
        image_token_id=words.image_token_id)),
        Idefics2Processor(Idefics2ImageProcessorPil(size={
            "shortest_edge": 16, "longest_edge": 32}), words, image_seq_len=4,
            chat_template=chat("<image>")))


def write_llava_onevision(folder):
    """As LLaVA-NeXT, with another tower and tiles that are shrunk where they are many."""
    words = tokenizer(image_token="<image>", video_token="<video>")
    words.chat_template = chat("<image>\n")
    pinpoints = [[32, 64], [64, 32], [64, 64]]
    write_parts(folder, LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**SIGLIP), text_config=Qwen2Config(**sizes(words)),
        image_token_index=words.image_token_id, video_token_index=words.video_token_id,
        image_grid_pinpoints=pinpoints)),
        LlavaOnevisionImageProcessorPil(size={"height": 32, "width": 32},
                                        image_grid_pinpoints=pinpoints),
        words, processor="LlavaOnevisionProcessor", video="LlavaOnevisionVideoProcessor",
        num_image_tokens=16, vision_feature_select_strategy="full")


PIXTRAL = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]",
           "image_end_token": "[IMG_END]"}


def write_rows(folder, model, words, *, merged: int):
    words.chat_template = chat("[IMG]")
    images = PixtralImageProcessorPil(size={"longest_edge": 48},
                                      patch_size={"height": 8, "width": 8})
    for part in (model, images, words):
        part.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({
        "processor_class": "PixtralProcessor", "patch_size": 8, "spatial_merge_size": merged}))


def write_pixtral(folder):
    """Images of their own shape, a token at the end of each row of patches."""
    words = tokenizer(**PIXTRAL)
    write_rows(folder, LlavaForConditionalGeneration(LlavaConfig(
        vision_config=PixtralVisionConfig(**VISION), vision_feature_layer=-1,
        vision_feature_select_strategy="full", image_token_index=words.image_token_id,
        text_config=MistralConfig(**sizes(words), sliding_window=None))), words, merged=1)


def write_mistral3(folder):
    """As Pixtral, four patches a token."""
    words = tokenizer(**PIXTRAL)
    write_rows(folder, Mistral3ForConditionalGeneration(Mistral3Config(
        vision_config=PixtralVisionConfig(**VISION), image_token_index=words.image_token_id,
        text_config=MistralConfig(**sizes(words), sliding_window=None))), words, merged=2)


def write_aya_vision(folder):
    """Images in tiles with text between them; one of two layers has a window and no positions."""
    words = tokenizer("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", image_token="<|IMG_PATCH|>")
    write(folder, AyaVisionForConditionalGeneration(AyaVisionConfig(
        vision_config=SiglipVisionConfig(**SIGLIP), image_token_index=words.image_token_id,
        text_config=Cohere2Config(**sizes(words), logit_scale=1.0, sliding_window=512, layer_types=[
            "sliding_attention", "full_attention"]))),
        AyaVisionProcessor(
            GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, max_patches=4), words,
            patch_size=8, img_size=32, downsample_factor=2, chat_template=chat("<image>\n")))


def write_grid(folder, made, *, processor: str, video: str, images, vision: dict, text: dict):
    """A family that counts positions in time, height and width; images of their own shape.

    made: the classes of its model and config; images: its image processor's."""
    marks = [f"<|{kind}_{end}|>" for kind in ("vision", "image", "video")
             for end in ("start", "end")]
    words = tokenizer(*marks, image_token="<|image_pad|>", video_token="<|video_pad|>")
    words.chat_template = chat("<|vision_start|><|image_pad|><|vision_end|>")
    model, config = made
    write_parts(folder, model(config(
        text_config={**sizes(words), **text},
        vision_config={"depth": 2, "num_heads": 2, "patch_size": 8, "initializer_range": 0.2,
                       **vision},
        image_token_id=words.image_token_id, video_token_id=words.video_token_id,
        **{f"{m[2:-2]}_token_id": words.convert_tokens_to_ids(m) for m in marks})),
        images(patch_size=8, size={"shortest_edge": 256, "longest_edge": 2048}), words,
        processor=processor, video=video)


def axes(*section: int, **settings) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                "mrope_section": list(section), **settings}}


def write_qwen2_vl(folder):
    write_grid(folder, (Qwen2VLForConditionalGeneration, Qwen2VLConfig),
               processor="Qwen2VLProcessor", video="Qwen2VLVideoProcessor",
               images=Qwen2VLImageProcessorPil, vision={"embed_dim": 32, "hidden_size": 48},
               text=axes(4, 4, 4))


QWEN3 = {"processor": "Qwen3VLProcessor", "video": "Qwen3VLVideoProcessor",
         "images": Qwen2VLImageProcessorPil}
QWEN3_VISION = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 48,
                "num_position_embeddings": 16}


def write_qwen3_vl(folder):
    """Features of an early layer of the tower are added behind a layer of the decoder."""
    write_grid(folder, (Qwen3VLForConditionalGeneration, Qwen3VLConfig),
               **QWEN3, vision={**QWEN3_VISION, "deepstack_visual_indexes": [0]},
               text={"head_dim": 24, **axes(4, 4, 4, mrope_interleaved=True)})


def write_qwen3_5(folder):
    """One of two layers is a linear attention, whose state runs through all tokens of a row."""
    write_grid(folder, (Qwen3_5ForConditionalGeneration, Qwen3_5Config),
               **QWEN3, vision=QWEN3_VISION,
               text={"head_dim": 24, "layer_types": ["linear_attention", "full_attention"],
                     "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                     "linear_num_key_heads": 2, "linear_num_value_heads": 2,
                     **axes(4, 4, 4, mrope_interleaved=True, partial_rotary_factor=1.0)})


def write_glm4v(folder):
    write_grid(folder, (Glm4vForConditionalGeneration, Glm4vConfig),
               processor="Glm4vProcessor", video="Glm4vVideoProcessor",
               images=Glm4vImageProcessorPil, vision={
                   "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 48,
                   "image_size": 32},
               text=axes(2, 2, 2, partial_rotary_factor=0.5))


def write_gemma4(folder, *, looks_ahead: str | None = None):
    """Layers with embeddings of their own, a window in one of two, capped logits."""
    words = tokenizer("<|video|>", boi_token="<|image>", eoi_token="<image|>",
                      image_token="<|image|>", boa_token="<|audio>", eoa_token="<audio|>",
                      audio_token="<|audio|>")
    words.chat_template = chat("<|image|>")
    write_parts(folder, Gemma4ForConditionalGeneration(Gemma4Config(
        text_config={**sizes(words), "head_dim": 24, "global_head_dim": 24, "sliding_window": 512,
                     "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": len(words),
                     "layer_types": ["sliding_attention", "full_attention"],
                     "final_logit_softcapping": 30.0, "use_bidirectional_attention": looks_ahead},
        vision_config={**{n: v for n, v in VISION.items() if n != "image_size"},
                       "num_key_value_heads": 1, "head_dim": 16, "position_embedding_size": 64},
        audio_config=None, initializer_range=0.2,
        **{f"{n}_token_id": getattr(words, f"{n}_token_id")
           for n in ("boi", "eoi", "image", "boa", "audio")},
        eoa_token_index=words.eoa_token_id,
        video_token_id=words.convert_tokens_to_ids("<|video|>"))),
        Gemma4ImageProcessorPil(max_soft_tokens=70, patch_size=8), words,
        processor="Gemma4Processor", video="Gemma4VideoProcessor",
        feature_extractor={"feature_extractor_type": "Gemma4AudioFeatureExtractor"})


def write_large_gemma4(folder):
    """Its larger models: an image's tokens see each other in both directions."""
    write_gemma4(folder, looks_ahead="vision")


def write_gemma3n(folder):
    """Its own kind of tower, thinner; four states a token that mix (AltUp), layers with embeddings
    of their own, the last two with the keys and values of earlier ones, capped logits. Tokens of
    images and sounds come behind the words, with tables of their own."""
    starts = {"boi_token": "<start_of_image>", "boa_token": "<start_of_audio>"}
    words = tokenizer(*starts.values(), **starts, behind=True, eoi_token="<end_of_image>",
                      image_token="<image_soft_token>", eoa_token="<end_of_audio>",
                      audio_token="<audio_soft_token>")
    text = words.eoi_token_id
    model = Gemma3nForConditionalGeneration(Gemma3nConfig(
        text_config={**sizes(words), "head_dim": 24, "sliding_window": 512,
                     "num_hidden_layers": 4, "num_kv_shared_layers": 2,
                     "layer_types": ["sliding_attention", "full_attention"] * 2,
                     "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": text,
                     "laurel_rank": 16, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
        vision_config={"model_args": {"channel_multiplier": 0.02, "msfa_output_resolution": 2,
                                      "layer_scale_init_value": 1.0},
                       "vocab_offset": text, "vocab_size": 2, "initializer_range": 0.2},
        audio_config={"hidden_size": 16, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1,
                      "sscp_conv_channel_size": [8, 8], "vocab_offset": text + 2, "vocab_size": 2},
        vision_soft_tokens_per_image=4, audio_soft_tokens_per_image=4, initializer_range=0.2,
        **{f"{n}_token_id": getattr(words, f"{n}_token_id")
           for n in ("boi", "eoi", "image", "boa", "eoa", "audio")}))
    with torch.no_grad():  # they start at zero, which makes the layers' own embeddings no matter
        for layer in model.get_decoder().layers:
            layer.altup.correct_output_scale.normal_()
    write(folder, model, Gemma3nProcessor(
        Gemma3nAudioFeatureExtractor(), SiglipImageProcessorPil(size={"height": 32, "width": 32}),
        words, audio_seq_length=4, image_seq_length=4, chat_template=chat("<image_soft_token>")))


def write_lfm2_vl(folder):
    """One of two layers is a convolution along the row; images as patches, padded to one number."""
    marks = ["<|image_start|>", "<|image_end|>", "<|img_thumbnail|>",
             *(f"<|img_row_{r + 1}_col_{c + 1}|>" for r in range(2) for c in range(2))]
    words = tokenizer(*marks, image_token="<image>")
    words.chat_template = chat("<image>")
    model = Lfm2VlForConditionalGeneration(Lfm2VlConfig(
        vision_config={"model_type": "siglip2_vision_model", "num_patches": 16, **{
            n: v for n, v in SIGLIP.items() if n != "image_size"}},
        text_config={"model_type": "lfm2", **sizes(words),
                     "layer_types": ["conv", "full_attention"]},
        image_token_id=words.image_token_id, projector_hidden_size=48))
    for part in (model, words):
        part.save_pretrained(folder)
    for name, content in (
            ("processor_config.json", {"processor_class": "Lfm2VlProcessor"}),
            ("preprocessor_config.json", {
                "image_processor_type": "Lfm2VlImageProcessor", "do_image_splitting": False,
                "encoder_patch_size": 8, "tile_size": 32, "min_image_tokens": 4,
                "max_image_tokens": 16, "max_num_patches": 64, "do_pad": True})):
        (folder / name).write_text(json.dumps(content))


def write_paligemma(folder):
    """A prompt's tokens see each other in both directions, its image's and its words'."""
    words = tokenizer(image_token="<image>")
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    processor = PaliGemmaProcessor(images, words, chat_template=chat("<image>"))
    write(folder, PaliGemmaForConditionalGeneration(PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**SIGLIP, projection_dim=48),
        text_config={"model_type": "gemma", **sizes(words), "head_dim": 24},
        image_token_index=words.image_token_id, vocab_size=len(words), hidden_size=48,
        projection_dim=48)), processor)


def write_molmo2(folder):
    """Image tokens pool patches by their number in the batch, and see all others of their prompt's
    images in both directions."""
    marks = ["<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<frame_start>",
             "<im_end>", "<frame_end>", "<im_low>"]
    words = tokenizer(*marks, image_token="<|image|>", video_token="<|video|>")
    words.chat_template = chat("<|image|>")
    patch, _, start, low, frame, end, last, _ = words.convert_tokens_to_ids(marks)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
             "initializer_range": 0.2}
    model = Molmo2ForConditionalGeneration(Molmo2Config(
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                       "image_size": [32, 32], "patch_size": 8, **heads},
        adapter_config={"hidden_size": 32, "intermediate_size": 64, "text_hidden_size": 48,
                        "vision_feature_layer": [1, 0], **heads},
        text_config={**sizes(words), "head_dim": 24, "additional_vocab_size": 0},
        initializer_range=0.2, image_patch_id=patch, image_start_token_id=start,
        low_res_image_start_token_id=low, image_end_token_id=end, frame_start_token_id=frame,
        frame_end_token_id=last))
    for part in (model, words):
        part.save_pretrained(folder)
    for name, content in (
            ("processor_config.json", {"processor_class": "Molmo2Processor"}),
            ("preprocessor_config.json", {
                "image_processor_type": "Molmo2ImageProcessor", "max_crops": 2,
                "overlap_margins": [1, 1], "patch_size": 8, "pooling_size": [2, 2],
                "size": {"height": 32, "width": 32}}),
            ("video_preprocessor_config.json", {"video_processor_type": "Molmo2VideoProcessor"})):
        (folder / name).write_text(json.dumps(content))


WRITERS = {"llava": write_llava, "llava-next": write_llava_next, "idefics3": write_idefics3,
           "smolvlm": write_smolvlm, "internvl": write_internvl, "qwen2.5-vl": write_qwen,
           "ovis2": write_ovis2, "idefics2": write_idefics2,
           "llava-onevision": write_llava_onevision, "pixtral": write_pixtral,
           "mistral3": write_mistral3, "aya-vision": write_aya_vision, "qwen2-vl": write_qwen2_vl,
           "qwen3-vl": write_qwen3_vl, "glm4v": write_glm4v, "gemma4": write_gemma4,
           "gemma4-large": write_large_gemma4, "gemma3": write_gemma3, "gemma3n": write_gemma3n,
           "qwen3.5": write_qwen3_5,
           "lfm2-vl": write_lfm2_vl, "paligemma": write_paligemma, "molmo2": write_molmo2}
# Their processors do not load without torchvision.
TORCHVISION = {"smolvlm", "pixtral", "mistral3", "gemma4", "gemma4-large", "lfm2-vl", "molmo2"}
# Their towers are timm's, which does not load without torchvision either.
TIMM = {"gemma3n"}
# What a run says where it trains unpacked.
REFUSED = {"gemma4-large": "its attention looks ahead within the prompt",
           "gemma3": "its attention looks ahead within the prompt",
           "molmo2": "its attention looks ahead within the prompt",
           "qwen3.5": "its decoder mixes tokens by linear_attention, not by attention alone",
           "lfm2-vl": "its decoder mixes tokens by conv, not by attention alone"}
# What stands against training at all.
UNTRAINED = {"paligemma": "TRL gives its processor answers alone, and it takes no text without an "
                          "image"}
