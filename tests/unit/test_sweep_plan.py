"""What a sweep's YAML stands for: its cells, the recipes they make, and their names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from forgetless.errors import DataError, RecipeError
from forgetless.experiments.sweep import SweepSpec, load_sweep, look_at, plan_sweep
from forgetless.experiments.sweep.cells import cells_of
from forgetless.experiments.sweep.estimate import cost_of
from forgetless.experiments.sweep.identity import run_hash, run_name, sparse
from forgetless.experiments.sweep.plan import resolved
from forgetless.experiments.sweep.sharing import shared_by
from forgetless.recipe import Recipe

BASE = {
    "model": "some/model",
    "method": "lora",
    "train_data": {"path": "train.jsonl", "prompt": "{q}", "completion": "{a}", "max_length": 32},
    "preserve_data": [{"path": "keep.jsonl", "text": "{t}"}],
    "training": {"batch_size": 2},
    "evaluation": {"retention": [{"name": "kept", "path": "kept.jsonl", "text": "{t}"}]},
}


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text("".join(f'{{"q": "q{i}", "a": "a{i}"}}\n' for i in range(10)))
    Path("keep.jsonl").write_text("".join(f'{{"t": "keep {i}"}}\n' for i in range(4)))
    Path("kept.jsonl").write_text("".join(f'{{"t": "kept {i}"}}\n' for i in range(4)))


def spec_of(**keys: object) -> SweepSpec:
    return SweepSpec.model_validate({"base": BASE, "output": "sweeps/x", **keys})


def recipe_of(**keys: object) -> Recipe:
    return sparse(Recipe.model_validate({**BASE, "output": "out", **keys}))


def write(tree: dict[str, object], name: str = "sweep.yaml") -> Path:
    path = Path(name)
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def test_a_grid_is_every_combination_and_each_entry_of_runs_a_grid_of_its_own():
    spec = spec_of(
        grid={"method": ["lora", {"name": "sc-lora", "beta": 0.6}], "seed": [0, 1]},
        runs=[{"method": "milora", "training.learning_rate": [1e-3, 2e-3]}, {"seed": 7}],
    )
    runs = plan_sweep(spec).runs
    found = [(r.recipe.method, r.recipe.seed, r.recipe.training.learning_rate) for r in runs]
    sc_lora = {"name": "sc-lora", "beta": 0.6}
    assert found == [
        ({"name": "lora"}, 0, 2e-4),  # the method's own rate
        ({"name": "lora"}, 1, 2e-4),
        (sc_lora, 0, 5e-5),
        (sc_lora, 1, 5e-5),
        ({"name": "milora"}, 0, 1e-3),
        ({"name": "milora"}, 0, 2e-3),
        ({"name": "lora"}, 7, 2e-4),
    ]


def test_options_go_into_the_method_of_the_cell_in_whatever_order_they_are_listed():
    spec = spec_of(grid={"method.rank": [8, 16], "method": ["lora", {"name": "lora-null"}]})
    methods = [run.recipe.method for run in plan_sweep(spec).runs]
    assert methods == [
        {"name": name, "rank": rank} for rank in (8, 16) for name in ("lora", "lora-null")
    ]


def test_lists_regularisers_and_data_can_vary():
    spec = spec_of(
        grid={
            "training.regularisers": [[], ["drift", {"name": "kl", "weight": 0.5}]],
            "targets": [["q_proj"], None],
        }
    )
    runs = plan_sweep(spec).runs
    assert [len(run.recipe.training.regularisers) for run in runs] == [0, 0, 2, 2]
    assert [run.recipe.targets for run in runs] == [["q_proj"], None] * 2
    assert runs[2].label == "lora + drift + kl weight 0.5, targets q_proj"


def test_fixed_keys_stand_in_place_of_the_bases_and_in_no_label():
    path = write(
        {
            "base": BASE,
            "fixed": {"training.validation_rows": 2, "method.rank": 4, "train_data.limit": 8},
            "grid": {"seed": [0, 1]},
            "output": "sweeps/x",
        }
    )
    cases = {"training.validation_rows=3": 3, "fixed.training.validation_rows=4": 4}
    for override, validation_rows in {None: 2, **cases}.items():
        overrides = [] if override is None else [override]
        runs = plan_sweep(load_sweep(path, overrides)).runs
        assert [run.recipe.training.validation_rows for run in runs] == [validation_rows] * 2
        assert [run.recipe.method for run in runs] == [{"name": "lora", "rank": 4}] * 2
        assert [run.recipe.train_data[0].limit for run in runs] == [8, 8]
        assert [run.label for run in runs] == ["lora, seed 0", "lora, seed 1"]
    assert "validation_rows" not in BASE["training"]


def test_a_recipe_in_place_of_a_sweep_is_told():
    with pytest.raises(RecipeError, match=r"recipe\.yaml: expected a sweep.*got a recipe"):
        load_sweep(write({**BASE, "output": "runs/x"}, "recipe.yaml"))


@pytest.mark.parametrize(
    ("fixed", "said"),
    [
        ({"method.rank": 4}, "fixed.method.rank: expected a key that does not vary, got one that"),
        ({"train_data.3.path": "x"}, "fixed.train_data.3.path"),
        ({"output": "x"}, "fixed.output: expected no such key in a sweep"),
        ({"training.batchsize": 4}, "batchsize"),
    ],
)
def test_a_fixed_key_that_varies_or_has_no_place_is_refused(fixed, said):
    tree = {"base": BASE, "fixed": fixed, "grid": {"method": ["lora"]}, "output": "sweeps/x"}
    with pytest.raises(RecipeError, match=re.escape(said)):
        plan_sweep(load_sweep(write(tree)))


def test_labels_say_what_varies():
    spec = spec_of(
        runs=[
            {"method": {"name": "sc-lora", "beta": 0.6}, "training.learning_rate": 2e-4},
            {"seed": 3, "training.weight_decay": 0.1},
            {"seed": 4, "label": "mine"},
            {"preserve_data": ["self", [{"self": True, "limit": 9}, BASE["preserve_data"][0]]]},
        ]
    )
    labels = [run.label for run in plan_sweep(spec).runs]
    assert labels == [
        "sc-lora beta 0.6, lr 0.0002",
        "lora, seed 3, wd 0.1",
        "mine",
        "lora, preserve: self",
        "lora, preserve: self and keep",
    ]


def test_the_hash_of_a_known_recipe_stays():
    # A folder of an earlier version is found again only while these hold.
    assert run_hash(recipe_of()) == "e08d9fc06c"
    known = recipe_of(
        method={"name": "sc-lora", "beta": 0.6}, training={"learning_rate": 1e-3}, seed=3
    )
    assert run_name(known) == "sc-lora-beta0.6-lr0.001-seed3-48473b5dd9"


def test_a_rate_that_is_not_given_is_the_methods_own():
    runs = [{"method": "sc-lora"}, {"method": "sc-lora", "training.learning_rate": 5e-5}]
    assert plan_sweep(spec_of(runs=runs)).repeated == 1


def test_a_sweep_that_was_killed_as_it_began_goes_on():
    spec = spec_of(grid={"seed": [0, 1]})
    Path("sweeps/x").mkdir(parents=True)
    Path("sweeps/x/.sweep.yaml.123.tmp").write_text("half")
    plan = plan_sweep(spec)
    plan.folder.claim(resolved(plan))
    assert {p.name for p in Path("sweeps/x").iterdir()} >= {"sweep.yaml", "runs", "work"}
    plan_sweep(spec)


def test_weight_decay_is_one_run_however_it_is_said():
    runs = [
        {"method": "lora"},
        {"method": "lora", "training.weight_decay": 0},
        {"method": "lora-wd"},
        {"method": "lora", "training.weight_decay": 0.3},
        {"method": "lora-wd", "training.weight_decay": 0.0},
    ]
    plan = plan_sweep(spec_of(runs=runs))
    decays = [run.recipe.training.weight_decay for run in plan.runs]
    assert decays == [None, 0.3]
    assert plan.repeated == 3


def test_data_that_cannot_be_used_are_told_with_their_cell():
    Path("empty.jsonl").write_text('{"other": 1}\n')
    sources = [[{"path": "keep.jsonl", "text": "{t}"}], [{"path": "empty.jsonl", "text": "{t}"}]]
    with pytest.raises(DataError, match=r"^cell preserve_data .*empty\.jsonl"):
        plan_sweep(spec_of(grid={"preserve_data": sources, "method": ["lora-null"]}))


@pytest.mark.parametrize(
    "same",
    [
        {"output": "elsewhere"},
        {"label": "other words"},
        {"claims": False},
        {"method": {"name": "lora", "rank": 32}},  # the default
        {"method": {"name": "lora", "alpha": None}},
        {"calibration": {"batch_size": 3}},
        {"training": {"batch_size": 2.0, "save_steps": 7, "logging_steps": 1}},
        {"evaluation": {}},  # measured on other things: the same run, measured again
    ],
)
def test_what_changes_no_adapter_changes_no_hash(same):
    assert run_hash(recipe_of(**same)) == run_hash(recipe_of())


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"method": {"name": "lora", "rank": 16}},
        {"method": "lora-wd"},
        {"model": "another/model"},
        {"training": {"batch_size": 2, "learning_rate": 1e-3}},
        {"training": {"batch_size": 2, "regularisers": ["drift"]}},
        {"preserve_data": [{"path": "keep.jsonl", "text": "{t}", "limit": 3}]},
        {"calibration": {"source_weights": "equal"}},
    ],
)
def test_what_changes_the_adapter_changes_the_hash(other):
    assert run_hash(recipe_of(**other)) != run_hash(recipe_of())


def test_equal_numbers_are_one_value():
    one = recipe_of(method={"name": "sc-lora", "beta": 1})
    assert run_hash(one) == run_hash(recipe_of(method={"name": "sc-lora", "beta": 1.0}))


def test_cells_that_stand_for_one_run_are_run_once():
    spec = spec_of(
        grid={"method": ["lora", {"name": "lora", "rank": 32}], "seed": [0, 1]}, runs=[{"seed": 1}]
    )
    plan = plan_sweep(spec)
    assert len(plan.runs) == 2
    assert plan.repeated == 3


def test_a_folder_whose_name_has_other_words_before_its_hash_is_found():
    name = plan_sweep(spec_of(grid={"seed": [0]})).runs[0].name
    renamed = f"words-of-before-{name.rpartition('-')[2]}"
    Path("sweeps/x/runs", renamed).mkdir(parents=True)
    Path("sweeps/x/sweep.yaml").write_text("")
    assert plan_sweep(spec_of(grid={"seed": [0]})).runs[0].name == renamed


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "grid, runs: expected one of them at least, got neither"),
        ({"grid": {"seed": []}}, "grid.seed: expected a list of values, got an empty one"),
        ({"runs": [{"seed": []}]}, "runs.0.seed: expected a list of values, got an empty one"),
        ({"base": 5, "grid": {"seed": [1]}}, "base: expected a recipe's path or its keys, got 5"),
        (
            {"grid": {"method": ["lora", "lorra"]}},
            "cell method lorra: method: expected one of .* did you mean lora",
        ),
        (
            {"grid": {"training.learning_rate": [1e-3, -1.0], "seed": [4]}},
            r"cell training.learning_rate -1, seed 4: training.learning_rate: expected greater",
        ),
        ({"grid": {"method.beta": [0.5]}}, "cell method.beta 0.5: method lora: unknown option"),
        ({"grid": {"trainin.epochs": [1]}}, "cell trainin.epochs 1: unknown key `trainin`"),
        ({"grid": {"seed.x": [1]}}, "cell seed.x 1: .*seed"),
        ({"grid": {"output": ["a"]}}, "cell output a: output: expected no such key in a sweep"),
        (
            {"grid": {"evaluation.samples": [1, 2]}},
            "cell evaluation.samples 2: expected what is trained to differ",
        ),
        ({"grid": {"train_data.0.path": ["gone.jsonl"]}}, "gone.jsonl"),
    ],
)
def test_mistakes_are_told_in_one_line_that_names_the_cell(keys, message):
    base = {**BASE, "seed": 0}
    with pytest.raises(ValueError, match=message) as caught:
        plan_sweep(load_sweep(write({"base": base, "output": "sweeps/x", **keys})))
    assert len(str(caught.value).splitlines()) == 1
    assert not Path("sweeps").exists()


def test_a_folder_of_something_else_is_refused():
    Path("sweeps/x").mkdir(parents=True)
    Path("sweeps/x/thesis.txt").write_text("mine")
    with pytest.raises(RecipeError, match="expected an empty folder or one of a sweep"):
        plan_sweep(spec_of(grid={"seed": [0]}))


def test_overrides_change_the_base_or_the_sweep_and_never_what_varies():
    write(BASE, "recipe.yaml")
    tree = {"base": "recipe.yaml", "output": "a", "grid": {"training.learning_rate": [1e-3]}}
    path = write(tree)
    spec = load_sweep(
        path, ["training.epochs=2", "method.rank=4", "output=b", "processes=3", "grid.seed=[0, 5]"]
    )
    runs = plan_sweep(spec).runs
    assert [run.recipe.seed for run in runs] == [0, 5]
    assert {run.recipe.training.epochs for run in runs} == {2.0}
    assert {run.recipe.method["rank"] for run in runs} == {4}
    assert (spec.output, spec.processes) == (Path("b"), 3)
    with pytest.raises(RecipeError, match=re.escape("which it sets by training.learning_rate")):
        load_sweep(path, ["training.learning_rate=1"])


def test_what_is_written_down_loads_as_the_same_sweep():
    plan = plan_sweep(spec_of(grid={"method": ["lora", {"name": "sc-lora", "beta": 0.6}]}))
    again = plan_sweep(load_sweep(write(resolved(plan))))
    assert [run.name for run in again.runs] == [run.name for run in plan.runs]


def test_cells_do_not_share_values():
    spec = spec_of(grid={"method": [{"name": "lora"}], "method.rank": [4, 8]})
    trees = [cell.tree(spec.base_tree()) for cell in cells_of(spec)]
    assert [tree["method"]["rank"] for tree in trees] == [4, 8]
    assert spec.grid["method"] == [{"name": "lora"}]


def test_the_plan_counts_what_is_shared_and_what_is_to_do():
    spec = spec_of(
        grid={
            "method": ["lora", "lora-null", {"name": "sc-lora", "beta": 0.6}],
            "training.learning_rate": [1e-3, 2e-3],
            "seed": [0, 1],
        }
    )
    plan = plan_sweep(spec)
    shared = shared_by(plan.runs)
    assert (shared.bases, shared.moments, shared.calibrated) == (1, 2, 8)
    assert (shared.starts, shared.solved) == (2, 8)  # plain LoRA only draws
    cost = cost_of(look_at(plan))
    assert (cost.runs, cost.steps, cost.tokens) == (12, 12 * 5, 12 * 5 * 2 * 32)
    assert cost.seconds is None
    assert "no run of this sweep is finished yet" in cost.source


def test_the_sweep_of_the_recipes_folder_is_one(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    spec = load_sweep("recipes/sweep.yaml")
    recipes = [
        Recipe.model_validate({**cell.tree(spec.base_tree()), "output": "x"})
        for cell in cells_of(spec)
    ]
    assert len({run_name(sparse(recipe)) for recipe in recipes}) == len(recipes) == 24
    for recipe in recipes:
        assert recipe.train_data[0].limit - recipe.training.validation_rows == 100
