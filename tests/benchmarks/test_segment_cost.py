# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Two versions are compared by what they answer, sample by sample."""

import sys
from argparse import Namespace

from places import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import segment_cost_beside


def record(**changed):
    return {
        "sample_id": "a",
        "masks": [{"size": [4, 4], "counts": "08"}],
        "reasoning": "one",
        "text": "<think>one",
        "problem": None,
        "scores": [0.5],
        "seconds": 1.0,
    } | changed


def test_what_counts_as_another_answer():
    same = [record(), record(seconds=2.0), record(scores=[0.50005])]
    assert segment_cost_beside.differences([record()] * 3, same) == 0
    other = [record(masks=[]), record(reasoning="two"), record(scores=[0.5002]), record(scores=[])]
    assert segment_cost_beside.differences([record()] * 4, other) == 4
    assert segment_cost_beside.differences([record()] * 3, [record()]) == 2  # samples that are missing


def test_ratios_are_of_the_turns(monkeypatch, tmp_path):
    seconds = iter([4.0, 2.0, 9.0, 3.0, 5.0, 5.0])  # before, now, in three turns

    def turn(checkout, given, size, folder):
        (folder / "answers").mkdir(parents=True)
        (folder / "answers" / "samples.jsonl").write_text("")
        spent = next(seconds)
        return {"cpu_seconds": spent, "wall_seconds": 2 * spent, "peak_bytes": 7}

    monkeypatch.setattr(segment_cost_beside, "turn", turn)
    (found,) = segment_cost_beside.beside(Namespace(batch_sizes=[8], turns=3, beside=tmp_path, num_samples=10))
    assert (found["ratio"], found["least"], found["most"], found["unlike"]) == (2.0, 1.0, 3.0, 0)
    # Medians of 4, 9, 5 and 2, 3, 5 seconds over 10 pictures.
    assert (found["old_cpu_ms"], found["new_cpu_ms"], found["old_wall_ms"]) == (500.0, 300.0, 1000.0)
