# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""vLLM writes the completions of GRPO: the VLM inside a SegCompass model, under the names vLLM loads it by.

Never run with vLLM itself: the exchange with TRL is tested with a stand-in engine that has vLLM's interface
(`tests/training/grpo/test_vllm.py`); the folder was loaded by vLLM 0.31 on a CPU. See `docs/how-to/many-gpus.md`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import grpo_trainer as trl_grpo_trainer

from ...data.vllm_states import unexpand_image_tokens
from ..fsdp import core_model
from ..vllm_folder import export_for_vllm, vllm_weights

_NEVER = -100.0  # vLLM clamps its logit bias here; a probability of e^-100


class SegCompassVLLMGeneration(VLLMGeneration):
    """TRL's `VLLMGeneration` for the VLM inside a SegCompass model.

    Differences to the parent:

    - vLLM loads `folder`, which [`export_for_vllm`] writes, not `model.name_or_path`.
    - Weights are sent under the names of the family's published files, and only those of the VLM. Adapters are added
      to a copy: merging them in place and back, as the parent does, would wear out bf16 and 4-bit base weights.
      4-bit weights are sent dequantised, so vLLM runs unquantised.
    - In colocate mode vLLM gets one placeholder per image, which it expands itself; the parent passes the expanded
      prompt, and vLLM would expand that a second time (TRL issue 6294).
    - Image and video placeholders are never written.

    Args:
        model ([`SegCompassForReasoningSegmentation`] or `PeftModel` of it): The model that trains.
        folder (`str` or `Path`): Where vLLM finds the VLM. In colocate mode written here by the main process.
        kwargs: See `trl.generation.vllm_generation.VLLMGeneration`.
    """

    def __init__(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        processing_class: Any,
        *,
        folder: str | Path,
        generation_kwargs: dict | None = None,
        **kwargs: Any,
    ):
        if getattr(getattr(accelerator.state, "fsdp_plugin", None), "fsdp_version", 2) == 1:
            raise ValueError("vLLM rollouts read FSDP2 parameters, got FSDP1; set fsdp_version: 2 in the config.")
        self.folder = Path(folder)
        bias = {token_id: _NEVER for token_id in core_model(model).vision_token_ids}
        generation_kwargs = dict(generation_kwargs or {})
        generation_kwargs["logit_bias"] = {**bias, **(generation_kwargs.get("logit_bias") or {})}
        super().__init__(model, accelerator, processing_class, generation_kwargs=generation_kwargs, **kwargs)

    def _init_vllm(self) -> None:
        if self.mode == "colocate":
            export_for_vllm(self.model, self.processing_class, self.folder, accelerator=self.accelerator)
            self.accelerator.wait_for_everyone()
        model = self.model
        # All that the parent reads of the model here: where vLLM finds it and whether it holds 4-bit layers.
        self.model = SimpleNamespace(name_or_path=str(self.folder), named_modules=lambda: iter(()))
        try:
            super()._init_vllm()
        finally:
            self.model = model

    def _iter_named_params(self) -> Iterator[tuple[str, torch.Tensor]]:
        return vllm_weights(self.model, gather=self._dist.gather_params, device=self.accelerator.device)

    def generate(
        self, prompts: list[list[int]], images: list | None, num_generations: int, profiler: Any = None
    ) -> tuple:
        """As the parent's; the prompt ids returned are those given."""
        sent = prompts
        if self.mode == "colocate" and images is not None:  # server mode pairs expanded prompts with features itself
            sent = [
                ids if not of_prompt else unexpand_image_tokens(ids, self.processing_class, len(of_prompt))
                for ids, of_prompt in zip(prompts, images, strict=True)
            ]
        _, completion_ids, logprobs, logprob_ids = super().generate(sent, images, num_generations, profiler)
        return prompts, completion_ids, logprobs, logprob_ids


@contextmanager
def vllm_rollouts(folder: str | Path) -> Iterator[None]:
    """While this is open, `GRPOTrainer.__init__` builds [`SegCompassVLLMGeneration`] as its vLLM backend.

    TRL has no argument for the class it builds; nothing changes where `use_vllm` is off.

    Args:
        folder (`str` or `Path`): Where vLLM finds the VLM; in colocate mode it is written there.

    Example:

    ```python
    with vllm_rollouts(Path(args.output_dir) / "vllm"):
        super().__init__(model, ...)
    ```
    """
    parent = trl_grpo_trainer.VLLMGeneration
    trl_grpo_trainer.VLLMGeneration = partial(SegCompassVLLMGeneration, folder=folder)
    try:
        yield
    finally:
        trl_grpo_trainer.VLLMGeneration = parent
