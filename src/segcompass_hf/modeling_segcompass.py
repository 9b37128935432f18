# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The composition: VLM, sparse concepts, slots, heatmaps and masks in one model, with one VLM pass."""

import math
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers import initialization as init

from .configuration_segcompass import SegCompassConfig
from .delegation_segcompass import VlmDelegationMixin, supported_attention
from .freezing_segcompass import TokenRowsMixin, freeze_for_training, parameter_groups
from .generation_segcompass import CACHE
from .image_features_segcompass import ImageFeatures, encode_different
from .interventions_segcompass import Interventions, normalize_interventions, steer_hidden_states
from .loading_segcompass import LoadingMixin
from .modeling_concepts import ConceptCodebook
from .modeling_heatmaps import SlotMapper
from .modeling_masks import MaskStage, check_segmenter, segmenter_class
from .modeling_sae import SegCompassSae
from .modeling_slots import SlotEncoder
from .original_inputs_segcompass import duplicated_inputs
from .reading_segcompass import MaskTargets, SegCompassOutput, SequenceStates
from .segmenters_segcompass import segmenter_config
from .segmenting_segcompass import SegCompassSegmentationOutput, SegmentingMixin
from .text_stack_segcompass import HiddenStateCapture, check_decoder_only
from .threads_segcompass import CallLock, one_call_at_a_time
from .vlm_inputs_segcompass import sequence_inputs


class SegCompassPreTrainedModel(PreTrainedModel):
    """Weight initialisation and capabilities shared with the Auto classes."""

    config_class = SegCompassConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    output_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the segmentation loss is a mean per micro-batch: let Trainer divide by their number
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # bf16 breaks SAM's positional encoding (errors up to 0.13).
    _keep_in_fp32_modules_strict = ["shared_image_embedding", "shared_embedding"]
    # Units of sharding beside the layers of VLM and segmenter: what is called as a module, so that its weights are
    # gathered. The segmenter's image encoder and mask decoder are two more.
    _no_split_modules: list[str] | set[str] = ["ConceptCodebook", "SlotEncoder", "SlotMapper"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if type(module).__module__ in _OWN_MODULES and hasattr(module, "reset_parameters"):
            if isinstance(module, nn.Embedding):
                init.normal_(module.weight, std=self.config.initializer_range)
            else:
                module.reset_parameters()
        elif isinstance(module, nn.Linear):
            # By fan-in, as the original: with a fixed std the heads of small models would hardly react.
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)


_OWN_MODULES = {cls.__module__ for cls in (ConceptCodebook, SlotEncoder, SlotMapper)}


