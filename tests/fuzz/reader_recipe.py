"""Recipes of a training and of a sweep.

What is read can be written and read again.
"""

from pathlib import Path

from sparse_bitnet.study.cells import read_sweep
from sparse_bitnet.train.recipe import load_recipe, to_yaml

NAMED = True
RECIPES = Path(__file__).parents[2] / "recipes"


def build(directory):
    for name in ("demo", "staircase", "sweeps/toy"):
        path = RECIPES / f"{name}.yaml"
        (directory / path.name).write_bytes(path.read_bytes())


def read(directory, mutation):
    for name in sorted(mutation.touched) or ["demo.yaml", "staircase.yaml", "toy.yaml"]:
        if name == "toy.yaml":
            read_sweep(directory / name)
        elif name.endswith(".yaml"):
            config = load_recipe(directory / name)
            again = directory / "again.yaml"
            again.write_text(to_yaml(config), encoding="utf-8")
            assert load_recipe(again) == config
