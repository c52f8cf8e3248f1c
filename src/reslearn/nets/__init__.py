"""Networks: each is a row of the table in zoo.py, built from the blocks of the papers."""

from reslearn.nets.zoo import create, models, spec

__all__ = ["create", "models", "spec"]
