"""Networks: a network is a row of the zoo's table, and blocks are written as the papers draw them."""

from reslearn.nets.zoo import create, models, spec

__all__ = ["create", "models", "spec"]
