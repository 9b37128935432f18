"""The reading head: what it finds and its loss by hand, what its gradient reaches, and the head in training."""

import math

import pytest
import torch
from supervised import Gradients, arguments, bare_vlm, tiny_row, uneven_rows
from tiny import tiny_model, tiny_processor

from segcompass_hf.training.warmup.config import WarmupConfig
from segcompass_hf.training.warmup.reading import Reading, ReadingHead, reading_loss
from segcompass_hf.training.warmup.trainer import WarmupTrainer


def test_reading_by_hand():
    # Two patches, one word, one token of padding. States have length sqrt(2) already: their mean square is 1.
    head = ReadingHead(2, 1)
    root = math.sqrt(2)
    states = torch.tensor([[[root, 0.0], [0.0, root], [3 * root, 0.0], [9.0, 9.0]]])  # the word is scaled to (root, 0)
    mask = torch.tensor([[1, 1, 1, 0]])
    is_image = torch.tensor([[True, True, False, False]])
    with torch.no_grad():
        head.slot_queries.copy_(torch.tensor([[1.0, 0.0]]))
        head.nothing.copy_(torch.tensor([1.0, -1.0]))
    reading = head(states, mask, is_image)
    # q . n / sqrt(2) is 1, 0, 1: attention e, 1, e of 2e + 1; W is the identity.
    e = math.e
    found = (root * 2 * e / (2 * e + 1), root * 1 / (2 * e + 1))
    assert reading.scores[0, 0, :2].tolist() == pytest.approx(found, rel=1e-5)
    assert reading.scores[0, 0, 2:].tolist() == [-math.inf, -math.inf]
    assert reading.nothing.item() == pytest.approx((found[0] - found[1]) / root, rel=1e-5)


def test_reading_loss_by_hand():
    # Three queries over two patches (tokens 1 and 2); the row has one object, which covers them 0.75 and 0.25.
    off = -math.inf
    scores = torch.tensor([[[off, 2.0, 0.0], [off, 1.0, 1.0], [off, 0.0, 0.0]]])
    reading = Reading(scores, nothing=torch.tensor([[0.0, 1.0, 0.0]]))
    patches = torch.tensor([[[0.0, 0.75, 0.25], [0.0, 0.0, 0.0]]])
    loss, objects, found = reading_loss(reading, patches)
    first = math.log(math.e**2 + 2)  # over "nothing" (0) and the patches (2, 0)
    expected = 0.75 * (first - 2) + 0.25 * first + math.log(3) + math.log(3)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert (objects.item(), found.item()) == (1, 1)
    _, _, found = reading_loss(reading, torch.tensor([[[0.0, 0.0, 1.0]]]))
    assert found.item() == 0


def test_objects_beyond_the_queries_are_left_out():
    reading = ReadingHead(4, 2)(torch.randn(1, 5, 4), torch.ones(1, 5), torch.ones(1, 5, dtype=torch.bool))
    patches = torch.rand(1, 3, 5)
    assert torch.equal(reading_loss(reading, patches)[0], reading_loss(reading, patches[:, :2])[0])


def test_padding_and_batches_change_nothing():
    torch.manual_seed(0)
    head = ReadingHead(8, 3)
    states, patches = torch.randn(2, 6, 8), torch.zeros(2, 2, 6)
    is_image = torch.tensor([[False, True, True, True, False, False]] * 2)
    patches[0, 0, 1], patches[0, 1, 2:4], patches[1, 0, 3] = 0.5, 0.7, 1.0
    padded = [torch.nn.functional.pad(part, (0, 0, 2, 1)) for part in (states + 0.0, patches.mT)]
    wide = torch.nn.functional.pad(is_image, (2, 1))
    mask = torch.nn.functional.pad(torch.ones(2, 6), (2, 1))
    whole, count, _ = reading_loss(head(padded[0], mask, wide), padded[1].mT)
    parts = [
        reading_loss(head(states[i : i + 1], torch.ones(1, 6), is_image[:1]), patches[i : i + 1]) for i in range(2)
    ]
    torch.testing.assert_close(whole, sum(part[0] for part in parts))
    assert count == 3 and [int(part[1]) for part in parts] == [2, 1]


