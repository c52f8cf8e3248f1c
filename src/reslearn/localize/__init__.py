"""Localization: a box for each class on a classification network (DRL appendix C)."""
