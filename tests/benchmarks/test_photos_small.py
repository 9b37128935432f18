"""Measuring programs of photos-small: concepts, goals, slots of another sample, by hand; the cost of segment."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from made_rows import WIDTH, box, make_row
from places import ROOT
from tiny import follow_concepts, tiny_image, tiny_model, tiny_processor
from transformers import AutoModel, AutoProcessor

import segcompass_hf
from segcompass_hf.data import scenes
from segcompass_hf.data.schema import decode_masks
from segcompass_hf.evaluation import ModelPredictor, Prediction, evaluate_dataset
from segcompass_hf.evaluation.rows import EvaluationRows
from segcompass_hf.explain.dictionary.reading import Active
from segcompass_hf.metrics import score_sample

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT / "benchmarks" / "photos_small"))
    patch.syspath_prepend(str(ROOT / "examples" / "photos_small"))
    import concepts
    import goals
    import patch_probe
    import seen
    import slots_of_another

CUP, DOG, HOT_DOG = (concepts.NAMES[name] for name in ("cup", "dog", "hot dog"))


def test_words_of_names():
    words = ["hot", "dogs", ".", "dog", "c4", ",", "cups", "hot"]
    first = concepts.LONGEST * HOT_DOG
    found = [(first, 0), (first + 1, 1), (concepts.LONGEST * DOG, 3), (concepts.LONGEST * concepts.NAMES["c4"], 4)]
    assert list(concepts.said(words)) == [*found, (concepts.LONGEST * CUP, 6)]


def test_objects_of_a_row():
    mask, other = box(0, 2), box(4, 3)
    row = make_row(0, [mask]) | {"distractor_masks": make_row(1, [other])["masks"], "instance_ids": [2]}
    row["reasoning"] = "dog a1, hot dog d2. hot dog wanted. answer hot dog d2."
    (words, found, roles), (other_words, other_found, other_roles) = seen.named_objects(row)
    assert (words, roles, other_words, other_roles) == (["hot", "dog", "d2"], ("answer",), ["dog", "a1"], ())
    assert (found == mask).all() and (other_found == other).all()
    assert not seen.is_crowded(row) and seen.is_crowded({"reasoning": "person a1 many, dog c4. dog wanted."})
    assert not seen.is_crowded({"reasoning": "dog c4. many wanted."})


def photograph(fires_on_words, fires_on_patches, words, patches):
    """Units of a photograph: what fires as (unit, feature, activation), and (name, unit) of words and patches."""

    def active(fires):
        columns = zip(*sorted(fires), strict=True) if fires else ((), (), ())
        return Active(*(np.array(column, dtype=kind) for column, kind in zip(columns, (int, int, float), strict=True)))

    def units(fires, count, names):
        return concepts.Units(active(fires), count, *np.array(names, dtype=int).reshape(-1, 2).T)

    spoken = [(concepts.LONGEST * name, unit) for name, unit in words]
    found = {kind: units(fires_on_patches, 8, patches) for kind in concepts.PICTURES}
    return {"words": units(fires_on_words, 8, spoken)} | found


def test_a_concept_is_chosen_on_some_photographs_and_measured_on_others():
    # On cups, feature 1 fires on the word and on its two patches, and weakly on one more; feature 2 on the word alone.
    on_cup = [(0, 1, 4.0), (0, 2, 9.0)], [(0, 1, 2.0), (1, 1, 2.0), (5, 1, 0.5)], [(CUP, 0)], [(CUP, 0), (CUP, 1)]
    choice = concepts.Choice(d_sae=4)
    for _ in range(5):  # rarer names are not judged
        choice.add(photograph(*on_cup))
    chosen = choice.concepts("half")
    assert list(chosen) == ["cup"] and chosen["cup"].feature == 1 and chosen["cup"].derived_f1 == (1.0, 1.0)
    # Held out: once as before, once a cup on two patches of which it fires on one, with the word on a dog too.
    other = photograph(
        [(0, 1, 4.0), (3, 1, 5.0)], [(0, 1, 2.5), (6, 1, 0.5)], [(CUP, 0), (DOG, 3)], [(CUP, 0), (CUP, 1), (DOG, 3)]
    )
    lines = concepts.measure(chosen, [photograph(*on_cup), other], "half")
    by_name = {line["name"]: line for line in lines}
    cup = by_name["cup"]
    assert cup["photographs"] == 2 and cup["passes"]
    assert cup["f1_words"]["value"] == pytest.approx(2 * 2 / (3 + 2))  # 2 hits, 3 firings, 2 words
    assert cup["f1_picture"]["value"] == pytest.approx(2 * 3 / (3 + 4))  # the weak ones do not count
    assert cup["f1_picture"]["low"] == pytest.approx(2 / 3) and cup["f1_picture"]["high"] == 1.0
    assert cup["threshold_picture"] == 2.0
    dog = by_name["dog"]
    assert (dog["photographs"], dog["feature"], dog["passes"]) == (1, None, False)
    figures = concepts.figures_of({"half": lines})["half"]["category"]
    assert figures == {"passing": 1, "held out": 2, "all": 80, "names": ["cup"]}
    # On words alone feature 2 is as good as feature 1, and the first of equal ones is taken.
    assert choice.concepts(None)["cup"].feature == 1


class Answers:
    """Gives every row a share of its target's box; a model by its settings."""

    def __init__(self, name, columns, **settings):
        self.name, self.columns, self.settings = name, columns, settings

    def predict(self, rows):
        return [Prediction(box(0, self.columns)[None]) for _ in rows]


