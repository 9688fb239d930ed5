"""A method turns a layer's weight and its site's moments into (A0, B0), and says what trains."""

# Shape letters: O = layer output width, D = layer input width, R = rank.

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from forgetless.errors import MethodError
from forgetless.linalg.moments import SecondMoment

Trains = Literal["plain", "a", "b", "both"]
Held = Literal["plain", "a", "b", "both", "full"]  # a form of adapter, or every weight
Role = Literal["train", "preserve"]

# Where default rates come from: small runs at a few rates each.
TRIED = "on SmolLM2-135M, rank 32 (docs/results.md)"
MEASURED_RATE = f"measured {TRIED}; the authors use 2e-5 on 7B models at rank 128"
LORAS_RATE = f"LoRA's; of 2e-4 and 1e-3 the one that kept more {TRIED}"
LOW_RATE = 5e-5
LOW_RATE_SOURCE = (
    "of 5e-5, 2e-4 and 1e-3 the one that forgot least, at nine tenths of its best gain or more, "
    f"{TRIED}"
)

# A layer's count of directions that only rounding picked, in the diagnostics of methods that pick
# the weakest ones.
UNDETERMINED = "undetermined_directions"


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer of the base, as the solve sees it: float32 or wider, dequantised, (O, D)."""

    name: str
    weight_OD: Tensor
    bias_O: Tensor | None = None


@dataclass(frozen=True, slots=True)
class SiteBasis:
    """A subspace of a site's inputs, the same for all layers that it feeds.

    Attributes:
        basis_DR: U, orthonormal columns.
        diagnostics: What the method found at this site, for the record of each layer.
    """

    basis_DR: Tensor
    diagnostics: dict[str, float]


@dataclass(frozen=True, slots=True)
class SiteStatistics:
    """What data say of a layer; None for what the method did not ask for.

    Attributes:
        train: Second moment of its inputs on train data.
        preserve: The same on preserve data.
        gradient_OD: Gradient of the base's loss on train data with respect to its weight.
        basis: What the method made of the moments for all layers of the site.
    """

    train: SecondMoment | None = None
    preserve: SecondMoment | None = None
    gradient_OD: Tensor | None = None
    basis: SiteBasis | None = None

    def of(self, role: Role, layer: str) -> SecondMoment:
        """The moment of one role.

        Raises:
            MethodError: It was not collected.
        """
        moment = self.train if role == "train" else self.preserve
        if moment is None:
            raise MethodError(f"{layer}: expected a second moment of {role} data, got none")
        return moment

    def first_gradient(self, layer: str) -> Tensor:
        """The gradient (O, D).

        Raises:
            MethodError: It was not collected.
        """
        if self.gradient_OD is None:
            raise MethodError(f"{layer}: expected a gradient on train data, got none")
        return self.gradient_OD


@dataclass(frozen=True, slots=True)
class AdapterInit:
    """Start of one layer's adapter.

    Attributes:
        a_RD: A0.
        b_OR: B0; zeros for a method that trains `plain` or `b`.
        diagnostics: What the method found at this layer, for the record.
    """

    a_RD: Tensor
    b_OR: Tensor
    diagnostics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AnyMethod(ABC):
    """What a run is told of how it tunes: with an adapter, or every weight.

    Subclasses are frozen dataclasses of options. Class attributes tell the rest of the product what
    it must know: no other module asks for a method by its name.

    Attributes:
        name: Name on the command line and in recipes.
        title: One line: what it does.
        paper: Source, as an arXiv id with the authors' short title.
        bibtex: Entries to cite, with the paper's own authors and title.
        promise: One line: what it keeps, and what it does not.
        usual_needs: `needs`, where no option changes them.
        usual_rate: `default_learning_rate`, where no option changes it.
        usual_rate_source: Where that figure comes from.
        default_weight_decay: Used where the user gives none.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    bibtex: ClassVar[tuple[str, ...]]
    promise: ClassVar[str]
    usual_needs: ClassVar[frozenset[Role]] = frozenset()
    usual_rate: ClassVar[float] = 2e-4
    usual_rate_source: ClassVar[str] = LORAS_RATE
    default_weight_decay: ClassVar[float] = 0.0

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise MethodError(f"method {self.name}: {message}")

    @property
    @abstractmethod
    def form(self) -> Held:
        """What trains."""

    @property
    def needs(self) -> frozenset[Role]:
        """Which data must be calibrated on."""
        return self.usual_needs

    @property
    def rows_for_gradient(self) -> int:
        """Train rows to take the first gradient on; 0 where the method needs none."""
        return 0

    @property
    def reads(self) -> frozenset[Role]:
        """Whose rows it reads, for moments or for the gradient."""
        return self.needs | ({"train"} if self.rows_for_gradient else frozenset())

    @property
    def bottom_roles(self) -> frozenset[Role]:
        """Data whose weakest directions are what the method picks.

        Fewer kept tokens than a site is wide leave those directions undetermined.
        """
        return frozenset()

    @property
    def default_learning_rate(self) -> float:
        """Learning rate where the user gives none, for AdamW with a cosine schedule."""
        return self.usual_rate

    @property
    def learning_rate_source(self) -> str:
        """Where `default_learning_rate` comes from."""
        return self.usual_rate_source


