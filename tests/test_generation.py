# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Generation: the format is guaranteed, states are captured without a second pass, broken weights are named."""

import copy

import pytest
import tiny
import torch
from breadth.families import FAMILIES
from breadth.trial import Trial, vlm_inputs
from model_inputs import inputs_of
from transformers import GenerationConfig

from segcompass_hf import generation_segcompass
from segcompass_hf.generation_segcompass import (
    SegCompassFormatLogitsProcessor,
    SuppressTokensLogitsProcessor,
    completion_mask_of,
    generate_and_feed_last,
    positions_without_padding,
    reasoning_budget,
)
from segcompass_hf.text_stack_segcompass import HiddenStateCapture, decoder_layers
from segcompass_hf.token_rows_segcompass import add_tokens
from segcompass_hf.vlm_inputs_segcompass import sequence_inputs

INSTRUCTIONS = ["the largest red circle", "all the blue squares but not the small ring"]
REF, START, END, EOS, PAD, VOCAB = 11, 12, 13, 14, 15, 20


def form(max_reasoning_tokens: int = 5, num_slots: int = 2, prompt_length: int = 3) -> SegCompassFormatLogitsProcessor:
    return SegCompassFormatLogitsProcessor(
        prompt_length, num_slots, REF, START, END, EOS, max_reasoning_tokens, forbidden_token_ids=[PAD]
    )


def allowed(processor, *completions: list[int]) -> list[set[int]]:
    """Ids with a finite score after each completion (all of one length, behind a prompt of three tokens)."""
    # The prompt names the format's own tokens: only the completion may count.
    ids = torch.tensor([[REF, END, START, *completion] for completion in completions])
    scores = processor(ids, torch.randn(len(completions), VOCAB))
    return [set(row.isfinite().nonzero().flatten().tolist()) for row in scores]


class TestFormat:
    FREE = set(range(VOCAB)) - {REF, START, EOS, PAD}

    def test_step_by_step(self):
        processor = form()
        assert allowed(processor, []) == [{START}]
        assert allowed(processor, [START]) == [self.FREE - {END}]  # at least one token of reasoning
        assert allowed(processor, [START, 5]) == [self.FREE]
        assert allowed(processor, [START, 5, END]) == [{REF}]
        assert allowed(processor, [START, 5, END, REF]) == [{REF}]
        assert allowed(processor, [START, 5, END, REF, REF]) == [{EOS}]

    def test_reasoning_is_closed_at_its_limit(self):
        processor = form(max_reasoning_tokens=3)
        assert allowed(processor, [START, 5, 6]) == [self.FREE]
        assert allowed(processor, [START, 5, 6, 7]) == [{END}]

    def test_no_reasoning(self):
        assert allowed(form(max_reasoning_tokens=0), [START]) == [{END}]

    def test_rows_stand_at_different_places(self):
        rows = allowed(form(), [START, 5, 6, 7], [START, 5, END, REF], [START, 5, 6, END])
        assert rows == [self.FREE, {REF}, {REF}]

    def test_the_rest_is_known_once_no_row_may_choose(self):
        def rest(processor, *completions, ended=None):
            ids = torch.tensor([[REF, END, START, *completion] for completion in completions])
            ended = torch.tensor(ended or [False] * len(completions))
            found = processor.rest(ids, ended, PAD)
            return None if found is None else found.tolist()

        assert rest(form(), [START, 5, 6, 7], [START, 5, END, REF]) is None  # the first may go on reasoning
        assert rest(form(), [START, 5, 6, END], [START, 5, END, REF]) == [[REF, REF, EOS], [REF, EOS, PAD]]
        ended = [START, 6, END, REF, REF, EOS]
        closed = [START, 5, 6, 7, END, REF]
        assert rest(form(), ended, closed, ended=[True, False]) == [[PAD, PAD], [REF, EOS]]
        # At the limit of 3 tokens one row closes its reasoning, which the other has done.
        at_limit = form(max_reasoning_tokens=3)
        assert rest(at_limit, [START, 5, 6, 7], [START, 5, 6, END]) == [[END, REF, REF, EOS], [REF, REF, EOS, PAD]]
        assert rest(form(max_reasoning_tokens=0), [START]) == [[END, REF, REF, EOS]]

    def test_free_scores_are_not_changed(self):
        scores = torch.randn(1, VOCAB)
        kept = form()(torch.tensor([[1, 1, 1, START, 5]]), scores)
        free = sorted(self.FREE)
        assert torch.equal(kept[:, free], scores[:, free])

    def test_vocabulary_too_small(self):
        with pytest.raises(ValueError, match="go up to id 15, the VLM scores 12 tokens"):
            form()(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 12))

    @pytest.mark.parametrize(
        "reasoning, max_new_tokens, expected",
        [
            ("full", 600, 512),  # the model's own limit
            ("full", 20, 13),  # 20 less two tags, 4 <REF_POS>, the end
            ("short", 600, 32),
            ("short", 12, 5),
            ("none", 7, 0),
        ],
    )
    def test_budget(self, reasoning, max_new_tokens, expected):
        assert reasoning_budget(reasoning, 4, max_new_tokens, 512, 32) == expected

    @pytest.mark.parametrize("reasoning, least", [("none", 7), ("short", 8), ("full", 8)])
    def test_too_few_tokens_for_the_format(self, reasoning, least):
        with pytest.raises(ValueError, match=f"takes at least {least}"):
            reasoning_budget(reasoning, 4, least - 1, 512, 32)

    def test_unknown_reasoning(self):
        with pytest.raises(ValueError, match='must be "full", "short" or "none", got \'long\''):
            reasoning_budget("long", 4, 100, 512, 32)


