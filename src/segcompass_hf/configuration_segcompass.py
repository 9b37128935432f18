# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Configuration of SegCompass: a VLM, a sparse autoencoder on its hidden states, slots, and a segmenter."""

import copy
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PretrainedConfig

from .configuration_mobile_sam import MobileSamConfig
from .segmenters_segcompass import segmenter_config, segmenter_kind

# Table 1 of the paper's supplement: index into `hidden_states` (0 = embeddings) per VLM family.
PAPER_SAE_LAYERS = {"llava": 16, "qwen2_5_vl": 13}
SCORE_FEATURES = ("slot_logit", "reasoning_surprisal", "mask_certainty")  # what a calibrated score may be made of


@strict
class SegCompassSaeConfig(PretrainedConfig):
    r"""Configuration of a sparse autoencoder over the VLM's hidden states.

    Args:
        d_in (`int`, defaults to 4096): Width of the hidden states it reads.
        d_sae (`int`, defaults to 65536): Number of features.
        architecture (`str`, defaults to `"standard"`): One of `standard`, `gated`, `jumprelu`, `topk`, `batchtopk`.
        activation (`str`, defaults to `"relu"`): `relu`, `tanh-relu` or `topk`; read by `standard` only.
        k (`int`, *optional*): Active features per token; needed where a top-k is taken.
        normalize_activations (`str`, defaults to `"none"`): What is done to a hidden state before encoding: `none`,
            `layer_norm`, `constant_norm_rescale`, `per_token` (norm set to `sqrt(d_in)`) or `per_modality` (mean and
            scale per modality, from buffers).
        apply_b_dec_to_input (`bool`, defaults to `False`): Subtract `b_dec` before encoding.
        finetuning_scaling_factor (`bool`, defaults to `False`): Whether the weights hold a per-feature output scale.
        layer (`int`, *optional*): Index into the VLM's `hidden_states` that the SAE was trained on.
        l1_coefficient (`float`, defaults to 5.0): Weight of the sparsity term in the SAE's own training loss.
        initializer_range (`float`, defaults to 0.02): Standard deviation of freshly initialised weights.
    """

    model_type = "segcompass_sae"
    base_config_key = "sae_config"

    d_in: int = 4096
    d_sae: int = 65536
    architecture: Literal["standard", "gated", "jumprelu", "topk", "batchtopk"] = "standard"
    activation: Literal["relu", "tanh-relu", "topk"] = "relu"
    k: int | None = None  # active features per token
    normalize_activations: Literal["none", "layer_norm", "constant_norm_rescale", "per_token", "per_modality"] = "none"
    apply_b_dec_to_input: bool = False
    finetuning_scaling_factor: bool = False
    layer: int | None = None  # index into hidden_states, 0 = embeddings
    l1_coefficient: float | int = 5.0
    initializer_range: float | int = 0.02

    def validate_sae(self) -> None:
        if self.d_in < 1 or self.d_sae < 1:
            raise ValueError(f"d_in and d_sae must be positive, got d_in={self.d_in} and d_sae={self.d_sae}.")
        takes_top_k = self.architecture in ("topk", "batchtopk") or (
            self.architecture == "standard" and self.activation == "topk"
        )
        if takes_top_k and (self.k is None or not 1 <= self.k <= self.d_sae):
            raise ValueError(
                f"architecture={self.architecture!r} with activation={self.activation!r} keeps k features per token "
                f"and needs 1 <= k <= d_sae={self.d_sae}, got k={self.k}; set k."
            )


