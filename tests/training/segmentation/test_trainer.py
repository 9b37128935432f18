"""Supervised segmentation: padding, what trains, options, evaluation, saving and resuming."""

import pytest
import torch
from supervised import Gradients, arguments, make_trainer, one_step, tiny_row, uneven_rows
from tiny import tiny_model, tiny_processor

from segcompass_hf.data.collator import SegmentationCollator
from segcompass_hf.metrics import segmentation_metrics
from segcompass_hf.training.loop.first_rows import FirstRows
from segcompass_hf.training.segmentation.config import SegmentationConfig
from segcompass_hf.training.segmentation.trainer import init_codebook_from_sae, union_iou

FAMILIES = ("llava", "qwen2_5_vl")
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def test_padding_and_batch_change_nothing(tmp_path):
    # The loss of two samples is the mean of their own ones, weighted by what each is a mean over.
    rows = [tiny_row(0, 2, "short"), tiny_row(1, 1, "a much longer reasoning, of many more words than the other")]
    collator, losses = SegmentationCollator(tiny_processor()), []
    trainer = make_trainer("segmentation", "llava", tmp_path, rows)
    trainer.model.eval()
    for part in (rows, rows[:1], rows[1:]):
        batch = collator(part)
        with torch.no_grad():
            loss, output = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
        losses.append((loss - output.losses.loss, output.losses.loss, (batch["labels"] != -100).sum()))
    (language, segmentation, _), (first, first_seg, n), (second, second_seg, m) = losses
    torch.testing.assert_close(language, (n * first + m * second) / (n + m), **TOLERANCE)
    torch.testing.assert_close(segmentation, (first_seg + second_seg) / 2, **TOLERANCE)


@pytest.mark.parametrize("rows", [[tiny_row(0, 0)] * 2, [tiny_row(0, 1, None)] * 2], ids=["no-target", "no-reasoning"])
def test_every_trainable_weight_gets_a_gradient_from_any_batch(rows, tmp_path):
    # DistributedDataParallel waits for them. Zero is fine, none is not.
    gradients = Gradients()
    settings = {"per_device_train_batch_size": 2, "missing_reasoning": "skip"}
    trainer = make_trainer("segmentation", "llava", tmp_path, rows, callbacks=[gradients], **settings)
    trainer.train()
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert set(gradients.values) == trainable
    assert all(gradient.isfinite().all() for gradient in gradients.values.values())


# What trains


@pytest.mark.parametrize("family", FAMILIES)
def test_what_trains_moves_and_the_rest_stays_bit_equal(family, tmp_path):
    model = tiny_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    make_trainer("segmentation", family, tmp_path, uneven_rows(), model=model, max_steps=2).train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    layers = "vlm.model.language_model.layers"
    parts = ("codebook", "slot_encoder", "slot_mapper", "sam.mask_decoder", "sam.prompt_encoder.mask_embed")
    for part in (f"{layers}.2", f"{layers}.3", "vlm.lm_head", *parts):
        assert any(name.startswith(part) for name in moved), part
    for name in moved:
        assert name.startswith((f"{layers}.2", f"{layers}.3", "vlm.lm_head", *parts)), name
    ids = [model.config.ref_token_id, model.config.think_start_token_id, model.config.think_end_token_id]
    rows = (model.vlm.lm_head.weight != before["vlm.lm_head.weight"]).any(1).nonzero()[:, 0].tolist()
    assert rows == sorted(ids)


def test_learning_rates_per_part(tmp_path):
    trainer = make_trainer("segmentation", "llava", tmp_path, uneven_rows(), learning_rate=1e-3, weight_decay=0.1)
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in trainer.create_optimizer().param_groups for p in g["params"]}
    model = trainer.model
    expected = {
        model.codebook.weight: (0.025, 0.1),
        model.vlm.model.language_model.layers[3].mlp.up_proj.weight: (0.001, 0.1),
        model.vlm.lm_head.weight: (0.001, 0.0),  # all but the added rows would shrink
        model.sam.mask_decoder.upscale_conv1.weight: (0.01, 0.1),
        model.sam.prompt_encoder.mask_embed.conv1.weight: (0.01, 0.1),
    }
    for parameter, (rate, decay) in expected.items():
        assert rates[id(parameter)] == (pytest.approx(rate), pytest.approx(decay))
    for part, rate in ((model.slot_mapper, 0.08), (model.slot_encoder, 0.025)):
        assert all(rates[id(parameter)][0] == pytest.approx(rate) for parameter in part.parameters())