def test_completion_mask():
    completion = torch.tensor([[5, 9, 0, 0], [5, 6, 7, 8], [9, 0, 9, 0]])
    assert completion_mask_of(completion, [9]).tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert completion_mask_of(completion, []).tolist() == [[1] * 4] * 3


def test_suppressed_tokens_and_nan():
    processor = SuppressTokensLogitsProcessor([1, 3, 99], lambda: "weights of layer 7")
    scores = processor(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 5))
    assert scores.isfinite().tolist() == [[True, False, True, False, True]]
    broken = SuppressTokensLogitsProcessor([1], lambda: "weights of layer 7")
    with pytest.raises(ValueError, match="NaN .module `vlm`.*weights of layer 7"):
        broken(torch.zeros(1, 1, dtype=torch.long), torch.full((1, 5), float("nan")))


def prompts(family: str = "llava", instructions=INSTRUCTIONS, **kwargs):
    images = [tiny.tiny_image(seed, size) for seed, size in enumerate([(40, 30), (50, 44)])]
    processor = tiny.tiny_processor(family)
    return processor, processor(images=images, instruction=list(instructions), return_tensors="pt", **kwargs)


def assert_well_formed(model, sequences, completion_mask, most: int):
    config, end = model.config, model.generation_config.eos_token_id
    for ids, mask in zip(sequences, completion_mask, strict=True):
        answer = ids[mask.bool()].tolist()
        closing = answer.index(config.think_end_token_id)
        assert answer[0] == config.think_start_token_id
        assert answer[closing + 1 :] == [config.ref_token_id] * config.num_slots + [end]
        assert 0 <= closing - 1 <= most
        tags = {config.think_start_token_id, config.ref_token_id, config.image_token_id, end}
        assert not tags & set(answer[1:closing])
        after = ids[int(mask.argmax()) + len(answer) :]
        assert (after == model.generation_config.pad_token_id).all()


