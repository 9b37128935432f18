"""SAE training on cached activations beside SAELens' own trainer, and what the parts of it are worth:

    pip install sae-lens
    python benchmarks/sae_scale.py                # tokens per second and memory of both trainers, d_in 576 to 4,096
    python benchmarks/sae_scale.py --parts        # sparse against dense steps, harvest and training overlapped or not

Both trainers read the same cache (see `ActivationCache`; sums of a few of 4 x d_in random directions, and noise) and
train a new top-k SAE of the same size in float32 on batches of the same size, each with its own mixing buffer. SAELens
is run as it comes, and with `use_sparse_activations` (and without rescaling by decoder norms, which it cannot do then
with this torch). Every run is a process of its own, forked from this one; those of one size follow each other in
turns, so that what else the machine does falls on all. `--clock cpu` counts processor time, for a machine that is
shared. Memory is the peak of the process less what it held at its start. Writes
benchmarks/results/sae_scale.{json,md}.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from segcompass_hf import sparse_features_segcompass
from segcompass_hf.configuration_segcompass import SegCompassSaeConfig
from segcompass_hf.modeling_sae import SegCompassSae
from segcompass_hf.training.sae.activations import ActivationHarvester, HarvestedTokens
from segcompass_hf.training.sae.buffer import ActivationBuffer
from segcompass_hf.training.sae.cache import ActivationCache
from segcompass_hf.training.sae.config import SaeTrainingConfig
from segcompass_hf.training.sae.rows import RowEncoder, RowStream
from segcompass_hf.training.sae.trainer import SaeTrainer

K = 32
KEY = {"layer": 1}
SETTLING_STEPS = 2  # not counted
RESULTS = Path(__file__).parent / "results" / "sae_scale"
CLOCKS = {"wall": time.monotonic, "cpu": time.process_time}


def write_cache(folder: str, d_in: int, tokens: int) -> None:
    """Shards of 4,096 states, each the sum of 16 of 4 x d_in directions, and noise."""
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(4 * d_in, d_in), dim=-1)
    cache = ActivationCache(folder, KEY, "float32")
    for number in range(-(-tokens // 4096)):
        chosen = torch.randint(len(directions), (4096, 16))
        states = (
            torch.nn.functional.embedding_bag(chosen, directions, mode="sum") + torch.randn(4096, d_in) / d_in**0.5
        )
        tensors = {"states_1": states, "modality_ids": torch.zeros(4096, dtype=torch.int8)}
        cache.shards.name([{"file": cache.shards.write(number, tensors), "tokens": 4096}], complete=True)


def small_vlm(d_in: int, layers: int = 1, **sizes) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A language model of that width with next to no weights, for a trainer that wants one, and its tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[UNK]")
    small = {"intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8} | sizes
    config = LlamaConfig(hidden_size=d_in, num_hidden_layers=layers, vocab_size=8, **small)
    return LlamaForCausalLM(config).eval(), tokenizer


class CachedSaeTrainer(SaeTrainer):
    """[`SaeTrainer`] on the cache that was made here."""

    def _filled_cache(self) -> ActivationCache:
        return ActivationCache(self.args.cache_dir, KEY, "float32")


class Stopwatch(TrainerCallback):
    """The clock after every step."""

    def __init__(self, clock: Callable[[], float]):
        self.clock, self.times = clock, []

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(self.clock())


def train_ours(cache: str, d_in: int, args: argparse.Namespace) -> float:
    """Seconds of a step of `SaeTrainer`."""
    model, tokenizer = small_vlm(d_in)
    with tempfile.TemporaryDirectory() as folder:
        settings = SaeTrainingConfig(
            output_dir=folder,
            cache_dir=cache,
            cache_dtype="float32",
            architecture=args.architecture,
            k=K,
            d_sae=args.d_sae,
            sae_layer=1,
            learning_rate=3e-4,
            per_device_train_batch_size=args.batch_tokens,
            buffer_tokens=8 * args.batch_tokens,
            max_steps=args.steps + SETTLING_STEPS,
            validation_share=0.0,
            logging_steps=1000,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        rows = [{"images": [None], "texts": ["a b"]}]
        trainer = CachedSaeTrainer(model, settings, rows, None, tokenizer)
        trainer.remove_callback(PrinterCallback)
        watch = Stopwatch(CLOCKS[args.clock])
        trainer.add_callback(watch)
        trainer.train()
    return (watch.times[-1] - watch.times[SETTLING_STEPS - 1]) / args.steps


def train_sae_lens(cache: str, d_in: int, args: argparse.Namespace, sparse: bool) -> float:
    """Seconds of a step of SAELens' `SAETrainer` on its own mixing buffer."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.mixing_buffer import mixing_buffer
    from sae_lens.training.sae_trainer import SAETrainer

    kinds = {
        "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
        "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    }
    make, configure = kinds[args.architecture]
    steps = args.steps + SETTLING_STEPS
    rates = {"lr": 3e-4, "lr_end": 3e-5, "lr_scheduler_name": "cosineannealing"}
    tokens = args.batch_tokens
    config = SAETrainerConfig(total_training_samples=steps * tokens, train_batch_size_samples=tokens, **rates)
    # with both options the backward pass fails: its sparse tensors have no `view` (sae-lens 6.54, torch 2.13)
    options = {"use_sparse_activations": sparse, "rescale_acts_by_decoder_norm": not sparse}
    sae = make(configure(d_in=d_in, d_sae=args.d_sae, k=K, **options))
    states = (tokens.states for _, tokens in ActivationCache(cache, KEY, "float32").batches((0, 0)))
    batches = mixing_buffer(8 * args.batch_tokens, args.batch_tokens, states)
    clock, times = CLOCKS[args.clock], []

    def timed() -> Iterator[torch.Tensor]:
        for batch in batches:
            times.append(clock())  # a step begins
            yield batch

    SAETrainer(config, sae, timed()).fit()
    times.append(clock())
    return (times[-1] - times[SETTLING_STEPS]) / args.steps


TRAINERS = {
    "segcompass": train_ours,
    "SAELens": lambda *given: train_sae_lens(*given, sparse=False),
    "SAELens, sparse": lambda *given: train_sae_lens(*given, sparse=True),
}


def alone(work: Callable[[], float | None]) -> tuple[float | None, float]:
    """What `work` returns in a process of its own, and the peak of its memory in bytes, less that of its start."""

    def run(answers) -> None:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
        answers.put((work(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident))

    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=run, args=(answers,))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the run ended with exit code {process.exitcode}; its message is above.")
    return answers.get()


def compare(args: argparse.Namespace) -> list[dict]:
    """Both trainers for every width, in turns."""
    rows = []
    for d_in in args.d_in:
        with tempfile.TemporaryDirectory() as cache:
            alone(lambda d_in=d_in, cache=cache: write_cache(cache, d_in, max(16_384, 8 * args.batch_tokens)))
            found = {name: [] for name in TRAINERS}
            for _ in range(args.turns):
                for name, train in TRAINERS.items():
                    try:
                        run = alone(lambda train=train, d_in=d_in, cache=cache: train(cache, d_in, args))
                    except RuntimeError:  # whose message was printed
                        continue
                    found[name].append(run)
                    print(d_in, name, run, flush=True)
        for name, runs in found.items():
            row = {"d_in": d_in, "trainer": name, "runs": runs}
            if runs:
                row["tokens_per_second"] = args.batch_tokens / min(seconds for seconds, _ in runs)
                row["peak_bytes"] = min(peak for _, peak in runs)
            rows.append(row)
    return rows


def sae_step(sae: SegCompassSae, states: torch.Tensor) -> None:
    sae.zero_grad()
    sae(states, output_feature_acts=False).loss.backward()


def sparse_against_dense(args: argparse.Namespace) -> list[dict]:
    """Seconds of forward and backward by the number of features for each active one."""
    rows = []
    for ratio in (8, 16, 32, 64, 128, 512):
        torch.manual_seed(0)
        sae = SegCompassSae(SegCompassSaeConfig(d_in=576, d_sae=ratio * K, k=K, architecture=args.architecture))
        states, row = torch.randn(args.batch_tokens, 576), {"features_per_active": ratio}
        for _ in range(args.turns + 1):
            for name, limit in (("sparse", 1), ("dense", float("inf"))):
                sparse_features_segcompass.SPARSE_FROM["cpu"] = limit
                start = CLOCKS[args.clock]()
                sae_step(sae, states)
                row[name] = min(row.get(name, float("inf")), CLOCKS[args.clock]() - start)
        rows.append(row)
        print(row, flush=True)
    return rows


def overlap(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step by the clock on the wall: harvest alone, training alone, and both at once."""
    model, tokenizer = small_vlm(
        576, 4, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, head_dim=64
    )
    data = [{"images": [None], "texts": ["a b " * 64]} for _ in range(64)]
    harvester = ActivationHarvester(model, RowEncoder(tokenizer), 4)
    sae = SegCompassSae(SegCompassSaeConfig(d_in=576, d_sae=4096, k=K, architecture="topk"))
    batch, steps = 512, 2 * args.steps

    def seconds(harvest: bool, train: bool) -> float:
        buffer = ActivationBuffer(HarvestedTokens(harvester, RowStream(data), 4), batch, 4 * batch)
        states = buffer.next_batch()["hidden_states"]
        for _ in range(3):  # the rest of the first block, which nothing overlaps with
            buffer.next_batch()
        if not harvest:
            buffer.close()
        start = time.monotonic()
        for _ in range(steps):
            states = buffer.next_batch()["hidden_states"] if harvest else states
            if train:
                sae_step(sae, states)
        taken = time.monotonic() - start
        buffer.close()
        return taken / steps

    found = {"harvest": seconds(True, False), "training": seconds(False, True), "both": seconds(True, True)}
    print(found, flush=True)
    return found


def table(report: dict) -> str:
    lines = []
    if "trainers" in report:
        lines += ["| d_in | trainer | tokens per second | peak memory |", "|---|---|---|---|"]
        for row in report["trainers"]:
            cells = "fails | "
            if row["runs"]:
                cells = f"{row['tokens_per_second']:,.0f} | {row['peak_bytes'] / 2**20:,.0f} MiB"
            lines.append(f"| {row['d_in']:,} | {row['trainer']} | {cells} |")
    if "sparse" in report:
        lines += ["", "| features for each active one | sparse step, s | dense step, s |", "|---|---|---|"]
        lines += [
            f"| {row['features_per_active']} | {row['sparse']:.3f} | {row['dense']:.3f} |" for row in report["sparse"]
        ]
        times = report["overlap"]
        lines += ["", "| harvest of a batch, s | training on it, s | both, one in a thread, s |", "|---|---|---|"]
        lines.append(f"| {times['harvest']:.3f} | {times['training']:.3f} | {times['both']:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, nargs="*", default=[576, 1536, 4096], help="widths (%(default)s)")
    parser.add_argument("--d-sae", type=int, default=16_384, help="features (%(default)s)")
    parser.add_argument("--architecture", choices=("topk", "batchtopk"), default="topk")
    parser.add_argument("--batch-tokens", type=int, default=1024, help="of a step (%(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="that are timed (%(default)s)")
    parser.add_argument("--turns", type=int, default=2, help="runs of each, of which the best counts (%(default)s)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--parts", action="store_true", help="sparse and overlapped steps in place of the trainers")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    versions = {"Python": platform.python_version(), "torch": torch.__version__}
    report = {"settings": {name: value for name, value in vars(args).items() if name != "output"}}
    if args.parts:
        report |= {"sparse": sparse_against_dense(args), "overlap": overlap(args)}
    else:
        import sae_lens  # once, before processes are forked

        versions["sae-lens"] = sae_lens.__version__
        report["trainers"] = compare(args)
    report |= {"versions": versions | {"transformers": transformers.__version__}}
    report["threads"] = torch.get_num_threads()
    output = args.output.with_name(args.output.name + ("_parts" if args.parts else ""))
    output.parent.mkdir(exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    used = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    note = (
        f"`{args.architecture}`, {args.d_sae:,} features of which {K} are active, {args.batch_tokens:,} tokens a step"
    )
    note += f", {report['threads']} thread(s), seconds of {args.clock} clock; {used}."
    output.with_suffix(".md").write_text(f"{table(report)}\n\n{note}\n")
    print(table(report))


if __name__ == "__main__":
    main()
