"""Training of the tiny model: its tower (phase 0), its text model (A), their alignment (B).

The tower is frozen after phase 0, so phase B runs it once over all images and keeps the features.
"""

from collections.abc import Callable, Sequence
from itertools import count, repeat

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from bpo.params import TinyWorld
from bpo.study import progress
from bpo.study.seeds import seed_for, torch_generator
from bpo.tiny import data, model
from bpo.tiny.world import CELLS, COLOURS, OBJECTS, Scene, python_generator, uniform_scene

IGNORED = -100  # a label that carries no loss
TEXT_BATCH = 24  # documents a step, of similar length
TEXT_ROWS_IN_ALIGNMENT = 8  # text-only documents beside each mixed batch: the language is not lost
EVALUATION_BATCH = 250  # pictures
CLASSES = [len(OBJECTS) + 1, len(COLOURS) + 1]  # of a cell: an empty one has no object, no colour

Encoded = tuple[list[int], list]  # token ids, and a label or a weight of each


def parts(p: TinyWorld) -> dict[str, float]:
    """What is trained for a world, and about how many seconds it takes on one core."""
    return {"vision tower": p.tower_steps * p.tower_batch / 600, "text model": p.text_steps / 14,
            "alignment: captions": p.caption_steps * p.caption_batch / 210,
            "alignment: all questions": p.mixed_steps * p.mixed_batch / 92}


def fit(parameters: list[nn.Parameter], loss_of: Callable[[int], Tensor], *, steps: int,
        rate: float, title: str) -> None:
    """Minimise `loss_of(step)` with AdamW, a short warm-up and a cosine."""
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    warm_up = max(1, min(40, steps // 10))
    schedule = torch.optim.lr_scheduler.SequentialLR(optimiser, [
        torch.optim.lr_scheduler.LinearLR(optimiser, 0.05, 1.0, warm_up),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps - warm_up), rate / 50),
    ], [warm_up])
    with progress.part(title, steps, unit="steps") as advance:
        for step in range(steps):
            loss_of(step).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            advance()


# Phase 0: the vision tower


def tower_features(multimodal: LlavaForConditionalGeneration, processor: LlavaProcessor,
                   scenes: Sequence[Scene]) -> Tensor:
    """What the projector receives of each scene: (n, 16, vision width)."""
    states = multimodal.model.vision_tower(model.pixel_values(processor, scenes),
                                           output_hidden_states=True).hidden_states
    return states[multimodal.config.vision_feature_layer][:, 1:]


def cell_labels(scenes: Sequence[Scene]) -> Tensor:
    """(n, 4, 2): object and colour of each cell, with the last class for an empty one."""
    labels = [[[len(OBJECTS), len(COLOURS)]] * CELLS for _ in scenes]
    for of_scene, scene in zip(labels, scenes, strict=True):
        for thing in scene.things:
            of_scene[thing.cell] = [OBJECTS.index(thing.name), COLOURS.index(thing.colour)]
    return torch.tensor(labels)


def per_cell(features: Tensor) -> Tensor:
    """(n, 16, d) in reading order of the patches to (n, 4, 4, d): cell, patch of the cell."""
    n, _, width = features.shape
    grid = features.view(n, 2, 2, 2, 2, width)  # cell row, patch row, cell column, patch column
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(n, CELLS, 4, width)


def seeing_model(processor: LlavaProcessor, p: TinyWorld
                 ) -> tuple[LlavaForConditionalGeneration, dict[str, float]]:
    """A model whose tower has learnt which object and colour each patch belongs to, on scenes
    without statistics (a stand-in for CLIP), and whose language model knows nothing; the tower's
    accuracies by cell on 500 other scenes."""
    multimodal = model.build_multimodal_model(processor.tokenizer, p)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(p.seed, "tower heads"))
        heads = nn.Linear(p.vision_width, sum(CLASSES))
    rng = python_generator(p.seed, "tower scenes")

    def logits(scenes: list[Scene]) -> tuple[Tensor, ...]:
        """Object and colour logits of each patch, (n, 4, 4, 11) and (n, 4, 4, 9)."""
        features = per_cell(tower_features(multimodal, processor, scenes))
        return heads(features).split(CLASSES, dim=-1)

    def loss_of(step: int) -> Tensor:
        scenes = [uniform_scene(rng) for _ in range(p.tower_batch)]
        labels = cell_labels(scenes)[:, :, None].expand(-1, -1, 4, -1)
        objects, colours = logits(scenes)
        # colours are learned at once, objects slowly: they weigh double
        return (2 * functional.cross_entropy(objects.flatten(0, 2), labels[..., 0].flatten())
                + functional.cross_entropy(colours.flatten(0, 2), labels[..., 1].flatten()))

    multimodal.train()
    fit([*multimodal.model.vision_tower.parameters(), *heads.parameters()], loss_of,
        steps=p.tower_steps, rate=p.tower_rate, title="vision tower")
    multimodal.eval()
    rng = python_generator(p.seed, "tower held-out scenes")
    scenes = [uniform_scene(rng) for _ in range(500)]
    labels = cell_labels(scenes)
    occupied = labels[..., 0] < len(OBJECTS)
    with torch.no_grad():
        predicted = [part.log_softmax(-1).mean(2).argmax(-1) for part in logits(scenes)]
    right = [(part == labels[..., i]).float() for i, part in enumerate(predicted)]
    return multimodal, {"object_accuracy": float(right[0][occupied].mean()),
                        "colour_accuracy": float(right[1][occupied].mean()),
                        "empty_accuracy": float(right[0][~occupied].mean())}


