"""What the benchmark compares computes the same thing, and its measures measure what they say."""
import json

import pytest
import torch

import bench_grm
import data
from conftest import TINY
from similarity import token_similarity

CPU = torch.device("cpu")


def test_the_methods_that_are_compared_agree():
    image, text, valid = bench_grm.features(3, 7, 9, 16, CPU)
    expected = token_similarity(image, text, valid)
    torch.testing.assert_close(bench_grm.einsum_similarity(image, text, valid), expected)
    torch.testing.assert_close(bench_grm.loop_similarity(image, text, valid), expected)


def test_captions_are_as_long_as_cocos():
    _, _, valid = bench_grm.features(1, 1, 5000, 1, CPU)
    assert sum(bench_grm.COCO_LENGTHS) == pytest.approx(25000, rel=1e-3)
    assert valid.sum(1).float().mean() == pytest.approx(13.8, abs=0.2) and valid.sum(1).min() >= 8


def test_peak_memory_counts_what_is_freed_again_and_not_the_gradients():
    def call():
        torch.ones(100 * 2 ** 18)                                # 100 MiB, freed at once
        return torch.ones(50 * 2 ** 18)                          # 50 MiB, handed back

    peak = bench_grm.peak_memory(call, CPU)
    if peak is None:
        pytest.skip("the peak of the resident memory is known on Linux only")
    assert peak == pytest.approx(100, abs=4)
    assert bench_grm.peak_memory(call, CPU, 50 * 2 ** 20) == pytest.approx(50, abs=4)


def test_a_step_is_split_into_its_parts(tiny_config, capsys):
    report, scenes = bench_grm.Report(), data.load_split("shapes", tiny_config["datasets"], "")
    bench_grm.bench_step(report, "vit_micro", 8, TINY, scenes, 1)
    bench_grm.bench_similarity(report, CPU, 4, 5, 8, 16, peers=True)
    figures = {row["what"]: row["figure"] for row in json.loads(json.dumps(report.rows))}
    parts = ("image encoder", "text encoder", "heads, similarity, loss", "optimiser")
    assert all(figures[part] > 0 for part in (*parts, "whole step"))
    assert {"GEMM", "GRM forward", "loop forward + backward", "not encoders"} <= figures.keys()
    assert "not encoders" in capsys.readouterr().out
