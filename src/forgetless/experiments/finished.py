"""A run that has a record already: left alone, given another label, or measured again."""

from __future__ import annotations

from forgetless.errors import RecipeError
from forgetless.experiments.checks import data_of, measured_files
from forgetless.experiments.data_files import changed_files
from forgetless.experiments.describe import label_of
from forgetless.experiments.mending import mend
from forgetless.experiments.model_files import changed_model_files
from forgetless.experiments.numbers import join_words
from forgetless.experiments.output import SHOWING, RunFolder, completed, differing, plain_recipe
from forgetless.experiments.product import product_of
from forgetless.experiments.progress import Progress
from forgetless.experiments.record import Record, load_record, save_record
from forgetless.experiments.report import write_report
from forgetless.recipe import Recipe
from forgetless.training.checkpoint import latest_checkpoint


def settle(recipe: Recipe, folder: RunFolder, heard: Progress) -> bool:
    """Whether the record in the folder stands for this recipe; False where it must be made again.

    Only what is measured may differ: `RunFolder.check` refuses the rest.

    Raises:
        RecipeError: Data or the model have changed since, or nothing is left to measure again.
        ArtefactError: The adapter is gone, and nothing is left to export it from.
    """
    record = load_record(folder.record)
    changed = changed_files(data_of(recipe), record.files)
    if changed:
        raise RecipeError(
            f"{changed[0]}: expected the file that {folder.path} was made from, got one that has "
            "changed since; set output= to another folder, or remove this one"
        )
    edited = changed_model_files(recipe.model, record.model_files)
    if edited:
        raise RecipeError(
            f"model {recipe.model}: expected the model that {folder.path} was made from, got one "
            f"of which {', '.join(edited)} changed since; set output= to another folder to train "
            "on the new one, or put the old one back"
        )
    keys = list(differing(completed(record.recipe), plain_recipe(recipe)))
    files = changed_files(measured_files(recipe), record.files)
    if not keys and not files:
        mend(recipe, folder, record, heard)
        heard.note(f"{folder.path} is finished already; remove it to run again")
        return True
    if SHOWING.issuperset(keys) and not files:
        mend(recipe, folder, record, heard)
        _relabel(recipe, folder, record)
        heard.note(f"{folder.path} is finished already; only {join_words(keys)} is new")
        return True
    names = ", ".join([*keys, *files])
    if latest_checkpoint(folder.checkpoints) is None:
        raise RecipeError(
            f"output {folder.path}: expected a checkpoint to measure again, as {names} changed, "
            "got none; run `forgetless evaluate`, or set output= to another folder"
        )
    heard.note(f"{folder.path} is trained already; it is measured again, as {names} changed")
    return False


def _relabel(recipe: Recipe, folder: RunFolder, record: Record) -> None:
    label = label_of(recipe)
    renamed = record.model_copy(update={"label": label, "recipe": plain_recipe(recipe)})
    folder.claim(recipe)
    product_of(renamed.method, folder).write_card(renamed)
    write_report([renamed], folder.report)
    save_record(renamed, folder.record)
