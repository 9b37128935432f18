# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What a VLM family has to pass, from its processor to a training step: the columns of docs/reference/backbones.md."""

import copy
import tempfile
import traceback
from pathlib import Path

import tiny
import torch
from model_inputs import IMAGES, INSTRUCTIONS
from transformers import AutoModel, AutoTokenizer, SamModel

from segcompass_hf import SegCompassForReasoningSegmentation, SegCompassProcessor
from segcompass_hf.data.collator import SegmentationCollator
from segcompass_hf.explain.answer import Answer
from segcompass_hf.text_stack_segcompass import decoder_layers
from segcompass_hf.training.grpo.passes import Prompts
from segcompass_hf.training.grpo.rollouts import masks_of_rollouts
from segcompass_hf.training.grpo.sharing import reason_against_sharing
from segcompass_hf.training.grpo.targets import segmentation_targets

from .building import Family
from .trial import (
    NEW_TOKENS,
    OURS,
    SAE_LAYER,
    STEPS,
    Noise,
    NotComparable,
    Outcome,
    Trial,
    check_equal,
    pairs_of,
    same_inputs,
    step,
    vlm_inputs,
)


@step()
def processor(trial: Trial) -> None:
    """Our processor can be built around the family's image processor and tokenizer."""
    trial.processor = trial.new_processor()


@step("processor")
def inputs(trial: Trial) -> None:
    """Two pictures of different sizes and two instructions become one batch, padded on the left."""
    made = trial.inputs()
    assert not made["attention_mask"].all(), "no row is padded: the harness's instructions are too similar"
    assert made["attention_mask"][:, -1].all(), "a row is padded on the right"
    places = (made["input_ids"] == trial.parts.image_token_id).sum(1)
    assert places.all(), f"{places.tolist()} image tokens in the rows"


@step("inputs")
def folder(trial: Trial) -> None:
    """Built from the VLM's folder, and saved and loaded itself, it gives the same inputs."""
    path = trial.folder / "vlm"
    path.mkdir()
    trial.parts.save(path)
    tokenizer = AutoTokenizer.from_pretrained(path)  # some families cut words their own way, whatever was saved
    expected = trial.inputs_by(trial.new_processor(tokenizer))
    from_folder = SegCompassProcessor.from_parts(str(path), tiny.tiny_sam_config(), num_slots=tiny.NUM_SLOTS)
    lost = set(trial.parts.family.arguments) - set(from_folder.vlm_processor_kwargs)
    assert not lost, f"the saved arguments {sorted(lost)} are lost"
    same_inputs(expected, trial.inputs_by(from_folder))
    from_folder.save_pretrained(trial.folder / "ours")
    same_inputs(expected, trial.inputs_by(SegCompassProcessor.from_pretrained(trial.folder / "ours")))


