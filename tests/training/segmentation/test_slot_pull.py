"""Slot pull: the loss by hand, what it reaches, stages of the trainer, several processes' head, resuming."""

import math

import pytest
import torch
from supervised import Gradients, arguments, make_trainer, tiny_row, uneven_rows
from tiny import tiny_model

from segcompass_hf.training.segmentation.config import SegmentationConfig
from segcompass_hf.training.segmentation.slot_pull import SlotPull, place_waves, slot_pull_loss

LAYERS = "vlm.model.language_model.layers"


def test_loss_by_hand():
    # Three image tokens after one word. Slot 0 points at them with odds 1 : 2 : 1, slot 1 with 1 : 1 : 6.
    scores = torch.tensor([[[-1e4, 0.0, math.log(2), 0.0], [-1e4, 0.0, 0.0, math.log(6)]]])
    # Object 0 covers the first token whole and half of the second, object 1 the third.
    coverage = torch.tensor([[[0.0, 1.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.3]]])
    first = 2 / 3 * math.log((2 / 3) / (1 / 4)) + 1 / 3 * math.log((1 / 3) / (1 / 2))
    second = math.log(1 / (6 / 8))
    pull = slot_pull_loss(scores, coverage, torch.tensor([2]))
    assert pull.loss.item() == pytest.approx((first + second) / 2, rel=1e-5)  # a mean over the sample's pairs
    assert pull.assignments.slot_index.tolist() == pull.assignments.object_index.tolist() == [0, 1]
    assert int(pull.right) == int(pull.num_pairs) == 2
    # The objects in the other order: the slots keep theirs.
    swapped = slot_pull_loss(scores, coverage.flip(1), torch.tensor([2]))
    assert swapped.loss.item() == pytest.approx(pull.loss.item()) and swapped.assignments.object_index.tolist() == [
        1,
        0,
    ]
    # One object: it is the first slot's, although the second points at it.
    alone = slot_pull_loss(scores, coverage[:, 1:], torch.tensor([1]))
    assert alone.assignments.slot_index.tolist() == [0] and alone.loss.item() == pytest.approx(math.log(4), rel=1e-5)
    assert int(alone.right) == 0


def test_objects_out_of_sight_and_empty_samples_give_nothing():
    scores = torch.randn(2, 3, 5, requires_grad=True)
    coverage = torch.zeros(2, 3, 5)
    coverage[0, 1, 2] = 1.0  # the first object of the first sample covers no image token; the second sample has none
    pull = slot_pull_loss(scores, coverage, torch.tensor([2, 0]))
    assert int(pull.num_pairs) == 1 and pull.assignments.pairs_per_sample == [2, 0]
    pull.loss.backward()
    assert scores.grad.isfinite().all() and scores.grad[1].norm() == 0 and scores.grad[0, 2].norm() == 0
    assert scores.grad[0, :2].norm() > 0


def test_scores_read_concepts_and_places_of_image_tokens_only():
    torch.manual_seed(0)
    pull = SlotPull(8)
    slots, embeddings, places = torch.randn(2, 3, 8), torch.randn(2, 6, 8), torch.rand(2, 6, 2)
    is_image = torch.tensor([[False, True, True, True, False, False]] * 2)
    scores = pull(slots, embeddings, places, is_image)
    assert scores.shape == (2, 3, 6) and (scores[:, :, ~is_image[0]] == -1e4).all()
    # Padding and other samples change nothing.
    alone = pull(slots[:1], embeddings[:1, :4], places[:1, :4], is_image[:1, :4])
    torch.testing.assert_close(scores[:1, :, :4], alone)
    for changed in ((embeddings + torch.randn(8), places), (embeddings, places / 2)):
        assert not torch.allclose(pull(slots, *changed, is_image)[:, :, 1:4], scores[:, :, 1:4])


def test_waves_tell_places_apart():
    y, x = torch.meshgrid(torch.linspace(0, 1, 24), torch.linspace(0, 1, 24), indexing="ij")
    waves = place_waves(torch.stack([y, x], dim=-1).view(-1, 2))
    assert waves.shape == (576, 168) and torch.pdist(waves).min() > 0.3
    # At the origin all sines are 0 and all cosines 1.
    origin = place_waves(torch.zeros(2))
    assert origin[:24].tolist() == ([0.0] * 6 + [1.0] * 6) * 2 and origin[24:].sum() == 36


# In the trainer


