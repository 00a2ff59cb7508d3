"""Any vision-language checkpoint in Hugging Face layout: loading it, its adapters, merging them.

Nothing here knows a model family: the language model comes from transformers' own `get_decoder`.
What a checkpoint is given to read is `encoding`'s.
"""

import importlib.util
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import (
    PROCESSOR_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from bpo.params import NF4, DPOTraining, Refusal, outputs_root
from bpo.study import environment, processes
from bpo.study import stage as stages

MERGED = "merged.json"  # beside a merged checkpoint: what it is made of


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model with its processor (a plain tokenizer for a text model)."""

    model: PreTrainedModel | PeftModel | None
    processor: Any
    transform: str = "processor"  # what is done to an image before the processor

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model, with adapters in place if there are any."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model


@contextmanager
def quietly() -> Iterator[None]:
    """Without what would stay in a saved notebook: transformers' bars for loading weights, and its
    notice that TRL and PEFT still use the old name of an option."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`.*gradient_checkpointing` is deprecated",
                                    FutureWarning)
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def using(checkpoint: Checkpoint, name: str) -> Iterator[None]:
    """The checkpoint with one of its adapters; "base" is the model with all of them off. One that
    has none is itself under any name."""
    if not isinstance(checkpoint.model, PeftModel):
        yield
    elif name == "base":
        with checkpoint.model.disable_adapter():
            yield
    else:
        checkpoint.model.set_adapter(name)
        yield


@quietly()
def load(folder: Path, *, precision: str = "float32", transform: str = "processor") -> Checkpoint:
    """The vision-language checkpoint of a folder, in evaluation mode, on a GPU if there is one. No
    remote code, safetensors only; transform: see `encoding.transformed`.
    Raises Refusal when the folder is not such a checkpoint, or of a training that ran again since.
    """
    model = _load(AutoModelForImageTextToText, folder, precision)
    return replace(load_without_weights(folder, transform=transform), model=model.eval())


