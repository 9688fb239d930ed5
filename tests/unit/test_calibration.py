"""Calibration against a naive per-row float64 loop; masks, sites, cache and bad input."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from forgetless.adapters.attach import attach
from forgetless.calibration import memory, store
from forgetless.calibration.calibrate import calibrate, check_token_count
from forgetless.calibration.engine import SiteMoments, collect_moments
from forgetless.calibration.store import load_moments, moments_key, moments_path, save_moments
from forgetless.data.rows import Row, RowSet
from forgetless.data.spec import DataSpec, SourceWeights
from forgetless.data.tokens import Batch, TokenRow, make_batches
from forgetless.errors import AdapterError, ArtefactError, CalibrationError, ForgetlessWarning
from forgetless.linalg.moments import SecondMoment
from forgetless.models import hardware
from forgetless.models.targets import find_targets, module_suffixes


def token_rows(seed: int = 0) -> list[TokenRow]:
    generator = torch.Generator().manual_seed(seed)
    lengths = [3, 11, 7, 1, 16, 5]
    return [
        TokenRow(tuple(torch.randint(4, 300, (n,), generator=generator).tolist()), n // 2)
        for n in lengths
    ]


def naive_moments(model: nn.Module, rows: list[TokenRow], tokens: str) -> dict[str, torch.Tensor]:
    """Row by row, no padding, every target hooked on its own, in float64."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    for row in rows:
        start = row.prompt_length if tokens == "completion" else 0
        for name, target in find_targets(model).targets.items():

            def hook(
                _m: nn.Module, args: tuple[torch.Tensor], name: str = name, start: int = start
            ) -> None:
                x = args[0][0, start:].double()
                sums[name] = sums.get(name, 0) + x.T @ x
                counts[name] = counts.get(name, 0) + len(x)

            handle = target.module.register_forward_pre_hook(hook)
            with torch.no_grad():
                model(input_ids=torch.tensor([row.input_ids]))
            handle.remove()
    return {name: total / counts[name] for name, total in sums.items()}


@pytest.mark.parametrize("architecture", ["tiny_model", "tiny_gpt2"])
@pytest.mark.parametrize(
    ("batch_size", "side", "tokens"),
    [
        (1, "right", "all"),
        (4, "left", "all"),
        (6, "right", "completion"),
        (2, "left", "completion"),
    ],
)
def test_moments_equal_a_naive_loop_for_any_batching_and_padding(
    request: pytest.FixtureRequest, architecture: str, batch_size: int, side: str, tokens: str
) -> None:
    model = request.getfixturevalue(architecture).double()
    rows, targets = token_rows(), find_targets(model).targets
    batches = make_batches(
        rows,
        batch_size=batch_size,
        pad_token_id=2,
        tokens=tokens,  # type: ignore[arg-type]
        padding_side=side,  # type: ignore[arg-type]
    )
    found = collect_moments(model, targets, batches)
    expected = naive_moments(model, rows, tokens)
    kept = sum(len(r.input_ids) - (r.prompt_length if tokens == "completion" else 0) for r in rows)
    assert found.num_tokens == kept
    for name in targets:
        torch.testing.assert_close(found.of(name).mean_DD(), expected[name], rtol=1e-9, atol=1e-11)


def test_layers_fed_by_one_tensor_share_a_site(tiny_model: nn.Module) -> None:
    targets = find_targets(tiny_model).targets
    batches = make_batches(token_rows(), batch_size=3, pad_token_id=2)
    found = collect_moments(tiny_model, targets, batches)
    attention = "model.layers.1.self_attn"
    assert {found.site_of[f"{attention}.{p}_proj"] for p in "qkv"} == {f"{attention}.q_proj"}
    assert found.site_of["model.layers.1.mlp.up_proj"] == "model.layers.1.mlp.gate_proj"
    assert len(found.moments) == 2 * 4  # per layer: q/k/v, o, gate/up, down
    assert len(targets) == 2 * 7


def test_training_mode_and_gradients_are_restored(tiny_model: nn.Module) -> None:
    tiny_model.train()
    batches = make_batches(token_rows(), batch_size=3, pad_token_id=2)
    collect_moments(tiny_model, find_targets(tiny_model).targets, batches)
    assert tiny_model.training
    assert all(p.requires_grad for p in tiny_model.parameters())
    assert not any(m._forward_pre_hooks for m in tiny_model.modules())


