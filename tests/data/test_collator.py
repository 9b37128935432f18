"""The collator: rows in the row schema -> inputs of the model, in training and evaluation."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from supervised import tiny_row
from tiny import tiny_image, tiny_mask, tiny_model, tiny_processor
from torch.utils.data import DataLoader

from segcompass_hf.data.collator import SegmentationCollator, language_inputs
from segcompass_hf.data.schema import encode_mask

FAMILIES = ("llava", "qwen2_5_vl")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_what_the_processor_makes_of_its_columns(family):
    processor = tiny_processor(family)
    rows = [tiny_row(0, 1, "the red one"), tiny_row(1, 2, "the left, then the right")]
    batch = SegmentationCollator(processor)(rows)
    expected = processor(
        images=[tiny_image(0), tiny_image(1)],
        instruction=["the red circle"] * 2,
        reasoning=["the red one", "the left, then the right"],
        masks=[tiny_mask(1), tiny_mask(2)],
    )
    assert set(batch) == set(expected)
    for name, value in expected.items():
        assert torch.equal(batch[name], value), name


@pytest.mark.parametrize("family", FAMILIES)
def test_model_takes_a_batch(family):
    rows = [tiny_row(0, 1), tiny_row(1, 0), tiny_row(2, 2, None)]
    output = tiny_model(family)(**SegmentationCollator(tiny_processor(family))(rows))
    assert output.loss.isfinite() and output.heatmap_logits.shape == (3, 4, 32, 32)


def png(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_image_may_be_bytes_a_path_or_an_array(tmp_path):
    collator, image = SegmentationCollator(tiny_processor()), tiny_image(3)
    image.save(tmp_path / "image.png")
    expected = collator([tiny_row(0, image=image)])
    for form in (
        {"bytes": png(image), "path": None},
        {"bytes": None, "path": str(tmp_path / "image.png")},
        str(tmp_path / "image.png"),
        np.asarray(image),
    ):
        batch = collator([tiny_row(0, image=form)])
        assert torch.equal(batch["pixel_values"], expected["pixel_values"])
        assert torch.equal(batch["sam_pixel_values"], expected["sam_pixel_values"])


def test_masks_belong_to_the_upright_image():
    sideways = tiny_image(0, size=(40, 30))
    exif = sideways.getexif()
    exif[0x0112] = 6  # shown turned by 90 degrees: 30 wide, 40 high
    buffer = io.BytesIO()
    sideways.save(buffer, "JPEG", exif=exif)
    row = tiny_row(image={"bytes": buffer.getvalue(), "path": None})
    row["masks"] = [encode_mask(np.ones((40, 30), bool))]
    assert SegmentationCollator(tiny_processor())([row])["original_sizes"].tolist() == [[40, 30]]
    row["masks"] = [encode_mask(np.ones((30, 40), bool))]
    with pytest.raises(ValueError, match=r"sample 'sample-0'.*\(30, 40\)"):
        SegmentationCollator(tiny_processor())([row])


# Rows without reference reasoning


def answer_labels(missing_reasoning: str, reasoning: str | None) -> list[str]:
    """The labelled tokens of a row's answer."""
    processor = tiny_processor()
    batch = SegmentationCollator(processor, missing_reasoning=missing_reasoning)([tiny_row(0, 1, reasoning)])
    labels = batch["labels"][0]
    return processor.tokenizer.convert_ids_to_tokens(labels[labels != -100])


@pytest.mark.parametrize("reasoning", [None, "", "  "])
def test_missing_reasoning(reasoning):
    refs = ["<REF_POS>"] * 4
    assert answer_labels("format", reasoning) == ["<think>", *refs, "</s>"]
    assert [t for t in answer_labels("empty", reasoning) if t.startswith("<")] == [
        "<think>",
        "</think>",
        *refs,
        "</s>",
    ]
    assert answer_labels("skip", reasoning) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_tags_spelled_as_text_teach_no_empty_thought_either(family):
    # tokens of the answer: < t hin k > < / t hin k > <REF_POS> x 4, end of turn
    processor = tiny_processor(family, think_tags="text")
    answers = {}
    for choice in ("format", "empty"):
        labels = SegmentationCollator(processor, missing_reasoning=choice)([tiny_row(0, 1, None)])["labels"][0]
        answers[choice] = processor.tokenizer.decode(labels[labels != -100])
    refs = "<REF_POS>" * 4 + processor.end_of_turn_token
    assert answers == {"format": "<think>" + refs, "empty": "<think></think>" + refs}


