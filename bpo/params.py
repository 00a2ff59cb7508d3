"""Parameters: one schema a notebook, read from YAML files or from a notebook's globals, or refused.

A refusal is one message that lists every problem; it comes before any model is loaded.
This module knows names, types and ranges; it does not run anything. The names of objectives, ways
of weakening and benchmarks are looked up in their registries when parameters are checked.
"""

import ast
import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

ROOT = Path(__file__).resolve().parent.parent
WORLD = "outputs/{study}/0_tiny_world"
METHODS = ("sft", "sft_matched", "sft_matched_weaken", "sft_compute", "bpo", "bpo_weaken")
SOURCES = ("weakened", "injected", "given")
SCORES = ("similarity", "length", "image")
# What a variant of a training method may change.
VARIED = {"steps", "epochs", "learning_rate", "beta", "loss", "loss_weights", "ld_alpha",
          "reference", "noise_step", "batch_pairs", "share"}
# Parameters that name files or folders which a stage reads.
PATHS = ("model", "text_model", "data", "image_folder", "describe_prompt", "question_prompt",
         "noise_words", "pairs", "adapters", "rival", "splits", "calibration_data", "folders",
         "probe_data")
NF4 = "nf4"  # the precision of 4-bit weights that compute in bfloat16
TRACKERS = ("tensorboard", "wandb", "trackio")
BULLET = "\n  - "  # before each problem of a refusal


class Refusal(Exception):
    """Bad input, said in one message: what was wrong, where, what to do next.

    IPython shows the message alone, without a stack trace.
    """

    def _render_traceback_(self) -> list[str]:
        return str(self).splitlines()


def movable(value: Any) -> Any:
    """A parameter's value with paths as they stay right when project and outputs move: those in
    there are relative; others stay as they were typed."""
    if isinstance(value, dict):
        return {movable(k): movable(v) for k, v in value.items()}
    if isinstance(value, list):
        return [movable(v) for v in value]
    if isinstance(value, str) and (path := Path(value)).is_absolute():
        if path.is_relative_to(outputs_root()):
            return (Path("outputs") / path.relative_to(outputs_root())).as_posix()
        if path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "outputs"):
            return path.relative_to(ROOT).as_posix()
    return value


def field(default: Any, description: str, **limits: Any) -> Any:
    return Field(default, description=description, **limits)


def shown(default: Any, description: str, **limits: Any) -> Any:
    """A parameter that changes what is drawn or how fast, not what a stage computes."""
    return field(default, description, json_schema_extra={"shapes": False}, **limits)


def _one_of(registered: Callable[[], Iterable[str]]) -> AfterValidator:
    """Refuses a text that is not registered. The registry is read when a value is checked: this
    module imports none, and an entry is all that a new name takes."""
    def check(name: str) -> str:
        names = list(registered())
        if name not in names:
            raise ValueError(f"must be one of {', '.join(names)}{_did_you_mean(name, names)}")
        return name

    return AfterValidator(check)


def _weakenings() -> dict[str, Any]:
    from bpo.models.weakening import WEAKENINGS

    return WEAKENINGS


def _objectives() -> dict[str, Any]:
    from bpo.training.objectives import OBJECTIVES

    return OBJECTIVES


def _benchmarks() -> Mapping[str, Any]:
    from bpo.evaluation.judged import KNOWN

    return KNOWN


def _methods() -> Mapping[str, Any]:
    from bpo.pairs.methods import meanings

    return meanings()


def _damages() -> list[str]:
    """The ways of weakening that make one picture of the image alone."""
    return [n for n, way in _weakenings().items() if not way.other and way.mix is None]


def _other_ways() -> list[str]:
    """The ways of weakening, beside the noise, that take a step and make one picture alone."""
    return [n for n in _damages() if _weakenings()[n].stepped and n != "noisy"]


def _distinct(values: list) -> list:
    if len(set(values)) < len(values):
        raise ValueError("a value is named twice")
    return values


def _from_clean_upwards(steps: list[int]) -> list[int]:
    if steps != sorted(set(steps)) or steps[0] != 0:
        raise ValueError("must rise from 0, the clean image, without repeats")
    return steps


def _levels_differ(levels: dict[str, list[float]]) -> dict[str, list[float]]:
    if len({typical for typical, _ in levels.values()}) < len(levels):
        raise ValueError("two levels have the same share of typical colours")
    return levels


