"""tfrec: from raw interactions and item texts to a deployed recommender.

Public names are loaded when first used, so that importing tfrec costs nothing: neither
``import tfrec`` nor ``tfrec --help`` imports TensorFlow.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Config": "tfrec.config",
    "Artifact": "tfrec.artifact",
    "Interactions": "tfrec.data.interactions",
    "Catalog": "tfrec.data.catalog",
    "Dataset": "tfrec.data.dataset",
    "TextEncoder": "tfrec.models.text",
    "TwoTower": "tfrec.models.retrieval",
    "Ranker": "tfrec.models.ranking",
    "Bundle": "tfrec.bundle",
    "Recommender": "tfrec.recommender",
    "Request": "tfrec.recommender",
    "Recommended": "tfrec.recommender",
    "TopK": "tfrec.recommender",
    "load_recommender": "tfrec.stages.recommend",
    "run": "tfrec.pipeline",
    "Client": "tfrec.client",
    "AsyncClient": "tfrec.client",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'tfrec' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
