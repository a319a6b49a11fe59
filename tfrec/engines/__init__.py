"""Engines: what runs a bundle's models, in this process or on a server; without TensorFlow here."""

from __future__ import annotations

from tfrec.bundle import Bundle
from tfrec.engines.breaker import Status
from tfrec.engines.litert import (
    LiteRTEngine,
    LiteRTModel,
    Model,
    Models,
    ModelsEngine,
    TextModel,
    recommender_of,
)
from tfrec.errors import ConfigError

__all__ = [
    "LiteRTEngine",
    "LiteRTModel",
    "Model",
    "Models",
    "ModelsEngine",
    "Status",
    "TextModel",
    "engine_of",
    "recommender_of",
]

LITERT, TF_SERVING = "litert", "tf-serving://"


def engine_of(
    setting: str, bundle: Bundle, local: ModelsEngine, timeout: float = 0.25
) -> ModelsEngine:
    """The engine that ``serve.engine`` names.

    Args:
      setting: ``litert``, or ``tf-serving://HOST:PORT`` of a gRPC service.
      bundle: Whose models they are.
      local: LiteRT's engine of it, which also answers where a server does not.
      timeout: Seconds for an answer of a server.

    Returns:
      ``local``, or a :class:`~tfrec.engines.tf_serving.TfServingEngine`.

    Raises:
      ConfigError: it is neither.
      SetupError: packages are missing that it takes.
    """
    if setting == LITERT:
        return local
    host, _, port = setting.removeprefix(TF_SERVING).rpartition(":")
    well = setting.startswith(TF_SERVING) and host and "/" not in host and port.isdecimal()
    if not (well and 0 < int(port) < 65536):
        raise ConfigError(
            f"serve.engine = '{setting}' is neither {LITERT} nor {TF_SERVING}HOST:PORT, such as "
            f"{TF_SERVING}localhost:8500"
        )
    from tfrec.engines.tf_serving import TfServingEngine

    return TfServingEngine(f"{host}:{port}", bundle, local, timeout)
