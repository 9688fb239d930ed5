"""The peers against PEFT's own code on the same weights and data, or their equations in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from peft import (
    EvaConfig,
    LoraConfig,
    LoraGAConfig,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import nn

from forgetless.errors import MethodError
from forgetless.linalg.generalised import generalised_basis, largest_beta
from forgetless.linalg.moments import SecondMoment
from forgetless.methods import make_method
from forgetless.methods.base import AdapterInit, LayerWeights, SiteStatistics

RANK = 3
SHAPES = [(9, 7), (7, 9), (8, 8)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outliers(tokens: int, width: int, seed: int) -> torch.Tensor:
    """Inputs with a mean, an outlier channel, and energies over four orders of magnitude."""
    x = random(tokens, width, seed=seed) @ random(width, width, seed=seed + 100)
    x = x * torch.logspace(0, -2, width, dtype=torch.float64)
    x[:, 0] += 3
    return x


def moment_of(x: torch.Tensor) -> SecondMoment:
    moment = SecondMoment.zeros(x.shape[1], dtype=torch.float64)
    moment.add_(x, num_samples=len(x))
    return moment


def start(
    options: dict[str, Any],
    weight: torch.Tensor,
    train: torch.Tensor | None = None,
    preserve: torch.Tensor | None = None,
) -> AdapterInit:
    stats = SiteStatistics(
        None if train is None else moment_of(train),
        None if preserve is None else moment_of(preserve),
    )
    method = make_method({"rank": RANK} | options)
    return method.init(LayerWeights("l", weight), stats, torch.Generator().manual_seed(0))


def projector(columns: torch.Tensor) -> torch.Tensor:
    q = torch.linalg.qr(columns).Q
    return q @ q.T


class Layer(nn.Module):
    """A model of one linear layer, `lin`."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.lin = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.lin.weight.data = weight.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)


