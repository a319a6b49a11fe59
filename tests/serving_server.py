"""A small TensorFlow Serving: the real service definitions, over SavedModels run right here."""

import http.server
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
from tensorflow_serving.apis import (
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from tfrec.models import serving
from tfrec.models.keras_bridge import tf


class Models:
    """The models ``<model>/<version>`` that a folder's config lists, the newest version."""

    def __init__(self, folder: Path, config: str) -> None:
        told = (folder / config).read_text() if (folder / config).is_file() else ""
        paths = [folder / name for name in re.findall('name: "(.*)"', told)]
        places = {path: max(path.glob("*"), key=lambda v: int(v.name)) for path in paths}
        self.versions = {path.name: int(v.name) for path, v in places.items()}
        self.loaded = {path.name: tf.saved_model.load(str(v)) for path, v in places.items()}

    def predict(self, name: str, signature: str, inputs: dict) -> dict:
        """Raises KeyError where there is no such model or signature."""
        function = self.loaded[name].signatures[signature]
        specs = function.structured_input_signature[1]
        found = function(**{k: tf.constant(v, specs[k].dtype) for k, v in inputs.items()})
        return {key: value.numpy() for key, value in found.items()}


class Service(prediction_service_pb2_grpc.PredictionServiceServicer):
    """Answers as TensorFlow Serving does; or slowly, or wrongly, where a test says so.

    Attributes:
      seconds: How long an answer is held back.
      spoil: Is given each answer, and its context, before it is sent.
      asked: How often it was asked.
    """

    def __init__(self, models: Models) -> None:
        self.models = models
        self.seconds, self.asked = 0.0, 0
        self.spoil: Callable[..., None] = lambda response, context: None

    def Predict(self, request, context):
        self.asked += 1
        inputs = {key: tf.make_ndarray(tensor) for key, tensor in request.inputs.items()}
        spec = request.model_spec
        version = self.models.versions.get(spec.name)
        if spec.HasField("version") and spec.version.value != version:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Servable not found for {spec.name}")
        try:
            found = self.models.predict(spec.name, spec.signature_name, inputs)
        except KeyError:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Servable not found for {spec.name}")
        response = predict_pb2.PredictResponse()
        response.model_spec.CopyFrom(spec)
        response.model_spec.version.value = version
        for key, array in found.items():
            response.outputs[key].CopyFrom(_tensor(array))
        time.sleep(self.seconds)
        self.spoil(response, context)
        return response


class Versions(model_service_pb2_grpc.ModelServiceServicer):
    """Says which versions are served."""

    def __init__(self, models: Models) -> None:
        self.models = models

    def GetModelStatus(self, request, context):
        version = self.models.versions.get(request.model_spec.name)
        if version is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "Could not find any versions of model")
        response = get_model_status_pb2.GetModelStatusResponse()
        states = get_model_status_pb2.ModelVersionStatus
        response.model_version_status.add(version=version - 1, state=states.END)
        response.model_version_status.add(version=version, state=states.AVAILABLE)
        return response


def _tensor(array: np.ndarray):
    """float32 as its numbers, as TensorFlow Serving writes it by default."""
    if array.dtype != np.float32:
        return tf.make_tensor_proto(array)
    out = tf.make_tensor_proto(np.zeros(0, np.float32), shape=[0])
    out.tensor_shape.CopyFrom(tf.TensorShape(array.shape).as_proto())
    out.float_val.extend(array.ravel().tolist())
    return out


@contextmanager
def grpc_at(service: Service, port: int = 0) -> Iterator[int]:
    """Runs the gRPC services; gives the port."""
    # Messages of any size, as TensorFlow Serving takes them.
    options = [("grpc.max_receive_message_length", -1)]
    rpc = grpc.server(ThreadPoolExecutor(2), options=options)
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(service, rpc)
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(Versions(service.models), rpc)
    port = rpc.add_insecure_port(f"127.0.0.1:{port}")
    rpc.start()
    try:
        yield port
    finally:
        rpc.stop(0).wait()


@contextmanager
def serving_at(folder: Path, config: str = "models.config") -> Iterator[tuple[str, str]]:
    """Runs the models of a folder; gives the addresses of gRPC and REST."""
    serving.ready(["tensorflow-text", "scann"])
    models = Models(folder, config)

    class Rest(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name, version = re.fullmatch(
                r"/v1/models/(\w+)(?:/versions/(\d+))?:predict", self.path
            ).groups()
            try:
                if version is not None and int(version) != models.versions[name]:
                    raise KeyError(version)
                found = models.predict(name, body["signature_name"], body["inputs"])
                outputs = serving.as_rest(found)
                told, code = {"outputs": outputs}, 200
                if len(outputs) == 1:  # as TensorFlow Serving does
                    told = {"outputs": next(iter(outputs.values()))}
            except KeyError:
                told, code = {"error": f"Servable not found for {name}"}, 404
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(told, default=np.ndarray.tolist).encode())

        def log_message(self, *given):
            """Nothing."""

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Rest)
    thread = threading.Thread(target=web.serve_forever)
    thread.start()
    try:
        with grpc_at(Service(models)) as port:
            yield f"127.0.0.1:{port}", f"127.0.0.1:{web.server_port}"
    finally:
        web.shutdown()
        thread.join()
        web.server_close()