StudyName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
Nucleus = Annotated[float, Field(gt=0, le=1)]
Temperature = Annotated[float, Field(ge=0, le=5)]
Positive = Annotated[float, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
EvenCount = Annotated[int, Field(ge=6, multiple_of=2)]
Resamples = Annotated[int, Field(ge=100, le=100_000)]
Share = Literal["row", "prompt", "image"]
NoiseStep = Annotated[int, Field(ge=0, le=999)]
NoiseSteps = Annotated[list[NoiseStep], Field(min_length=2), AfterValidator(_from_clean_upwards)]
DISTINCT = Field(min_length=1), AfterValidator(_distinct)
CHECKPOINTS = ("model", "text_model", "rival")  # parameters that may name one of the hub
Weakening = Annotated[str, _one_of(_weakenings)]
Objective = Annotated[str, _one_of(_objectives)]
Method = Annotated[str, _one_of(_methods)]
OtherWay = Annotated[str, _one_of(_other_ways)]
Damage = Annotated[str, _one_of(_damages)]
Benchmark = Annotated[str, _one_of(_benchmarks)]
LevelName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]  # it becomes part of file names
VariantName = Annotated[str, Field(pattern=r"^(bpo|sft)_[a-z0-9_]+$")]  # it names a folder
Level = Annotated[list[Fraction], Field(min_length=2, max_length=2)]
Levels = Annotated[dict[LevelName, Level], Field(min_length=2), AfterValidator(_levels_differ)]


