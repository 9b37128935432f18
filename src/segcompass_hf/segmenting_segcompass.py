# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""`segment`: write the reasoning and segment from the states seen while writing, without a second pass."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn
from transformers.utils import ModelOutput

from .generation_segcompass import (
    ADDED_TOKENS,
    SegCompassFormatLogitsProcessor,
    SuppressTokensLogitsProcessor,
    completion_mask_of,
    reasoning_budget,
    run_last_token,
)
from .interventions_segcompass import Interventions, normalize_interventions
from .modeling_concepts import SparseConcepts

# What of the VLM's inputs concerns the image alone, and so goes with any ids that hold its placeholders.
_VLM_IMAGE_INPUTS = ("pixel_values", "image_grid_thw", "image_sizes", "pixel_attention_mask", "mm_token_type_ids")
_GROWING_CACHES = ("dynamic", "offloaded", "quantized")  # of transformers' cache_implementation


@dataclass
class SegCompassSegmentationOutput(ModelOutput):
    """Output of [`SegCompassForReasoningSegmentation.segment`]. Rows: `batch_size * num_return_sequences`.

    Args:
        sequences (`torch.LongTensor` of shape `(rows, sequence_length)`): Prompt and completion ids.
        attention_mask (`torch.LongTensor` of shape `(rows, sequence_length)`): 1 on tokens up to the row's end.
        completion_mask (`torch.LongTensor` of shape `(rows, sequence_length)`): 1 on tokens the model wrote.
        slot_logit_threshold (`float`): The model's own; slots above it count as present.
        mask_logit_threshold (`float`): The model's own; pixels above it belong to a mask.
        heatmap_logits, slot_logits, pred_masks, slots, reference_states, concepts, slot_attentions, image_embeddings:
            As in [`SegCompassOutput`].
    """

    sequences: torch.LongTensor | None = None
    attention_mask: torch.LongTensor | None = None
    completion_mask: torch.LongTensor | None = None
    slot_logit_threshold: float | None = None
    mask_logit_threshold: float | None = None
    heatmap_logits: torch.Tensor | None = None
    slot_logits: torch.Tensor | None = None
    pred_masks: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    reference_states: torch.Tensor | None = None
    concepts: SparseConcepts | None = None
    slot_attentions: tuple[torch.Tensor, ...] | None = None
    image_embeddings: torch.Tensor | None = None


