"""One run, from a recipe to its record, report and exported adapter; called again, it resumes."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from forgetless.errors import ArtefactError
from forgetless.experiments.base_model import load_base
from forgetless.experiments.checks import (
    check_before_loading,
    check_layers,
    check_tasks,
    data_of,
    measured_files,
)
from forgetless.experiments.data_files import hash_files
from forgetless.experiments.describe import describe, skipped_notes
from forgetless.experiments.finished import settle
from forgetless.experiments.measure_run import measure_run
from forgetless.experiments.model_files import stamp_model
from forgetless.experiments.output import Clock, RunFolder
from forgetless.experiments.prepare import Prepared, prepare, training_options
from forgetless.experiments.product import product_of
from forgetless.experiments.progress import Progress, warnings_heard
from forgetless.experiments.record import TrainingFacts, save_record
from forgetless.experiments.regularised import preserve_data, uses_preserve
from forgetless.experiments.report import write_report
from forgetless.experiments.started import Started, start_run
from forgetless.methods import make_any_method
from forgetless.models.cache import cache_dir
from forgetless.models.hardware import peak_memory
from forgetless.models.load import LoadedModel
from forgetless.models.placement import is_sharded
from forgetless.processes import ALONE, Processes, connect
from forgetless.recipe import Recipe
from forgetless.training.batches import share_of_batch
from forgetless.training.callbacks import ReportSteps
from forgetless.training.quiet import libraries_quiet
from forgetless.training.sft import mixed_rows, refuse_data_parallel, train


def run(
    recipe: Recipe,
    *,
    progress: Progress | None = None,
    resume: str | None = None,
    allow_task_code: bool = False,
) -> Path:
    """Do all that a recipe asks for, or what is left of it.

    A folder in which `train_only` has trained is taken up where it stands. Of several processes
    that a launcher has started (torchrun, `accelerate launch`), each calls this: they calibrate,
    solve and train together; the first one writes all files and measures, while the others return
    once training is done. Then the process group has ended: a launched program does one run.

    Args:
        recipe: What to do. Its `output` folder holds `recipe.yaml`, `checkpoints/`, `adapter/` (a
            plain LoRA; `model/` where every weight trains), `record.json` and `report.html` in
            the end.
        progress: Hears of phases, steps, notes and warnings; silent by default.
        resume: Command that does the same again, told to the user on Ctrl-C.
        allow_task_code: Whether the folder `evaluation.lm_eval.include_path` may run Python.

    Returns:
        Path of the record, which in a process other than the first may not be there yet.

    Raises:
        ForgetlessError: The message says where, what was expected, what came, and what to do.
    """
    processes, heard = _connected(recipe, progress)
    folder = RunFolder(recipe.output)

    def is_settled() -> bool:
        folder.check(recipe)
        share_of_batch(recipe.training.batch_size, processes)
        if folder.record.exists() and settle(recipe, folder, heard):
            return True
        _claim(recipe, folder, allow_task_code=allow_task_code)
        return False

    with _kept_on_failure(folder, heard, resume):
        if processes.by_main(is_settled):
            return folder.record
        return _Run(recipe, folder, heard, processes).go(allow_task_code=allow_task_code)


def calibrate_only(
    recipe: Recipe, *, progress: Progress | None = None, resume: str | None = None
) -> Started:
    """Collect second moments into the cache and start the adapter; a later `run` re-uses them."""
    processes, heard = _connected(recipe, progress)
    folder = RunFolder(recipe.output)
    with _kept_on_failure(folder, heard, resume):
        processes.by_main(lambda: _claim(recipe, folder))
        return _Run(recipe, folder, heard, processes).go_to_calibrated()


def train_only(
    recipe: Recipe, *, progress: Progress | None = None, resume: str | None = None
) -> TrainingFacts:
    """Train, and stop before the evaluation; a later `run` of the recipe goes on from there."""
    processes, heard = _connected(recipe, progress)
    folder = RunFolder(recipe.output)
    with _kept_on_failure(folder, heard, resume):
        share_of_batch(recipe.training.batch_size, processes)
        processes.by_main(lambda: _claim(recipe, folder))
        return _Run(recipe, folder, heard, processes).go_to_trained()


def _connected(recipe: Recipe, progress: Progress | None) -> tuple[Processes, Progress]:
    """The processes of this run, and who hears of progress: the first one's user."""
    processes = connect(recipe.device)
    return processes, (progress if progress and processes.is_main else Progress())


def _claim(recipe: Recipe, folder: RunFolder, *, allow_task_code: bool | None = None) -> None:
    """Take the folder, once all that can be checked in a moment has been.

    Without `allow_task_code` nothing will be measured, and tasks are not looked at.
    """
    folder.check(recipe)
    check_before_loading(recipe)
    if allow_task_code is not None:
        check_tasks(recipe, allow_task_code=allow_task_code)
    folder.claim(recipe)


@contextmanager
def _kept_on_failure(folder: RunFolder, heard: Progress, resume: str | None) -> Iterator[None]:
    """Say what is kept and how to go on, where the user or the disk ends a run."""
    try:
        yield
    except KeyboardInterrupt:
        heard.note(
            f"stopped; what is finished is kept in {folder.path}. Resume with "
            f"{'this command:' if resume else 'the same command'}"
        )
        if resume:
            heard.command(resume)
        raise
    except OSError as error:
        where = error.filename or folder.path
        if error.errno != errno.ENOSPC:
            raise ArtefactError(
                f"{where}: could not be read or written ({error.strerror or error}); check the "
                "path and its permissions, or set output= to another folder"
            ) from error
        raise ArtefactError(
            f"{where}: the disk is full; free some space and run the same command again: it resumes"
        ) from error