class Parameters(BaseModel):
    """What all notebooks share. Subclasses add one field a parameter; `notebook` names the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False,
                              protected_namespaces=())
    notebook: ClassVar[str] = ""

    study: StudyName = field("tiny", "name of the study: its folder below outputs/")
    seed: int = field(0, "seed of every random draw", ge=0, lt=2**31)

    def conflicts(self) -> Iterator[str]:
        """What does not fit together, a sentence each that names the parameter."""
        yield from ()

    @model_validator(mode="before")
    @classmethod
    def _movable(cls, values: Any) -> Any:
        return movable(values)

    @model_validator(mode="after")
    def _fits_together(self) -> "Parameters":
        if conflicts := list(self.conflicts()):
            raise ValueError(BULLET.join(conflicts))
        return self

    def shaping(self) -> dict[str, Any]:
        """The parameters that shape a stage's result, in the schema's order."""
        extra = {n: f.json_schema_extra or {} for n, f in type(self).model_fields.items()}
        return {n: v for n, v in self.model_dump(mode="json").items()
                if extra[n].get("shapes", True) and n != "study"}

    def path(self, value: str) -> Path:
        """A path parameter as an absolute path (`resolve`), or what the hub's cache has under this
        name where no such path is here. Raises Refusal where that is not to be had."""
        from bpo.study import hub  # here, since it reads this module

        return hub.here(resolve(value, study=self.study), value, checkpoint=value in [
            getattr(self, name, None) for name in CHECKPOINTS])

    def optional_path(self, value: str) -> Path | None:
        """The path, or None for a parameter that was left empty."""
        return self.path(value) if value else None


class TinyWorld(Parameters):
    notebook: ClassVar[str] = "0_tiny_world"

    text_typical: Fraction = field(0.95, "share of typical colours in the text")
    text_partner: Fraction = field(0.9, "share of objects with their partner in text")
    image_typical: Fraction = field(0.77, "share of typical colours in natural images")
    image_partner: Fraction = field(0.55, "share of objects with partner in images")
    text_documents: int = field(22000, "documents of the text corpus", ge=700)
    alignment_images: Count = field(1000, "images of the alignment phase")
    alignment_colours: int = field(1, "extra colour questions an alignment image", ge=0, le=4)
    alignment_presences: int = field(
        2, "extra presence questions of each answer an alignment image", ge=0, le=6)
    preference_images: Count = field(1000, "images of the preference rows")
    preference_rows: Literal["alignment", "fresh"] = field(
        "fresh", "preference rows: fresh images, or the alignment's own")
    preference_typical: Fraction = field(
        0.77, "share of typical colours in fresh preference images")
    preference_partner: Fraction = field(
        0.55, "share of objects with partner in fresh preference images")
    preference_presence: bool = field(
        False, "a yes/no question about each preference image too")
    preference_doses: Annotated[list[Fraction], AfterValidator(_distinct)] = field(
        [], "further sets of preference rows, preference-DOSE: one a share of typical colours; "
        "partners as often, in proportion")
    development_images: EvenCount = field(200, "counterfactual images to choose by")
    test_images: EvenCount = field(400, "counterfactual images for reporting")
    natural_images: EvenCount = field(200, "natural images for reporting")
    benchmark_images: EvenCount = field(
        200, "counterfactual images of each benchmark in an official layout")
    text_width: int = field(128, "width of the language model", ge=16, multiple_of=8)
    text_layers: Count = field(3, "layers of the language model")
    vision_width: int = field(96, "width of the vision tower", ge=16, multiple_of=4)
    vision_layers: int = field(3, "layers of the vision tower", ge=2)
    tower_steps: Count = field(1000, "steps of teaching the vision tower")
    tower_batch: Count = field(48, "scenes a step of the tower")
    tower_rate: OpenFraction = field(1.5e-3, "learning rate of the tower")
    text_steps: Count = field(900, "steps of text pretraining")
    text_rate: OpenFraction = field(3e-3, "learning rate of text pretraining")
    caption_steps: Count = field(300, "alignment steps on captions alone")
    caption_batch: Count = field(32, "images a step of captions")
    caption_rate: OpenFraction = field(1.5e-3, "learning rate of captions")
    mixed_steps: Count = field(350, "alignment steps on all questions")
    mixed_batch: Count = field(16, "images a step of all questions")
    mixed_rate: OpenFraction = field(1e-3, "learning rate of all questions")
    presence_weight: Positive = field(2.0, "loss weight of presence answers")

    def conflicts(self) -> Iterator[str]:
        if self.preference_rows == "alignment" and self.preference_images > self.alignment_images:
            yield (f"preference_images ({self.preference_images}) cannot exceed alignment_images "
                   f"({self.alignment_images}) while preference_rows is alignment")
        own = (self.image_typical, self.image_partner)
        if (self.preference_rows == "alignment"
                and (self.preference_typical, self.preference_partner) != own):
            yield ("preference_typical and preference_partner must be image_typical and "
                   "image_partner while preference_rows is alignment")


class Worlds(Parameters):
    """What notebooks share that build worlds of several seeds."""

    repeats: Count = field(3, "seeds: the study's own and those that follow it")
    text_documents: int = field(22000, "documents of the text corpus", ge=700)
    alignment_images: Count = field(1000, "images of the alignment phase")
    tower_steps: Count = field(1000, "steps of teaching the vision tower")
    text_steps: Count = field(900, "steps of text pretraining")
    caption_steps: Count = field(300, "alignment steps on captions alone")
    mixed_steps: Count = field(350, "alignment steps on all questions")
    resamples: Resamples = field(2000, "bootstrap resamples over images")

    def of(self, schema: type[Parameters], **more: Any) -> Any:
        """A notebook's parameters: as this study says, and the tiny study's where it says nothing.
        """
        shared = schema.model_fields.keys() & type(self).model_fields.keys() - {"study", "seed"}
        return schema(**{n: getattr(self, n) for n in shared} | more)


class PriorOrigin(Worlds):
    """Worlds of every text level with every image level."""

    notebook: ClassVar[str] = "6_where_the_prior_comes_from"

    study: StudyName = field("tiny-prior", "name of the study: its folder below outputs/")
    text_levels: Levels = field(
        {"uniform": [0.125, 0.106], "biased": [0.95, 0.9]}, "name, share of typical colours, share "
        "of objects with their partner in the text; the level with the most typical colours is "
        "compared with the fewest")
    image_levels: Levels = field(
        {"uniform": [0.125, 0.106], "half": [0.4475, 0.328], "biased": [0.77, 0.55]},
        "the same of the alignment images")
    text_documents: int = field(22000, "documents drawn for the text corpus, of which those about "
                                "rewriting are left out", ge=700)
    images: Count = field(200, "counterfactual images, the same for all worlds of a seed")
    noise_steps: NoiseSteps = field([0, 300, 500, 600, 700, 800, 900, 999], "diffusion steps at "
                                    "which to look; 0 is the clean image")
    draws: Count = field(1, "noise draws for each image and step")


class Checkpoint(Parameters):
    """What every notebook with a model needs."""

    model: str = field(WORLD + "/model", "folder of the vision-language checkpoint")
    precision: Literal["float32", "bfloat16", NF4] = field(
        "float32", "number format of the model's weights")
    image_transform: Literal["processor", "pad", "crop"] = field(
        "processor", "what is done to an image before the processor: nothing, pad to a square, or "
        "cut out the middle square")


class NoiseProbability(Checkpoint):
    notebook: ClassVar[str] = "1_noise_probability"

    data: str = field(WORLD + "/counterfactual/rows.json", "rows in the LLaVA layout; truth.json "
                      "beside it is used if there")
    image_folder: str = field("", "folder of the images; empty: the data file's own")
    rows: Natural = field(150, "rows to analyse, drawn by seed; 0: all")
    category: str = field("attribute", "only rows of this category; empty: all")
    question: str = field("", "ask this of every image instead; empty: each row's own")
    true_answers: list[str] = field([], "with question: the answers that the image shows")
    prior_answers: list[str] = field([], "with question: the answers that the prior suggests")
    noise_steps: NoiseSteps = field(
        [0, 100, 200, 300, 400, 500, 600, 700, 800, 900, 999], "diffusion steps at which to look; "
        "0 is the clean image")
    draws: Count = field(2, "noise draws for each image and step")
    other_ways: Annotated[list[OtherWay], AfterValidator(_distinct)] = field(
        ["fade"], "ways of weakening that are looked at beside the noise at the same steps; empty: "
        "none")
    sampled_answers: Count = field(40, "images whose sampled answers are kept at each step")
    max_new_tokens: Count = field(24, "longest sampled answer, in tokens")
    batch_size: Count = field(64, "images and steps in one forward pass")

    def conflicts(self) -> Iterator[str]:
        if len({bool(self.question), bool(self.true_answers), bool(self.prior_answers)}) > 1:
            yield ("question, true_answers and prior_answers go together: give all three or none")


class PairGeneration(Checkpoint):
    notebook: ClassVar[str] = "2_pair_generation"

    data: str | dict[str, str] = field(
        WORLD + "/preference/rows.json", "annotated rows in any layout of params/README.md; "
        "several files: the file and its folder below image_folder, each")
    image_folder: str = field("", "folder of the images; empty: the data file's own")
    rows: Natural = field(0, "rows to use, drawn by seed; 0: all")
    max_words: Count = field(350, "rows with an answer longer than this are dropped")
    max_bad_share: Fraction = field(
        0.5, "the run stops when more than this share of the rows cannot be used")
    sources: Annotated[list[Literal[SOURCES]], *DISTINCT] = field(
        ["weakened", "injected"], "where rejected answers come from; given: the data set's own")
    weaken_modes: Annotated[list[Weakening], *DISTINCT] = field(
        ["noisy"], "ways of weakening the image, by their names in notebook 2's table")
    weaken_steps: Annotated[list[NoiseStep], *DISTINCT] = field(
        [800], "steps of noise and fade, up to 999: of noise the diffusion step, of fade the share "
        "of blur, in thousandths")
    weaken_draws: Count = field(1, "noise draws, crops or swaps of each image and step")
    weaken_samples: Count = field(1, "answers sampled from each weakened image")
    weaken_temperature: Temperature = field(
        1.0, "sampling temperature of image weakening; 0: the likeliest token")
    weaken_top_p: Nucleus = field(1.0, "nucleus of image weakening")
    decoder: str = shown(
        "", "URL of a vLLM server of the checkpoint that decodes weakened and clean answers; empty: "
        "transformers does")
    contrast_strength: Positive = field(
        1.0, "weight of the branch that contrast and reverse_contrast take away")
    contrast_cutoff: Fraction = field(
        0.1, "contrast keeps tokens with at least this share of the clean image's likeliest one")
    crop_share: OpenFraction = field(0.3, "share of each side that crop leaves")
    text_model: str = field(WORLD + "/language_model", "folder of the text model that injects "
                            "errors; empty: the checkpoint's own language model")
    endpoint: str = field(
        "", "URL of an OpenAI-compatible endpoint that injects errors; empty: text_model does")
    endpoint_model: str = field("", "the endpoint's name of its model")
    endpoint_key_variable: str = field(
        "OPENAI_API_KEY", "environment variable that holds the endpoint's key")
    endpoint_requests: Count = shown(8, "requests under way to the endpoint, in each process")
    endpoint_retries: Natural = shown(5, "tries again of one request before the run stops")
    endpoint_timeout: Positive = shown(120.0, "seconds of silence after which a request is lost")
    describe_prompt: str = field(
        WORLD + "/prompts/describe.txt", "file that asks to rewrite a description")
    question_prompt: str = field(
        WORLD + "/prompts/question.txt", "file that asks to rewrite an answer")
    inject_samples: Count = field(1, "rewritten answers of each row")
    inject_temperature: Temperature = field(
        0.8, "sampling temperature of error injection; 0: the likeliest token")
    inject_top_p: Nucleus = field(0.95, "nucleus of error injection")
    max_new_tokens: Count = field(40, "longest generated answer, in tokens")
    batch_tokens: Count = field(4096, "tokens decoded together: prompts with their images, and "
                                "answers as long as the annotated")
    score_candidates: bool = field(
        True, "weigh every candidate under the clean and the weakened image")
    select: dict[Literal[SCORES], float] = field(
        {}, "weights of the scores that choose among candidates: similarity, length, image; empty: "
        "the first made")
    keep: Count = field(1, "rejected answers kept of each source, mode and step")
    drop_right: bool = field(False, "drop candidates that the truth file says are right")
    clean_answers: bool = field(
        False, "also the model's own answer to each clean image, which bpo_own learns from")
    weights: Literal["equal", "difficulty"] = field(
        "equal", "weight of each pair in training; difficulty: more for pairs that the model "
        "tells apart badly")
    audit_positives: Count = field(3000, "positives, drawn by seed, that the audit reads in full")
    noise_words: str = field("bpo/pairs/noise_words.txt", "file of what answers say of a weakened "
                             "image, in the data's language, a word or phrase a line")
    launch: str = shown("", "arguments of accelerate launch that start the stage in several "
                        "processes: --num_processes 8, or --config_file FILE; empty: none")
    gallery: int = shown(6, "pairs shown in the gallery", ge=1, le=60)

    def shaping(self) -> dict[str, Any]:
        """A server's draws are not those of transformers, wherever it is."""
        return super().shaping() | ({"decoder": "vllm"} if self.decoder else {})

    def conflicts(self) -> Iterator[str]:
        if self.data == {}:
            yield "data: names no file"
        if isinstance(self.data, dict) and not self.image_folder:
            yield "image_folder: must be named when data names several files"
        if self.endpoint and not self.endpoint_model:
            yield "endpoint_model: must be named when endpoint is"
        if self.decoder and self.precision == NF4:
            yield (f"precision: {NF4} is of models that run here, and the decoder has this one; "
                   "set the server's --dtype")
        for mode in self.weaken_modes if self.decoder else ():
            if _weakenings()[mode].mix is not None:
                yield (f"weaken_modes: {mode} mixes two branches' logits, which a server does not "
                       "give; leave it out, or leave decoder empty")
        for kind in ("weaken", "inject"):
            if getattr(self, f"{kind}_samples") > 1 and not getattr(self, f"{kind}_temperature"):
                yield (f"{kind}_samples: several samples at {kind}_temperature 0 would all be the "
                       "same; ask for 1, or raise the temperature")
        if "image" in self.select and not self.score_candidates:
            yield "select: the score image needs score_candidates"
        if self.weights == "difficulty" and not self.score_candidates:
            yield "weights: difficulty needs score_candidates"
        noisy = "weakened" in self.sources and any(
            _weakenings()[m].stepped for m in self.weaken_modes)
        if noisy and 0 in self.weaken_steps:
            yield "weaken_steps: step 0 is the clean image, which weakens nothing"


