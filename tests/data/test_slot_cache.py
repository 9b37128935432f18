# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Slots and reference states on disk: what the model reads itself, found by all that decides it, and only by that."""

import pickle

import pytest
import torch
from supervised import uneven_rows
from tiny import follow_concepts, tiny_model, tiny_processor

from segcompass_hf.data.collator import SegmentationCollator
from segcompass_hf.data.slot_cache import SlotCache


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def images_of(rows):
    return [row["image"].convert("RGB") for row in rows]


@pytest.fixture
def model():
    return follow_concepts(tiny_model())


def test_states_are_those_of_the_model(tmp_path, model, processor):
    rows, cache = uneven_rows(), SlotCache(tmp_path, model, processor)
    model.train()
    assert cache.fill(rows, batch_size=3) == len(cache) == 8
    assert model.training and model.vlm.training and model.sae.training
    found = cache.states_of(rows[2:5], images_of(rows[2:5]))
    with torch.no_grad():
        expected = model.eval()(**SegmentationCollator(processor)(rows[2:5]))
    assert expected.slots.std(0).max() > 1e-3  # rows differ
    for name in ("slots", "reference_states"):
        torch.testing.assert_close(found[name], getattr(expected, name), rtol=1e-5, atol=1e-6)
    per_row = sum(value[0].numel() for value in found.values()) * 4
    assert cache._bytes_per_row == per_row


def test_a_second_cache_reads_nothing_again_and_copies_only_read(tmp_path, model, processor):
    rows = uneven_rows()
    SlotCache(tmp_path, model, processor).fill(rows)
    again = SlotCache(tmp_path, model, processor)
    assert again.fill(rows) == 0
    copied = pickle.loads(pickle.dumps(again))
    assert copied.model is None
    one, other = (cache.states_of(rows, images_of(rows))["slots"] for cache in (again, copied))
    assert torch.equal(one, other)


def test_two_processes_share_the_rows(tmp_path, model, processor):
    rows = uneven_rows()
    read = [SlotCache(tmp_path, model, processor).fill(rows, 2, number, 2) for number in range(2)]
    assert sum(read) == 8 and min(read) > 0
    SlotCache(tmp_path, model, processor).states_of(rows, images_of(rows))


def changed(row, **columns):
    return row | columns


def test_another_question_answer_or_image_is_another_row(tmp_path, model, processor):
    rows, cache = uneven_rows()[:1], SlotCache(tmp_path, model, processor)
    cache.fill(rows)
    row = rows[0]
    others = [
        changed(row, instruction="the blue circle"),
        changed(row, reasoning="something else"),
        changed(row, image=row["image"].rotate(90)),
    ]
    for other in others:
        with pytest.raises(ValueError, match="'sample-0' is not in the slot cache"):
            cache.states_of([other], images_of([other]))
    same = changed(row, masks=[], sample_id="another")  # masks are not read
    assert cache.states_of([same], images_of([same]))["slots"].shape == (1, 4, model.config.d_slot)


CHANGES = {
    "vlm": lambda model, _: model.vlm.get_output_embeddings().weight.data.add_(1.0),
    "sae": lambda model, _: model.sae.b_enc.data.add_(1.0),
    "codebook": lambda model, _: model.codebook.weight.data.add_(1.0),
    "slot_encoder": lambda model, _: next(model.slot_encoder.parameters()).data.add_(1.0),
    "threshold": lambda model, _: setattr(model.config, "concept_threshold", 0.5),
    "template": lambda _, processor: setattr(processor, "instruction_template", "{instruction}!"),
    "image processor": lambda _, processor: setattr(processor.image_processor, "image_mean", [0.1, 0.2, 0.3]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_decides_the_states_is_part_of_the_key(name, tmp_path, model):
    processor = tiny_processor()
    before = SlotCache(tmp_path, model, processor).shards.identity
    CHANGES[name](model, processor)
    assert SlotCache(tmp_path, model, processor).shards.identity != before


def test_what_reads_the_states_is_not(tmp_path, model):
    processor = tiny_processor()
    before = SlotCache(tmp_path, model, processor).shards.identity
    processor.tokenizer(["a", "a longer text"], padding=True)  # leaves its mark in the tokenizer
    next(model.slot_mapper.parameters()).data.add_(1.0)
    next(model.sam.parameters()).data.add_(1.0)
    model.config.mask_dice_weight = 7.0
    processor.sam_image_processor.image_mean = [0.1, 0.2, 0.3]
    assert SlotCache(tmp_path, model, processor).shards.identity == before
    assert SlotCache(tmp_path, model, processor, precision_name="bf16").shards.identity != before


def test_rows_that_cannot_be_read_are_left_out(tmp_path, model, processor):
    rows = uneven_rows()[:3]
    rows[1] = rows[1] | {"image": "no/such/file.png"}
    rows[2] = rows[2] | {"instruction": " "}
    assert SlotCache(tmp_path, model, processor).fill(rows) == 1


def test_a_disk_that_is_too_small_is_said_before_anything_is_read(tmp_path, model, processor):
    cache = SlotCache(tmp_path, model, processor, min_free_bytes=2**60)
    with pytest.raises(OSError, match="Use another folder or fewer rows"):
        cache.fill(uneven_rows())
    assert len(cache) == 0


def test_with_heatmap_concepts_the_image_tokens_are_kept_beside_the_states(tmp_path, processor):
    rows = uneven_rows()
    SlotCache(tmp_path, follow_concepts(tiny_model()), processor).fill(rows[:4])
    model = follow_concepts(tiny_model(heatmap_concepts=True))
    for name in ("codebook", "slot_encoder"):  # the same readers: other random numbers come behind a new module
        getattr(model, name).load_state_dict(getattr(tiny_model(), name).state_dict())
    told = tiny_processor(image_token_grids=True)
    cache = SlotCache(tmp_path, model, told)
    assert len(cache.shards) == 4 and not cache._has(cache._key(rows[0], images_of(rows)[0]))
    assert cache.fill(rows, batch_size=3) == len(cache) == 8  # those without image tokens are read again
    found = cache.states_of(rows[2:5], images_of(rows[2:5]))
    batch = SegmentationCollator(told)(rows[2:5])
    with torch.no_grad():
        output = model(**batch, output_concept_embeddings=True)
    is_image = batch["input_ids"] == model.config.image_token_id
    expected = torch.stack([row[where] for row, where in zip(output.concept_embeddings, is_image, strict=True)])
    assert expected.shape == (3, 4, model.config.d_slot) and expected.std(0).max() > 1e-3
    torch.testing.assert_close(found["image_concept_embeddings"], expected, rtol=1e-5, atol=1e-6)
    cached = SegmentationCollator(told, slot_cache=cache)(rows[2:5])
    with torch.no_grad():
        torch.testing.assert_close(model(**cached).pred_masks, output.pred_masks, rtol=0, atol=1e-4)
