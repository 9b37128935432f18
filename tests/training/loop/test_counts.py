"""Means over accumulation windows and processes: counts by hand, the same gradients however a window is cut."""

import json
import os
import subprocess
import sys

import pytest
import torch
from places import SUPPORT
from supervised import Gradients, make_trainer, one_step, uneven_rows
from tiny import tiny_model, tiny_processor

from segcompass_hf.data.collator import SegmentationCollator
from segcompass_hf.training.loop.counts import count_window
from segcompass_hf.training.loop.means import MetricMeans
from segcompass_hf.training.warmup.language_loss import language_loss_sums, logits_to_keep

FAMILIES = ("llava", "qwen2_5_vl")
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def assert_same_gradients(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first and set(first) == set(second)
    for name, gradient in first.items():
        torch.testing.assert_close(gradient, second[name], msg=lambda text, name=name: f"{name}: {text}", **TOLERANCE)


# Sums and counts


def test_language_loss_by_hand():
    # Three tokens in the vocabulary; the scores of places 1 and 2 predict the labels at 2 and 3.
    logits = torch.zeros(1, 4, 3)
    logits[0, 1] = torch.tensor([0.0, 2.0, 0.0])
    labels = torch.tensor([[-100, -100, 1, 2]])
    expected = -torch.tensor([0.0, 2.0, 0.0]).log_softmax(0)[1] + torch.tensor(3.0).log()  # the second is uniform
    for kept in (4, 3):  # logits of all tokens, or from the one before the first label on
        loss, tokens, right = language_loss_sums(logits[:, -kept:], labels)
        assert torch.allclose(loss, expected) and tokens == 2 and right == 1
    loss, tokens, _ = language_loss_sums(logits, torch.full((1, 4), -100))
    assert loss == 0 and tokens == 0  # not NaN


def test_logits_to_keep():
    labels = torch.tensor([[-100, -100, 5, 6], [-100, -100, -100, 7]])
    assert logits_to_keep(tiny_model().vlm, labels) == {"logits_to_keep": 3}  # place 1 predicts the label at 2
    assert logits_to_keep(tiny_model().vlm, torch.full((2, 4), -100)) == {"logits_to_keep": 2}
    assert logits_to_keep(torch.nn.Linear(1, 1), labels) == {}


def test_window_counts_by_hand():
    first = {
        "input_ids": torch.zeros(2, 3),
        "labels": torch.tensor([[9, 9, -100], [-100, 9, 9]]),  # the label of a first token is never predicted
        "num_objects": torch.tensor([0, 2]),
        "alignment_words": torch.tensor([[True, False, False], [True, False, False]]),
        "alignment_coverage": torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.5, 0.0]]),
    }
    second = {"input_ids": torch.zeros(1, 2), "labels": torch.tensor([[-100, 9]]), "num_objects": torch.tensor([0])}
    counts = count_window([first, second])
    assert (counts.tokens, counts.segmentation_items, counts.samples, counts.alignment_items) == (4, 1, 3, 1)
    assert count_window([first, second], "zero").segmentation_items == 3
    assert count_window([second]).segmentation_items == 1  # divides a sum that is zero
    assert count_window([first], reduce=lambda totals: totals * 2).tokens == 6
    # Three samples of two names each: both sides of one name, sides of different names, nothing.
    words, patches = torch.zeros(3, 4, 2, dtype=torch.bool), torch.zeros(3, 4, 2, dtype=torch.bool)
    words[0, 0, 1] = patches[0, 3, 1] = words[1, 0, 0] = patches[1, 3, 1] = True
    paired = {"input_ids": torch.zeros(3, 4), "pair_words": words, "pair_patches": patches}
    assert count_window([paired]).alignment_items == 1


def test_metric_means():
    means = MetricMeans()
    means.add("loss", torch.tensor(6.0), torch.tensor(2))
    means.add("loss", 4.0, 3)
    means.add("loss", torch.tensor(float("nan")), 1)  # of a step that is skipped
    means.add("never", 0.0, 0)
    again = MetricMeans()
    again.sums = means.sums
    assert means.pop() == again.pop() == {"loss": 2.0} and means.pop() == {}


# The loss


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_the_cores(family, tmp_path):
    loss, _ = one_step("segmentation", family, tmp_path)
    batch = SegmentationCollator(tiny_processor(family), missing_reasoning="format")(uneven_rows())
    with torch.no_grad():
        expected = tiny_model(family).train()(**batch).loss  # means of one batch, the language loss by the VLM itself
    assert loss == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", ["segmentation", "warmup"])
def test_batch_8_equals_batch_4_accumulated_twice(stage, family, tmp_path):
    loss, gradients = one_step(stage, family, tmp_path)
    layout = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    other_loss, others = one_step(stage, family, tmp_path, **layout)
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(others, gradients)


def test_what_a_stream_has_left_for_less_than_a_window_is_left_out(tmp_path):
    # 8 rows in batches of 2 accumulated three times: each pass has a window of 6 rows, and a batch too much.
    from grpo import tiny_rows

    data = tiny_rows((1, 0, 2, 1, 1, 2, 0, 1))
    layout = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "learning_rate": 0.0}
    logs = {}
    for name, rows in (("stream", data.to_iterable_dataset()), ("first six", data.select(range(6)))):
        trainer = make_trainer("segmentation", "llava", tmp_path / name, rows, max_steps=3, **layout)
        trainer.train()
        logs[name] = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(logs["stream"]) == 3
    for ours, expected in zip(logs["stream"], logs["first six"], strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


def test_rows_for_less_than_one_step_are_an_error_and_not_a_run_without_steps(tmp_path):
    # 3 rows in batches of 2 are 2 batches; a step takes 3
    from grpo import tiny_rows

    layout = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 2}
    trainer = make_trainer("segmentation", "llava", tmp_path, tiny_rows((1, 0, 2)).to_iterable_dataset(), **layout)
    with pytest.raises(ValueError, match="give 2 batches of 2 rows per process, but a step takes 3"):
        trainer.train()


def test_a_window_cut_short_by_the_end_of_the_data_counts_what_it_has(tmp_path):
    # 8 rows in batches of 3 accumulated twice: windows of 6 and of 2 rows.
    gradients = Gradients()
    layout = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 2}
    layout |= {"learning_rate": 0.0, "weight_decay": 0.0}
    trainer = make_trainer("segmentation", "llava", tmp_path, uneven_rows(), callbacks=[gradients], **layout)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history[:2]]
    collator, model = SegmentationCollator(tiny_processor()), tiny_model().train()
    for loss, part in zip(losses, (slice(0, 6), slice(6, 8)), strict=True):
        with torch.no_grad():
            assert loss == pytest.approx(model(**collator(uneven_rows()[part])).loss.item(), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", ["segmentation", "warmup"])
def test_gradient_checkpointing_changes_nothing(stage, family, tmp_path):
    loss, gradients = one_step(stage, family, tmp_path)
    other_loss, others = one_step(stage, family, tmp_path, gradient_checkpointing=True)
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(others, gradients)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    worker = str(SUPPORT / "supervised.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, worker, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.pop("world_size") == 2
    assert len(results) == 8  # two layouts, and the frozen encoders' outputs kept and read
    assert list(tmp_path.glob("cache/*/*.safetensors"))
    for name, loss in results.items():
        expected_loss, expected = one_step(name.split("-")[0], "llava", tmp_path / "one")
        assert loss == pytest.approx(expected_loss, rel=1e-5), name
        assert_same_gradients(torch.load(tmp_path / f"{name}.pt"), expected)