# Phase A: the text model


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: list[dict]) -> list[Encoded]:
    """Ids and labels of text-only documents; a user's words carry no loss."""
    prompts = [f"<s>user: {d['user']}\nassistant:" if d["user"] else "<s>" for d in documents]
    answers = [d["assistant"] + "</s>" for d in documents]
    return [(prompt + answer, [IGNORED] * len(prompt) + answer) for prompt, answer in zip(
        tokenizer(prompts).input_ids, tokenizer(answers).input_ids, strict=True)]


def text_batch(rows: list[Encoded], pad: int) -> dict[str, Tensor]:
    """Documents padded on the right: ids, mask and labels of shape (n, longest)."""
    ids, labels = (pad_sequence([torch.tensor(row[i]) for row in rows], batch_first=True,
                                padding_value=value) for i, value in enumerate((pad, IGNORED)))
    return {"input_ids": ids, "attention_mask": (ids != pad).long(), "labels": labels}


def length_batches(lengths: list[int], *, size: int, steps: int, generator: torch.Generator
                   ) -> list[list[int]]:
    """`steps` batches of `size` indices, of similar length within a batch, in random order."""
    batches: list[list[int]] = []
    while len(batches) < steps:
        order = torch.randperm(len(lengths), generator=generator).tolist()
        for start in range(0, len(order), 32 * size):
            chunk = sorted(order[start:start + 32 * size], key=lambda i: lengths[i])
            batches += [chunk[i:i + size] for i in range(0, len(chunk), size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()][:steps]


def text_model(tokenizer: PreTrainedTokenizerFast, documents: list[dict], p: TinyWorld
               ) -> tuple[LlamaForCausalLM, dict[str, float]]:
    """A language model that has read the documents but the last (a twentieth, at most 500), and
    its perplexity on the answers of those."""
    language = model.build_language_model(tokenizer, p)
    rows = encode_documents(tokenizer, documents)
    last = min(500, max(1, len(rows) // 20))
    rows, held_out = rows[:-last], rows[-last:]
    batches = length_batches([len(ids) for ids, _ in rows], size=TEXT_BATCH, steps=p.text_steps,
                             generator=torch_generator(p.seed, "text order"))

    def loss_of(step: int) -> Tensor:
        return language(**text_batch([rows[i] for i in batches[step]],
                                     tokenizer.pad_token_id)).loss

    language.train()
    fit(list(language.parameters()), loss_of, steps=p.text_steps, rate=p.text_rate,
        title="text model")
    language.eval()
    with torch.no_grad():
        loss = language(**text_batch(held_out, tokenizer.pad_token_id)).loss
    return language, {"perplexity": float(loss.exp())}


# Phase B: alignment


def encode_branches(tokenizer: PreTrainedTokenizerFast, rows: list[dict],
                    weights: dict[str, float]) -> list[Encoded]:
    """For each row of an image whose category has a weight: the ids after the image, and the weight
    of each as a label."""
    branches = []
    for row in rows:
        if row["category"] in weights:
            question = tokenizer(f"{row['question']}\nassistant:").input_ids
            answer = tokenizer(f"{row['answer']}</s>").input_ids
            branches.append((question + answer, [0.0] * len(question)
                             + [weights[row["category"]]] * len(answer)))
    return branches


def branched_batch(images: list[list[Encoded]], prefix: list[int]) -> dict[str, Tensor]:
    """One sequence an image: the shared prefix, then its rows as branches that do not see each
    other. Equal to one sequence a row, at about half the cost.

    Returns ids and positions (n, length), the additive mask (n, 1, length, length), next-token
    targets and their weights (n, length).
    """
    sequences = []
    for rows in images:
        # of each token: id, position, branch (1: the prefix; 0: padding), target, weight
        tokens = [(token, place, 1, 0, 0.0) for place, token in enumerate(prefix)]
        for number, (ids, weights) in enumerate(rows, 2):
            tokens += zip(ids, count(len(prefix)), repeat(number), [*ids[1:], 0],
                          [*weights[1:], 0.0])
        sequences.append(torch.tensor(tokens))
    table = pad_sequence(sequences, batch_first=True)
    ids, positions, branch, targets = table[..., :4].long().unbind(-1)
    seen = (branch[:, :, None] == branch[:, None, :]) | (branch[:, None, :] == 1)
    mask = torch.zeros(seen.shape).masked_fill(~seen.tril(), torch.finfo(torch.float32).min)
    return {"ids": ids, "positions": positions, "mask": mask[:, None], "targets": targets,
            "weights": table[..., 4]}


def alignment_loss(multimodal: LlavaForConditionalGeneration, features: Tensor,
                   batch: dict[str, Tensor]) -> Tensor:
    """Weighted mean cross-entropy of the answers' tokens; `features` are (n, 16, vision width)."""
    embedded = multimodal.model.get_input_embeddings()(batch["ids"])
    places = (batch["ids"] == multimodal.config.image_token_id)[..., None]
    embedded = embedded.masked_scatter(places, multimodal.model.multi_modal_projector(features))
    hidden = multimodal.model.language_model(
        inputs_embeds=embedded, attention_mask=batch["mask"], position_ids=batch["positions"],
        use_cache=False).last_hidden_state
    answered = batch["weights"] > 0
    losses = functional.cross_entropy(multimodal.lm_head(hidden[answered]),
                                      batch["targets"][answered], reduction="none")
    weights = batch["weights"][answered]
    return (losses * weights).sum() / weights.sum()


def text_loss(multimodal: LlavaForConditionalGeneration, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy of the documents' answers."""
    hidden = multimodal.model.language_model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
        use_cache=False).last_hidden_state[:, :-1]
    return functional.cross_entropy(multimodal.lm_head(hidden).flatten(0, 1),
                                    batch["labels"][:, 1:].flatten(), ignore_index=IGNORED)


def align(multimodal: LlavaForConditionalGeneration, processor: LlavaProcessor,
          language: LlamaForCausalLM, scenes: list[Scene], documents: list[dict], p: TinyWorld
          ) -> None:
    """`multimodal` adopts the language model's weights and learns, in place, to answer about the
    scenes: first captions alone, then all questions beside a few text-only documents. Projector and
    language model are trained, the tower stays frozen."""
    multimodal.model.language_model.load_state_dict(language.model.state_dict())
    rng = python_generator(p.seed, "more alignment rows")
    rows = [of_scene + data.more_rows(scene, rng, colours=p.alignment_colours,
                                      presences=p.alignment_presences)
            for of_scene, scene in zip(data.split_rows(scenes, "alignment", p.seed), scenes,
                                       strict=True)]
    with torch.no_grad():
        features = torch.cat([
            tower_features(multimodal, processor, scenes[start:start + EVALUATION_BATCH])
            for start in range(0, len(scenes), EVALUATION_BATCH)])
    tokenizer = processor.tokenizer
    texts = encode_documents(tokenizer, documents)
    prefix = tokenizer("<s>user: " + model.IMAGE_TOKEN * model.IMAGE_TOKENS).input_ids
    trained = [*multimodal.model.multi_modal_projector.parameters(),
               *multimodal.model.language_model.parameters()]  # the head is tied to the embeddings

    def phase(title: str, weights: dict[str, float], *, batch: int, steps: int, rate: float,
              with_text: bool) -> None:
        images = [encode_branches(tokenizer, of_scene, weights) for of_scene in rows]
        generator = torch_generator(p.seed, title)
        order: list[int] = []

        def loss_of(step: int) -> Tensor:
            while len(order) < batch:
                order.extend(torch.randperm(len(images), generator=generator).tolist())
            chosen = [order.pop() for _ in range(batch)]
            loss = alignment_loss(multimodal, features[chosen],
                                  branched_batch([images[i] for i in chosen], prefix))
            if not with_text:
                return loss
            picked = torch.randint(len(texts), (TEXT_ROWS_IN_ALIGNMENT,), generator=generator)
            return loss + 0.1 * text_loss(multimodal, text_batch(
                [texts[i] for i in picked.tolist()], tokenizer.pad_token_id))

        fit(trained, loss_of, steps=steps, rate=rate, title=title)

    multimodal.train()
    phase("alignment: captions", {"caption": 1.0}, batch=p.caption_batch, steps=p.caption_steps,
          rate=p.caption_rate, with_text=False)
    phase("alignment: all questions",
          {"caption": 1.0, "attribute": 1.0, "presence": p.presence_weight}, batch=p.mixed_batch,
          steps=p.mixed_steps, rate=p.mixed_rate, with_text=True)
    multimodal.eval()
