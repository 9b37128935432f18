"""The recipe of scenes-tiny: labels derived by hand, one optimiser out of two, stages that resume exactly."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainingArguments

pytest.importorskip("accelerate")

from segcompass_hf import SegCompassSae  # noqa: E402
from segcompass_hf.data.scenes.drawing import CELL, GRID, IMAGE_SIZE  # noqa: E402
from segcompass_hf.training.loop.muon import Float32Muon, MuonWithAdamW  # noqa: E402
from segcompass_hf.training.scenes_batches import MAX_OBJECTS, SceneSamples, patch_labels  # noqa: E402
from segcompass_hf.training.scenes_joint import JointCollator, JointTrainer  # noqa: E402
from segcompass_hf.training.scenes_parts import build_processor, build_sae_config  # noqa: E402
from segcompass_hf.training.scenes_recipe import (  # noqa: E402
    Stage,
    _finish,
    _language_model,
    export_checkpoint,
    last_checkpoint,
    run_stage,
    split_checkpoint,
)
from segcompass_hf.training.scenes_sae import SceneSaeTrainer, StateDataset  # noqa: E402
from segcompass_hf.training.scenes_trainers import VisionTrainer  # noqa: E402


def test_patch_labels_by_hand():
    """One object fills cell b1 and a third of c1; its centre is in b1. Everything else is background."""
    ids = torch.zeros(1, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    ids[0, :CELL, CELL : 2 * CELL + CELL // 3] = 1
    objects = torch.full((1, MAX_OBJECTS, 4), -100)
    objects[0, 0] = torch.tensor([2, 1, 0, 1])  # color 2, shape 1, size 0, cell 1 = b1
    labels = patch_labels(ids, objects)
    assert labels["color"][0, 1] == 2 and labels["shape"][0, 1] == 1 and labels["size"][0, 1] == 0
    assert labels["centre"][0].nonzero().tolist() == [[1]]
    assert labels["color"][0, 2] == -100, "less than 40 % of the patch shows the object"
    assert not labels["background"][0, 2], "but it is no background either"
    assert labels["background"].sum() == GRID * GRID - 2


@pytest.mark.parametrize("num_slots", [4, 2, 6])
def test_collator_agrees_with_the_processor(num_slots):
    """Training reads what inference will read: same ids, pixels and soft targets, up to the side of the padding."""
    scenes = SceneSamples(40, "val", seed=3)
    processor, samples = build_processor(num_slots), [scenes[i] for i in (0, 1, 9, 11, 29, 36)]
    assert [len(s["targets"]) for s in samples] == [1, 2, 3, 0, 4, 4], "more and fewer than slots"
    batch = JointCollator(processor.tokenizer, num_slots)(samples)
    masks = [
        np.stack([s["ids"] == i + 1 for i in s["targets"]]) if s["targets"] else np.zeros((0, *s["ids"].shape), bool)
        for s in samples
    ]
    expected = processor(
        images=[s["image"] for s in samples],
        instruction=[s["instruction"] for s in samples],
        reasoning=[s["reasoning"] for s in samples],
        masks=masks,
        overflow="merge",
    )
    for ours, theirs, key in (
        (batch["input_ids"], expected["input_ids"], "attention_mask"),
        (batch["labels"], expected["labels"], "attention_mask"),
        (batch["completion_mask"], expected["completion_mask"], "attention_mask"),
    ):
        for row in range(6):
            assert torch.equal(ours[row][batch[key][row] == 1], theirs[row][expected[key][row] == 1])
    for key in ("pixel_values", "sam_pixel_values", "mask_labels", "num_objects"):
        torch.testing.assert_close(batch[key], expected[key], check_dtype=False)
    assert not torch.isin(batch["input_ids"], torch.tensor(processor.tokenizer.unk_token_id)).any()


def _two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 4))


def _optimizer(model):
    groups = [{"named_parameters": list(model.named_parameters()), "muon_lr": 1e-2, "adamw_lr": 1e-3}]
    return MuonWithAdamW(groups)


def _step(model, optimizer, seed):
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(seed))
    model(x).pow(2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    model = _two_layers()
    optimizer = _optimizer(model)
    muon, adamw = optimizer.parts
    assert [id(p) for g in muon.param_groups for p in g["params"]] == [id(model[0].weight)]  # 4 rows are too few
    decayed = [g for g in adamw.param_groups if g["weight_decay"] > 0]
    assert [id(p) for g in decayed for p in g["params"]] == [id(model[2].weight)]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = [p.clone() for p in model.parameters()]
    _step(model, optimizer, 0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)), "the scheduler rules both"
    assert scheduler.get_last_lr() == [0.0] * len(optimizer.param_groups)


def test_muon_state_survives_saving():
    straight = _two_layers()
    optimizer = _optimizer(straight)
    for seed in range(4):
        _step(straight, optimizer, seed)
    stopped = _two_layers()
    first = _optimizer(stopped)
    for seed in range(2):
        _step(stopped, first, seed)
    resumed = _optimizer(stopped)
    resumed.load_state_dict(first.state_dict())
    for seed in range(2, 4):
        _step(stopped, resumed, seed)
    for a, b in zip(straight.parameters(), stopped.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(64, 16), (16, 64)])
def test_muon_in_float32_goes_where_torch_goes(shape):
    """Equal to torch's own but for the rounding of its bfloat16 iteration; momentum and decay included."""
    torch.manual_seed(0)
    theirs = [nn.Parameter(torch.randn(shape)) for _ in range(3)]
    ours = [nn.Parameter(parameter.detach().clone()) for parameter in theirs]
    settings = {"lr": 1e-2, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = torch.optim.Muon(theirs, **settings), Float32Muon(ours, **settings)
    before = torch.stack(ours).detach().clone()
    for _ in range(3):
        for one, other in zip(theirs, ours, strict=True):
            one.grad = torch.randn(shape)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = (torch.stack(ours).detach() - before).norm()
    assert moved > 0.1
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=0, atol=0.01 * float(moved))
    one, other = (o.state[p[1]]["momentum_buffer"] for o, p in zip(optimizers, (theirs, ours), strict=True))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk", "batchtopk"])