@step("processor")
def compose(trial: Trial) -> None:
    """`from_pretrained_parts` makes a model of the VLM and SAM."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SegCompassForReasoningSegmentation.from_pretrained_parts(
            trial.parts.vlm(),
            SamModel(tiny.tiny_sam_config()),
            processor=trial.processor,
            num_slots=tiny.NUM_SLOTS,
            sae_layer=SAE_LAYER,
            sae_config={"d_in": tiny.HIDDEN_SIZE, "d_sae": 64, "layer": SAE_LAYER},
            concept_threshold=0.01,
            d_slot=32,
            slot_encoder_heads=4,
            duplicate_iou_threshold=2.0,
        )
        for part in (model.sam, model.codebook, model.slot_encoder, model.slot_mapper):
            tiny.unit_gain(part)  # at their own start the masks would hardly differ
        trial.model = model


@step("inputs", "compose")
def vlm(trial: Trial) -> None:
    """The VLM alone, as transformers runs it, takes these inputs."""
    with torch.no_grad():
        output = trial.model.vlm(**vlm_inputs(trial.inputs()))
    assert torch.isfinite(output.logits).all(), "logits are not finite"


@step("inputs", "compose")
def forward(trial: Trial) -> None:
    """`forward` with labels and masks gives finite losses."""
    with torch.no_grad():
        output = trial.model(**trial.inputs(training=True))
    for name in ("loss", "language_loss", "logits", "pred_masks"):
        assert torch.isfinite(output[name]).all(), f"{name} is not finite"
    assert output.pred_masks.std() > 0.01, "the masks are flat"


@step("forward")
def backward(trial: Trial) -> None:
    """Gradients reach the heads and the VLM's upper layers, and nothing else."""
    model = copy.deepcopy(trial.model).freeze_for_training().train()
    model(**trial.inputs(training=True)).loss.backward()
    upper = {id(parameter) for layer in decoder_layers(model.vlm)[SAE_LAYER:] for parameter in layer.parameters()}
    reached = False
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad or parameter.grad is None, f"{name} is frozen but has a gradient"
        if parameter.grad is not None:
            assert torch.isfinite(parameter.grad).all(), f"the gradient of {name} is not finite"
            reached |= id(parameter) in upper and bool(parameter.grad.any())
        if name.startswith(("codebook", "slot_encoder", "slot_mapper")):
            assert parameter.grad is not None and parameter.grad.any(), f"{name} gets no gradient"
    assert reached, "no layer above the SAE gets a gradient"


@step("inputs", "compose")
def captured(trial: Trial) -> None:
    """The captured states are transformers' own `hidden_states`."""
    made = trial.inputs()
    with torch.no_grad(), trial.model.capture_states(made["input_ids"], made["attention_mask"]) as capture:
        output = trial.model.vlm(**vlm_inputs(made), output_hidden_states=True)
    layer_states, last_states = capture.states()
    hidden = output.get("hidden_states")
    if hidden is None:
        hidden = getattr(output.get("language_model_outputs"), "hidden_states", None)
    if hidden is None or hidden[SAE_LAYER].shape != layer_states.shape:
        raise NotComparable("transformers' hidden_states are missing or of another shape")
    assert torch.equal(layer_states, hidden[SAE_LAYER]), "the SAE's states differ"
    assert torch.equal(last_states, hidden[-1]), "the last states differ"


@step("forward")
def image(trial: Trial) -> None:
    """Another picture changes the states of the text after it."""
    states = []
    for seed in (0, 7):
        made = trial.inputs(training=True, seed=seed)
        with torch.no_grad():
            states.append(trial.model(**made).reference_states)
    assert (states[0] - states[1]).abs().amax((1, 2)).min() > 1e-4, "the reference states do not see the picture"


@step("vlm", "forward")
def batch_forward(trial: Trial) -> None:
    """`forward`: a batch, padded on the left, equals its rows alone."""
    trial.check_comparable()
    with torch.no_grad():
        together = trial.model(**trial.inputs(training=True))
        pairs = {}
        for row in (0, 1):
            alone = trial.model(**trial.inputs((row,), training=True))
            pairs |= {f"row {row} {name}": pair for name, pair in pairs_of(alone, together, row).items()}
    check_equal(pairs)


@step("inputs", "compose")
def segment(trial: Trial) -> None:
    """`segment` writes a well-formed answer and draws masks, in one pass over prompt and answer."""
    passes = []
    layer = decoder_layers(trial.model.vlm)[0]
    handle = layer.register_forward_hook(lambda *args: passes.append(1))
    try:
        output = trial.segmented
    finally:
        handle.remove()
    written = output.sequences[:, trial.inputs()["input_ids"].shape[1] :]
    references = (written == trial.processor.ref_token_id).sum(1).tolist()
    assert references == [tiny.NUM_SLOTS] * 2, f"{references} <REF_POS> in the answers"
    assert torch.isfinite(output.pred_masks).all() and output.pred_masks.std() > 0.01, "the masks are flat or broken"
    # One for the prompt and one per token, of which the format's last ones may pass together.
    most, together = 1 + written.shape[1], tiny.NUM_SLOTS + 2
    assert most - together <= len(passes) <= most, f"{len(passes)} passes for {written.shape[1]} tokens"


