"""Training of the tiny model: its tower (phase 0), its text model (A), their alignment (B).

The tower is frozen after phase 0, so phase B runs it once over all images and keeps the features.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from bpo.study.seeds import seed_for, torch_generator
from bpo.tiny.drawing import scene_array
from bpo.tiny.model import IMAGE_TOKEN, IMAGE_TOKENS, pixel_values
from bpo.tiny.world import CELLS, COLOURS, OBJECTS, python_generator, uniform_scene

IGNORED = -100  # a label that carries no loss
TEXT_BATCH = 24  # documents a step, of similar length
TEXT_ROWS_IN_ALIGNMENT = 8  # text-only documents beside each mixed batch: the language is not lost
EVALUATION_BATCH = 250  # pictures


def fit(parameters: list[nn.Parameter], loss_of: Callable[[int], Tensor], *, steps: int,
        rate: float, title: str) -> float:
    """Minimise `loss_of(step)` with AdamW, a short warm-up and a cosine; mean loss of the last
    tenth."""
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    warm_up = max(1, min(40, steps // 10))
    schedule = torch.optim.lr_scheduler.SequentialLR(optimiser, [
        torch.optim.lr_scheduler.LinearLR(optimiser, 0.05, 1.0, warm_up),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps - warm_up), rate / 50),
    ], [warm_up])
    losses = []
    for step in tqdm(range(steps), desc=title, leave=False):
        loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        losses.append(loss.detach())
    return float(torch.stack(losses[-max(1, steps // 10):]).mean()) if losses else float("nan")


# Phase 0: the vision tower


def tower_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """What the projector receives: (n, 16, vision width) from (n, 3, 64, 64)."""
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    return states[model.config.vision_feature_layer][:, 1:]


def cell_labels(scenes) -> Tensor:
    """(n, 4, 2): object and colour of each cell, with the last class for an empty one."""
    labels = [[[len(OBJECTS), len(COLOURS)] for _ in range(CELLS)] for _ in scenes]
    for own, scene in zip(labels, scenes):
        for thing in scene.things:
            own[thing.cell] = [OBJECTS.index(thing.name), COLOURS.index(thing.colour)]
    return torch.tensor(labels)


def per_cell(features: Tensor) -> Tensor:
    """(n, 16, d) in reading order of the patches to (n, 4, 4, d): cell, patch of the cell."""
    n, _, width = features.shape
    grid = features.view(n, 2, 2, 2, 2, width)  # cell row, patch row, cell column, patch column
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(n, CELLS, 4, width)


def train_tower(model: LlavaForConditionalGeneration, processor, *, steps: int, batch: int,
                rate: float, seed: int) -> dict:
    """Teach the tower which object and colour each patch belongs to, on scenes without statistics
    (a stand-in for CLIP); accuracy per occupied cell on 500 other scenes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "tower heads"))
        heads = nn.Linear(model.config.vision_config.hidden_size, len(OBJECTS) + len(COLOURS) + 2)
    classes = [len(OBJECTS) + 1, len(COLOURS) + 1]
    rng = python_generator(seed, "tower scenes")

    def loss_of(step: int) -> Tensor:
        scenes = [uniform_scene(rng) for _ in range(batch)]
        labels = cell_labels(scenes)[:, :, None].expand(-1, -1, 4, -1)
        objects, colours = split_scores(model, processor, heads, scenes, classes)
        # colours are learned at once, objects slowly: they weigh double
        return (2 * functional.cross_entropy(objects.flatten(0, 2), labels[..., 0].flatten())
                + functional.cross_entropy(colours.flatten(0, 2), labels[..., 1].flatten()))

    model.train()
    fit([*model.model.vision_tower.parameters(), *heads.parameters()], loss_of, steps=steps,
        rate=rate, title="vision tower")
    model.eval()
    rng = python_generator(seed, "tower held-out scenes")
    scenes = [uniform_scene(rng) for _ in range(500)]
    labels = cell_labels(scenes)
    occupied = labels[..., 0] < len(OBJECTS)
    with torch.no_grad():
        found = [part.log_softmax(-1).mean(2).argmax(-1)
                 for part in split_scores(model, processor, heads, scenes, classes)]
    return {
        "object_accuracy": float((found[0] == labels[..., 0])[occupied].float().mean()),
        "colour_accuracy": float((found[1] == labels[..., 1])[occupied].float().mean()),
        "empty_accuracy": float((found[0] == labels[..., 0])[~occupied].float().mean()),
    }


