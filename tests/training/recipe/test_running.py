"""Recipes on a tiny model: stages in order, kept and refused, checked beforehand, killed and gone on with."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from places import ROOT, SUPPORT
from safetensors.torch import load_file

pytest.importorskip("trl")

from recipe_runs import EVERY_STEP, STAGES, write_recipe  # noqa: E402

from segcompass_hf import SegCompassSae, cli  # noqa: E402
from segcompass_hf.training.recipe.check import check_recipe, describe_plans  # noqa: E402
from segcompass_hf.training.recipe.parts import Parts  # noqa: E402
from segcompass_hf.training.recipe.record import BEGUN, DONE, alone_in, read_record, weights_digest  # noqa: E402
from segcompass_hf.training.recipe.running import run_recipe  # noqa: E402
from segcompass_hf.training.recipe.settings import RecipeError, read_recipe  # noqa: E402
from segcompass_hf.training.recipe.summary import curves  # noqa: E402

SAE = {"sae": STAGES["sae"]}
SUPERVISED = {"segmentation": {**STAGES["segmentation"], "max_steps": 2}}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run of an SAE stage and a segmentation stage; what it said, line by line."""
    folder, said = tmp_path_factory.mktemp("recipe"), []
    recipe = write_recipe(folder, SAE | SUPERVISED, save_dtype="float16")
    result = run_recipe(read_recipe(recipe), "segcompass train recipe.yaml", said.append)
    return recipe, result, said


def test_the_result_is_a_checkpoint_made_of_what_the_stages_trained(done):
    from transformers import AutoModel, AutoProcessor

    recipe, result, said = done
    assert [line.split(",")[0] for line in said] == ["stage 1 of 2: sae", "stage 2 of 2: segmentation"]
    assert result == recipe.parent / "out" / "checkpoint"
    model, processor = AutoModel.from_pretrained(result), AutoProcessor.from_pretrained(result)
    sae = SegCompassSae.from_pretrained(recipe.parent / "out" / "sae")
    torch.testing.assert_close(model.sae.W_dec, sae.W_dec, rtol=1e-3, atol=1e-3)
    assert model.config.sae_config.d_sae == 32 and processor.num_slots == 4
    stored = load_file(result / "model.safetensors")
    assert {value.dtype for name, value in stored.items() if name.startswith("vlm.")} == {torch.float16}
    assert model.dtype == torch.float32, "it loads in the recipe's dtype"
    assert not [path for path in result.iterdir() if path.is_dir()], "no checkpoints of the training within"


def test_the_summary_shows_curves_settings_and_versions(done):
    recipe = done[0]
    page = (recipe.parent / "out" / "summary.html").read_text()
    assert page.count("<section>") == 3 and "segcompass train recipe.yaml" in page
    assert "explained_variance" in page and "segmentation/giou" in page and "slots_alone_share" in page
    figures = json.loads((recipe.parent / "out" / "summary.json").read_text())
    assert [stage["steps"] for stage in figures["stages"]] == [3, 2] and figures["versions"]["torch"]
    pytest.importorskip("matplotlib")
    assert page.count("data:image/png;base64,") == 2


def test_the_command_ends_with_the_address_of_the_page(done, capsys, monkeypatch):
    recipe, result, _ = done
    monkeypatch.chdir(recipe.parent)
    assert cli.main(["train", recipe.name]) == 0, "all of it is done"
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [str(result), f"page: {(recipe.parent / 'out' / 'summary.html').as_uri()}"]


def test_curves_are_what_was_logged_more_than_once():
    log = [
        {"step": 1, "loss": 2.0, "epoch": 0.5},
        {"step": 2, "loss": 1.0, "note": "x"},
        {"step": 2, "eval_loss": 3.0},
    ]
    assert curves(log) == {"loss": ([1, 2], [2.0, 1.0])}