def test_every_family_of_saes_trains_and_gets_its_dead_features_back(architecture, tmp_path):
    torch.manual_seed(0)
    states = torch.randn(64, 128)
    k = {"k": 4} if "topk" in architecture else {}
    sae = SegCompassSae(build_sae_config(2, d_sae=32, architecture=architecture, **k))
    arguments = TrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=64, report_to=[], remove_unused_columns=False, use_cpu=True
    )
    arguments.save_strategy = "no"
    trainer = SceneSaeTrainer(
        model=sae, args=arguments, train_dataset=StateDataset(states), data_collator=lambda rows: rows
    )
    trainer.train()
    per_feature = [name for name in ("b_enc", "b_gate", "b_mag", "r_mag", "threshold") if hasattr(sae, name)]
    assert len(per_feature) == {"gated": 3, "jumprelu": 2}.get(architecture, 1)
    with torch.no_grad():
        for name in per_feature:
            getattr(sae, name).fill_(7.0)
    trainer.fired = torch.ones(32)
    trainer.fired[5] = 0
    trainer.resample()
    for name in per_feature:
        values = getattr(sae, name)
        assert values[5] == 0 and (values[:5] == 7).all() and (values[6:] == 7).all()
    assert sae.W_dec[5].norm() > 0 and trainer.fired.sum() == 0
    before = sae.encode(states)
    _finish("sae", sae, tmp_path / "sae")
    norms = sae.W_dec.norm(dim=1)
    if k:
        assert torch.equal(sae.encode(states), before), "features that compete keep their lengths"
    else:
        torch.testing.assert_close(norms, torch.ones(32))


def test_a_stage_says_what_it_needs(tmp_path):
    with pytest.raises(FileNotFoundError, match="starts from 'vision'"):
        run_stage("warmup", tmp_path)


