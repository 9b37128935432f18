# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The same shards on a cluster: Ray Data deals them to workers that hold the model; what a dead one had, anew.

Needs `pip install 'segcompass_hf[ray]'`. Data set, checkpoint and output are places that every machine reaches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .._lazy import named_extras
from ..allocator import keep_freed_memory
from .job import PredictionJob
from .output import OutputFolder
from .running import PredictionSummary, Progress, begin, check_share, expected_rows, finish, write_shards


class ShardWorker:
    """What one worker does: it loads the model once, and answers the shards that it is given.

    Args:
        job ([`PredictionJob`]): What to ask.
        source ([`Source`]): The data set, as the first process has listed it.
    """

    def __init__(self, job: PredictionJob, source: Any):
        self.job, self.source, self.output = job, source, OutputFolder(job.output)
        keep_freed_memory()  # of a process that Ray has started for this alone
        self.predictor = job.load_predictor()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        """Answer and write the shards of `batch["number"]`; their `number`, `rows` and `errors`."""
        numbers = [int(number) for number in batch["number"]]
        shards = [self.source.shards[number] for number in numbers]
        counts = list(write_shards(self.job, self.predictor, self.source, self.output, shards))
        return {"number": numbers} | {name: [found[name] for found in counts] for name in ("rows", "errors")}


def predict_dataset_with_ray(
    job: PredictionJob,
    workers: int | None = None,
    share: tuple[int, int] = (0, 1),
    resume: bool = True,
    on_progress: Callable[[Progress], None] | None = None,
) -> PredictionSummary:
    """As [`predict_dataset`], by actors of a Ray cluster; the rows are the same.

    It joins the cluster that `RAY_ADDRESS` names, or that this machine belongs to, else it starts one here. A worker
    that dies is replaced, and its shard is answered again.

    Args:
        job ([`PredictionJob`]): What to ask. Its places are reached from every machine of the cluster.
        workers (`int`, *optional*): Actors, each with a model of its own; one per GPU of the cluster by default, or
            one where there is none.
        share, resume: As in [`predict_dataset`].
        on_progress (`Callable`, *optional*): Called with a [`Progress`] after each shard.

    Raises:
        MissingExtraError: Ray is not installed.
        ValueError, OSError: As in [`predict_dataset`], also from the workers.
    """
    with named_extras():
        import ray
        import ray.data
    check_share(share, resume)
    output = OutputFolder(job.output)
    with output.alone(share):
        source = job.open_source()
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        workers = workers or int(ray.cluster_resources().get("GPU", 0)) or 1
        with _errors_of_workers(ray):
            settings = ray.get(ray.remote(num_gpus=gpus)(_settings).remote(job, source))
            left = begin(settings, source, output, share, resume)
            started = time.perf_counter()
            progress = Progress(total=expected_rows(job, [source.shards[number] for number in left]))
            for counts in _answered(ray, job, source, left, workers, gpus):
                progress.done += counts["rows"]
                progress.errors += counts["errors"]
                if on_progress is not None:
                    on_progress(progress)
        return finish(source, output, share, left, time.perf_counter() - started)


def _settings(job: PredictionJob, source: Any) -> dict[str, Any]:
    """Made by a worker: the first machine need not be able to load the model."""
    return job.settings(job.load_predictor(), source)


def _answered(
    ray: Any, job: PredictionJob, source: Any, numbers: list[int], workers: int, gpus: int
) -> Iterator[dict[str, Any]]:
    """The counts of each shard, as it is written; a task of Ray's is a shard."""
    if not numbers:
        return
    ray.data.DataContext.get_current().enable_progress_bars = False
    shards = ray.data.from_items([{"number": number} for number in numbers], override_num_blocks=len(numbers))
    done = shards.map_batches(
        ShardWorker,
        fn_constructor_args=(job, source),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(numbers))),
        num_gpus=gpus,
    )
    yield from done.iter_rows()


@contextmanager
def _errors_of_workers(ray: Any) -> Iterator[None]:
    """What a worker has raised, as if it had been raised here."""
    try:
        yield
    except ray.exceptions.RayError as error:
        cause = error
        while isinstance(cause, ray.exceptions.RayError):
            inner = getattr(cause, "cause", None) or cause.__cause__
            if not isinstance(inner, Exception):
                break
            cause = inner
        if isinstance(cause, ValueError | OSError):
            raise cause from None
        raise


__all__ = ["ShardWorker", "predict_dataset_with_ray"]
