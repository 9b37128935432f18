"""What the worker processes and the tests that check them both need."""

import tiny
import torch
from trl.trainer.utils import add_fused_lm_head

from segcompass_hf.reading_segcompass import MaskTargets
from segcompass_hf.training.grpo.forward import JointTargets, add_joint_forward
from segcompass_hf.training.grpo.reference import ReferencePolicy
from segcompass_hf.training.grpo.vllm import vllm_weights

NUM_OBJECTS = [2, 1, 0, 0]  # the second process sees no object at all


def model_of(family="llava", **config):
    return tiny.tiny_model(family, lm_loss_weight=0.0, **config).freeze_for_training().train()


def peft_model():
    """LoRA with an effect: both factors drawn, so that every adapter gets a gradient."""
    from peft import get_peft_model

    from segcompass_hf.training.adapters import lora_config

    model = tiny.tiny_model("llava", lm_loss_weight=0.0)
    wrapped = get_peft_model(model, lora_config(model, r=2, dropout=0.0)).train()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) / 10)
    return wrapped


def batch(family="llava", rows=slice(None), training=True):
    """Rows of one batch of four; `num_objects` as above. Prompts alone with `training=False`."""
    answers = {
        "reasoning": ["two of them", "there is one: a red circle", "none", "there is nothing of that kind"],
        "masks": [tiny.tiny_mask(number) if number else [] for number in NUM_OBJECTS],
    }
    inputs = tiny.tiny_processor(family)(
        images=[tiny.tiny_image(seed) for seed in range(4)],
        instruction=["the red square", "the largest circle left of it", "squares", "what is not there"],
        return_tensors="pt",
        **(answers if training else {}),
    )
    per_row = len(inputs["pixel_values"]) // 4  # the Qwens lay the patches of all images in a row
    start, stop, _ = rows.indices(4)
    return {
        name: value[start * per_row : stop * per_row] if name == "pixel_values" else value[rows]
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor)
    }


def loss_of(model, inputs, num_tokens=None):
    """Losses of a part of a batch of four, as a share of the whole batch's."""
    labels = inputs["labels"]
    output = model(
        **{name: value for name, value in inputs.items() if name != "labels"},
        targets=MaskTargets(inputs["mask_labels"], inputs["num_objects"], num_items=2, num_samples=4),  # NUM_OBJECTS
    )
    targets = labels[:, 1:]
    language = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
    )
    return output.loss + language / num_tokens


def joint_model(family="llava"):
    """As the GRPO trainer makes it: with the joint forward and a reference policy that differs from the policy."""
    model = model_of(family)
    reference = ReferencePolicy(model, temperature=1.0)
    with torch.no_grad():
        for parameter in reference.layers.parameters():
            parameter.add_(0.01)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return model, reference


def with_joint_forward(model, reference):
    add_joint_forward(model, 1.0, False, reference)
    return model


def joint_loss(model, inputs):
    """A policy loss with a distance to the reference, and the segmentation losses, as shares of a batch of four."""
    inputs = dict(inputs)
    core = getattr(model, "module", model)
    start = int(inputs["completion_mask"].any(0).int().argmax())  # prompts end together
    masks = MaskTargets(inputs.pop("mask_labels"), inputs.pop("num_objects"), 2, 4, decode="matched")
    embeddings = core.encode_image(inputs.pop("sam_pixel_values"))
    mask = inputs.pop("completion_mask")[:, start:]
    segmentation = JointTargets(mask, embeddings, inputs.pop("reshaped_input_sizes"), masks)
    inputs.pop("original_sizes")
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    output = model(**inputs, fused_lm_head=True, segmentation=segmentation)
    reference = 0.0 if output.ref_log_probs is None else output.ref_log_probs
    distance = ((output.log_probs - reference) ** 2 - output.log_probs) * mask
    return (distance.sum(1) / mask.sum(1)).sum() / 4 + output.segmentation


def gradients(model):
    """Name -> whole gradient of every parameter that has one."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            found[name.removeprefix("module.")] = (
                grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            ).clone()
    return found


def sends_whole_weights(model, family="llava", tie=False, **gather):
    """Whether a sharded model gives vLLM the names and weights that one process gives."""
    alone = peft_model() if hasattr(model, "peft_config") else model_of(family, tie=tie)
    expected = dict(vllm_weights(alone))
    sent = {name: weight.clone() for name, weight in vllm_weights(model, **gather)}
    return list(sent) == list(expected) and all(
        torch.allclose(sent[name], expected[name], atol=1e-6) for name in expected
    )


@torch.no_grad()
def outside_forward(model, family, rows):
    """What a trainer calls besides `forward`."""
    model.eval()
    prompt = batch(family, rows, training=False)
    embeddings = model.encode_image(prompt.pop("sam_pixel_values"))
    segmented = model.segment(**prompt, image_embeddings=embeddings, max_new_tokens=12, reasoning="none")
    concepts = model.encode_concepts(torch.ones(1, 3, 32), torch.ones(1, 3), torch.zeros(1, 3))
    result = {
        "generated": model.generate(**prompt, max_new_tokens=4, do_sample=False),
        "image_embeddings": embeddings,
        "pred_masks": segmented.pred_masks,
        "slots": model.encode_slots(concepts, torch.ones(1, 3)).slots,
        "masks_alone": model.predict_masks(segmented.reference_states, segmented.slots, embeddings).pred_masks,
    }
    model.train()
    return result