@dataclass(frozen=True, kw_only=True)
class Method(AnyMethod):
    """A way to start an adapter, and what then trains.

    Attributes:
        rank: R.
        alpha: LoRA's alpha; ΔW is scaled by alpha / rank. None means alpha = rank, scale 1.
        rslora: Scale by alpha / √rank in its place (rsLoRA, arXiv:2312.03732), so that a rate that
            suits one rank suits another.
        usual_form: `form`, where no option changes it.
        draws: Whether it starts from random numbers. What does not is the same for every seed.
    """

    rank: int = 32
    alpha: float | None = None
    rslora: bool = False

    usual_form: ClassVar[Trains]
    draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the options that all methods share."""
        self._require(self.rank >= 1, f"rank: expected at least 1, got {self.rank}")
        self._require(
            self.alpha is None or 0 < self.alpha < math.inf,
            f"alpha: expected a finite number above 0, got {self.alpha}",
        )

    @property
    def lora_alpha(self) -> float:
        """What ordinary LoRA, which scales by alpha / rank, needs as alpha."""
        alpha = float(self.rank) if self.alpha is None else self.alpha
        return alpha * math.sqrt(self.rank) if self.rslora else alpha

    @property
    def form(self) -> Trains:
        """Which form holds the adapter: what trains."""
        return self.usual_form

    def site_basis(self, site: str, stats: SiteStatistics) -> SiteBasis | None:
        """What all layers of a site start from, solved once; None where each has its own.

        Args:
            site: Its name, for messages.
            stats: Moments of the roles in `needs`, where the solve runs.
        """
        return None

    def _basis_of(self, layer: LayerWeights, stats: SiteStatistics) -> SiteBasis:
        """The basis of the layer's site: the one solved before, or solved now."""
        found = stats.basis or self.site_basis(layer.name, stats)
        assert found is not None, f"method {self.name} has no basis of a site"
        return found

    @abstractmethod
    def init(
        self, layer: LayerWeights, stats: SiteStatistics, generator: torch.Generator
    ) -> AdapterInit:
        """A0 and B0 of one layer, in the dtype of its weight.

        Args:
            layer: Weight and bias of the base.
            stats: Moments of the roles in `needs`.
            generator: Seeded for this layer; the only source of randomness, for what `draws`.
        """

    def check_layer(self, layer: str, in_features: int, out_features: int) -> None:
        """Refuse a layer that is narrower than the rank.

        Raises:
            MethodError: rank above min(in_features, out_features).
        """
        width = min(in_features, out_features)
        self._require(
            self.rank <= width,
            f"rank: expected at most {width}, the smaller width of layer {layer} "
            f"({out_features} x {in_features}), got {self.rank}; lower the rank or leave the layer "
            "out of the targets",
        )
