"""What the benchmark measures is what its rows say."""
import json

import pytest
import torch

import bench_grm
from bench_grm import CPU
from conftest import TINY


def test_captions_are_as_long_as_cocos():
    _, _, valid = bench_grm.features(1, 1, 5000, 1)
    assert sum(bench_grm.COCO_LENGTHS) == pytest.approx(25000, rel=1e-3)
    assert valid.sum(1).float().mean() == pytest.approx(13.8, abs=0.2) and valid.sum(1).min() >= 8


def test_memory_counts_what_is_freed_again_and_not_what_is_returned():
    def call():
        torch.ones(100 * 2 ** 18)                    # 100 MiB, freed at once
        return torch.ones(50 * 2 ** 18)              # 50 MiB, returned

    seconds, peak = bench_grm.cost_of(call, CPU)
    assert seconds > 0
    if peak is None:
        pytest.skip("the peak of the resident memory is known on Linux only")
    assert peak == pytest.approx(100, abs=4)
    assert bench_grm.cost_of(call, CPU, 50 * 2 ** 20)[1] == pytest.approx(50, abs=4)


def test_a_step_with_and_without_its_encoders_are_rows_of_a_table(capsys):
    report = bench_grm.Report()
    bench_grm.bench_similarity(report, CPU, 4, 5, 8, 16)
    bench_grm.bench_step(report, "vit_micro", 8, TINY, repetitions=1, micro_batch=4)
    figures = {row["name"]: row["values"] for row in report.rows}
    step = {name.split(": ")[2]: values for name, values in figures.items() if name.startswith("step")}
    assert list(step) == ["step, ms", "not encoders, ms", "micro_batch 4, ms"]
    assert step["step, ms"]["ratio"] == 1
    assert all(values["figure"] > 0 for values in figures.values())
    assert figures["similarity: 4 x 5 x 8 x 16: GEMM, pairs/s"]["ratio"] == 1
    assert json.loads(json.dumps(report.rows)) == report.rows
    assert "not encoders, ms" in capsys.readouterr().out
