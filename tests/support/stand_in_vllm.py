"""A stand-in for vLLM: the parts of `vllm.LLM` that TRL calls, over transformers.

It loads a folder as vLLM would (family class, family files), expands one placeholder per image, samples, and takes
weights under the names of the files only. Sleep level 2 throws the weights away, as vLLM's does.
"""

from types import SimpleNamespace

import torch
from transformers import AutoModelForImageTextToText


class SamplingParams(SimpleNamespace):
    """Holds what it is given, like vLLM's."""


class LLM:
    """`vllm.LLM` as far as `trl.generation.vllm_generation.VLLMGeneration` uses it."""

    def __init__(self, model: str, **settings):
        from segcompass_hf.processing_segcompass import SegCompassProcessor

        self.folder, self.settings = model, settings
        self.processor = SegCompassProcessor.from_parts(model, sam_processor=64)
        self.model, info = AutoModelForImageTextToText.from_pretrained(model, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        self.model.eval()
        self.received, self.asleep, self.prompts, self.events = {}, False, [], []
        self.forbidden_shares = []  # per call: rise of log-probabilities because others may not come
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self._load_weights))
        executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        context = self.model.config.get_text_config().max_position_embeddings
        self.llm_engine = SimpleNamespace(
            model_executor=executor,
            model_config=SimpleNamespace(max_model_len=settings.get("max_model_len") or context),
        )

    def _load_weights(self, weights):
        assert not self.asleep, "weights sent to an engine that sleeps"
        for name, weight in weights:
            assert name not in self.received, f"{name} sent twice"
            self.received[name] = weight.detach().clone()

    def reset_prefix_cache(self):
        """TRL calls it when a synchronisation is complete: here the weights go in, by the names of the files."""
        state, self.received = self.received, {}
        self.events.append(("synchronised", len(state)))
        self.model, info = type(self.model).from_pretrained(
            None, config=self.model.config, state_dict=state, output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        self.model.eval()

    def sleep(self, level: int = 1):
        self.asleep = True
        self.events.append(("sleep", level))
        if level == 2:
            for parameter in self.model.parameters():
                parameter.data.fill_(float("nan"))

    def wake_up(self, tags: list[str] | None = None):
        self.asleep = False
        self.events.append(("wake_up", tags))

    def generate(self, prompts: list[dict], sampling_params: SamplingParams, use_tqdm: bool = True) -> list:
        assert not self.asleep
        self.prompts += prompts
        self.forbidden_shares.append(0.0)
        return [self._generate(prompt, sampling_params) for prompt in prompts]

    @torch.no_grad()
    def _generate(self, prompt: dict, params: SamplingParams) -> SimpleNamespace:
        image = prompt["multi_modal_data"]["image"]
        tokenizer = self.processor.tokenizer
        text = tokenizer.decode(prompt["prompt_token_ids"], skip_special_tokens=False)
        inputs = self.processor.vlm_processor(
            images=[image], text=[text], add_special_tokens=False, return_tensors="pt"
        )
        forbidden = [token for token, bias in params.logit_bias.items() if bias <= -100]
        output = self.model.generate(
            **inputs,
            do_sample=True,
            temperature=params.temperature,
            top_k=params.top_k or None,
            max_new_tokens=params.max_tokens,
            suppress_tokens=forbidden,
            output_scores=True,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=tokenizer.pad_token_id,
        )
        ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        logprobs = [
            {token: SimpleNamespace(logprob=float(score[0].log_softmax(-1)[token]), rank=1)}
            for token, score in zip(ids, output.scores, strict=True)
        ]
        shares = torch.stack(
            [(logits / params.temperature).softmax(-1)[0, forbidden].sum() for logits in output.logits]
        )
        self.forbidden_shares[-1] = max(self.forbidden_shares[-1], float(-(1 - shares).log().min()))
        expanded = inputs["input_ids"][0].tolist()
        return SimpleNamespace(prompt_token_ids=expanded, outputs=[SimpleNamespace(token_ids=ids, logprobs=logprobs)])
