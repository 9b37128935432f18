"""Kinds of tokens and places of patches: every family, padding, and values by hand."""

import dataclasses

import numpy as np
import pytest
import torch
from breadth import families as breadth_families
from breadth.building import Parts, processor_name
from tiny import FAMILIES, tiny_image, tiny_processor, tiny_sam_image_processor
from vlm_families import processor_of, tiled_model_and_processor

from segcompass_hf import SegCompassProcessor
from segcompass_hf.explain import explain
from segcompass_hf.explain.claims.measure import measure_claims
from segcompass_hf.explain.report.payload import payload
from segcompass_hf.token_grids_segcompass import UnknownPlacesError
from segcompass_hf.token_kinds import token_kinds
from segcompass_hf.token_places import patch_boxes
from segcompass_hf.training.alignment.losses import AlignmentTargets
from segcompass_hf.training.alignment.names import TokenPairs
from segcompass_hf.training.alignment.object_patches import ObjectPatches

QUESTIONS = ["the red one", "all the small blue squares but not the ring"]
REASONINGS = ["a red circle at b3", "two"]
SIZES = [(30, 40), (60, 60)]  # (height, width)


@dataclasses.dataclass
class Row:
    sequences: torch.Tensor
    attention_mask: torch.Tensor
    completion_mask: torch.Tensor


def answers(processor, rows=(0, 1)):
    batch = processor(
        images=[tiny_image(size=SIZES[i][::-1]) for i in rows],
        instruction=[QUESTIONS[i] for i in rows],
        reasoning=[REASONINGS[i] for i in rows],
    )
    return Row(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])


@pytest.mark.parametrize("family", FAMILIES)
def test_kinds_in_every_family(family):
    processor = tiny_processor(family)
    output = answers(processor)
    for row in (0, 1):
        found = token_kinds(processor, output, QUESTIONS[row], row=row, image_size=SIZES[row])

        def text_of(kind, found=found, row=row):
            return processor.tokenizer.decode([int(output.sequences[row, i]) for i in found.positions(kind)])

        assert text_of("question").strip() == QUESTIONS[row]
        assert text_of("reasoning").strip() == REASONINGS[row]
        assert text_of("reference") == "<REF_POS>" * 4
        assert "Think first" in text_of("special") and processor.end_of_turn_token in text_of("special")
        padding = [i for i, kind in enumerate(found.kinds) if kind is None]
        assert padding == (output.attention_mask[row] == 0).nonzero()[:, 0].tolist()
        is_image = output.sequences[row] == processor.image_token_id
        assert found.positions("image") == is_image.nonzero()[:, 0].tolist()
        assert [i for i, box in enumerate(found.patches) if box] == found.positions("image")
    # alone, the first row has no padding: the same kinds and boxes, in the same order
    alone = token_kinds(processor, answers(processor, rows=(0,)), QUESTIONS[0], image_size=SIZES[0])
    batched = token_kinds(processor, output, QUESTIONS[0], row=0, image_size=SIZES[0])
    kept = [i for i, kind in enumerate(batched.kinds) if kind is not None]
    assert [batched.kinds[i] for i in kept] == alone.kinds
    assert [batched.patches[i] for i in kept] == alone.patches


def test_patch_boxes_by_hand():
    # LLaVA: 60 x 60 -> 28 x 28 pixels in 2 x 2 patches of 14: quarters of the image.
    llava = tiny_processor("llava")
    assert patch_boxes(llava, (60, 60), 4) == [(0, 0, 30, 30), (30, 0, 60, 30), (0, 30, 30, 60), (30, 30, 60, 60)]
    # 300 high, 600 wide: the centre square, columns 150 to 450, is all that the model sees.
    assert patch_boxes(llava, (300, 600), 4) == [
        (150, 0, 300, 150),
        (300, 0, 450, 150),
        (150, 150, 300, 300),
        (300, 150, 450, 300),
    ]
    # Qwen: 300 x 600 -> 28 x 70 pixels, tokens of 14 x 14: 2 rows of 5, each 150 high and 120 wide.
    boxes = patch_boxes(tiny_processor("qwen3_vl"), (300, 600), 10)
    for index, box in enumerate(boxes):
        row, column = divmod(index, 5)
        expected = (120 * column, 150 * row, 120 * column + 120, 150 * row + 150)
        assert np.abs(np.subtract(box, expected)).max() <= 2, (index, box, expected)


class Padding:
    """A processor that puts the image into the upper left quarter of a picture of its fourfold size: 4 tokens."""

    image_processor, image_token_id = None, 7

    def picture_inputs(self, picture, **kwargs):
        seen = np.asarray(picture)[..., 0] / 255.0
        canvas = np.full((2 * seen.shape[0], 2 * seen.shape[1]), 0.5)
        canvas[: seen.shape[0], : seen.shape[1]] = seen
        return {"pixel_values": torch.tensor(canvas)[None, None], "input_ids": torch.tensor([[1, 7, 7, 7, 7, 2]])}


def test_a_patch_of_padding_has_no_place():
    assert patch_boxes(Padding(), (8, 8), 4) == [(0, 0, 8, 8), None, None, None]