@pytest.mark.parametrize(("optimizer", "learning_rate"), [("trainer", 1e-3), ("muon", 1e-2)])
def test_loss_falls_on_a_handful(optimizer, learning_rate, tmp_path):
    settings = {"max_steps": 25, "per_device_train_batch_size": 4}
    settings |= {"optimizer": optimizer, "learning_rate": learning_rate}
    settings |= {"codebook_lr_factor": 3.0, "slot_mapper_lr_factor": 3.0, "mask_decoder_lr_factor": 3.0}
    rows = [tiny_row(index, count) for index, count in enumerate((1, 2, 0, 1))]
    trainer = make_trainer("segmentation", "llava", tmp_path, rows, **settings)
    trainer.train()
    first, last = trainer.state.log_history[0], trainer.state.log_history[-2]
    for name in ("loss", "language_loss", "segmentation/loss"):
        assert last[name] < 0.7 * first[name], name
    assert last["segmentation/giou"] > first["segmentation/giou"]


def test_logged_names(tmp_path):
    trainer = make_trainer("segmentation", "llava", tmp_path, [tiny_row(0, 6), tiny_row(1, 0)], max_steps=2)
    trainer.train()
    logs = trainer.state.log_history[1]
    terms = ("loss", "heatmap_bce", "heatmap_dice", "mask_dice", "mask_focal", "confidence_loss", "kept_slots", "giou")
    assert {f"segmentation/{term}" for term in terms} | {"language_loss", "token_accuracy"} <= set(logs)
    assert logs["dropped_objects"] == 4  # two objects too many, seen twice
    config, total = trainer.model.config, logs["language_loss"]
    total += logs["segmentation/loss"] + config.conf_loss_weight * logs["segmentation/confidence_loss"]
    assert logs["loss"] == pytest.approx(total, rel=1e-4)  # lm_loss_weight and seg_loss_weight are 1


# Options


def test_loss_weights_and_their_switch(tmp_path):
    switched = '{"mask_dice_weight": 2.0, "mask_focal_weight": 5}'  # as a command line gives it
    settings = {"seg_loss_weight": 0.5, "loss_weight_switch_step": 2, "switched_loss_weights": switched}
    trainer = make_trainer("segmentation", "llava", tmp_path, uneven_rows(), max_steps=3, **settings)
    weights = [trainer.args.loss_weights(trainer._model_weights, step) for step in range(3)]
    assert [w["mask_dice_weight"] for w in weights] == [0.6, 0.6, 2.0]
    assert [w["mask_focal_weight"] for w in weights] == [0.0, 0.0, 5.0]
    assert [w["seg_loss_weight"] for w in weights] == [0.5] * 3
    trainer.train()
    logs, config = trainer.state.log_history[2], trainer.model.config
    assert (config.mask_dice_weight, config.mask_focal_weight, config.seg_loss_weight) == (2.0, 5.0, 0.5)
    terms = {name: logs[f"segmentation/{name}"] for name in ("heatmap_bce", "heatmap_dice", "mask_dice", "mask_focal")}
    seg = terms["heatmap_bce"] + 0.6 * terms["heatmap_dice"] + 2 * terms["mask_dice"] + 5 * terms["mask_focal"]
    expected = logs["language_loss"] + 0.5 * seg + 0.2 * logs["segmentation/confidence_loss"]
    assert logs["loss"] == pytest.approx(expected, rel=1e-4)


def test_settings_that_make_no_sense_are_refused(tmp_path):
    for settings, message in (
        ({"switched_loss_weights": {"other": 1.0}, "loss_weight_switch_step": 1}, "other"),
        ({"loss_weight_switch_step": 1}, "go together"),
        ({"drop_references_share": 1.5}, "drop_references_share"),
    ):
        with pytest.raises(ValueError, match=message):
            arguments(SegmentationConfig, tmp_path, **settings)
    from segcompass_hf.training.segmentation.trainer import SegmentationTrainer

    with pytest.raises(ValueError, match="processing_class"):
        SegmentationTrainer(tiny_model(), arguments(SegmentationConfig, tmp_path))