@step("vlm", "segment")
def batch_segment(trial: Trial) -> None:
    """`segment`: a batch, padded on the left, equals its rows alone, in words and masks."""
    trial.check_comparable()
    pairs = {}
    for row in (0, 1):
        alone = trial.model.segment(**trial.inputs((row,)), max_new_tokens=NEW_TOKENS)
        words = trial.segmented.sequences[row][trial.segmented.completion_mask[row].bool()]
        assert torch.equal(alone.sequences[alone.completion_mask.bool()], words), f"row {row} says other words"
        pairs |= {f"row {row} {name}": pair for name, pair in pairs_of(alone, trial.segmented, row).items()}
    check_equal(pairs)


@step("segment")
def reread(trial: Trial) -> None:
    """`segment` equals `forward` over its own answer."""
    made, output = trial.inputs(), trial.segmented
    made.update(
        input_ids=output.sequences, attention_mask=output.attention_mask, completion_mask=output.completion_mask
    )
    with torch.no_grad():
        check_equal(pairs_of(trial.model(**made), output))


@step("inputs", "compose")
def image_ids(trial: Trial) -> None:
    """Processor and model know which tokens are the image's, and never write one."""
    made, token = trial.inputs(), trial.parts.image_token_id
    assert trial.processor.image_token_id == token, f"processor: {trial.processor.image_token_id}, in the ids: {token}"
    known = trial.model.vision_token_ids
    assert token in known, f"the model may write {token}; it suppresses {known}"
    marked = trial.model.modality_ids(made["input_ids"]).bool()
    assert torch.equal(marked, made["input_ids"] == token), f"{int(marked.sum())} tokens count as image"


@step("forward")
def causal(trial: Trial) -> None:
    """A later token of a training answer does not move earlier logits."""
    made = {name: value for name, value in trial.inputs(training=True).items() if name not in OURS[:5]}
    place = int(made["completion_mask"].all(0).nonzero()[-1])  # the last that is an answer's in both rows
    changed = dict(made, input_ids=made["input_ids"].clone())
    changed["input_ids"][:, place] = trial.processor.tokenizer.convert_tokens_to_ids("a")
    with torch.no_grad():
        before, after = (trial.model(**each).logits for each in (made, changed))
    assert not torch.equal(before[:, place], after[:, place]), "the changed token changes nothing"
    seen = made["attention_mask"][:, :place].bool()  # what padding answers is nothing
    check_equal({"earlier logits": (before[:, :place][seen], after[:, :place][seen])})


@step("segment")
def save(trial: Trial) -> None:
    """Saved and loaded by `AutoModel`, the model says and draws the same."""
    trial.model.save_pretrained(trial.folder / "model")
    loaded = AutoModel.from_pretrained(trial.folder / "model").segment(**trial.inputs(), max_new_tokens=NEW_TOKENS)
    assert torch.equal(loaded.sequences, trial.segmented.sequences), "other words"
    check_equal(pairs_of(loaded, trial.segmented))


@step("segment")
def explain(trial: Trial) -> None:
    """`explain` tells question, picture and reasoning apart (its places in the picture may be unknown)."""
    picture = tiny.tiny_image(*IMAGES[0])
    answer = Answer(trial.model, trial.processor, picture, INSTRUCTIONS[0], max_new_tokens=NEW_TOKENS)
    kinds = {token.kind for token in answer.tokens()}
    missing = {"image", "question", "reasoning", "reference"} - kinds
    assert not missing, f"no token is of kind {sorted(missing)}"


