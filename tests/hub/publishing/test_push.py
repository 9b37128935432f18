"""Publishing models: what is staged, checked and refused, and what the real client makes of it on a loopback hub."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from loopback_hub import LoopbackHub, hub  # noqa: F401
from PIL import Image
from safetensors.torch import load_file, save_file

from segcompass_hf.files import weights_digest
from segcompass_hf.hub import check_stage, push_to_hub, stage_checkpoint
from segcompass_hf.hub.publishing.checks import check_texts, check_weights
from segcompass_hf.hub.publishing.stage import core_files, is_owned

CARD = "---\nlicense: apache-2.0\nlibrary_name: transformers\n---\n\n# Mine, at OWNER/NAME\n"
LEFT = {"optimizer.pt": b"pickle", "training_args.bin": b"pickle", "runs/events": b"log"}
LEFT["checkpoint-5/config.json"] = b"{}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint as training leaves it: one weight file, other things around it."""
    folder = tmp_path_factory.mktemp("saved")
    tiny.tiny_model("llava").save_pretrained(folder)
    tiny.tiny_processor("llava").save_pretrained(folder)
    for path in folder.glob("*.py"):
        path.write_text("raise SystemExit('old code')\n")  # of another version; a push brings its own
    (folder / "README.md").write_text(CARD)
    for name, content in LEFT.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


@pytest.fixture
def unchecked(monkeypatch):
    """Loading and answering take most of the time, and other tests look at them."""
    monkeypatch.setattr("segcompass_hf.hub.publishing.checks.check_stage", lambda *_: ["nothing"])