class SegCompassForReasoningSegmentation(
    LoadingMixin, SegmentingMixin, TokenRowsMixin, VlmDelegationMixin, SegCompassPreTrainedModel
):
    r"""Reasoning segmentation: an image and an instruction -> reasoning in words and one mask per slot.

    One pass of the VLM yields the logits, the states after `sae_layer` layers and the last states. The former become
    sparse concepts (`sae`), concept embeddings (`codebook`) and slots (`slot_encoder`); the latter, read at the
    `<REF_POS>` tokens, join the slots in the `slot_mapper`, whose heatmaps prompt the segmenter, `sam`.

    Args:
        config ([`SegCompassConfig`]): The configuration.
        vlm (`PreTrainedModel`, *optional*): A loaded VLM; built from `config.vlm_config` when left out.
        sam (`PreTrainedModel`, *optional*): A loaded segmenter that takes mask prompts, see [`SEGMENTERS`].
        sae ([`SegCompassSae`], *optional*): A trained SAE.
    """

    def __init__(
        self,
        config: SegCompassConfig,
        vlm: PreTrainedModel | None = None,
        sam: PreTrainedModel | None = None,
        sae: SegCompassSae | None = None,
    ):
        super().__init__(config)
        self.call_lock = CallLock()
        self.vlm = vlm if vlm is not None else AutoModelForImageTextToText.from_config(config.vlm_config)
        check_decoder_only(self.vlm)
        if sam is None:
            sam_config: Any = config.sam_config
            asked, sam_class = sam_config._attn_implementation, segmenter_class(sam_config)
            if (attention := supported_attention(sam_class, asked)) != asked:
                sam_config._attn_implementation = attention
            sam = sam_class._from_config(sam_config)
        check_segmenter(sam)
        sam.config = segmenter_config(sam.config)
        self.sam = sam
        MaskStage(sam)  # prepares it
        self.sae = sae if sae is not None else SegCompassSae._from_config(config.sae_config)
        # The children hold copies: resizing the VLM's embeddings must show in what we save.
        config.vlm_config, config.sam_config, config.sae_config = self.vlm.config, self.sam.config, self.sae.config
        # The VLM ties its rows itself; PEFT asks the whole model, and would train two sets of rows where it says no.
        config.tie_word_embeddings = bool(getattr(self.vlm.config, "tie_word_embeddings", False))
        self._tied_weights_keys = {f"vlm.{key}": f"vlm.{of}" for key, of in self.vlm.all_tied_weights_keys.items()}
        self.codebook = ConceptCodebook(self.sae.config.d_sae, config.d_slot)
        self.slot_encoder = SlotEncoder(config)
        sam_dim = self.sam.config.mask_decoder_config.hidden_size
        self.slot_mapper = SlotMapper(config, hidden_size=config.hidden_size, sam_dim=sam_dim)
        self.post_init()
        # accelerate's FSDP refuses names of which there is no module, and VLMs name some (CLIP's text tower).
        units = {type(part).__name__ for part in (self.sam.vision_encoder, self.sam.mask_decoder)}
        self._no_split_modules = {type(module).__name__ for module in self.modules()} & {
            *self._no_split_modules,
            *units,
        }

    # Functions of `freezing_segcompass`, which take the model first.
    freeze_for_training = freeze_for_training
    parameter_groups = parameter_groups

    @one_call_at_a_time
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        sam_pixel_values: torch.Tensor | None = None,
        image_embeddings: torch.Tensor | ImageFeatures | None = None,
        completion_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        mask_labels: torch.Tensor | None = None,
        num_objects: torch.LongTensor | None = None,
        slots: torch.Tensor | None = None,
        reference_states: torch.Tensor | None = None,
        image_concept_embeddings: torch.Tensor | None = None,
        image_token_grids: torch.Tensor | None = None,
        reshaped_input_sizes: torch.Tensor | None = None,
        original_sizes: torch.Tensor | None = None,
        interventions: Interventions = None,
        output_concepts: bool = False,
        output_concept_embeddings: bool = False,
        output_slot_attentions: bool = False,
        output_image_embeddings: bool = False,
        output_slots: bool = False,
        targets: MaskTargets | None = None,
        slots_alone: bool = False,
        **vlm_kwargs: Any,
    ) -> SegCompassOutput:
        r"""Read a whole sequence (prompt and completion) once and segment.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Prompt and completion ids.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): 1 on tokens.
            pixel_values (`torch.Tensor`, *optional*): The VLM's own image input.
            sam_pixel_values (`torch.Tensor` of shape `(batch_size, 3, canvas, canvas)`, *optional*): SAM's input.
            image_embeddings (`torch.Tensor` of shape `(batch_size, channels, h, w)` or [`ImageFeatures`], *optional*):
                What `encode_image` returned, in place of `sam_pixel_values`. Without either only the language model
                runs.
            completion_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): 1 on the completion;
                where `labels` count when left out.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): Language targets, -100
                where nothing is asked.
            mask_labels (`torch.Tensor` of shape `(batch_size, num_masks, 4h, 4w)`, *optional*): Targets in [0, 1].
            num_objects (`torch.LongTensor` of shape `(batch_size,)`, *optional*): Objects per sample.
            slots, reference_states (`torch.Tensor` of shape `(batch_size, num_slots, ...)`, *optional*): What was read
                of sequences before, in place of `input_ids`: the VLM does not run, see [`SlotCache`].
            image_concept_embeddings (`torch.Tensor` of shape `(batch_size, num_patches, d_slot)`, *optional*): Of the
                image tokens, read before like these and needed beside them with `heatmap_concepts`; what lies beyond
                an image's number of tokens is not read.
            image_token_grids (`torch.LongTensor` of shape `(batch_size, 6)`, *optional*): Where image tokens lie,
                from a processor that has them switched on; needed with `heatmap_concepts`, else not read.
            reshaped_input_sizes (`torch.Tensor` of shape `(batch_size, 2)`, *optional*): (height, width) in pixels of
                the image on SAM's canvas.
            original_sizes (*optional*): Accepted so that `model(**inputs)` works; not read.
            interventions (*optional*): See [`ConceptIntervention`]; `{feature: scale}` acts on concepts.
            output_concepts, output_concept_embeddings, output_slot_attentions, output_image_embeddings (`bool`):
                Return these too.
            output_slots (`bool`, defaults to `False`): Return slots and reference states where there is no image too.
            targets ([`MaskTargets`], *optional*): In place of `mask_labels` and `num_objects`, by trainers whose batch
                is part of a larger one.
            slots_alone (`bool`, defaults to `False`): Leave everything to the slots, as the start of training may: the
                VLM's pass ends at the SAE's layer, without gradient, and reference states are zeros, so that there are
                no logits and no language loss. Without an image the output ends with slots and their confidences.
            vlm_kwargs: Everything else goes to the VLM.

        Returns:
            [`SegCompassOutput`]
        """
        if targets is None and mask_labels is not None:
            targets = MaskTargets(mask_labels, num_objects)
        if slots is not None and reference_states is not None and input_ids is None:
            image_embeddings = self.image_embeddings_of(sam_pixel_values, image_embeddings, len(slots))
            image = image_embeddings, reshaped_input_sizes
            grid = self.grid_of_image_concepts(image_concept_embeddings, image_token_grids, *image)
            return self.predict_masks(reference_states, slots, *image, targets, concept_grid=grid)
        if input_ids is None or slots is not None or reference_states is not None:
            raise ValueError("the model needs input_ids; or, read of them before, both slots and reference_states.")
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if completion_mask is None and labels is not None:
            completion_mask = labels != -100
        interventions = normalize_interventions(interventions, self.sae.config.d_sae)
        vlm_inputs = {"attention_mask": attention_mask, "pixel_values": pixel_values, **vlm_kwargs}
        vlm_output: Any = {}
        language_loss = loss = None
        if slots_alone:
            capture = self._pass_to_sae(input_ids, vlm_inputs, interventions)
        else:
            # The language loss is left to the VLM; a weight of 0 saves its cost.
            vlm_labels = labels if self.config.lm_loss_weight else None
            with self.capture_states(input_ids, attention_mask, interventions) as capture:
                vlm_output = self.vlm(**self.vlm_inputs(input_ids, labels=vlm_labels, **vlm_inputs))
            if vlm_labels is not None:
                language_loss = vlm_output.loss
                loss = self.config.lm_loss_weight * language_loss
        image_embeddings = self.image_embeddings_of(sam_pixel_values, image_embeddings, input_ids.shape[0])
        if image_embeddings is None and targets is not None:
            raise ValueError("mask_labels need an image for SAM: pass sam_pixel_values or image_embeddings.")
        output = SegCompassOutput()
        reads_slots = image_embeddings is not None or slots_alone or output_slots
        if reads_slots or output_concepts:
            layer_states, last_states = (capture.layer_states[0], None) if slots_alone else capture.states()
            states = SequenceStates(
                layer_states,
                last_states,
                input_ids,
                attention_mask,
                completion_mask,
                image_token_grids=image_token_grids,
            )
            states = self.with_concept_states(states, interventions, **vlm_inputs)
        if reads_slots:
            switches = (output_concepts, output_concept_embeddings, output_slot_attentions)
            output = self.read_masks(states, image_embeddings, reshaped_input_sizes, targets, interventions, *switches)
        elif output_concepts:
            output.concepts = self.read_concepts(states, interventions)
        if output.loss is not None:
            loss = output.loss if loss is None else loss + output.loss
        return replace(
            output,
            loss=loss,
            logits=vlm_output.get("logits"),
            image_embeddings=image_embeddings if output_image_embeddings else None,
            language_loss=language_loss,
            cache=vlm_output.get(CACHE),
        )

    @torch.no_grad()
    def _pass_to_sae(
        self, input_ids: torch.Tensor, vlm_inputs: dict[str, torch.Tensor], interventions: Interventions
    ) -> HiddenStateCapture:
        """Pass whole sequences through the layers below the SAE; what lies above is not computed."""
        with self.capture_states(input_ids, vlm_inputs["attention_mask"], interventions, stop=True) as capture:
            self.vlm(**self.vlm_inputs(input_ids, **vlm_inputs))
        return capture

    def image_embeddings_of(
        self,
        sam_pixel_values: torch.Tensor | None,
        image_embeddings: torch.Tensor | ImageFeatures | None,
        batch_size: int,
    ) -> torch.Tensor | ImageFeatures | None:
        """Features of images, given or computed; `None` where there is neither.

        Raises:
            ValueError: There are both, or not one image per sequence.
        """
        if image_embeddings is None and sam_pixel_values is None:
            return None
        if image_embeddings is not None and sam_pixel_values is not None:
            raise ValueError("got both sam_pixel_values and image_embeddings; pass one of them.")
        if image_embeddings is None:
            image_embeddings = encode_different(self.encode_image, sam_pixel_values)
        if image_embeddings.shape[0] != batch_size:
            raise ValueError(
                f"got SAM features of {image_embeddings.shape[0]} images for {batch_size} sequences; pass one image "
                "per sequence."
            )
        return image_embeddings

    def capture_states(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        interventions: Interventions = None,
        stop: bool = False,
    ) -> HiddenStateCapture:
        """Context that reads the VLM's states and steers them where an intervention acts on the residual stream.

        `stop` ends the pass at the SAE's layer.

        Tokens after those of `input_ids` and `attention_mask`, both `(batch_size, sequence_length)`, are generated
        ones, and so text.
        """
        edit, interventions = None, normalize_interventions(interventions)
        if any(intervention.where == "residual" for intervention in interventions):
            modality_ids = self.modality_ids(input_ids)

            def edit(states: torch.Tensor, passed: int) -> torch.Tensor:
                span = slice(passed, passed + states.shape[1])
                if passed >= attention_mask.shape[1]:
                    return steer_hidden_states(
                        self.sae, states, interventions, None, states.new_zeros(states.shape[:2], dtype=torch.long)
                    )
                copies = states.shape[0] // attention_mask.shape[0]  # num_return_sequences
                mask, modality = (x[:, span].repeat_interleave(copies, 0) for x in (attention_mask, modality_ids))
                return steer_hidden_states(self.sae, states, interventions, mask, modality)

        layer = cast(int, self.config.sae_layer)  # set by the configuration where it was left out
        return HiddenStateCapture(self.vlm, layer, edit, stop, prompt_length=input_ids.shape[1])

    def vlm_inputs(self, input_ids: torch.Tensor, **inputs: Any) -> dict:
        """Arguments of `self.vlm(...)` for whole sequences; see [`sequence_inputs`]."""
        return sequence_inputs(self.vlm, {"input_ids": input_ids, **inputs})

    @torch.no_grad()
    def with_concept_states(
        self, states: SequenceStates, interventions: Interventions = None, **vlm_inputs: Any
    ) -> SequenceStates:
        """The states with those that concepts are read from: the same, but with `concept_input="duplicated"`, where a
        second pass of the VLM (its other inputs: `vlm_inputs`) reads what the original code lets its SAE read.

        Raises:
            ValueError: The completion is to be duplicated, but there is no `completion_mask`.
        """
        if self.config.concept_input != "duplicated":
            return states
        ids, mask = duplicated_inputs(
            states.input_ids,
            states.attention_mask,
            states.completion_mask,
            self.config.get_text_config().pad_token_id or 0,
            self.config.image_token_id,
        )
        inputs = {name: value for name, value in vlm_inputs.items() if name not in ("position_ids", "use_cache")}
        for name in [name for name in inputs if name.endswith("token_type_ids")]:
            inputs[name] = self.modality_ids(ids)
        capture = self._pass_to_sae(ids, {**inputs, "attention_mask": mask}, interventions)
        return replace(states, layer_states=capture.layer_states[0], concept_ids=ids, concept_mask=mask)


SegCompassForReasoningSegmentation.register_for_auto_class("AutoModel")

__all__ = [
    "SegCompassForReasoningSegmentation",
    "SegCompassOutput",
    "SegCompassPreTrainedModel",
    "SegCompassSegmentationOutput",
]
