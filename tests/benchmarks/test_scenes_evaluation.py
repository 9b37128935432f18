"""The Scenes benchmark: what it counts, on a tiny random model and on records made by hand."""

import json
import sys

import numpy as np
import pytest
import torch
from places import ROOT
from tiny import tiny_model, tiny_processor

from segcompass_hf.data import scenes
from segcompass_hf.data.schema import decode_masks
from segcompass_hf.metrics import SampleScore, score_sample

sys.path.insert(0, str(ROOT / "benchmarks"))
import scenes_evaluation  # noqa: E402
import scenes_evaluation_report as report  # noqa: E402

MAX_NEW_TOKENS = 20


@pytest.fixture(scope="module")
def rows():
    return list(scenes.iterate("val", 5))


@pytest.fixture(scope="module")
def evaluator():
    # Every slot counts as confident, else an untrained model might predict nothing at all.
    model = tiny_model("llava", slot_logit_threshold=-100.0)
    return scenes_evaluation.ScenesEvaluator(model, tiny_processor("llava"), MAX_NEW_TOKENS)


@pytest.mark.parametrize(
    ("spoken", "objects", "answer"),
    [
        ("c2 large red cross yes, e4 big blue ring no.", {"c2 large red cross", "e4 big blue ring"}, "no answer"),
        ("c2 large red cross anchor . anchor c2 . answer 1 e4 , 2 g7 .", {"c2 large red cross"}, "1 e4 2 g7"),
        ("c2 large red cross no. answer : none .", {"c2 large red cross"}, "none"),
        ("c2 large red cross no", {"c2 large red cross"}, "no answer"),
        ("", set(), "no answer"),
    ],
)  # fmt: skip
def test_read_steps(spoken, objects, answer):
    seen, words = scenes_evaluation.read_steps(spoken)
    assert (seen, " ".join(words)) == (objects, answer)


def test_reference_reasoning_reads_as_its_own_answer(rows):
    for row in rows:
        objects, answer = scenes_evaluation.read_steps(row["reasoning"])
        assert len(objects) == len(row["masks"]) + len(row["distractor_masks"])
        assert len(answer) == (2 * len(row["masks"]) or 1)  # a number and a cell each, or `none`


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a red circle</think><REF_POS><REF_POS><REF_POS><REF_POS></s>", True),
        ("<think>a</think><REF_POS><REF_POS><REF_POS><REF_POS></s><pad><pad>", True),
        ("<think>a</think><REF_POS><REF_POS><REF_POS><REF_POS>", False),  # no end
        ("<think>a</think><REF_POS><REF_POS><REF_POS></s>", False),
        ("<think>a</think><REF_POS><REF_POS><REF_POS><REF_POS><REF_POS></s>", False),
        ("<think>a</think><REF_POS><REF_POS>and<REF_POS><REF_POS></s>", False),
        ("<think></think><REF_POS><REF_POS><REF_POS><REF_POS></s>", False),
        ("<think> </think><REF_POS><REF_POS><REF_POS><REF_POS></s>", False),
        ("<think>a<think>b</think><REF_POS><REF_POS><REF_POS><REF_POS></s>", False),
        ("<think>a<REF_POS></think><REF_POS><REF_POS><REF_POS><REF_POS></s>", False),
        ("a<think>b</think><REF_POS><REF_POS><REF_POS><REF_POS></s>", False),
        ("<think>a</think></think><REF_POS><REF_POS><REF_POS><REF_POS></s>", False),
        ("<think>a<REF_POS><REF_POS><REF_POS><REF_POS></s></think>", False),
        ("</s>", False),
    ],
)
def test_is_well_formed(text, expected):
    tokenizer = tiny_processor("llava").tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert scenes_evaluation.is_well_formed(ids, tokenizer, 4, {tokenizer.eos_token_id}) is expected


def test_share_interval():
    # Wilson by hand, n 10, p 0.9, z 1.96: (0.9 + 0.19208 +- 1.96 * sqrt(0.009 + 0.009604)) / 1.38416
    share = report.share_interval([True] * 9 + [False])
    assert share == {"value": 0.9, "low": pytest.approx(0.5958, abs=1e-4), "high": pytest.approx(0.9821, abs=1e-4)} | {
        "num_samples": 10
    }
    assert report.share_interval([True] * 500)["low"] == pytest.approx(0.9924, abs=1e-4)
    assert report.share_interval([True] * 500)["high"] == 1.0
    assert report.share_interval([])["value"] is None


