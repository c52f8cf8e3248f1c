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
    from reslearn.api import (
        detect_objects,
        doctor,
        features,
        recipe,
        resume,
        resume_seeds,
        summary,
        train,
        train_seeds,
        write_report,
    )
    from reslearn.classify.evaluate import evaluate
    from reslearn.deploy.predict import predict
    from reslearn.errors import Notice, UserError
    from reslearn.nets import create, models
    from reslearn.training.run import Run
    from reslearn.weights import Card, load, save
    from reslearn.weights.read import import_weights
    from reslearn.weights.write import export

# Imported on first use, so that `import reslearn` and `reslearn --help` do not import torch.
_MODULES = {
    "api": (
        "detect_objects",
        "doctor",
        "features",
        "recipe",
        "resume",
        "resume_seeds",
        "summary",
        "train",
        "train_seeds",
        "write_report",
    ),
    "classify.evaluate": ("evaluate",),
    "deploy.predict": ("predict",),
    "errors": ("Notice", "UserError"),
    "nets": ("create", "models"),
    "training.run": ("Run",),
    "weights": ("Card", "load", "save"),
    "weights.read": ("import_weights",),
    "weights.write": ("export",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Card",
    "Notice",
    "Run",
    "UserError",
    "create",
    "detect_objects",
    "doctor",
    "evaluate",
    "export",
    "features",
    "import_weights",
    "load",
    "models",
    "predict",
    "recipe",
    "resume",
    "resume_seeds",
    "save",
    "summary",
    "train",
    "train_seeds",
    "write_report",
]


if not TYPE_CHECKING:  # a type checker would accept any name

    def __dir__() -> list[str]:
        return sorted({*globals(), *_HOME})

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'reslearn' has no attribute '{name}'")
        value = getattr(import_module(f"reslearn.{_HOME[name]}"), name)
        globals()[name] = value
        return value
