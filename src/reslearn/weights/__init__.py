"""Model files: weights with a card that holds everything needed to use them."""

from reslearn.weights.store import Card, load, read_card, save

__all__ = ["Card", "load", "read_card", "save"]
