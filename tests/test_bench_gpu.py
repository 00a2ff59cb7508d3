"""`make bench-gpu` as a CPU can run it: every cell of the small shapes, and what it writes."""

import json

import bench_gpu
import pytest
import torch


@pytest.mark.slow
def test_every_cell_is_written_and_one_without_memory_stops_no_other(outputs, capsys, monkeypatch):
    measure, full = bench_gpu.steps, str(bench_gpu.FEW_SHAPES[0])

    def steps(made, shape, way, saving, *rest):  # a CPU has no such limit
        if (str(shape), way, saving) == (full, "TRL", False):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(made, shape, way, saving, *rest)

    monkeypatch.setattr(bench_gpu, "steps", steps)
    assert bench_gpu.main(["--device", "cpu", "--quick"]) == 0
    done = json.loads((outputs / "bench-gpu-quick.json").read_text())
    assert [f.name for f in outputs.iterdir()] == ["bench-gpu-quick.json"]  # no section, no rest
    assert {"date", "card", "driver", "cuda", "versions", "commit"} <= done.keys()
    cells = {(c["shape"], c["gradient_checkpointing"], c["way"]): c for c in done["steps"]}
    assert len(cells) == len(bench_gpu.FEW_SHAPES) * 2 * len(bench_gpu.WAYS) == len(done["steps"])
    assert cells.pop((full, False, "TRL"))["failed"] == bench_gpu.NO_MEMORY
    assert all(c["seconds"] > 0 for c in cells.values())
    assert len(done["generation"]) == 2
    assert all(c["rows_a_second"] > 0 for c in done["generation"])
    exact, short, rounding, _ = done["parity"]
    assert exact["loss_differs"] < 1e-6 and exact["gradients_differ"] < 1e-5
    # packing moves a gradient less than the number format does
    assert 0 < short["gradients_differ"] < rounding["gradients_differ"]
    text = capsys.readouterr().out
    assert "| off | TRL, on the fly | out of memory | none | out of memory |" in text
    assert text.count("| on | packed, kept |") == len(bench_gpu.FEW_SHAPES)


def test_without_a_gpu_it_says_how_to_try_it(capsys):
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            bench_gpu.main([])
        assert "--device cpu --quick" in capsys.readouterr().err