def test_goals(tmp_path, capsys):
    kinds = ("all", "all", "people", "none")
    rows = [
        make_row(index, [] if kind == "none" else [box(0, 4)], kind=kind) | {"image_id": str(index // 2)}
        for index, kind in enumerate(kinds)
    ]
    for answers in (Answers("ours", 2, configuration="tiny"), Answers("everything", WIDTH)):
        evaluate_dataset(answers, rows, tmp_path / "data" / answers.name, page_samples=0)
    output = tmp_path / "goals"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["goals.py", str(tmp_path / "data"), "--output", str(output)])
        goals.main()
    result = json.loads(output.with_suffix(".json").read_text())
    lines = {line["figure"]: line for line in result["goals"]}
    whole = lines["all of a category but person"]
    assert whole["measured"]["value"] == 0.5 and whole["met"] and whole["above_floor"] and whole["photographs"] == 1
    assert whole["baselines"]["everything"]["value"] == pytest.approx(4 / WIDTH)
    assert not lines["people"]["met"] and lines["people"]["above_floor"] is False
    assert lines["use"]["measured"] is None and not lines["use"]["met"]
    assert lines["no-target accuracy"]["measured"]["value"] == 0 and lines["target accuracy"]["met"]
    assert not result["all_met"] and result["photographs"] == 2
    printed = capsys.readouterr().out
    assert printed.strip() == output.with_suffix(".md").read_text().strip()
    assert "| use | gIoU | – | 0.4 | – | not measured | 0 | 0 |" in printed
    assert "| people | gIoU | 0.500 [0.500, 0.500] | 0.65 | 0.6 | not met, below the floor | 1 | 1 |" in printed
    evaluate_dataset(Answers("another", 2, configuration="tiny"), rows, tmp_path / "data" / "another", page_samples=0)
    with pytest.raises(SystemExit, match="2 models"):
        goals.evaluations(tmp_path / "data")


def test_rows_of_another_photograph():
    def rows(images):
        return [type("Row", (), {"columns": {"image_id": image}}) for image in images]

    assert slots_of_another.another(rows("abcd")) == [2, 3, 0, 1]
    assert slots_of_another.another(rows("aaba")) == [2, 2, 0, 2]  # all others ask about the picture's own
    with pytest.raises(SystemExit, match="one photograph alone"):
        slots_of_another.another(rows("aa"))


def test_slots_of_another_on_scenes():
    folder = segcompass_hf.bundled_checkpoint()
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    rows = list(scenes.iterate("val", 8, seed=5))
    predictor = ModelPredictor(model, processor)
    with torch.inference_mode():
        records = slots_of_another.measure(predictor, [EvaluationRows(rows)[index] for index in range(8)])
    answers = predictor.predict(rows)
    own = [
        score_sample(answer.masks, decode_masks(row["masks"], row["image"].size[::-1])).iou
        for answer, row in zip(answers, rows, strict=True)
    ]
    assert [record["own"] for record in records] == pytest.approx(own, abs=1e-3)
    figures = slots_of_another.figures_of(records)["all"]
    assert figures["own"]["gIoU"]["value"] > figures["slots of another"]["gIoU"]["value"] + 0.2
    assert figures["slots of another"]["lost"]["low"] > 0 and figures["own"]["lost"]["high"] == 0


def test_own_slots_give_the_own_answer_where_heatmaps_read_concepts():
    model = follow_concepts(tiny_model(heatmap_concepts=True))
    processor = tiny_processor(image_token_grids=True)
    inputs = processor(images=[tiny_image(0), tiny_image(1)], instruction=["a", "b"])
    with torch.inference_mode():
        found = dict(slots_of_another.variants(model, inputs, [1, 0]))
        own = model.segment(**inputs, do_sample=False)
    for field in ("heatmap_logits", "pred_masks", "slot_logits", "slot_scores"):
        torch.testing.assert_close(found["own"][field], own[field], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found["slots of another"].heatmap_logits, own.heatmap_logits, atol=1e-3)
    swapped = model.predict_masks(own.reference_states[[1, 0]], own.slots[[1, 0]], None)
    torch.testing.assert_close(found["both of another"].slot_logits, swapped.slot_logits, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_cost_of_segment(tmp_path):
    output = tmp_path / "cost"
    command = [sys.executable, str(ROOT / "benchmarks" / "segment_cost.py"), "--num-samples", "2", "--threads", "1"]
    subprocess.run([*command, "--batch-sizes", "1", "2", "--output", str(output)], check=True, capture_output=True)
    result = json.loads(output.with_suffix(".json").read_text())
    assert [(one["batch_size"], one["pictures"]) for one in result["batches"]] == [(1, 2), (2, 2)]
    for one in result["batches"]:
        assert one["peak_bytes"] > 6_000_000 and one["seconds_per_batch"] > 0  # the weights alone
        assert 10 < one["tokens_per_picture"] < 400
    assert "| 2 | 2 |" in output.with_suffix(".md").read_text()


def test_thresholds_and_f1_of_a_probe():
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.1, 0.4]])
    labels = torch.tensor([[True, False], [False, False], [True, False], [False, False]])
    thresholds, best = patch_probe.best_thresholds(scores, labels)
    assert thresholds.tolist() == [pytest.approx(0.7), torch.inf], "two of three are right, and the second is on none"
    assert best[0].item() == pytest.approx(0.8) and best[1].isnan()
    measured = patch_probe.f1_at(scores, labels, torch.tensor([0.85, 0.5]))
    assert measured[0].item() == pytest.approx(2 / 3) and measured[1].isnan()


