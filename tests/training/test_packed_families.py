"""Packed DPO steps of other families than LLaVA-1.5, with random checkpoints of thin layers: TRL's
own loss and gradients, or a run that notices by itself that it must not pack."""

import copy
import json
import re
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, IterableDataset
from helpers.data import picture
from helpers.qwen import trained_tokenizer, write_qwen
from helpers.trainers import dpo_trainer
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    Ovis2Config,
    Ovis2ForConditionalGeneration,
    Ovis2Processor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMProcessor,
)
from transformers.models import smolvlm
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from trl import DPOTrainer

from bpo.models import checkpoint as checkpoints
from bpo.models import prefix
from bpo.params import ROOT
from bpo.training.packed.rows import Sizes
from bpo.training.packed.trainer import PackedDPOTrainer

pytestmark = pytest.mark.study  # a model of each family

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
CELLS = [f"<row_{r + 1}_col_{c + 1}>" for r in range(6) for c in range(6)]
TILED = ["<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *CELLS]  # Idefics3's
CLOSE = 1e-5  # what float32's rounding leaves
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
          "num_attention_heads": 2, "image_size": 32, "patch_size": 8, "initializer_range": 0.2}


def chat(image: str) -> str:
    return ("<s>{% for m in messages %}{{ m['role'] + ': ' }}{% for c in m['content'] %}"
            "{% if c['type'] == 'image' %}" + image + "{% else %}{{ c['text'] }}{% endif %}"
            "{% endfor %}{{ '</s>' if m['role'] == 'assistant' else '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}")


def tokenizer(*extra: str, **named: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=trained_tokenizer([*SPECIAL, *extra, *named.values()]),
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


def write_parts(folder, model, images, words, *, processor: str, video: str, **settings: int):
    """The files of a processor that reads videos too: it cannot be made here as a whole."""
    for part in (model, images, words):
        part.save_pretrained(folder)
    for name, content in (
            ("processor_config.json", {"processor_class": processor, **settings}),
            ("video_preprocessor_config.json", {"video_processor_type": video})):
        (folder / name).write_text(json.dumps(content))


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


class StillSmolVLM(SmolVLMProcessor):
    """transformers' own processor of SmolVLM, which makes prompts and pixels, but without its video
    side, which needs torchvision. `models.load_processor` cannot leave that out by itself: the
    processor's constructor wants it, and its chat template reads two settings of it."""

    video_processor = SimpleNamespace(num_frames=8, fps=1)

    def __init__(self, image_processor, tokenizer, image_seq_len=169, chat_template=None):
        super().__init__(image_processor, tokenizer, None, image_seq_len, chat_template)


@pytest.fixture(scope="module", autouse=True)
def still_smolvlm():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smolvlm, "SmolVLMProcessor", StillSmolVLM)
        patch.setattr(processing_smolvlm, "num2words", str)  # it spells a video's number of frames
        yield


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
        vision_config=SiglipVisionConfig(**{n: v for n, v in VISION.items()
                                            if n != "initializer_range"}),
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


WRITERS = {"llava-next": write_llava_next, "idefics3": write_idefics3, "smolvlm": write_smolvlm,
           "internvl": write_internvl, "qwen2.5-vl": write_qwen, "ovis2": write_ovis2,
           "gemma3": write_gemma3}
