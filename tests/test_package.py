"""The package as a whole: import cost, lazy registration, public names, what the shippable core may import."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys

import pytest
from places import ROOT

import segcompass_hf
from segcompass_hf import SegCompassConfig, _registration
from segcompass_hf.hub.publishing.stage import core_files

SOURCE = ROOT / "src" / "segcompass_hf"
# Files that are published as remote code: flat, next to one another.
CORE = core_files()


# One fresh interpreter per import order; the questions are asked together because starting one takes seconds.
IMPORT_ORDERS = {
    "package first": (
        "import segcompass_hf\n"
        "answer['heavy'] = sorted({'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules))\n"
        "from transformers import AutoConfig, AutoModel, AutoProcessor\n"
    ),
    "transformers first": (
        "from transformers import AutoConfig, AutoModel, AutoProcessor\n"
        "start = time.perf_counter()\n"
        "import segcompass_hf\n"
        "answer['added_seconds'] = time.perf_counter() - start\n"
    ),
    "our pipeline first": "import segcompass_hf.pipeline_segcompass\nfrom transformers import AutoConfig, AutoModel\n",
    "pipelines first": (
        "import transformers.pipelines\nimport segcompass_hf\nfrom transformers import AutoConfig, AutoModel\n"
    ),
}
QUESTIONS = """
config = AutoConfig.for_model('clip')
answer['model_loaded_for_clip'] = 'segcompass_hf.modeling_segcompass' in sys.modules
config = AutoConfig.for_model('segcompass')
answer['config'] = type(config).__module__
from transformers import AutoModelForImageTextToText
answer['models'] = [m._model_mapping[type(config)].__name__ for m in (AutoModel, AutoModelForImageTextToText)]
from transformers.models.auto.processing_auto import processor_class_from_name
answer['processor'] = processor_class_from_name('SegCompassProcessor').__module__
from transformers.pipelines import PIPELINE_REGISTRY
task = PIPELINE_REGISTRY.check_task('reasoning-segmentation')[1]
answer['pipeline'] = [task['impl'].__name__, task['pt'][0].__name__, task['type']]
print(json.dumps(answer))
"""


@pytest.mark.parametrize("order", IMPORT_ORDERS)
def test_importing_is_cheap_and_the_auto_classes_know_the_model(order):
    done = subprocess.run(
        [sys.executable, "-c", "import json, sys, time\nanswer = {}\n" + IMPORT_ORDERS[order] + QUESTIONS],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer.pop("heavy", []) == []
    assert answer.pop("added_seconds", 0) < 0.3
    assert answer == {
        "model_loaded_for_clip": False,
        "config": "segcompass_hf.configuration_segcompass",
        "models": ["SegCompassForReasoningSegmentation"] * 2,
        "processor": "segcompass_hf.processing_segcompass",
        "pipeline": ["ReasoningSegmentationPipeline", "AutoModelForImageTextToText", "multimodal"],
    }


def test_the_private_attribute_that_registration_leans_on_exists():
    for module, names in _registration._AUTO_REGISTRIES.items():
        for name in names:
            assert isinstance(getattr(importlib.import_module(module), name)._extra_content, dict), (module, name)


def test_registering_twice_does_no_harm():
    from transformers import AutoConfig

    _registration.register()
    _registration.register()
    _registration.register_when_needed()
    assert isinstance(AutoConfig.for_model("segcompass"), SegCompassConfig)
    assert sum(isinstance(finder, _registration._SettleAfterImport) for finder in sys.meta_path) == 1


def test_threads_may_ask_first_together():
    code = (
        "import threading, segcompass_hf\n"
        "from transformers import AutoConfig\n"
        "found = []\n"
        "ask = lambda: found.append(type(AutoConfig.from_pretrained(segcompass_hf.bundled_checkpoint())).__name__)\n"
        "threads = [threading.Thread(target=ask) for _ in range(4)]\n"
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]\n"
        "print(found)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.stdout.splitlines()[-1:] == [str(["SegCompassConfig"] * 4)], done.stderr


def test_custom_pipelines_stay_in_the_file_and_out_of_sight(tmp_path):
    """`pipeline` asks for trust_remote_code where it sees the entry, although the task is registered here."""
    _registration.register()
    entry = {"reasoning-segmentation": {"impl": "pipeline_segcompass.ReasoningSegmentationPipeline"}}
    config = SegCompassConfig()
    config.custom_pipelines = entry
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["custom_pipelines"] == entry
    loaded = SegCompassConfig.from_pretrained(tmp_path)
    assert loaded.custom_pipelines == {}
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["custom_pipelines"] == entry


@pytest.mark.parametrize("name", segcompass_hf.__all__)
def test_public_names_resolve(name):
    assert getattr(segcompass_hf, name).__name__ == name
    assert name in dir(segcompass_hf)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'SegCompas'"):
        segcompass_hf.SegCompas  # noqa: B018


def test_bundled_checkpoint_is_complete_and_small_or_says_that_it_is_missing():
    path = SOURCE / "checkpoints" / "scenes-tiny"
    if not (path / "config.json").is_file():
        with pytest.raises(FileNotFoundError, match="make checkpoint"):
            segcompass_hf.bundled_checkpoint()
        return
    assert segcompass_hf.bundled_checkpoint() == segcompass_hf.bundled_checkpoint("scenes-tiny") == path
    names = {file.name for file in path.iterdir()}
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "README.md"} <= names
    assert sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) <= 12 * 2**20


def test_photos_small_is_found_in_a_clone_and_elsewhere_one_is_told_what_to_do(tmp_path, monkeypatch):
    for place in ("clone/src/segcompass_hf", "clone/checkpoints/photos-small", "lib/site-packages/segcompass_hf"):
        (tmp_path / place).mkdir(parents=True)
    monkeypatch.setattr(segcompass_hf, "__file__", str(tmp_path / "clone/src/segcompass_hf/__init__.py"))
    with pytest.raises(FileNotFoundError, match="photos-small: .*config.json does not exist; .*clone"):
        segcompass_hf.bundled_checkpoint("photos-small")  # the folder alone is no checkpoint
    (tmp_path / "clone/checkpoints/photos-small/config.json").write_text("{}")
    assert segcompass_hf.bundled_checkpoint("photos-small") == tmp_path / "clone/checkpoints/photos-small"
    monkeypatch.setattr(segcompass_hf, "__file__", str(tmp_path / "lib/site-packages/segcompass_hf/__init__.py"))
    with pytest.raises(FileNotFoundError, match="pip install -e .*or pass the folder"):
        segcompass_hf.bundled_checkpoint("photos-small")
    with pytest.raises(ValueError, match="no bundled checkpoint 'photos'; the names are scenes-tiny and photos-small"):
        segcompass_hf.bundled_checkpoint("photos")


def test_the_core_was_found():
    names = {file.name for file in CORE}
    assert {"modeling_sae.py", "modeling_segcompass.py", "processing_segcompass.py", "pipeline_segcompass.py"} <= names


@pytest.mark.parametrize("file", CORE, ids=lambda file: file.name)
def test_core_files_are_flat_and_need_nothing_but_their_siblings_and_five_packages(file):
    """What remote code may import: anything else at top level becomes a requirement of every user."""
    allowed = set(sys.stdlib_module_names) | {"torch", "transformers", "huggingface_hub", "numpy", "PIL"}
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            # `from . import x` and `from .folder.x import y` are not copied to the Hub.
            assert node.level == 1 and node.module and "." not in node.module, ast.unparse(node)
            assert SOURCE / f"{node.module}.py" in CORE, ast.unparse(node)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            roots = {module.split(".")[0] for module in modules}
            assert "segcompass_hf" not in roots and "torchvision" not in roots, ast.unparse(node)
            if node in tree.body:
                assert roots <= allowed, ast.unparse(node)


def test_requirements_are_those_the_changelog_and_the_ci_stand_for():
    text = (ROOT / "setup.py").read_text()
    for requirement in ("transformers>=5.17,<6", "trl>=1.16,<1.17"):
        assert f'"{requirement}"' in text
    pinned = re.findall(r"^torch==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned == ["2.13.0"]