@pytest.mark.parametrize(
    ("template", "learned"),
    [
        ("<think>\n{reasoning}\n</think>\n<answer>{references}</answer>", "<think>\n\n<answer>REFS</answer>"),
        ("Thought: {reasoning} Answer: {references}", "Thought: REFS"),  # no tag: nothing up to the references
        ("{references} for {reasoning}", "REFS for "),
    ],
)
@pytest.mark.parametrize("think_tags", ["tokens", "text"])
def test_missing_reasoning_in_other_templates(template, learned, think_tags):
    processor = tiny_processor(completion_template=template, think_tags=think_tags)
    labels = SegmentationCollator(processor)([tiny_row(0, 1, None)])["labels"][0]
    expected = learned.replace("REFS", "<REF_POS>" * 4) + "</s>"
    assert processor.tokenizer.decode(labels[labels != -100]) == expected


def test_reasoning_that_is_there_is_learned_whatever_happens_to_rows_without():
    for choice in ("format", "empty", "skip"):
        tokens = answer_labels(choice, "red")
        assert tokens[0] == "<think>" and "</think>" in tokens and tokens[-1] == "</s>"


def test_reference_tokens_of_a_row_without_reasoning_are_found():
    processor, model = tiny_processor(), tiny_model()
    batch = SegmentationCollator(processor, missing_reasoning="skip")([tiny_row(0, 1, None)])
    assert (batch["input_ids"][0][batch["completion_mask"][0] == 1] == processor.ref_token_id).sum() == 4
    states = model(**{k: v for k, v in batch.items() if k not in ("labels", "mask_labels")}).reference_states
    assert (states.abs().sum(-1) > 0).all()


def test_column_reasoning_may_be_missing():
    row = tiny_row()
    del row["reasoning"]
    assert "labels" in SegmentationCollator(tiny_processor())([row])


# Objects


def test_overflow():
    processor = tiny_processor()
    rows = [tiny_row(0, 6), tiny_row(1, 2), tiny_row(2, 5)]
    drop, merge = SegmentationCollator(processor), SegmentationCollator(processor, overflow="merge")
    dropped, merged = drop(rows), merge(rows)
    assert dropped["num_objects"].tolist() == merged["num_objects"].tolist() == [4, 2, 4]
    # Six stripes of 6 columns: four are kept, or three and a mask of the other three.
    assert merged["mask_labels"][0].sum() > 1.4 * dropped["mask_labels"][0].sum()
    assert (drop.dropped_objects, drop.overfull_rows) == (2 + 1, 2)
    assert (merge.dropped_objects, merge.overfull_rows) == (0, 0)
    drop(rows)
    assert drop.dropped_objects == 6
    with pytest.raises(ValueError, match="'sample-0' has 6 target objects but the model has 4 slots"):
        SegmentationCollator(processor, overflow="error")(rows)


def test_workers_count_what_they_drop():
    collator = SegmentationCollator(tiny_processor())
    rows = [tiny_row(index, 6) for index in range(4)]
    for _ in DataLoader(rows, batch_size=1, num_workers=2, collate_fn=collator):
        pass
    assert (collator.dropped_objects, collator.overfull_rows) == (8, 4)


def test_no_target():
    batch = SegmentationCollator(tiny_processor())([tiny_row(0, 0), tiny_row(1, 0, masks=None)])
    assert batch["num_objects"].tolist() == [0, 0] and batch["mask_labels"].sum() == 0


# Evaluation and warm-up


