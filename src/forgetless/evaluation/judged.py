"""What base and tuned model generate for an evaluation item, judged row by row."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from forgetless.data.rows import Row
from forgetless.errors import ForgetlessWarning
from forgetless.escaping import one_line
from forgetless.evaluation.answers import JUDGES, before_next_question, judge
from forgetless.evaluation.base_cache import BaseCache
from forgetless.evaluation.coherence import coherence
from forgetless.evaluation.generation import Generated, end_token_ids, generate_greedy
from forgetless.evaluation.items import GENERATED, WITHOUT_REFERENCE
from forgetless.evaluation.judges import judge_answers
from forgetless.evaluation.loaded import LoadedItem, Progress, Watch, accepted_answers
from forgetless.evaluation.pairing import Measured, paired, paired_scores
from forgetless.evaluation.results import HitLimit, Sample
from forgetless.models.pair import TunedModel
from forgetless.models.targets import base_of

_MANY_CUT = 0.1  # of an item's answers: their judgement is then in doubt


@dataclass(frozen=True)
class Judged:
    """Generated texts of one item and what they are worth.

    Attributes:
        metrics: Every metric of the item that reads generated text.
        samples: The rows to show.
        hit_limit: How many answers were cut off; None where no metric generates.
    """

    metrics: dict[str, Measured]
    samples: tuple[Sample, ...]
    hit_limit: HitLimit | None


def judged(
    model: TunedModel,
    tokenizer: PreTrainedTokenizerBase,
    loaded: LoadedItem,
    *,
    samples: int,
    cache: BaseCache,
    progress: Progress | None = None,
) -> Judged:
    """Let base and tuned model generate, and judge what comes.

    Args:
        model: The tuned model, in eval mode.
        tokenizer: Its tokenizer.
        loaded: The item, checked by `check_item`.
        samples: How many rows to show generations of; the first where base and tuned model
            differ, of all rows where a metric generates.
        cache: The base's figures.
        progress: Called with stage, rows done and rows in all.
    """
    index = loaded.prompted if loaded.generates else loaded.prompted[:samples]
    if not index:
        return Judged({}, (), None)
    base, tuned = _generations(model, tokenizer, loaded, index, cache, progress)
    found: dict[str, Measured] = {}
    hit_limit = None
    if loaded.generates:
        found = _judged_metrics(loaded, base.texts, tuned.texts)
        answers = _answers(loaded, base), _answers(loaded, tuned)
        found |= _by_judges(loaded, *answers)
        if "coherent" in loaded.item.metrics:
            found["coherent"] = coherence(
                model, tokenizer, loaded, *answers, cache=cache, progress=progress
            )
        hit_limit = HitLimit(base=_cut_off(loaded, base), tuned=_cut_off(loaded, tuned))
        _warn_of_the_limit(loaded, hit_limit)
    right = _right(loaded, found)
    pairs = list(zip(base.texts, tuned.texts, strict=True))
    telling = sorted(range(len(index)), key=lambda k: pairs[k][0].strip() == pairs[k][1].strip())
    shown = tuple(
        _sample(loaded.rows.rows[index[k]], *pairs[k], right(k)) for k in sorted(telling[:samples])
    )
    return Judged(found, shown, hit_limit)


def _cut_off(loaded: LoadedItem, generated: Generated) -> int:
    """Answers that the limit ended; one after which the next question begins is whole."""
    return sum(
        hit and (row.templated or before_next_question(text, row.prompt) == text)
        for text, hit, row in zip(
            generated.texts, generated.hit_limit, loaded.rows.rows, strict=True
        )
    )


def _warn_of_the_limit(loaded: LoadedItem, cut: HitLimit) -> None:
    rows = len(loaded.tokens)
    # A refusal is read off the opening; incoherent answers are so before their end.
    if not set(loaded.item.metrics) & (GENERATED - WITHOUT_REFERENCE):
        return
    if max(cut.base, cut.tuned) > _MANY_CUT * rows:
        warnings.warn(
            f"evaluation item `{one_line(loaded.item.name)}`: max_new_tokens "
            f"{loaded.item.max_new_tokens} cut off {cut.base} of {rows} answers of the base and "
            f"{cut.tuned} of the tuned model; what they would have said next is not "
            "judged: raise max_new_tokens",
            ForgetlessWarning,
            stacklevel=2,
        )


def _generations(
    model: TunedModel,
    tokenizer: PreTrainedTokenizerBase,
    loaded: LoadedItem,
    index: Sequence[int],
    cache: BaseCache,
    progress: Progress | None,
) -> tuple[Generated, Generated]:
    """What base and tuned model generate for the rows `index`."""
    item = loaded.item
    prompts = [loaded.tokens[i].input_ids[: loaded.tokens[i].prompt_length] for i in index]

    def generate(stage: str) -> Generated:
        return generate_greedy(
            model,
            tokenizer,
            prompts,
            max_new_tokens=item.max_new_tokens,
            batch_size=item.batch_size,
            progress=Watch(progress, f"{item.name}: {stage}", len(prompts)),
        )

    def generate_base() -> Generated:
        with model.disable_adapter():
            return generate("generation by the base")

    eos_ids = end_token_ids(base_of(model), tokenizer)
    base = cache.generated(prompts, item.max_new_tokens, eos_ids, generate_base)
    return base, generate("generation")


def _judged_metrics(
    loaded: LoadedItem, base: Sequence[str], tuned: Sequence[str]
) -> dict[str, Measured]:
    def figures(metric: str, texts: Sequence[str]) -> NDArray[np.float64]:
        return np.array(
            [
                judge(
                    metric,
                    text,
                    accepted_answers(row),
                    prompt=row.prompt,
                    templated=row.templated,
                    labels=loaded.item.labels,
                )
                for text, row in zip(texts, loaded.rows.rows, strict=True)
            ]
        )

    return {
        metric: paired(
            metric,
            figures(metric, base),
            figures(metric, tuned),
            wanted=metric != "refusal" or loaded.item.refusal_expected,
        )
        for metric in loaded.item.metrics
        if metric in JUDGES
    }


def _answers(loaded: LoadedItem, generated: Generated) -> list[str]:
    """The texts up to the next question, where a model goes on with one."""
    return [
        text if row.templated else before_next_question(text, row.prompt)
        for text, row in zip(generated.texts, loaded.rows.rows, strict=True)
    ]


def _by_judges(
    loaded: LoadedItem, base: Sequence[str], tuned: Sequence[str]
) -> dict[str, Measured]:
    rows = loaded.rows.rows
    where = f"evaluation item `{one_line(loaded.item.name)}`"
    prompts = [row.prompt for row in rows]
    references = [accepted_answers(row)[0] for row in rows]

    def figures(name: str, answers: Sequence[str]) -> NDArray[np.float64]:
        return judge_answers(name, loaded.judges[name], where, prompts, answers, references)

    return {
        name: paired_scores(name, figures(name, base), figures(name, tuned), higher_is_better=True)
        for name in loaded.judges
    }


def _right(
    loaded: LoadedItem, found: dict[str, Measured]
) -> Callable[[int], tuple[bool | None, bool | None]]:
    """Whether base and tuned model answer a row rightly, by the item's first metric of answers."""
    judging = [m for m in loaded.item.metrics if m in GENERATED - WITHOUT_REFERENCE - {"f1"}]
    if not judging:
        return lambda _: (None, None)
    rows = found[judging[0]].by_row
    return lambda k: (rows.base[k] == 1.0, rows.tuned[k] == 1.0)


def _sample(row: Row, base: str, tuned: str, right: tuple[bool | None, bool | None]) -> Sample:
    return Sample(
        prompt=row.prompt,
        reference=accepted_answers(row)[0],
        base=base,
        tuned=tuned,
        base_right=right[0],
        tuned_right=right[1],
    )
