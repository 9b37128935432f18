# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The composition: VLM, sparse concepts, slots, heatmaps and SAM masks in one model, with one VLM pass."""

import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel, SamModel
from transformers import initialization as init
from transformers.utils import ModelOutput, logging

from .configuration_segcompass import SegCompassConfig
from .freezing_segcompass import freeze_for_training, parameter_groups
from .generation_segcompass import (
    HiddenStateCapture,
    SegCompassFormatLogitsProcessor,
    SuppressTokensLogitsProcessor,
    completion_mask_of,
    reasoning_budget,
    run_last_token,
)
from .losses_segcompass import SegmentationLossOutput, segmentation_loss
from .modeling_concepts import (
    ConceptCodebook,
    Interventions,
    SparseConcepts,
    apply_interventions,
    encode_concepts,
    normalize_interventions,
    steer_hidden_states,
)
from .modeling_heatmaps import SlotMapper, SlotMapperOutput
from .modeling_masks import SamMaskStage
from .modeling_sae import SegCompassSae
from .modeling_slots import SlotEncoder, SlotEncoderOutput
from .original_inputs_segcompass import duplicate_completion, limit_image_tokens

logger = logging.get_logger(__name__)

ADDED_TOKENS = {"ref_token_id": "<REF_POS>", "think_start_token_id": "<think>", "think_end_token_id": "</think>"}