def test_a_probe_reads_what_is_linear_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(600, 4, generator=generator) * torch.tensor([1.0, 10.0, 0.1, 1.0]) + 3
    names = len(patch_probe.NUMBERS)
    labels = torch.zeros(600, names, dtype=torch.bool)
    labels[:, 0] = inputs[:, 1] > 5  # linear
    labels[:, 1] = (inputs[:, 0] > 3) ^ (inputs[:, 3] > 3)  # no line parts them
    parts = [(inputs[start : start + 200], labels[start : start + 200]) for start in (0, 200, 400)]
    f1 = list(patch_probe.probe(*parts)["f1"].values())
    assert f1[0] > 0.95 and 0.4 < f1[1] < 0.75 and f1[2] is None


def test_patches_as_every_source_has_them():
    processor, model = tiny_processor(), tiny_model().eval()
    row = make_row(0, [box(0, 4)]) | {"instruction": "the cup", "reasoning": "cup a1. cup wanted. answer cup a1."}
    row["instance_ids"], row["sample_id"], row["distractor_masks"] = [1], "one", []
    with torch.no_grad():
        ((found, labels),) = patch_probe.read(model, processor, [row], 2)
    count = len(labels)
    assert found["states"].shape == (count, model.config.vlm_config.get_text_config().hidden_size)
    assert found["codes"].shape == (count, model.config.sae_config.d_sae) and found["encoder"].shape[0] == count
    assert labels.dtype == torch.bool and labels[:, patch_probe.NUMBERS["cup"]].any()
    model.sae.eval()
    assert (found["codes"] != 0).any(), "codes of the image's tokens, in their places"