def _uneven(p: Any) -> Iterator[str]:
    """What is wrong with the batches of a schema that trains."""
    if p.batch_pairs % p.device_batch:
        yield (f"batch_pairs ({p.batch_pairs}) must be a multiple of device_batch "
               f"({p.device_batch})")


class DPOTraining(Checkpoint):
    notebook: ClassVar[str] = "3_dpo_training"

    pairs: str = field(
        "outputs/{study}/2_pair_generation/pairs.jsonl", "pairs that notebook 2 wrote")
    image_folder: str = field(
        WORLD + "/preference", "folder that the pairs' image names start from")
    methods: Annotated[list[Method], *DISTINCT] = field(
        list(METHODS), "methods to train, one adapter each, by their names in notebook 3's table")
    variants: dict[VariantName, dict[str, Any]] = field(
        {"bpo_dpo_alone": {"method": "bpo", "loss": ["sigmoid"], "loss_weights": [1.0],
                           "learning_rate": 1e-4}},
        "methods to train with other settings too: a name, its method, and what differs, such "
        "as {bpo_strict: {method: bpo, beta: 0.3}}")
    steps: Natural = field(80, "optimizer steps of every method; 0: what epochs gives")
    epochs: Positive = field(2.0, "passes over the pairs of bpo, used when steps is 0")
    batch_pairs: Count = field(80, "pairs (SFT: positives) an optimizer step, in all")
    device_batch: Count = field(80, "pairs in one forward pass on one device")
    learning_rate: OpenFraction = field(2e-3, "peak learning rate")
    warmup_ratio: Fraction = field(0.03, "share of the steps that warm up")
    beta: float = field(0.1, "strength of the pull to the reference in DPO", gt=0, le=10)
    loss: Annotated[list[Objective], *DISTINCT] = field(
        ["sigmoid", "sft"], "objectives of the pairs, added up, by their names in notebook 3's "
        "table (sigmoid: DPO, sft: NLL of the chosen answer)")
    loss_weights: list[Annotated[float, Field(ge=0)]] = field(
        [1.0, 1.0], "weight of each objective")
    ld_alpha: Fraction = field(
        1.0, "weight in DPO of the tokens by which an answer is longer than the other (LD-DPO)")
    reference: Literal["base", "sft"] = field(
        "base", "what DPO starts from and keeps near to: the model as it is, or as the method's "
        "own matched SFT left it")
    noise_step: int | None = field(None, "of answers to noised images DPO learns only from those "
                                   "at this diffusion step; None: from all", ge=0, le=999)
    damage: Damage = field("crop", "way of weakening that damages the image, for objectives that "
                           "compare it with a damaged one")
    damage_step: NoiseStep = field(800, "step of a noisy or fading damage")
    crop_share: OpenFraction = field(0.3, "share of each side that a crop leaves")
    packing: Literal["auto", "always", "never"] = field(
        "auto", "the answers to a prompt in one sequence; auto: if the first batch then has the "
        "same loss and gradients")
    share: Share = field(
        "image", "rows that are drawn together, so that what they share stands once: of a prompt, "
        "or of an image (device_batch should hold several); row: none are")
    lora_rank: Count = field(16, "rank of the adapters")
    lora_alpha: Count = field(32, "scale of the adapters: alpha / rank")
    lora_dropout: float = field(0.0, "dropout in front of the adapters", ge=0, lt=1)
    max_tokens: Count = field(2048, "rows longer than this are dropped and counted")
    gradient_checkpointing: bool = field(False, "recompute activations to save memory")
    save_every: Count = field(20, "optimizer steps between checkpoints to resume from")
    fall_warning: Positive = shown(5.0, "nats by which a chosen answer's log-probability may fall "
                                   "on average before the report warns")
    trackers: list[Literal[TRACKERS]] = shown(
        [], "where TRL sends the training curves: tensorboard, wandb, trackio; empty: nowhere")
    launch: str = shown("", "arguments of accelerate launch that start the stage in several "
                        "processes: --num_processes 8, or --config_file FILE; empty: none")

    def conflicts(self) -> Iterator[str]:
        problems = list(self._without_variants())
        yield from problems
        for name, changes in self.variants.items() if not problems else ():
            yield from self._misfits(name, changes)

    def _without_variants(self) -> Iterator[str]:
        yield from _uneven(self)
        if len(self.loss_weights) != len(self.loss):
            yield f"loss_weights: give one weight for each of {', '.join(self.loss)}"
        if "sft_compute" in self.methods and not {"bpo", "sft_matched"} <= set(self.methods):
            yield ("methods: sft_compute is sft_matched with bpo's compute, so name bpo and "
                   "sft_matched too")
        if self.ld_alpha < 1 and any(_objectives()[n].function for n in self.loss):
            yield "ld_alpha: goes with TRL's own objectives alone"

    def _misfits(self, name: str, changes: Mapping[str, Any]) -> Iterator[str]:
        """What is wrong with a variant, a sentence each."""
        method, others = changes.get("method"), changes.keys() - {"method"}
        if name in _methods():
            yield f"variants: {name} is a method; give the variant another name"
        if method not in _methods():
            yield f"variants: {name} names no method; add method: bpo or another one"
        elif name.partition("_")[0] != method.partition("_")[0] or method == "sft_compute":
            yield f"variants: {name} must begin as its method {method} does, bpo or sft"
        if extra := sorted(others - VARIED):
            yield (f"variants: {name} cannot change {', '.join(extra)}; it can change "
                   f"{', '.join(sorted(VARIED))}")
        elif others <= VARIED:
            try:
                self.varied(name)
            except ValidationError as error:
                for problem in error.errors():
                    yield f"variants: {name}: {_sentence(type(self), problem)}"

    def runs(self) -> dict[str, str]:
        """name -> method of every run: the methods and the variants of them."""
        return {m: m for m in self.methods} | {n: v["method"] for n, v in self.variants.items()}

    def varied(self, name: str) -> "DPOTraining":
        """The settings of a method or a variant."""
        changes = {n: v for n, v in self.variants.get(name, {}).items() if n != "method"}
        return type(self)(**self.model_dump() | changes | {"variants": {}})


