"""TensorFlow Serving: an engine whose models run on a server, by gRPC, and here where it is away.

The server runs the SavedModels of the same version of the same bundle. A call has a deadline; where
no good answer comes in time LiteRT gives one, and after some such calls in a row the server is left
alone for a while.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfrec.bundle import ARRAYS, SERVING, Bundle
from tfrec.data.tokens import Role, packed, padded
from tfrec.engines import predict
from tfrec.engines.breaker import Breaker, Status
from tfrec.engines.litert import Model, ModelsEngine
from tfrec.errors import SetupError
from tfrec.recommender import Floats

try:
    import grpc
except ImportError:
    raise SetupError(
        "grpcio is not installed; install what serving needs with: pip install 'tfrec[serve]'"
    ) from None

_log = logging.getLogger(__name__)

_QUERY, _CANDIDATE, _RANK, _TEXT = "encode_query", "encode_candidate", "rank", "encode_text"
_DEFAULT = "serving_default"

_START = 1.0  # seconds for the first look at a server
_ALIKE = 0.99  # cosine of its answer to ours; two trainings are further apart
_TOKENS = 256  # of the texts of a call: some dozen milliseconds
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A server that is back shall be found soon, and by default that takes up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


class NoAnswerError(Exception):
    """A server gave no answer in time, or none that can be used."""


class Server:
    """The models of one version of a bundle on a TensorFlow Serving.

    Args:
      address: ``host:port`` of its gRPC service.
      version: The number that the version must have there too.
      breaker: Counts second tries.
    """

    def __init__(self, address: str, version: int, breaker: Breaker) -> None:
        self.address, self.version, self._breaker = address, version, breaker
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        self._predict = self._channel.unary_unary(
            predict.PREDICT,
            request_serializer=predict.PredictRequest.SerializeToString,
            response_deserializer=predict.PredictResponse.FromString,
        )
        self._status = self._channel.unary_unary(
            predict.STATUS,
            request_serializer=predict.GetModelStatusRequest.SerializeToString,
            response_deserializer=predict.GetModelStatusResponse.FromString,
        )

    def predict(
        self,
        model: str,
        signature: str,
        inputs: Mapping[str, NDArray[Any]],
        output: str,
        shape: tuple[int, ...],
        deadline: float,
    ) -> Floats:
        """What a model makes of arrays.

        Args:
          model: Its name.
          signature: Which of its signatures.
          inputs: Float32, int32 or int64.
          output: The output that is wanted.
          shape: That it must have.
          deadline: By ``time.monotonic()``.

        Raises:
          NoAnswerError: there is no answer by then, or it is not of that version, has no such
            output, or one of another shape or with numbers that are not finite.
        """
        asked = predict.request(model, self.version, signature, inputs)
        answer = self._call(self._predict, asked, deadline)
        told = answer.model_spec.version.value
        if told != self.version:
            raise NoAnswerError(f"version {told} of '{model}' answered, and not {self.version}")
        if output not in answer.outputs:
            raise NoAnswerError(f"the answer of '{model}' has no '{output}'")
        try:
            found = np.asarray(predict.array_of(answer.outputs[output], shape), np.float32)
        except ValueError as error:
            raise NoAnswerError(f"'{output}' of '{model}' cannot be read: {error}") from None
        if not np.isfinite(found).all():
            raise NoAnswerError(f"'{output}' of '{model}' has numbers that are not finite")
        return found

    def versions(self, model: str, deadline: float) -> list[int]:
        """The versions of a model that are ready.

        Raises:
          NoAnswerError: it does not say so in time.
        """
        asked = predict.GetModelStatusRequest()
        asked.model_spec.name = model
        answer = self._call(self._status, asked, deadline)
        told = answer.model_version_status
        return sorted(one.version for one in told if one.state == predict.AVAILABLE)

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()

    def _call(self, method: Any, message: Any, deadline: float) -> Any:
        for second in (False, True):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            try:
                return method(message, timeout=left)
            except grpc.RpcError as error:
                # A connection that broke may be there again; what else is wrong stays wrong.
                if second or error.code() is not grpc.StatusCode.UNAVAILABLE:
                    reason = str(error.details()).partition("\n")[0]
                    raise NoAnswerError(f"{error.code().name}, {reason}") from None
            except ValueError:
                raise NoAnswerError("the connection was closed") from None
            self._breaker.retried()
        raise NoAnswerError("DEADLINE_EXCEEDED, no time was left")


class TfServingEngine(ModelsEngine):
    """The models of a bundle, run by a TensorFlow Serving that has the same version of it.

    Any number of threads may call it. A bundle whose SavedModels do not take arrays, since an older
    tfrec exported it, is run by LiteRT alone.

    Args:
      address: ``host:port`` of the gRPC service.
      bundle: Says which version must answer, and what its SavedModels take and give.
      local: Answers where the server does not.
      timeout: Seconds in which a call must be answered, a second try included.
      failures: So many calls in a row without a good answer, and the server is away.
      pause: Seconds from one try of a server that is away to the next.
    """

    def __init__(
        self,
        address: str,
        bundle: Bundle,
        local: ModelsEngine,
        timeout: float = 0.25,
        *,
        failures: int = 3,
        pause: float = 5.0,
    ) -> None:
        self.timeout, self._local = timeout, local.models
        self._breaker = Breaker(failures, pause)
        self._server = Server(address, bundle.version, self._breaker)
        self._signatures = _signatures(bundle)
        here = local.models
        models = here._replace(
            query=self._served(_QUERY, "query", "vectors", here.query),
            candidate=here.candidate and self._served(_CANDIDATE, "candidate", "", here.candidate),
            rank=here.rank and self._served(_RANK, "tasks", "candidates", here.rank),
        )
        super().__init__(models, local.history, local.tasks, local.step)

    def check(self) -> str:
        """Looks whether the server has this version and answers alike; says so in one line.

        Where it does not, it is away from the start.
        """
        where, version = self._server.address, self._server.version
        if not self._signatures:
            return (
                f"{where} is not used: version {version} of this bundle has no SavedModels with the"
                f" signature '{ARRAYS}'; LiteRT runs its models; export it again"
            )
        try:
            self._test(time.monotonic() + max(self.timeout, _START))
        except NoAnswerError as error:
            self._breaker.leave(str(error))
            return f"{where} is not used until that is mended: {error}; LiteRT runs the models"
        self._breaker.back()
        return f"{where} runs version {version} of {', '.join(self._signatures)}, as this bundle is"

    def status(self) -> Status:
        """How the server does, and how often it was asked."""
        return self._breaker.status()

    def close(self) -> None:
        """Ends the connection; LiteRT answers what is asked afterwards."""
        self._server.close()

    def encode_text(self, texts: Sequence[str], query: bool = False) -> Floats:
        """See :class:`tfrec.recommender.Engine`.

        Raises:
          InputError: the model reads no texts.
        """
        if _TEXT not in self._signatures:
            return super().encode_text(texts, query)
        reader, distinct = self._text_model(), list(dict.fromkeys(texts))
        role: Role = "query" if query else "passage"
        rows = list(reader.tokenizer.ids(reader.settings.prepared(distinct, role)))
        found = np.zeros((len(rows), reader.width), np.float32)
        for batch, _ in packed(rows, _TOKENS):
            names = ("token_ids", "padding_mask")
            inputs = dict(zip(names, padded([rows[i] for i in batch]), strict=True))
            vectors = self._ask(_TEXT, _DEFAULT, inputs, "vector", (len(batch), reader.width))
            if vectors is None:
                vectors = reader.encode([distinct[i] for i in batch], role)
            found[batch] = vectors
        place = {text: row for row, text in enumerate(distinct)}
        return found[[place[text] for text in texts]]

    def _served(self, name: str, output: str, like: str, local: Model) -> Model:
        """A model of the server, and ``local`` where that does not answer.

        Args:
          name: The server's for it.
          output: What it gives.
          like: The input whose first sizes are those of the output; empty: any.
          local: The same model here.
        """
        if name not in self._signatures:
            return local
        takes = self._signatures[name]["inputs"]
        sizes = self._signatures[name]["outputs"][output]["shape"]

        def run(given: Mapping[str, NDArray[Any]]) -> Floats:
            inputs = {key: given[key] for key in takes}
            first = inputs[like or next(iter(inputs))].shape
            shape = tuple(first[i] if size < 0 else size for i, size in enumerate(sizes))
            found = self._ask(name, ARRAYS, inputs, output, shape)
            return local(given) if found is None else found

        return run

    def _ask(
        self,
        name: str,
        signature: str,
        inputs: Mapping[str, NDArray[Any]],
        output: str,
        shape: tuple[int, ...],
    ) -> Floats | None:
        """The server's answer; None: there is none, and why was said."""
        deadline = time.monotonic() + self.timeout
        turn = self._breaker.turn()
        if turn == "leave":
            return None
        try:
            if turn == "test":
                self._test(deadline)
            found = self._server.predict(name, signature, inputs, output, shape, deadline)
        except NoAnswerError as error:
            self._fail(str(error))
            return None
        if turn == "test" and self._breaker.back():
            _log.info("%s is back", self._server.address)
        self._breaker.answered()
        return found

    def _fail(self, reason: str) -> None:
        where, breaker = self._server.address, self._breaker
        if breaker.failed(reason):
            _log.warning(
                "%s failed %d times in a row (%s): LiteRT answers; it is tried again every %g s",
                *(where, breaker.failures, reason, breaker.pause),
            )
        else:
            _log.warning("%s gave no good answer (%s): LiteRT answered", where, reason)

    def _test(self, deadline: float) -> None:
        """Raises NoAnswerError if the server has another version or other weights than this one."""
        version = self._server.version
        for model in self._signatures:
            there = self._server.versions(model, deadline)
            if version not in there:
                told = ", ".join(map(str, there)) or "none"
                raise NoAnswerError(f"it has version {told} of '{model}', and not {version}")
        inputs = _example(self._signatures[_QUERY]["inputs"])
        mine = self._local.query(inputs)
        its = self._server.predict(_QUERY, ARRAYS, inputs, "query", mine.shape, deadline)
        lengths = np.linalg.norm(mine) * np.linalg.norm(its)
        if float((mine * its).sum()) < _ALIKE * lengths or not lengths:
            raise NoAnswerError(f"its version {version} answers otherwise: it is of another bundle")


def _signatures(bundle: Bundle) -> dict[str, Any]:
    """Model -> what it takes and gives, of those that take arrays; empty where not all of them do.

    Models of one chain are run in one place, or their vectors might not fit together.
    """
    told = bundle.content["models"]
    names = {"query": _QUERY, "candidate": _CANDIDATE, "rank": _RANK, "text": _TEXT}
    found = {}
    for here, there in names.items():
        if here in told:
            signatures = told.get(f"{SERVING}/{there}", {}).get("signatures", {})
            found[there] = signatures.get(_DEFAULT if there == _TEXT else ARRAYS)
    return found if all(found.values()) else {}


def _example(inputs: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """Inputs of the query tower, the same each time: somebody with no event and some attributes."""
    rng = np.random.default_rng(0)
    out: dict[str, NDArray[Any]] = {}
    for name in sorted(inputs):
        shape = [1 if size < 0 else size for size in inputs[name]["shape"]]
        floats = inputs[name]["dtype"] == "float32"
        out[name] = rng.normal(size=shape).astype("f4") if floats else np.zeros(shape, "i4")
    out["segment"][:, 0] = 1
    return out
