"""Train, evaluate, analyze and use residual networks (He et al., Deep Residual Learning for Image Recognition).

import reslearn
run = reslearn.train("path/to/folder")
model = reslearn.load(run.folder)
print(reslearn.predict(model, "photo.jpg"))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from reslearn.api import resume, train
    from reslearn.classify.evaluate import evaluate
    from reslearn.deploy.predict import predict
    from reslearn.errors import UserError
    from reslearn.nets import create, models
    from reslearn.weights import Card, load, save

# Imported on first use, so that `import reslearn` and `reslearn --help` do not import torch.
_HOME = {
    "train": "api",
    "resume": "api",
    "predict": "deploy.predict",
    "UserError": "errors",
    "evaluate": "classify.evaluate",
    "create": "nets",
    "models": "nets",
    "Card": "weights",
    "load": "weights",
    "save": "weights",
}

__all__ = ["Card", "UserError", "create", "evaluate", "load", "models", "predict", "resume", "save", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'reslearn' has no attribute '{name}'")
    value = getattr(import_module(f"reslearn.{_HOME[name]}"), name)
    globals()[name] = value
    return value