def test_nan_activations_name_the_layer_and_the_row(tiny_model: nn.Module) -> None:
    rows = token_rows()
    poisoned = rows[4].input_ids[3]
    with torch.no_grad():
        tiny_model.get_input_embeddings().weight[poisoned] = float("nan")
    assert all(poisoned not in r.input_ids for i, r in enumerate(rows) if i != 4)
    batches = make_batches(rows, batch_size=2, pad_token_id=2)
    with pytest.raises(CalibrationError, match=r"layer model\.layers\.0\S+ is NaN or inf at row 4"):
        collect_moments(tiny_model, find_targets(tiny_model).targets, batches)


def test_no_kept_token_is_an_error(tiny_model: nn.Module) -> None:
    with pytest.raises(CalibrationError, match="at least one kept token"):
        collect_moments(tiny_model, find_targets(tiny_model).targets, [])


def test_the_head_and_embeddings_are_skipped_aloud(tiny_model: nn.Module) -> None:
    skipped = find_targets(tiny_model).skipped
    assert skipped == {"model.embed_tokens": "embedding", "lm_head": "output head"}


def test_patterns_select_and_refuse(tiny_model: nn.Module) -> None:
    names = list(find_targets(tiny_model, ["q_proj", "layers.0.mlp.down_proj"]).targets)
    assert names == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert module_suffixes(tiny_model, names) == sorted(names)
    assert module_suffixes(tiny_model, [n for n in names if "q_proj" in n]) == ["q_proj"]
    with pytest.raises(AdapterError, match="'qproj' matches no linear layer"):
        find_targets(tiny_model, ["qproj"])
    with pytest.raises(AdapterError, match="names the output head"):
        find_targets(tiny_model, ["lm_head"])


def stored(tmp_path: Path) -> tuple[SiteMoments, Path, dict[str, str]]:
    moment = SecondMoment.zeros(4)
    moment.add_(torch.arange(12.0).reshape(3, 4), num_samples=2)
    found = SiteMoments({"a.b": moment}, {"a.b": "a.b", "a.c": "a.b"})
    key = moments_key(
        model="m", dtype="torch.float32", targets=["a.b", "a.c"], rows=token_rows(), tokens="all"
    )
    path = moments_path(tmp_path, key)
    save_moments(found, path, key)
    return found, path, key


def test_stored_moments_come_back_whole(tmp_path: Path) -> None:
    found, path, key = stored(tmp_path)
    again = load_moments(path, key)
    assert again is not None
    assert again.site_of == found.site_of
    assert torch.equal(again.of("a.c").lower_DD, found.of("a.c").lower_DD)
    assert (again.num_tokens, again.of("a.b").num_samples) == (3, 2)
    assert load_moments(tmp_path / "none.safetensors", key) is None
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("part", ["model", "dtype", "targets", "rows", "tokens"])
def test_moments_of_anything_else_are_never_used(tmp_path: Path, part: str) -> None:
    _, path, key = stored(tmp_path)
    other = key | {part: "other"}
    assert moments_path(tmp_path, other) != path
    with pytest.raises(ArtefactError, match=f"expected {part} other"):
        load_moments(path, other)


def test_the_key_depends_on_prompt_boundaries() -> None:
    rows = token_rows()
    moved = [TokenRow(r.input_ids, r.prompt_length + 1) for r in rows]
    one, two = (
        moments_key(model="m", dtype="d", targets=[], rows=r, tokens="all") for r in (rows, moved)
    )
    assert one != two


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_cache_is_refused_with_its_name(tmp_path: Path, size: int) -> None:
    _, path, key = stored(tmp_path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ArtefactError, match=path.name):
        load_moments(path, key)


def test_damage_in_the_tensors_is_seen(tmp_path: Path) -> None:
    _, path, key = stored(tmp_path)
    whole = path.read_bytes()
    for offset in (1, 8, 40):
        changed = bytearray(whole)
        changed[-offset] ^= 1
        path.write_bytes(changed)
        assert path.stat().st_size == len(whole)
        with pytest.raises(ArtefactError, match="damaged") as error:
            load_moments(path, key)
        assert "delete" not in str(error.value)


def test_moments_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    found, path, key = stored(tmp_path)
    found.moments["a.b"].lower_DD[1, 1] = float("inf")
    save_moments(found, path, key)
    with pytest.raises(ArtefactError, match="damaged"):
        load_moments(path, key)


