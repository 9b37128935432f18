# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Teaches transformers' Auto classes and `pipeline` about SegCompass without importing either until they are used.

Registering needs the classes, and importing the classes takes seconds. So the three registries that a checkpoint is
looked up in get a table of extra entries that registers our classes on the first look-up that may mean them, and a
registry whose module is not imported yet gets its table when it is.
"""

from __future__ import annotations

import importlib
import sys
import threading
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

TASK = "reasoning-segmentation"
_LOOKED_UP_AS = {"segcompass", "segcompass_sae", "SegCompassConfig", "SegCompassSaeConfig"}
_LOOKED_UP_AS |= {"mobile_sam", "MobileSamConfig"}
_AUTO_REGISTRIES = {
    "transformers.models.auto.configuration_auto": ("CONFIG_MAPPING",),
    "transformers.models.auto.modeling_auto": (
        "MODEL_MAPPING",
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
        "MODEL_FOR_MASK_GENERATION_MAPPING",
    ),
    "transformers.models.auto.processing_auto": ("PROCESSOR_MAPPING",),
}
_PIPELINES = "transformers.pipelines"
_OUR_PIPELINE = f"{__package__}.pipeline_segcompass"
_SETTLED = (*_AUTO_REGISTRIES, _PIPELINES, _OUR_PIPELINE)
_state = {"registered": False}
_busy = threading.local()  # registering looks things up itself


class _HiddenCustomPipelines:
    """Class attribute that keeps `custom_pipelines` in `config.json` but out of sight of `pipeline`.

    With the entry visible, `pipeline` demands `trust_remote_code` although the task is registered right here.
    """

    def __get__(self, config: Any, owner: type | None = None) -> dict:
        return {}

    def __set__(self, config: Any, value: dict) -> None:
        config.__dict__["custom_pipelines"] = value  # `to_dict` reads it from there


def register() -> None:
    """Register configuration, model and processor with transformers' Auto classes; doing so again does nothing."""
    if _state["registered"] or getattr(_busy, "registering", False):
        return
    # Without a lock, which threads might meet in another order than those of the imports: two may both do it.
    _busy.registering = True
    try:
        _register()
        _state["registered"] = True  # not where it failed, so that the next look-up shows the error again
    finally:
        _busy.registering = False


def _register() -> None:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForMaskGeneration,
        AutoProcessor,
    )

    from .configuration_mobile_sam import MobileSamConfig
    from .configuration_segcompass import SegCompassConfig, SegCompassSaeConfig
    from .modeling_mobile_sam import MobileSamModel
    from .modeling_sae import SegCompassSae
    from .modeling_segcompass import SegCompassForReasoningSegmentation
    from .processing_segcompass import SegCompassProcessor

    SegCompassConfig.custom_pipelines = _HiddenCustomPipelines()
    AutoConfig.register("segcompass", SegCompassConfig, exist_ok=True)
    AutoConfig.register("segcompass_sae", SegCompassSaeConfig, exist_ok=True)
    AutoConfig.register("mobile_sam", MobileSamConfig, exist_ok=True)
    AutoModel.register(SegCompassConfig, SegCompassForReasoningSegmentation, exist_ok=True)
    AutoModel.register(SegCompassSaeConfig, SegCompassSae, exist_ok=True)
    AutoModel.register(MobileSamConfig, MobileSamModel, exist_ok=True)
    AutoModelForMaskGeneration.register(MobileSamConfig, MobileSamModel, exist_ok=True)
    AutoModelForImageTextToText.register(SegCompassConfig, SegCompassForReasoningSegmentation, exist_ok=True)
    AutoProcessor.register(SegCompassConfig, SegCompassProcessor, exist_ok=True)


class _RegisterOnLookup(dict):
    """Extra entries of an Auto registry, filled on the first look-up that may mean SegCompass.

    A key is a model type (configurations) or a configuration class (models, processors). Classes are also looked up
    by walking the entries for a name, so walking fills them too.
    """

    def __contains__(self, key: Any) -> bool:
        if getattr(key, "__name__", key) in _LOOKED_UP_AS:
            register()
        return super().__contains__(key)

    def values(self):
        register()
        return super().values()

    def items(self):
        register()
        return super().items()


def _settle(module: ModuleType) -> None:
    """Let a module that has just been imported know about SegCompass, or about `pipeline`."""
    if module.__name__ == _PIPELINES:
        importlib.import_module(_OUR_PIPELINE)  # settled in its turn; it may also be what imports `pipelines`
    elif module.__name__ == _OUR_PIPELINE:
        from transformers import AutoModelForImageTextToText
        from transformers.pipelines import PIPELINE_REGISTRY

        if TASK not in PIPELINE_REGISTRY.supported_tasks:
            PIPELINE_REGISTRY.register_pipeline(
                TASK, module.ReasoningSegmentationPipeline, pt_model=AutoModelForImageTextToText, type="multimodal"
            )
    else:
        for name in _AUTO_REGISTRIES[module.__name__]:
            registry = getattr(module, name)
            if type(registry._extra_content) is dict:
                registry._extra_content = _RegisterOnLookup(registry._extra_content)


class _SettleAfterImport:
    """A finder of `sys.meta_path`: finds what the others find, and settles the modules above once they have run."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _SETTLED:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_settle(module: ModuleType) -> None:
            run(module)
            _settle(module)

        spec.loader.exec_module = run_and_settle
        return spec


def register_when_needed() -> None:
    """Settle what is imported already, and the rest when it is imported."""
    if not any(isinstance(finder, _SettleAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _SettleAfterImport())
    for name in _SETTLED:
        if name in sys.modules:
            _settle(sys.modules[name])
