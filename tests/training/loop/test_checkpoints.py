"""Checkpoints: whole or not there, the last whole one found, and refused where they do not fit the model."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from robust_trainers import Arguments, RobustTrainer, make_trainer
from torch import nn
from transformers import Trainer

from segcompass_hf import files
from segcompass_hf.training.loop.checkpoints import (
    discard,
    find_last_whole,
    list_files,
    publish,
    remove_leftovers,
    what_is_missing,
)
from segcompass_hf.training.loop.weights import check_shards_fit, check_weights_fit, forget_tied_names, stored_shapes

# Checkpoints.


def test_what_is_missing(tmp_path):
    folder = tmp_path / "checkpoint-1"
    assert "no such folder" in what_is_missing(folder)
    (folder / "deep").mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"12345")
    (folder / "deep" / "b.bin").write_bytes(b"1")
    assert "trainer_state.json" in what_is_missing(folder)  # without a list the trainer's last file must be there
    (folder / "trainer_state.json").write_text("{}")
    assert what_is_missing(folder) is None
    list_files(folder)
    assert json.loads((folder / "checkpoint_files.json").read_text()) == {
        "a.bin": 5,
        "deep/b.bin": 1,
        "trainer_state.json": 2,
    }
    (folder / "a.bin").write_bytes(b"1234")
    assert what_is_missing(folder) == "a.bin has 4 bytes, not 5"
    (folder / "deep" / "b.bin").unlink()
    (folder / "a.bin").write_bytes(b"54321")
    assert what_is_missing(folder) == "deep/b.bin is missing"


def test_publish_replaces_and_leftovers_are_put_back(tmp_path):
    final, aside = tmp_path / "checkpoint-1", tmp_path / "_unfinished" / "checkpoint-1"
    for content in ("old", "new"):
        aside.mkdir(parents=True)
        (aside / content).touch()
        publish(aside, final)
        assert [path.name for path in final.iterdir()] == [content]
    final.rename(tmp_path / "_unfinished" / "replaced-checkpoint-1")  # killed between the two renames
    (tmp_path / "_unfinished" / "checkpoint-2").mkdir()
    (tmp_path / ".tmpX2k341").touch()  # as safetensors calls the last weights until they are written
    assert remove_leftovers(tmp_path) == ["checkpoint-2"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert [path.name for path in final.iterdir()] == ["new"]
    assert remove_leftovers(tmp_path) == []
    discard(final)
    assert not final.exists()


def test_last_whole_checkpoint(tmp_path, caplog):
    assert find_last_whole(tmp_path) is None
    for step in (2, 10, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-99-merged").mkdir()
    assert find_last_whole(tmp_path).name == "checkpoint-10"
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text('{"cut')
    assert find_last_whole(tmp_path).name == "checkpoint-9"
    assert "checkpoint-10 (" in caplog.text
    for step in (2, 9):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    with pytest.raises(ValueError, match=r"none of 1 is whole: checkpoint-10"):
        find_last_whole(tmp_path)


def test_resume_refuses_or_passes_over_a_damaged_checkpoint(tmp_path, caplog):
    settings = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, [1] * 6, **settings).train()
    damaged = tmp_path / "checkpoint-6" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"checkpoint-6 is no whole checkpoint: model.safetensors has \d+ bytes"):
        make_trainer(tmp_path, [1] * 6, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    trainer = make_trainer(tmp_path, [1] * 6, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert "resuming from" in caplog.text and "checkpoint-4, the last whole checkpoint" in caplog.text
    assert trainer._initial_global_step == 4
    assert trainer.model.w.item() == pytest.approx(1 - 0.6, abs=1e-6)
    assert what_is_missing(tmp_path / "checkpoint-6") is None  # written anew


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o027, 0o640)])
def test_weights_follow_the_umask(tmp_path, mask, expected):
    """safetensors makes private files, which others on a shared disk could not read."""
    before = os.umask(mask)
    try:
        trainer = make_trainer(tmp_path, [1, 1], save_strategy="steps", save_steps=2)
        trainer.train()
        trainer.save_model(str(tmp_path / "end"))
    finally:
        os.umask(before)
    for folder in ("checkpoint-2", "end"):
        assert (tmp_path / folder / "model.safetensors").stat().st_mode & 0o777 == expected
    assert what_is_missing(tmp_path / "checkpoint-2") is None


def test_one_command_starts_goes_on_and_ends(tmp_path, caplog):
    """Steps 2 and 4 of 5 are saved, and the last."""
    settings = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1}

    def run(rows=(1, 1, 1, 1, 1), **changed):
        trainer = make_trainer(tmp_path, rows, **settings | changed)
        trainer.train(resume_from_checkpoint=True)
        return trainer

    whole = run(max_steps=5)
    assert "holds no checkpoint: training starts anew" in caplog.text
    assert (whole.resumed_from, whole.state.global_step) == (None, 5)
    kept = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))}
    for steps in ({"max_steps": 5}, {"max_steps": 3}, {"num_train_epochs": 1}):  # an epoch has 5 steps
        caplog.clear()
        again = run(**steps)
        assert again.resumed_from == str(tmp_path / "checkpoint-5") and again.state.global_step == 5
        assert "checkpoint-5 is the end of a run of" in caplog.text and "nothing is left to train" in caplog.text
        assert torch.equal(again.model.w, whole.model.w) and again.state.num_train_epochs == 1
        assert [line for line in again.state.log_history if "loss" in line] == whole.state.log_history[:5]
        assert {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))} == kept
    longer = run(max_steps=7)  # steps 6 and 7
    assert longer.state.global_step == 7 and longer.model.w.item() == pytest.approx(1 - 0.7, abs=1e-6)
    steps = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
    assert steps == [2, 4, 5, 6, 7]


def test_a_run_killed_behind_its_last_checkpoint_ends_there(tmp_path):
    """Seven steps of which the second epoch has two: Trainer would go on in that epoch."""
    settings = {"save_strategy": "steps", "save_steps": 7, "max_steps": 7}
    make_trainer(tmp_path, [1] * 5, **settings).train(resume_from_checkpoint=True)
    again = make_trainer(tmp_path, [1] * 5, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 7 and again.model.w.item() == pytest.approx(1 - 0.7, abs=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]


def test_of_two_that_train_in_one_folder_the_second_is_refused(tmp_path):
    """It would take the first one's unfinished checkpoint for the leftover of a kill. tests/test_locks.py has two
    processes."""

    class Rivalled(RobustTrainer):
        def save_loop_state(self, folder):
            assert folder.parent.name == "_unfinished"
            for resume in (None, True):
                with pytest.raises(
                    FileExistsError, match="another process is training in .*; wait for it, end it, or"
                ):
                    make_trainer(tmp_path, [1, 1]).train(resume_from_checkpoint=resume)
            assert folder.is_dir()
            super().save_loop_state(folder)

    make_trainer(tmp_path, [1, 1], trainer_class=Rivalled, save_strategy="steps", save_steps=1).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    assert what_is_missing(tmp_path / "checkpoint-2") is None
    make_trainer(tmp_path, [1, 1]).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", ["optimizer.pt", "loop_state_0.pt"])
def test_a_full_disk_is_said_in_words_and_takes_no_more_room(tmp_path, monkeypatch, name):
    save = torch.save

    def failing(content, place, **kwargs):
        if str(place).endswith(f"checkpoint-2/{name}"):
            Path(place).write_bytes(b"half")
            monkeypatch.setattr(files, "free_space", lambda path: 0 if Path(place).exists() else 5 << 20)
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 540416 vs 540308")
        save(content, place, **kwargs)

    monkeypatch.setattr(torch, "save", failing)
    trainer = make_trainer(tmp_path, [1, 1], save_strategy="steps", save_steps=1)
    with pytest.raises(OSError, match="^the disk of .* is full .* make room and start again"):
        trainer.train()
    assert [path for path in tmp_path.rglob("*2*") if path.is_file() or path.name == "checkpoint-2"] == []
    monkeypatch.undo()
    again = make_trainer(tmp_path, [1, 1], save_strategy="steps", save_steps=1)
    again.train(resume_from_checkpoint=True)
    assert again.resumed_from == str(tmp_path / "checkpoint-1") and again.model.w.item() == pytest.approx(0.8)


def test_a_checkpoint_that_does_not_fit_is_refused_before_a_step(tmp_path):
    make_trainer(tmp_path, [1], save_strategy="steps", save_steps=1).train()
    trainer = make_trainer(tmp_path, [1, 1])
    trainer.model.new = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="2 of the model's weights are missing: new.weight, new.bias"):
        trainer.train(resume_from_checkpoint=True)


def test_tied_names_are_not_reported_as_missing():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
            self.b.weight = self.a.weight

    tied = Tied()
    tied.register_load_state_dict_post_hook(forget_tied_names)
    state = {"a.weight": torch.zeros(2, 2), "a.bias": torch.zeros(2), "b.bias": torch.zeros(2)}
    assert tied.load_state_dict(state, strict=False).missing_keys == ["c.weight", "c.bias"]
    assert tied.b.weight.abs().sum() == 0


def test_rotation_keeps_the_best_and_it_is_loaded(tmp_path):
    class Evaluated(RobustTrainer):
        def evaluate(self, *args, **kwargs):
            return super().evaluate(*args, **kwargs) | {"eval_loss": [3.0, 1.0, 2.0, 4.0][self.state.global_step - 1]}

    trainer = make_trainer(
        tmp_path,
        [1, 1, 1, 1],
        trainer_class=Evaluated,
        evaluated=[{"x": torch.tensor([1.0])}],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
    )
    trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert trainer.model.w.item() == pytest.approx(1 - 0.2, abs=1e-6)
    for name in ("checkpoint-2", "checkpoint-4"):
        state = json.loads((tmp_path / name / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")
        assert what_is_missing(tmp_path / name) is None


def test_pushes_start_from_the_final_folder(tmp_path):
    seen = []

    class Pushing(RobustTrainer):
        def _save_checkpoint(self, *args):
            self.args.push_to_hub = True
            super()._save_checkpoint(*args)
            self.args.push_to_hub = False

    trainer = make_trainer(tmp_path, [1, 1], trainer_class=Pushing, save_strategy="steps", save_steps=2)
    original = Trainer._push_from_checkpoint
    try:
        Trainer._push_from_checkpoint = lambda self, folder: seen.append((folder, what_is_missing(folder)))
        trainer.train()
    finally:
        Trainer._push_from_checkpoint = original
    assert seen == [(str(tmp_path / "checkpoint-2"), None)]


# Whether weights fit.


class Two(nn.Module):
    def __init__(self, out=3):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, out)


def test_weights_must_fit_by_name_and_shape(tmp_path):
    from safetensors.torch import save_file

    state = Two().state_dict()
    save_file(state, tmp_path / "model.safetensors")
    assert stored_shapes(tmp_path) == {"a.weight": (2, 2), "a.bias": (2,), "b.weight": (3, 2), "b.bias": (3,)}
    check_weights_fit(tmp_path, Two())
    with pytest.raises(ValueError, match=r"2 shapes differ: b.bias \(\(3,\) stored, \(4,\) in the model\)"):
        check_weights_fit(tmp_path, Two(out=4))
    save_file(
        {"c.bias" if name == "b.bias" else name: tensor for name, tensor in state.items()},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(
        ValueError, match=r"1 weights that the model does not have: c.bias; 1 of the model's.*: b.bias"
    ):
        check_weights_fit(tmp_path, Two())
    tied = Two()
    tied.c = nn.Linear(2, 2)
    tied.c.weight, tied.c.bias = tied.a.weight, tied.a.bias
    save_file(state, tmp_path / "model.safetensors")
    check_weights_fit(tmp_path, tied)  # c is a under another name


def test_shards_and_pickles_must_fit(tmp_path):
    from safetensors.torch import save_file

    state = Two().state_dict()
    index = {"weight_map": {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(state)}}
    for file in set(index["weight_map"].values()):
        save_file({name: state[name] for name, place in index["weight_map"].items() if place == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    check_weights_fit(tmp_path, Two())
    with pytest.raises(ValueError, match="shapes differ: b.weight"):
        check_weights_fit(tmp_path, Two(out=4))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks model-00002-of-00002.safetensors"):
        check_weights_fit(tmp_path, Two())
    (tmp_path / "pickled").mkdir()
    torch.save(state, tmp_path / "pickled" / "pytorch_model.bin")
    check_weights_fit(tmp_path / "pickled", Two())
    with pytest.raises(ValueError, match="shapes differ"):
        check_weights_fit(tmp_path / "pickled", Two(out=4))


def test_sharded_fsdp_checkpoints_must_fit(tmp_path):
    import torch.distributed.checkpoint as distributed

    distributed.save({"model": Two().state_dict()}, checkpoint_id=tmp_path / "pytorch_model_fsdp_0", no_dist=True)
    check_shards_fit(tmp_path, Two())
    with pytest.raises(ValueError, match="2 shapes differ"):
        check_shards_fit(tmp_path, Two(out=4))
    smaller = Two()
    del smaller.b
    with pytest.raises(ValueError, match="2 weights that the model does not have: b"):
        check_shards_fit(tmp_path, smaller)


def save_and_fit(model, folder):
    """Write a checkpoint of a model that takes a step, and check and load it."""
    trainer = RobustTrainer(model=model, args=Arguments(str(folder), use_cpu=True, report_to=[]), train_dataset=[0])
    trainer.create_optimizer_and_scheduler(1)
    trainer._tr_loss, trainer._globalstep_last_logged = torch.tensor(0.0), 0
    trainer._save_checkpoint(model, None)
    changed = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    trainer._load_from_checkpoint(str(folder / "checkpoint-0"))
    assert all(torch.equal(tensor, changed[name]) for name, tensor in model.state_dict().items())
    return folder / "checkpoint-0"


@pytest.mark.parametrize(("family", "tie"), [("llava", False), ("qwen2_5_vl", True)])
def test_vlms_composites_and_adapters_resume_whole(tmp_path, family, tie):
    from peft import get_peft_model
    from tiny import tiny_model, tiny_vlm_config
    from transformers import AutoModelForImageTextToText

    from segcompass_hf.training.adapters import lora_config

    vlm = AutoModelForImageTextToText.from_config(tiny_vlm_config(family, tie=tie))
    checkpoint = save_and_fit(vlm, tmp_path / "vlm")
    loaded = AutoModelForImageTextToText.from_pretrained(checkpoint).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in vlm.state_dict().items())
    vlm.save_pretrained(tmp_path / "older_names")  # as a plain Trainer would
    with pytest.raises(ValueError, match=r"weights that the model does not have: .*save_original_format"):
        check_weights_fit(tmp_path / "older_names", vlm)

    composite = tiny_model(family, tie=tie)
    checkpoint = save_and_fit(composite, tmp_path / "composite")
    with pytest.raises(ValueError, match="does not fit"):
        check_weights_fit(checkpoint, vlm)

    adapted = get_peft_model(composite, lora_config(composite, r=4))
    adapters = save_and_fit(adapted, tmp_path / "adapted")
    assert (adapters / "adapter_model.safetensors").is_file()
    with pytest.raises(ValueError, match="holds no weights of the adapter 'default'"):
        check_weights_fit(checkpoint, adapted)
    other = get_peft_model(tiny_model(family, tie=tie), lora_config(composite, r=2))
    with pytest.raises(ValueError, match=r"shapes differ: .*lora_"):
        check_weights_fit(adapters, other)


def test_load_best_model_checks_the_fit(tmp_path):
    trainer = make_trainer(tmp_path, [1], save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    trainer.model.new = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="2 of the model's weights are missing: new.weight, new.bias"):
        trainer._load_best_model()


def test_the_trainers_own_push_is_refused(tmp_path):
    """It uploads whatever lies in the output folder."""
    with pytest.raises(ValueError, match="push_to_hub=True would upload all .*segcompass push"):
        make_trainer(tmp_path, [1], push_to_hub=True)
    with pytest.raises(ValueError, match="push_to_hub of a trainer would upload all"):
        make_trainer(tmp_path, [1]).push_to_hub()
