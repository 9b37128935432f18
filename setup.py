"""Packaging of segcompass_hf; CHANGELOG.md says which versions were tested."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "([^"]+)"', (ROOT / "src/segcompass_hf/__init__.py").read_text("utf-8"), re.M)[1]

CORE = [
    "torch>=2.6",
    "transformers>=5.17,<6",
    "safetensors>=0.8",
    "huggingface-hub>=1.5",
    "numpy>=2",
    "pillow>=11.2",  # older ones show pictures that XMP turns the wrong way
    "scipy>=1.13",  # matches slots to objects in the loss
    "pycocotools>=2.0.8",  # masks as run lengths
]
EXTRAS = {
    # The trainers override private methods of transformers' Trainer, that of GRPO some of TRL's: tested versions only.
    "train": [
        "transformers>=5.24,<5.25",
        "trl>=1.16,<1.17",
        "peft>=0.18",
        "datasets>=5",
        "accelerate>=1.10",
        "bitsandbytes>=0.48",
    ],
    "data": ["accelerate>=1.10", "datasets>=5", "evaluate>=0.4.6"],
    "demo": ["matplotlib>=3.8"],
    "explain": ["matplotlib>=3.8", "gradio>=6", "pyarrow>=15"],
    "serve": ["fastapi>=0.115", "uvicorn>=0.34", "prometheus-client>=0.21"],
}
EXTRAS["dev"] = sorted({requirement for extra in EXTRAS.values() for requirement in extra}) + [
    "sae-lens>=6.54,<7",  # its SAEs must load here and ours there
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "ruff>=0.12",
    "nbclient>=0.10",  # runs the notebooks, with ipykernel
    "ipykernel>=6.29",
    "ipywidgets>=8.1",  # without it tqdm warns in every notebook
    "mypy>=2.4,<2.5",  # another one finds other faults
    "build>=1.2",
    "setuptools>=77",  # with `wheel` what the tests build by, without a network
    "wheel",
    "twine>=6",
    "selenium>=4.30",  # with Chromium and its driver; the browser tests are skipped without
]
EXTRAS["docs"] = ["mkdocs>=1.6,<2", "mkdocs-material>=9.8,<10", "mkdocstrings[python]>=1.0.8,<2"]  # `make docs`
EXTRAS["ray"] = [*EXTRAS["data"], "ray[data]>=2.50"]  # not of `dev`, for its size: the tests with it are skipped there
EXTRAS["vllm"] = ["vllm>=0.31,<0.32"]  # not of `dev`, see docs/how-to/vllm.md: it asks for an older transformers

setup(
    name="segcompass_hf",
    version=VERSION,
    description="SegCompass for Hugging Face transformers: reasoning segmentation through sparse, named concepts",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    author="The segcompass_hf authors",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={
        "": ["*.pyi"],
        "segcompass_hf": [
            "py.typed",
            "checkpoints/**/*",
            "data/hosting/templates/*",
            "explain/templates/*",
            "hub/space/*.txt",
            "hub/space/*.md",
            "hub/publishing/templates/*",
            "metrics/evaluate_modules/*/*.py",
        ],
    },
    python_requires=">=3.10",
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["segcompass = segcompass_hf.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
