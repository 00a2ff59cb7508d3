"""`make bench-gpu` as a CPU can run it: every cell of the small shapes, and what it writes."""

import json

import bench_gpu
import pytest
import torch

from bpo.study.files import read_lines


def test_every_cell_is_measured_and_written(outputs, capsys):
    assert bench_gpu.main(["--device", "cpu", "--quick"]) == 0
    done = json.loads((outputs / "bench-gpu-quick.json").read_text())
    text = capsys.readouterr().out
    print(text)