def split_scores(model, processor, heads: nn.Linear, scenes, classes: list[int]):
    """Object and colour logits of each patch, (n, 4, 4, 11) and (n, 4, 4, 9)."""
    pixels = pixel_values(processor, scene_array(scenes))
    return heads(per_cell(tower_features(model, pixels))).split(classes, dim=-1)


# Phase A: the text model


def encode_documents(tokenizer, documents: list[dict]) -> list[tuple[list[int], list[int]]]:
    """(token ids, labels) of text-only documents; a user's words carry no loss."""
    prompts = [f"<s>user: {d['user']}\nassistant:" if d["user"] else "<s>" for d in documents]
    prompt_ids = tokenizer(prompts).input_ids
    answer_ids = tokenizer([d["assistant"] + "</s>" for d in documents]).input_ids
    return [(prompt + answer, [IGNORED] * len(prompt) + answer)
            for prompt, answer in zip(prompt_ids, answer_ids)]


def text_batch(rows: list[tuple[list[int], list[int]]], pad: int) -> dict[str, Tensor]:
    """Documents padded on the right: ids, mask and labels of shape (n, longest)."""
    longest = max(len(ids) for ids, _ in rows)
    room = [longest - len(ids) for ids, _ in rows]
    return {
        "input_ids": torch.tensor([ids + [pad] * n for (ids, _), n in zip(rows, room)]),
        "attention_mask": torch.tensor([[1] * (longest - n) + [0] * n for n in room]),
        "labels": torch.tensor([labels + [IGNORED] * n for (_, labels), n in zip(rows, room)]),
    }