def test_a_stage_killed_while_it_saves_goes_on_from_the_checkpoint_before(tmp_path, monkeypatch):
    stage = Stage(3, 2, 6e-3, 0)  # a checkpoint after every step

    def killed_at(step):
        def save(trainer, output_dir):  # after the weights
            if trainer.state.global_step == step:
                raise KeyboardInterrupt
            return untouched(trainer, output_dir)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(VisionTrainer, "_save_optimizer_and_scheduler", save)
            run_stage("vision", tmp_path / "killed", stage)
        assert (tmp_path / "killed" / "vision" / "state" / f"checkpoint-{step}" / "model.safetensors").is_file()

    untouched = VisionTrainer._save_optimizer_and_scheduler
    killed_at(1)
    assert last_checkpoint(tmp_path / "killed" / "vision") is None  # it starts anew
    killed_at(2)
    assert last_checkpoint(tmp_path / "killed" / "vision").endswith("checkpoint-1")
    for folder in ("killed", "whole"):
        run_stage("vision", tmp_path / folder, stage)
    one, two = (load_file(tmp_path / folder / "vision" / "model.safetensors") for folder in ("killed", "whole"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.slow
def test_every_stage_runs_resumes_exactly_and_exports(tmp_path, monkeypatch):
    monkeypatch.setattr("segcompass_hf.training.scenes_recipe.SAE_SCENES", 32)
    settings = {
        "vision": Stage(4, 4, 6e-3, 0),
        "masks": Stage(4, 4, 6e-3, 1),
        "warmup": Stage(4, 4, 3e-3, 2),
        "words": Stage(4, 4, 3e-3, 6, options={"concept_weight": 0.3}),
        "sae": Stage(4, 256, 2e-3, 3, options={"d_sae": 96, "layer": 1}),
        "slots": Stage(4, 4, 6e-3, 5, options={"num_slots": 3, "concept_threshold": 0.1}),
        "joint": Stage(4, 4, 4e-3, 4),
    }
    for name, stage in settings.items():
        run_stage(name, tmp_path, stage)
    words, warmup = (load_file(tmp_path / name / "model.safetensors") for name in ("words", "warmup"))
    below = [key for key in warmup if "layers.0.mlp" in key and "language_model" in key]
    assert below and not any(torch.equal(words[key], warmup[key]) for key in below)
    log = [json.loads(line) for line in (tmp_path / "joint" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 4

    # The same stage, killed in its third step and started again, ends in the same weights.
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "slots", again / "slots")

    def killed(trainer, *args, **kwargs):
        if trainer.state.global_step == 2:
            raise KeyboardInterrupt
        return untouched(trainer, *args, **kwargs)

    untouched = JointTrainer.compute_loss
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(JointTrainer, "compute_loss", killed)
        run_stage("joint", again, settings["joint"])
    assert [p.name for p in (again / "joint" / "state").glob("checkpoint-*")] == ["checkpoint-2"]
    run_stage("joint", again, settings["joint"])
    one, two = (load_file(root / "joint" / "model.safetensors") for root in (tmp_path, again))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=0, msg=key)

    folder = export_checkpoint(tmp_path, tmp_path / "checkpoint")
    # A checkpoint is as good a start as the stages behind it: its layers below the SAE are those of `words`.
    split_checkpoint(folder, tmp_path / "split")
    assert _language_model(tmp_path / "split") == tmp_path / "split" / "warmup"
    part = load_file(tmp_path / "split" / "warmup" / "model.safetensors")
    for key in below:
        torch.testing.assert_close(part[key], words[key], rtol=1e-3, atol=1e-3)  # fp16
    run_stage("sae", tmp_path / "split", settings["sae"])
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 12e6
    stored = load_file(folder / "model.safetensors")
    assert {t.dtype for t in stored.values() if t.is_floating_point()} <= {torch.float16, torch.float32}
    from transformers import AutoModel, AutoProcessor

    import segcompass_hf  # noqa: F401

    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert model.dtype == torch.float32
    sample = SceneSamples(1, "val")[0]
    inputs = processor(images=sample["image"], instruction=sample["instruction"], return_tensors="pt")
    seg = model.segment(**inputs, max_new_tokens=24)
    assert seg.pred_masks.shape == (1, 3, IMAGE_SIZE // 2, IMAGE_SIZE // 2)
    assert (model.config.sae_layer, model.config.sae_config.d_sae) == (1, 96)
    assert (model.config.concept_threshold, processor.num_slots) == (0.1, 3)
