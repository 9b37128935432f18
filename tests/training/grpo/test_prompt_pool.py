# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Which prompts come next: every value in every batch, and those that teach."""

import random
from collections import Counter

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from trl.trainer.utils import RepeatSampler  # noqa: E402

from segcompass_hf.training.grpo import prompt_pool  # noqa: E402
from segcompass_hf.training.grpo.prompt_pool import PromptPool, StratifiedRepeatSampler, column_of  # noqa: E402
from segcompass_hf.training.loop.resume import skip_permutations  # noqa: E402

STRATA = ["often"] * 20 + ["half"] * 10 + ["rare"] * 2
SETTINGS = {"mini_repeat_count": 2, "batch_size": 5, "repeat_count": 1, "seed": 3}


def sampler(**settings):
    return StratifiedRepeatSampler(STRATA, STRATA, **SETTINGS | settings)


def batches(indices, size=10):
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def test_every_batch_holds_every_value_and_the_rest_is_shared_out():
    drawn = list(sampler())
    assert len(drawn) == len(sampler()) == len(RepeatSampler(STRATA, **SETTINGS)) == 60
    for batch in batches(drawn):
        assert batch[::2] == batch[1::2]  # groups of two
        assert {STRATA[index] for index in batch} == {"often", "half", "rare"}
        assert len(set(batch)) == 5
    counts = Counter(STRATA[index] for index in drawn[::2])
    for name, share in (("often", 20), ("half", 10), ("rare", 2)):  # 6 batches: a place each, and 12 others
        assert abs(counts[name] - (6 + 12 * share / 32)) < 1, name
    assert counts.total() == 30
    first_half = [index for index in drawn[::2] if STRATA[index] == "half"][:9]
    assert len(set(first_half)) == len(first_half)  # none twice before all have been there


def test_order_follows_the_seed_and_epochs_differ():
    one, same, other = sampler(), sampler(), sampler(seed=4)
    first, second = list(one), list(one)
    assert first == list(same) != list(other) and first != second
    resumed = sampler()
    skip_permutations(resumed, 1)
    assert list(resumed) == second
    assert list(sampler(shuffle=False)) == list(sampler(shuffle=False))


def test_repetitions_of_a_generation_are_the_same_prompts():
    drawn = list(sampler(repeat_count=3))
    assert len(drawn) == 180 and drawn[:10] == drawn[10:20] == drawn[20:30] != drawn[30:40]


def test_fewer_prompts_than_values_are_refused():
    with pytest.raises(ValueError, match="takes 2 prompts, but the column has 3 values.*half, often, rare"):
        sampler(batch_size=2)


def pool(rates=None, strata=STRATA):
    return PromptPool([f"row {index}" for index in range(32)], strata, rates)


def test_prompts_are_replaced_by_others_of_their_kind_that_may_teach():
    made, chances = pool({f"row {index}": 0.0 for index in range(18)}), random.Random(0)
    drawn = {made.draw("row 0", {18}, chances) for _ in range(20)}
    assert drawn == {19}  # of the frequent kind all others were never right, and one is taken
    assert {made.draw("row 31", set(), chances) for _ in range(50)} == {30, 31}
    assert STRATA[made.draw("row 3", set(range(20)), chances)] == "often"  # where all are taken, one of them


def test_half_of_the_replacements_are_known_to_teach():
    made, chances = pool({"row 7": 0.5, "row 8": 1.0}), random.Random(0)
    drawn = Counter(made.draw("row 0", set(), chances) for _ in range(400))
    assert 0.45 < drawn[7] / 400 < 0.65 and drawn[8] == 0 and len(drawn) > 15


def test_prompts_that_taught_nothing_are_tried_again_now_and_then():
    made, chances = pool({"row 0": 0.0, "row 1": 0.5}), random.Random(0)
    due = sum(made.is_due("row 0", chances) for _ in range(2000)) / 2000
    assert abs(due - prompt_pool.RETRY_SHARE) < 0.03
    assert all(made.is_due(name, chances) for name in ("row 1", "row 2", "unknown") for _ in range(50))
    made.note("row 0", True)
    made.note("unknown", True)
    assert all(made.is_due("row 0", chances) for _ in range(50))
    again = pool()
    again.load_state(made.state())
    assert again.teaches == {0: True, 1: True}


def test_pass_rates_of_other_rows_are_refused():
    with pytest.raises(ValueError, match="none of the 1 measured prompts .*'other'.* is among the 32"):
        pool({"other": 0.5})


def test_columns_that_are_not_there_are_named():
    rows = Dataset.from_dict({"kind": ["a", "b"], "other": [1, 2]})
    assert column_of(rows, "kind", "x") == ["a", "b"]
    with pytest.raises(ValueError, match=r"stratify_by='size' reads the column 'size'; train_dataset has"):
        column_of(rows, "size", "stratify_by='size'")
    with pytest.raises(ValueError, match="which IterableDataset does not allow; give a datasets.Dataset"):
        column_of(rows.to_iterable_dataset(), "kind", "stratify_by")
    assert isinstance(sampler().generator, torch.Generator)  # what resuming skips epochs with
