"""Projection: the linear layer after the pooling, as sentence-transformers' Dense module."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tfrec.data.tokens import read_json
from tfrec.errors import InputError

_IDENTITY = "torch.nn.modules.linear.Identity"


class Projection(NamedTuple):
    """What a linear layer makes of a pooled vector: ``vector @ kernel + bias``.

    Attributes:
      kernel: float32 (in, out).
      bias: float32 (out,).
    """

    kernel: NDArray[np.float32]
    bias: NDArray[np.float32]

    @classmethod
    def load(cls, folder: Path) -> Projection | None:
        """Reads the Dense module that ``modules.json`` of a model's folder names; None: none.

        Raises:
          InputError: it has an activation, or cannot be read.
        """
        modules = read_json(folder / "modules.json").get("items", [])
        dense = [m for m in modules if str(m.get("type", "")).endswith(".Dense")]
        if not dense:
            return None
        place = folder / str(dense[0].get("path", ""))
        config = read_json(place / "config.json")
        # sentence-transformers takes Tanh where nothing is said.
        activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
        if activation != _IDENTITY:
            raise InputError(
                f"{place} has the activation {activation.rpartition('.')[2]}; only a linear Dense "
                "module, with Identity, is supported"
            )
        found = _read(place / "model.safetensors")
        kernel = found.get("linear.weight", np.zeros((0, 0), np.float32)).T
        bias = found.get("linear.bias", np.zeros(kernel.shape[1], np.float32))
        sizes = tuple(config.get(f"{side}_features") for side in ("in", "out"))
        if kernel.shape != sizes or bias.shape != kernel.shape[1:]:
            raise InputError(
                f"{place} is damaged: model.safetensors does not hold the {sizes[0]} x {sizes[1]} "
                "weights that config.json tells of"
            )
        return cls(np.ascontiguousarray(kernel, np.float32), np.asarray(bias, np.float32))

    def save(self, folder: Path) -> None:
        """Writes the files of a Dense module into its own folder, made if it is not there."""
        from safetensors.numpy import save_file

        folder.mkdir(exist_ok=True)
        tensors = {"linear.weight": np.ascontiguousarray(self.kernel.T), "linear.bias": self.bias}
        save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
        config = {
            "in_features": self.kernel.shape[0],
            "out_features": self.kernel.shape[1],
            "bias": True,
            "activation_function": _IDENTITY,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=1), "utf-8")


def _read(path: Path) -> dict[str, NDArray[Any]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        found: dict[str, NDArray[Any]] = load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    return found
