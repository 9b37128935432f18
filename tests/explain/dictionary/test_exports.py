"""What a dictionary gives to others: effects measured, lines of a VLM, Neuronpedia's JSON."""

import json

import numpy as np
import pytest
import torch
from supervised import tiny_row
from tiny import follow_concepts, tiny_image, tiny_model, tiny_processor

from segcompass_hf import SegCompassSaeConfig
from segcompass_hf.explain.answer import Answer
from segcompass_hf.explain.attribution import attribute
from segcompass_hf.explain.causal import ablate
from segcompass_hf.explain.dictionary import store
from segcompass_hf.explain.dictionary.dictionary import ConceptDictionary
from segcompass_hf.explain.dictionary.effects import ConceptEffect
from segcompass_hf.explain.dictionary.entries import ConceptEntry, PatchExample, WordExample
from segcompass_hf.explain.dictionary.interpretation import Interpreter, detection_score, interpret
from segcompass_hf.explain.dictionary.names import ConceptName
from segcompass_hf.explain.dictionary.neuronpedia import feature_json, save_neuronpedia
from segcompass_hf.explain.effects import measure_effects
from segcompass_hf.modeling_sae import SegCompassSae

RED = ConceptName("red", "word", "words", 0.9, 0.95, 0.1, 1.0, 1.0)
EFFECT = ConceptEffect(34, 0.9, 0.23, [0.4, 0.05, None, None], 12, 0.48, 0.3, 0.02)


def dictionary(**first):
    from io import BytesIO

    file = BytesIO()
    tiny_image().save(file, "JPEG")
    words = [WordExample("red", "find the", "circle now", "row-1", 2.5), WordExample("red", "", "", "row-2", 2.0)]
    patches = [PatchExample("row-3", (10, 0, 20, 15), (40, 30), 1.5, 0), PatchExample("row-4", None, (40, 30), 1.0)]
    entries = [
        ConceptEntry(0, density=0.25, max_activation=2.5, top_words=words, top_patches=patches, names=[RED], **first),
        ConceptEntry(1, density=0.1, top_words=[WordExample("blue", "a", "ring", "row-5", 1.0)]),
        ConceptEntry(2),
    ]
    torch.manual_seed(0)
    sae = SegCompassSae(SegCompassSaeConfig(d_in=8, d_sae=3))
    scores = {f"derived_f1_{name}": np.full(3, np.nan, np.float32) for name in ("words", "patches")}
    info = {"d_sae": 3, "rows": 5, "rows_derive": 3, "rows_score": 2, "sae_sha256": store.sae_hash(sae)}
    return ConceptDictionary(entries, scores, [file.getvalue()], info, store.sae_sketch(sae))


def test_effects_in_words():
    assert str(EFFECT) == "raises masks of slot 0 (+23 % in 34 masks); without it 48 % of the mask stays"
    against = ConceptEffect(3, 0.2, -0.05, [-0.05, -0.05, None, None])
    assert str(against) == "lowers masks (-5 % in 3 masks)"
    assert str(ConceptEffect(1, 1.0, 0.5, [0.5, None])).startswith("raises masks (")  # seen for one slot alone


@pytest.fixture(scope="module")
def parts():
    model = follow_concepts(tiny_model(max_reasoning_tokens=6))
    model.config.slot_logit_threshold = -1e9  # every slot answers
    return model, tiny_processor()


def test_effects_are_those_of_attribution_and_ablation(parts):
    row = tiny_row(0, 1, "the red one")
    effects = measure_effects(*parts, [row, tiny_row(1, 1, "the red one")], num_rows=1, num_tested=2)
    answer = Answer(*parts, row["image"], row["instruction"])
    assert answer.kept and len(answer.slots) >= 2
    features, index = answer.captured.concepts.features.unique(return_inverse=True)
    assert sorted(effects) == features.tolist()
    shares, tested = [], {}
    for attribution in attribute(answer.replay, answer.slots):
        totals = attribution.per_feature(features, index)
        shares.append(totals / totals.clamp(min=0).sum())
        for feature in features[totals.abs().argsort(descending=True, stable=True)[:2]].tolist():
            tested.setdefault(feature, []).append(attribution.slot)
    for place, feature in enumerate(features.tolist()):
        own = [float(share[place]) for share in shares]
        effect = effects[feature]
        assert effect.masks == len(answer.slots) and effect.share == pytest.approx(np.mean(own), abs=1e-5)
        assert [effect.slots[slot] for slot in answer.slots] == pytest.approx(own, abs=1e-5)
        assert effect.raises == np.mean([share > 0 for share in own])
        assert effect.tested == len(tested.get(feature, ()))
        assert (effect.tested > 0) == (effect.iou_without is not None)
    one, slots = max(tested.items(), key=lambda found: len(found[1]))
    heat = answer.captured.heatmap_logits[0].sigmoid()
    masks = answer.captured.pred_masks[0] > answer.captured.mask_logit_threshold
    masks &= answer.replay.valid_area[0]  # what lies on the canvas's padding is no part of a mask
    assert not answer.replay.valid_area.all()
    keep = torch.ones(1, len(features))
    keep[0, features.tolist().index(one)] = 0
    output = answer.replay.run(answer.replay.embed(keep[:, index] * answer.captured.concepts.values), answer.slots)
    fall = heat - output.heatmap_logits[0].sigmoid()
    inside = [float((fall[s] * masks[s]).sum() / masks[s].sum().clamp(min=1)) for s in slots]
    assert effects[one].inside == pytest.approx(np.mean(inside), abs=1e-5)
    assert ablate(answer, one).features == (one,)  # the same feature can be taken away by hand


