"""One line instead of a traceback where lm-eval fails on a user's task or data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from datasets.exceptions import DatasetGenerationError, DatasetsError
from jinja2 import TemplateError

from forgetless.errors import RecipeError


@contextmanager
def told(name: str, files: Sequence[Path] = ()) -> Iterator[None]:
    """Inside the block, what lm-eval raises for a task becomes one line.

    Args:
        name: The task, or the folder of tasks.
        files: Where its rows come from, as far as they are files.

    Raises:
        RecipeError: With the first line of what went wrong.
    """
    data = f"its data ({', '.join(map(str, files))})" if files else "its data"
    try:
        yield
    except RecipeError:
        raise
    except DatasetGenerationError as error:
        # Its own words are "an error occurred".
        raise RecipeError(
            f"lm_eval: expected rows that can be read for {name}, got: "
            f"{_first_line(error.__cause__ or error)}; check {data}"
        ) from error
    except (ConnectionError, FileNotFoundError) as error:
        missing = error.filename if isinstance(error, FileNotFoundError) else None
        if missing is not None:
            raise RecipeError(
                f"lm_eval: expected a file for {name}, got {missing}, which is none; check what "
                "its file names"
            ) from error
        raise RecipeError(
            f"lm_eval: expected the data of {name}, got: {_first_line(error)}; it needs the hub "
            "once, or use a task that reads local files (docs/lm-eval.md)"
        ) from error
    except TemplateError as error:
        raise RecipeError(
            f"lm_eval: expected a template that fits the rows of {name}, got: "
            f"{_first_line(error)}; check its file"
        ) from error
    except StopIteration as error:
        raise RecipeError(f"lm_eval: expected rows for {name}, got none; check {data}") from error
    except (DatasetsError, OSError, ImportError) as error:
        raise RecipeError(
            f"lm_eval: expected a task that loads, got for {name}: {_first_line(error)}; check its "
            f"file and {data}"
        ) from error
    except RecursionError as error:
        raise RecipeError(
            f"lm_eval: expected groups that end in tasks, got {name}, which holds itself; mend "
            "its file"
        ) from error
    except (
        *(LookupError, TypeError, ValueError, AttributeError),
        *(AssertionError, ArithmeticError, RuntimeError),
    ) as error:
        raise RecipeError(
            f"lm_eval: expected a task that fits its rows, got for {name}: "
            f"{type(error).__name__}: {_first_line(error)}; check its file and the columns of "
            f"{data}"
        ) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
