"""Checks of a data set before training, and copies without what is wrong."""
