"""Model files: weights with a card that says all that is needed to use them."""

from reslearn.weights.store import Card, load, read_card, save

__all__ = ["Card", "load", "read_card", "save"]