@step("backward")
def train(trial: Trial) -> None:
    """One step on the collator's batch moves heads and VLM and leaves losses finite."""
    model = copy.deepcopy(trial.model).freeze_for_training().train()
    batch = SegmentationCollator(trial.processor)(trial.rows())
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    before = {name: weight.detach().clone() for name, weight in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=1e-3)
    model(**batch).loss.backward()
    optimizer.step()
    moved = {name.split(".")[0] for name, weight in trained.items() if not torch.equal(weight, before[name])}
    assert {"vlm", "codebook", "slot_encoder", "slot_mapper"} <= moved, f"only {sorted(moved)} moved"
    with torch.no_grad():
        assert torch.isfinite(model(**batch).loss), "the loss after the step is not finite"


@step("forward")
def grpo(trial: Trial) -> None:
    """Masks of completions sampled elsewhere equal those of `forward` over the same answers."""
    processor, model = trial.processor, trial.model
    made = trial.inputs(training=True)
    pictures = [row["image"] for row in trial.rows()]
    prompts = [processor.build_messages(*pair) for pair in zip(INSTRUCTIONS, pictures, strict=True)]
    completions = [
        ids[mask.bool()].tolist() for ids, mask in zip(made["input_ids"], made["completion_mask"], strict=True)
    ]
    targets = segmentation_targets(trial.rows(), processor, model, torch.device("cpu"))
    found = masks_of_rollouts(model, processor, prompts, completions, targets, batch_size=2)
    with torch.no_grad():
        expected = model(**made)
    check_equal({name: (found[name], expected[name]) for name in found})


@step("inputs", "compose")
def sharing(trial: Trial) -> None:
    """Joint training computes a prompt once for its completions: the same states and gradients (`n`: it cannot)."""
    rows = (0, 0, 1, 1)
    prompts = Prompts(torch.tensor(rows), vlm_inputs(trial.inputs()))
    made = vlm_inputs(trial.inputs_by(trial.processor, rows))
    words = trial.processor.tokenizer("the red box is left of it", add_special_tokens=False, return_tensors="pt")
    words = torch.cat([words["input_ids"].roll(row, 1) for row in range(4)])
    written = torch.ones_like(words)
    written[1, -2:] = written[2, -1:] = 0
    made["input_ids"] = torch.cat([made["input_ids"], words], 1)
    made["attention_mask"] = torch.cat([made["attention_mask"], written], 1)
    reason = reason_against_sharing(trial.model, made, prompts)
    if reason is not None:
        raise NotComparable(reason)


@step("segment")
def answers(trial: Trial) -> None:
    """Several answers are sampled behind one pass of their prompt, and `forward` reads the same from them."""
    trial.check_comparable()
    sampled = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": NEW_TOKENS}
    output = trial.model.segment(**trial.inputs(), **sampled)
    made = trial.inputs_by(trial.processor, (0, 0, 1, 1))
    made.update(
        input_ids=output.sequences, attention_mask=output.attention_mask, completion_mask=output.completion_mask
    )
    with torch.no_grad():
        check_equal(pairs_of(trial.model(**made), output))


def outcomes_of(name: str, family: Family) -> dict[str, Outcome]:
    """Take a family through all steps.

    Returns:
        `dict[str, Outcome]`: an outcome for every step.
    """
    found: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as path:
        trial = Trial(name, family, Path(path))
        for step_name, each in STEPS.items():
            if any(found[before].kind not in ("passed", "noise") for before in each.after):
                found[step_name] = Outcome("not reached")
                continue
            torch.manual_seed(0)
            try:
                each.run(trial)
                found[step_name] = Outcome("passed")
            except NotComparable as reason:
                found[step_name] = Outcome("not comparable", str(reason))
            except Noise as reason:
                found[step_name] = Outcome("noise", str(reason))
            except Exception as error:
                found[step_name] = Outcome("failed", _told(error))
    return found


def _told(error: Exception) -> str:
    """An error in a line, and where it arose."""
    words = " ".join(str(error).split())
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = "" if isinstance(error, AssertionError) else f" ({Path(frame.filename).name})"
    return f"{type(error).__name__}: {words[:240]}{place}"