@strict
class SegCompassConfig(PretrainedConfig):
    r"""Configuration of [`SegCompassForReasoningSegmentation`].

    The nested configurations may be given as configuration objects, as dicts (with a `model_type`), or left out.

    Args:
        vlm_config (`PretrainedConfig` or `dict`, *optional*): Any `AutoModelForImageTextToText` configuration
            of a decoder-only VLM; LLaVA-1.5 when left out.
        sam_config (`PretrainedConfig` or `dict`, *optional*): Of any segmenter that takes mask prompts, see
            [`SEGMENTERS`] (a video model's becomes that of its image part); SAM ViT-H when left out.
        sae_config (`PretrainedConfig` or `dict`, *optional*): A [`SegCompassSaeConfig`]; its `d_in` defaults to the
            VLM's hidden size.
        num_slots (`int`, defaults to 4): Slots K, and `<REF_POS>` tokens per answer.
        sae_layer (`int`, *optional*): Index into `hidden_states` (0 = embeddings) that the SAE reads; decoder layers
            below it are frozen. Left out: the SAE's own `layer`, else 16 for LLaVA-1.5, 13 for Qwen2.5-VL, else half
            the depth.
        concept_threshold (`float`, defaults to 2.0): Feature activations below it in magnitude count as zero.
        concept_input (`str`, defaults to `"once"`): `"duplicated"` feeds the SAE prompt + completion + completion with
            padding counted, as the original code does (a second pass; for its checkpoints only).
        concept_chunk_size (`int`, defaults to 4096): Tokens encoded at a time; lowered where `d_sae` is large.
        d_slot (`int`, defaults to 512): Width of the codebook's embeddings and of the slots.
        slot_encoder_layers (`int`, defaults to 2): Transformer layers that mix slots and concepts.
        slot_encoder_heads (`int`, defaults to 8): Their heads of attention.
        slot_encoder_ff_mult (`int`, defaults to 4): Their feed-forward width, in multiples of `d_slot`.
        slot_encoder_dropout (`float`, defaults to 0.0): Their dropout while training.
        slot_init_std (`float`, defaults to 0.5): Standard deviation of fresh slot queries.
        heatmap_heads (`int`, defaults to 4): Score maps per slot, fused to one heatmap.
        heatmap_fuser (`str`, defaults to `"refine"`): How: by two 3x3 convolutions, or, `"plain"`, one of 1x1.
        heatmap_bias_init (`float`, defaults to -1.8): Their last bias when fresh (logit).
        reference_search (`str`, defaults to `"completion"`): Where the last K `<REF_POS>` are looked for; `"sequence"`
            includes the prompt, as the original code does.
        reference_order (`str`, defaults to `"earliest_first"`): Which of them slot 0 gets.
        slot_logit_threshold (`float`, defaults to 0.0): A slot counts as present above it (logit).
        mask_logit_threshold (`float`, defaults to 0.0): A pixel counts as inside above it (logit).
        duplicate_iou_threshold (`float`, defaults to 0.5): A mask whose IoU with a better one of the same answer
            reaches it is the same object again and left out; above 1 none is.
        score_calibration (`dict`, *optional*): How the score of a kept slot follows from `features`, each with the
            `mean`, `scale` and `weight` of a logistic regression, and its `bias`; `segcompass calibrate` writes it.
            Without it scores are the plain confidences.
        ref_token_id, think_start_token_id, think_end_token_id (`int`, *optional*): Ids of `<REF_POS>`, `<think>` and
            `</think>`; composing takes them from the tokenizer.
        image_token_id (`int`, *optional*): Id that stands for image patches in `input_ids`: never written, and read as
            image. Composing takes what the processor was seen to write; left out, the VLM's configuration is asked.
        heatmap_concepts (`bool`, defaults to `False`): Let the slot mapper see more of an image than the segmenter's
            embedding, which hardly knows categories: the concepts of the VLM's image tokens, added to it where these
            lie in the image, by a projection that begins at zero. Needs a VLM whose image tokens lie on one grid, and
            `image_token_grids` of the processor.
        short_reasoning_tokens (`int`, defaults to 32): Most tokens of the reasoning with `reasoning="short"`.
        max_reasoning_tokens (`int`, defaults to 512): The same with `reasoning="full"`.
        train_token_rows (`str`, defaults to `"head"`): Which rows of the added tokens train: those of the output
            embedding, none, or both input and output rows.
        seg_loss_weight, conf_loss_weight, lm_loss_weight (`float`): Weights in the loss of the segmentation losses
            (lambda_s), of the confidences (lambda_c) and of the language loss.
        heatmap_bce_weight, heatmap_dice_weight, mask_dice_weight, mask_focal_weight (`float`): Weights within the
            segmentation losses.
        match_confidence_weight (`float`, defaults to 0.3): How much matching slots to objects prefers confident ones.
        valid_area_only (`bool`, defaults to `True`): Whether matching leaves the padding of the canvas out.
        empty_samples (`str`, defaults to `"exclude"`): Whether samples without objects are left out of the
            segmentation mean or add a zero to it.
        tie_word_embeddings (`bool`, defaults to `False`): Unused here: the VLM's own configuration says it.
        initializer_range (`float`, defaults to 0.02): Standard deviation of fresh weights.

    Example:

    ```python
    >>> config = SegCompassConfig(vlm_config={"model_type": "llava"}, num_slots=4)
    >>> config.get_text_config().model_type, config.sae_layer
    ('llama', 16)
    ```
    """

    model_type = "segcompass"
    # What Trainer must not gather in evaluation: no tensors, or the whole vocabulary's scores.
    keys_to_ignore_at_inference = ["logits", "concepts", "losses", "slot_attentions", "cache"]
    sub_configs = {"vlm_config": AutoConfig, "sam_config": AutoConfig, "sae_config": SegCompassSaeConfig}

    vlm_config: dict | PretrainedConfig | None = None
    sam_config: dict | PretrainedConfig | None = None
    sae_config: dict | PretrainedConfig | None = None

    num_slots: int = 4
    sae_layer: int | None = None  # index into hidden_states, 0 = embeddings

    concept_threshold: float | int = 2.0  # |feature activation|, after input normalisation
    concept_input: Literal["once", "duplicated"] = "once"
    concept_chunk_size: int = 4096  # tokens

    d_slot: int = 512
    slot_encoder_layers: int = 2
    slot_encoder_heads: int = 8
    slot_encoder_ff_mult: int = 4
    slot_encoder_dropout: float | int = 0.0
    slot_init_std: float | int = 0.5

    heatmap_heads: int = 4
    heatmap_fuser: Literal["refine", "plain"] = "refine"
    heatmap_bias_init: float | int = -1.8  # logit
    heatmap_concepts: bool = False

    slot_logit_threshold: float | int = 0.0  # logit
    mask_logit_threshold: float | int = 0.0  # logit
    duplicate_iou_threshold: float | int = 0.5  # IoU
    score_calibration: dict | None = None

    reference_search: Literal["completion", "sequence"] = "completion"
    reference_order: Literal["earliest_first", "latest_first"] = "earliest_first"

    ref_token_id: int | None = None
    think_start_token_id: int | None = None
    think_end_token_id: int | None = None
    image_token_id: int | None = None
    short_reasoning_tokens: int = 32
    max_reasoning_tokens: int = 512
    train_token_rows: Literal["head", "none", "both"] = "head"

    seg_loss_weight: float | int = 1.0  # lambda_s
    conf_loss_weight: float | int = 0.2  # lambda_c
    lm_loss_weight: float | int = 1.0
    heatmap_bce_weight: float | int = 1.0
    heatmap_dice_weight: float | int = 0.6
    mask_dice_weight: float | int = 0.6
    mask_focal_weight: float | int = 0.0
    match_confidence_weight: float | int = 0.3
    valid_area_only: bool = True
    empty_samples: Literal["exclude", "zero"] = "exclude"

    tie_word_embeddings: bool = False  # the inner VLM ties (or not) by its own configuration
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        vlm_config = _resolve_config(self.vlm_config, "llava")
        sam_config = segmenter_config(_resolve_config(self.sam_config, "sam"))
        if self.image_token_id is None:
            self.image_token_id = getattr(vlm_config, "image_token_id", None)
        given = {} if self.sae_config is None else self.sae_config
        if isinstance(given, dict):
            given = {"d_in": vlm_config.get_text_config().hidden_size, **given}
        sae_config = _resolve_config(given, SegCompassSaeConfig)
        if self.sae_layer is None:
            self.sae_layer = sae_config.layer
        if self.sae_layer is None:
            self.sae_layer = default_sae_layer(vlm_config)
        self.vlm_config, self.sam_config, self.sae_config = nested = (vlm_config, sam_config, sae_config)
        attention = [config._attn_implementation for config in nested]
        super().__post_init__(**kwargs)  # overwrites the nested attention implementations with ours
        if kwargs.get("attn_implementation") is None:
            for config, implementation in zip(nested, attention, strict=True):
                config._attn_implementation = implementation

    def get_text_config(self, decoder: Any = None, encoder: Any = None) -> PretrainedConfig:
        """The VLM's text configuration (generation and TRL read sizes from it)."""
        vlm_config: Any = self.vlm_config  # a dict no longer
        return vlm_config.get_text_config(decoder=decoder, encoder=encoder)

    @property
    def video_token_id(self) -> int | None:
        """Id of the VLM's video placeholder, where it has one."""
        return getattr(self.vlm_config, "video_token_id", None)

    @property
    def vocab_size(self) -> int:
        return self.get_text_config().vocab_size

    @property
    def hidden_size(self) -> int:
        return self.get_text_config().hidden_size

    def validate_segcompass(self) -> None:
        segmenter_kind(self.sam_config)
        text_config = self.get_text_config()
        depth, width = text_config.num_hidden_layers, text_config.hidden_size
        if self.num_slots < 1:
            raise ValueError(f"num_slots must be at least 1, got {self.num_slots}.")
        if self.sae_layer is None or not 0 <= self.sae_layer < depth:
            raise ValueError(
                f"sae_layer is an index into hidden_states before the last layer: 0 (embeddings) to {depth - 1} for a "
                f"VLM of {depth} layers, got {self.sae_layer}."
            )
        sae_config: Any = self.sae_config
        if sae_config.d_in != width:
            raise ValueError(
                f"the SAE reads states of width {sae_config.d_in} (d_in), the VLM's are {width} wide; "
                "use an SAE trained on this VLM."
            )
        if self.d_slot % self.slot_encoder_heads:
            raise ValueError(
                f"d_slot={self.d_slot} must be a multiple of slot_encoder_heads={self.slot_encoder_heads}."
            )
        if self.heatmap_concepts and self.image_token_id is None:
            raise ValueError(
                "heatmap_concepts places the concepts of image tokens in the image, but image_token_id is None: no id "
                "stands for image patches; set it to that of the processor, or heatmap_concepts to False."
            )
        if self.concept_threshold < 0:
            raise ValueError(f"concept_threshold is a magnitude and cannot be negative, got {self.concept_threshold}.")
        if not self.duplicate_iou_threshold > 0:
            raise ValueError(
                f"duplicate_iou_threshold is an IoU above 0 (above 1: no mask is left out as a duplicate), got "
                f"{self.duplicate_iou_threshold}."
            )
        if self.score_calibration is not None:
            _check_calibration(self.score_calibration)


