"""Parameters: one schema a notebook, read from YAML files or from a notebook's globals, or refused.

A refusal is one message that lists every problem; it comes before any model is loaded.
This module knows names, types and ranges; it does not run anything. The names of objectives and
ways of weakening are looked up in their registries when parameters are checked.
"""

import ast
import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

if TYPE_CHECKING:
    from bpo.models.weakening import Weakening
    from bpo.training.objectives import Objective

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("sft", "sft_matched", "sft_compute", "bpo", "bpo_weaken", "bpo_inject")
SOURCES = ("weakened", "injected", "given")
SCORES = ("similarity", "length", "image")
TRACKERS = ("tensorboard", "wandb", "trackio")

# The judge-free benchmarks first.
BENCHMARKS = ("chair", "object-halbench", "pope", "amber", "mm-vet", "llava-bench", "mmhal")

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
EvenCount = Annotated[int, Field(ge=6, multiple_of=2)]
Rate = Annotated[float, Field(gt=0, lt=1)]
NoiseStep = Annotated[int, Field(ge=0, le=999)]
LevelName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]  # it becomes part of file names
Level = Annotated[list[Fraction], Field(min_length=2, max_length=2)]


class Refusal(Exception):
    """Bad input, said in one message: what was wrong, where, what to do next.

    IPython shows the message alone, without a stack trace.
    """

    def _render_traceback_(self) -> list[str]:
        return str(self).splitlines()


def shown(default: Any, description: str, **limits: Any) -> Any:
    """A parameter that changes what is drawn or how fast, not what a stage computes."""
    return Field(default, description=description, json_schema_extra={"shapes": False}, **limits)


def _one_of(registered: Callable[[], Iterable[str]]) -> AfterValidator:
    """Refuses a text that is not registered. The registry is read when a value is checked: this
    module imports none, and an entry is all that a new name takes."""
    def check(name: str) -> str:
        names = list(registered())
        if name not in names:
            raise ValueError(f"must be one of {', '.join(names)}{_did_you_mean(name, names)}")
        return name

    return AfterValidator(check)


def _weakenings() -> "dict[str, Weakening]":
    from bpo.models.weakening import WEAKENINGS

    return WEAKENINGS


def _objectives() -> "dict[str, Objective]":
    from bpo.training.objectives import OBJECTIVES

    return OBJECTIVES


def _methods() -> tuple[str, ...]:
    """What a training method learns from: the pairs of some sources or ways of weakening, or the
    random control."""
    return (*METHODS, "bpo_unselected", *(f"bpo_{way}" for way in _weakenings()))


def _damages() -> list[str]:
    """The ways of weakening that make one picture of the image alone."""
    return [n for n, way in _weakenings().items() if not way.other and way.mix is None]