class TestSegmentFormat:
    @pytest.mark.parametrize("reasoning, most", [("full", 13), ("short", 3), ("none", 0)])
    def test_answers_are_well_formed(self, reasoning, most):
        model = tiny.tiny_model(short_reasoning_tokens=3)
        _, inputs = prompts()
        output = model.segment(**inputs, max_new_tokens=20, reasoning=reasoning)
        assert_well_formed(model, output.sequences, output.completion_mask, most)
        lengths = output.completion_mask.sum(1) - 7
        assert (lengths >= (reasoning != "none")).all() and (lengths <= most).all()

    def test_sampling_is_well_formed_too(self):
        model = tiny.tiny_model()
        _, inputs = prompts()
        output = model.segment(
            **inputs, max_new_tokens=16, do_sample=True, top_k=0, temperature=3.0, num_return_sequences=3
        )
        assert output.sequences.shape[0] == output.pred_masks.shape[0] == output.slots.shape[0] == 6
        assert_well_formed(model, output.sequences, output.completion_mask, 9)
        assert len({tuple(row.tolist()) for row in output.sequences}) > 2
        # Rows of one prompt stand together, with that prompt's image.
        prompt = inputs["input_ids"].shape[1]
        assert torch.equal(output.sequences[:, :prompt], inputs["input_ids"].repeat_interleave(3, 0))
        assert not torch.equal(output.heatmap_logits[0], output.heatmap_logits[3])

    def test_greedy_by_default(self):
        model = tiny.tiny_model()
        _, inputs = prompts()
        first, second = (model.segment(**inputs, max_new_tokens=16) for _ in range(2))
        assert torch.equal(first.sequences, second.sequences)
        assert torch.equal(first.pred_masks, second.pred_masks)

    def test_the_format_can_be_switched_off(self):
        model = tiny.tiny_model()
        _, inputs = prompts()
        output = model.segment(**inputs, max_new_tokens=12, constrain_format=False)
        text = {k: inputs[k] for k in ("input_ids", "attention_mask", "pixel_values")}
        plain = model.generate(**text, max_new_tokens=12, do_sample=False)
        assert torch.equal(output.sequences, plain)
        everything = model.generate(**inputs, max_new_tokens=12, do_sample=False)  # SAM's inputs do no harm
        assert torch.equal(everything, plain)
        assert not (output.sequences[:, inputs["input_ids"].shape[1] :] == model.config.image_token_id).any()
        with pytest.raises(ValueError, match="constrain_format=False switches off"):
            model.segment(**inputs, max_new_tokens=12, constrain_format=False, reasoning="none")

    def test_image_tokens_are_never_written(self):
        model = tiny.tiny_model()
        _, inputs = prompts()
        image = model.config.image_token_id
        head = model.get_output_embeddings()
        head.register_forward_hook(lambda module, args, scores: scores.index_fill(-1, torch.tensor([image]), 1e4))
        output = model.segment(**inputs, max_new_tokens=12, constrain_format=False)
        text = {k: inputs[k] for k in ("input_ids", "attention_mask", "pixel_values")}
        for sequences in (output.sequences, model.generate(**text, max_new_tokens=6, do_sample=False)):
            assert not (sequences[:, inputs["input_ids"].shape[1] :] == image).any()

    def test_free_answers_without_references_have_zero_reference_states(self):
        model = tiny.tiny_model()
        _, inputs = prompts()
        free = {"constrain_format": False, "suppress_tokens": [model.config.ref_token_id]}
        output = model.segment(**inputs, max_new_tokens=4, **free)
        assert (output.reference_states == 0).all()
        assert output.pred_masks.isfinite().all()


class PassCounter:
    """Counts calls of the VLM's base model, and tokens per call."""

    def __init__(self, model):
        self.tokens = []
        model.base_model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        ids = kwargs.get("input_ids")
        self.tokens.append((ids if ids is not None else kwargs["inputs_embeds"]).shape[1])


