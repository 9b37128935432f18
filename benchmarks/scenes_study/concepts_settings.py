"""Settings of the study of one concept space: what each option changes in the shortened recipe."""

from settings import RUNS

from segcompass_hf.training.scenes_recipe import Stage

FOLDER = RUNS / "concepts"

# The recipe's stages that an option starts from. `words` went on from `warmup`, with concept words.
WARMUPS = {"plain": "warmup", "concept_words": "words"}
STAGES = {
    "sae": Stage(steps=1500, batch_size=2048, learning_rate=2e-3, seed=43),
    "slots": Stage(steps=300, batch_size=32, learning_rate=6e-3, seed=45),
    "joint": Stage(steps=200, batch_size=32, learning_rate=4e-3, seed=44),
}
MEASURED, EVALUATED, SEED = 400, 300, 7  # scenes of `val` for the concepts and for gIoU

# States are about 100 long and per-token normalisation makes them 11.3: without it the weight of the sparsity term and
# the threshold grow by the same factor, so that the trade-off is the same.
RAW = {"sae": {"normalize_activations": "none", "l1_coefficient": 9.0}, "slots": {"concept_threshold": 2.25}}
SHARED_TOPK = {"sae": {"pair_loss": "shared_topk", "pair_weight": 0.5}}

# option -> warm-up, and options of stages
OPTIONS = {
    "paper": ("plain", RAW),
    "per_token": ("plain", {}),
    "per_modality": ("plain", {"sae": {"normalize_activations": "per_modality"}}),
    "shared_topk": ("plain", SHARED_TOPK),
    "concept_words": ("concept_words", {}),
    "concept_words+shared_topk": ("concept_words", SHARED_TOPK),
}
BASELINE = "per_token"  # what gIoU is compared with
# Checkpoints of the whole recipe: before concept words and the shared top-k (as `per_token`), and with them.
WHOLE = ("previous", "bundled")
