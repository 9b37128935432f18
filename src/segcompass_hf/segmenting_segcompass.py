# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""`segment`: write the reasoning and segment from the states seen while writing, without a second pass."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .finite_segcompass import check_finite, non_finite_parameters
from .generation_segcompass import (
    ADDED_TOKENS,
    GROWING_CACHES,
    SegCompassFormatLogitsProcessor,
    SuppressTokensLogitsProcessor,
    check_growing_cache,
    completion_mask_of,
    generate_and_feed_last,
    reasoning_budget,
)
from .guardrails_segcompass import Concepts, Guardrail, guardrail_firing, guardrails_of
from .image_features_segcompass import ImageFeatures, parts_of
from .interventions_segcompass import Interventions, normalize_interventions
from .modeling_concepts import SparseConcepts
from .reading_segcompass import ReadingMixin, SegCompassOutput, SequenceStates
from .scoring_segcompass import ScoringMixin, TokenSurprisal
from .text_stack_segcompass import HiddenStateCapture
from .threads_segcompass import CallLock, one_call_at_a_time
from .vlm_inputs_segcompass import every_state, forward_arguments
from .voting_segcompass import check_votes, vote


@dataclass
class SegCompassSegmentationOutput(ModelOutput):
    """Output of [`SegCompassForReasoningSegmentation.segment`]. Rows: `batch_size * num_return_sequences`.

    Args:
        sequences (`torch.LongTensor` of shape `(rows, sequence_length)`): Prompt and completion ids.
        attention_mask (`torch.LongTensor` of shape `(rows, sequence_length)`): 1 on tokens up to the row's end.
        completion_mask (`torch.LongTensor` of shape `(rows, sequence_length)`): 1 on tokens the model wrote.
        slot_logit_threshold (`float`): The model's own; slots above it count as present.
        mask_logit_threshold (`float`): The model's own; pixels above it belong to a mask.
        duplicate_iou_threshold (`float`): The model's own; of masks that overlap by it only the best counts.
        slot_scores (`torch.Tensor` of shape `(rows, num_slots)`): In [0, 1]; see [`~ScoringMixin.score_slots`].
        reasoning_surprisal (`torch.Tensor` of shape `(rows,)`): Mean of -log p over the tokens of the reasoning, in
            nats; see [`~TokenSurprisal.of_reasoning`].
        guardrails (`tuple[Guardrail, ...]`, *optional*): What masks may not or have to show; post-processing holds
            them to it.
        guardrail_firing (`torch.BoolTensor` of shape `(rows, num_guardrails, sequence_length)`, *optional*): On which
            tokens the concept of each fires.
        concept_agreement (`torch.Tensor` of shape `(rows,)`, *optional*): With `votes`, see [`Votes`].
        heatmap_logits, slot_logits, pred_masks, slots, reference_states, concepts, slot_attentions, image_embeddings:
            As in [`SegCompassOutput`].
    """

    sequences: torch.LongTensor | None = None
    attention_mask: torch.LongTensor | None = None
    completion_mask: torch.LongTensor | None = None
    slot_logit_threshold: float | None = None
    mask_logit_threshold: float | None = None
    duplicate_iou_threshold: float | None = None
    slot_scores: torch.Tensor | None = None
    reasoning_surprisal: torch.Tensor | None = None
    guardrails: tuple[Guardrail, ...] | None = None
    guardrail_firing: torch.Tensor | None = None
    concept_agreement: torch.Tensor | None = None
    heatmap_logits: torch.Tensor | None = None
    slot_logits: torch.Tensor | None = None
    pred_masks: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    reference_states: torch.Tensor | None = None
    concepts: SparseConcepts | None = None
    slot_attentions: tuple[torch.Tensor, ...] | None = None
    image_embeddings: torch.Tensor | ImageFeatures | None = None