@dataclass
class SegCompassOutput(ModelOutput):
    """Output of [`SegCompassForReasoningSegmentation`]. Without an image for SAM only the language fields are set.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): `lm_loss_weight * language_loss` (given `labels`) plus the
            weighted segmentation losses (given `mask_labels`).
        logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`): Of the VLM.
        heatmap_logits (`torch.Tensor` of shape `(batch_size, num_slots, 4h, 4w)`): Slot maps before SAM, padding not
            masked; `h`, `w` are the sides of SAM's image embedding.
        slot_logits (`torch.Tensor` of shape `(batch_size, num_slots)`): Confidence that a slot holds an object.
        pred_masks (`torch.Tensor` of shape `(batch_size, num_slots, 4h, 4w)`, *optional*): Mask logits; `None` where
            only matched slots were decoded (training).
        slots (`torch.Tensor` of shape `(batch_size, num_slots, d_slot)`): Concept slots.
        reference_states (`torch.Tensor` of shape `(batch_size, num_slots, hidden_size)`): Last hidden states at the
            `<REF_POS>` tokens, zeros where there are fewer than slots.
        concepts ([`SparseConcepts`], *optional*): Active concepts per token, with `output_concepts=True`.
        slot_attentions (`tuple[torch.Tensor]`, *optional*): One per slot encoder layer, of shape
            `(batch_size, num_heads, num_slots, num_slots + sequence_length)`, with `output_slot_attentions=True`.
        image_embeddings (`torch.Tensor` of shape `(batch_size, channels, h, w)`, *optional*): SAM's, with
            `output_image_embeddings=True`.
        language_loss, segmentation_loss, confidence_loss (`torch.Tensor` of shape `()`, *optional*): Before weights.
        losses ([`SegmentationLossOutput`], *optional*): The single terms and the matched pairs.
        past_key_values (`Cache`, *optional*): Of the VLM, with `use_cache=True`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    heatmap_logits: torch.Tensor | None = None
    slot_logits: torch.Tensor | None = None
    pred_masks: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    reference_states: torch.Tensor | None = None
    concepts: SparseConcepts | None = None
    slot_attentions: tuple[torch.Tensor, ...] | None = None
    image_embeddings: torch.Tensor | None = None
    language_loss: torch.Tensor | None = None
    segmentation_loss: torch.Tensor | None = None
    confidence_loss: torch.Tensor | None = None
    losses: SegmentationLossOutput | None = None
    past_key_values: Any | None = None


@dataclass
class SegCompassSegmentationOutput(ModelOutput):
    """Output of [`SegCompassForReasoningSegmentation.segment`]. Rows: `batch_size * num_return_sequences`.

    Args:
        sequences (`torch.LongTensor` of shape `(rows, sequence_length)`): Prompt and completion ids.
        attention_mask (`torch.LongTensor` of shape `(rows, sequence_length)`): 1 on tokens up to the row's end.
        completion_mask (`torch.LongTensor` of shape `(rows, sequence_length)`): 1 on tokens the model wrote.
        slot_logit_threshold (`float`): The model's own; slots above it count as present.
        heatmap_logits, slot_logits, pred_masks, slots, reference_states, concepts, slot_attentions, image_embeddings:
            As in [`SegCompassOutput`].
    """

    sequences: torch.LongTensor | None = None
    attention_mask: torch.LongTensor | None = None
    completion_mask: torch.LongTensor | None = None
    slot_logit_threshold: float | None = None
    heatmap_logits: torch.Tensor | None = None
    slot_logits: torch.Tensor | None = None
    pred_masks: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    reference_states: torch.Tensor | None = None
    concepts: SparseConcepts | None = None
    slot_attentions: tuple[torch.Tensor, ...] | None = None
    image_embeddings: torch.Tensor | None = None


def gather_reference_states(
    last_states: torch.Tensor,
    is_reference: torch.Tensor,
    num_slots: int,
    order: Literal["earliest_first", "latest_first"] = "earliest_first",
) -> torch.Tensor:
    """States at the last `num_slots` reference tokens of each row; zeros for slots that have none.

    Args:
        last_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): Last hidden states.
        is_reference (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): Where the reference tokens are.
        num_slots (`int`): K.
        order (`str`): Which of them slot 0 gets.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_slots, hidden_size)`.
    """
    rank_from_end = is_reference.long().flip(1).cumsum(1).flip(1)  # 1 for the last reference token
    kept = is_reference & (rank_from_end <= num_slots)
    slot = rank_from_end - 1 if order == "latest_first" else kept.long().cumsum(1) - 1
    rows, columns = kept.nonzero(as_tuple=True)
    states = last_states.new_zeros(last_states.shape[0], num_slots, last_states.shape[-1])
    return states.index_put((rows, slot[rows, columns]), last_states[rows, columns])


class SegCompassPreTrainedModel(PreTrainedModel):
    """Weight initialisation and capabilities shared with the Auto classes."""

    config_class = SegCompassConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the segmentation loss is a mean per micro-batch: let Trainer divide by their number
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # bf16 breaks SAM's positional encoding (errors up to 0.13).
    _keep_in_fp32_modules_strict = ["shared_image_embedding", "shared_embedding"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Linear):
            # By fan-in, as the original: with a fixed std the heads of small models would hardly react.
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif type(module).__module__ in _OWN_MODULES and hasattr(module, "reset_parameters"):
            if isinstance(module, nn.Embedding):
                init.normal_(module.weight, std=self.config.initializer_range)
            else:
                module.reset_parameters()
        else:
            super()._init_weights(module)


_OWN_MODULES = {cls.__module__ for cls in (ConceptCodebook, SlotEncoder, SlotMapper)}


class SegCompassForReasoningSegmentation(SegCompassPreTrainedModel):
    r"""Reasoning segmentation: an image and an instruction -> reasoning in words and one mask per slot.

    One pass of the VLM yields the logits, the states after `sae_layer` layers and the last states. The former become
    sparse concepts (`sae`), concept embeddings (`codebook`) and slots (`slot_encoder`); the latter, read at the
    `<REF_POS>` tokens, join the slots in the `slot_mapper`, whose heatmaps prompt `sam`.

    Args:
        config ([`SegCompassConfig`]): The configuration.
        vlm (`PreTrainedModel`, *optional*): A loaded VLM; built from `config.vlm_config` when left out.
        sam (`SamModel`, *optional*): A loaded SAM.
        sae ([`SegCompassSae`], *optional*): A trained SAE.
    """

    def __init__(
        self,
        config: SegCompassConfig,
        vlm: PreTrainedModel | None = None,
        sam: SamModel | None = None,
        sae: SegCompassSae | None = None,
    ):
        super().__init__(config)
        self.vlm = vlm if vlm is not None else AutoModelForImageTextToText.from_config(config.vlm_config)
        self.sam = sam if sam is not None else SamModel._from_config(config.sam_config)
        self.sae = sae if sae is not None else SegCompassSae._from_config(config.sae_config)
        # The children hold copies: resizing the VLM's embeddings must show in what we save.
        config.vlm_config, config.sam_config, config.sae_config = self.vlm.config, self.sam.config, self.sae.config
        self.codebook = ConceptCodebook(config.sae_config.d_sae, config.d_slot)
        self.slot_encoder = SlotEncoder(config)
        sam_dim = config.sam_config.mask_decoder_config.hidden_size
        self.slot_mapper = SlotMapper(config, hidden_size=config.hidden_size, sam_dim=sam_dim)
        self.post_init()

    @classmethod
    def from_pretrained_parts(
        cls,
        vlm: str | PreTrainedModel,
        sam: str | PreTrainedModel,
        sae: str | PreTrainedModel | None = None,
        num_slots: int = 4,
        sae_layer: int | None = None,
        tokenizer: Any | None = None,
        processor: Any | None = None,
        dtype: torch.dtype | str | None = None,
        **config_kwargs,
    ) -> "SegCompassForReasoningSegmentation":
        """Compose a model from a VLM, a SAM and, if there is one, an SAE; the heads between them are new.

        Args:
            vlm (`str` or `PreTrainedModel`): Hub id, folder or loaded model.
            sam (`str` or `PreTrainedModel`): The same for SAM.
            sae (`str` or `PreTrainedModel`, *optional*): The same for the SAE; a new, untrained one when left out.
            num_slots (`int`, defaults to 4): K.
            sae_layer (`int`, *optional*): The SAE's own when left out, else see [`SegCompassConfig`].
            tokenizer, processor (*optional*): Gets `<REF_POS>`, `<think>` and `</think>` added, in place, and the VLM
                as many embedding rows as it has tokens. Left out and `vlm` a path: that path's tokenizer.
            dtype (`torch.dtype` or `str`, *optional*): Of everything; the checkpoints' own when left out.
            config_kwargs: Further fields of [`SegCompassConfig`].
        """
        load = {} if dtype is None else {"dtype": dtype}
        if tokenizer is None:
            tokenizer = getattr(processor, "tokenizer", processor)
        if isinstance(vlm, str) or hasattr(vlm, "__fspath__"):
            if tokenizer is None:
                tokenizer = AutoTokenizer.from_pretrained(vlm)
            vlm = AutoModelForImageTextToText.from_pretrained(vlm, **load)
        if isinstance(sam, str) or hasattr(sam, "__fspath__"):
            sam = SamModel.from_pretrained(sam, **load)
        if isinstance(sae, str) or hasattr(sae, "__fspath__"):
            sae = SegCompassSae.from_pretrained(sae, **load)
        if tokenizer is not None:
            config_kwargs = {**add_tokens(tokenizer, vlm), **config_kwargs}
        sae_config = sae.config if sae is not None else config_kwargs.pop("sae_config", None)
        config = SegCompassConfig(
            vlm_config=vlm.config,
            sam_config=sam.config,
            sae_config=sae_config,
            num_slots=num_slots,
            sae_layer=sae_layer,
            **config_kwargs,
        )
        if sae is None:
            logger.warning("no SAE given: its features are random until one is trained on layer %d.", config.sae_layer)
            sae = SegCompassSae(config.sae_config)
        model = cls(config, vlm=vlm, sam=sam, sae=sae)
        head_dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
        if not isinstance(head_dtype, torch.dtype):
            head_dtype = vlm.dtype if vlm.dtype.is_floating_point else torch.float32
        for module in (model.sae, model.codebook, model.slot_encoder, model.slot_mapper):
            module.to(device=vlm.device, dtype=head_dtype)
        model.sam.to(vlm.device)
        return model.eval()

    # What generation, Trainer and TRL ask of a model is answered by the VLM.

    @property
    def base_model(self) -> nn.Module:
        """The VLM without its head (TRL's fused head runs it)."""
        return self.vlm.base_model

    @property
    def generation_config(self):
        return self.vlm.generation_config if "vlm" in self._modules else None

    @generation_config.setter
    def generation_config(self, value):
        if "vlm" in self._modules:  # PreTrainedModel.__init__ sets it before the VLM exists
            self.vlm.generation_config = value

    @classmethod
    def can_generate(cls) -> bool:
        return True

    def adjust_generation_fn(self, *args, **kwargs):
        self.vlm.adjust_generation_fn(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.vlm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.vlm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.vlm.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module):
        self.vlm.set_output_embeddings(value)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        return self.vlm.resize_token_embeddings(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict:
        return self.vlm.prepare_inputs_for_generation(*args, **kwargs)

    def generate(self, *args, **kwargs):
        """Generate text with the VLM; image and video placeholders are never written. See `GenerationMixin`."""
        config = kwargs.get("generation_config") or self.generation_config
        chosen = kwargs.pop("suppress_tokens", None) or config.suppress_tokens or []
        suppressed = sorted({*chosen, *self.vision_token_ids})
        return self.vlm.generate(*args, suppress_tokens=suppressed or None, **kwargs)

    @property
    def vision_token_ids(self) -> list[int]:
        """Ids that stand for image or video content, which text must never hold."""
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        ids = [getattr(self.config.vlm_config, name, None) for name in names]
        return sorted({i for i in ids if isinstance(i, int) and 0 <= i < self.config.vocab_size})

    @property
    def mask_stage(self) -> SamMaskStage:
        """The mask decoder's interface: image -> embeddings; embeddings and heatmaps -> masks."""
        return SamMaskStage(self.sam)

    def freeze_for_training(self, train_token_rows: Literal["head", "none", "both"] | None = None):
        """Leave trainable what the method trains; see `freezing_segcompass`. Returns the model.

        Args:
            train_token_rows (`str`, *optional*): `config.train_token_rows` when left out.
        """
        freeze_for_training(self, train_token_rows or self.config.train_token_rows)
        return self

    def parameter_groups(
        self, learning_rate: float, weight_decay: float = 0.0, factors: dict[str, float] | None = None
    ) -> list[dict]:
        """Optimizer groups: learning rates by part, no decay where rows are frozen. See `freezing_segcompass`."""
        return parameter_groups(self, learning_rate, weight_decay, factors)

    # The stages, each of use on its own (ablations, attribution, trainers).

    def encode_image(self, sam_pixel_values: torch.Tensor) -> torch.Tensor:
        """SAM features `(batch_size, channels, h, w)` of `sam_pixel_values` `(batch_size, 3, canvas, canvas)`."""
        return self.mask_stage.encode_image(sam_pixel_values)

    def modality_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """1 on image (and video) tokens, 0 on text; `(batch_size, sequence_length)`."""
        ids = [i for i in (self.config.image_token_id, self.config.video_token_id) if i is not None]
        return torch.isin(input_ids, torch.tensor(ids, device=input_ids.device)).long()

    def encode_concepts(
        self,
        layer_states: torch.Tensor,
        attention_mask: torch.Tensor,
        modality_ids: torch.Tensor,
        interventions: Interventions = None,
    ) -> SparseConcepts:
        """Active concepts of states `(batch_size, sequence_length, hidden_size)`, interventions applied; no grad."""
        concepts = encode_concepts(
            self.sae,
            layer_states,
            attention_mask,
            self.config.concept_threshold,
            modality_ids,
            chunk_size=self.config.concept_chunk_size,
        )
        return apply_interventions(concepts, interventions, attention_mask, modality_ids, self.config.sae_config.d_sae)

    def encode_slots(
        self, concepts: SparseConcepts, attention_mask: torch.Tensor, output_attentions: bool = False
    ) -> SlotEncoderOutput:
        """Slots `(batch_size, num_slots, d_slot)` of sparse concepts; differentiable in `concepts.values`."""
        return self.slot_encoder(self.codebook(concepts), attention_mask, output_attentions=output_attentions)

    def find_reference_states(
        self,
        last_states: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        completion_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Last states at the last K `<REF_POS>`, searched and ordered as the configuration says.

        Without a `completion_mask` there is no completion to search: all zeros (the prompt may name the token).

        Returns:
            `torch.Tensor` of shape `(batch_size, num_slots, hidden_size)`.
        """
        if self.config.ref_token_id is None:
            raise ValueError(
                "config.ref_token_id is None, so no <REF_POS> can be found; set it to the tokenizer's id of <REF_POS>."
            )
        where = attention_mask.bool()
        if self.config.reference_search == "completion":
            where = where & (completion_mask.bool() if completion_mask is not None else False)
        is_reference = (input_ids == self.config.ref_token_id) & where
        return gather_reference_states(last_states, is_reference, self.config.num_slots, self.config.reference_order)

    def predict_masks(
        self,
        reference_states: torch.Tensor,
        slots: torch.Tensor,
        image_embeddings: torch.Tensor,
        reshaped_input_sizes: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """From reference states and slots (perhaps changed by the caller) to masks.

        Args:
            reference_states (`torch.Tensor` of shape `(batch_size, num_slots, hidden_size)`): At the `<REF_POS>`.
            slots (`torch.Tensor` of shape `(batch_size, num_slots, d_slot)`): Concept slots.
            image_embeddings (`torch.Tensor` of shape `(batch_size, channels, h, w)`): SAM features.
            reshaped_input_sizes (`torch.Tensor` of shape `(batch_size, 2)`, *optional*): (height, width) in pixels of
                the image on SAM's canvas; the whole canvas counts as image when left out.

        Returns:
            `tuple`: `heatmap_logits` `(batch_size, num_slots, 4h, 4w)`, `slot_logits` `(batch_size, num_slots)`,
            `pred_masks` `(batch_size, num_slots, 4h, 4w)`.
        """
        mapped = self.slot_mapper(reference_states, slots, image_embeddings)
        area = self._valid_area(reshaped_input_sizes, image_embeddings)
        pred_masks = self.mask_stage.decode(image_embeddings, mapped.heatmap_logits, area)
        return mapped.heatmap_logits, mapped.slot_logits, pred_masks

    def _valid_area(self, sizes: torch.Tensor | None, image_embeddings: torch.Tensor) -> torch.Tensor | None:
        return None if sizes is None else self.mask_stage.valid_area(sizes.to(image_embeddings.device))

    def _image_embeddings(
        self, sam_pixel_values: torch.Tensor | None, image_embeddings: torch.Tensor | None, batch_size: int
    ) -> torch.Tensor | None:
        """SAM features, given or computed, checked against the number of rows."""
        if image_embeddings is None and sam_pixel_values is None:
            return None
        if image_embeddings is not None and sam_pixel_values is not None:
            raise ValueError("got both sam_pixel_values and image_embeddings; pass one of them.")
        if image_embeddings is None:
            image_embeddings = self.encode_image(sam_pixel_values)
        if image_embeddings.shape[0] != batch_size:
            raise ValueError(
                f"got SAM features of {image_embeddings.shape[0]} images for {batch_size} sequences; pass one image "
                "per sequence."
            )
        return image_embeddings

    # Training and inference.

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        sam_pixel_values: torch.Tensor | None = None,
        image_embeddings: torch.Tensor | None = None,
        completion_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        mask_labels: torch.Tensor | None = None,
        num_objects: torch.LongTensor | None = None,
        reshaped_input_sizes: torch.Tensor | None = None,
        original_sizes: torch.Tensor | None = None,
        slots: torch.Tensor | None = None,
        reference_states: torch.Tensor | None = None,
        interventions: Interventions = None,
        output_concepts: bool = False,
        output_slot_attentions: bool = False,
        output_image_embeddings: bool = False,
        decode_masks: Literal["auto", "all", "matched"] = "auto",
        num_segmentation_items: int | torch.Tensor | None = None,
        num_samples: int | torch.Tensor | None = None,
        **vlm_kwargs,
    ) -> SegCompassOutput:
        r"""Read a whole sequence (prompt and completion) once and segment.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Prompt and completion ids.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): 1 on tokens.
            pixel_values (`torch.Tensor`, *optional*): The VLM's own image input.
            sam_pixel_values (`torch.Tensor` of shape `(batch_size, 3, canvas, canvas)`, *optional*): SAM's input.
            image_embeddings (`torch.Tensor` of shape `(batch_size, channels, h, w)`, *optional*): SAM features, in
                place of `sam_pixel_values`. Without either only the language model runs.
            completion_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): 1 on the completion;
                where `labels` count when left out.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): Language targets, -100
                where nothing is asked.
            mask_labels (`torch.Tensor` of shape `(batch_size, num_masks, 4h, 4w)`, *optional*): Targets in [0, 1].
            num_objects (`torch.LongTensor` of shape `(batch_size,)`, *optional*): Objects per sample.
            reshaped_input_sizes (`torch.Tensor` of shape `(batch_size, 2)`, *optional*): (height, width) in pixels of
                the image on SAM's canvas.
            original_sizes (*optional*): Accepted so that `model(**inputs)` works; not read.
            slots, reference_states (`torch.Tensor`, *optional*): Replace the computed ones (ablations).
            interventions (*optional*): See [`ConceptIntervention`]; `{feature: scale}` acts on concepts.
            output_concepts, output_slot_attentions, output_image_embeddings (`bool`): Return these too.
            decode_masks (`str`, defaults to `"auto"`): Whether `all` slots or only `matched` ones go through SAM's
                decoder; `auto` is `matched` in training with `mask_labels`.
            num_segmentation_items, num_samples (*optional*): Size of the larger batch this one is part of; see
                [`segmentation_loss`].
            vlm_kwargs: Everything else goes to the VLM.

        Returns:
            [`SegCompassOutput`]
        """
        if input_ids is None:
            raise ValueError("SegCompass finds <REF_POS> by its id and needs input_ids, got None.")
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if completion_mask is None and labels is not None:
            completion_mask = labels != -100
        interventions = normalize_interventions(interventions, self.config.sae_config.d_sae)
        modality_ids = self.modality_ids(input_ids)
        # The language loss is left to the VLM; a weight of 0 saves its cost.
        vlm_labels = labels if self.config.lm_loss_weight else None
        vlm_inputs = {"attention_mask": attention_mask, "pixel_values": pixel_values, "use_cache": False, **vlm_kwargs}
        with self._capture(interventions, attention_mask, modality_ids) as capture:
            vlm_output = self.vlm(
                input_ids=input_ids,
                labels=vlm_labels,
                **self._with_positions({k: v for k, v in vlm_inputs.items() if v is not None}),
            )
        language_loss = vlm_output.loss if vlm_labels is not None else None
        output = SegCompassOutput(
            logits=vlm_output.logits, language_loss=language_loss, past_key_values=vlm_output.get("past_key_values")
        )
        if language_loss is not None:
            output.loss = self.config.lm_loss_weight * language_loss
        image_embeddings = self._image_embeddings(sam_pixel_values, image_embeddings, input_ids.shape[0])
        if image_embeddings is None and mask_labels is not None:
            raise ValueError("mask_labels need an image for SAM: pass sam_pixel_values or image_embeddings.")
        if image_embeddings is None and not output_concepts:
            return output

        layer_states, last_states = capture.states()
        if reference_states is None and image_embeddings is not None:
            reference_states = self.find_reference_states(last_states, input_ids, attention_mask, completion_mask)
        concept_inputs = layer_states, attention_mask, modality_ids
        if self.config.concept_input == "duplicated":
            concept_inputs = self._duplicated_states(input_ids, completion_mask, interventions, vlm_inputs)
        concepts = self.encode_concepts(*concept_inputs, interventions)
        output.concepts = concepts if output_concepts else None
        if image_embeddings is None:
            return output
        encoded = self.encode_slots(concepts, concept_inputs[1], output_slot_attentions)
        output.slots = encoded.slots if slots is None else slots
        output.reference_states, output.slot_attentions = reference_states, encoded.attentions
        output.image_embeddings = image_embeddings if output_image_embeddings else None

        mapped = self.slot_mapper(reference_states, output.slots, image_embeddings)
        output.heatmap_logits, output.slot_logits = mapped.heatmap_logits, mapped.slot_logits
        area = self._valid_area(reshaped_input_sizes, image_embeddings)
        decode = partial(self.mask_stage.decode, image_embeddings, mapped.heatmap_logits, area)
        only_matched = decode_masks == "matched" or (decode_masks == "auto" and self.training)
        if mask_labels is None or not only_matched:
            output.pred_masks = decode()
        if mask_labels is not None:
            masks = (lambda a: decode(pairs=a.pairs)) if output.pred_masks is None else output.pred_masks
            counts = {"num_items": num_segmentation_items, "num_samples": num_samples}
            output.losses = self.segmentation_loss(mapped, masks, mask_labels, num_objects, area, **counts)
            output.segmentation_loss = output.losses.segmentation_loss
            output.confidence_loss = output.losses.confidence_loss
            output.loss = output.losses.loss if output.loss is None else output.loss + output.losses.loss
        return output

    def segmentation_loss(
        self,
        mapped: SlotMapperOutput,
        pred_masks,
        mask_labels: torch.Tensor,
        num_objects: torch.Tensor | None,
        valid_area: torch.Tensor | None,
        **counts,
    ) -> SegmentationLossOutput:
        """[`segmentation_loss`] with this model's weights."""
        config = self.config
        return segmentation_loss(
            mapped.heatmap_logits,
            pred_masks,
            mapped.slot_logits,
            mask_labels,
            num_objects,
            valid_area,
            seg_loss_weight=config.seg_loss_weight,
            conf_loss_weight=config.conf_loss_weight,
            heatmap_bce_weight=config.heatmap_bce_weight,
            heatmap_dice_weight=config.heatmap_dice_weight,
            mask_dice_weight=config.mask_dice_weight,
            mask_focal_weight=config.mask_focal_weight,
            match_confidence_weight=config.match_confidence_weight,
            match_valid_area_only=config.valid_area_only,
            empty_samples=config.empty_samples,
            **counts,
        )

    def _capture(
        self, interventions: list, attention_mask: torch.Tensor, modality_ids: torch.Tensor
    ) -> HiddenStateCapture:
        """Context that reads the VLM's states and steers them where an intervention acts on the residual stream.

        Tokens after those of `attention_mask` (generated ones) are text.
        """
        edit = None
        if any(intervention.where == "residual" for intervention in interventions):

            def edit(states: torch.Tensor, passed: int) -> torch.Tensor:
                span = slice(passed, passed + states.shape[1])
                if passed >= attention_mask.shape[1]:
                    return steer_hidden_states(
                        self.sae, states, interventions, None, states.new_zeros(states.shape[:2], dtype=torch.long)
                    )
                copies = states.shape[0] // attention_mask.shape[0]  # num_return_sequences
                mask, modality = (x[:, span].repeat_interleave(copies, 0) for x in (attention_mask, modality_ids))
                return steer_hidden_states(self.sae, states, interventions, mask, modality)

        return HiddenStateCapture(self.base_model, self.config.sae_layer, edit)

    def _with_positions(self, vlm_inputs: dict) -> dict:
        """Count positions from the first token, as generation does, so that left padding changes nothing.

        Families with multimodal rotary positions count them themselves.
        """
        if "position_ids" in vlm_inputs or hasattr(self.base_model, "get_rope_index"):
            return vlm_inputs
        positions = (vlm_inputs["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)
        return {**vlm_inputs, "position_ids": positions}

    @torch.no_grad()
    def _duplicated_states(
        self,
        input_ids: torch.Tensor,
        completion_mask: torch.Tensor | None,
        interventions: list,
        vlm_inputs: dict,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """States, mask and modality of the SAE input of the original code: a second pass, for its checkpoints only."""
        if completion_mask is None:
            raise ValueError(
                'concept_input="duplicated" repeats the completion and needs a completion_mask, got None; for prompts '
                'alone use concept_input="once".'
            )
        pad = self.config.get_text_config().pad_token_id or 0
        starts = completion_mask.long().argmax(dim=1)
        start = int(starts[completion_mask.bool().any(dim=1)].min()) if bool(completion_mask.any()) else None
        ids = input_ids.masked_fill(~vlm_inputs["attention_mask"].bool(), pad)
        completion = ids[:, start:] if start is not None else ids[:, :0]
        ids, mask, positions = duplicate_completion(input_ids, vlm_inputs["attention_mask"], completion, pad)
        if self.config.image_token_id is not None:
            per_row = int((input_ids[:, :start] == self.config.image_token_id).sum(1).max())
            ids = limit_image_tokens(ids, self.config.image_token_id, per_row, pad)
        modality_ids = self.modality_ids(ids)
        vlm_inputs = {k: v for k, v in vlm_inputs.items() if v is not None and k not in ("position_ids", "use_cache")}
        vlm_inputs["attention_mask"] = mask
        if "mm_token_type_ids" in vlm_inputs:
            vlm_inputs["mm_token_type_ids"] = modality_ids
        if not hasattr(self.base_model, "get_rope_index"):
            vlm_inputs["position_ids"] = positions
        with self._capture(interventions, mask, modality_ids) as capture:
            self.base_model(input_ids=ids, use_cache=False, **vlm_inputs)
        return capture.states()[0], mask, modality_ids

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
        constrain_format: bool = True,
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
            max_new_tokens (`int`, *optional*): Of the whole answer; `max_reasoning_tokens` plus the format by default.
            reasoning (`str`, defaults to `"full"`): `"short"` closes the reasoning after `short_reasoning_tokens`,
                `"none"` at once.
            constrain_format (`bool`, defaults to `True`): Guarantee tags, exactly K `<REF_POS>` and the end. `False`
                lets the model write freely (reinforcement learning, format rates).
            interventions (*optional*): See [`ConceptIntervention`]; on concepts they change masks, on the residual
                stream the reasoning too.
            output_concepts, output_slot_attentions, output_image_embeddings (`bool`): Return these too.
            kwargs: The VLM's inputs, and anything `generate` takes; greedy decoding unless `do_sample=True`.

        Returns:
            [`SegCompassSegmentationOutput`]

        Raises:
            ValueError: A prompt with padding on the right or with a completion, beam search, too few
                `max_new_tokens` for the format, no image for SAM, or weights that yield NaN.
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
            max_new_tokens = self.config.max_reasoning_tokens + self.config.num_slots + 3
        end_ids = self._end_token_ids(kwargs)
        was_training, generator_inputs = self.training, dict(kwargs)
        processors = self._logits_processors(prompt_length, reasoning, constrain_format, max_new_tokens, end_ids)
        generator_inputs["logits_processor"] = [*processors, *(kwargs.get("logits_processor") or [])]
        if end_ids:
            generator_inputs["eos_token_id"] = end_ids
        self.eval()  # in training mode gradient checkpointing would silently drop the cache
        try:
            with self._capture(interventions, attention_mask, self.modality_ids(input_ids)) as capture:
                sequences = self.vlm.generate(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    max_new_tokens=max_new_tokens,
                    **{"do_sample": False, "use_cache": True, **generator_inputs},
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
            self.train(was_training)

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
        if kwargs.get("num_beams", 1) not in (None, 1):
            raise ValueError(
                f"num_beams={kwargs['num_beams']}: beams change places while they are written, so captured states "
                "would belong to other beams; use greedy decoding or sampling."
            )

    def _end_token_ids(self, kwargs: dict) -> list[int]:
        """Ids that end an answer; the first is the one written."""
        config = kwargs.get("generation_config") or self.generation_config
        text_config = self.config.get_text_config()
        ids = kwargs.get("eos_token_id", config.eos_token_id)
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

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """Load a checkpoint; see `PreTrainedModel.from_pretrained`.

        Raises:
            FileNotFoundError: A shard of the checkpoint is missing.
            ValueError: The checkpoint lacks weights: they would be random, and so would the masks.
        """
        _check_shards(pretrained_model_name_or_path, kwargs)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        missing = sorted(info["missing_keys"])
        if missing and kwargs.get("state_dict") is None:
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} weights of this model ({', '.join(missing[:3])}"
                f"{', ...' if len(missing) > 3 else ''}), which would be random; complete the checkpoint, or compose "
                "a new model with from_pretrained_parts."
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, save_original_format: bool = False, **kwargs):
        """Save weights and configuration.

        `save_original_format` is off by default: legacy names would be dropped when Trainer resumes, which loads with
        `strict=False`, and the trained VLM would be lost without an error.
        """
        auto_map = dict(getattr(self.config, "auto_map", None) or {})
        name = f"{__name__.split('.')[-1]}.{type(self).__name__}"
        # TRL picks its loader by the second entry.
        self.config.auto_map = {**auto_map, "AutoModel": name, "AutoModelForImageTextToText": name}
        return super().save_pretrained(save_directory, save_original_format=save_original_format, **kwargs)


def _check_shards(folder: Any, kwargs: dict) -> None:
    """Raise where the index of a local checkpoint names files that are not there."""
    folder = Path(str(folder), kwargs.get("subfolder") or "")
    for index in folder.glob("*.safetensors.index*.json"):
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder} lacks {len(missing)} of the {len(shards)} weight files that {index.name} names: "
                f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; copy or download them again."
            )


_VLM_IMAGE_INPUTS = ("pixel_values", "image_grid_thw", "image_sizes", "pixel_attention_mask", "mm_token_type_ids")


def _non_finite_parameters(module: nn.Module, name: str) -> str:
    """Name the weights that hold NaN or infinities, or say that none does."""
    bad = [key for key, value in module.named_parameters() if not bool(torch.isfinite(value).all())]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        return f"These weights are broken: {', '.join(f'{name}.{key}' for key in bad[:3])}{more}; reload them."
    return "Its weights are finite, so its input was not or its dtype overflows; try dtype=torch.float32 or bfloat16."


def add_tokens(tokenizer: Any, vlm: PreTrainedModel) -> dict[str, int]:
    """Add `<REF_POS>`, `<think>` and `</think>` to a tokenizer and embedding rows for them to the VLM.

    They are no special tokens: TRL decodes with `skip_special_tokens=True`, and rewards must see them.

    Returns:
        `dict[str, int]`: `ref_token_id`, `think_start_token_id` and `think_end_token_id`.
    """
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([token for token in ADDED_TOKENS.values() if token not in known], special_tokens=False)
    if len(tokenizer) > vlm.get_input_embeddings().weight.shape[0]:
        vlm.resize_token_embeddings(len(tokenizer))
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in ADDED_TOKENS.items()}


SegCompassForReasoningSegmentation.register_for_auto_class("AutoModel")

__all__ = [
    "SegCompassForReasoningSegmentation",
    "SegCompassOutput",
    "SegCompassPreTrainedModel",
    "SegCompassSegmentationOutput",
]
