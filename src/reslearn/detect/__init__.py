"""Faster R-CNN and Mask R-CNN on the networks of the zoo, built on torchvision's detection modules."""

from reslearn.detect.build import create_detector
from reslearn.detect.detector import Detector
from reslearn.detect.improvements import detect
from reslearn.detect.store import load_detector, save_detector

__all__ = ["Detector", "create_detector", "detect", "load_detector", "save_detector"]