def stages(**settings) -> dict:
    return {"slot_pull_weight": 1.0, "slots_first_share": 0.25, "heads_only_share": 0.5, "max_steps": 4} | settings


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("stage", ["slots", "heads", "all"])
def test_what_trains_in_each_stage(stage, family, tmp_path):
    shares = {"slots": (1.0, 1.0), "heads": (0.0, 1.0), "all": (0.0, 0.0)}[stage]
    gradients, model = Gradients(), tiny_model(family)
    settings = stages(slots_first_share=shares[0], heads_only_share=shares[1], max_steps=1)
    trainer = make_trainer(
        "segmentation", family, tmp_path, uneven_rows(), model=model, callbacks=[gradients], **settings
    )
    before = [parameter.clone() for parameter in trainer.slot_pull.parameters()]
    trainer.train()
    moved = {name for name, gradient in gradients.values.items() if gradient.norm() > 0}
    reached = ("codebook", "slot_encoder", "slot_mapper.confidence", "slot_mapper.slot_proj")
    beyond = ("slot_mapper.query_proj", "slot_mapper.head_fuser", "sam.mask_decoder", "sam.prompt_encoder.mask_embed")
    for part in (*reached, *(beyond if stage != "slots" else ()), *((f"{LAYERS}.3",) if stage == "all" else ())):
        assert any(name.startswith(part) for name in moved), part
    allowed = {"slots": (*reached, "slot_mapper.fuse"), "heads": (*reached, "slot_mapper", "sam")}.get(stage, ("",))
    assert all(name.startswith(allowed) for name in moved)
    assert not any(name.startswith(("sae", "sam.vision", f"{LAYERS}.0", f"{LAYERS}.1")) for name in moved)
    assert all(not torch.equal(old, new) for old, new in zip(before, trainer.slot_pull.parameters(), strict=True))
    logs = trainer.state.log_history[0]
    assert logs["segmentation/slot_pull"] > 0 and 0 <= logs["segmentation/slot_pull_right"] <= 1
    assert ("language_loss" in logs) == (stage == "all") and ("segmentation/loss" in logs) == (stage != "slots")
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in trainer.slot_pull.parameters())


def test_stages_follow_each_other(tmp_path):
    trainer = make_trainer("segmentation", "llava", tmp_path, uneven_rows(), **stages())
    trainer.state.max_steps, seen = 4, []
    for step in range(4):
        trainer.state.global_step = step
        seen.append((trainer._stage(True), trainer._stage(False)))
    assert seen == [("slots", "all"), ("heads", "all"), ("all", "all"), ("all", "all")]


def test_a_batch_is_the_mean_of_its_samples(tmp_path):
    rows = [tiny_row(0, 2, "short"), tiny_row(1, 1, "a much longer reasoning, of many more words than the other")]
    settings = stages(slots_first_share=1.0)
    trainer = make_trainer("segmentation", "llava", tmp_path, rows, **settings)
    trainer.state.max_steps, losses = 4, []
    trainer.model.train()
    for part in (rows, rows[:1], rows[1:]):
        with torch.no_grad():
            losses.append(trainer.compute_loss(trainer.model, dict(trainer.data_collator(part))))
    torch.testing.assert_close(losses[0], (losses[1] + losses[2]) / 2, rtol=1e-5, atol=1e-5)


def test_weight_0_is_as_without(tmp_path):
    runs = []
    for folder, settings in (("plain", {}), ("zero", {"slot_pull_weight": 0.0, "heads_only_share": 0.0})):
        trainer = make_trainer("segmentation", "llava", tmp_path / folder, uneven_rows(), max_steps=2, **settings)
        trainer.train()
        assert trainer.slot_pull is None and "object_patches" not in trainer.data_collator(uneven_rows())
        runs.append(trainer.model.state_dict())
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


@pytest.mark.parametrize("optimizer", ["trainer", "muon"])
def test_resuming_gives_the_same_curve(optimizer, tmp_path):
    settings = stages(optimizer=optimizer, slots_first_share=0.75, save_steps=2)
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    whole = make_trainer("segmentation", "llava", tmp_path / "whole", uneven_rows(), **settings)
    whole.train()
    first = make_trainer("segmentation", "llava", tmp_path, uneven_rows(), **settings | {"save_strategy": "steps"})
    first.train()
    second = make_trainer("segmentation", "llava", tmp_path, uneven_rows(), **settings)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for ours, theirs in ((whole.model, second.model), (whole.slot_pull, second.slot_pull)):
        for name, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name]), name
    assert not any("pull" in name for name in second.model.state_dict())


def test_pull_falls_on_a_handful(tmp_path):
    settings = stages(slots_first_share=1.0, max_steps=30, per_device_train_batch_size=4, optimizer="muon")
    settings |= {"learning_rate": 1e-2, "codebook_lr_factor": 1.0, "slot_mapper_lr_factor": 1.0}
    rows = [tiny_row(index, count) for index, count in enumerate((1, 2, 0, 1))]
    trainer = make_trainer("segmentation", "llava", tmp_path, rows, **settings)
    trainer.train()
    first, last = trainer.state.log_history[0], trainer.state.log_history[-2]
    assert last["segmentation/slot_pull"] < 0.5 * first["segmentation/slot_pull"]
    assert last["segmentation/confidence_loss"] < first["segmentation/confidence_loss"]


def test_settings_that_make_no_sense_are_refused(tmp_path):
    for settings, message in (
        ({"slots_first_share": 0.2}, "slot_pull_weight=0"),
        ({"heads_only_share": 1.5}, "heads_only_share"),
    ):
        with pytest.raises(ValueError, match=message):
            arguments(SegmentationConfig, tmp_path, **settings)
    trainer = make_trainer("segmentation", "llava", tmp_path, uneven_rows(), **stages())
    trainer.data_collator = trainer.eval_collator
    with pytest.raises(ValueError, match="extra=ObjectPatches"):
        trainer.train()
