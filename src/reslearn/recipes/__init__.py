"""Recipes: what a training run is, as data; named ones, files, and settings from the command line."""

from reslearn.recipes.named import NAMED, asked_for, asked_on_bad, resolve
from reslearn.recipes.recipe import Recipe, change, keys, read_file, validate

__all__ = ["NAMED", "Recipe", "asked_for", "asked_on_bad", "change", "keys", "read_file", "resolve", "validate"]
