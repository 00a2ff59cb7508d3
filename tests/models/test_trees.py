"""Where tokens stand in a tree, what they see, and that both ways of calling attention agree."""

import math

import pytest
import torch
from helpers.trees import ancestor_forgotten, siblings_seen

from bpo.models import prefix, trees

# Prompts of 3 and 4 tokens on one begin; answers that begin alike, and one that is another's begin.
IDS = torch.tensor([[9, 1, 2, 3, 4, 5, 0], [9, 1, 2, 6, 7, 0, 0], [9, 1, 2, 3, 8, 0, 0],
                    [9, 1, 5, 5, 3, 3, 2], [9, 1, 5, 5, 4, 4, 0]])
SPANS = [(0, 3, 6), (0, 3, 5), (0, 3, 5), (0, 4, 7), (0, 4, 6)]


def test_a_token_that_sequences_share_stands_once():
    """The last of each predicts nothing and is left out; the longest comes first."""
    placed = trees.layout(IDS, SPANS, [0] * 5)
    assert IDS.flatten()[placed["source"]].tolist() == [[9, 1, 5, 5, 3, 3, 2, 3, 4, 4, 6]]
    assert placed["table"] == [(0, 0, 6), (0, 6, 9, 0, 2), (0, 9, 10, 0, 4),
                               (0, 10, 11, 0, 2, 6, 7)]
    assert placed["first"].tolist() == [3]
    assert trees.dense(placed)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1]]
    # Positions are those along a path, all counted from the longest sequence's.
    position = placed["anchor"] % IDS.shape[1] + placed["step"]
    assert position.tolist() == [[0, 1, 2, 3, 4, 5, 2, 3, 4, 4, 3]]


def test_every_answer_s_token_is_predicted_once_at_its_place():
    placed = trees.layout(IDS, SPANS, [0] * 5)
    found = torch.cat([placed["answers"], torch.tensor([-1])])[placed["slots"]]
    assert found.tolist() == [[-1, -1, 6, 7, 8, -1], [-1, -1, 6, 10, -1, -1],
                              [-1, -1, 6, 7, -1, -1], [-1, -1, -1, 3, 4, 5],
                              [-1, -1, -1, 3, 9, -1]]
    tokens = torch.cat([IDS.flatten()[placed["targets"]], torch.tensor([-1])])[placed["slots"]]
    there = placed["slots"] < len(placed["targets"])
    assert torch.equal(tokens[there], IDS[:, 1:][there])
    assert len(placed["targets"]) == 11  # of 12: sequences 0 and 2 both go on with a 3
    assert placed["places"][0].tolist() == [0, 1, 6, 7, 8, -1, -1]


def test_a_last_token_stands_where_a_later_turn_needs_it():
    ids = torch.tensor([[9, 1, 2, 3, 0], [9, 1, 2, 3, 4]])
    placed = trees.layout(ids, [(0, 2, 4), (0, 3, 5)], [0, 0])
    assert placed["table"] == [(0, 0, 4)]
    assert placed["places"].tolist() == [[0, 1, 2, 3, -1], [0, 1, 2, 3, -1]]


def test_trees_share_a_row_without_padding_or_have_one_each_with_it():
    ids = torch.tensor([[1, 2, 3, 4, 0], [0, 1, 2, 3, 5]])
    together = trees.layout(ids, [(0, 2, 4), (1, 3, 5)], [0, 1])
    assert together["source"].shape == (1, 6) and together["alive"].all()
    apart = trees.layout(ids, [(0, 2, 4), (1, 3, 5)], [0, 1], rows=True)
    assert apart["source"].shape == (2, 3)
    seen = trees.dense(together)[0, 0]
    assert not seen[3:, :3].any() and not seen[:3, 3:].any()


def test_padding_sees_a_token_of_its_row_and_no_token_sees_padding():
    """A hidden state that sees nothing is zero where the padding token is embedded as zero."""
    placed = trees.layout(torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]]),
                          [(0, 2, 5), (0, 2, 3)], [0, 1], rows=True)
    assert placed["alive"].sum(1).tolist() == [4, 2]
    assert trees.dense(placed)[1, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0],
                                                        [1, 0, 0, 1]]


def test_a_tree_holds_no_more_tokens_than_its_limit():
    whole = trees.layout(IDS, SPANS, [0] * 5)
    for limit in range(1, 13):
        cut = trees.layout(IDS, SPANS, [0] * 5, limit=limit)
        starts = [b[1] for b in cut["table"] if len(b) == 3] + [cut["source"].shape[1]]
        longest = max(b - a for a, b in zip(starts, starts[1:], strict=False))
        assert longest <= max(limit, 6)  # a sequence is whole
        assert len(cut["first"]) == len(starts) - 1
        assert torch.equal(cut["targets"][cut["slots"].clamp_max(len(cut["targets"]) - 1)] >= 0,
                           torch.ones_like(cut["slots"], dtype=torch.bool))
    assert len(whole["first"]) == 1 == len(cut["first"])
    assert len(trees.layout(IDS, SPANS, [0] * 5, limit=6)["first"]) > 1


