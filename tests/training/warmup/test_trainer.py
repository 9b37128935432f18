"""Warm-up: alignment in training, what trains, any VLM, adapters, saving and resuming."""

import numpy as np
import pytest
import torch
from supervised import Gradients, arguments, bare_vlm, make_trainer, tiny_row, uneven_rows
from tiny import tiny_image, tiny_model, tiny_processor
from transformers import AutoModelForImageTextToText

from segcompass_hf.data.collator import SegmentationCollator
from segcompass_hf.data.schema import encode_mask
from segcompass_hf.training.warmup.config import WarmupConfig
from segcompass_hf.training.warmup.trainer import WarmupTrainer

FAMILIES = ("llava", "qwen2_5_vl")


def warmup(tmp_path, model, rows=None, family="llava", **settings):
    keywords = {name: settings.pop(name) for name in ("peft_config", "eval_dataset", "callbacks") if name in settings}
    return WarmupTrainer(
        model=model,
        args=arguments(WarmupConfig, tmp_path, **settings),
        train_dataset=rows or uneven_rows(),
        processing_class=tiny_processor(family),
        **keywords,
    )


# Word-patch alignment in training


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "option", [{"alignment_weight": 1.0, "alignment_layer": 0}, {"embedding_alignment_weight": 1.0}]
)
def test_alignment_gradient_reaches_embeddings_and_projector(option, family, tmp_path):
    gradients = Gradients()
    settings = {"missing_reasoning": "skip"} | option
    rows = [tiny_row(0, 1, None), tiny_row(1, 2, None)]  # no language loss: all gradients are the alignment's
    trainer = warmup(tmp_path, bare_vlm(family), rows, family, callbacks=[gradients], **settings)
    trainer.train()
    projector = "multi_modal_projector" if family == "llava" else "visual.merger"
    reached = {name for name, gradient in gradients.values.items() if gradient.abs().max() > 1e-6}
    assert any(projector in name for name in reached) and any("embed_tokens" in name for name in reached)
    assert not any(".layers." in name for name in reached)  # layer 0 is before all of them
    assert not any("vision_tower" in name or "visual.blocks" in name for name in gradients.values)


@pytest.mark.parametrize(
    ("family", "layer", "pairs"), [("llava", 0, "target"), ("llava", 2, "names"), ("qwen2_5_vl", 2, "target")]
)
def test_alignment_falls_in_training(family, layer, pairs, tmp_path):
    rows = []
    for index in range(4):  # the object is at the left or at the right, and the words say which
        mask = np.zeros((56, 56), bool)
        mask[:, :28] = index % 2 == 0
        mask[:, 28:] = index % 2 == 1
        picture = np.where(mask[..., None], np.uint8([200, 30, 30]), np.uint8([30, 30, 90 + index]))
        rows.append(tiny_row(index, masks=[encode_mask(mask)], image=picture, instruction="the red square"))
    settings = {"alignment_weight": 1.0, "alignment_layer": layer, "max_steps": 20, "learning_rate": 3e-3}
    settings["alignment_pairs"] = pairs
    trainer = warmup(tmp_path, bare_vlm(family), rows, family, **settings)
    trainer.train()
    logs = trainer.state.log_history
    assert logs[19]["alignment_loss"] < 0.5 * logs[0]["alignment_loss"]
    assert logs[19]["language_loss"] < logs[0]["language_loss"]


# What trains


@pytest.mark.parametrize("family", FAMILIES)
def test_format_is_learned_and_the_loss_falls(family, tmp_path):
    rows = [tiny_row(index, 1, "red") for index in range(2)]
    settings = {"max_steps": 60, "learning_rate": 3e-3, "logging_steps": 20, "eval_max_new_tokens": 12}
    trainer = warmup(tmp_path, bare_vlm(family), rows, family, eval_dataset=rows, **settings)
    assert trainer.format_share(rows) == 0.0
    trainer.train()
    assert trainer.state.log_history[-2]["token_accuracy"] > 0.95
    metrics = trainer.evaluate()
    assert metrics["eval_format_share"] == 1.0 and metrics["eval_loss"] < 0.2
    assert trainer.answer(rows[:1]) == ["<think>red</think>" + "<REF_POS>" * 4]