class TestOnePass:
    def test_segment_adds_one_single_token_step_to_generation(self):
        model = tiny.tiny_model()
        _, inputs = prompts()
        counter = PassCounter(model)
        output = model.segment(**inputs, max_new_tokens=12, constrain_format=False)
        prompt, written = inputs["input_ids"].shape[1], output.completion_mask.sum(1).max()
        assert output.sequences.shape[1] == prompt + written
        # Generation passes the prompt and every written token but the last; the last is the one extra step.
        assert counter.tokens == [prompt] + [1] * written
        assert sum(counter.tokens) == output.sequences.shape[1]

    @pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3"])
    @pytest.mark.parametrize("reasoning", ["full", "none"])
    def test_what_the_format_forces_passes_at_once_and_is_what_was_written_token_by_token(
        self, family, reasoning, monkeypatch
    ):
        model, inputs = tiny.tiny_model(family), inputs_of(family)
        counter = PassCounter(model)
        asked = {"max_new_tokens": 12, "reasoning": reasoning}
        output = model.segment(**inputs, **asked)
        # Tiny random models think to the limit of 5 tokens; then </think>, 4 <REF_POS> and the end are known: with
        # "none" after <think> already, but whether a pass may be of several tokens shows in the first behind a prompt.
        prompt, thought = inputs["input_ids"].shape[1], {"full": 5, "none": 1}[reasoning]
        assert counter.tokens == [prompt] + [1] * thought + [output.sequences.shape[1] - prompt - thought]
        assert counter.tokens[-1] == {"full": 7, "none": 6}[reasoning]  # the last token before, and these
        monkeypatch.setattr(generation_segcompass, "_deciding_format", lambda *given: None)
        counter.tokens.clear()
        plain = model.segment(**inputs, **asked)
        assert set(counter.tokens[1:]) == {1} and sum(counter.tokens) == plain.sequences.shape[1]
        assert torch.equal(output.sequences, plain.sequences)
        assert torch.equal(output.completion_mask, plain.completion_mask)
        torch.testing.assert_close(output.reasoning_surprisal, plain.reasoning_surprisal, equal_nan=True)
        for name in ("reference_states", "slots", "slot_logits", "pred_masks"):
            torch.testing.assert_close(output[name], plain[name], atol=1e-4, rtol=1e-4)

    def test_who_looks_at_single_steps_sees_them(self):
        model, heard = tiny.tiny_model(), Heard()
        _, inputs = prompts()
        inputs = {name: value[:1] for name, value in inputs.items()}
        last_word = lambda ids, scores: scores  # noqa: E731 - after the format, it might have changed what follows
        for watching in ({"streamer": heard}, {"logits_processor": [last_word]}):
            counter = PassCounter(model)
            output = model.segment(**inputs, max_new_tokens=12, **watching)
            assert counter.tokens[1:] == [1] * 12
        assert heard.tokens == output.sequences[0].tolist() and heard.ended

    def test_forward_is_one_pass(self):
        model = tiny.tiny_model()
        masks = [tiny.tiny_mask(1), tiny.tiny_mask(2, (50, 44))]
        _, inputs = prompts(reasoning=["a circle", "two squares"], masks=masks)
        counter = PassCounter(model)
        model.train()(**inputs).loss.backward()
        assert counter.tokens == [inputs["input_ids"].shape[1]]

    def test_the_original_input_costs_a_second_pass(self):
        model = tiny.tiny_model(concept_input="duplicated")
        _, inputs = prompts(reasoning=["a circle", "two squares"])
        counter = PassCounter(model)
        model(**inputs)
        assert counter.tokens == [inputs["input_ids"].shape[1]] * 2