def length_batches(lengths: list[int], *, size: int, steps: int, generator: torch.Generator):
    """`steps` batches of `size` indices, of similar length within a batch, in random order."""
    batches: list[list[int]] = []
    while len(batches) < steps:
        order = torch.randperm(len(lengths), generator=generator).tolist()
        for start in range(0, len(order), 32 * size):
            chunk = sorted(order[start:start + 32 * size], key=lambda i: lengths[i])
            batches += [chunk[i:i + size] for i in range(0, len(chunk), size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()][:steps]


def train_language_model(language: LlamaForCausalLM, tokenizer, documents: list[dict], *,
                         steps: int, rate: float, seed: int) -> dict:
    """Next-token training on the text corpus; perplexity of answers on its last documents (a
    twentieth, at most 500), which are held out."""
    rows = encode_documents(tokenizer, documents)
    kept = len(rows) - min(500, max(1, len(rows) // 20))
    rows, held_out = rows[:kept], rows[kept:]
    batches = length_batches([len(ids) for ids, _ in rows], size=TEXT_BATCH, steps=steps,
                             generator=torch_generator(seed, "text order"))
    language.train()
    fit(list(language.parameters()),
        lambda step: language(**text_batch([rows[i] for i in batches[step]],
                                           tokenizer.pad_token_id)).loss,
        steps=steps, rate=rate, title="text model")
    language.eval()
    with torch.no_grad():
        loss = language(**text_batch(held_out, tokenizer.pad_token_id)).loss
    return {"perplexity": float(loss.exp())}


# Phase B: alignment


def all_features(model: LlavaForConditionalGeneration, processor, scenes) -> Tensor:
    """The frozen tower's features of every scene, (n, 16, vision width)."""
    batches = [scenes[i:i + EVALUATION_BATCH] for i in range(0, len(scenes), EVALUATION_BATCH)]
    with torch.no_grad():
        return torch.cat([tower_features(model, pixel_values(processor, scene_array(batch)))
                          for batch in batches])


def encode_branches(tokenizer, rows: list[dict], weights: dict[str, float]):
    """For each row of an image: the ids after the image, and the weight of each as a label."""
    branches = []
    for row in rows:
        question = tokenizer(f"{row['question']}\nassistant:").input_ids
        answer = tokenizer(f"{row['answer']}</s>").input_ids
        weight = weights[row["category"]]
        branches.append((question + answer, [0.0] * len(question) + [weight] * len(answer)))
    return branches


def branched_batch(images: list[list[tuple[list[int], list[float]]]], prefix: list[int]) -> dict:
    """One sequence an image: the shared prefix, then its rows as branches that do not see each
    other. Equal to one sequence a row, at about half the cost.

    Returns ids and positions (n, length), the additive mask (n, 1, length, length), next-token
    targets and their weights (n, length).
    """
    longest = len(prefix) + max(sum(len(ids) for ids, _ in rows) for rows in images)
    shape = (len(images), longest)
    ids, targets = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    positions, branch = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
    weights = torch.zeros(shape)
    for i, rows in enumerate(images):
        start = len(prefix)
        ids[i, :start], branch[i, :start] = torch.tensor(prefix), 0
        positions[i, :start] = torch.arange(start)
        for number, (tokens, weight) in enumerate(rows, 1):
            stop = start + len(tokens)
            ids[i, start:stop], branch[i, start:stop] = torch.tensor(tokens), number
            positions[i, start:stop] = len(prefix) + torch.arange(len(tokens))
            targets[i, start:stop - 1] = ids[i, start + 1:stop]
            weights[i, start:stop - 1] = torch.tensor(weight[1:])
            start = stop
    causal = torch.ones(longest, longest).tril().bool()
    same = branch[:, :, None] == branch[:, None, :]
    seen = causal & (same | (branch[:, None, :] == 0))
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return {"ids": ids, "positions": positions, "mask": mask[:, None], "targets": targets,
            "weights": weights}


def alignment_loss(model: LlavaForConditionalGeneration, features: Tensor, batch: dict) -> Tensor:
    """Weighted mean cross-entropy of the answers' tokens; `features` are (n, 16, vision width)."""
    embedded = model.model.get_input_embeddings()(batch["ids"])
    places = (batch["ids"] == model.config.image_token_id)[..., None]
    embedded = embedded.masked_scatter(places, model.model.multi_modal_projector(features))
    hidden = model.model.language_model(
        inputs_embeds=embedded, attention_mask=batch["mask"], position_ids=batch["positions"],
        use_cache=False).last_hidden_state
    asked = batch["weights"] > 0
    losses = functional.cross_entropy(model.lm_head(hidden[asked]), batch["targets"][asked],
                                      reduction="none")
    weights = batch["weights"][asked]
    return (losses * weights).sum() / weights.sum()


def align(model: LlavaForConditionalGeneration, tokenizer, features: Tensor,
          rows: list[list[dict]], documents: list[dict], *, steps: int, batch: int, rate: float,
          weights: dict[str, float], title: str, seed: int) -> float:
    """Train projector and language model on the images' rows whose category is in `weights`, with
    a few text-only `documents` a step; the tower stays frozen. Returns the last losses' mean."""
    images = [encode_branches(tokenizer, [row for row in image if row["category"] in weights],
                              weights) for image in rows]
    texts = encode_documents(tokenizer, documents) if documents else []
    prefix = tokenizer("<s>user: " + IMAGE_TOKEN * IMAGE_TOKENS).input_ids
    generator = torch_generator(seed, title)
    trained = [*model.model.multi_modal_projector.parameters(),
               *model.model.language_model.parameters()]  # the head is tied to the embeddings
    order: list[int] = []

    def loss_of(step: int) -> Tensor:
        while len(order) < batch:
            order.extend(torch.randperm(len(images), generator=generator).tolist())
        chosen = [order.pop() for _ in range(batch)]
        loss = alignment_loss(model, features[chosen],
                              branched_batch([images[i] for i in chosen], prefix))
        if texts:
            picked = torch.randint(len(texts), (TEXT_ROWS_IN_ALIGNMENT,), generator=generator)
            text = text_batch([texts[i] for i in picked.tolist()], tokenizer.pad_token_id)
            hidden = model.model.language_model(
                input_ids=text["input_ids"], attention_mask=text["attention_mask"],
                use_cache=False).last_hidden_state[:, :-1]
            loss = loss + 0.1 * functional.cross_entropy(
                model.lm_head(hidden).flatten(0, 1), text["labels"][:, 1:].flatten(),
                ignore_index=IGNORED)
        return loss

    model.train()
    final = fit(trained, loss_of, steps=steps, rate=rate, title=title)
    model.eval()
    return final
