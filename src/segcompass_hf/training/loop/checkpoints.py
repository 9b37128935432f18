"""Checkpoints that are whole or not there: written aside, listed, renamed; and found again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from accelerate.utils import broadcast_object_list, is_peft_model
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from transformers.utils import logging

from ...files import SAFETENSORS_PART, flush_to_disk, follow_umask, full_disk_in_words
from ...locks import alone_with
from .stop_signals import StopCallback
from .weights import check_shards_fit, check_weights_fit, forget_tied_names

logger = logging.get_logger(__name__)

ASIDE = "_unfinished"  # in the output folder; the underscore keeps it out of what Trainer pushes to the Hub
LIST_OF_FILES = "checkpoint_files.json"
_CHECKPOINT = re.compile(rf"^{PREFIX_CHECKPOINT_DIR}-(\d+)$")
_REPLACED = "replaced-"
_LOCK = "_lock"  # in the output folder while a process trains in it


def list_files(folder: str | Path) -> None:
    """Write `checkpoint_files.json`: every file of a folder and its size in bytes, flushed to the disk."""
    folder = Path(folder)
    sizes = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != LIST_OF_FILES):
        sizes[file.relative_to(folder).as_posix()] = file.stat().st_size
        flush_to_disk(file)
    listing = folder / LIST_OF_FILES
    listing.write_text(json.dumps(sizes, indent=1))
    flush_to_disk(listing)


def what_is_missing(folder: str | Path) -> str | None:
    """Why a checkpoint is not whole, or `None` where it is.

    One with a list of its files must hold all of them in the size listed; one without, as a plain Trainer writes it,
    must hold the trainer state, which is written last.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    listing = folder / LIST_OF_FILES
    try:
        if not listing.is_file():
            json.loads((folder / "trainer_state.json").read_text())
            return None
        for name, size in json.loads(listing.read_text()).items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (folder / name).stat().st_size != size:
                return f"{name} has {(folder / name).stat().st_size} bytes, not {size}"
    except (OSError, ValueError) as error:
        return f"{error}"
    return None


def find_last_whole(output_dir: str | Path) -> Path | None:
    """The whole checkpoint of the highest step, `None` before the first; broken ones after it are named in a warning.

    Raises:
        ValueError: There are checkpoints, and none is whole.
    """
    found = [(int(match[1]), path) for path in Path(output_dir).glob("*") if (match := _CHECKPOINT.match(path.name))]
    broken = []
    for _, path in sorted(found, reverse=True):
        missing = what_is_missing(path)
        if missing is None:
            if broken:
                logger.warning(f"not whole and passed over: {'; '.join(broken)}.")
            return path
        broken.append(f"{path.name} ({missing})")
    if not broken:
        return None
    raise ValueError(
        f"No valid checkpoint found in output directory ({output_dir}): none of {len(broken)} is whole: "
        f"{'; '.join(broken)}. Leave resume_from_checkpoint out to start anew."
    )


def remove_leftovers(output_dir: str | Path) -> list[str]:
    """Remove what an interrupted save left, and put back a checkpoint that it was about to replace.

    No other process may be writing into the folder: what safetensors has not renamed yet goes as well.

    Returns:
        `list[str]`: names of the unfinished checkpoints.
    """
    for path in Path(output_dir).glob(SAFETENSORS_PART):
        path.unlink(missing_ok=True)
    aside = Path(output_dir) / ASIDE
    if not aside.is_dir():
        return []
    unfinished = []
    for path in sorted(aside.iterdir()):
        name = path.name.removeprefix(_REPLACED)
        if path.name != name and not (Path(output_dir) / name).exists():
            path.rename(Path(output_dir) / name)
        elif path.name == name:
            unfinished.append(name)
    shutil.rmtree(aside, ignore_errors=True)
    return unfinished


