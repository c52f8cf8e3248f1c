"""Residual networks to train, evaluate, understand and use (He et al., Deep Residual Learning for Image Recognition)."""

__version__ = "0.1.0"
