"""Recipes: what a training run is, as data; named ones, files, and settings from the command line."""

from reslearn.recipes.named import NAMED, resolve
from reslearn.recipes.recipe import Recipe, change, keys, read_file, validate

__all__ = ["NAMED", "Recipe", "change", "keys", "read_file", "resolve", "validate"]