def test_gradient_is_finite_and_stays_off_the_padding():
    torch.manual_seed(0)
    head, states = ReadingHead(8, 2), torch.randn(1, 5, 8, requires_grad=True)
    is_image = torch.tensor([[False, True, True, False, False]])
    patches = torch.tensor([[[0.0, 1.0, 0.0, 0.0, 0.0]]])
    reading_loss(head(states, torch.tensor([[1, 1, 1, 1, 0]]), is_image), patches)[0].backward()
    assert states.grad.isfinite().all() and (states.grad[0, :4].norm(dim=-1) > 0).all()
    assert states.grad[0, 4].norm() == 0
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


# In training


def reader(folder, model=None, rows=None, callbacks=None, **settings):
    settings = {"reading_weight": 1.0, "alignment_layer": 2} | settings
    return WarmupTrainer(
        model=bare_vlm() if model is None else model,
        args=arguments(WarmupConfig, folder, **settings),
        train_dataset=rows or uneven_rows(),
        processing_class=tiny_processor(),
        callbacks=callbacks,
    )


def test_gradient_reaches_the_layers_below_alone(tmp_path):
    gradients = Gradients()
    rows = [tiny_row(0, 1, None), tiny_row(1, 2, None)]  # no language loss: all gradients are the reading's
    reader(tmp_path, rows=rows, callbacks=[gradients], missing_reasoning="skip", trainable="all").train()
    reached = {name for name, gradient in gradients.values.items() if gradient.abs().max() > 1e-7}
    for part in ("vision_tower", "multi_modal_projector", "embed_tokens", ".layers.0.", ".layers.1."):
        assert any(part in name for name in reached), part
    assert not any(".layers.2." in name or ".layers.3." in name or "lm_head" in name for name in reached)


@pytest.mark.parametrize("optimizer", ["trainer", "muon"])
def test_the_head_learns_where_the_answer_is_and_is_no_part_of_the_model(optimizer, tmp_path):
    names = set(bare_vlm().state_dict())
    rates = {"reading_head": 2.0, "model.multi_modal_projector": 0.5}
    settings = {"max_steps": 30, "learning_rate": 5e-3, "optimizer": optimizer, "learning_rate_factors": rates}
    trainer = reader(tmp_path / "run", **settings)
    before = [parameter.clone() for parameter in trainer.reading_head.parameters()]
    trainer.train()
    logs = trainer.state.log_history
    assert logs[29]["reading_loss"] < 0.7 * logs[0]["reading_loss"]
    assert logs[29]["reading_accuracy"] >= logs[0]["reading_accuracy"]
    assert not any(map(torch.equal, before, trainer.reading_head.parameters()))
    assert set(trainer.vlm.state_dict()) == names
    groups = trainer.optimizer.param_groups
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    share = 0.5 if optimizer == "muon" else 1.0  # AdamW's, for a vector
    assert rates[id(trainer.reading_head.nothing)] == pytest.approx(1e-2 * share)


def test_without_it_nothing_is_added(tmp_path):
    trainer = reader(tmp_path, reading_weight=0.0)
    assert trainer.reading_head is None and "object_patches" not in trainer.data_collator(uneven_rows())
    with pytest.raises(ValueError, match="reading_weight cannot be negative"):
        arguments(WarmupConfig, tmp_path, reading_weight=-1.0)


@pytest.mark.parametrize("optimizer", ["trainer", "muon"])
def test_resuming_gives_the_same_curve(optimizer, tmp_path):
    def trainer():
        settings = {"max_steps": 4, "per_device_train_batch_size": 2, "lr_scheduler_type": "linear"}
        settings |= {"save_strategy": "steps", "save_steps": 2, "optimizer": optimizer}
        settings |= {"embedding_alignment_weight": 0.5, "gradient_accumulation_steps": 2}
        return reader(tmp_path / "run", tiny_model(), **settings)

    expected, resumed = trainer(), trainer()
    expected.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for mine, theirs in ((expected.vlm, resumed.vlm), (expected.reading_head, resumed.reading_head)):
        for name, value in mine.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name]), name
    curves = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (expected, resumed)]
    assert curves[0] == curves[1] and len(curves[0]) == 4