def test_what_does_not_fit_is_refused():
    processor = tiny_processor("llava")
    output = answers(processor)
    with pytest.raises(ValueError, match="does not hold the instruction 'the green one'"):
        token_kinds(processor, output, "the green one")
    with pytest.raises(ValueError, match="for an image of 7 tokens"):
        patch_boxes(tiny_processor("qwen2_5_vl"), (60, 60), 7)


def test_what_the_model_wrote_out_of_form_is_reasoning():
    processor = tiny_processor("llava")
    prompt = processor(images=tiny_image(), instruction="the red one")["input_ids"][0].tolist()
    words = processor.tokenizer("a ring", add_special_tokens=False)["input_ids"]
    written = [*words, processor.think_end_token_id, processor.ref_token_id, processor.end_of_turn_token_id]
    ids = torch.tensor([[*prompt, *written]])
    mask = torch.tensor([[0] * len(prompt) + [1] * len(written)])
    found = token_kinds(processor, Row(ids, torch.ones_like(ids), mask), "the red one").kinds[len(prompt) :]
    assert found == ["reasoning"] * len(words) + ["special", "reference", "special"]


def test_tiles_without_known_places():
    """LLaVA-NeXT: kinds, concepts and contributions stay; patches have no place, and what needs places refuses."""
    model, processor = tiled_model_and_processor()
    image = tiny_image(0, (60, 30))
    ids = processor(images=image, instruction="it")["input_ids"]
    with pytest.raises(UnknownPlacesError, match="makes pixel_values of shape"):
        patch_boxes(processor, (30, 60), int((ids == processor.image_token_id).sum()))
    explained = explain(model, processor, image, "the red one", max_new_tokens=20)
    images = [token for token in explained.tokens if token.kind == "image"]
    assert images and all(token.patch is None for token in images) and not explained.places_known
    fired = {token.position for mask in explained.masks for concept in mask.concepts for token in concept.tokens}
    assert fired & {token.position for token in images}
    assert all(mask.concepts for mask in explained.masks)
    assert "not known" in payload(explained)["placesNote"]
    for needs in (TokenPairs, ObjectPatches, AlignmentTargets):
        with pytest.raises(UnknownPlacesError, match="alignment_weight=0"):
            needs(processor)
    with pytest.raises(UnknownPlacesError, match="not known here"):
        next(measure_claims(model, processor, []))


def test_tiles_that_only_the_family_s_processor_asks_for():
    """InternVL's processor has its image processor cut tiles: two tiles of 2 x 2 tokens and the whole in small are no
    grid of 3 x 4. An image of one tile is a grid."""
    processor = processor_of("InternVLProcessor")
    square, wide = (
        int((processor(images=tiny_image(0, size), instruction="it")["input_ids"] == processor.image_token_id).sum())
        for size in ((28, 28), (56, 28))
    )
    assert square == 4 and wide == 4 * 3  # two tiles and the whole
    assert patch_boxes(processor, (28, 28), 4) == [(0, 0, 14, 14), (14, 0, 28, 14), (0, 14, 14, 28), (14, 14, 28, 28)]
    with pytest.raises(UnknownPlacesError, match=r"shape \(3, 3, 28, 28\) for an image of 12 tokens"):
        patch_boxes(processor, (28, 56), 12)


REWRITING = {name: breadth_families.FAMILIES[name] for name in ("chameleon", "idefics", "paligemma")}


class TestFamiliesThatRewriteThePrompt:
    """PaliGemma's processor puts `<s>` behind the image and a line end behind all, Chameleon's a separator, Idefics'
    the text behind the image: the question is found in what they give their tokenizer."""

    def processor(self, name, **kwargs):
        parts = Parts.build(name, REWRITING[name])
        return SegCompassProcessor(
            parts.image_processor,
            parts.tokenizer,
            tiny_sam_image_processor(),
            vlm_processor_class=processor_name(name, REWRITING[name]),
            vlm_processor_kwargs=dict(REWRITING[name].arguments),
            **kwargs,
        )

    def question(self, processor, output, row):
        ids = output.sequences[row]
        places = token_kinds(processor, output, QUESTIONS[row], row=row).positions("question")
        return processor.tokenizer.decode(ids[places]).split()

    @pytest.mark.parametrize("name", REWRITING)
    def test_the_question_is_found(self, name):
        processor = self.processor(name)
        output = answers(processor)
        for row in (0, 1):
            assert self.question(processor, output, row) == QUESTIONS[row].split()

    @pytest.mark.parametrize("name", REWRITING)
    @pytest.mark.parametrize("template", ["{instruction}? I mean {instruction}", "Find it: {instruction}"])
    def test_every_mention_is_found(self, name, template):
        processor = self.processor(name, instruction_template=template)
        output = answers(processor)
        for row in (0, 1):
            assert self.question(processor, output, row) == QUESTIONS[row].split() * template.count("{")

    @pytest.mark.parametrize("name", [*REWRITING, "llava"])
    @pytest.mark.parametrize("words", ["the red", "red one", "red", "the green one", "one the red"])
    def test_another_or_a_part_of_it_is_refused(self, name, words):
        processor = tiny_processor(name) if name == "llava" else self.processor(name)
        with pytest.raises(ValueError, match="does not hold the instruction"):
            token_kinds(processor, answers(processor), words)