def shard(folder: Path) -> Path:
    """Split the weights in two, with an index."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    parts = names[: len(names) // 2], names[len(names) // 2 :]
    index = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05}-of-00002.safetensors"
        save_file({key: weights[key] for key in part}, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    total = sum(tensor.nbytes for tensor in weights.values())
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    (folder / "model.safetensors").unlink()
    return folder


def rewrite(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_dry_run_checks_and_shows_the_tree_without_a_network(folder):
    publication = push_to_hub(folder, "me/mine", dry_run=True)  # tests are offline without the hub
    kept = {"README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"}
    kept |= {"processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(publication.files) == kept | {path.name for path in core_files()}
    assert sorted(publication.left_behind) == sorted(LEFT)
    assert publication.url is None and publication.commit is None
    assert publication.files["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert publication.files["README.md"] == len(CARD) - len("OWNER/NAME") + len("me/mine")
    text = publication.to_text()
    assert "optimizer.pt" in text.splitlines()[-1] and "loads as SegCompassForReasoningSegmentation" in text
    numbers = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    assert f"{numbers:,} numbers, all finite, in 1 file" in text
    assert "answers 1 instruction on a drawn image" in text
    assert (folder / "README.md").read_text() == CARD  # the folder itself is left alone


def test_a_push_is_one_commit_with_the_right_hashes(folder, hub: LoopbackHub, unchecked):  # noqa: F811
    publication = push_to_hub(folder, "mine", collection="My models", commit_message="first")
    assert publication.url == f"{hub.url}/me/mine"
    repo = hub.repos["models", "me/mine"]
    assert repo.messages == ["initial commit", "first"] and repo.branches["main"] == publication.commit
    there = hub.files("me/mine")
    assert set(there) == set(publication.files) | {".gitattributes"}
    assert {name: len(there[name]) for name in publication.files} == publication.files
    for path in core_files():
        assert there[path.name] == path.read_bytes()
    assert there["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert "# Mine, at me/mine" in there["README.md"].decode()
    assert [item["id"] for item in hub.collections["me/my-models-0123456789"]["items"]] == ["me/mine"]

    again = push_to_hub(folder, "me/mine", collection="me/my-models-0123456789")
    assert again.commit == publication.commit and len(hub.uploads) == 1  # nothing changed, nothing sent
    assert len(hub.collections["me/my-models-0123456789"]["items"]) == 1


def test_what_an_earlier_push_left_goes_and_what_others_put_stays(folder, hub, unchecked):  # noqa: F811
    """A whole file beside new shards would be loaded instead of them."""
    first = push_to_hub(folder, "me/mine").commit
    for name in ("notes.md", "old_segcompass.py", "plots/loss.png"):
        HfApi().upload_file(path_or_fileobj=b"x", path_in_repo=name, repo_id="me/mine")
    push_to_hub(shard(folder), "me/mine")
    there = set(hub.files("me/mine"))
    assert {"notes.md", "plots/loss.png", "model-00001-of-00002.safetensors"} <= there
    assert not there & {"model.safetensors", "old_segcompass.py"}
    assert "model.safetensors" in hub.files("me/mine", first)  # pinned, it is still there
    assert is_owned("model.safetensors.index.json") and is_owned("adapter_model.safetensors")
    assert not any(map(is_owned, ("train.py", "vae.safetensors", "handler.py", "LICENSE")))
    assert is_owned("examples/0.png") and is_owned("concepts.parquet")
    assert not is_owned("plots/x.png") and not is_owned("sub/config.json")


def test_a_handler_is_published_and_one_put_there_by_hand_stays(folder, hub, unchecked):  # noqa: F811
    push_to_hub(folder, "me/mine")
    for name in ("handler.py", "train.py", "LICENSE", "extra.safetensors"):
        HfApi().upload_file(path_or_fileobj=b"theirs", path_in_repo=name, repo_id="me/mine")
    push_to_hub(folder, "me/mine", commit_message="again")
    there = hub.files("me/mine")
    assert all(there[name] == b"theirs" for name in ("handler.py", "train.py", "LICENSE", "extra.safetensors"))
    for name in ("handler.py", "handler_inputs.py"):
        (folder / name).write_text("ours")
    publication = push_to_hub(folder, "me/mine")
    for name in ("handler.py", "handler_inputs.py"):
        assert name in publication.files and name not in publication.left_behind
        assert hub.files("me/mine")[name] == b"ours"


def test_branches_private_repositories_and_refusals_of_the_hub(folder, hub, unchecked):  # noqa: F811
    push_to_hub(folder, "me/mine")
    main = hub.repos["models", "me/mine"].branches["main"]
    (folder / "README.md").write_text(CARD + "\nAn experiment.\n")
    publication = push_to_hub(folder, "me/mine", revision="experiment")
    assert hub.repos["models", "me/mine"].branches == {"main": main, "experiment": publication.commit}
    with pytest.raises(ValueError, match="exists and is public"):
        push_to_hub(folder, "me/mine", private=True)
    push_to_hub(folder, "me/secret", private=True)
    assert hub.repos["models", "me/secret"].private
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(token=False).model_info("me/secret")
    with pytest.raises(HfHubHTTPError, match="403"):
        push_to_hub(folder, "others/mine")
    with pytest.raises(HfHubHTTPError, match="401"):
        push_to_hub(folder, "me/mine", token="hf_wrong")
    with pytest.raises(ValueError, match="a//b"):
        push_to_hub(folder, "a//b")


def test_a_lost_connection_is_made_up_for(folder, hub, unchecked):  # noqa: F811
    hub.lose_uploads = 1
    publication = push_to_hub(shard(folder), "me/mine")
    assert hub.lose_uploads == 0 and set(publication.files) <= set(hub.files("me/mine"))
    shards = sorted(folder.glob("*.safetensors"))
    assert sorted(hub.uploads) == sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in shards)


def test_a_hub_that_holds_something_else_is_noticed(folder, hub, unchecked, monkeypatch):  # noqa: F811
    from loopback_hub_endpoints import Repo

    original = Repo.commit
    damaged = lambda self, branch, files, message: original(  # noqa: E731
        self, branch, files | {"config.json": (b"{}", False)}, message
    )
    monkeypatch.setattr(Repo, "commit", damaged)
    with pytest.raises(ValueError, match="holds other contents than were sent: config.json"):
        push_to_hub(folder, "me/mine")


def test_a_folder_that_changes_meanwhile_is_noticed(folder, hub, unchecked, monkeypatch):  # noqa: F811
    original = HfApi.preupload_lfs_files

    def upload(self, *args, **kwargs):
        original(self, *args, **kwargs)
        os.utime(folder / "model.safetensors", ns=(1, 1))

    monkeypatch.setattr(HfApi, "preupload_lfs_files", upload)
    with pytest.raises(ValueError, match="model.safetensors changed while being uploaded"):
        push_to_hub(folder, "me/mine")
    assert hub.repos["models", "me/mine"].messages == ["initial commit"]


def test_a_model_is_published_with_its_processor(hub, unchecked):  # noqa: F811
    model, processor = tiny.tiny_model("llava"), tiny.tiny_processor("llava")
    with pytest.raises(ValueError, match="published with its processor"):
        push_to_hub(model, "me/model")
    with pytest.raises(ValueError, match="no licence is known"):
        push_to_hub(model, "me/model", processor)
    assert ("models", "me/model") not in hub.repos
    push_to_hub(model, "me/model", processor, license="mit", base_model=["a/vlm", "a/sam"])
    card = ModelCard(hub.files("me/model")["README.md"].decode())
    assert card.data.license == "mit" and card.data.base_model == ["a/vlm", "a/sam"]
    assert 'model="me/model", trust_remote_code=True' in card.text


class TestRefusals:
    def stage(self, folder, tmp_path):
        return stage_checkpoint(folder, tmp_path / "stage")

    def test_folders_that_hold_no_checkpoint(self, folder, tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            self.stage(folder / "nowhere", tmp_path)
        (folder / "processor_config.json").unlink()
        with pytest.raises(FileNotFoundError, match="has no processor_config.json; save the processor"):
            self.stage(folder, tmp_path)
        (folder / "model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
            self.stage(folder, tmp_path)
        (folder / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(FileNotFoundError, match="pytorch_model.bin is a pickle"):
            self.stage(folder, tmp_path)
        (folder / "config.json").write_text('{"model_type": "clip"}')
        with pytest.raises(ValueError, match="holds a 'clip' model"):
            self.stage(folder, tmp_path)
        (folder / "config.json").unlink()
        with pytest.raises(FileNotFoundError, match="neither config.json nor adapter_config.json"):
            self.stage(folder, tmp_path)

    def test_missing_and_wrong_shards(self, folder, tmp_path):
        shard(folder)
        stage = self.stage(folder, tmp_path)
        assert "in 2 files" in check_weights(stage.folder)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        moved = next(iter(index["weight_map"]))
        index["weight_map"][moved] = "model-00002-of-00002.safetensors"
        (stage.folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=f"1 weights are elsewhere or missing \\({moved}\\)"):
            check_weights(stage.folder)
        (folder / "model-00001-of-00002.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match="lacks 1 of the 2 weight files .*: model-00001-of-00002"):
            stage_checkpoint(folder, tmp_path / "other")

    def test_nan_and_files_cut_short(self, folder, tmp_path):
        name = "sam.mask_decoder.iou_token.weight"
        rewrite(folder, lambda weights: weights[name].view(-1).__setitem__(3, float("nan")))
        stage = self.stage(folder, tmp_path)
        with pytest.raises(ValueError, match=f"model.safetensors: {name} holds NaN or infinite"):
            check_stage(stage)
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[:-100])
        with pytest.raises(ValueError, match="model.safetensors cannot be read .* is it cut short"):
            check_stage(stage)

    def test_missing_and_unknown_weights(self, folder, tmp_path):
        rewrite(folder, lambda weights: weights.pop("codebook.weight"))
        with pytest.raises(ValueError, match="does not load: .*lacks 1 weights of this model \\(codebook.weight\\)"):
            check_stage(self.stage(folder, tmp_path))
        rewrite(folder, lambda weights: weights.update({"extra": torch.zeros(1)}))
        stage = stage_checkpoint(folder, tmp_path / "other")
        with pytest.raises(ValueError, match="does not load"):
            check_stage(stage)

    def test_a_processor_that_writes_other_image_tokens(self, folder, tmp_path):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"image_token_id": 3}))
        with pytest.raises(ValueError, match="for image patches, the model reads 3 as image; set image_token_id"):
            check_stage(self.stage(folder, tmp_path))

    def test_cards(self, folder, tmp_path):
        stage = self.stage(folder, tmp_path)
        card = stage.folder / "README.md"
        for text, message in (
            ("no header", "states no licence"),
            ("---\nlicense: [\n---\n", "header of README.md is not valid"),
            ("---\nlicense: mit\nmodel-index: [{}]\n---\n", "header of README.md is not valid"),
            ("---\nlicense: mit\nwidget:\n- src: examples/0.png\n---\n", "needs src .* and text"),
            ("---\nlicense: mit\nwidget:\n- {src: examples/0.png, text: it}\n---\n", "examples/0.png as an example"),
        ):
            card.write_text(text)
            with pytest.raises(ValueError, match=message):
                check_stage(stage)
        card.unlink()
        with pytest.raises(ValueError, match="there is no README.md"):
            check_stage(stage)

    def test_figures_of_other_weights_and_examples_that_run(self, folder, tmp_path):
        """The digest is the evaluation runner's, of the model in the precision that it ran in."""
        (folder / "examples").mkdir()
        Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(folder / "examples" / "0.png")
        widget = "widget:\n- {src: examples/0.png, text: the ring}\n- {src: 'https://a.b/c.png', text: it}\n"
        (folder / "README.md").write_text(CARD.replace("license", widget + "license"))
        digest = weights_digest(tiny.tiny_model("llava"))
        run = {"dataset": "scenes val", "settings": {"predictor": {"weights": digest, "dtype": "float32"}}}
        stage = self.stage(folder, tmp_path)
        lines = check_stage(stage, [run])
        assert lines[-1] == "figures on scenes val: of these weights"
        assert any(line.startswith("answers 1 instruction on examples of the card") for line in lines)
        run["settings"]["predictor"]["weights"] = "0" * 16
        with pytest.raises(ValueError, match=f"was of other weights \\(digest 0{{16}}, these have {digest}\\)"):
            check_stage(stage, [run])
        run["settings"]["predictor"]["dtype"] = "bfloat16"
        assert check_stage(stage, [run])[-1] == "figures on scenes val: of bfloat16 weights, not compared"
        baseline = {"dataset": "scenes val", "predictor": "all-objects", "settings": {"predictor": {}}}
        with pytest.raises(ValueError, match="not of a model's weights but of 'all-objects'"):
            check_stage(stage, [baseline])


