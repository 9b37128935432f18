"""Published checkpoints where the package is not installed: every way of loading gives the package's own answer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from loopback_hub import TOKEN, LoopbackHub, hub  # noqa: F401
from PIL import Image
from places import SUPPORT

import segcompass_hf
from segcompass_hf.files import weights_digest
from segcompass_hf.hub.publishing.stage import AUTO_MAP, PROCESSOR_CLASS, PROCESSOR_CODE, core_files, stage_checkpoint
from segcompass_hf.loading_segcompass import CUSTOM_PIPELINES

SCRIPT = SUPPORT / "stranger.py"
# What the model does not import.
PROCESSORS_OWN = {
    "judging_segcompass.py",
    "patch_coverage_segcompass.py",
    "postprocessing_segcompass.py",
    "processing_segcompass.py",
    "prompts_segcompass.py",
    "trained_words_segcompass.py",
    "vlm_calls_segcompass.py",
    "vlm_processors_segcompass.py",
}
INSTRUCTION = "the largest red ring"


def scene() -> Image.Image:
    from segcompass_hf.data import scenes

    return next(iter(scenes.iterate("val", 1)))["image"]


def answer(model, processor, image) -> dict[str, np.ndarray]:
    result = model.eval().segment(**processor(images=image, instruction=INSTRUCTION))
    fields = ("sequences", "heatmap_logits", "slot_logits", "pred_masks")
    return {name: getattr(result, name).numpy() for name in fields}


def assert_equal(found: Path, expected: dict[str, np.ndarray]) -> None:
    with np.load(found) as stored:
        assert stored.files and set(stored.files) == set(expected), found
        for name, value in expected.items():
            assert np.array_equal(stored[name], value), f"{found.stem}: {name}"


def masks_of(result: dict) -> dict[str, np.ndarray]:
    masks = {str(segment["slot"]): np.asarray(segment["mask"]) for segment in result["segments"]}
    return masks | {"reasoning": np.array(result["reasoning"])}


def test_saving_copies_the_core_and_nothing_else_and_names_it(tmp_path):
    """Union of what model and processor save; each part alone saves what it imports."""
    import tiny

    tiny.tiny_model("qwen2_5_vl").save_pretrained(tmp_path)
    core = {path.name for path in core_files()}
    assert core - {path.name for path in tmp_path.glob("*.py")} == PROCESSORS_OWN
    tiny.tiny_processor("qwen2_5_vl").save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == core
    for path in core_files():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP and config["custom_pipelines"] == CUSTOM_PIPELINES
    processor = json.loads((tmp_path / "processor_config.json").read_text())
    assert processor["auto_map"] == {"AutoProcessor": PROCESSOR_CLASS}


def test_a_processor_alone_brings_the_code_that_a_stage_of_an_adapter_brings(tmp_path):
    import tiny

    tiny.tiny_processor().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == set(PROCESSOR_CODE)


def test_what_is_staged_is_what_saving_writes(tmp_path):
    """The bundled checkpoint has no code beside it; its stage is complete all the same."""
    stage = stage_checkpoint(segcompass_hf.bundled_checkpoint(), tmp_path / "stage")
    assert {name for name in stage.files() if name.endswith(".py")} == {path.name for path in core_files()}
    config = json.loads((tmp_path / "stage" / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP and config["custom_pipelines"] == CUSTOM_PIPELINES


@pytest.mark.slow
def test_a_stranger_gets_the_same_answers(hub: LoopbackHub, tmp_path):  # noqa: F811
    """One process, because loading transformers takes most of its time: from a folder, by id, pinned, saved again,
    sharded, as an adapter with its base, in 4 bits, as a pipeline, with and without a token."""
    from huggingface_hub import HfApi
    from peft import get_peft_model
    from transformers import BitsAndBytesConfig, pipeline

    from segcompass_hf.hub import push_to_hub
    from segcompass_hf.training import lora_config

    bundled, threads = segcompass_hf.bundled_checkpoint(), torch.get_num_threads()
    torch.set_num_threads(1)
    model_class = segcompass_hf.SegCompassForReasoningSegmentation
    model = model_class.from_pretrained(bundled)
    processor = segcompass_hf.SegCompassProcessor.from_pretrained(bundled)
    image = scene()
    image.save(tmp_path / "scene.png")
    expected = answer(model, processor, image)
    pipe = pipeline("reasoning-segmentation", model=model, processor=processor)
    expected_masks = masks_of(pipe(image, instruction=INSTRUCTION))
    assert len(expected_masks) > 1  # a mask, besides the reasoning

    folder = tmp_path / "published"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    pinned = push_to_hub(bundled, "me/scenes-tiny").commit
    model.push_to_hub("me/sharded", max_shard_size="2MB")  # transformers' own way
    processor.push_to_hub("me/sharded")
    assert sum(name.endswith(".safetensors") for name in hub.files("me/sharded")) > 1
    assert {name for name in hub.files("me/sharded") if name.endswith(".py")} == {path.name for path in core_files()}

    changed = model_class.from_pretrained(bundled)
    with torch.no_grad():
        changed.slot_mapper.get_parameter(next(name for name, _ in changed.slot_mapper.named_parameters())).mul_(1.1)
    changed.save_pretrained(tmp_path / "changed")
    HfApi().upload_file(
        path_or_fileobj=tmp_path / "changed" / "model.safetensors",
        path_in_repo="model.safetensors",
        repo_id="me/scenes-tiny",
    )
    api = HfApi()
    api.create_repo("me/secret", private=True)
    api.upload_folder(folder_path=folder, repo_id="me/secret", allow_patterns=["*.json", "*.py"])

    adapted = get_peft_model(model_class.from_pretrained(bundled), lora_config(model, r=2))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    adapted.save_pretrained(tmp_path / "adapter")  # names the bundled checkpoint's folder as its base
    processor.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="no Hub id, so nobody else could load it"):
        push_to_hub(tmp_path / "adapter", "me/adapter", license="apache-2.0")
    push_to_hub(tmp_path / "adapter", "me/adapter", base_model="me/sharded", license="apache-2.0")
    assert str(tmp_path) not in hub.files("me/adapter")["adapter_config.json"].decode()
    assert "segcompass_hf/checkpoints" not in hub.files("me/adapter")["adapter_config.json"].decode()

    output = tmp_path / "output"
    output.mkdir()
    plan = {"image": str(tmp_path / "scene.png"), "instruction": INSTRUCTION, "output": str(output)}
    plan |= {"folder": str(folder), "repo": "me/scenes-tiny", "revision": pinned, "sharded": "me/sharded"}
    plan |= {"adapter": "me/adapter", "private": "me/secret", "token": TOKEN}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    hub.lose_downloads = 1
    environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    environment |= hub.environment(tmp_path / "stranger") | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path / "plan.json")],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert hub.lose_downloads == 0  # a connection was lost, and the download went on

    # The package's answer from the same files: how a file lays its tensors out decides the last bit of products.
    def expect(name: str, source, **kwargs) -> None:
        assert_equal(output / f"{name}.npz", answer(model_class.from_pretrained(source, **kwargs), processor, image))

    assert_equal(output / "pinned.npz", expected)
    expect("folder", folder)
    expect("other auto class", folder)
    expect("main", tmp_path / "changed")
    expect("saved again", output / "again")
    expect("sharded", output / "sharded")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    expect("4 bits", folder, quantization_config=quantization, device_map={"": "cpu"}, dtype=torch.float32)
    base = tmp_path / "base"
    base.mkdir()
    for name, content in hub.files("me/sharded").items():
        (base / name).write_bytes(content)
    with_adapter = model_class.from_pretrained(base)
    with_adapter.load_adapter(str(tmp_path / "adapter"))
    of_adapter = answer(with_adapter, processor, image)
    assert not np.allclose(of_adapter["pred_masks"], expected["pred_masks"], atol=1e-2)
    assert_equal(output / "adapter.npz", of_adapter)
    assert weights_digest(model_class.from_pretrained(output / "sharded")) == weights_digest(model)
    assert_equal(output / "pipe.npz", expected_masks)
    assert_equal(output / "pipe again.npz", expected_masks)
    pipe.model = with_adapter
    assert_equal(output / "pipe adapter.npz", masks_of(pipe(image, instruction=INSTRUCTION)))

    errors = json.loads((output / "errors.json").read_text())
    assert "token" in errors["private"] and "me/secret" in errors["private"]
    assert "me/missing" in errors["missing"] and "nowhere" in errors["revision"]
    code = json.loads((output / "code.json").read_text())
    assert code[str(output / "again")] == [path.name for path in core_files()]
    assert set(code[str(output / "sharded")]) == {path.name for path in core_files()} - PROCESSORS_OWN
    torch.set_num_threads(threads)