class SegmentingMixin(ScoringMixin, ReadingMixin):
    """Inference of [`SegCompassForReasoningSegmentation`].

    Beside what [`ReadingMixin`] reads it needs a VLM that writes, and of its heir the methods named below.
    """

    vlm: PreTrainedModel
    call_lock: CallLock
    generation_config: GenerationConfig
    vision_token_ids: list[int]  # never written
    image_embeddings_of: Callable[..., torch.Tensor | ImageFeatures | None]
    capture_states: Callable[..., HiddenStateCapture]
    with_concept_states: Callable[..., SequenceStates]
    modules: Callable[[], Iterator[nn.Module]]
    eval: Callable[[], Any]

    guardrails = guardrails_of  # takes the model first

    @one_call_at_a_time
    @torch.no_grad()
    def segment(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        sam_pixel_values: torch.Tensor | None = None,
        image_embeddings: torch.Tensor | ImageFeatures | None = None,
        image_token_grids: torch.Tensor | None = None,
        reshaped_input_sizes: torch.Tensor | None = None,
        original_sizes: torch.Tensor | None = None,
        max_new_tokens: int | None = None,
        reasoning: Literal["full", "short", "none"] = "full",
        constrain_format: bool | None = None,
        interventions: Interventions = None,
        output_concepts: bool = False,
        output_slot_attentions: bool = False,
        output_image_embeddings: bool = False,
        forbid: Concepts = None,
        require: Concepts = None,
        votes: int | None = None,
        decode_above: float | None = None,
        **kwargs: Any,
    ) -> SegCompassSegmentationOutput:
        r"""Write the reasoning and segment, from the states seen while writing: no second pass.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, prompt_length)`): Prompts, padded on the left.
            attention_mask (`torch.Tensor` of shape `(batch_size, prompt_length)`, *optional*): 1 on tokens.
            sam_pixel_values, image_embeddings, image_token_grids, reshaped_input_sizes, original_sizes: As in
                `forward`.
            max_new_tokens (`int`, *optional*): Of the whole answer; a `generation_config`'s, else
                `max_reasoning_tokens` plus the format by default.
            reasoning (`str`, defaults to `"full"`): `"short"` closes the reasoning after `short_reasoning_tokens`,
                `"none"` at once.
            constrain_format (`bool`, *optional*): Guarantee tags, exactly K `<REF_POS>` and the end; left out, where
                the think tags are tokens. `False` lets the model write freely (reinforcement learning, format rates).
            interventions (*optional*): See [`ConceptIntervention`]; on concepts they change masks, on the residual
                stream the reasoning too.
            output_concepts, output_slot_attentions, output_image_embeddings (`bool`): Return these too.
            forbid, require (`str`, [`NamedConcept`] or several, *optional*): Concepts that no mask may show, and that
                every mask has to, by the names of the concept dictionary beside the checkpoint; post-processing leaves
                out masks that break a rule and says why. See [`judge_masks`].
            votes (`int`, *optional*): Sample so many answers in one pass and return what they agree on, see [`vote`].
            decode_above (`float`, *optional*): Spend the mask decoder on slots with a logit above it alone, where no
                lower `slot_logit_threshold` will be asked for; masks of the others are empty.
            kwargs: The VLM's inputs, and anything `generate` takes; greedy decoding unless `do_sample=True`, there
                or in a `generation_config`, which is filled from the model's own as `generate` does.

        Returns:
            [`SegCompassSegmentationOutput`]

        Raises:
            ValueError: A prompt with padding on the right or with a completion, beam search, drafts or a static cache,
                too few `max_new_tokens` for the format, no image for SAM, weights that yield NaN, or a concept whose
                name is not known.

        Threads may share the model: their calls are answered one after another.
        """
        batch_size, prompt_length = input_ids.shape
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self._check_segment_inputs(attention_mask, kwargs)
        interventions = normalize_interventions(interventions, self.config.sae_config.d_sae)
        rules = self.guardrails(forbid, require)
        if votes is not None:
            kwargs = {**kwargs, **check_votes(votes, kwargs)}
        image_embeddings = self.image_embeddings_of(sam_pixel_values, image_embeddings, batch_size)
        if image_embeddings is None:
            raise ValueError("segmenting needs an image for SAM: pass sam_pixel_values or image_embeddings.")
        check_finite(self, "sam.vision_encoder", *parts_of(image_embeddings))
        end_ids = self._end_token_ids(kwargs)
        budget = self._max_new_tokens(max_new_tokens, kwargs)
        processors = self._logits_processors(prompt_length, reasoning, constrain_format, budget, end_ids)
        surprisal = TokenSurprisal()
        arguments = self._generate_arguments(kwargs, [surprisal, *processors], end_ids)
        training = [module for module in self.modules() if module.training]
        self.eval()  # in training mode gradient checkpointing would silently drop the cache
        try:
            with self.capture_states(input_ids, attention_mask, interventions) as capture:
                sequences = generate_and_feed_last(
                    self.vlm, input_ids=input_ids, attention_mask=attention_mask, max_new_tokens=budget, **arguments
                )
            sequences = getattr(sequences, "sequences", sequences)
            copies = sequences.shape[0] // batch_size
            prompt_mask = attention_mask.repeat_interleave(copies, 0)
            written = completion_mask_of(sequences[:, prompt_length:], end_ids)
            grids, sizes = (
                value if value is None else value.repeat_interleave(copies, 0)
                for value in (image_token_grids, reshaped_input_sizes)
            )
            layer_and_last = capture.states(sequences.shape[1])
            states = SequenceStates.of_answers(layer_and_last, sequences, prompt_mask, written, grids)
            if copies > 1 and self.config.concept_input == "duplicated":
                raise ValueError(
                    f'concept_input="duplicated" reads one sequence per prompt, got num_return_sequences={copies}.'
                )
            reasoning_surprisal = surprisal.of_reasoning(
                sequences, written.bool() & ~self._is_format(sequences[:, prompt_length:], end_ids)
            )
            vlm_inputs = {name: kwargs[name] for name in forward_arguments(self.vlm) & set(kwargs)}
            states = self.with_concept_states(states, interventions, **vlm_inputs)
            output = self.read_finite_masks(
                states,
                image_embeddings.repeat_interleave(copies, 0),
                sizes,
                interventions=interventions,
                output_concepts=output_concepts or votes is not None,
                output_slot_attentions=output_slot_attentions,
                decode_above=decode_above,
            )
            # What an intervention takes away is still there to be seen by a guardrail.
            firing = guardrail_firing(self.read_concepts(states), rules) if rules else None
        finally:
            for module in training:
                module.training = True
        fields = {"guardrails": rules or None, "guardrail_firing": firing}
        if output_image_embeddings:
            fields["image_embeddings"] = image_embeddings.repeat_interleave(copies, 0)
        answer = self.answers_of(states, output, reasoning_surprisal, sizes, **fields)
        if votes is None:
            return answer
        area = None if sizes is None else self.mask_stage.valid_area(sizes.to(output["pred_masks"].device))
        answer = vote(answer, votes, self.config.sae_config.d_sae, area)
        answer.concepts = answer.concepts if output_concepts else None
        return answer

    def answers_of(
        self,
        states: SequenceStates,
        output: SegCompassOutput,
        reasoning_surprisal: torch.Tensor,
        sizes: Any,
        **fields: Any,
    ) -> SegCompassSegmentationOutput:
        """What `segment` returns, of sequences that are written and of what was read of them (`output`).

        `sizes` are `reshaped_input_sizes`; `fields` are further ones of the answer.
        """
        scored = output.slot_logits, output.pred_masks, reasoning_surprisal, sizes
        shared = set(SegCompassSegmentationOutput.__dataclass_fields__) & set(output)
        return SegCompassSegmentationOutput(
            sequences=states.input_ids,
            attention_mask=states.attention_mask,
            completion_mask=states.completion_mask,
            slot_logit_threshold=float(self.config.slot_logit_threshold),
            mask_logit_threshold=float(self.config.mask_logit_threshold),
            duplicate_iou_threshold=float(self.config.duplicate_iou_threshold),
            slot_scores=self.score_slots(*scored),
            reasoning_surprisal=reasoning_surprisal,
            **{name: output[name] for name in shared} | fields,
        )

    def read_finite_masks(self, states: SequenceStates, *args: Any, **kwargs: Any) -> SegCompassOutput:
        """`read_masks`, with an error where a stage's output is not a number, for masks that someone will look at.

        Args:
            states ([`SequenceStates`]): See `read_masks`, and there for the other arguments.

        Raises:
            ValueError: NaN or infinities; the message names the stage, and the weights that hold them.
        """
        layer_states, last_states = states.layer_states, states.last_states
        written = [] if last_states is None else [last_states[states.attention_mask.bool()]]
        check_finite(self, "vlm", layer_states[cast(torch.Tensor, states.concept_mask).bool()], *written)
        output = self.read_masks(states, *args, **kwargs)
        check_finite(self, "slot_encoder", output.slots)
        check_finite(self, "slot_mapper", output.heatmap_logits, output.slot_logits)
        check_finite(self, "sam.mask_decoder", output.pred_masks)
        return output

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
        for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"):
            if self._generation_setting(kwargs, name) is not None:
                raise ValueError(
                    f"{name} drafts tokens that may be rejected, so captured states would belong to other tokens; "
                    "leave it out."
                )
        if kwargs.get("use_cache") is False:
            raise ValueError(
                "use_cache=False passes the whole sequence again for every token, so captured states would belong to "
                "many passes; leave it out."
            )
        cache = kwargs.get("cache_implementation")
        check_growing_cache(cache or getattr(kwargs.get("generation_config"), "cache_implementation", None))

    def _is_format(self, completion: torch.Tensor, end_ids: list[int]) -> torch.Tensor:
        """True on the tokens of the format, which are no reasoning; `(rows, completion_length)`."""
        ids = [getattr(self.config, name) for name in ADDED_TOKENS]
        ids = [token for token in (*ids, *end_ids) if token is not None]
        return torch.isin(completion, torch.tensor(ids, device=completion.device))

    def _max_new_tokens(self, max_new_tokens: int | None, kwargs: dict) -> int:
        given = (max_new_tokens, getattr(kwargs.get("generation_config"), "max_new_tokens", None))
        default = self.config.max_reasoning_tokens + self.config.num_slots + 3
        return next((number for number in given if number is not None), default)

    def _generate_arguments(self, kwargs: dict, processors: list, end_ids: list[int]) -> dict:
        """What `generate` gets beside the prompt: the caller's arguments, greedy decoding, a cache that can grow."""
        cache = self._generation_setting(kwargs, "cache_implementation")
        cache = {} if cache in (None, *GROWING_CACHES) else {"cache_implementation": "dynamic"}  # the model's own
        sampling = bool(getattr(kwargs.get("generation_config"), "do_sample", False))  # the caller's, not the model's
        processors = [*processors, *(kwargs.get("logits_processor") or [])]
        ends = {"eos_token_id": end_ids} if end_ids else {}
        keep = {"logits_to_keep": every_state(self.vlm, 1)} if "logits_to_keep" in forward_arguments(self.vlm) else {}
        own = {"do_sample": sampling, "use_cache": True, **keep, **cache}
        return {**own, **kwargs, "logits_processor": processors, **ends}

    def _generation_setting(self, kwargs: dict, name: str) -> Any:
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
        self,
        prompt_length: int,
        reasoning: Literal["full", "short", "none"],
        constrain_format: bool | None,
        max_new_tokens: int,
        end_ids: list[int],
    ) -> list:
        """Processors that forbid vision tokens and, if asked, guarantee the format."""
        config = self.config
        if constrain_format is None:  # a converted checkpoint of the original spells its think tags
            constrain_format = config.ref_token_id is None or config.think_start_token_id is not None
        suppress = SuppressTokensLogitsProcessor(
            self.vision_token_ids, partial(non_finite_parameters, self.vlm, "vlm")
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
        reasoning_tokens = reasoning_budget(
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
            max_reasoning_tokens=reasoning_tokens,
            forbidden_token_ids=[*self.vision_token_ids, *end_ids, *([] if pad is None else [pad])],
        )
        return [suppress, form]