def test_reference_states_are_dropped(tmp_path):
    settings = {"slots_alone_share": 0.5, "drop_references_share": 0.5, "max_steps": 20}
    trainer = make_trainer("segmentation", "llava", tmp_path, uneven_rows(), **settings)
    trainer.state.max_steps, mapper = 20, trainer.model.slot_mapper
    states = torch.ones(400, 4, 32)
    mapper.train()
    trainer.state.global_step = 9  # of 20: still in the first half
    assert trainer._drop_references(mapper, (states, "slots"))[0].sum() == 0
    trainer.state.global_step = 10
    kept, other = trainer._drop_references(mapper, (states, "slots"))
    per_sample = kept.mean((1, 2))
    assert other == "slots" and set(per_sample.tolist()) == {0.0, 1.0} and 0.4 < per_sample.mean() < 0.6
    mapper.eval()
    assert trainer._drop_references(mapper, (states, "slots")) is None
    trainer.state.global_step = 0
    _, gradients = one_step("segmentation", "llava", tmp_path, slots_alone_share=1.0, lm_loss_weight=0.0)
    last_layer = {n: g for n, g in gradients.items() if "layers.3" in n}
    assert last_layer and all(not g.any() for g in last_layer.values())  # masks reach the layers by references alone


def test_codebook_from_sae_decoder():
    same, smaller, larger = (tiny_model(d_slot=size) for size in (32, 16, 64))
    for model in (same, smaller, larger):
        init_codebook_from_sae(model)
    assert torch.equal(same.codebook.weight, same.sae.W_dec)
    assert torch.equal(larger.codebook.weight[:, :32], larger.sae.W_dec) and not larger.codebook.weight[:, 32:].any()
    # The best rank-16 approximation leaves exactly the energy of the other singular values behind.
    values = torch.linalg.svdvals(smaller.sae.W_dec)
    assert torch.allclose(smaller.codebook.weight.square().sum(), values[:16].square().sum(), rtol=1e-4)


def test_union_iou_by_hand():
    masks, targets = torch.zeros(3, 2, 1, 4, dtype=torch.bool), torch.zeros(3, 2, 1, 4, dtype=torch.bool)
    masks[0, 0, 0, :2] = masks[0, 1, 0, 3] = True  # the second slot is not kept
    targets[0, 0, 0, 1], targets[0, 1, 0, 2] = True, True
    masks[1, 0, 0, 0] = True  # a prediction where nothing is
    kept = torch.tensor([[True, False], [True, False], [False, False]])
    assert torch.allclose(union_iou(masks, kept, targets), torch.tensor([1 / 3, 0.0, 1.0]))


def test_adapters(tmp_path):
    from segcompass_hf.training.adapters import lora_config
    from segcompass_hf.training.segmentation.trainer import SegmentationTrainer

    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = SegmentationTrainer(
        model,
        arguments(SegmentationConfig, tmp_path, max_steps=3, drop_references_share=0.5, learning_rate=1e-4),
        uneven_rows(),
        processing_class=tiny_processor(),
        peft_config=lora_config(model, r=4),
    )
    rates = {g["lr"] for g in trainer.create_optimizer().param_groups}
    assert {round(rate, 6) for rate in rates} == {0.0001, 0.0025, 0.008, 0.001}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history[:3]]
    merged = trainer.model.merge_and_unload()
    after = merged.state_dict()
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    assert any(name.startswith("vlm.model.language_model.layers.3") for name in moved)
    assert any(name.startswith("slot_mapper") for name in moved)
    assert not any(name.startswith(("sae", "sam.vision", "vlm.model.language_model.layers.1")) for name in moved)
    assert losses[2] < losses[0]


# Evaluation, saving, resuming


def test_evaluation_is_the_models_own_segmentation(tmp_path):
    rows = [tiny_row(0, 1), tiny_row(1, 0), tiny_row(2, 6)]
    settings = {"eval_max_new_tokens": 10, "per_device_eval_batch_size": 2}
    trainer = make_trainer("segmentation", "llava", tmp_path, rows, eval_rows=rows, **settings)
    trainer.model.config.slot_logit_threshold = 0.1  # so that some slots are kept and some are not
    metrics = trainer.evaluate()
    model, processor = trainer.model.eval(), tiny_processor()
    predictions, references = [], []
    for row in rows:
        inputs = processor(images=row["image"], instruction=row["instruction"])
        output = model.segment(**inputs, max_new_tokens=10)
        sizes = {name: inputs[name] for name in ("original_sizes", "reshaped_input_sizes")}
        predictions.append(processor.post_process_segmentation(output, **sizes)[0]["masks"].numpy())
        batch = SegmentationCollator.for_evaluation(processor)([row])
        references.append(batch["references"][0]["masks"])
    for name, value in segmentation_metrics(predictions, references).items():
        assert metrics[f"eval_{name}"] == pytest.approx(value), name
    assert metrics["eval_kept_slots"] == pytest.approx(sum(map(len, predictions)) / 3)
    assert metrics["eval_loss"] > 0
    both = trainer.evaluate({"all": rows, "first": rows[:1]})  # several evaluation sets
    assert both["eval_all_gIoU"] == pytest.approx(metrics["eval_gIoU"]) and both["eval_first_N-acc"] == 1.0
    assert trainer.segment_rows(iter(rows), 1)["gIoU"] == pytest.approx(
        segmentation_metrics(predictions[:1], references[:1])["gIoU"]
    )