def record(own, reference, ideal, objects_right, answer_right, kind="attribute", target=True):
    """A sample whose variants have the given IoU out of 100 pixels."""
    scores = {"own reasoning": own, "reference reasoning": reference, "ideal masks": ideal}
    scores |= {name: 0 for name in report.VARIANTS if name not in scores}
    scores = {name: SampleScore(iou, 100, iou, 100 if target else 0) for name, iou in scores.items()}
    return {
        "kind": kind,
        "scores": scores,
        "objects_right": objects_right,
        "answer_right": answer_right,
        "well_formed": True,
    }


def test_sources_of_loss_add_up():
    records = [
        record(own=90, reference=90, ideal=95, objects_right=True, answer_right=True),
        record(own=0, reference=80, ideal=95, objects_right=True, answer_right=False),
        record(own=10, reference=70, ideal=95, objects_right=False, answer_right=False),
        record(own=60, reference=64, ideal=95, objects_right=False, answer_right=True, kind="set"),
    ]
    figures = report.summarize(records)
    sources = figures["sources_of_loss"]
    lost = list(sources["lost"].values())
    # perception .60/4, reasoning .80/4, other text .04/4, concept path .95 - (.9+.8+.7+.64)/4, mask decoder 1 - .95
    assert lost == pytest.approx([0.15, 0.2, 0.01, 0.19, 0.05])
    assert sum(lost) + figures["metrics"]["own reasoning"]["gIoU"]["value"] == pytest.approx(1)
    assert sources["objects_right"]["value"] == sources["answer_right"]["value"] == 0.5
    assert sources["answer_right_where_objects_right"] == report.share_interval([True, False])
    assert sources["gIoU_where_answer_right"] == pytest.approx(0.75)
    assert sources["gIoU_where_answer_wrong"] == pytest.approx(0.05)
    expected = {"num_samples": 1, "own reasoning": 0.6, "reference reasoning": 0.64, "answer_right": 1.0}
    assert figures["by_kind"]["set"] == expected
    assert figures["num_no_target"] == 0


@pytest.fixture(scope="module")
def records(rows, evaluator):
    return evaluator.evaluate_records(rows, batch_size=3)  # batches of three and two


def test_baselines(rows, records):
    for row, one in zip(rows, records, strict=True):
        targets = decode_masks(row["masks"], (112, 112))
        objects = np.concatenate([targets, decode_masks(row["distractor_masks"], (112, 112))])
        pixels, all_objects = int(targets.sum()), int(objects.sum())  # objects do not overlap
        assert one["scores"]["everything"] == (pixels, 112 * 112, 112 * 112, pixels)
        assert one["scores"]["all objects"] == (pixels, all_objects, all_objects, pixels)
        chosen = one["scores"]["one random object"]
        assert chosen.predicted_pixels in objects.sum((1, 2))
        assert chosen.intersection in (0, chosen.predicted_pixels)


def test_own_reasoning_is_what_segment_gives_for_one_sample(rows, evaluator, records):
    assert len(records) == len(rows)
    for row, one in zip(rows, records, strict=True):
        inputs = evaluator.processor(images=row["image"], instruction=row["instruction"], return_tensors="pt")
        seg = evaluator.model.segment(**inputs, max_new_tokens=MAX_NEW_TOKENS)
        (result,) = evaluator.processor.post_process_segmentation(
            seg, original_sizes=inputs["original_sizes"], reshaped_input_sizes=inputs["reshaped_input_sizes"]
        )
        alone = score_sample(np.asarray(result["masks"]), decode_masks(row["masks"], (112, 112)))
        assert alone.predicted_pixels > 0
        assert one["scores"]["own reasoning"] == pytest.approx(alone, abs=20)  # pixels on the threshold, of 12,544
        assert set(one["scores"]) == {*report.VARIANTS, "ideal masks"}
        assert one["well_formed"] is False and one["answer_right"] is False  # an untrained model


@pytest.fixture(scope="module")
def variants(rows, evaluator):
    """`own`, the outputs of all variants, and what `predict_masks` was given for them."""
    calls = []
    predict_masks = evaluator.model.predict_masks

    def spy(reference_states, slots, *args, **kwargs):
        calls.append((reference_states, slots))
        return predict_masks(reference_states, slots, *args, **kwargs)

    inputs = evaluator._inputs(rows)
    targets = [decode_masks(row["masks"], (112, 112)) for row in rows]
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        own = evaluator.model.segment(**inputs, max_new_tokens=MAX_NEW_TOKENS, output_image_embeddings=True)
        patch.setattr(evaluator.model, "predict_masks", spy)
        return own, dict(evaluator._variants(rows, targets, inputs, own)), calls