PACKED = [n for n in WRITERS if n != "gemma3"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a family's checkpoint, written when first asked for."""
    written = {}

    def folder(family: str):
        if family not in written:
            written[family] = tmp_path_factory.mktemp(family)
            torch.manual_seed(3)
            WRITERS[family](written[family])
        return written[family]

    return folder


@pytest.fixture(scope="module")
def pairs() -> Dataset:
    """Two images of different shapes, each with a chosen answer and two rejected ones."""
    return Dataset.from_list([
        {"images": [picture(thing, colour, seed, size)],
         "prompt": [{"role": "user", "content": question}],
         "chosen": [{"role": "assistant", "content": chosen}],
         "rejected": [{"role": "assistant", "content": rejected}]}
        for thing, colour, seed, size, question, chosen, answers in (
            ("disc", "red", 1, (64, 32), "What colour is it?", "Dark red",
             ("No", "Orange and green, with white stripes")),
            ("box", "blue", 2, (56, 84), "Describe this picture.", "A blue box on a table.",
             ("A cat looks past the camera", "A cup of coffee on a saucer with a spoon.")))
        for rejected in answers])


def trainer(cls, folder, rows: Dataset, out, **own):
    return dpo_trainer(cls, checkpoints.load(folder), rows, out, own=own, moved=5)


def step(made) -> tuple[float, torch.Tensor, dict]:
    """Loss, gradients and batch of all rows."""
    rows = [copy.copy(made.train_dataset[i]) for i in range(len(made.train_dataset))]
    inputs = made._prepare_inputs(made.data_collator(rows))
    loss = made._compute_loss(made.model, inputs, False)
    loss.backward()
    return loss.item(), torch.cat([w.grad.flatten() for w in made.model.parameters()
                                   if w.requires_grad]), inputs


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return ((first - second).norm() / first.norm()).item()


@pytest.mark.parametrize("dense", [False, True], ids=["branches", "mask"])
@pytest.mark.parametrize("family", PACKED)
def test_a_packed_batch_has_the_loss_and_gradients_of_trl(family, dense, folders, pairs, tmp_path):
    stock = step(trainer(DPOTrainer, folders(family), pairs, tmp_path))
    packing = trainer(PackedDPOTrainer, folders(family), pairs, tmp_path, packing="always")
    if dense:
        prefix.use_mask(packing.base)
    packing.data_collator.dense = dense
    assert prefix.in_use(packing.base) != dense
    packed = step(packing)
    assert len(packed[2]["packed"]["first"]) == 2  # the rows of a positive share one prompt
    assert packed[2]["packed"]["source"].numel() < stock[2]["input_ids"].numel() / 2
    assert abs(stock[0] - 0.6931) > 1e-3 and stock[1].norm() > 1e-3
    assert packed[0] == pytest.approx(stock[0], abs=CLOSE)
    assert distance(stock[1], packed[1]) <= CLOSE


@pytest.mark.parametrize("family", PACKED)
def test_a_family_that_packs_right_is_packed_by_itself(family, folders, pairs, tmp_path, capsys):
    made = trainer(PackedDPOTrainer, folders(family), pairs, tmp_path)
    made.get_train_dataloader()
    assert made.data_collator.packing and prefix.in_use(made.base)
    assert "packed" not in capsys.readouterr().out


@pytest.mark.parametrize("family", PACKED)
def test_the_pixels_of_an_image_decide_its_own_pairs_alone(family, folders, pairs, tmp_path):
    """Each positive's loss in one packed batch is that of a batch of its own."""
    made = trainer(PackedDPOTrainer, folders(family), pairs, tmp_path, packing="always")
    rows = [made.train_dataset[i] for i in range(4)]
    with torch.no_grad():
        whole, *parts = (made._compute_loss(made.model, made._prepare_inputs(
            made.data_collator(some)), False).item() for some in (rows, rows[:2], rows[2:]))
    assert abs(parts[0] - parts[1]) > 1e-3
    assert whole == pytest.approx(sum(parts) / 2, abs=CLOSE)


def test_a_family_with_attention_in_both_directions_goes_on_unpacked_as_trl(
        folders, pairs, tmp_path, capsys):
    stock = step(trainer(DPOTrainer, folders("gemma3"), pairs, tmp_path))
    made = trainer(PackedDPOTrainer, folders("gemma3"), pairs, tmp_path)
    capsys.readouterr()
    made.get_train_dataloader()
    assert not made.data_collator.packing
    said = capsys.readouterr().out
    assert "its attention looks ahead within the prompt" in said and "slower and right" in said
    unpacked = step(made)
    assert "packed" not in unpacked[2]
    assert unpacked[0] == pytest.approx(stock[0], abs=CLOSE)
    assert distance(stock[1], unpacked[1]) <= CLOSE


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_mask_of_its_own_is_seen_whatever_comes_first(streamed, precision, folders, pairs,
                                                        tmp_path, capsys):
    """Rows of text, and an evaluation on such, before the first row with a picture."""
    text = [{**row, "images": []} for row in pairs.select(range(2))]
    rows = Dataset.from_list([*text, *pairs])
    if streamed:
        rows = IterableDataset.from_generator(lambda: iter([*text, *pairs]))
    made = dpo_trainer(PackedDPOTrainer, checkpoints.load(folders("gemma3"), precision=precision),
                       rows, tmp_path, own={"eval_dataset": Dataset.from_list(text)},
                       max_steps=3, per_device_train_batch_size=2, bf16=precision == "bfloat16",
                       train_sampling_strategy="sequential")
    made.evaluate()
    assert made.data_collator.packing  # right for text
    made.train()
    assert not made.data_collator.packing
    assert "its attention looks ahead within the prompt" in capsys.readouterr().out


@pytest.mark.parametrize("family", PACKED)
def test_a_family_that_packs_right_does_so_in_bfloat16(family, folders, pairs, tmp_path):
    made = dpo_trainer(PackedDPOTrainer, checkpoints.load(folders(family), precision="bfloat16"),
                       pairs, tmp_path, bf16=True)
    made.get_train_dataloader()
    assert made.data_collator.packing


@pytest.mark.parametrize("family", PACKED)
def test_rows_are_measured_in_every_family(family, folders, pairs, tmp_path):
    """TRL's default max_length: the longest row is the one that TRL's own batch has the most tokens
    of."""
    made = dpo_trainer(PackedDPOTrainer, checkpoints.load(folders(family)), pairs, tmp_path,
                       max_length=1024)
    assert not made.dropped
    batch = made.data_collator.stock([copy.copy(row) for row in pairs])
    lengths = batch["attention_mask"].sum(1).view(2, -1).amax(0)
    size = Sizes(made.data_collator.stock.processor, 0)
    assert [size(row).length for row in pairs] == lengths.tolist()


def test_the_families_of_the_readme_are_these():
    table = (ROOT / "params" / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([\w.-]+) \| (packs|refused: .*) \|$", table, re.MULTILINE))
    assert [n for n, verdict in rows.items() if verdict == "packs"] == ["llava", *PACKED]
    assert rows.keys() == {"llava", *WRITERS}
