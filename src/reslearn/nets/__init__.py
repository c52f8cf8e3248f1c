"""Networks: a block is body x merge x shortcut, a network is a row of a table."""

from reslearn.nets.zoo import create, models, spec

__all__ = ["create", "models", "spec"]