def test_folders_of_this_machine_are_taken_out(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config["vlm_config"]["_name_or_path"] = config["_name_or_path"] = "/home/somebody/llava"
    (folder / "config.json").write_text(json.dumps(config))
    stage = stage_checkpoint(folder, tmp_path / "stage")
    assert "somebody" not in (stage.folder / "config.json").read_text()
    assert list(stage.files())[-1] == "model.safetensors"


@pytest.mark.slow
def test_killed_in_the_middle_and_repeated(folder, hub: LoopbackHub, tmp_path):  # noqa: F811
    """kill -9 when one of two weight files has arrived: nobody sees anything of it; the repetition sends the other."""
    shard(folder)
    code = (
        "import argparse, sys\nfrom segcompass_hf.commands import push\n"
        "parser = argparse.ArgumentParser()\npush.add_parser(parser.add_subparsers())\n"
        "args = parser.parse_args(sys.argv[1:])\nargs.run(args)\n"
    )
    command = [sys.executable, "-c", code, "push", str(folder), "me/mine"]
    hub.hold_after = 1
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    try:
        assert hub.held.wait(1200) and process.poll() is None
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -9
    assert hub.repos["models", "me/mine"].messages == ["initial commit"]
    assert set(hub.files("me/mine")) == {".gitattributes"}
    arrived = list(hub.uploads)
    assert len(arrived) >= 1
    hub.hold_after = None
    hub.release.set()

    publication = push_to_hub(folder, "me/mine")
    there = hub.files("me/mine")
    stage = stage_checkpoint(folder, tmp_path / "stage")
    assert set(there) == set(stage.files()) | {".gitattributes"}
    for name, path in stage.files().items():
        expected = path.read_bytes().replace(b"OWNER/NAME", b"me/mine") if name == "README.md" else path.read_bytes()
        assert hashlib.sha256(there[name]).digest() == hashlib.sha256(expected).digest(), name
    assert len(hub.uploads) == 2 and hub.uploads[: len(arrived)] == arrived  # what had arrived was not sent again
    assert hub.repos["models", "me/mine"].branches["main"] == publication.commit


def test_the_base_of_an_adapter_that_was_moved(tmp_path):
    from segcompass_hf import bundled_checkpoint
    from segcompass_hf.training.adapters import _base_on_this_machine, load_adapter

    assert _base_on_this_machine("owner/name", "adapter") == "owner/name"
    assert _base_on_this_machine(str(tmp_path), "adapter") == str(tmp_path)
    elsewhere = "/opt/venv/lib/site-packages/segcompass_hf/checkpoints/scenes-tiny"
    assert _base_on_this_machine(elsewhere, "adapter") == str(bundled_checkpoint())
    config = {"peft_type": "LORA", "base_model_name_or_path": "/gone/model"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match="was trained on '/gone/model', which is not on this machine"):
        load_adapter(None, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="names '/gone/model' as its base model, which is no Hub id"):
        stage_checkpoint(tmp_path, tmp_path / "stage")
    stage = stage_checkpoint(tmp_path, tmp_path / "other", base_model="owner/name")
    written = json.loads((stage.folder / "adapter_config.json").read_text())
    assert written == config | {"base_model_name_or_path": "owner/name"}
    assert (stage.kind, stage.base, stage.local_base) == ("adapter", "owner/name", None)
    assert set(stage.files()) == {"adapter_config.json", "adapter_model.safetensors"}  # its base brings the code


class TestWhatIsNotPublished:
    SECRET = "hf_" + "aB3" * 11

    def staged(self, folder, tmp_path):
        return stage_checkpoint(folder, tmp_path / "stage")

    def test_secrets_beside_the_checkpoint_stay(self, folder, tmp_path):
        """Only what is listed by its whole name goes: no pattern that a key or a note could fit."""
        (folder / "examples").mkdir()
        names = ["LICENSE_key.pem", "NOTICE.key", "token.json", ".env", "examples/notes.txt", "examples/other.png"]
        names += ["examples/shown.png.txt", "config.json.bak", "additional_chat_templates.txt"]
        for name in names:
            (folder / name).write_text(self.SECRET)
        Image.new("RGB", (4, 4)).save(folder / "examples" / "shown.png")
        (folder / "LICENSE").write_text("mine")
        (folder / "README.md").write_text(CARD + "![answers](examples/shown.png)")
        stage = self.staged(folder, tmp_path)
        assert set(names) <= set(stage.left_behind) and not set(names) & set(stage.files())
        assert {"LICENSE", "examples/shown.png"} <= set(stage.files())
        assert "no key and no folder of this machine" in check_texts(stage)

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md", "examples/0.png"])
    def test_links_out_of_the_folder(self, folder, tmp_path, name):
        (folder / "README.md").write_text(CARD + "![answers](examples/0.png)")
        (tmp_path / "elsewhere").mkdir()
        target = tmp_path / "elsewhere" / "file"
        (folder / "examples").mkdir()
        if name.startswith("examples"):
            target.write_bytes(b"a private photograph")
        else:
            (folder / name).rename(target)
        (folder / name).symlink_to(target)
        with pytest.raises(ValueError, match=f"^'{name}' is a link out of "):
            self.staged(folder, tmp_path)

    def test_links_within_the_folder_are_files(self, folder, tmp_path):
        (folder / "model.safetensors").rename(folder / "weights.bin")
        (folder / "model.safetensors").symlink_to("weights.bin")
        assert "model.safetensors" in self.staged(folder, tmp_path).files()

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("handler.py", "KEY = 'SECRET'", "handler.py, line 1, .*a Hugging Face token"),
            ("LICENSE.md", "by\n/home/me", "LICENSE.md, line 2, .*'/home/me'"),
            ("chat_template.jinja", "{# SECRET #}", "chat_template.jinja, line 1"),
            ("README.md", CARD + "password: hunter2", "README.md, line 7, .*a key or password"),
            (".eval_results/a.yaml", "by: /root/x", ".eval_results/a.yaml, line 1"),
        ],
    )
    def test_texts(self, folder, tmp_path, name, text, message):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text.replace("SECRET", self.SECRET))
        with pytest.raises(ValueError, match=message):
            check_texts(self.staged(folder, tmp_path))

    def test_configurations(self, folder, tmp_path):
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text()) | {
            "name_or_path": "/home/me/llava",
            "list": [{"_name_or_path": "/root"}],
        }
        path.write_text(json.dumps(config))
        stage = self.staged(folder, tmp_path)
        assert "llava" not in (stage.folder / path.name).read_text() and check_texts(stage)
        path.write_text(json.dumps(config | {"auth": {"token": "0123456789abcdef"}}))
        with pytest.raises(ValueError, match="tokenizer_config.json.* a key or password"):
            check_texts(stage_checkpoint(folder, tmp_path / "other"))

    @pytest.mark.parametrize("named", ["../../secret.safetensors", "/etc/passwd", "optimizer.pt", 7, None])
    def test_an_index_names_weight_files_only(self, folder, tmp_path, named):
        shard(folder)
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"]["a"] = named
        path.write_text(json.dumps(index))
        with pytest.raises(ValueError, match="names .* as a weight file; expected names such as model-00001-of-00001"):
            self.staged(folder, tmp_path)
        path.write_text("{}")
        with pytest.raises(ValueError, match="names None as a weight file"):
            self.staged(folder, tmp_path)