class SegmentingMixin:
    """Inference of [`SegCompassForReasoningSegmentation`]."""

    @torch.no_grad()
    def segment(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        sam_pixel_values: torch.Tensor | None = None,
        image_embeddings: torch.Tensor | None = None,
        reshaped_input_sizes: torch.Tensor | None = None,
        original_sizes: torch.Tensor | None = None,
        max_new_tokens: int | None = None,
        reasoning: Literal["full", "short", "none"] = "full",
        constrain_format: bool | None = None,
        interventions: Interventions = None,
        output_concepts: bool = False,
        output_slot_attentions: bool = False,
        output_image_embeddings: bool = False,
        **kwargs,
    ) -> SegCompassSegmentationOutput:
        r"""Write the reasoning and segment, from the states seen while writing: no second pass.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, prompt_length)`): Prompts, padded on the left.
            attention_mask (`torch.Tensor` of shape `(batch_size, prompt_length)`, *optional*): 1 on tokens.
            sam_pixel_values, image_embeddings, reshaped_input_sizes, original_sizes: As in `forward`.
            max_new_tokens (`int`, *optional*): Of the whole answer; a `generation_config`'s, else
                `max_reasoning_tokens` plus the format by default.
            reasoning (`str`, defaults to `"full"`): `"short"` closes the reasoning after `short_reasoning_tokens`,
                `"none"` at once.
            constrain_format (`bool`, *optional*): Guarantee tags, exactly K `<REF_POS>` and the end; left out, where
                the think tags are tokens. `False` lets the model write freely (reinforcement learning, format rates).
            interventions (*optional*): See [`ConceptIntervention`]; on concepts they change masks, on the residual
                stream the reasoning too.
            output_concepts, output_slot_attentions, output_image_embeddings (`bool`): Return these too.
            kwargs: The VLM's inputs, and anything `generate` takes; greedy decoding unless `do_sample=True`, there
                or in a `generation_config`, which is filled from the model's own as `generate` does.

        Returns:
            [`SegCompassSegmentationOutput`]

        Raises:
            ValueError: A prompt with padding on the right or with a completion, beam search, drafts or a static cache,
                too few `max_new_tokens` for the format, no image for SAM, or weights that yield NaN.

        States are collected by hooks: one call at a time on a model, whatever the number of threads.
        """
        batch_size, prompt_length = input_ids.shape
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self._check_segment_inputs(attention_mask, kwargs)
        interventions = normalize_interventions(interventions, self.config.sae_config.d_sae)
        image_embeddings = self._image_embeddings(sam_pixel_values, image_embeddings, batch_size)
        if image_embeddings is None:
            raise ValueError("segmenting needs an image for SAM: pass sam_pixel_values or image_embeddings.")
        self._check_finite("sam.vision_encoder", image_embeddings)
        if max_new_tokens is None:
            max_new_tokens = getattr(kwargs.get("generation_config"), "max_new_tokens", None)
        if max_new_tokens is None:
            max_new_tokens = self.config.max_reasoning_tokens + self.config.num_slots + 3
        end_ids = self._end_token_ids(kwargs)
        if constrain_format is None:  # a converted checkpoint of the original spells its think tags
            constrain_format = (self.config.ref_token_id is None) or self.config.think_start_token_id is not None
        training = [module for module in self.modules() if module.training]
        generator_inputs = dict(kwargs)
        processors = self._logits_processors(prompt_length, reasoning, constrain_format, max_new_tokens, end_ids)
        generator_inputs["logits_processor"] = [*processors, *(kwargs.get("logits_processor") or [])]
        if end_ids:
            generator_inputs["eos_token_id"] = end_ids
        cache = self._generation_setting(kwargs, "cache_implementation")
        cache = {} if cache in (None, *_GROWING_CACHES) else {"cache_implementation": "dynamic"}  # the model's own
        sampling = bool(getattr(kwargs.get("generation_config"), "do_sample", False))  # the caller's, not the model's
        self.eval()  # in training mode gradient checkpointing would silently drop the cache
        try:
            with self._capture(interventions, attention_mask, self.modality_ids(input_ids)) as capture:
                sequences = self.vlm.generate(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    max_new_tokens=max_new_tokens,
                    **{"do_sample": sampling, "use_cache": True, **cache, **generator_inputs},
                )
                sequences = getattr(sequences, "sequences", sequences)
                copies = sequences.shape[0] // batch_size
                prompt_mask = attention_mask.repeat_interleave(copies, 0)
                seen = torch.cat([prompt_mask, torch.ones_like(sequences[:, prompt_length:])], dim=1)
                run_last_token(capture, sequences, seen)
            return self._segment_sequences(
                capture.states(),
                sequences,
                prompt_mask,
                completion_mask_of(sequences[:, prompt_length:], end_ids),
                image_embeddings.repeat_interleave(copies, 0),
                None if reshaped_input_sizes is None else reshaped_input_sizes.repeat_interleave(copies, 0),
                interventions,
                {**kwargs, "copies": copies},
                {"concepts": output_concepts, "attentions": output_slot_attentions, "image": output_image_embeddings},
            )
        finally:
            for module in training:
                module.training = True

    def _segment_sequences(
        self,
        states: tuple[torch.Tensor, torch.Tensor],
        sequences: torch.Tensor,
        prompt_mask: torch.Tensor,
        written_mask: torch.Tensor,
        image_embeddings: torch.Tensor,
        reshaped_input_sizes: torch.Tensor | None,
        interventions: list,
        vlm_inputs: dict,
        returns: dict[str, bool],
    ) -> SegCompassSegmentationOutput:
        """Masks from the states of generated sequences."""
        layer_states, last_states = states
        attention_mask = torch.cat([prompt_mask, written_mask.to(prompt_mask.dtype)], dim=1)
        completion_mask = torch.cat([torch.zeros_like(prompt_mask), written_mask.to(prompt_mask.dtype)], dim=1)
        present = attention_mask.bool()
        self._check_finite("vlm", layer_states[present], last_states[present])
        concept_inputs = layer_states, attention_mask, self.modality_ids(sequences)
        if self.config.concept_input == "duplicated":
            copies = vlm_inputs.pop("copies")
            if copies > 1:
                raise ValueError(
                    f'concept_input="duplicated" reads one sequence per prompt, got num_return_sequences={copies}.'
                )
            inputs = {k: v for k, v in vlm_inputs.items() if k in _VLM_IMAGE_INPUTS}
            inputs["attention_mask"] = attention_mask
            concept_inputs = self._duplicated_states(sequences, completion_mask, interventions, inputs)
        concepts = self.encode_concepts(*concept_inputs, interventions)
        encoded = self.encode_slots(concepts, concept_inputs[1], returns["attentions"])
        self._check_finite("slot_encoder", encoded.slots)
        reference_states = self.find_reference_states(last_states, sequences, attention_mask, completion_mask)
        heatmap_logits, slot_logits, pred_masks = self.predict_masks(
            reference_states, encoded.slots, image_embeddings, reshaped_input_sizes
        )
        self._check_finite("slot_mapper", heatmap_logits, slot_logits)
        self._check_finite("sam.mask_decoder", pred_masks)
        return SegCompassSegmentationOutput(
            sequences=sequences,
            attention_mask=attention_mask,
            completion_mask=completion_mask,
            slot_logit_threshold=float(self.config.slot_logit_threshold),
            mask_logit_threshold=float(self.config.mask_logit_threshold),
            heatmap_logits=heatmap_logits,
            slot_logits=slot_logits,
            pred_masks=pred_masks,
            slots=encoded.slots,
            reference_states=reference_states,
            concepts=concepts if returns["concepts"] else None,
            slot_attentions=encoded.attentions,
            image_embeddings=image_embeddings if returns["image"] else None,
        )

    def _check_segment_inputs(self, attention_mask: torch.Tensor, kwargs: dict) -> None:
        """Refuse what would give wrong masks without a word; drop what `generate` does not know."""
        given = [name for name in ("completion_mask", "labels") if kwargs.pop(name, None) is not None]
        if given:
            raise ValueError(
                f"segment() writes the completion itself, but the inputs hold one ({', '.join(given)}); call the "
                "processor without reasoning, or call the model for a given completion."
            )
        for name in ("mask_labels", "num_objects"):
            kwargs.pop(name, None)
        if not bool(attention_mask[:, -1].all()):
            raise ValueError("some prompts are padded on the right; segment() continues them: pad on the left.")
        num_beams = self._generation_setting(kwargs, "num_beams") or 1
        if num_beams != 1:
            raise ValueError(
                f"num_beams={num_beams}: beams change places while they are written, so captured states would belong "
                "to other beams; use greedy decoding or sampling."
            )
        for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"):
            if self._generation_setting(kwargs, name) is not None:
                raise ValueError(
                    f"{name} drafts tokens that may be rejected, so captured states would belong to other tokens; "
                    "leave it out."
                )
        given = kwargs.get("cache_implementation")
        given = given or getattr(kwargs.get("generation_config"), "cache_implementation", None)
        if given not in (None, *_GROWING_CACHES):
            raise ValueError(
                f"cache_implementation={given!r} has no room for the step that completes the last token's states; use "
                f"one of {', '.join(_GROWING_CACHES)}."
            )

    def _generation_setting(self, kwargs: dict, name: str):
        """A setting as `generate` finds it: an argument, the caller's configuration, the model's own."""
        configs = (kwargs.get("generation_config"), self.generation_config)
        given = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in given if value is not None), None)

    def _end_token_ids(self, kwargs: dict) -> list[int]:
        """Ids that end an answer; the first is the one written."""
        text_config = self.config.get_text_config()
        ids = self._generation_setting(kwargs, "eos_token_id")
        if ids is None:
            ids = getattr(text_config, "eos_token_id", None)
        if isinstance(ids, torch.Tensor):
            ids = ids.tolist()
        return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)

    def _logits_processors(
        self, prompt_length: int, reasoning: str, constrain_format: bool, max_new_tokens: int, end_ids: list[int]
    ) -> list:
        """Processors that forbid vision tokens and, if asked, guarantee the format."""
        config = self.config
        suppress = SuppressTokensLogitsProcessor(
            self.vision_token_ids, partial(_non_finite_parameters, self.vlm, "vlm")
        )
        if not constrain_format:
            if reasoning != "full":
                raise ValueError(
                    f'reasoning="{reasoning}" is imposed by the format, which constrain_format=False switches off.'
                )
            return [suppress]
        missing = [name for name in ADDED_TOKENS if getattr(config, name) is None]
        if missing or not end_ids:
            raise ValueError(
                f"the format needs token ids that are not set: {', '.join(missing) or 'eos_token_id'}; set them on "
                "the config (eos_token_id on generation_config), or pass constrain_format=False."
            )
        budget = reasoning_budget(
            reasoning, config.num_slots, max_new_tokens, config.max_reasoning_tokens, config.short_reasoning_tokens
        )
        pad = self.generation_config.pad_token_id
        form = SegCompassFormatLogitsProcessor(
            prompt_length,
            config.num_slots,
            ref_token_id=config.ref_token_id,
            think_start_token_id=config.think_start_token_id,
            think_end_token_id=config.think_end_token_id,
            eos_token_id=end_ids[0],
            max_reasoning_tokens=budget,
            forbidden_token_ids=[*self.vision_token_ids, *end_ids, *([] if pad is None else [pad])],
        )
        return [suppress, form]

    def _check_finite(self, name: str, *tensors: torch.Tensor) -> None:
        """Raise where a stage's output is not a number, instead of returning masks that mean nothing."""
        for tensor in tensors:
            if not bool(torch.isfinite(tensor).all()):
                module = self.get_submodule(name)
                raise ValueError(
                    f"`{name}` gave {int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} values that are not "
                    f"finite. {_non_finite_parameters(module, name)}"
                )


def _non_finite_parameters(module: nn.Module, name: str) -> str:
    """Name the weights that hold NaN or infinities, or say that none does."""
    bad = [key for key, value in module.named_parameters() if not bool(torch.isfinite(value).all())]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        return f"These weights are broken: {', '.join(f'{name}.{key}' for key in bad[:3])}{more}; reload them."
    return "Its weights are finite, so its input was not or its dtype overflows; try dtype=torch.float32 or bfloat16."