class Tuned(Checkpoint):
    """What every notebook that looks at trained methods needs."""

    adapters: str = field(
        "outputs/{study}/3_dpo_training", "folder of notebook 3: an adapter for each method")
    rival: str = field("", "folder of a second, untuned checkpoint that answers the same questions "
                       "about the same images, such as a larger one; empty: none")


class QualitativeComparison(Tuned):
    notebook: ClassVar[str] = "4_qualitative_comparison"

    splits: dict[str, str] = field(
        {n: f"{WORLD}/{n}/rows.json" for n in ("counterfactual", "natural")},
        "held-out rows in the LLaVA layout, by the name of the split", min_length=1)
    calibration_data: str = field(
        WORLD + "/development/rows.json", "rows with a truth file, none of a split, whose colour "
        "questions say how confident each method is; empty: no base as confident as it is")
    image_folder: str = field("", "folder of the images; empty: the data file's own")
    rows: Natural = field(0, "rows of each split, drawn by seed; 0: all")
    noise_rows: Natural = field(150, "rows of the first split, drawn as notebook 1 draws them, "
                                "whose answers are weighed again under noise; 0: none")
    noise_steps: NoiseSteps = field(
        [0, 200, 400, 600, 800, 999], "diffusion steps at which they are; 0 is the clean image")
    max_new_tokens: Count = field(40, "longest generated answer, in tokens")
    batch_size: Count = field(128, "rows decoded together")
    resamples: Resamples = field(2000, "bootstrap resamples over images")
    gallery: int = shown(8, "comparisons shown in the gallery", ge=1, le=60)

    def conflicts(self) -> Iterator[str]:
        if self.calibration_data and "calibration" in self.splits:
            yield "splits: calibration is the name of calibration_data's rows; choose another one"