def test_json_of_features(tmp_path):
    made = dictionary(effect=EFFECT, interpretation="red things")
    path = save_neuronpedia(made, tmp_path / "new" / "features.jsonl", "scenes-tiny", "2-segcompass")
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [line["index"] for line in lines] == ["0", "1"]  # feature 2 never fired
    first = lines[0]
    assert (first["modelId"], first["layer"], first["frac_nonzero"], first["maxActApprox"]) == (
        *("scenes-tiny", "2-segcompass"),
        *(0.25, 2.5),
    )
    assert [one["description"] for one in first["explanations"]] == ["red (on words)", str(EFFECT), "red things"]
    assert first["explanations"][0]["scores"][1] == {"value": 0.95, "typeName": "purity"}
    word, bare, patch, unplaced = first["activations"]
    assert word["tokens"] == ["find", "the", "red", "circle", "now"] and word["values"] == [0.0, 0.0, 2.5, 0.0, 0.0]
    assert word["tokens"][word["maxValueTokenIndex"]] == "red" and (word["maxValue"], word["minValue"]) == (2.5, 0.0)
    assert bare["tokens"] == ["red"] and bare["minValue"] == 2.0
    assert patch["tokens"] == ["<image 10,0,20,15>"] and unplaced["tokens"] == ["<image>"]
    assert feature_json(made, made[1], "m", "s")["explanations"] == []


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_random_vlm_writes_lines_on_what_has_no_name(family, parts):
    model = tiny_model(family)
    interpreter = Interpreter(model.vlm, tiny_processor(family), max_new_tokens=4)
    made = dictionary()
    noted = interpret(made, interpreter)
    assert noted[0].interpretation is None and isinstance(noted[1].interpretation, str)  # 0 has a name, 2 never fired
    assert noted[2].interpretation is None and made[1].interpretation is None
    again = interpret(made, interpreter, [0, 1])
    assert again[1].interpretation == noted[1].interpretation and isinstance(again[0].interpretation, str)
    score = detection_score(again, interpreter, 0, [1, 2])
    assert score in (0.0, 0.25, 0.5, 0.75, 1.0)
    assert detection_score(again, interpreter, 0, [2]) is None  # no example to tell from
    with pytest.raises(ValueError, match="feature 2 has no interpretation; call interpret"):
        detection_score(again, interpreter, 2, [0])


def test_what_is_asked(monkeypatch):
    processor = tiny_processor()
    interpreter, asked = Interpreter(tiny_model().vlm, processor), []

    def ask(text, pictures=()):
        asked.append((text, list(pictures)))
        return "Yes, it does." if "<<red>>" in text else "no"

    monkeypatch.setattr(interpreter, "ask", ask)
    made = interpret(dictionary(), interpreter, [0])
    (text, pictures) = asked[0]
    assert "- find the <<red>> circle now" in text and "framed places of 1 pictures" in text
    # The patch of 10 to 20 of 40 pixels is framed in a picture of the same size.
    assert len(pictures) == 1 and pictures[0].size == (40, 30) and pictures[0].getpixel((10, 5)) == (255, 0, 255)
    assert pictures[0].getpixel((15, 7)) != (255, 0, 255)
    assert made[0].interpretation == "Yes, it does."
    assert detection_score(made, interpreter, 0, [1]) == 1.0  # both examples fit, "blue" does not
    assert interpreter._inert("a <REF_POS> b") == "a < REF_POS> b"


def test_a_vlm_without_chat_template_is_refused():
    processor = tiny_processor()
    processor.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        Interpreter(tiny_model().vlm, processor)