@pytest.mark.parametrize(
    "change",
    [
        {"sites": None},
        {"sites": "{"},
        {"sites": "[1]"},
        {"sites": '{"a.b": 3}'},
        {"sites": '{"a.b": {"num_tokens": "x"}}'},
        {"sites": "{}"},
        {"site_of": "7"},
        {"site_of": '{"a.c": "elsewhere"}'},
        {"key": None},
        {"key": "[]"},
    ],
    ids=str,
)
def test_damaged_metadata_are_an_artefact_error(
    tmp_path: Path, change: dict[str, str | None]
) -> None:
    _, path, key = stored(tmp_path)
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), **change}
    save_file(load_file(path), path, {k: v for k, v in metadata.items() if v is not None})
    with pytest.raises(ArtefactError, match=path.name) as error:
        load_moments(path, key)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("error", [SafetensorError("no space"), OSError(28, "No space left")])
def test_a_full_disk_does_not_lose_the_pass(
    tiny_model: nn.Module,
    tiny_tokenizer: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def full(*_args: object) -> None:
        raise error

    monkeypatch.setattr(store, "save_file", full)
    rows = RowSet(DataSpec(examples=["x"]), (Row("", "an apple is red"),))
    with pytest.warns(ForgetlessWarning, match="could not be written .* goes on"):
        found = calibrate(
            tiny_model,
            tiny_tokenizer,  # type: ignore[arg-type]
            find_targets(tiny_model).targets,
            [rows],
            cache=tmp_path,
        )
    assert found.num_tokens > 0
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def test_moments_beyond_the_free_memory_are_refused_before_the_pass(
    tiny_model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = find_targets(tiny_model).targets
    # Per layer: q/k/v, o and gate/up are 32 wide, down 64.
    needed = 2 * (3 * 4 * 32 * 33 + 4 * 64 * 65)
    batches = list(make_batches(token_rows(), batch_size=3, pad_token_id=2))
    seen: list[int] = []
    monkeypatch.setattr(memory, "free_memory", lambda _device: needed)
    collect_moments(tiny_model, targets, batches, progress=seen.append)
    assert sum(seen) == 6

    monkeypatch.setattr(memory, "free_memory", lambda _device: needed - 1)
    figures = rf"expected {needed / 2**30:.3g} GiB .* 8 sites, got {(needed - 1) / 2**30:.3g} GiB"
    with pytest.raises(CalibrationError, match=figures) as error:
        collect_moments(tiny_model, targets, batches, progress=seen.append)
    assert "targets, first of all not down_proj" in str(error.value)
    assert sum(seen) == 6
    assert not any(m._forward_pre_hooks for m in tiny_model.modules())


def test_free_memory_is_what_the_system_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware.psutil, "virtual_memory", lambda: SimpleNamespace(available=12345))
    assert hardware.free_memory(torch.device("cpu")) == 12345


def test_layers_that_text_never_reaches_are_counted_with_a_remedy(tiny_model: nn.Module) -> None:
    tiny_model.vision = nn.ModuleDict({"patch": nn.Linear(4, 4), "merge": nn.Linear(4, 4)})
    batches = make_batches(token_rows(), batch_size=3, pad_token_id=2)
    with pytest.raises(CalibrationError) as error:
        collect_moments(tiny_model, find_targets(tiny_model).targets, batches)
    assert "2 of 16 were never called, the first vision.patch;" in str(error.value)
    assert "targets=[down_proj, gate_proj, k_proj," in str(error.value)


def test_the_cache_is_used_when_it_matches_and_replaced_when_damaged(
    tiny_model: nn.Module, tiny_tokenizer: object, tmp_path: Path
) -> None:
    targets = find_targets(tiny_model).targets
    rows = RowSet(DataSpec(examples=["x"]), tuple(Row("", f"apple {i} is red") for i in range(9)))

    def run() -> SiteMoments:
        return calibrate(tiny_model, tiny_tokenizer, targets, [rows], cache=tmp_path)  # type: ignore[arg-type]

    first = run()
    (path,) = tmp_path.glob("moments-*.safetensors")
    stamp = path.stat().st_mtime_ns
    second = run()
    assert path.stat().st_mtime_ns == stamp
    for site, moment in first.moments.items():
        assert torch.equal(moment.lower_DD, second.moments[site].lower_DD)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.warns(ForgetlessWarning, match="collected again"):
        run()
    with torch.no_grad():
        tiny_model.get_input_embeddings().weight.add_(1e-3)
    run()
    assert len(list(tmp_path.glob("moments-*.safetensors"))) == 2


@pytest.mark.parametrize("is_cached", [False, True])
def test_sources_of_equal_weight_give_the_mean_of_their_means(
    tiny_model: nn.Module,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    is_cached: bool,
) -> None:
    """A short source counts as much as a long one; by tokens it counts by its length."""
    targets = find_targets(tiny_model).targets
    texts = [["a b c"], [f"the apple {i} is red and ripe" for i in range(40)], ["x y", "z"]]
    sources = [
        RowSet(DataSpec(examples=["x"]), tuple(Row("", text) for text in one)) for one in texts
    ]
    cache = tmp_path if is_cached else None

    def moments(rows: list[RowSet], weights: SourceWeights) -> SiteMoments:
        return calibrate(
            tiny_model, tiny_tokenizer, targets, rows, source_weights=weights, cache=cache
        )

    alone = [moments([source], "tokens") for source in sources]
    for name in targets:
        parts = [one.of(name) for one in alone]
        counts = [part.num_tokens for part in parts]
        assert max(counts) > 20 * min(counts)
        for weights, shares in (
            ("equal", [1 / 3] * 3),
            ("tokens", [count / sum(counts) for count in counts]),
        ):
            found = moments(sources, weights).of(name)
            pairs = list(zip(shares, parts, strict=True))
            wanted_DD = sum(share * part.mean_DD().double() for share, part in pairs)
            wanted_D = sum(share * part.mean_D().double() for share, part in pairs)
            torch.testing.assert_close(found.mean_DD().double(), wanted_DD, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found.mean_D().double(), wanted_D, rtol=1e-5, atol=1e-6)
            assert found.num_tokens == sum(counts)


def test_too_few_tokens_say_how_many_are_missing() -> None:
    moment = SecondMoment.zeros(10)
    moment.add_(torch.ones(7, 10))
    found = SiteMoments({"down": moment}, {"down": "down"})
    with pytest.raises(CalibrationError, match=r"site down is 10 wide\), got 7, 3 missing"):
        check_token_count(found, "preserve")
    with pytest.warns(ForgetlessWarning, match=r"four times the width \(40\)"):
        check_token_count(found, "preserve", min_tokens=5)


@pytest.mark.parametrize(("beta", "is_error"), [(1.0, True), (0.8, False)])
def test_directions_picked_for_weak_preserve_data_need_enough_of_them(
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerBase,
    beta: float,
    is_error: bool,
) -> None:
    def attached() -> None:
        attach(
            tiny_model,
            tiny_tokenizer,
            method={"name": "sc-lora", "beta": beta, "rank": 4},
            train_data=["one two three four five"],
            preserve_data=["ab"],
        )

    if is_error:
        with pytest.raises(CalibrationError, match="preserve tokens"):
            attached()
    else:
        with pytest.warns(ForgetlessWarning, match="preserve tokens .* under four times"):
            attached()


def test_rows_without_a_kept_token_are_no_samples(tiny_model: PreTrainedModel) -> None:
    batch = Batch(
        input_ids_BT=torch.arange(5, 13).reshape(2, 4),
        attention_mask_BT=torch.ones(2, 4, dtype=torch.long),
        kept_BT=torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]]),
        index=(0, 1),
    )
    targets = find_targets(tiny_model).targets
    found = collect_moments(tiny_model, targets, [batch])
    assert {(m.num_tokens, m.num_samples) for m in found.moments.values()} == {(2, 1)}


def test_squares_beyond_the_dtype_name_the_layer(tiny_model: PreTrainedModel) -> None:
    with torch.no_grad():
        tiny_model.model.layers[0].mlp.up_proj.weight.fill_(3e19)
        tiny_model.model.layers[0].mlp.gate_proj.weight.fill_(10.0)
    ids = torch.arange(5, 13).reshape(2, 4)
    batch = Batch(ids, torch.ones_like(ids), torch.ones_like(ids), (0, 1))
    targets = {k: t for k, t in find_targets(tiny_model).targets.items() if "down_proj" in k}
    with pytest.raises(CalibrationError, match=r"layers\.0\.mlp\.down_proj overflow float32"):
        collect_moments(tiny_model, targets, [batch])