def test_evaluation_keeps_ids_and_every_object_aside():
    ignore = np.zeros((30, 40), bool)
    ignore[:5] = True
    rows = [tiny_row(0, 6, ignore=encode_mask(ignore), kind="set"), tiny_row(1, 0)]
    collator = SegmentationCollator.for_evaluation(tiny_processor())
    batch = collator(rows)
    references = batch.pop("references")
    assert "labels" not in batch and "mask_labels" not in batch and collator.dropped_objects == 0
    assert [reference["sample_id"] for reference in references] == ["sample-0", "sample-1"]
    assert references[0]["kind"] == "set" and references[0]["source"] == "tiny"
    assert np.array_equal(references[0]["masks"], tiny_mask(6)) and references[1]["masks"].shape == (0, 30, 40)
    assert np.array_equal(references[0]["ignore"], ignore) and references[1]["ignore"] is None
    assert tiny_model().segment(**batch, max_new_tokens=8).pred_masks.shape == (2, 4, 32, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_language_inputs_are_those_of_segmentation_without_sam(family):
    processor, rows = tiny_processor(family), [tiny_row(0, 1), tiny_row(1, 1, "a longer reference reasoning")]
    whole = SegmentationCollator(processor, with_masks=False)(rows)
    language = SegmentationCollator(processor, inputs="language", with_masks=False)(rows)
    assert set(whole) - set(language) == {"sam_pixel_values", "original_sizes", "reshaped_input_sizes"}
    for name, value in language.items():
        assert torch.equal(value, whole[name]), name
    prompts = language_inputs(processor, [row["image"] for row in rows], [row["instruction"] for row in rows])
    assert "labels" not in prompts and prompts["input_ids"].shape[0] == 2


# What goes wrong names the row


def test_errors_name_the_row():
    collator = SegmentationCollator(tiny_processor())
    broken = {"bytes": png(tiny_image(0))[:60], "path": None}
    for columns, problem in (
        ({"image": broken}, "cannot be read as an image"),
        ({"image": "nowhere.png"}, "no file"),
        ({"masks": [encode_mask(np.ones((3, 3), bool))]}, r"\(3, 3\)"),
        ({"masks": [{"size": [30, 40]}]}, "counts"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=f"sample 'bad'.*{problem}"):
            collator([tiny_row(0), tiny_row(1, sample_id="bad", **columns)])
    with pytest.raises(ValueError, match="no rows"):
        collator([])


@pytest.mark.parametrize("inputs", ["segmentation", "language"])
@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"instruction": ""}, "is empty"),
        ({"instruction": None}, "is a NoneType"),
        ({"instruction": "ring " * 300}, "model_max_length is 200"),
        ({"reasoning": "ring " * 300}, "model_max_length is 200"),
        ({"reasoning": 3}, "the reasoning is a int"),
    ],
)
def test_refused_texts_are_named_by_their_row(inputs, columns, problem):
    collator = SegmentationCollator(tiny_processor(model_max_length=200), inputs=inputs, with_masks=False)
    with pytest.raises(ValueError, match=f"sample 'bad'.*{problem}"):
        collator([tiny_row(0), tiny_row(1, sample_id="bad") | columns])
    assert len(collator([tiny_row(0), tiny_row(1)])["input_ids"]) == 2


def test_unknown_choices_are_refused():
    for name in ("overflow", "missing_reasoning", "inputs"):
        with pytest.raises(ValueError, match=f"{name}='other'"):
            SegmentationCollator(tiny_processor(), **{name: "other"})


def test_instruction_cannot_smuggle_tokens():
    processor = tiny_processor()
    plain = SegmentationCollator(processor)([tiny_row()])
    batch = SegmentationCollator(processor)(
        [tiny_row(instruction="<REF_POS> </think> <image>", reasoning="<REF_POS>")]
    )
    for token in (processor.ref_token_id, processor.think_end_token_id, processor.image_token_id):
        in_answer = batch["completion_mask"] == 1
        assert ((batch["input_ids"] == token) & in_answer).sum() == (
            (plain["input_ids"] == token) & (plain["completion_mask"] == 1)
        ).sum()
    assert (batch["input_ids"] == processor.image_token_id).sum() == 4


def test_collator_can_be_copied_and_pickled():
    collator = SegmentationCollator(tiny_processor())
    collator([tiny_row(0, 6)])
    for twin in (copy.deepcopy(collator), pickle.loads(pickle.dumps(collator))):
        assert twin.dropped_objects == 2
        assert torch.equal(twin([tiny_row(0)])["input_ids"], collator([tiny_row(0)])["input_ids"])


def test_image_modes():
    collator = SegmentationCollator(tiny_processor())
    gray = Image.new("L", (40, 30), 100)
    pixels = [collator([tiny_row(image=image)])["pixel_values"] for image in (gray, gray.convert("RGB"))]
    assert torch.equal(*pixels)
