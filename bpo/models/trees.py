"""Sequences that begin alike as a tree: each token of a common beginning stands once.

The longest sequence of a tree stands first, whole. Each other one takes over the columns of the
placed sequence that it begins most alike with, and the rest of it follows as a branch. So an image
stands once, its questions are branches, answers are their branches, and a later turn hangs on the
answer that it follows. A token sees what is before it on its own path, and counts its position
along that path. The last token of an answer, which predicts nothing that counts, is left out, but
where a later turn needs it.
"""

import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

Span = tuple[int, int, int]  # columns of a sequence: its begin, the end of its prompt, its end
# (row, begin and end of a branch, then begin and end of each range that it hangs on)
Branch = tuple[int, ...]
Table = tuple[Branch, ...]
VERSION = 1  # of the layout: kept log-probs of another one differ in their last bits


def layout(ids: torch.Tensor, spans: Sequence[Span], owners: Sequence[Hashable], *,
           rows: bool = False, limit: float = math.inf) -> dict[str, Any]:
    """Where every token of N padded sequences (N, S) goes when they are packed.

    spans[n]: the columns of sequence n. owners[n]: equal for sequences that may share a tree, which
    must have the same images, all of them where the sequences are still alike.
    rows: every tree in a row of its own, padded, for a dense mask; else all in one row, unpadded.
    limit: tokens of a tree; what does not fit goes into a further one.

    Returns index tensors, all into flattened layouts:
    source (R, W): the padded token that stands at each packed place.
    anchor, step (R, W): its position is that of the padded token `anchor` plus `step`.
    alive (R, W): False at padding. first (T,): the longest sequence of each tree.
    places (N, S): the packed place of every padded token, -1 where none is its.
    answers (M,): the packed places that predict an answer's token, one as often as it predicts
    different ones. targets (M,): the padded tokens that they predict.
    slots (N, S - 1): for every padded place the entry among the M that predicts its next token, or
    M where none does.
    table: a `Branch` for each, by columns; the first of a tree hangs on nothing.
    """
    tokens, width = ids.cpu().numpy(), ids.shape[1]
    sequences = [t[begin:end] for t, (begin, _, end) in zip(tokens, spans, strict=True)]
    groups: dict[Hashable, list[int]] = {}
    for n, owner in enumerate(owners):
        groups.setdefault(owner, []).append(n)
    packed: list[list[tuple[int, int, int]]] = []  # of each row (source, anchor, step)
    table, first, homes = [], [], torch.zeros(len(spans), 1, dtype=torch.long)
    columns = torch.full((len(spans), width), -1)
    for members in groups.values():
        paths: dict[int, list[int]] = {}  # of the open tree: each sequence's columns
        head = start = 0  # its longest sequence and its first column
        for n in sorted(members, key=lambda n: spans[n][0] - spans[n][2]):  # the longest first
            begin, own = spans[n][0], sequences[n]
            shared, parent = max(((min(_common(own, sequences[m]), len(p)), -m)
                                  for m, p in paths.items()), default=(0, 0))
            if not paths or len(packed[-1]) - start + len(own) - shared > limit:
                if rows or not packed:
                    packed.append([])
                paths, shared, head, start = {}, 0, n, len(packed[-1])
                first.append(n)
            row, at = packed[-1], len(packed[-1])
            parted = _common(own, sequences[head])
            row += [(n * width + begin + i, head * width + spans[head][0] + min(i, parted),
                     max(i - parted, 0)) for i in range(shared, len(own) - 1)]
            above = paths[-parent][:shared] if shared else []
            paths[n] = [*above, *range(at, len(row))]
            columns[n, begin:begin + len(paths[n])] = torch.tensor(paths[n], dtype=torch.long)
            homes[n] = len(packed) - 1
            if len(row) > at:
                table.append((len(packed) - 1, at, len(row), *_ranges(above)))
    cells = pad_sequence([torch.tensor(row, dtype=torch.long).view(-1, 3) for row in packed],
                         batch_first=True)
    longest = cells.shape[1]
    source, anchor, step = cells.unbind(-1)
    places = torch.where(columns < 0, -1, columns + homes * longest)
    # The place that predicts an answer's first token: its prompt's last, if there is a prompt.
    lasts, ends = torch.tensor([(max(p - 1, b), e - 1) for b, p, e in spans]).T[..., None]
    column = torch.arange(max(width - 1, 0))
    n, c = ((column >= lasts) & (column < ends)).nonzero().T
    pairs, entry = torch.stack([places[n, c], ids.cpu()[n, c + 1]]).unique(
        dim=1, return_inverse=True)
    targets = torch.empty(pairs.shape[1], dtype=torch.long)
    targets[entry] = n * width + c + 1
    slots = torch.full((len(spans), len(column)), len(targets))
    slots[n, c] = entry
    return {"source": source, "anchor": anchor, "step": step, "table": table, "places": places,
            "alive": torch.arange(longest) < torch.tensor([len(r) for r in packed])[:, None],
            "first": torch.tensor(first), "answers": pairs[0], "targets": targets, "slots": slots}


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two sequences share at their begin."""
    length = min(len(one), len(other))
    apart = np.flatnonzero(one[:length] != other[:length])
    return int(apart[0]) if len(apart) else length


def _ranges(columns: Sequence[int]) -> list[int]:
    """Columns as begin and end of each unbroken range, one after the other."""
    found = np.array(columns, dtype=int)
    parts = np.split(found, np.flatnonzero(np.diff(found) != 1) + 1)
    return [edge for part in parts if len(part) for edge in (int(part[0]), int(part[-1]) + 1)]


def tensor(table: Sequence[Branch]) -> torch.Tensor:
    """(1, 1, branches, columns) integers of a table: what attention is handed for a mask."""
    return pad_sequence([torch.tensor(b) for b in table], batch_first=True)[None, None]


def read(mask: torch.Tensor) -> Table:
    """The table of such a tensor, whose empty ranges are padding."""
    return tuple(map(tuple, mask[0, 0].tolist()))


def dense(placed: Mapping[str, Any]) -> torch.Tensor:
    """(R, 1, W, W) bool: what each packed place may see. Padding sees itself and its row's first
    token: no row of the softmax is empty, and no hidden state is zero where padding is embedded as
    zero, which in a norm without an epsilon (Gemma 3n's) makes all gradients NaN."""
    count, width = placed["alive"].shape
    seen = torch.stack([_seen([b for b in placed["table"] if b[0] == row], 0, width)
                        for row in range(count)])
    seen[:, :, 0] |= ~placed["alive"].to(seen.device)
    return seen[:, None]


def _seen(branches: Sequence[Branch], begin: int, end: int) -> torch.Tensor:
    """(W, W) bool of the columns from `begin` to `end`: what each may see."""
    seen = torch.eye(end - begin, dtype=torch.bool)
    for _, first, last, *above in branches:
        mine = slice(first - begin, last - begin)
        seen[mine, mine] = torch.ones(last - first, last - first, dtype=torch.bool).tril()
        for a, b in zip(above[::2], above[1::2], strict=True):
            seen[mine, a - begin:b - begin] = True
    return seen


def path(branch: Branch) -> int:
    """Tokens that the last one of a branch sees."""
    return sum(branch[2::2]) - sum(branch[1::2])


class Masked(NamedTuple):
    """A tree's columns: begin, end of its first sequence, end; and the mask (1, 1, x, tree), 0 or
    minus infinity, of the x that branch off."""

    row: int
    begin: int
    middle: int
    end: int
    mask: torch.Tensor


@functools.lru_cache(maxsize=2)  # a batch's, and that of its damaged images: not once a layer
def masks(table: Table, device: torch.device, dtype: torch.dtype) -> list[Masked]:
    """The mask of each tree's branches."""
    starts = [n for n, b in enumerate(table) if not any(b[3:])]
    out = []
    for n, m in zip(starts, [*starts[1:], len(table)], strict=True):
        (row, begin, middle, *_), end = table[n], table[m - 1][2]
        seen = _seen(table[n:m], begin, end)[middle - begin:]
        mask = torch.zeros(1, 1, *seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
        out.append(Masked(row, begin, middle, end, mask.to(device)))
    return out


class Ranges(NamedTuple):
    """What a call of attention over variable lengths takes: the columns of all keys, range by
    range, and where each branch's queries and keys begin and end."""

    keys: torch.Tensor
    cu_seq_q: torch.Tensor
    cu_seq_k: torch.Tensor
    max_q: int
    max_k: int


@functools.lru_cache(maxsize=2)
def ranges(table: Table, device: torch.device) -> Ranges:
    """Each branch's queries are its own columns, its keys those of its path. Its last key stands
    beside its last query, so causal attention is aligned at the bottom right."""
    keys = [torch.cat([torch.arange(a, b) for a, b in zip(
        [*above[::2], first], [*above[1::2], last], strict=True)])
        for _, first, last, *above in table]
    queries = [last - first for _, first, last, *_ in table]
    cu_q, cu_k = (torch.tensor([0, *s]).cumsum(0).to(device, torch.int32)
                  for s in (queries, list(map(len, keys))))
    return Ranges(torch.cat(keys).to(device), cu_q, cu_k, max(queries), max(map(len, keys)))
