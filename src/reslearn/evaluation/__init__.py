"""Testing: protocols, and the numbers that come of them."""