def by_peft(weight: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B as PEFT starts them, in float64."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["lin"], **options)
    layer = get_peft_model(Layer(weight), config).base_model.model.lin
    return tuple(
        getattr(layer, n)["default"].weight.detach().double() for n in ("lora_A", "lora_B")
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_a_start_from_weights_alone_is_pefts(name: str, shape: tuple[int, int]) -> None:
    weight = random(*shape)
    ours = start({"name": name}, weight)
    a, b = by_peft(weight, init_lora_weights=name)
    # Signs of singular vectors are free: compare the product, and each side's Gram matrix.
    torch.testing.assert_close(ours.b_OR @ ours.a_RD, b @ a, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.b_OR @ ours.b_OR.T, b @ b.T, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.a_RD.T @ ours.a_RD, a.T @ a, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_mica_is_pefts(shape: tuple[int, int]) -> None:
    weight = random(*shape)
    ours, (a, b) = start({"name": "mica"}, weight), by_peft(weight, init_lora_weights="mica")
    torch.testing.assert_close(projector(ours.b_OR), projector(b), rtol=0, atol=1e-5)
    assert not ours.a_RD.any()
    assert not a.any()


@pytest.mark.parametrize("shape", SHAPES)
def test_milora_is_the_weights_less_their_best_approximation(shape: tuple[int, int]) -> None:
    weight = random(*shape)
    u, s, vh = np.linalg.svd(weight.numpy(), full_matrices=False)
    kept = len(s) - RANK
    best = u[:, :kept] * s[:kept] @ vh[:kept]
    ours = start({"name": "milora"}, weight)
    np.testing.assert_allclose((ours.b_OR @ ours.a_RD).numpy(), weight.numpy() - best, atol=1e-12)
    torch.testing.assert_close(ours.a_RD @ ours.a_RD.T, ours.b_OR.T @ ours.b_OR)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_corda_is_pefts(mode: str, shape: tuple[int, int]) -> None:
    """Samples of one token whose largest entry is 1: PEFT's rescaling changes nothing then."""
    weight, x = random(*shape), outliers(60, shape[1], seed=1)
    x = x / x.max(dim=1, keepdim=True).values
    model = Layer(weight)
    config = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=["lin"],
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=mode),
    )
    preprocess_corda(model, config, run_model=lambda: [model(row[None, None]) for row in x.float()])
    layer = get_peft_model(model, config).base_model.model.lin
    a, b = (getattr(layer, n)["default"].weight.detach().double() for n in ("lora_A", "lora_B"))
    ours = start({"name": "corda", "mode": mode}, weight, train=x, preserve=x)
    torch.testing.assert_close(ours.b_OR @ ours.a_RD, b @ a, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.b_OR @ ours.b_OR.T, b @ b.T, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.a_RD.T @ ours.a_RD, a.T @ a, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_corda_equals_its_equation_without_an_inverse(shape: tuple[int, int]) -> None:
    weight, x = random(*shape), outliers(60, shape[1], seed=1)
    c = (x.T @ x / len(x)).numpy()
    u, s, vh = np.linalg.svd(weight.numpy() @ c, full_matrices=False)
    expected = (u[:, -RANK:] * s[-RANK:]) @ vh[-RANK:] @ np.linalg.inv(c)
    ours = start({"name": "corda", "damping": 0}, weight, preserve=x)
    np.testing.assert_allclose((ours.b_OR @ ours.a_RD).numpy(), expected, atol=1e-6)


def test_corda_is_finite_where_the_moment_is_singular() -> None:
    weight, x = random(6, 8), random(3, 8, seed=1)
    ours = start({"name": "corda", "damping": 0}, weight, preserve=x)
    assert ours.a_RD.isfinite().all()
    left = ours.b_OR / ours.b_OR.norm(dim=0)
    torch.testing.assert_close(ours.b_OR @ ours.a_RD, left @ left.T @ weight)


def test_eva_is_pefts() -> None:
    """One batch, so that PEFT's incremental PCA sees the same tokens as the moment."""
    weight, x = random(9, 7), outliers(80, 7, seed=3)
    config = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=["lin"],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0, tau=0.0),
    )
    model = get_peft_model(Layer(weight), config)

    def batches() -> Iterator[torch.Tensor]:
        yield from [x.float()] * 3

    initialize_lora_eva_weights(
        model,
        list(batches()),
        forward_fn=lambda m, batch: m(batch),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    a = model.base_model.model.lin.lora_A["default"].weight.detach().double()
    ours = start({"name": "eva"}, weight, train=x)
    torch.testing.assert_close(projector(ours.a_RD.T), projector(a.T), rtol=0, atol=1e-4)
    torch.testing.assert_close(a @ a.T, torch.eye(RANK).double(), rtol=0, atol=1e-5)
    assert not ours.b_OR.any()


def test_eva_uncentred_is_the_svd_of_the_inputs() -> None:
    x = outliers(80, 7, seed=3)
    _, s, vh = np.linalg.svd(x.numpy(), full_matrices=False)
    ours = start({"name": "eva", "centred": False}, random(9, 7), train=x)
    np.testing.assert_allclose(np.abs(ours.a_RD.numpy() @ vh[:RANK].T), np.eye(RANK), atol=1e-8)
    share = (s[:RANK] ** 2).sum() / (s**2).sum()
    assert ours.diagnostics["explained_variance"] == pytest.approx(share)


def test_astra_is_the_leading_subspace_of_train_outputs() -> None:
    weight, x = random(9, 7), outliers(80, 7, seed=3)
    h = (x @ weight.T).numpy()
    leading = np.linalg.eigh(h.T @ h)[1][:, -RANK:]
    ours = start({"name": "astra"}, weight, train=x)
    expected = leading @ leading.T @ weight.numpy()
    np.testing.assert_allclose((ours.b_OR @ ours.a_RD).numpy(), expected, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_lora_ga_takes_the_subspaces_that_peft_takes_and_the_papers_scale(
    shape: tuple[int, int],
) -> None:
    weight, gradient = random(*shape), random(*shape, seed=4)
    stats = SiteStatistics(gradient_OD=gradient)
    method = make_method({"name": "lora-ga", "rank": RANK, "gamma": 4})
    ours = method.init(LayerWeights("l", weight), stats, torch.Generator())
    model = Layer(weight)
    model.lin._peft_loraga_grad = gradient.float()
    config = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=["lin"],
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(direction="ArB2r"),
    )
    layer = get_peft_model(model, config).base_model.model.lin
    a, b = (getattr(layer, n)["default"].weight.detach().double() for n in ("lora_A", "lora_B"))
    torch.testing.assert_close(projector(ours.a_RD.T), projector(a.T), rtol=0, atol=1e-4)
    torch.testing.assert_close(projector(ours.b_OR), projector(b), rtol=0, atol=1e-4)
    scale = shape[0] ** 0.25 / 2
    for gram in (ours.a_RD @ ours.a_RD.T, ours.b_OR.T @ ours.b_OR):
        torch.testing.assert_close(gram, scale**2 * torch.eye(RANK).double())
    with pytest.raises(MethodError, match="at most 3, half the smaller width of layer m"):
        make_method({"name": "lora-ga", "rank": 4}).check_layer("m", 7, 9)
    with pytest.raises(MethodError, match="expected a gradient on train data, got none"):
        method.init(LayerWeights("l", weight), SiteStatistics(), torch.Generator())


def test_the_contrastive_basis_solves_the_generalised_problem() -> None:
    train, preserve = outliers(80, 7, seed=3), outliers(90, 7, seed=5).flip(1)
    plus, minus = ((x.T @ x / len(x)).numpy() for x in (train, preserve))
    ridge = 1e-3 * np.trace(minus) / 7
    gamma, vectors = scipy.linalg.eigh(plus, minus + ridge * np.eye(7))
    ours = start({"name": "contrastive"}, random(9, 7), train, preserve)
    torch.testing.assert_close(
        projector(ours.a_RD.T), projector(torch.from_numpy(vectors[:, -RANK:].copy()))
    )
    torch.testing.assert_close(ours.a_RD @ ours.a_RD.T, torch.eye(RANK).double())
    assert ours.diagnostics["least_gamma"] == pytest.approx(gamma[-RANK])
    assert not ours.b_OR.any()


def test_the_contrastive_basis_finds_what_train_data_have_alone() -> None:
    """Three channels of train data that preserve data never use, among louder shared ones."""
    train, preserve = random(200, 8, seed=1), random(200, 8, seed=2)
    train *= torch.tensor([100.0] * 5 + [10.0] * 3)
    preserve[:, :5] *= 100
    preserve[:, 5:] *= 1e-3
    ours = start({"name": "contrastive"}, random(9, 8), train, preserve)
    assert float((ours.a_RD[:, 5:] ** 2).sum()) > 2.99


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_the_largest_beta_is_where_a_direction_turns_negative(
    shape: tuple[int, int], rank: int
) -> None:
    weight = random(*shape)
    train, preserve = outliers(80, shape[1], seed=3), outliers(90, shape[1], seed=5).flip(1)
    plus, minus = ((x.T @ x / len(x)) for x in (train, preserve))
    beta = largest_beta(weight, plus, minus, rank)
    c_plus, c_minus = ((weight @ s @ weight.T).numpy() for s in (plus, minus))
    for factor, expected in ((1 - 1e-4, True), (1 + 1e-4, False)):
        b = beta * factor
        values = np.linalg.eigvalsh((1 - b) * c_plus - b * c_minus)
        assert ((values > 1e-12).sum() >= rank) is np.bool_(expected)


def test_sc_lora_with_beta_auto_has_no_direction_of_negative_reward() -> None:
    weight = random(9, 7)
    train, preserve = outliers(80, 7, seed=3), outliers(90, 7, seed=5).flip(1)
    ours = start({"name": "sc-lora", "beta": "auto"}, weight, train, preserve)
    assert ours.diagnostics["negative_directions"] == 0
    assert 0 < ours.diagnostics["beta"] < 1
    same = start({"name": "sc-lora", "beta": ours.diagnostics["beta"]}, weight, train, preserve)
    torch.testing.assert_close(ours.b_OR @ ours.a_RD, same.b_OR @ same.a_RD)
    more = start(
        {"name": "sc-lora", "beta": 1 - (1 - ours.diagnostics["beta"]) / 2}, weight, train, preserve
    )
    assert more.diagnostics["negative_directions"] + more.diagnostics["zero_directions"] > 0


def test_beta_auto_without_any_train_energy_is_zero() -> None:
    nothing, x = torch.zeros(7, 7).double(), random(20, 7)
    assert largest_beta(random(9, 7), nothing, x.T @ x, 2) == 0
    assert largest_beta(random(9, 7), nothing, nothing, 2) == 0


def test_moments_that_rounding_has_made_indefinite_are_solved() -> None:
    """A least eigenvalue below minus the ridge, as float32 sums of many batches can have it."""
    minus = torch.diag(torch.tensor([1.0, 0.5, -1e-5])).double()
    basis, gamma = generalised_basis(torch.eye(3).double(), minus, 2, ridge=1e-6)
    assert gamma.isfinite().all()
    torch.testing.assert_close(basis[:, 0].abs(), torch.tensor([0.0, 0.0, 1.0]).double())


def test_a_contrast_with_preserve_inputs_of_zeros_names_the_layer() -> None:
    with pytest.raises(MethodError, match="layer l: expected preserve inputs that are not all 0"):
        start({"name": "contrastive"}, random(9, 7), random(20, 7), torch.zeros(20, 7).double())


def test_a_generalised_problem_without_a_ridge_is_refused() -> None:
    with pytest.raises(ValueError, match="a ridge above 0, got 0"):
        generalised_basis(torch.eye(3), torch.eye(3), 2, ridge=0)


def test_rslora_scales_by_alpha_over_the_root_of_the_rank() -> None:
    assert make_method({"name": "lora", "rank": 16, "alpha": 8, "rslora": True}).lora_alpha == 32
    assert make_method({"name": "lora", "rank": 16, "rslora": True}).lora_alpha == 64
    with pytest.raises(MethodError, match="rslora: expected true or false, got 'yes'"):
        make_method({"name": "lora", "rslora": "yes"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "corda", "mode": "kmp"}, "mode: expected kpm or ipm, got 'kmp'"),
        ({"name": "corda", "damping": -1}, "damping: expected a number, 0 or more, got -1"),
        ({"name": "contrastive", "epsilon": 0}, "epsilon: expected a number above 0, got 0"),
        ({"name": "eva", "centred": 1}, "centred: expected true or false, got 1"),
    ],
)
def test_a_wrong_option_of_a_peer_is_one_clear_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message) as caught:
        make_method(given)
    assert "\n" not in str(caught.value)