def discard(checkpoint: str | Path) -> None:
    """Delete a checkpoint in a way that never leaves half of one under its name."""
    checkpoint = Path(checkpoint)
    aside = checkpoint.parent / ASIDE / checkpoint.name
    aside.parent.mkdir(exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def publish(aside: Path, final: Path) -> None:
    """Rename a finished checkpoint to its place, over an older one of the same step if there is one."""
    replaced = aside.parent / f"{_REPLACED}{final.name}"
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    aside.rename(final)
    flush_to_disk(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    """What could not be written to its end takes no room."""
    try:
        yield
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise


class WholeCheckpointsMixin:
    """Trainer part whose checkpoints are whole at any moment and are resumed from only where they fit the model.

    `resume_from_checkpoint=True` starts anew where there is no checkpoint yet, so that one command survives a kill at
    any moment, and does nothing where the run has reached its end. Ctrl-C and SIGTERM let the step end, save a
    checkpoint of it and end the program ([`StopCallback`]). A second process that trains in the same output folder is
    refused. A subclass writes further files of a checkpoint in `save_loop_state`.
    """

    resumed_from: str | None = None  # the checkpoint that the last call of `train` went on from
    _saving_aside = False
    _delayed_push = False

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        stop = StopCallback(self)
        with self._alone_in_output_dir():
            self.resumed_from = self._prepare_output_dir(resume_from_checkpoint)
            if self.resumed_from is not None:
                self._check_fit(self.resumed_from)
            hook = self.model.register_load_state_dict_post_hook(forget_tied_names)  # of which Trainer would warn
            self.add_callback(stop)
            try:
                output = super().train(self.resumed_from, trial, ignore_keys_for_eval)
                stop.leave("behind its last step")
                return output
            finally:
                stop.restore()
                self.remove_callback(stop)
                hook.remove()

    @contextlib.contextmanager
    def _alone_in_output_dir(self) -> Iterator[None]:
        """Raise `FileExistsError` in every process where another run trains in the output folder."""
        output, refused = Path(self.args.output_dir), [None]
        with contextlib.ExitStack() as stack:
            if self.accelerator.is_main_process:
                output.mkdir(parents=True, exist_ok=True)
                refusal = f"another process is training in {output}; wait for it, end it, or name another output_dir."
                try:
                    stack.enter_context(alone_with(output / _LOCK, refusal))
                except FileExistsError as error:
                    refused = [error]
            broadcast_object_list(refused)
            if refused[0] is not None:
                raise refused[0]
            yield

    def set_initial_training_values(self, args, dataloader):
        """Of a run that its checkpoint has brought to the end, no epoch is left: Trainer would take one step more."""
        epochs, steps_in_epoch, *others, max_steps = super().set_initial_training_values(args, dataloader)
        if self.resumed_from is not None:
            checkpoint = Path(self.resumed_from)
            done = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
            if done >= max_steps:
                logger.warning(f"{checkpoint} is the end of a run of {max_steps} steps: nothing is left to train.")
                epochs = done // steps_in_epoch
        return epochs, steps_in_epoch, *others, max_steps

    def _check_fit(self, checkpoint: str) -> None:
        if self.is_deepspeed_enabled:
            return  # loads its own files strictly
        if not self.is_fsdp_enabled:
            check_weights_fit(checkpoint, self.model)
        elif self.accelerator.is_fsdp2 and not is_peft_model(self.model):  # of PEFT models it holds the adapters alone
            check_shards_fit(checkpoint, self.model)

    def _prepare_output_dir(self, resume_from_checkpoint: str | bool | None) -> str | None:
        if self.args.should_save:
            for name in remove_leftovers(self.args.output_dir):
                logger.warning(f"removed {name} from {self.args.output_dir}: it had not been saved completely.")
        self.accelerator.wait_for_everyone()
        if resume_from_checkpoint is True:
            chosen: list = [None]
            if self.accelerator.is_main_process:
                try:
                    chosen = [find_last_whole(self.args.output_dir)]
                except ValueError as error:
                    chosen = [error]
            broadcast_object_list(chosen)
            if isinstance(chosen[0], ValueError):
                raise chosen[0]
            resume_from_checkpoint = chosen[0] and str(chosen[0])
            if resume_from_checkpoint is None:
                logger.warning(f"{self.args.output_dir} holds no checkpoint: training starts anew.")
            else:
                logger.warning(f"resuming from {resume_from_checkpoint}, the last whole checkpoint.")
        elif resume_from_checkpoint:
            missing = what_is_missing(resume_from_checkpoint)
            if missing is not None:
                raise ValueError(
                    f"{resume_from_checkpoint} is no whole checkpoint: {missing}. Take another one, or "
                    "resume_from_checkpoint=True for the last whole one of the output folder."
                )
        return resume_from_checkpoint or None

    def _get_output_dir(self, trial) -> str:
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, ASIDE) if self._saving_aside else run_dir

    def _save_checkpoint(self, model, trial) -> None:
        """Write a checkpoint aside, wait for all processes, then rename it; the oldest ones go afterwards."""
        self.check_weights_finite(model, f"at the save of step {self.state.global_step}")
        run_dir = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        aside, final = run_dir / ASIDE / name, run_dir / name
        with _removed_on_failure(aside), full_disk_in_words(run_dir):  # told before there is room again
            self._saving_aside = True
            try:
                with self._names_of_the_model():
                    super()._save_checkpoint(model, trial)
            finally:
                self._saving_aside = False
            if not self.args.save_only_model:
                self.save_loop_state(aside)
            self._note_best(aside, final)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                follow_umask(aside)
                list_files(aside)
                publish(aside, final)
        self.accelerator.wait_for_everyone()
        if self.is_local_process_zero() and aside.exists() and not final.exists():
            with contextlib.suppress(FileNotFoundError):  # a network disk may show what is gone
                aside.rename(final)  # random states of a node that does not share the main one's disk
        if self._delayed_push:
            self._delayed_push = False
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            self._rotate(run_dir)
            shutil.rmtree(run_dir / ASIDE, ignore_errors=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with full_disk_in_words(self.args.output_dir if output_dir is None else output_dir):
            super().save_model(output_dir, _internal_call)
        if self.args.should_save and not self._saving_aside:
            follow_umask(self.args.output_dir if output_dir is None else output_dir)

    def save_loop_state(self, folder: Path) -> None:
        """Called by every process: add to a checkpoint what is no part of Trainer's."""

    def _note_best(self, aside: Path, final: Path) -> None:
        """The best checkpoint is known by its final name; the state, written before, is corrected."""
        if self.state.best_model_checkpoint is not None and Path(self.state.best_model_checkpoint) == aside:
            self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(str(aside / "trainer_state.json"))

    def _rotate(self, run_dir: Path) -> None:
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        if limit is None or limit <= 0:
            return
        checkpoints = sort_checkpoints(str(run_dir), use_mtime=True)
        kept = {checkpoints[-1]} | ({str(Path(best))} if best is not None else set())
        surplus = len(checkpoints) - max(limit, len(kept))
        for checkpoint in [path for path in checkpoints if path not in kept][: max(surplus, 0)]:
            discard(checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._saving_aside:
            self._delayed_push = True  # the upload runs in the background, from the folder's final name
        else:
            super()._push_from_checkpoint(checkpoint_folder)

    @contextlib.contextmanager
    def _names_of_the_model(self):
        """Within it a transformers model saves its weights under the names it loads them by.

        `save_pretrained` writes a VLM's older names by default, which resuming would not find.
        """
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not isinstance(model, PreTrainedModel):
            yield
            return
        own = vars(model).get("save_pretrained")
        save_pretrained = model.save_pretrained

        def save(*args, **kwargs):
            kwargs.setdefault("save_original_format", False)
            return save_pretrained(*args, **kwargs)

        model.save_pretrained = save
        try:
            yield
        finally:
            if own is None:
                del model.save_pretrained
            else:
                model.save_pretrained = own

    def _load_best_model(self) -> None:
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            check_weights_fit(self.state.best_model_checkpoint, self.model)
        super()._load_best_model()