def test_reference_reasoning_is_the_teacher_forced_pass(rows, evaluator, variants):
    own, outputs, _ = variants
    for index, row in enumerate(rows[:2]):
        inputs = evaluator.processor(
            images=row["image"],
            instruction=row["instruction"],
            reasoning=row["reasoning"],
            return_tensors="pt",
        )
        with torch.no_grad():
            alone = evaluator.model(**inputs)
        for field in ("heatmap_logits", "slot_logits"):
            reference = outputs["reference reasoning"][field][index]
            difference = (reference - alone[field][0]).abs().max()
            changed = (reference - own[field][index]).abs().max()
            assert difference < 1e-4 < 1e-3 < changed, field


def test_ablations_replace_what_they_say(rows, variants):
    own, outputs, calls = variants
    (shuffled, zero_slots, zero_states) = calls[:3]
    others = [own.slots[(i - 2) % 5] for i in range(5)]  # five samples: rolled by two
    assert torch.equal(shuffled[0], own.reference_states) and torch.equal(shuffled[1], torch.stack(others))
    assert torch.equal(zero_slots[0], own.reference_states) and not zero_slots[1].any()
    assert torch.equal(zero_states[1], own.slots) and not zero_states[0].any()
    for name in ("slots shuffled", "slots zeroed", "reference states zeroed"):
        assert not torch.equal(outputs[name].heatmap_logits, own.heatmap_logits), name


def test_ideal_heatmaps_are_the_targets(rows, variants):
    _, outputs, _ = variants
    ideal = outputs["ideal masks"]
    assert (ideal.slot_logits > 0).sum(1).tolist() == [len(row["masks"]) for row in rows]
    for heatmaps, row in zip(ideal.heatmap_logits, rows, strict=True):
        for heatmap, rle in zip(heatmaps, row["masks"], strict=False):
            share = decode_masks([rle], (112, 112)).mean()
            assert heatmap.sigmoid().mean().item() == pytest.approx(0.02 + 0.96 * share, abs=5e-3)


@pytest.fixture()
def checkpoint(tmp_path):
    path = tmp_path / "checkpoint"
    tiny_model("llava").save_pretrained(path)
    tiny_processor("llava").save_pretrained(path)
    return path


def test_command_line_writes_resumes_and_renews(checkpoint, tmp_path, monkeypatch):
    output = tmp_path / "results" / "scenes.json"
    command = ["--model", str(checkpoint), "--num-samples", "3", "--batch-size", "2", "--max-new-tokens", "12"]
    command += ["--device", "cpu", "--output", str(output)]
    evaluated = []
    evaluate = scenes_evaluation.ScenesEvaluator.evaluate

    def spy(self, rows, batch_size):
        evaluated.append(rows[0]["split"])
        return evaluate(self, rows, batch_size)

    monkeypatch.setattr(scenes_evaluation.ScenesEvaluator, "evaluate", spy)
    scenes_evaluation.main([*command, "--splits", "val"])
    first = json.loads(output.read_text())
    scenes_evaluation.main([*command, "--splits", "val", "test_pairs"])
    assert evaluated == ["val", "test_pairs"]  # `val` was kept
    second = json.loads(output.read_text())
    assert second["splits"]["val"] == first["splits"]["val"]
    table = output.with_suffix(".md").read_text()
    assert f"--model {checkpoint} --num-samples 3" in table
    value = second["splits"]["test_pairs"]["metrics"]["own reasoning"]["gIoU"]["value"]
    assert f"{value:.3f}" in table and "| slots shuffled |" in table
    assert not list(output.parent.glob("*.tmp"))
    # Other weights: nothing of the old report is kept.
    tiny_model("llava", seed=1).save_pretrained(checkpoint)
    scenes_evaluation.main([*command, "--splits", "test_pairs"])
    assert evaluated == ["val", "test_pairs", "test_pairs"]
    assert list(json.loads(output.read_text())["splits"]) == ["test_pairs"]


def test_single_sample_batches_are_refused(capsys):
    with pytest.raises(SystemExit):
        scenes_evaluation.parse_arguments(["--batch-size", "1"])
    assert "at least 2" in capsys.readouterr().err