class Heard:
    """A streamer that keeps what it gets."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


class TestLastToken:
    """`generate` goes on for one step more, which nobody sees but the capture."""

    def generated(self, model, inputs, **kwargs):
        """What plain `generate` and the longer one return."""
        text = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        with HiddenStateCapture(model.vlm, 2) as capture:
            longer = generate_and_feed_last(model.vlm, **text, **kwargs)
        return model.vlm.generate(**text, **kwargs), longer, capture

    @pytest.mark.parametrize("ending", ["length", "eos of one row", "eos of both", "criterion", "min_new_tokens"])
    def test_the_same_sequences_and_states_of_all(self, ending):
        model = tiny.tiny_model()
        _, inputs = prompts()
        prompt = inputs["input_ids"].shape[1]
        free = model.vlm.generate(
            **{name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")},
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=10**6,
        )[:, prompt:]
        third = int(free[0, 2])
        asked = {
            "length": {},
            "eos of one row": {"eos_token_id": int(free[0, 3])},
            "eos of both": {"eos_token_id": [third, int(free[1, 4])]},
            "criterion": {"stopping_criteria": [lambda ids, *_: torch.full((len(ids),), ids.shape[1] >= prompt + 5)]},
            "min_new_tokens": {"eos_token_id": third, "min_new_tokens": 4},
        }
        kwargs = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 10**6}
        plain, longer, capture = self.generated(model, inputs, **{**kwargs, **asked[ending]})
        assert torch.equal(longer, plain)
        layer_states, last_states = capture.states()
        assert layer_states.shape[1] == last_states.shape[1] == longer.shape[1]

    def test_stop_strings(self):
        model = tiny.tiny_model()
        processor, inputs = prompts()
        inputs = {name: value[:1] for name, value in inputs.items()}
        first = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        words = processor.tokenizer.decode(first[3:4])
        stop = {"stop_strings": [words], "tokenizer": processor.tokenizer, "max_new_tokens": 8, "do_sample": False}
        plain, longer, capture = self.generated(model, inputs, **stop)
        assert torch.equal(longer, plain) and longer.shape[1] < inputs["input_ids"].shape[1] + 8
        assert capture.num_tokens == longer.shape[1]
        del stop["stop_strings"]
        config = GenerationConfig(stop_strings=[words], eos_token_id=model.generation_config.eos_token_id)
        _, by_config, _ = self.generated(model, inputs, generation_config=config, **stop)
        assert torch.equal(by_config, plain) and config.stop_strings == [words]

    def test_all_that_is_returned_is_shorter_by_it(self):
        model = tiny.tiny_model()
        _, inputs = prompts()
        asked = {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True}
        plain, longer, _ = self.generated(model, inputs, max_new_tokens=5, do_sample=False, **asked)
        assert torch.equal(longer.sequences, plain.sequences)
        assert len(longer.scores) == len(longer.hidden_states) == 5
        assert all(torch.equal(*pair) for pair in zip(longer.scores, plain.scores, strict=True))

    def test_a_streamer_hears_what_is_written_and_nothing_else(self):
        model = tiny.tiny_model()
        _, inputs = prompts()
        inputs = {name: value[:1] for name, value in inputs.items()}
        heard = Heard()
        output = model.segment(**inputs, max_new_tokens=12, streamer=heard)
        assert heard.tokens == output.sequences[0].tolist() and heard.ended

    def test_logits_processors_are_asked_for_written_tokens_only(self):
        model, calls = tiny.tiny_model(), []
        _, inputs = prompts()
        counting = lambda ids, scores: calls.append(ids.shape[1]) or scores  # noqa: E731
        output = model.segment(**inputs, max_new_tokens=12, logits_processor=[counting])
        prompt = inputs["input_ids"].shape[1]
        assert calls == list(range(prompt, output.sequences.shape[1]))
        assert output.reasoning_surprisal.isfinite().all()

    def test_processors_are_asked_where_a_family_does_not_hand_them_on(self, monkeypatch):
        model = tiny.tiny_model()
        _, inputs = prompts()
        expected, generate = model.segment(**inputs, max_new_tokens=12), model.vlm.generate
        monkeypatch.setattr(model.vlm, "generate", lambda logits_processor=None, **kwargs: generate(**kwargs))  # Janus
        output = model.segment(**inputs, max_new_tokens=12)
        assert torch.equal(output.sequences, expected.sequences)
        assert torch.equal(output.reasoning_surprisal, expected.reasoning_surprisal)

    @pytest.mark.parametrize(
        ("asked", "message"),
        [({"num_beams": 2}, "num_beams=2: beams"), ({"cache_implementation": "static"}, "'static' has no room")],
    )
    def test_what_would_give_states_of_other_tokens_is_refused(self, asked, message):
        """Also where `segment` is not asked, as in joint training."""
        model = tiny.tiny_model()
        _, inputs = prompts()
        config = GenerationConfig(max_new_tokens=4, **asked)
        assert model.generate(**inputs, generation_config=config).shape[0] == 2
        config.feed_last_token = True
        with pytest.raises(ValueError, match=message):
            model.generate(**inputs, generation_config=config)

    def test_through_the_model(self):
        """As joint training samples: the generation configuration asks for it."""
        model = tiny.tiny_model()
        _, inputs = prompts()
        config = copy.deepcopy(model.generation_config)
        config.max_new_tokens, config.feed_last_token = 6, True
        with HiddenStateCapture(model.vlm, 2) as capture:
            sequences = model.generate(**inputs, generation_config=config)
        assert capture.num_tokens == sequences.shape[1]
        del config.feed_last_token
        with HiddenStateCapture(model.vlm, 2) as capture:
            assert torch.equal(model.generate(**inputs, generation_config=config), sequences)
        assert capture.num_tokens == sequences.shape[1] - 1

    def test_without_a_cache_or_the_last_token_there_are_no_states_of_sequences(self):
        model = tiny.tiny_model()
        _, inputs = prompts()
        with pytest.raises(ValueError, match="use_cache=False passes the whole sequence again"):
            model.segment(**inputs, max_new_tokens=12, use_cache=False)
        text = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        with HiddenStateCapture(model.vlm, 2) as capture:
            length = model.vlm.generate(**text, max_new_tokens=3, do_sample=False).shape[1]
        with pytest.raises(ValueError, match=f"have {length} tokens, but states of {length - 1} were captured"):
            capture.states(length)
        assert [states.shape[1] for states in capture.states(4)] == [4, 4]


class TestCapture:
    @pytest.mark.parametrize("layer", [0, 2, 3])
    def test_layer_states_are_transformers_hidden_states(self, layer):
        model = tiny.tiny_model()
        _, inputs = prompts()
        text = {k: inputs[k] for k in ("input_ids", "attention_mask", "pixel_values")}
        with torch.no_grad(), HiddenStateCapture(model.base_model, layer) as capture:
            output = model.vlm(**text, output_hidden_states=True)
        layer_states, last_states = capture.states()
        assert torch.equal(layer_states, output.hidden_states[layer])
        assert torch.equal(last_states, output.hidden_states[-1])
        assert capture.num_tokens == inputs["input_ids"].shape[1]
        assert not model.base_model._forward_hooks  # nothing stays behind

    def test_without_a_pass(self):
        with (
            HiddenStateCapture(tiny.tiny_model().base_model, 1) as capture,
            pytest.raises(RuntimeError, match="inside"),
        ):
            capture.states()

    def test_no_decoder_layers(self):
        with pytest.raises(ValueError, match="Linear has no list of num_hidden_layers decoder layers"):
            decoder_layers(torch.nn.Linear(2, 2))


class TestRefusals:
    def test_completion_given(self):
        _, inputs = prompts(reasoning=["a circle", "two squares"])
        with pytest.raises(ValueError, match="writes the completion itself.*completion_mask, labels"):
            tiny.tiny_model().segment(**inputs)

    def test_right_padding(self):
        _, inputs = prompts()
        inputs["attention_mask"][0, -1] = 0
        with pytest.raises(ValueError, match="pad on the left"):
            tiny.tiny_model().segment(**inputs)

    def test_beams(self):
        _, inputs = prompts()
        with pytest.raises(ValueError, match="num_beams=2"):
            tiny.tiny_model().segment(**inputs, num_beams=2)
        model = tiny.tiny_model()
        model.generation_config.num_beams = 3
        with pytest.raises(ValueError, match="num_beams=3"):
            model.segment(**inputs)
        with pytest.raises(ValueError, match="num_beams=3"):
            model.segment(**inputs, generation_config=GenerationConfig(do_sample=True))  # which says nothing of beams

    def test_a_generation_config_is_filled_from_the_models_own(self):
        _, inputs = prompts()
        model = tiny.tiny_model()
        ends = [model.generation_config.eos_token_id, 300]
        model.generation_config.eos_token_id = ends
        written = model.segment(**inputs, generation_config=GenerationConfig(max_new_tokens=12))
        assert written.sequences.shape[1] == inputs["input_ids"].shape[1] + 12
        assert model._end_token_ids({"generation_config": GenerationConfig(do_sample=True)}) == ends
        assert model._end_token_ids({"generation_config": GenerationConfig(eos_token_id=7)}) == [7]
        assert model._end_token_ids({"eos_token_id": 8, "generation_config": GenerationConfig(eos_token_id=7)}) == [8]

    def test_static_caches(self):
        """They have no room for the step that completes the last token's states."""
        _, inputs = prompts()
        model, options = tiny.tiny_model(), {"reasoning": "none", "max_new_tokens": 7}
        with pytest.raises(ValueError, match="cache_implementation='static' has no room"):
            model.segment(**inputs, cache_implementation="static", **options)
        expected = model.segment(**inputs, **options)
        model.generation_config.cache_implementation = "static"
        assert torch.equal(model.segment(**inputs, **options).pred_masks, expected.pred_masks)

    def test_modes_of_parts_are_left_as_they_were(self):
        _, inputs = prompts()
        model = tiny.tiny_model().train()
        model.sam.eval()
        model.segment(**inputs, max_new_tokens=12)
        assert model.training and model.vlm.training and not model.sam.training

    def test_sampling_asked_by_a_generation_config(self, monkeypatch):
        _, inputs = prompts()
        model, asked = tiny.tiny_model(), []
        generate = model.vlm.generate
        monkeypatch.setattr(model.vlm, "generate", lambda **kw: asked.append(kw["do_sample"]) or generate(**kw))
        config = copy.deepcopy(model.generation_config)
        config.do_sample = True
        model.segment(**inputs, generation_config=config, max_new_tokens=12)
        model.segment(**inputs, max_new_tokens=12)
        assert asked == [True, False]

    def test_drafted_tokens(self):
        _, inputs = prompts()
        with pytest.raises(ValueError, match="prompt_lookup_num_tokens drafts tokens"):
            tiny.tiny_model().segment(**inputs, prompt_lookup_num_tokens=3)

    def test_no_image(self):
        _, inputs = prompts()
        del inputs["sam_pixel_values"]
        with pytest.raises(ValueError, match="pass sam_pixel_values or image_embeddings"):
            tiny.tiny_model().segment(**inputs)

    def test_too_few_tokens(self):
        _, inputs = prompts()
        with pytest.raises(ValueError, match="max_new_tokens=7 is too few"):
            tiny.tiny_model().segment(**inputs, max_new_tokens=7)

    def test_missing_token_ids(self):
        _, inputs = prompts()
        with pytest.raises(ValueError, match="think_end_token_id; set them"):
            tiny.tiny_model(think_end_token_id=None).segment(**inputs, max_new_tokens=12)

    @pytest.mark.parametrize(
        "parameter, module",
        [
            ("vlm.model.language_model.layers.1.mlp.up_proj.weight", "vlm"),
            ("sae.W_enc", "SAE"),
            ("codebook.weight", "slot_encoder"),
            ("slot_encoder.layers.0.fc1.weight", "slot_encoder"),
            ("slot_mapper.query_proj.weight", "slot_mapper"),
            ("sam.vision_encoder.neck.conv1.weight", "sam.vision_encoder"),
            ("sam.mask_decoder.mask_tokens.weight", "sam.mask_decoder"),
        ],
    )
    def test_nan_in_weights(self, parameter, module):
        model = tiny.tiny_model()
        with torch.no_grad():
            model.get_parameter(parameter).fill_(float("nan"))
        _, inputs = prompts()
        with pytest.raises(ValueError, match=module) as error:
            model.segment(**inputs, max_new_tokens=12)
        if parameter not in ("sae.W_enc", "codebook.weight"):
            assert parameter in str(error.value)