class Parameters(BaseModel):
    """What all notebooks share. Subclasses add one field a parameter; `notebook` names the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False,
                              protected_namespaces=())
    notebook: ClassVar[str] = ""

    study: str = Field("tiny", description="name of the study: its folder below outputs/",
                       pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, description="seed of every random draw", ge=0, lt=2**31)

    def shaping(self) -> dict[str, Any]:
        """The parameters that shape a stage's result, in the schema's order."""
        extra = {n: f.json_schema_extra or {} for n, f in type(self).model_fields.items()}
        return {n: v for n, v in self.model_dump(mode="json").items()
                if extra[n].get("shapes", True) and n != "study"}

    def path(self, value: str) -> Path:
        return resolve(value, study=self.study)

    def optional_path(self, value: str) -> Path | None:
        """The path, or None for a parameter that was left empty."""
        return self.path(value) if value else None


class TinyWorld(Parameters):
    """0_tiny_world"""

    notebook: ClassVar[str] = "0_tiny_world"

    text_typical: Fraction = Field(0.95, description="share of typical colours in the text")
    text_partner: Fraction = Field(0.9, description="share of objects with their partner in text")
    image_typical: Fraction = Field(0.77, description="share of typical colours in natural images")
    image_partner: Fraction = Field(0.55, description="share of objects with partner in images")
    text_documents: int = Field(22000, description="documents of the text corpus", ge=700)
    alignment_images: Count = Field(1000, description="images of the alignment phase")
    alignment_colours: int = Field(1, description="extra colour questions an alignment image",
                                   ge=0, le=4)
    alignment_presences: int = Field(
        2, description="extra presence questions of each answer an alignment image", ge=0, le=6)
    preference_images: Count = Field(1000, description="images of the preference rows")
    preference_rows: Literal["alignment", "fresh"] = Field(
        "alignment", description="preference rows: the alignment's own, or fresh ones like them")
    development_images: EvenCount = Field(200, description="counterfactual images to choose by")
    test_images: EvenCount = Field(400, description="counterfactual images for reporting")
    natural_images: EvenCount = Field(200, description="natural images for reporting")
    benchmark_images: EvenCount = Field(
        200, description="counterfactual images of each benchmark in an official layout")
    text_width: int = Field(128, description="width of the language model", ge=16, multiple_of=8)
    text_layers: Count = Field(3, description="layers of the language model")
    vision_width: int = Field(96, description="width of the vision tower", ge=16, multiple_of=4)
    vision_layers: int = Field(3, description="layers of the vision tower", ge=2)
    tower_steps: Count = Field(1000, description="steps of teaching the vision tower")
    tower_batch: Count = Field(48, description="scenes a step of the tower")
    tower_rate: Rate = Field(1.5e-3, description="learning rate of the tower")
    text_steps: Count = Field(900, description="steps of text pretraining")
    text_rate: Rate = Field(3e-3, description="learning rate of text pretraining")
    caption_steps: Count = Field(300, description="alignment steps on captions alone")
    caption_batch: Count = Field(32, description="images a step of captions")
    caption_rate: Rate = Field(1.5e-3, description="learning rate of captions")
    mixed_steps: Count = Field(350, description="alignment steps on all questions")
    mixed_batch: Count = Field(16, description="images a step of all questions")
    mixed_rate: Rate = Field(1e-3, description="learning rate of all questions")
    presence_weight: float = Field(2.0, description="loss weight of presence answers", gt=0)

    @model_validator(mode="after")
    def _enough_images(self) -> "TinyWorld":
        if self.preference_rows == "alignment" and self.preference_images > self.alignment_images:
            raise ValueError(f"preference_images ({self.preference_images}) cannot exceed "
                             f"alignment_images ({self.alignment_images}) while preference_rows "
                             "is alignment")
        return self


class PriorOrigin(Parameters):
    """6_where_the_prior_comes_from: worlds of every text level with every image level."""

    notebook: ClassVar[str] = "6_where_the_prior_comes_from"

    study: str = Field("tiny-prior", description="name of the study: its folder below outputs/",
                       pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    repeats: Count = Field(3, description="seeds: the study's own and those that follow it")
    text_levels: dict[LevelName, Level] = Field(
        {"uniform": [0.125, 0.106], "biased": [0.95, 0.9]}, min_length=2,
        description="name, share of typical colours, share of objects with their partner in the "
                    "text; the level with the most typical colours is compared with the fewest")
    image_levels: dict[LevelName, Level] = Field(
        {"uniform": [0.125, 0.106], "half": [0.4475, 0.328], "biased": [0.77, 0.55]},
        min_length=2, description="the same of the alignment images")
    text_documents: int = Field(22000, description="documents drawn for the text corpus, of which "
                                                   "those about rewriting are left out", ge=700)
    alignment_images: Count = Field(1000, description="images of the alignment phase")
    tower_steps: Count = Field(1000, description="steps of teaching the vision tower")
    text_steps: Count = Field(900, description="steps of text pretraining")
    caption_steps: Count = Field(300, description="alignment steps on captions alone")
    mixed_steps: Count = Field(350, description="alignment steps on all questions")
    images: Count = Field(200, description="counterfactual images, the same for all worlds of a "
                                           "seed")
    noise_steps: list[NoiseStep] = Field(
        [0, 300, 500, 600, 700, 800, 900, 999], min_length=2,
        description="diffusion steps at which to look; 0 is the clean image")
    draws: Count = Field(1, description="noise draws for each image and step")
    resamples: Annotated[int, Field(ge=100, le=100_000)] = Field(
        2000, description="bootstrap resamples over images")

    @field_validator("noise_steps")
    @classmethod
    def _from_clean_upwards(cls, steps: list[int]) -> list[int]:
        return NoiseProbability._from_clean_upwards(steps)

    @field_validator("text_levels", "image_levels")
    @classmethod
    def _levels_differ(cls, levels: dict[str, list[float]]) -> dict[str, list[float]]:
        if len({typical for typical, _ in levels.values()}) < len(levels):
            raise ValueError("two levels have the same share of typical colours")
        return levels


class Checkpoint(Parameters):
    """What every notebook with a model needs."""

    model: str = Field("outputs/{study}/0_tiny_world/model",
                       description="folder of the vision-language checkpoint")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="number format of the model's weights")
    image_transform: Literal["processor", "pad", "crop"] = Field(
        "processor", description="what is done to an image before the processor: nothing, pad to "
                                 "a square, or cut out the middle square")


class NoiseProbability(Checkpoint):
    """1_noise_probability"""

    notebook: ClassVar[str] = "1_noise_probability"

    data: str = Field("outputs/{study}/0_tiny_world/counterfactual/rows.json",
                      description="rows in the LLaVA layout; truth.json beside it is used if there")
    image_folder: str = Field("", description="folder of the images; empty: the data file's own")
    rows: int = Field(150, description="rows to analyse, drawn by seed; 0: all", ge=0)
    category: str = Field("attribute", description="only rows of this category; empty: all")
    question: str = Field("", description="ask this of every image instead; empty: each row's own")
    true_answers: list[str] = Field(
        [], description="with question: the answers that the image shows")
    prior_answers: list[str] = Field(
        [], description="with question: the answers that the prior suggests")
    noise_steps: list[NoiseStep] = Field(
        [0, 100, 200, 300, 400, 500, 600, 700, 800, 900, 999], min_length=2,
        description="diffusion steps at which to look; 0 is the clean image")
    draws: Count = Field(2, description="noise draws for each image and step")
    sampled_answers: int = Field(
        40, description="images whose sampled answers are kept at each step", ge=1)
    max_new_tokens: Count = Field(24, description="longest sampled answer, in tokens")
    batch_size: Count = Field(64, description="images and steps in one forward pass")

    @field_validator("noise_steps")
    @classmethod
    def _from_clean_upwards(cls, steps: list[int]) -> list[int]:
        if steps != sorted(set(steps)) or steps[0] != 0:
            raise ValueError("must rise from 0, the clean image, without repeats")
        return steps

    @model_validator(mode="after")
    def _question_with_answers(self) -> "NoiseProbability":
        if len({bool(self.question), bool(self.true_answers), bool(self.prior_answers)}) > 1:
            raise ValueError("question, true_answers and prior_answers go together: "
                             "give all three or none")
        return self


class PairGeneration(Checkpoint):
    """2_pair_generation"""

    notebook: ClassVar[str] = "2_pair_generation"

    data: str | dict[str, str] = Field(
        "outputs/{study}/0_tiny_world/preference/rows.json",
        description="annotated rows in any layout of the README; several files: the file and its "
                    "folder below image_folder, each")
    image_folder: str = Field("", description="folder of the images; empty: the data file's own")
    rows: int = Field(0, description="rows to use, drawn by seed; 0: all", ge=0)
    max_words: Count = Field(350, description="rows with an answer longer than this are dropped")
    max_bad_share: Fraction = Field(
        0.5, description="the run stops when more than this share of the rows cannot be used")
    sources: list[Literal[SOURCES]] = Field(
        ["weakened", "injected"], min_length=1,
        description="where rejected answers come from; given: the data set's own")
    weaken_modes: list[Annotated[str, _one_of(_weakenings)]] = Field(
        ["noisy"], min_length=1, description="ways of weakening the image, by their names in "
                                             "notebook 2's table")
    weaken_steps: list[NoiseStep] = Field(
        [800], min_length=1, description="diffusion steps of the noise")
    weaken_draws: Count = Field(1, description="noise draws, crops or swaps of each image and step")
    weaken_samples: Count = Field(1, description="answers sampled from each weakened image")
    weaken_temperature: float = Field(1.0, description="sampling temperature of image weakening; "
                                                       "0: the likeliest token", ge=0, le=5)
    weaken_top_p: float = Field(1.0, description="nucleus of image weakening", gt=0, le=1)
    contrast_strength: float = Field(
        1.0, description="weight of the branch that contrast and reverse_contrast take away", gt=0)
    contrast_cutoff: Fraction = Field(
        0.1, description="contrast keeps tokens with at least this share of the clean image's "
                         "likeliest one")
    crop_share: float = Field(0.3, description="share of each side that crop leaves", gt=0, lt=1)
    text_model: str = Field("outputs/{study}/0_tiny_world/language_model",
                            description="folder of the text model that injects errors; "
                                        "empty: the checkpoint's own language model")
    endpoint: str = Field("", description="URL of an OpenAI-compatible endpoint that injects "
                                          "errors; empty: text_model does")
    endpoint_model: str = Field("", description="the endpoint's name of its model")
    endpoint_key_variable: str = Field(
        "OPENAI_API_KEY", description="environment variable that holds the endpoint's key")
    endpoint_requests: Count = shown(8, "requests under way to the endpoint, in each process")
    endpoint_retries: int = shown(5, "tries again of one request before the run stops", ge=0)
    endpoint_timeout: float = shown(120.0, "seconds of silence after which a request is lost", gt=0)
    describe_prompt: str = Field("outputs/{study}/0_tiny_world/prompts/describe.txt",
                                 description="file that asks to rewrite a description")
    question_prompt: str = Field("outputs/{study}/0_tiny_world/prompts/question.txt",
                                 description="file that asks to rewrite an answer")
    inject_samples: Count = Field(1, description="rewritten answers of each row")
    inject_temperature: float = Field(0.8, description="sampling temperature of error injection; "
                                                       "0: the likeliest token", ge=0, le=5)
    inject_top_p: float = Field(0.95, description="nucleus of error injection", gt=0, le=1)
    max_new_tokens: Count = Field(40, description="longest generated answer, in tokens")
    batch_tokens: Count = Field(4096, description="tokens decoded together: prompts with their "
                                                  "images, and answers as long as the annotated")
    score_candidates: bool = Field(
        True, description="weigh every candidate under the clean and the weakened image")
    select: dict[Literal[SCORES], float] = Field(
        {}, description="weights of the scores that choose among candidates: similarity, length, "
                        "image; empty: the first made")
    keep: Count = Field(1, description="rejected answers kept of each source and mode")
    drop_right: bool = Field(
        False, description="drop candidates that the truth file says are right")
    audit_positives: Count = Field(
        3000, description="positives, drawn by seed, that the audit reads in full")
    launch: str = shown("", "arguments of accelerate launch that start the stage in several "
                            "processes: --num_processes 8, or --config_file FILE; empty: none")
    gallery: int = shown(6, "pairs shown in the gallery", ge=1, le=60)

    @model_validator(mode="after")
    def _fits_together(self) -> "PairGeneration":
        for name in ("sources", "weaken_modes", "weaken_steps"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name}: a value is named twice")
        if isinstance(self.data, dict):
            if not self.data:
                raise ValueError("data: names no file")
            if not self.image_folder:
                raise ValueError("image_folder: must be named when data names several files")
        if self.endpoint and not self.endpoint_model:
            raise ValueError("endpoint_model: must be named when endpoint is")
        for kind in ("weaken", "inject"):
            if getattr(self, f"{kind}_samples") > 1 and not getattr(self, f"{kind}_temperature"):
                raise ValueError(f"{kind}_samples: several samples at {kind}_temperature 0 would "
                                 "all be the same; ask for 1, or raise the temperature")
        if "image" in self.select and not self.score_candidates:
            raise ValueError("select: the score image needs score_candidates")
        noisy = [m for m in self.weaken_modes if _weakenings()[m].stepped]
        if "weakened" in self.sources and noisy and 0 in self.weaken_steps:
            raise ValueError("weaken_steps: step 0 is the clean image, which weakens nothing")
        return self


class DPOTraining(Checkpoint):
    """3_dpo_training"""

    notebook: ClassVar[str] = "3_dpo_training"

    pairs: str = Field("outputs/{study}/2_pair_generation/pairs.jsonl",
                       description="pairs that notebook 2 wrote")
    image_folder: str = Field("outputs/{study}/0_tiny_world/preference",
                              description="folder that the pairs' image names start from")
    methods: list[Annotated[str, _one_of(_methods)]] = Field(
        list(METHODS), min_length=1, description="methods to train, one adapter each")
    steps: int = Field(80, description="optimizer steps of every method; 0: what epochs gives",
                       ge=0)
    epochs: float = Field(2.0, description="passes over the pairs of bpo, used when steps is 0",
                          gt=0)
    batch_pairs: Count = Field(32, description="pairs (SFT: positives) an optimizer step, in all")
    device_batch: Count = Field(32, description="pairs in one forward pass on one device")
    learning_rate: float = Field(2e-3, description="peak learning rate", gt=0, lt=1)
    warmup_ratio: Fraction = Field(0.03, description="share of the steps that warm up")
    beta: float = Field(0.1, description="strength of the pull to the reference in DPO", gt=0,
                        le=10)
    loss: list[Annotated[str, _one_of(_objectives)]] = Field(
        ["sigmoid", "sft"], min_length=1, description="objectives of the pairs, added up, by their "
        "names in notebook 3's table (sigmoid: DPO, sft: NLL of the chosen answer)")
    loss_weights: list[Annotated[float, Field(ge=0)]] = Field(
        [1.0, 1.0], description="weight of each objective")
    damage: Annotated[str, _one_of(_damages)] = Field(
        "crop", description="way of weakening that damages the image, for objectives that compare "
                            "it with a damaged one")
    damage_step: NoiseStep = Field(800, description="diffusion step of a noisy damage")
    crop_share: float = Field(0.3, description="share of each side that a crop leaves", gt=0, lt=1)
    packing: Literal["auto", "always", "never"] = Field(
        "auto", description="the answers to a prompt in one sequence; auto: if the first batch "
                            "then has the same loss and gradients")
    lora_rank: Count = Field(16, description="rank of the adapters")
    lora_alpha: Count = Field(32, description="scale of the adapters: alpha / rank")
    lora_dropout: float = Field(0.0, description="dropout in front of the adapters", ge=0, lt=1)
    max_tokens: Count = Field(2048, description="rows longer than this are dropped and counted")
    gradient_checkpointing: bool = Field(False, description="recompute activations to save memory")
    save_every: Count = Field(20, description="optimizer steps between checkpoints to resume from")
    fall_warning: float = shown(
        5.0, "nats by which a chosen answer's log-probability may fall on average before the "
             "report warns", gt=0)
    trackers: list[Literal[TRACKERS]] = shown(
        [], "where TRL sends the training curves: tensorboard, wandb, trackio; empty: nowhere")
    launch: str = shown("", "arguments of accelerate launch that start the stage in several "
                            "processes: --num_processes 8, or --config_file FILE; empty: none")

    @model_validator(mode="after")
    def _batches_fit(self) -> "DPOTraining":
        if self.batch_pairs % self.device_batch:
            raise ValueError(f"batch_pairs ({self.batch_pairs}) must be a multiple of "
                             f"device_batch ({self.device_batch})")
        for name in ("methods", "loss"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name}: a value is named twice")
        if len(self.loss_weights) != len(self.loss):
            raise ValueError(f"loss_weights: give one weight for each of {', '.join(self.loss)}")
        if "sft_compute" in self.methods and not {"bpo", "sft_matched"} <= set(self.methods):
            raise ValueError("methods: sft_compute is sft_matched with bpo's compute, "
                             "so name bpo and sft_matched too")
        return self


class QualitativeComparison(Checkpoint):
    """4_qualitative_comparison"""

    notebook: ClassVar[str] = "4_qualitative_comparison"

    adapters: str = Field("outputs/{study}/3_dpo_training",
                          description="folder of notebook 3: an adapter for each method")
    splits: dict[str, str] = Field(
        {"counterfactual": "outputs/{study}/0_tiny_world/counterfactual/rows.json",
         "natural": "outputs/{study}/0_tiny_world/natural/rows.json"}, min_length=1,
        description="held-out rows in the LLaVA layout, by the name of the split")
    image_folder: str = Field("", description="folder of the images; empty: the data file's own")
    rows: int = Field(0, description="rows of each split, drawn by seed; 0: all", ge=0)
    max_new_tokens: Count = Field(40, description="longest generated answer, in tokens")
    batch_size: Count = Field(128, description="rows decoded together")
    resamples: Annotated[int, Field(ge=100, le=100_000)] = Field(
        2000, description="bootstrap resamples over images")
    gallery: int = shown(8, "comparisons shown in the gallery", ge=1, le=60)


class Benchmarks(Checkpoint):
    """5_benchmarks"""

    notebook: ClassVar[str] = "5_benchmarks"

    adapters: str = Field("outputs/{study}/3_dpo_training",
                          description="folder of notebook 3: an adapter for each method")
    folders: dict[Literal[BENCHMARKS], str] = Field(
        {n: f"outputs/{{study}}/0_tiny_world/benchmarks/{n}" for n in BENCHMARKS[:4]}, min_length=1,
        description="folder of each benchmark's official files: chair, object-halbench, pope, "
                    "amber, mm-vet, llava-bench, mmhal")
    questions: int = Field(0, description="questions of each benchmark, drawn by seed; 0: all",
                           ge=0)
    max_new_tokens: Count = Field(40, description="longest answer, in tokens")
    temperature: float = Field(0.0, description="sampling temperature of the answers; 0: greedy",
                               ge=0, le=5)
    top_p: float = Field(1.0, description="nucleus of the answers", gt=0, le=1)
    yes_no: list[str] = Field(
        ["yes", "no"], min_length=2, max_length=2,
        description="the two answers whose probabilities are weighed for calibration, yes first")
    batch_size: Count = Field(128, description="questions decoded together")
    probe_data: str = Field(
        "outputs/{study}/0_tiny_world/counterfactual/rows.json",
        description="annotated rows that are weighed with the right image, a swapped one and none; "
                    "empty: none are")
    probe_image_folder: str = Field(
        "", description="folder of their images; empty: the data file's own")
    probe_rows: Count = Field(600, description="rows that are weighed, drawn by seed")
    probe_step: NoiseStep = Field(800, description="diffusion step of the noise that each token's "
                                                   "probability is compared under")
    judge: str = Field("", description="URL of an OpenAI-compatible endpoint that judges mm-vet, "
                                       "llava-bench, mmhal; empty: answers are only written")
    judge_model: str = Field("", description="the endpoint's name of the judge")
    judge_key_variable: str = Field(
        "OPENAI_API_KEY", description="environment variable that holds the judge's key")
    judge_temperature: float = Field(0.0, description="the judge's sampling temperature", ge=0,
                                     le=2)
    judge_repeats: Count = Field(1, description="replies of the judge to each answer, averaged")
    judge_attempts: Count = Field(3, description="tries to get a reply that can be read, before "
                                                 "the answer counts as unscored")
    judge_requests: Count = shown(8, "requests under way to the judge")
    judge_retries: int = shown(5, "tries again of one request before the run stops", ge=0)
    judge_timeout: float = shown(120.0, "seconds of silence after which a request is lost", gt=0)
    resamples: Annotated[int, Field(ge=100, le=100_000)] = Field(
        2000, description="bootstrap resamples over images")
    gallery: int = shown(4, "captions whose tokens are drawn", ge=1, le=20)

    @model_validator(mode="after")
    def _judge_has_a_name(self) -> "Benchmarks":
        if self.judge and not self.judge_model:
            raise ValueError("judge_model: must be named when judge is")
        return self


class Replication(Parameters):
    """7_replication: reads finished studies, computes no stage."""

    notebook: ClassVar[str] = "7_replication"

    studies: list[str] = Field([], description="studies of the seeds, one each; empty: the study "
                                               "and every STUDY-seedN beside it")
    other: str = Field("", description="a second study to compare the first with; empty: none")
    baselines: list[str] = Field(["base", "sft_matched"], min_length=1, description="what bpo is "
                                 "compared with in the forest plots")
    metrics: list[str] = Field(["chair_i", "cover", "p_true", "p_prior", "pope_adversarial"],
                               min_length=1, description="metrics of the forest plots")


SCHEMAS: dict[str, type[Parameters]] = {
    s.notebook: s for s in (TinyWorld, NoiseProbability, PairGeneration, DPOTraining,
                            QualitativeComparison, Benchmarks, PriorOrigin, Replication)}


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
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = "\n".join(f"  - {p}" for p in problems)
    raise Refusal(f"{schema.notebook}: {count} in the parameters ({where})\n{lines}\n"
                  f"The first cell of notebooks/{schema.notebook}.ipynb lists them all.")


def _sentence(schema: type[Parameters], error: Mapping[str, Any]) -> str:
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"{name}: no such parameter{_did_you_mean(name, schema.model_fields)}"
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "must")
    if not name or error["type"] == "value_error" and message.startswith(f"{name}:"):
        return message
    value = repr(error["input"])
    return f"{name}: {message[0].lower()}{message[1:]}, is {value if len(value) < 80 else '...'}"


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    near = sorted(difflib.get_close_matches(name, known, n=2, cutoff=0.6))
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def read(schema: type[Parameters], namespace: Mapping[str, Any]) -> Parameters:
    """The parameters of a notebook, from its globals.

    In a kernel the names come from the cells that ran and hold nothing but `name = literal` lines:
    the parameters cell, papermill's injected cell and later edits of either. Variables of other
    cells are not parameters, so the set-up cell may be run again at any time.
    """
    if "In" in namespace:
        values = {n: v for source in namespace["In"] for n, v in _assigned(source, schema).items()}
    else:
        values = {n: v for n, v in namespace.items() if not n.startswith("_")}
    return validate(schema, values, where="as this notebook was given them")


def _assigned(source: str, schema: type[Parameters]) -> dict[str, Any]:
    injected = source.lstrip().startswith("# Parameters")
    try:
        values = {s.targets[0].id: ast.literal_eval(s.value) for s in ast.parse(source).body}
    except (SyntaxError, ValueError, AttributeError, TypeError):
        if injected:
            raise Refusal(f"{schema.notebook}: the parameters given to this notebook must be plain "
                          "numbers, texts, truth values and lists of them") from None
        return {}
    return values if injected or values.keys() & schema.model_fields.keys() else {}


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
    folder = params_root() / study
    files = {p.stem: p for p in sorted(folder.glob("*.yaml"))}
    if not files:
        known = sorted(p.name for p in params_root().iterdir() if p.is_dir())
        raise Refusal(f"params/{study}: no such study. There is: {', '.join(known)}")
    unknown = [n for n in files if n not in SCHEMAS]
    if unknown:
        raise Refusal(f"params/{study}/{unknown[0]}.yaml: no notebook has that name")
    return files


def read_study(study: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Parameters]:
    """All parameters of a study, by notebook, with `overrides` laid over each that has the name.

    Raises Refusal when an override is in none, or when a key that several notebooks share differs.
    """
    overrides = dict(overrides or {})
    files = study_files(study)
    lost = [n for n in overrides if not any(n in SCHEMAS[f].model_fields for f in files)]
    if lost:
        every = {n for f in files for n in SCHEMAS[f].model_fields}
        raise Refusal(f"-p {lost[0]}: no notebook of study {study} has this parameter"
                      + _did_you_mean(lost[0], every))
    read, problems = {}, []
    for name, file in files.items():
        schema = SCHEMAS[name]
        values = read_yaml(file)
        values |= {n: v for n, v in overrides.items() if n in schema.model_fields}
        try:
            read[name] = validate(schema, values, where=f"params/{study}/{file.name}")
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
