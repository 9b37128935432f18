"""EfficientNet-lite2, SmolLM2 and MobileSAM in one model: what it sees, a step of training, and its memory."""

import copy

import pytest
import torch
from PIL import Image

from segcompass_hf.data import build_coco
from segcompass_hf.training.memory.meter import MemoryMeter
from segcompass_hf.training.memory.model import fake_model
from segcompass_hf.training.memory.setup import TrainingSetup
from segcompass_hf.training.memory.step import training_bytes
from segcompass_hf.training.segmentation.config import SegmentationConfig
from segcompass_hf.training.segmentation.trainer import SegmentationTrainer

ZEBRA, ZEBRA_PHOTOGRAPH = 340, "COCO_train2014_000000000034.jpg"  # of ImageNet's 1,000


@torch.no_grad()
def test_the_tower_knows_a_zebra(efficientnet_lite2_package, samples):
    from efficientnet_lite2 import efficientnet_image_processor, efficientnet_lite2

    tower, classifier = efficientnet_lite2()
    image = Image.open(samples / "images" / ZEBRA_PHOTOGRAPH).convert("RGB")
    pixels = efficientnet_image_processor(260)(image, return_tensors="pt")["pixel_values"]
    share = classifier(tower(pixels).last_hidden_state.mean((2, 3))).softmax(-1)[0]
    assert share.argmax() == ZEBRA and share[ZEBRA] > 0.9


@torch.no_grad()
def test_image_tokens_are_cells_of_the_tower_s_map(composition, samples):
    model, processor = composition
    inputs = processor(images=samples / "images" / ZEBRA_PHOTOGRAPH, instruction="the zebra")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == (256 // 32) ** 2
    vlm = model.vlm
    cells = vlm.model.vision_tower(inputs["pixel_values"]).last_hidden_state  # (1, 1280, 8, 8)
    tokens = vlm.get_image_features(inputs["pixel_values"]).pooler_output  # (1, 64, 576)
    assert tokens.shape == (1, 64, 576)
    torch.testing.assert_close(tokens[0, 8], vlm.model.multi_modal_projector(cells[0, :, 1, 0]), atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def trainer(composition, samples, tmp_path_factory):
    """For joint training of a copy, on two photographs."""
    model, processor = composition
    rows = [
        row | {"reasoning": "There is something to be seen in the picture."}
        for row in build_coco(samples / "refcoco" / "instances.json", samples / "images")
        if row["kind"] == "single"
    ][:2]
    arguments = SegmentationConfig(
        output_dir=str(tmp_path_factory.mktemp("step")),
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-4,
        warmup_steps=0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    return SegmentationTrainer(
        model=copy.deepcopy(model), args=arguments, train_dataset=rows, processing_class=processor
    )


def test_memory_of_a_step_is_as_estimated(trainer, measured):
    model = trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(2)])
    length, active = batch["input_ids"].shape[1], []
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    hook = model.codebook.register_forward_pre_hook(
        lambda module, args: active.append(args[0].counts().float().mean())
    )
    known = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    with MemoryMeter([*known, *batch.values()]) as meter:
        loss = trainer.compute_loss(model, batch)
        kept = meter.live
        loss.backward()
    hook.remove()
    completion = int((batch["labels"] != -100).sum(1).max())
    setup = TrainingSetup(
        stage="segmentation",
        batch_size=2,
        prompt_tokens=length - completion,
        completion_tokens=completion,
        active_concepts=round(float(max(active))),
        objects=1,
        autocast=False,
        gradient_checkpointing=False,
    )
    with fake_model(model.config, stage="segmentation", trainable="joint") as fake:
        estimated_kept, estimated_working = training_bytes(fake, setup)
    measured("MiB kept, and estimated", [round(size / 2**20, 1) for size in (kept, estimated_kept)])
    most = (meter.peak, estimated_kept + estimated_working)
    measured("MiB at most, and estimated", [round(size / 2**20, 1) for size in most])
    assert estimated_kept == pytest.approx(kept, rel=0.05)
    assert estimated_kept + estimated_working == pytest.approx(meter.peak, rel=0.05)
    model.zero_grad()


def test_a_step_moves_what_trains_and_nothing_else(trainer):
    model = trainer.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer.train()
    assert trainer.state.global_step == 1 and 0 < trainer.state.log_history[-1]["train_loss"] < 100
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and moved <= trains | {"vlm.lm_head.weight", "vlm.model.language_model.embed_tokens.weight"}
    for part in ("vlm.model.language_model.layers.3.", "codebook.", "slot_mapper.", "sam.mask_decoder."):
        assert any(name.startswith(part) for name in moved), part
    assert not any("vision_tower" in name for name in moved)  # its batch norms' statistics among them
