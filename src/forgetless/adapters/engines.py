"""What each engine that loads LoRA adapters takes: rules over a folder's configuration and tensors.

A strict reading of the engines' documentation and source, in docs/serving.md as a table: an engine
may take more. The engines themselves are not run here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from forgetless.adapters.plain_lora import BESIDE

# vLLM's choices of max_lora_rank; SGLang is held to them too.
LADDER = (1, 8, 16, 32, 64, 128, 256, 320, 512)
PREFIX = "base_model.model."
A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"
_HEADS = frozenset({"lm_head", "embed_out"})
_PLAIN = "train without it, or merge it with PEFT's merge_and_unload()"
_REWRITE = "forgetless export rewrites it"


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """What a folder holds, as far as rules look at it.

    Attributes:
        config: `adapter_config.json`.
        shapes: Of the tensors, by name.
        base_layers: Linear layers of the base below its head; None where the base is not at hand.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    base_layers: Collection[str] | None = None

    @property
    def layers(self) -> list[str]:
        """Names of the adapted layers."""
        return [
            n.removeprefix(PREFIX).removesuffix(A_SUFFIX)
            for n in self.shapes
            if n.endswith(A_SUFFIX)
        ]

    @property
    def ranks(self) -> set[int]:
        """Of the A and B tensors."""
        return {shape[0] for name, shape in self.shapes.items() if name.endswith(A_SUFFIX)} | {
            shape[1] for name, shape in self.shapes.items() if name.endswith(B_SUFFIX)
        }


# A rule yields a sentence for each breach: "expected X, got Y; what to do".
Rule = Callable[[AdapterFiles], Iterator[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One engine.

    Attributes:
        name: As `--target` calls it.
        rules: All that it asks of a folder.
        ranks: Ranks that it has buffers for, ascending; empty where any rank will do.
        wants_whole_types: Whether a type of layer (`q_proj`) is adapted everywhere or nowhere.
    """

    name: str
    rules: tuple[Rule, ...]
    ranks: tuple[int, ...] = ()
    wants_whole_types: bool = False

    def padded(self, rank: int) -> int:
        """The smallest rank that it serves and that holds `rank`; `rank` itself beyond the last."""
        return next((step for step in self.ranks if step >= rank), rank)

    def breaches(self, files: AdapterFiles) -> list[str]:
        """What it would not take; empty where it takes the folder."""
        return [breach for rule in self.rules for breach in rule(files)]


def is_lora(files: AdapterFiles) -> Iterator[str]:
    """Nothing but LoRA."""
    kind = files.config.get("peft_type")
    if kind != "LORA":
        yield f"expected peft_type LORA, got {kind}; merge it with its own library"


def holds_factors_only(files: AdapterFiles) -> Iterator[str]:
    """A and B of linear layers below the head, and no option that means more."""
    bias = files.config.get("bias", "none")
    if bias != "none":
        yield f"expected bias 'none', got {bias!r}; train with bias='none'"
    for option, (words, _) in BESIDE.items():
        value = files.config.get(option)
        if value:
            yield f"expected plain LoRA, got {words} ({option}={value!r}); {_PLAIN}"
    for name, shape in files.shapes.items():
        if not name.endswith((A_SUFFIX, B_SUFFIX)) or len(shape) != 2:
            yield (
                f"expected A and B of linear layers, got the tensor {name} of shape "
                f"{list(shape)}; {_PLAIN}"
            )
            break
    for layer in files.layers:
        is_known = files.base_layers is None or layer in files.base_layers
        if layer.rpartition(".")[2] in _HEADS or not is_known:
            yield f"expected LoRA on linear layers below the head, got {layer}; {_PLAIN}"


def one_rank(files: AdapterFiles) -> Iterator[str]:
    """Every tensor has the rank that the configuration names."""
    rank = files.config.get("r")
    if files.ranks != {rank}:
        yield f"expected every layer of rank r={rank}, got {sorted(files.ranks)}; {_REWRITE}"


def no_patterns(files: AdapterFiles) -> Iterator[str]:
    """Ranks and alphas by layer are ignored by the engine, and so would be wrong."""
    for option in ("rank_pattern", "alpha_pattern"):
        value = files.config.get(option)
        if value:
            yield f"expected no {option}, got one for {len(value)} layers; {_REWRITE}"


def scale_is_one(files: AdapterFiles) -> Iterator[str]:
    """Alpha = rank and no rsLoRA: the factors say all, whatever scale an engine computes."""
    rank, alpha = files.config.get("r"), files.config.get("lora_alpha")
    if alpha != rank:
        yield f"expected lora_alpha = r = {rank}, got {alpha}; {_REWRITE}"
    if files.config.get("use_rslora"):
        yield f"expected no rsLoRA, got use_rslora=True; {_REWRITE}"


def rank_on_ladder(files: AdapterFiles) -> Iterator[str]:
    """One of the values of max_lora_rank."""
    rank = max(files.ranks, default=0)
    if rank > LADDER[-1]:
        yield (
            f"expected a rank of at most {LADDER[-1]}, got {rank}; compress it with "
            f"--max-rank {LADDER[-1]}"
        )
    elif rank not in LADDER:
        steps = ", ".join(map(str, LADDER))
        yield f"expected a rank of {steps}, got {rank}; forgetless export pads it with zeros"


def whole_types(files: AdapterFiles) -> Iterator[str]:
    """Where one `q_proj` is adapted, all are."""
    if files.base_layers is None:
        yield "expected the base model, to see which layers it has, got none; pass model="
        return
    missing = missing_of_types(files.layers, files.base_layers)
    if missing:
        yield (
            f"expected every layer of a targeted type, {len(missing)} are missing, the first "
            f"{missing[0]}; forgetless export fills them with zeros"
        )


def missing_of_types(layers: Collection[str], base_layers: Collection[str]) -> list[str]:
    """Layers of the base that are of an adapted type and are not adapted themselves."""
    types = {name.rpartition(".")[2] for name in layers}
    return [n for n in base_layers if n.rpartition(".")[2] in types and n not in set(layers)]


_SERVED: tuple[Rule, ...] = (is_lora, holds_factors_only, one_rank, no_patterns, scale_is_one)
PEFT = Engine(name="peft", rules=(is_lora,))
VLLM = Engine(name="vllm", rules=(*_SERVED, rank_on_ladder), ranks=LADDER)
SGLANG = Engine(name="sglang", rules=(*_SERVED, rank_on_ladder), ranks=LADDER)
TGI = Engine(name="tgi", rules=(*_SERVED, whole_types), wants_whole_types=True)
ENGINES: dict[str, Engine] = {engine.name: engine for engine in (PEFT, VLLM, SGLANG, TGI)}