def test_what_is_done_is_kept_and_changed_settings_are_refused(done):
    recipe, result, _ = done
    before, said = (result / "model.safetensors").stat().st_mtime_ns, []
    assert run_recipe(read_recipe(recipe, ["segmentation.logging_steps=2"]), "", said.append) == result
    assert all("is done, kept" in line for line in said) and len(said) == 2
    assert (result / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(RecipeError, match=r"stage sae is done in .* sae.d_sae was 32 and is 64\. Undo the"):
        run_recipe(read_recipe(recipe, ["sae.d_sae=64"]))
    with pytest.raises(RecipeError, match="segmentation.max_steps was 2 and is 5"):
        check_recipe(read_recipe(recipe, ["segmentation.max_steps=5"]), with_memory=False)


def test_a_stage_that_starts_from_something_else_is_refused(done, tmp_path):
    recipe = done[0]
    shutil.copytree(recipe.parent, tmp_path / "copy")
    moved = tmp_path / "copy" / "recipe.yaml"
    changes = [f"output_dir={tmp_path / 'copy' / 'out'}", f"model={tmp_path / 'copy' / 'start'}"]
    run_recipe(read_recipe(moved, changes))  # the same weights elsewhere are the same start
    config = tmp_path / "copy" / "out" / "sae" / "config.json"
    marker = json.loads((config.parent / DONE).read_text())
    config.write_text(config.read_text() + "\n")
    assert weights_digest(str(config.parent)) != marker["result"]
    with pytest.raises(RecipeError, match=r"stage segmentation is done .* what it starts from \(sae\) was"):
        run_recipe(read_recipe(moved, changes))


def test_a_run_is_held_by_one_process(tmp_path):
    with alone_in(tmp_path), pytest.raises(RecipeError, match="another process is training in"), alone_in(tmp_path):
        pass
    with alone_in(tmp_path):
        pass


def test_the_plan_says_what_each_stage_will_do(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    plans = check_recipe(read_recipe(recipe))
    assert [(plan.name, plan.state, plan.rows, plan.per_step, plan.steps) for plan in plans] == [
        ("warmup", "to do", 6, 2, 3),
        ("sae", "to do", 8, 32, 3),
        ("segmentation", "to do", 6, 2, 3),
        ("grpo", "to do", 2, 2, 2),
    ]
    assert all(plan.memory.peak > 0 and plan.memory.trainable > 0 for plan in plans)
    table = describe_plans(plans).splitlines()
    assert len(table) == 6 and table[0].startswith("stage ") and "sae sae" in table[3]
    assert not (tmp_path / "out").exists(), "nothing was written"
    assert cli.main(["train", str(recipe), "--dry-run", "--set", "grpo=null", "--processes", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[3].startswith("segmentation ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model=null"], "the recipe names nothing to start from; it needs model or vlm"),
        (["model=./nowhere"], "model: there is no folder './nowhere'"),
        (["sae={}", "sae.d_sae=many"], "sae.d_sae is 'many'; it takes int"),
        (["config.num_slot=2"], "config names ['num_slot']; SegCompassConfig has no such fields"),
        (["config.slot_encoder_heads=7"], "the parts do not fit each other"),
        (["sae.sae_layer=9"], "sae_layer is an index into hidden_states"),
        (["segmentation.batch_size=3"], "segmentation.batch_size is 3, which cannot be divided into 2 processes"),
        (["segmentation.num_samples=1"], "segmentation: a step takes 2 rows, but the data set has 1"),
        (["warmup={}", "sae=null"], "warmup changes the states that the SAE reads"),
        (
            ["sae.names=segcompass_hf.token_places:nothing"],
            "sae.names is 'segcompass_hf.token_places:nothing'; expected",
        ),
        (["segmentation.names=a:b"], "segmentation.names: only warmup and sae read names"),
        (["load_in_4bit=true"], "load_in_4bit is for a recipe of one stage"),
        (["sae.lora_r=4"], "sae.lora_r: an SAE trains whole"),
        (["dtype=float8"], "dtype is 'float8'; choose one of float32, bfloat16, float16"),
    ],
)
def test_what_is_wrong_is_found_before_the_first_step(tmp_path, capsys, changes, message):
    recipe = write_recipe(tmp_path, SAE | SUPERVISED)
    capsys.readouterr()  # bars of what was just saved
    flags = [word for change in changes for word in ("--set", change)]
    assert cli.main(["train", str(recipe), "--processes", "2", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
    assert not (tmp_path / "out").exists()


def test_parts_that_are_missing_or_do_not_fit(tmp_path):
    recipe = write_recipe(tmp_path, SUPERVISED)
    model = tmp_path / "start"
    from transformers import AutoModel

    whole = AutoModel.from_pretrained(model)
    whole.vlm.save_pretrained(tmp_path / "vlm", save_original_format=False)
    whole.sam.save_pretrained(tmp_path / "sam")
    SegCompassSae(type(whole.sae.config)(d_in=48, d_sae=8, layer=2)).save_pretrained(tmp_path / "sae")
    parts = ["model=null", f"vlm={tmp_path / 'vlm'}"]
    for changes, message in (
        (parts, "segmentation needs a SAM: name one"),
        ([*parts, f"sam={tmp_path / 'sam'}"], "segmentation needs an SAE of this VLM"),
        ([f"sae={tmp_path / 'sae'}"], "the SAE reads states of width 48 .* the VLM's are 32 wide"),
        ([f"sam={tmp_path / 'vlm'}"], "sam: .* is a 'llava' model; expected a SAM"),
    ):
        with pytest.raises(RecipeError, match=message):
            check_recipe(read_recipe(recipe, changes), with_memory=False)


def test_what_a_stage_leaves_is_what_the_next_starts_from(tmp_path):
    start = Parts(vlm="vlm", sam="sam")
    warm = start.after("warmup", tmp_path / "warmup")
    with_sae = warm.after("sae", tmp_path / "sae")
    assert with_sae == Parts(vlm=str(tmp_path / "warmup"), sam="sam", sae=str(tmp_path / "sae"))
    assert with_sae.after("segmentation", tmp_path / "s") == Parts(model=str(tmp_path / "s"))
    whole = Parts(model="m")
    assert whole.after("warmup", tmp_path / "w") == Parts(model=str(tmp_path / "w")) and whole.is_whole
    assert whole.after("sae", tmp_path / "sae").used_by("segmentation") == {"model": "m", "sae": str(tmp_path / "sae")}
    assert start.used_by("warmup") == {"vlm": "vlm"}


@pytest.mark.slow
def test_lora_stages_are_merged_and_only_parts_can_be_trained(tmp_path):
    stages = {"warmup": {**STAGES["warmup"], "lora_r": 2, "max_steps": 1}}
    assert run_recipe(read_recipe(write_recipe(tmp_path, stages))) == tmp_path / "out" / "warmup"
    stages |= {"segmentation": {**STAGES["segmentation"], "lora_r": 2, "max_steps": 1}}
    result = run_recipe(read_recipe(write_recipe(tmp_path, stages)))
    assert result.name == "checkpoint" and not (result / "adapter_config.json").exists()
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "start", result))
    assert before.keys() == after.keys()
    changed = {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}
    assert {"vlm", "codebook", "slot_mapper"} <= changed and "sae" not in changed


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_kill_at_random_moments_ends_in_the_same_weights(tmp_path, processes):
    """SEGCOMPASS_KILLS=10 for the figure in the changelog; the seed of the moments is in the report."""
    kills = os.environ.get("SEGCOMPASS_KILLS", "3" if processes == 1 else "2")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SUPPORT / "recipe_runs.py"), str(tmp_path), kills, str(processes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["last"] == 0 and len(report["killed"]) == int(kills)
    assert report["digest"] == report["whole"], report


@pytest.mark.slow
def test_two_processes_share_a_run(tmp_path):
    stages = {"warmup": {"max_steps": 1, "batch_size": 2, **EVERY_STEP}, **SAE, **SUPERVISED}
    recipe = write_recipe(tmp_path, stages, processes=2)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "segcompass_hf.cli", "train", str(recipe)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("stage 1 of 3: warmup") == 1, "one process speaks"
    assert done.stdout.splitlines()[-1] == f"page: {(tmp_path / 'out' / 'summary.html').as_uri()}"
    marker = json.loads((tmp_path / "out" / "segmentation" / DONE).read_text())
    assert marker["processes"] == 2 and (tmp_path / "out" / "checkpoint" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "content", [b"[]", b"{", b"\xff", b"{}", b'{"fingerprint": [], "processes": 1, "starts": []}']
)
def test_damaged_records_of_a_stage_are_named(tmp_path, content):
    (tmp_path / DONE).write_bytes(content)
    with pytest.raises(RecipeError, match=f"{DONE} is damaged.*delete {tmp_path} to train the stage again"):
        read_record(tmp_path, DONE)
    assert read_record(tmp_path, BEGUN) is None


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_saves_the_step_and_the_command_named_goes_on(tmp_path, processes):
    endless = {"max_steps": 10_000, "save_steps": 5_000, "dataloader_num_workers": 1}
    stages = {"segmentation": {**STAGES["segmentation"], **endless}}
    recipe = write_recipe(tmp_path, stages, processes=processes)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "segcompass_hf.cli", "train", str(recipe)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = subprocess.Popen(command, env=environment, **streams)
    for line in running.stdout:
        if line.startswith("{'loss'"):  # of the first step
            break
    running.send_signal(signal.SIGTERM)
    said, complained = running.communicate(timeout=300)
    assert running.returncode == 143, complained[-3000:]
    lines = [line for line in complained.splitlines() if "SIGTERM" in line]
    goes_on = f"segcompass train: stopped by SIGTERM; this goes on: segcompass train {recipe}"
    assert lines[-1] == goes_on == complained.splitlines()[-1] and "Traceback" not in complained
    (checkpoint,) = (tmp_path / "out" / "segmentation").glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert 1 <= step < 10_000 and lines[:-1] == [
        f"SIGTERM: training stops behind step {step}, of which a checkpoint is saved in {checkpoint.parent}."
    ]
    assert not list((tmp_path / "out").rglob("*lock"))