class _Run:
    """The phases of one run, in order, each announced and timed."""

    def __init__(
        self, recipe: Recipe, folder: RunFolder, progress: Progress, processes: Processes
    ) -> None:
        self.processes = processes
        self.recipe = recipe
        self.folder = folder
        self.progress = progress
        self.clock = Clock(folder.state, writes=processes.is_main)
        self.cache = cache_dir() / "runs"
        self.method = make_any_method(recipe.method)
        self.product = product_of(recipe.method, folder)
        self.warnings: list[str] = []
        self.files: dict[str, str] = {}
        self.model_files: dict[str, str] = {}

    def go_to_calibrated(self) -> Started:
        refuse_data_parallel()
        with libraries_quiet(), warnings_heard(self._warn):
            started = self._prepared()[2]
            self.processes.part()
            return started

    def go_to_trained(self) -> TrainingFacts:
        refuse_data_parallel()
        with libraries_quiet(), warnings_heard(self._warn):
            return self._trained()[3]

    def go(self, *, allow_task_code: bool) -> Path:
        refuse_data_parallel()
        with libraries_quiet(), warnings_heard(self._warn):
            is_main = self.processes.is_main
            loaded, data, started, training = self._trained()
            if not is_main:
                return self.folder.record
            with self._phase("evaluate"):
                evaluation, scaled = measure_run(
                    self.recipe.evaluation,
                    loaded,
                    started,
                    cache=self.cache,
                    advance=self._advance,
                    allow_task_code=allow_task_code,
                )
            with self._phase("export"):
                exported = self._export(loaded, data, started)
        with self._phase("report"):
            record = describe(
                self.recipe,
                loaded,
                data,
                started,
                created=self.clock.created,
                phases=self.clock.phases,
                warnings=self.warnings,
                training=training,
                evaluation=evaluation,
                scaled=scaled,
                export=exported,
                files=self.files,
                model_files=self.model_files,
            )
            self.product.write_card(record)
            write_report([record], self.folder.report)
        record.phases, record.processor = self.clock.phases, self.clock.processor
        record.memory = peak_memory()
        # Last of all: a record says that the run is finished.
        return save_record(record, self.folder.record)

    def _trained(self) -> tuple[LoadedModel, Prepared, Started, TrainingFacts]:
        """What all processes do; then each is on its own, and the first one goes on."""
        loaded, data, started = self._prepared()
        with self._phase("train"):
            training = self._train(loaded, data, started)
            is_main, in_parts = self.processes.is_main, is_sharded(started.model)
            self.processes.part()
            self.processes = ALONE
        if is_main and in_parts:
            # As a resumed run does: it finds itself trained.
            del loaded, data, started
            loaded, data, started = self._prepared()
            with self._phase("train"):
                training = self._train(loaded, data, started)
        return loaded, data, started, training

    def _prepared(self) -> tuple[LoadedModel, Prepared, Started]:
        with self._phase("load"), self.processes.together():
            loaded = self._load()
        with self._phase("data"), self.processes.together():
            data = self._data(loaded)
        with self._phase("calibrate"):
            return loaded, data, self._start(loaded, data)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        with self.progress.phase(name), self.clock.phase(name):
            yield

    def _advance(self, done: int, total: int, what: str = "") -> None:
        self.clock.tick()
        self.progress.advance(done, total, what)

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)
            self.progress.warn(text)

    def _load(self) -> LoadedModel:
        self.model_files = stamp_model(self.recipe.model)
        loaded = load_base(self.recipe, self.progress)
        check_layers(self.recipe, self.method, loaded)
        return loaded

    def _data(self, loaded: LoadedModel) -> Prepared:
        specs = [*data_of(self.recipe), *measured_files(self.recipe)]
        self.files = hash_files(specs)
        data = prepare(
            self.recipe,
            loaded,
            cache=self.cache,
            advance=self._advance,
            note=self.progress.note,
        )
        for text in data.notes:
            self._warn(text)
        if (
            self.recipe.preserve_data
            and "preserve" not in self.method.needs
            and not uses_preserve(self.recipe)
        ):
            self.progress.note(
                f"method {self.method.name} does not calibrate: preserve_data is only kept apart "
                "from the other rows"
            )
        if not self.recipe.evaluation.measures:
            self._warn("evaluation: no items are given, so that nothing is measured")
        return data

    def _start(self, loaded: LoadedModel, data: Prepared) -> Started:
        started = start_run(
            self.recipe,
            self.method,
            loaded,
            data,
            cache=self.cache,
            progress=lambda role, done, total: self._advance(done, total, role),
            processes=self.processes,
        )
        for text in skipped_notes(started.skipped):
            self.progress.note(text)
        return started

    def _train(self, loaded: LoadedModel, data: Prepared, started: Started) -> TrainingFacts:
        options = training_options(self.recipe, self.method)
        preserve = preserve_data(self.recipe, loaded, data, started.moments)
        rows = mixed_rows(data.train_rows, options, preserve, self.recipe.seed)
        self.progress.note(
            f"{options.num_steps(len(rows))} steps at learning rate "
            f"{options.learning_rate:g} ({options.learning_rate_source})"
        )
        return train(
            started.model,
            loaded.tokenizer,
            data.train_rows,
            options=options,
            output=self.folder.checkpoints,
            seed=self.recipe.seed,
            start=started.origin,
            preserve=preserve,
            validation_rows=data.validation_rows,
            callbacks=[ReportSteps(self._advance, resumed=self._tell_resumed)],
        )

    def _tell_resumed(self, step: int) -> None:
        self.progress.note(f"resumed from step {step}")

    def _export(self, loaded: LoadedModel, data: Prepared, started: Started) -> dict[str, Any]:
        probe = torch.tensor([data.train_rows[0].input_ids], device=loaded.device)
        return self.product.write(started.model, loaded, probe)