def _check_calibration(calibration: dict[str, Any]) -> None:
    """Refuse a calibration that scores cannot be computed from."""
    features = calibration.get("features")
    entries: list[Any] = list(features.values()) if isinstance(features, dict) else [None]
    is_whole = all(isinstance(entry, dict) and {"mean", "scale", "weight"} <= entry.keys() for entry in entries)
    numbers = [calibration.get("bias"), *(entry[name] for entry in entries if is_whole for name in entry)]
    is_number = all(type(number) in (int, float) and abs(number) < 1e38 for number in numbers)
    if not is_whole or not is_number or not set(features or ()) <= set(SCORE_FEATURES):
        raise ValueError(
            f"score_calibration is {calibration!r:.200}; expected finite numbers {{'features': {{NAME: {{'mean', "
            f"'scale', 'weight'}}}}, 'bias'}} with NAME of {', '.join(SCORE_FEATURES)}. Fit it again with `segcompass "
            "calibrate`, or set it to null for plain confidences."
        )
    if not all(entry["scale"] > 0 for entry in entries):
        raise ValueError("score_calibration holds a scale that is not positive; fit it again.")


def own_settings(config: PretrainedConfig | None) -> dict[str, Any]:
    """What a SegCompass configuration says apart from its parts, what follows from them (numbers of slots and layer,
    token ids), and the calibration of its scores, which was fitted to heads that do not come along."""
    apart = {*SegCompassConfig.sub_configs, "num_slots", "sae_layer", "score_calibration"}
    names = [name for name in SegCompassConfig.__annotations__ if name not in apart and not name.endswith("_token_id")]
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def _resolve_config(config: dict | PretrainedConfig | None, default: str | type) -> PretrainedConfig:
    """Turn a nested configuration given as dict, object or nothing into an object.

    By hand and not by `SubConfigSpec`, which transformers 5.17 does not have.
    """
    if isinstance(config, PretrainedConfig):
        return copy.deepcopy(config)  # a loaded model may still be using it
    config = dict(config or {})
    if not isinstance(default, str):
        return default(**config)
    model_type = config.pop("model_type", default)
    if model_type == MobileSamConfig.model_type:  # unknown to transformers where this is remote code
        return MobileSamConfig(**config)
    return AutoConfig.for_model(model_type, **config)


def default_sae_layer(vlm_config: PretrainedConfig) -> int:
    """Where the SAE reads when nobody says: the paper's layer for its two families, else half the depth."""
    depth = vlm_config.get_text_config().num_hidden_layers
    paper_layer = PAPER_SAE_LAYERS.get(vlm_config.model_type)
    return paper_layer if paper_layer is not None and paper_layer < depth else depth // 2


SegCompassSaeConfig.register_for_auto_class()
SegCompassConfig.register_for_auto_class()

__all__ = ["SegCompassConfig", "SegCompassSaeConfig"]
