"""The little study's metrics against those on record, so that rebuilding is seen to change none.

`python tests/test_golden.py OUTPUTS/STUDY` records a finished little study anew, for a change that
is meant to move numbers; say in the commit which moved and why.
"""

import hashlib
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parent / "golden" / "little.json"
# Stages 4 and 5 have thousands of numbers: a fixed part of them, spread over all, is on record.
SAMPLED = {"4_qualitative_comparison": 20, "5_benchmarks": 20}


def numbers(value: object, path: str = "") -> Iterator[tuple[str, float | None]]:
    """Every number (or None) in nested metrics as (path, value)."""
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(inner, f"{path}/{name}" if path else str(name))
    elif value is None or isinstance(value, int | float):
        yield path, value


def stages(study: Path) -> dict[str, dict[str, float | None]]:
    """stage -> path -> number, of the manifests of a finished study."""
    out = {}
    for manifest in sorted(study.glob("*/manifest.json")):
        metrics = json.loads(manifest.read_text())["metrics"]
        share = SAMPLED.get(manifest.parent.name, 1)
        out[manifest.parent.name] = {path: value for path, value in numbers(metrics)
                                     if zlib.crc32(path.encode()) % share == 0}
    return out


def arithmetic() -> str:
    """A hash of what this machine's float32 kernels give. Where it differs, sums run in another
    order, and the same seed trains another model."""
    draw = torch.Generator().manual_seed(0)
    image, first, second = (torch.randn(*shape, generator=draw, requires_grad=True)
                            for shape in ((4, 3, 32, 32), (64, 3, 8, 8), (64, 64)))
    tokens = torch.nn.functional.conv2d(image, first, stride=8).flatten(2).transpose(1, 2)
    mixed = torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
    torch.nn.functional.gelu(mixed @ second).log_softmax(-1).square().sum().backward()
    bits = b"".join(x.grad.numpy().tobytes() for x in (image, first, second))
    return hashlib.sha256(bits).hexdigest()[:16]


def agrees(value: float | None, before: float | None) -> bool:
    """Whether two numbers are apart by no more than another order of sums explains: training that
    starts 1e-7 apart ends up to 3e-5 nats apart in the differences of log-probs."""
    if value is None or before is None:
        return value is before
    return value == pytest.approx(before, rel=1e-4, abs=5e-5)


def test_the_metrics_are_those_on_record(little_study):
    golden = json.loads(FILE.read_text())
    metrics = stages(little_study)
    assert {s: set(m) for s, m in metrics.items()} == {s: set(m)
                                                       for s, m in golden["stages"].items()}
    if golden["torch"] != torch.__version__ or golden["arithmetic"] != arithmetic():
        pytest.skip("the record was made with other arithmetic: only names were compared")
    moved = {f"{stage}: {path}": (before, metrics[stage][path])
             for stage, numbers in golden["stages"].items() for path, before in numbers.items()
             if not agrees(metrics[stage][path], before)}
    assert not moved


if __name__ == "__main__":
    torch.set_num_threads(1)
    record = {"torch": torch.__version__, "arithmetic": arithmetic(),
              "stages": stages(Path(sys.argv[1]))}
    FILE.write_text(json.dumps(record, indent=0) + "\n")