def family(folder: Path) -> str:
    """transformers' name of the architecture ("llava"); "pixtral" of a LLaVA with such a tower."""
    _require_config(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tower = config.get("vision_config", {}).get("model_type")
    return tower if tower == "pixtral" else config.get("model_type", "")


@quietly()
def load_tower(folder: Path, *, precision: str = "float32", transform: str = "processor"
               ) -> Checkpoint:
    """The checkpoint as `load` gives it, but without the layers of its language model: enough for
    the features of images, at a fraction of the memory."""
    model = _load(AutoModelForImageTextToText, folder, precision, device="cpu")
    decoder = model.get_decoder()
    for name, _ in list(decoder.named_children()):
        setattr(decoder, name, torch.nn.Identity())
    model.set_output_embeddings(torch.nn.Identity())
    return replace(load_without_weights(folder, transform=transform),
                   model=model.eval().to(processes.device()))


def load_without_weights(folder: Path, *, transform: str = "processor") -> Checkpoint:
    """The checkpoint with None for its model: enough to render prompts and to count tokens. Raises
    Refusal as `load` does."""
    _require_config(folder)
    return _ready(Checkpoint(None, load_processor(folder), transform), folder)


@quietly()
def load_text_model(folder: Path, *, precision: str = "float32") -> Checkpoint:
    """The causal language model of a folder with its tokenizer; raises Refusal as `load` does."""
    model = _load(AutoModelForCausalLM, folder, precision)
    return _ready(Checkpoint(model.eval(), load_tokenizer(folder)), folder)


def load_tokenizer(folder: Path) -> Any:
    _require_config(folder)
    return AutoTokenizer.from_pretrained(folder)


def _load(auto: Any, folder: Path, precision: str, *, device: str = "") -> PreTrainedModel:
    _require_config(folder)
    placed = torch.device(device or processes.device())
    how = _in_4_bits(auto, folder, placed) if precision == NF4 else {}
    try:
        model = auto.from_pretrained(folder, dtype=dtype(precision), use_safetensors=True, **how)
    except ImportError as error:  # the tower's, of Gemma 3n
        raise _absent(folder, error) from None
    except (OSError, ValueError) as error:
        raise Refusal(f"{folder}: cannot be loaded: {str(error).splitlines()[0]}") from error
    return environment.noted(model if how else model.to(placed))


def dtype(precision: str) -> torch.dtype:
    """What a model of this precision computes in."""
    return torch.bfloat16 if precision == NF4 else getattr(torch, precision)


def _in_4_bits(auto: Any, folder: Path, device: torch.device) -> dict[str, Any]:
    """How transformers loads a checkpoint whose decoder's linear layers are kept in 4 bits, as
    QLoRA does (arXiv 2305.14314); tower, projector and head stay as they are."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Refusal(f"precision: {NF4} needs bitsandbytes, which is not installed; "
                      "pip install -e '.[nf4]', or set it to bfloat16")
    whole = skeleton(folder, auto)
    prefix, layers = linear_layers(whole)
    others = [n for n, m in whole.named_modules() if isinstance(m, torch.nn.Linear)
              and n.removeprefix(f"{prefix}.") not in layers]
    # With a number, since training compares it with the one that it runs on.
    placed = device if device.type == "cpu" else torch.device(device.type, device.index or 0)
    return {"device_map": {"": placed}, "quantization_config": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype(NF4), llm_int8_skip_modules=others)}


def linear_layers(model: PreTrainedModel) -> tuple[str, dict[str, torch.nn.Linear]]:
    """Where the decoder is, and by their names in it its linear layers: adapters are laid on them,
    and precision nf4 keeps them in 4 bits. Those with a side below 8 are left out: they are
    coefficients, whose numbers the model may read itself (Gemma 3n, in training)."""
    decoder = model.get_decoder()
    return next(n for n, m in model.named_modules() if m is decoder), {
        n: m for n, m in decoder.named_modules()
        if isinstance(m, torch.nn.Linear) and min(m.in_features, m.out_features) >= 8}


def skeleton(folder: Path, auto: Any = AutoModelForImageTextToText) -> PreTrainedModel:
    """A checkpoint's model without memory for its weights; raises Refusal when transformers does
    not know the architecture."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            return auto.from_config(config, trust_remote_code=False)
    except ImportError as error:
        raise _absent(folder, error) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refusal(f"{folder}: config.json is not that of a vision-language model that "
                      f"transformers knows: {str(error).splitlines()[0]}; give another") from None


@quietly()
def load_adapters(checkpoint: Checkpoint, folders: Mapping[str, Path]) -> Checkpoint:
    """The checkpoint with PEFT adapters laid over it, by name; the first is the active one. Raises
    Refusal when a folder holds no adapter, or one for another model."""
    model = checkpoint.model
    for name, folder in folders.items():
        if not (folder / "adapter_config.json").is_file():
            raise Refusal(f"{folder}: there is no adapter (adapter_config.json is missing)")
        try:
            if isinstance(model, PeftModel):
                model.load_adapter(folder, name)
            else:
                model = PeftModel.from_pretrained(model, folder, name)
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            raise Refusal(f"{folder}: the adapter was trained on another model; "
                          "name that one as model, or train again") from None
    return replace(checkpoint, model=model.eval())


def _require_config(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise Refusal(f"{folder}: there is no checkpoint (config.json is missing)")
    if (folder / MERGED).is_file() and folder.is_relative_to(outputs_root()):
        made_of = json.loads((folder / MERGED).read_text())
        study, method = made_of["study"], made_of["method"]
        stage = stages.stage_folder(study, DPOTraining.notebook)
        if (stage / stages.MANIFEST).is_file() and made_of["adapter"] != stages.fingerprint(
                stage / method / "adapter"):
            raise Refusal(f"{folder}: {method} of {study} was trained again after it was merged "
                          f"here; python -m bpo merge {study} --method {method}")


def _ready(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    tokenizer = checkpoint.tokenizer
    if getattr(checkpoint.processor, "chat_template", None) is None:
        raise Refusal(f"{folder}: the checkpoint has no chat template, so its prompts are unknown")
    if tokenizer.eos_token_id is None:
        raise Refusal(f"{folder}: the tokenizer has no end token, so answers would not end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return checkpoint


def load_processor(folder: Path) -> Any:
    """The checkpoint's processor alone; Refusal when a package that it needs is not there.

    Where only its video side needs one (Qwen2.5-VL's wants torchvision, which still images do
    without), that side is left out: prompts and pixels are the same, a video cannot be passed.
    """
    try:
        return AutoProcessor.from_pretrained(folder)
    except ImportError as error:
        if (processor := _without_video(folder)) is not None:
            return processor
        raise _absent(folder, error) from None


def _absent(folder: Path, error: ImportError) -> Refusal:
    return Refusal(f"{folder}: the checkpoint needs a package that is not installed "
                   f"({str(error).strip().splitlines()[0]}); install the extra for other families: "
                   "pip install -e '.[families]'")


def _without_video(folder: Path) -> Any | None:
    """The processor for still images; None for a class that cannot do without its video side."""
    whole = PROCESSOR_MAPPING.get(type(AutoConfig.from_pretrained(folder)), None)
    parts = whole.get_attributes() if whole else []
    # transformers builds a processor from its parts in this order: only the last can be left out.
    if parts[-1:] == ["video_processor"]:
        with suppress(ImportError, TypeError):  # some constructors (SmolVLM's) want the video side
            return type(whole.__name__, (whole,), {
                "get_attributes": classmethod(lambda _: parts[:-1])}).from_pretrained(folder)
    return None


def adapter_config(model: PreTrainedModel, *, rank: int, alpha: int, dropout: float) -> LoraConfig:
    """LoRA on the linear layers of the language model: no tower, projector or head. PEFT's own
    "all-linear" and lists of names match others too; whole names with any number in them do not."""
    prefix, layers = linear_layers(model)
    names = {re.sub(r"\b\d+\b", r"\\d+", re.escape(n)) for n in layers}
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, task_type="CAUSAL_LM",
                      target_modules=rf"{re.escape(prefix)}\.({'|'.join(sorted(names))})")


@quietly()
def merge(folder: Path, adapter: Path, out: Path, *, precision: str = "float32") -> None:
    """Writes into `out` the checkpoint of a folder with an adapter's change added to its weights.

    The sum is taken in float32 on the CPU, whatever `precision` it is saved in: small changes would
    be lost in a shorter format one by one. An adapter of a 4-bit base belongs to its rounded
    weights, so it is added to these. Raises Refusal as `load` and `load_adapters` do.
    """
    model = _load(AutoModelForImageTextToText, folder,
                  precision if precision == NF4 else "float32", device="cpu")
    if precision == NF4:
        model = model.dequantize(torch.float32).float()
    whole = Checkpoint(model, load_processor(folder))
    tuned = load_adapters(whole, {"merged": adapter}).model.merge_and_unload()
    temporary = out / ".merging"
    shutil.rmtree(temporary, ignore_errors=True)  # of a merge that was interrupted
    tuned.to(dtype(precision)).save_pretrained(temporary)
    whole.processor.save_pretrained(temporary)
    for file in folder.glob("*processor_config.json"):  # with the video side, if it was left out
        shutil.copyfile(file, temporary / file.name)
    # config.json is last: a folder without it is no checkpoint, so half of one is never loaded.
    for file in sorted(temporary.iterdir(), key=lambda f: (f.name == "config.json", f.name)):
        file.replace(out / file.name)
    temporary.rmdir()