def test_first_rows():
    rows = list(range(10))
    assert list(FirstRows(rows, 5)) == [0, 1, 2, 3, 4] and len(FirstRows(rows)) == 10
    shares = [list(FirstRows(rows, 5, index, 2)) for index in range(2)]
    assert shares == [[0, 2, 4], [1, 3]] and list(FirstRows(rows, 1, 1, 2)) == []
    assert FirstRows(iter(rows), 7, 1, 3)[:2] == [1, 4]  # a stream
    from datasets import Dataset

    stream = Dataset.from_dict({"number": rows}).to_iterable_dataset()  # has a `__getitem__`, and no length
    assert [row["number"] for row in FirstRows(stream, 5, 1, 2)] == [1, 3] and len(FirstRows(stream)) == 10


def test_resuming_gives_the_same_curve(tmp_path):
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    settings |= {"drop_references_share": 0.5, "logging_steps": 3, "lr_scheduler_type": "linear"}
    whole = make_trainer("segmentation", "llava", tmp_path / "whole", uneven_rows(), **settings)
    whole.train()
    settings |= {"save_strategy": "steps", "save_steps": 2}
    first = make_trainer("segmentation", "llava", tmp_path / "parts", uneven_rows(), **settings)
    first.train()
    second = make_trainer("segmentation", "llava", tmp_path / "parts", uneven_rows(), **settings)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    expected, resumed = (trainer.state.log_history[0] for trainer in (whole, second))
    # The line at step 3 is over steps 1 to 3: the means of the first two came with the checkpoint.
    assert expected["step"] == resumed["step"] == 3
    for name in ("loss", "language_loss", "segmentation/loss", "segmentation/kept_slots"):
        assert resumed[name] == pytest.approx(expected[name], rel=1e-6), name


def test_saved_model_loads_with_its_processor(tmp_path):
    from transformers import AutoModel, AutoProcessor

    trainer = make_trainer("segmentation", "llava", tmp_path / "run", uneven_rows())
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModel.from_pretrained(tmp_path / "saved")
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    processor = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert processor.num_slots == 4


def test_corrupt_rows_of_a_dataset_are_skipped(tmp_path):
    from datasets import Dataset, Features, Image, List, Value

    rle = {"size": List(Value("int32")), "counts": Value("string")}
    columns = {"image": Image(), "instruction": Value("string"), "masks": List(rle), "sample_id": Value("string")}
    rows = [{name: tiny_row(index)[name] for name in columns} for index in range(4)]
    rows[2]["image"] = {"bytes": b"no image", "path": None}
    dataset = Dataset.from_list(rows, features=Features(columns))
    trainer = make_trainer("segmentation", "llava", tmp_path, dataset, per_device_train_batch_size=4)
    trainer.train()
    assert trainer.state.log_history[0]["unreadable_rows"] == 1


@pytest.mark.parametrize("stage", ["warmup", "segmentation"])
def test_rows_with_refused_texts_are_skipped_named_and_counted(stage, tmp_path):
    import json

    from grpo import tiny_rows

    damage = {1: {"instruction": ""}, 2: {"instruction": None}, 4: {"reasoning": "ring " * 9000}}  # it reads 4,096
    rows = tiny_rows((1, 0, 2, 1, 1, 1))
    rows = rows.map(lambda row, index: damage.get(index, {}), with_indices=True)
    trainer = make_trainer(stage, "llava", tmp_path, rows, per_device_train_batch_size=6)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "unreadable_rows.jsonl").read_text().splitlines()]
    assert {(line["index"], line["sample_id"]) for line in lines} == {(1, "row-1"), (2, "row-2"), (4, "row-4")}
    assert trainer.state.log_history[0]["unreadable_rows"] == 3
    trainer = make_trainer(stage, "llava", tmp_path / "strict", rows, unreadable_rows="error", max_steps=6)
    with pytest.raises(ValueError, match=r"row \d \(row-[124]\) is unreadable: .*skip such rows"):
        trainer.train()