class Benchmarks(Tuned):
    notebook: ClassVar[str] = "5_benchmarks"

    folders: dict[Benchmark, str] = field(
        {n: f"{WORLD}/benchmarks/{n}" for n in ("chair", "object-halbench", "pope", "amber")},
        "folder of each benchmark's official files: chair, object-halbench, pope, amber, mm-vet, "
        "llava-bench, mmhal", min_length=1)
    questions: Natural = field(0, "questions of each benchmark, drawn by seed; 0: all")
    max_new_tokens: Count = field(40, "longest answer, in tokens")
    temperature: Temperature = field(0.0, "sampling temperature of the answers; 0: greedy")
    top_p: Nucleus = field(1.0, "nucleus of the answers")
    yes_no: list[str] = field(["yes", "no"], "the two answers whose probabilities are weighed for "
                              "calibration, yes first", min_length=2, max_length=2)
    batch_size: Count = field(128, "questions decoded together")
    probe_data: str = field(WORLD + "/counterfactual/rows.json", "annotated rows that are weighed "
                            "with the right image, a swapped one and none; empty: none are")
    probe_image_folder: str = field("", "folder of their images; empty: the data file's own")
    probe_rows: Count = field(600, "rows that are weighed, drawn by seed")
    probe_step: NoiseStep = field(
        800, "diffusion step of the noised image that answers are weighed with")
    judge: str = field("", "URL of an OpenAI-compatible endpoint that judges mm-vet, llava-bench, "
                       "mmhal; empty: answers are only written")
    judge_model: str = field("", "the endpoint's name of the judge")
    judge_key_variable: str = field(
        "OPENAI_API_KEY", "environment variable that holds the judge's key")
    judge_temperature: float = field(0.0, "the judge's sampling temperature", ge=0, le=2)
    judge_repeats: Count = field(1, "replies of the judge to each answer, averaged")
    judge_attempts: Count = field(
        3, "tries to get a reply that can be read, before the answer counts as unscored")
    judge_requests: Count = shown(8, "requests under way to the judge")
    judge_retries: Natural = shown(5, "tries again of one request before the run stops")
    judge_timeout: Positive = shown(120.0, "seconds of silence after which a request is lost")
    resamples: Resamples = field(2000, "bootstrap resamples over images")

    def conflicts(self) -> Iterator[str]:
        if self.judge and not self.judge_model:
            yield "judge_model: must be named when judge is"


