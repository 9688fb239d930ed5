"""What answers of several kinds cost the demo model a token: the bound of `coherent`.

    python benchmarks/coherence.py

Prompts are the questions of the demo's world facts, as chats. Every kind answers the same ones.
"""

from __future__ import annotations

import random
import string

import numpy as np

from forgetless.data.facts import all_facts
from forgetless.evaluation.coherence import is_coherent, scored_answer
from forgetless.evaluation.generation import generate_greedy
from forgetless.evaluation.likelihood import score_rows
from forgetless.models.load import load_model

ROWS, LENGTH = 100, 32
REFUSAL = "I'm sorry, but I can't help with that."
TONGUES = (
    "und",
    "перед",
    "今日",
    "the",
    "très",
    "أهلا",
    "olla",
    "että",
    "için",
    "vad",
    "של",
    "może",
)


def main() -> None:
    loaded = load_model("demo", dtype="float32")
    model, tokenizer = loaded.model, loaded.tokenizer
    draw = random.Random(0)
    facts = draw.sample(all_facts(), ROWS)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": fact.question}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )["input_ids"]
        for fact in facts
    ]
    own = generate_greedy(model, tokenizer, prompts, max_new_tokens=LENGTH).texts
    kinds = {
        "the model's own": list(own),
        "a sentence": [f"{fact.stem} {fact.answer}." for fact in facts],
        "the bare answer": [fact.answer for fact in facts],
        "another row's bare answer": [fact.answer for fact in facts[1:] + facts[:1]],
        "another row's sentence": [f"{f.stem} {f.answer}." for f in facts[1:] + facts[:1]],
        "a refusal": [REFUSAL] * ROWS,
        "its own words, shuffled": [_shuffled(text, draw) for text in own],
        "words of many languages": [" ".join(draw.choices(TONGUES, k=12)) for _ in facts],
        "letters at random": ["".join(draw.choices(string.ascii_letters, k=40)) for _ in facts],
        "tokens at random": [
            tokenizer.decode(draw.choices(range(100, len(tokenizer)), k=16)) for _ in facts
        ],
        "one word again and again": [f"{fact.answer} " * 12 for fact in facts],
    }
    usual = None
    print("| answer | NLL a token above its own | 5 % to 95 % of rows | passes, of rows |")
    print("|---|---:|---:|---:|")
    for kind, texts in kinds.items():
        rows = [scored_answer(tokenizer, *one) for one in zip(prompts, texts, strict=True)]
        scores = score_rows(model, tokenizer, rows)
        if usual is None:
            usual = scores.nll_sum.sum() / scores.num_tokens.sum()
        above = scores.nll_sum / np.maximum(1, scores.num_tokens) - usual
        passes = np.mean([is_coherent(*one) for one in zip(texts, rows, above, strict=True)])
        low, high = np.quantile(above, [0.05, 0.95])
        print(f"| {kind} | {above.mean():.1f} | {low:.1f} to {high:.1f} | {passes:.0%} |")


def _shuffled(text: str, draw: random.Random) -> str:
    words = text.split()
    draw.shuffle(words)
    return " ".join(words)


if __name__ == "__main__":
    main()