def moved_parameters(trainer) -> set[str]:
    before = {name: value.clone() for name, value in trainer.vlm.named_parameters()}
    trainer.train()
    return {name for name, value in trainer.vlm.named_parameters() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_that_train(family, tmp_path):
    vision, projector = {
        "llava": ("model.vision_tower.", "model.multi_modal_projector."),
        "qwen2_5_vl": ("model.visual.blocks.", "model.visual.merger."),
    }[family]
    expected = {"all": (True, True, True), "without_vision": (False, True, True), "decoder": (False, False, True)}
    for trainable, (moves_vision, moves_projector, moves_layers) in expected.items():
        trainer = warmup(tmp_path, bare_vlm(family), family=family, trainable=trainable)
        moved = moved_parameters(trainer)
        for prefix, moves in (
            (vision, moves_vision),
            (projector, moves_projector),
            ("model.language_model.layers.0.", moves_layers),
            ("lm_head.weight", True),
        ):
            assert any(name.startswith(prefix) for name in moved) == moves, (trainable, prefix)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trainable", ["without_vision", "decoder", "all"])
def test_which_trainable_weights_get_a_gradient(trainable, family, tmp_path):
    # DistributedDataParallel waits for them, unless it is told to look which are used.
    gradients = Gradients()
    rows = [tiny_row(0, 0, None), tiny_row(1, 0, None)]  # nothing to align, nothing to say
    settings = {"trainable": trainable, "alignment_weight": 0.5, "missing_reasoning": "skip"}
    trainer = warmup(tmp_path, bare_vlm(family), rows, family, callbacks=[gradients], **settings)
    trainer.train()
    without = {n for n, p in trainer.vlm.named_parameters() if p.requires_grad} - set(gradients.values)
    if trainable == "all" and family == "llava":
        assert without and all(name.startswith("model.vision_tower") for name in without)
        assert trainer.args.ddp_find_unused_parameters
    else:
        assert not without


def test_decoder_alone_trains_the_rows_of_the_added_tokens(tmp_path):
    vlm, processor = bare_vlm(), tiny_processor()
    before = {name: value.clone() for name, value in vlm.state_dict().items()}
    warmup(tmp_path, vlm, trainable="decoder", weight_decay=0.5).train()
    ids = sorted([processor.ref_token_id, processor.think_start_token_id, processor.think_end_token_id])
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        rows = (vlm.state_dict()[name] != before[name]).any(1).nonzero()[:, 0].tolist()
        assert rows == ids, name


def test_learning_rate_factors(tmp_path):
    factors = '{"model.multi_modal_projector": 10, "model.language_model.layers.3": 0.5}'
    trainer = warmup(tmp_path, bare_vlm(), learning_rate_factors=factors)
    rates = {id(p): group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    model = trainer.vlm.model
    assert rates[id(model.multi_modal_projector.linear_1.weight)] == pytest.approx(1e-2)
    assert rates[id(model.language_model.layers[3].mlp.up_proj.weight)] == pytest.approx(5e-4)
    assert rates[id(model.language_model.layers[2].mlp.up_proj.weight)] == pytest.approx(1e-3)
    assert id(next(model.vision_tower.parameters())) not in rates


def test_inner_vlm_of_a_segcompass_is_trained_in_place(tmp_path):
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = warmup(tmp_path / "run", model)
    assert trainer.alignment_layer == 2
    trainer.train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith("vlm.") for name in moved)
    trainer.save_model(str(tmp_path / "saved"))
    from transformers import AutoModel

    loaded = AutoModel.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_adapters(whole, tie, tmp_path):
    from peft import LoraConfig

    model = tiny_model(tie=tie) if whole else bare_vlm(tie=tie)
    vlm = model.vlm if whole else model
    before = {name: value.clone() for name, value in vlm.state_dict().items()}
    config = LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    trainer = warmup(
        tmp_path / "run", model, peft_config=config, max_steps=8, learning_rate=1e-2, alignment_weight=0.1
    )
    trainer.train()
    assert trainer.state.log_history[7]["language_loss"] < 0.9 * trainer.state.log_history[0]["language_loss"]
    inputs = SegmentationCollator(tiny_processor(), inputs="language", with_masks=False)([tiny_row()])
    inputs = {name: value for name, value in inputs.items() if name not in ("labels", "completion_mask")}
    with torch.no_grad():
        adapted = trainer.model.eval()(**inputs).logits
    merged = trainer.merge_adapters()
    assert merged is model if whole else merged is trainer.vlm
    after = trainer.vlm.state_dict()
    assert set(after) == set(before)
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    embeddings = {"model.language_model.embed_tokens.weight", "lm_head.weight"}
    assert embeddings <= moved and all("q_proj" in n or "v_proj" in n or n in embeddings for n in moved)
    ids = [tiny_processor().ref_token_id, tiny_processor().think_start_token_id, tiny_processor().think_end_token_id]
    for name in embeddings:
        assert (after[name] != before[name]).any(1).nonzero()[:, 0].tolist() == sorted(ids), name
    with torch.no_grad():
        torch.testing.assert_close(trainer.vlm.eval()(**inputs).logits, adapted, rtol=1e-4, atol=1e-4)
    trainer.save_model(str(tmp_path / "saved"))
    auto = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    assert torch.allclose((auto.vlm if whole else auto).lm_head.weight, trainer.vlm.lm_head.weight)


# Any VLM, any start


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_other_families(family, tmp_path):
    trainer = warmup(tmp_path, bare_vlm(family), family=family, alignment_weight=0.5, eval_max_new_tokens=4)
    trainer.train()
    assert 0 < trainer.state.log_history[0]["alignment_loss"] < 10
    assert trainer.format_share(uneven_rows(), 2) == 0.0


def test_tokens_must_be_embedded(tmp_path):
    from segcompass_hf.token_rows_segcompass import add_tokens

    processor = tiny_processor()
    vlm = bare_vlm(vocab_size=len(processor.tokenizer) - 3)
    with pytest.raises(ValueError, match="add_tokens"):
        warmup(tmp_path, vlm)
    add_tokens(processor.tokenizer, vlm)
    warmup(tmp_path, vlm).train()
    with pytest.raises(ValueError, match="processing_class"):
        WarmupTrainer(bare_vlm(), arguments(WarmupConfig, tmp_path))
    with pytest.raises(ValueError, match="alignment_layer"):
        warmup(tmp_path, bare_vlm(), alignment_layer=5)
    for settings in ({"alignment_weight": -1.0}, {"alignment_temperature": 0.0}):
        with pytest.raises(ValueError, match="alignment"):
            arguments(WarmupConfig, tmp_path, **settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_next_stage_starts_from_the_saved_folder(family, tmp_path):
    from tiny import tiny_sam_config
    from transformers import SamModel

    from segcompass_hf import SegCompassForReasoningSegmentation, SegCompassProcessor

    processor = tiny_processor(family, instruction_template="Segment {instruction}.")
    trainer = WarmupTrainer(
        bare_vlm(family), arguments(WarmupConfig, tmp_path / "run"), uneven_rows(), processing_class=processor
    )
    trainer.train()
    folder = str(tmp_path / "saved")
    trainer.save_model(folder)
    again = SegCompassProcessor.from_parts(folder, 64, num_slots=2)
    assert again.num_slots == 2 and again.instruction_template == "Segment {instruction}."
    assert again.vlm_processor_class == processor.vlm_processor_class
    assert SegCompassProcessor.from_parts(again, 64).build_prompt("red") == processor.build_prompt("red")
    sam = SamModel(tiny_sam_config())
    model = SegCompassForReasoningSegmentation.from_pretrained_parts(folder, sam, num_slots=2, processor=again)
    trained = trainer.vlm.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in model.vlm.state_dict().items())
    inputs = again(images=tiny_image(0), instruction="red", reasoning="red")
    assert model.config.ref_token_id == again.ref_token_id and model(**inputs).slot_logits.shape == (1, 2)


def test_padding_changes_nothing(tmp_path):
    # Prompts of different lengths: the shorter one is padded on the left, its answer on the right.
    rows = [tiny_row(0, 1, "red"), tiny_row(1, 1, "the larger of two", instruction="the largest red circle of them")]
    trainer, sums = make_trainer("warmup", "llava", tmp_path, rows), []
    for part in (rows, rows[:1], rows[1:]):
        batch = trainer.data_collator(part)
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model.eval(), dict(batch))
        names = ("alignment_weight", "embedding_alignment_weight", "reading_weight")
        weights = {name: getattr(trainer.args, name) for name in names}
        vars(trainer.args).update(dict.fromkeys(names, 0.0))
        with torch.no_grad():
            language = trainer.compute_loss(trainer.model, dict(batch))
        vars(trainer.args).update(weights)
        sums.append((language, loss - language, (batch["labels"] != -100).sum()))
    (both, both_others, total), (first, first_others, n), (second, second_others, m) = sums
    assert total == n + m and first_others > 0
    torch.testing.assert_close(both, (n * first + m * second) / total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both_others, (first_others + second_others) / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("whole", [False, True])
def test_resuming_gives_the_same_curve(whole, tmp_path):
    def trainer(folder):
        model = tiny_model() if whole else bare_vlm()
        settings = {"max_steps": 4, "per_device_train_batch_size": 2, "lr_scheduler_type": "linear"}
        settings |= {"save_strategy": "steps", "save_steps": 2, "alignment_weight": 0.5}
        return warmup(tmp_path / folder, model, **settings)

    expected, resumed = trainer("run"), trainer("run")
    expected.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, value in expected.vlm.state_dict().items():
        assert torch.equal(value, resumed.vlm.state_dict()[name]), name
    curves = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (expected, resumed)]
    assert curves[0] == curves[1] and len(curves[0]) == 4