class DoseResponse(Worlds):
    """Worlds of several seeds; in each, preference rows of every dose; on these, the methods."""

    notebook: ClassVar[str] = "8_dose_and_response"

    study: StudyName = field("tiny-dose", "name of the study: its folder below outputs/")
    doses: Annotated[list[Fraction], Field(min_length=2), AfterValidator(_distinct)] = field(
        [0.0, 0.25, 0.5, 0.77, 0.95], "shares of typical colours among the preference rows; "
        "partners as often, in proportion")
    methods: Annotated[list[Method], *DISTINCT] = field(
        ["sft_matched", "sft_matched_weaken", "bpo", "bpo_weaken"], "methods to train, by their "
        "names in notebook 3's table")
    preference_images: Count = field(1000, "images of the preference rows of a dose")
    test_images: EvenCount = field(400, "counterfactual images for reporting")
    natural_images: EvenCount = field(200, "natural images for reporting")
    steps: Count = field(80, "optimizer steps of every method")
    batch_pairs: Count = field(32, "pairs (SFT: positives) an optimizer step, in all")
    device_batch: Count = field(32, "pairs in one forward pass on one device")
    share: Share = field("prompt", "rows that are drawn together; see notebook 3")

    def conflicts(self) -> Iterator[str]:
        yield from _uneven(self)
        for method in self.methods:
            if method in ("sft_compute", "bpo_own", "bpo_unselected"):
                yield f"methods: {method} needs settings that this notebook has not"


class Replication(Parameters):
    """Reads finished studies, computes no stage."""

    notebook: ClassVar[str] = "7_replication"

    studies: list[str] = field(
        [], "studies of the seeds, one each; empty: those that bpo replicate stored last, else the "
        "study and every STUDY-seedN beside it")
    other: str = field("", "a second study to compare the first with; empty: none")
    baselines: list[str] = field(
        ["base", "sft_matched"], "what bpo is compared with in the forest plots", min_length=1)
    metrics: list[str] = field(
        ["chair_i", "cover", "p_true", "p_prior", "pope_adversarial"],
        "metrics of the forest plots", min_length=1)
    difference: Positive = field(0.01, "true difference that seeds are counted for")


SCHEMAS: dict[str, type[Parameters]] = {
    s.notebook: s for s in (TinyWorld, NoiseProbability, PairGeneration, DPOTraining,
                            QualitativeComparison, Benchmarks, PriorOrigin, Replication,
                            DoseResponse)}


def outputs_root() -> Path:
    """Where studies are written: outputs/ of the project, or the folder named by BPO_OUTPUTS."""
    return Path(os.environ.get("BPO_OUTPUTS") or ROOT / "outputs").resolve()


def params_root() -> Path:
    """Where studies' parameters are: params/ of the project, or the folder named by BPO_PARAMS."""
    return Path(os.environ.get("BPO_PARAMS") or ROOT / "params").resolve()


