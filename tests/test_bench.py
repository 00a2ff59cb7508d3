"""`make bench`: groups whose models are made for it run at a small size, and say what they say."""

import bench_packed
import pytest

SMALL = (384, 96, 1, 2), (32, 64, 1, 2)  # as wide as its words want


@pytest.mark.slow
@pytest.mark.parametrize("group", ("packed", "trees"))
def test_a_group_of_packed_steps_runs(group, model_folder, tmp_path, monkeypatch):
    (tmp_path / "model").symlink_to(model_folder)
    for name, value in {"ROUNDS": 1, "STEP": SMALL, "LONG": SMALL, "SIDE": 56, "MATMUL": 64,
                        "LENGTHS": (30, 57)}.items():
        monkeypatch.setattr(bench_packed, name, value)
    rows = getattr(bench_packed, group)(tmp_path)
    assert rows and all(set(row) == {"what / against what", "ratio", "lowest – highest"}
                        for row in rows)