def test_positions_that_a_vlm_counts_itself_leave_out_padding(tmp_path):
    """Kosmos-2's: written tokens of a padded row get the positions that they have alone, and in a whole sequence."""
    trial = Trial("kosmos-2", FAMILIES["kosmos-2"], tmp_path)
    trial.processor, vlm = trial.new_processor(), trial.parts.vlm()
    add_tokens(trial.processor.tokenizer, vlm)
    batch, alone = vlm_inputs(trial.inputs()), vlm_inputs(trial.inputs((0,)))
    assert not batch["attention_mask"][0].all()
    asked = {"max_new_tokens": 4, "min_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    with positions_without_padding(vlm, batch["attention_mask"]):
        written = vlm.generate(**batch, do_sample=False, **asked)
    expected = vlm.generate(**alone, do_sample=False, **asked)
    assert torch.equal(written.sequences[0, -4:], expected.sequences[0, -4:])
    for one, other in zip(written.logits, expected.logits, strict=True):
        torch.testing.assert_close(one[0], other[0], rtol=0, atol=1e-4)
    whole = {**alone, "input_ids": expected.sequences, "attention_mask": torch.ones_like(expected.sequences)}
    with torch.no_grad():
        logits = vlm(**sequence_inputs(vlm, whole)).logits[0, -5:-1]
    torch.testing.assert_close(logits, torch.cat(expected.logits), rtol=0, atol=1e-4)
    unaided = vlm.generate(**batch, do_sample=False, **asked)
    assert (unaided.logits[1][0] - expected.logits[1][0]).abs().max() > 1e-2  # what it is for; no hook is left
