"""The command `segcompass`: what it prints, the figure it writes, and one clear line with exit code 2 on bad input."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from places import ROOT
from safetensors.torch import load_file, save_file

import segcompass_hf
from segcompass_hf import cli, guardrails_segcompass
from segcompass_hf.commands import demo
from segcompass_hf.concept_names_segcompass import NamedConcept
from segcompass_hf.data.schema import decode_mask


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny-llava")
    # Random weights rarely pass the threshold: keep every slot.
    tiny.tiny_model("llava", slot_logit_threshold=-100.0, max_reasoning_tokens=12).save_pretrained(path)
    tiny.tiny_processor("llava").save_pretrained(path)
    return path


@pytest.fixture
def image_file(tmp_path):
    path = tmp_path / "photo.png"
    tiny.tiny_image(0, (60, 45)).save(path)
    return str(path)


@pytest.fixture
def damaged(checkpoint, tmp_path):
    """A copy of the checkpoint to spoil."""
    return Path(shutil.copytree(checkpoint, tmp_path / "damaged"))


def _fails(capsys, *argv: str) -> str:
    """Run, expect exit code 2, nothing on stdout and one line on stderr; return that line."""
    try:
        code = cli.main(list(argv))
    except SystemExit as stop:  # argparse leaves this way
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("segcompass")
    return lines[0]


def test_help_is_quick_and_names_the_commands():
    start = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-m", "segcompass_hf.cli", "--help"], capture_output=True, text=True, env=environment
    )
    assert time.perf_counter() - start < 2
    assert done.returncode == 0
    assert "demo" in done.stdout and "predict" in done.stdout


def test_predict_prints_the_answer_and_writes_a_figure(checkpoint, image_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["predict", image_file, "the red square", "--model", str(checkpoint), "--reasoning", "none"]) == 0
    out, err = capsys.readouterr()
    assert "reasoning: (none)" in out
    assert [f"slot {k}: score" in out for k in range(tiny.NUM_SLOTS)] == [True] * tiny.NUM_SLOTS
    assert "figure: photo.segcompass.png" in out
    assert err == ""  # another checkpoint than the bundled one: nothing to warn of
    with Image.open(tmp_path / "photo.segcompass.png") as figure:
        pixels = np.asarray(figure.convert("RGB"))
    assert pixels.shape[1] > 1000 and pixels.std() > 20  # wide, and not blank


def test_predict_json_holds_the_masks_of_the_direct_route(checkpoint, image_file, tmp_path, capsys):
    argv = ["predict", image_file, "the red square", "--model", str(checkpoint), "--reasoning", "short", "--json"]
    assert cli.main(argv) == 0
    answer = json.loads(capsys.readouterr().out)

    model = segcompass_hf.SegCompassForReasoningSegmentation.from_pretrained(checkpoint).eval()
    processor = tiny.tiny_processor("llava")
    inputs = processor(images=tiny.tiny_image(0, (60, 45)), instruction="the red square", return_tensors="pt")
    with torch.no_grad():
        seg = model.segment(**inputs, reasoning="short")
    expected = processor.post_process_segmentation(
        seg, inputs["original_sizes"], inputs["reshaped_input_sizes"], slot_logit_threshold=-100.0
    )[0]
    assert answer["size"] == [45, 60]
    assert answer["instruction"] == "the red square"
    assert answer["reasoning"] == expected["reasoning"]
    assert answer["figure"] is None and list(tmp_path.glob("*.segcompass.png")) == []
    assert len(answer["segments"]) == len(answer["slot_scores"]) == tiny.NUM_SLOTS
    for k, segment in enumerate(answer["segments"]):
        mask = decode_mask(segment["mask"])
        assert mask.shape == (45, 60) and mask.sum() == segment["area"]
        assert (mask != expected["masks"][k].numpy()).mean() < 0.01
        assert segment["slot"] == k
        assert segment["score"] == pytest.approx(expected["scores"][k].item(), abs=1e-4)


def test_predict_holds_masks_to_concepts_by_name(checkpoint, image_file, tmp_path, capsys, monkeypatch):
    d_sae = segcompass_hf.SegCompassConfig.from_pretrained(checkpoint).sae_config.d_sae
    concepts = [  # one that fires wherever any feature is active, one that never does
        NamedConcept(name, tuple(range(d_sae)), (threshold,) * d_sae)
        for name, threshold in (("anything", -1e9), ("nothing", 1e9))
    ]
    monkeypatch.setattr(guardrails_segcompass, "names_of", lambda model: {c.name: c for c in concepts})
    argv = ["predict", image_file, "x", "--model", str(checkpoint), "--reasoning", "none"]
    assert cli.main([*argv, "--json"]) == 0
    free = json.loads(capsys.readouterr().out)
    assert free["segments"] and "guardrails" not in free
    assert cli.main([*argv, "--json", "--forbid", "nothing", "--require", "nothing"]) == 2
    assert "nothing cannot be both forbidden and required" in capsys.readouterr().err
    assert cli.main([*argv, "--json", "--forbid", "nothing"]) == 0
    assert json.loads(capsys.readouterr().out) == free | {"guardrails": []}
    assert cli.main([*argv, "--json", "--forbid", "nothing", "--require", "nothing's"]) == 2
    assert 'is named "nothing\'s". Near: nothing' in capsys.readouterr().err
    assert cli.main([*argv, "--require", "nothing", "--output", str(tmp_path / "a.png")]) == 0
    out = capsys.readouterr().out
    assert "nothing found" in out and "guardrail: the mask of slot 0 does not show 'nothing', which is required" in out
    assert "guardrail: 'nothing' is required, and no mask is left that shows it." in out


def test_json_and_a_figure_together(checkpoint, image_file, tmp_path, capsys):
    output = tmp_path / "new" / "answer.jpg"
    argv = ["predict", image_file, "x", "--model", str(checkpoint), "--reasoning", "none", "--json"]
    assert cli.main([*argv, "--output", str(output)]) == 0
    assert json.loads(capsys.readouterr().out)["figure"] == str(output)
    with Image.open(output) as figure:
        assert figure.format == "JPEG"


def _bundle(monkeypatch, **folders):
    """Bundled checkpoints at these places, others missing."""

    def bundled_checkpoint(name="scenes-tiny"):
        if name.replace("-", "_") not in folders:
            raise FileNotFoundError(f"{name} is not here")
        return folders[name.replace("-", "_")]

    monkeypatch.setattr(segcompass_hf, "bundled_checkpoint", bundled_checkpoint)


def test_the_bundled_checkpoint_says_what_it_knows(checkpoint, image_file, tmp_path, capsys, monkeypatch):
    _bundle(monkeypatch, scenes_tiny=checkpoint)
    argv = ["predict", image_file, "x", "--reasoning", "none", "--output", str(tmp_path / "a.png")]
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert err.startswith("note: scenes-tiny answers; it knows only procedural scenes of coloured shapes")
    assert "means nothing" in err and "procedural" not in out
    assert cli.main([*argv, "--model", "photos-small"]) == 2
    assert "photos-small is not here" in capsys.readouterr().err


def test_photographs_are_answered_by_photos_small_where_it_is_there(checkpoint, image_file, capsys, monkeypatch):
    _bundle(monkeypatch, scenes_tiny=checkpoint.parent / "missing", photos_small=checkpoint)
    argv = ["predict", image_file, "x", "--reasoning", "none", "--json"]
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["model"] == "photos-small"
    assert err.startswith("note: photos-small answers; it was trained on few photographs")
    assert cli.main([*argv, "--model", "scenes-tiny"]) == 2
    assert "cannot load a checkpoint" in capsys.readouterr().err


def test_words_that_were_not_trained_are_named(checkpoint, image_file, tmp_path, capsys):
    mine = tmp_path / "mine"
    shutil.copytree(checkpoint, mine)
    processor = tiny.tiny_processor("llava")
    processor.add_trained_words(["the zebra", "all zebras"])
    processor.save_pretrained(mine)
    argv = ["predict", image_file, "the zebra crossing", "--reasoning", "none", "--json", "--model", str(mine)]
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert err == 'note: this checkpoint was not trained on the word "crossing"; its answer is a guess.\n'
    assert json.loads(out)["unknown_words"] == ["crossing"]


def test_bad_images_and_instructions(checkpoint, image_file, tmp_path, capsys):
    model = ["--model", str(checkpoint)]
    assert "there is no file 'missing.png'" in _fails(capsys, "predict", "missing.png", "x", *model)
    text = tmp_path / "text.png"
    text.write_text("not an image")
    assert "cannot be read as an image" in _fails(capsys, "predict", str(text), "x", *model)
    assert "error" in _fails(capsys, "predict", str(tmp_path), "x", *model)  # a folder
    assert "the instruction is empty" in _fails(capsys, "predict", image_file, "  ", *model)
    assert "not a picture" in _fails(capsys, "predict", image_file, "x", "--output", "a.txt", *model)
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(Path(image_file).read_bytes()[:200])
    assert "cannot be read as an image" in _fails(capsys, "predict", str(truncated), "x", *model)
    assert "words" not in _fails(capsys, "predict", image_file, "red " * 20_000, *model)


def test_bad_usage(capsys):
    assert "required: COMMAND" in _fails(capsys)
    assert "required: instruction" in _fails(capsys, "predict", "a.png")
    assert "invalid choice: 'frob'" in _fails(capsys, "frob")
    assert "'0' is not a positive number" in _fails(capsys, "demo", "--samples", "0")
    assert "invalid choice: 'loud'" in _fails(capsys, "predict", "a.png", "x", "--reasoning", "loud")


def test_a_missing_checkpoint(image_file, capsys, monkeypatch, tmp_path):
    assert "no checkpoint folder './nowhere'" in _fails(capsys, "predict", image_file, "x", "--model", "./nowhere")
    (tmp_path / "empty").mkdir()
    assert "cannot load a checkpoint" in _fails(capsys, "predict", image_file, "x", "--model", str(tmp_path / "empty"))
    monkeypatch.setattr(segcompass_hf, "__file__", str(tmp_path / "__init__.py"))
    assert "no bundled checkpoint" in _fails(capsys, "predict", image_file, "x")


def test_damaged_checkpoints(damaged, image_file, capsys):
    argv = ["predict", image_file, "x", "--reasoning", "none", "--model", str(damaged)]
    weights = load_file(damaged / "model.safetensors")

    name = next(key for key in sorted(weights) if key.startswith("slot_mapper"))
    rest = {key: value for key, value in weights.items() if key != name}
    save_file(rest, damaged / "model.safetensors", {"format": "pt"})
    line = _fails(capsys, *argv)
    assert "cannot load a checkpoint" in line and name in line

    poisoned = weights | {name: torch.full_like(weights[name], float("nan"))}
    save_file(poisoned, damaged / "model.safetensors", {"format": "pt"})
    assert "finite" in _fails(capsys, *argv).lower()

    (damaged / "model.safetensors").write_bytes(b"\0" * 100)
    assert "cannot load a checkpoint" in _fails(capsys, *argv)
    (damaged / "config.json").write_text("{")
    assert "cannot load a checkpoint" in _fails(capsys, *argv)


def test_a_missing_shard(damaged, image_file, capsys):
    weights = load_file(damaged / "model.safetensors")
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    index = {"metadata": {}, "weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    (damaged / "model.safetensors").unlink()
    first, held = next(iter(shards.items()))
    save_file({name: weights[name].clone() for name in held}, damaged / first, {"format": "pt"})
    line = _fails(capsys, "predict", image_file, "x", "--model", str(damaged))
    assert "cannot load a checkpoint" in line and "model-00002-of-00002.safetensors" in line


def test_demo_shows_every_kind_once_and_writes_its_pictures(checkpoint, tmp_path, capsys):
    output = tmp_path / "demo"
    assert cli.main(["demo", "--model", str(checkpoint), "--output", str(output), "--samples", "3"]) == 0
    out = capsys.readouterr().out
    pictures = sorted(path.name for path in output.glob("*.png"))
    assert len(pictures) == 4 and pictures[0] == "overview.png"
    assert out.splitlines()[-1] == f"page: {(output / 'index.html').as_uri()}"
    page = (output / "index.html").read_text("utf-8")
    for name in pictures[1:]:
        explanation = name.replace(".png", ".html")
        assert f'href="{explanation}"' in page and (output / explanation).is_file()
    kinds = [name.removesuffix(".png").split("_", 2)[2] for name in pictures[1:]]
    assert len(set(kinds)) == 3
    assert out.count("reasoning:") == 3 and out.count("IoU with the truth") == 3
    with Image.open(output / "overview.png") as overview, Image.open(output / pictures[1]) as one:
        assert overview.width == one.width and overview.height > 2.5 * one.height


def test_demo_scenes_are_the_first_of_each_kind_in_order():
    from segcompass_hf.data import scenes

    rows = list(scenes.iterate("val", 60, 0))
    shown = demo._demo_rows("val", 10, 0)
    firsts = {}
    for row in rows:
        firsts.setdefault(row["kind"], row["sample_id"])
    ids = [row["sample_id"] for row in shown]
    assert ids[: len(firsts)] == sorted(firsts.values())  # sample ids are numbered in order
    rest = [row["sample_id"] for row in rows if row["sample_id"] not in firsts.values()]
    assert ids[len(firsts) :] == rest[: 10 - len(firsts)]


def test_demo_refuses_an_unknown_split(capsys):
    assert "no split 'vall'" in _fails(capsys, "demo", "--split", "vall")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("generation_config.json", b"{", "generation_config.json is damaged"),  # which transformers passes over
        ("generation_config.json", b"[1]", "generation_config.json is damaged .*list, expected an object"),
        ("generation_config.json", {"eos_token_id": "x"}, "eos_token_id is 'x', expected a token id"),
        ("generation_config.json", {"eos_token_id": [2, -1]}, r"eos_token_id is \[2, -1\], expected a token id"),
        ("generation_config.json", {"pad_token_id": 10**30}, "pad_token_id is 1000.*, expected a token id"),
        ("generation_config.json", {"pad_token_id": [2]}, r"pad_token_id is \[2\], expected a token id"),
        ("generation_config.json", {"temperature": 10**400}, "temperature is 1000.*, expected a finite number"),
        ("generation_config.json", {"max_new_tokens": "7"}, "max_new_tokens is '7', expected a finite number"),
        (
            "generation_config.json",
            {"repetition_penalty": float("inf")},
            "repetition_penalty is inf, expected",
        ),
        ("generation_config.json", {"do_sample": "no"}, "do_sample is 'no', expected true or false"),
        ("processor_config.json", b"\xff", "processor_config.json is damaged"),
        ("processor_config.json", b"3", "processor_config.json is damaged .*int, expected an object"),
        ("processor_config.json", {"think_tags": "x"}, "think_tags is 'x'; expected 'tokens' or 'text'"),
        ("processor_config.json", {"instruction_template": 7}, "instruction_template is 7; expected a text"),
        ("processor_config.json", {"num_slots": "x"}, "error: .*num_slots"),
        ("processor_config.json", {"instruction_template": 7}, "error: "),
        ("processor_config.json", {"image_processor": []}, "error: "),
        ("processor_config.json", {"vlm_processor_kwargs": {"patch_size": "x"}}, "error: "),
        ("tokenizer_config.json", b"null", "tokenizer_config.json is damaged"),
        ("config.json", b"[" * 100_000, "config.json is damaged"),
    ],
)
def test_damaged_configurations_end_in_one_line(damaged, image_file, capsys, name, change, message):
    path = damaged / name
    if isinstance(change, dict):
        change = json.dumps(json.loads(path.read_text()) | change).encode()
    path.write_bytes(change)
    line = _fails(capsys, "predict", image_file, "x", "--reasoning", "none", "--model", str(damaged), "--json")
    assert re.search(message, line), line


def test_control_sequences_do_not_reach_the_terminal(image_file, capsys, tmp_path):
    name = "\x1b[2J\x1b]0;owned\x07.png"
    assert r"\x1b[2J\x1b]0;owned\x07.png" in _fails(capsys, "predict", str(tmp_path / name), "x")
    assert "\\x1b" in _fails(capsys, "demo", "--samples", "1\x1b[2J")
    assert "\\x1b" in _fails(capsys, "predict", image_file, "x", "--model", "./\x1b[2J\nsegcompass: done")
    assert r"\xe4" not in _fails(capsys, "predict", "ä.png", "x")


def test_what_the_machine_refuses_is_one_line(capsys, monkeypatch):
    def run(args):
        raise error

    monkeypatch.setattr(demo, "_demo", run)
    error = OSError(28, "No space left on device", "out")
    assert "No space left on device: 'out'" in _fails(capsys, "demo")
    error = ModuleNotFoundError("No module named 'gradio.x'", name="gradio.x")
    assert "needs gradio.x, which is not installed: pip install 'segcompass_hf[explain]'" in _fails(capsys, "demo")
    error = ImportError("this needs something else")
    assert "this needs something else" in _fails(capsys, "demo")
    for error in (ModuleNotFoundError("x", name="segcompass_hf.x"), KeyError("x")):  # mistakes of ours stay visible
        with pytest.raises(type(error)):
            cli.main(["demo"])


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["predict", "a.png", "x"], "matplotlib, which is not installed: pip install 'segcompass_hf[demo]'"),
        (["demo"], "matplotlib, which is not installed: pip install 'segcompass_hf[demo]'"),
        (["explain", "a.png", "x", "--output", "a.png"], "matplotlib, which"),
        (["evaluate", "--dataset", "scenes:val", "--output", "x"], "datasets, .*'segcompass_hf[data]'"),
        (["data", "build", "scenes:val", "--output", "x"], "datasets, which"),
    ],
)
def test_what_a_plain_installation_lacks_is_said_at_once(argv, hint, capsys, monkeypatch, tmp_path):
    """Before an image or a checkpoint is looked for."""
    monkeypatch.chdir(tmp_path)
    for name in ("matplotlib", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    for part in hint.split(".*"):
        assert part in _fails(capsys, *argv)


def test_public_names_say_which_extra_they_need(monkeypatch):
    from segcompass_hf._lazy import MissingExtraError, named_extras

    with pytest.raises(MissingExtraError, match=r"needs trl.core, .*'segcompass_hf\[train\]'"), named_extras():
        raise ModuleNotFoundError("No module named 'trl.core'", name="trl.core")
    with pytest.raises(ModuleNotFoundError, match="^x$"), named_extras():
        raise ModuleNotFoundError("x", name="something.else")
    import segcompass_hf.explain

    monkeypatch.setattr("importlib.import_module", lambda *_: (_ for _ in ()).throw(ModuleNotFoundError(name="peft")))
    vars(segcompass_hf.explain).pop("plot_segmentations", None)
    with pytest.raises(ImportError, match=r"needs peft, .*'segcompass_hf\[train\]'"):
        segcompass_hf.explain.plot_segmentations  # noqa: B018


def test_code_beside_a_checkpoint_of_another_type_does_not_run(image_file, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = {"model_type": "of_nobody", "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}}
    (tmp_path / "mine" / "config.json").write_text(json.dumps(config))
    assert "cannot load a checkpoint" in _fails(capsys, "predict", image_file, "x", "--model", str(tmp_path / "mine"))
    assert not (tmp_path / "ran").exists()