def reference(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size,
              enable_gqa):
    """What torch documents of `varlen_attn`, sequence by sequence: causal at the bottom right."""
    assert window_size == (-1, 0) and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert cu_seq_q[-1] == len(query) and cu_seq_k[-1] == len(key) == len(value)
    group = query.shape[1] // key.shape[1]
    assert (group > 1) == enable_gqa
    out = []
    for n in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[n]:cu_seq_q[n + 1]]
        k, v = (x[cu_seq_k[n]:cu_seq_k[n + 1]].repeat_interleave(group, dim=1)
                for x in (key, value))
        assert len(q) <= max_q and len(k) <= max_k
        weights = torch.einsum("qhd,khd->hqk", q, k) * (scale or 1 / math.sqrt(q.shape[-1]))
        seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        weights = weights.masked_fill(~seen, -torch.inf).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(out)


class Module(torch.nn.Module):
    def __init__(self, groups):
        super().__init__()
        self.num_key_value_groups = groups


def attended(table, groups, **kwargs):
    """Output and gradients of one call, for seeded states of a row."""
    draw, width = torch.Generator().manual_seed(0), table[0, 0].max()
    states = [torch.randn(1, heads, width, 8, generator=draw, requires_grad=True)
              for heads in (4, 4 // groups, 4 // groups)]
    out, _ = prefix.attend(Module(groups), *states, table, **kwargs)
    assert out.shape == (1, width, 4, 8)
    return [out, *torch.autograd.grad(out.square().sum(), states)]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("owners", [[0] * 5, [0, 0, 0, 1, 1]])
def test_the_call_over_variable_lengths_is_the_masked_one(owners, groups, monkeypatch):
    table = trees.tensor(trees.layout(IDS, SPANS, owners)["table"])
    masked = attended(table, groups, scaling=0.3)
    monkeypatch.setattr(prefix, "varlen_attn", reference)
    monkeypatch.setattr(prefix, "why_masked", lambda *_: "")
    for one, other in zip(masked, attended(table, groups, scaling=0.3), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    placed = trees.layout(IDS, SPANS, owners)
    faults = [siblings_seen] + [ancestor_forgotten] * (len(placed["first"]) == 1)
    for fault in faults:  # this would see them
        broken = attended(trees.tensor(fault(placed)["table"]), groups, scaling=0.3)[0]
        assert not torch.allclose(masked[0], broken, atol=1e-2)


def test_what_a_batch_needs_is_made_once(monkeypatch):
    """Not once a layer: index and mask of equal tables are the same tensors."""
    tables = [trees.read(trees.tensor(trees.layout(IDS, SPANS, [0] * 5)["table"]))
              for _ in range(2)]
    cpu = torch.device("cpu")
    assert trees.ranges(tables[0], cpu) is trees.ranges(tables[1], cpu)
    first, second = (trees.masks(t, cpu, torch.float32) for t in tables)
    assert first is second
    assert trees.masks(tables[0], cpu, torch.bfloat16)[0].mask.dtype == torch.bfloat16


def test_a_call_is_masked_where_flash_attention_cannot_take_it(monkeypatch):
    class Query:
        def __init__(self, kind="cuda", dtype=torch.bfloat16, width=128, rows=1):
            self.is_cuda, self.device, self.dtype = kind == "cuda", torch.device(kind), dtype
            self.shape, self.rows = (rows, 8, 4, width), rows

        def __len__(self):
            return self.rows

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert prefix.why_masked(Query()) == ""
    for query, why in ((Query("cpu"), "no CUDA but cpu"), (Query(rows=2), "several rows"),
                       (Query(dtype=torch.float32), "numbers are float32"),
                       (Query(width=512), "heads are 512 wide")):
        assert prefix.why_masked(query) == why
    assert prefix.why_masked(Query(), 0.1) == "attention has dropout"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert prefix.why_masked(Query()) == "the GPU is older than Ampere"


@pytest.mark.parametrize("window, refused", [(5, True), (6, False)])
def test_a_window_that_a_path_exceeds_is_refused(window, refused):
    """The row may be longer: here it has 11 tokens, its longest path 6."""
    table = trees.tensor(trees.layout(IDS, SPANS, [0] * 5)["table"])
    if refused:
        with pytest.raises(ValueError, match="sliding window of 5"):
            attended(table, 1, sliding_window=window)
    else:
        attended(table, 1, sliding_window=window)