def short(path: Path) -> Path:
    """The path from the project's root, if it is in there, for people to read."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def resolve(value: str, *, study: str) -> Path:
    """A path parameter as an absolute path.

    `{study}` becomes the study's name; a relative path starts at the project's root, wherever the
    notebook runs, and one that starts with outputs/ at the root of the outputs.
    """
    path = Path(value.replace("{study}", study)).expanduser()
    if path.parts[:1] == ("outputs",):
        return outputs_root().joinpath(*path.parts[1:])
    return (ROOT / path).resolve()


def validate(schema: type[Parameters], values: Mapping[str, Any], *, where: str) -> Parameters:
    """`values` as an instance of `schema`; raises one Refusal that lists every problem."""
    # pydantic would read `true` as 1: a slip that no range check could see.
    slips = {n for n, v in values.items() if isinstance(v, bool) and n in schema.model_fields
             and schema.model_fields[n].annotation in (int, float)}
    problems = [f"{n}: must be a number, is {values[n]}" for n in slips]
    try:
        read = schema(**{n: v for n, v in values.items() if n not in slips})
    except ValidationError as error:
        problems += [_sentence(schema, e) for e in error.errors()]
    if not problems:
        return read
    lines = "".join(BULLET + p for p in problems)
    count = lines.count(BULLET)
    raise Refusal(f"{schema.notebook}: {count} problem{'s' if count > 1 else ''} in the parameters "
                  f"({where}){lines}\n"
                  f"The first cell of notebooks/{schema.notebook}.ipynb lists them all.")


def _sentence(schema: type[Parameters], error: Mapping[str, Any]) -> str:
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"{name}: no such parameter{_did_you_mean(name, schema.model_fields)}"
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "must")
    if not name:  # a conflict between parameters
        return message
    value = repr(error["input"])
    return f"{name}: {message[0].lower()}{message[1:]}, is {value if len(value) < 80 else '...'}"


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    near = sorted(difflib.get_close_matches(name, names, n=2, cutoff=0.6))
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def read(schema: type[Parameters], namespace: Mapping[str, Any]) -> Parameters:
    """The parameters of a notebook, from its globals.

    In a kernel the names come from the cells that ran and hold nothing but `name = literal` lines:
    the parameters cell, papermill's injected cell and later edits of either. Variables of other
    cells are not parameters, so the set-up cell may be run again at any time. A name that is none
    counts only in the newest of its cells: once it is corrected there, it is no longer refused.
    """
    if "In" in namespace:
        cells = [c for source in namespace["In"] if (c := _assigned(source, schema))[1]]
        newest = dict(cells)  # of the injected ones, and of the others
        values = {n: v for injected, names in cells for n, v in names.items()
                  if n in schema.model_fields or names is newest[injected]}
    else:
        values = {n: v for n, v in namespace.items() if not n.startswith("_")}
    return validate(schema, values, where="as this notebook was given them")


def _assigned(source: str, schema: type[Parameters]) -> tuple[bool, dict[str, Any]]:
    """Whether papermill injected the cell, and the parameters that it sets; {} for other cells."""
    injected = source.lstrip().startswith("# Parameters")
    try:
        values = {s.targets[0].id: ast.literal_eval(s.value) for s in ast.parse(source).body}
    except (SyntaxError, ValueError, AttributeError, TypeError):
        if injected:
            raise Refusal(f"{schema.notebook}: the parameters given to this notebook must be plain "
                          "numbers, texts, truth values and lists of them") from None
        return injected, {}
    return injected, values if injected or values.keys() & schema.model_fields.keys() else {}


class _NoRepeats(yaml.SafeLoader):
    """safe_load that refuses a key written twice, where YAML would keep the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(k, deep=True) for k, _ in node.value]
        twice = sorted({str(k) for k in keys if keys.count(k) > 1})
        if twice:
            raise Refusal(f"{node.start_mark.name}: {', '.join(twice)} is written more than once; "
                          "keep one line")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """One flat parameter file; raises Refusal when it cannot be read."""
    if not path.is_file():
        raise Refusal(f"{path}: there is no such parameter file")
    try:
        with path.open(encoding="utf-8") as file:
            values = yaml.load(file, Loader=_NoRepeats)  # a SafeLoader
    except yaml.YAMLError as error:
        raise Refusal(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict) or not all(isinstance(n, str) for n in values):
        raise Refusal(f"{path}: must hold `name: value` lines")
    return values


def study_files(study: str) -> dict[str, Path]:
    """notebook name -> parameter file of a study, in the notebooks' order."""
    files = {p.stem: p for p in sorted((params_root() / study).glob("*.yaml"))}
    if not files:
        studies = sorted(p.name for p in params_root().iterdir() if p.is_dir())
        raise Refusal(f"params/{study}: no such study. There is: {', '.join(studies)}")
    for name in files:
        if name not in SCHEMAS:
            raise Refusal(f"params/{study}/{name}.yaml: no notebook has that name")
    return files


def read_study(study: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Parameters]:
    """All parameters of a study, by notebook, with `overrides` laid over each that has the name.

    Raises Refusal when an override is in none, or when a key that several notebooks share differs.
    """
    overrides, files = overrides or {}, study_files(study)
    names = {n for notebook in files for n in SCHEMAS[notebook].model_fields}
    for name in overrides:
        if name not in names:
            raise Refusal(f"-p {name}: no notebook of study {study} has this parameter"
                          + _did_you_mean(name, names))
    read, problems = {}, []
    for notebook, file in files.items():
        schema = SCHEMAS[notebook]
        values = read_yaml(file)
        values |= {n: v for n, v in overrides.items() if n in schema.model_fields}
        try:
            read[notebook] = validate(schema, values, where=f"params/{study}/{file.name}")
        except Refusal as refusal:
            problems.append(str(refusal))
    for key in ("study", "seed", "model", "precision", "image_transform"):
        values = {n: getattr(p, key) for n, p in read.items() if hasattr(p, key)}
        if len(set(values.values())) > 1:
            problems.append(f"params/{study}: {key} must be the same in all files, is "
                            + ", ".join(f"{v!r} in {n}" for n, v in values.items()))
    if problems:
        raise Refusal("\n".join(problems))
    return read
