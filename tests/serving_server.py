"""A small TensorFlow Serving: the real service definitions, over SavedModels run right here."""

import http.server
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from tfrec.models import serving
from tfrec.models.keras_bridge import tf


class Models:
    """The models ``<model>/<version>`` that a folder's config lists, the newest version."""

    def __init__(self, folder: Path, config: str) -> None:
        told = (folder / config).read_text() if (folder / config).is_file() else ""
        paths = [folder / name for name in re.findall('name: "(.*)"', told)]
        places = {path: max(path.glob("*"), key=lambda v: int(v.name)) for path in paths}
        self.loaded = {path.name: tf.saved_model.load(str(v)) for path, v in places.items()}

    def predict(self, name: str, signature: str, inputs: dict) -> dict:
        """Raises KeyError where there is no such model or signature."""
        function = self.loaded[name].signatures[signature]
        specs = function.structured_input_signature[1]
        found = function(**{k: tf.constant(v, specs[k].dtype) for k, v in inputs.items()})
        return {key: value.numpy() for key, value in found.items()}


class Service(prediction_service_pb2_grpc.PredictionServiceServicer):
    def __init__(self, models: Models) -> None:
        self.models = models

    def Predict(self, request, context):
        inputs = {key: tf.make_ndarray(tensor) for key, tensor in request.inputs.items()}
        spec = request.model_spec
        try:
            found = self.models.predict(spec.name, spec.signature_name, inputs)
        except KeyError:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Servable not found for {spec.name}")
        response = predict_pb2.PredictResponse()
        for key, array in found.items():
            response.outputs[key].CopyFrom(tf.make_tensor_proto(array))
        return response


@contextmanager
def serving_at(folder: Path, config: str = "models.config") -> Iterator[tuple[str, str]]:
    """Runs the models of a folder; gives the addresses of gRPC and REST."""
    serving.ready(["tensorflow-text", "scann"])
    models = Models(folder, config)
    rpc = grpc.server(ThreadPoolExecutor(2))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(Service(models), rpc)
    port = rpc.add_insecure_port("127.0.0.1:0")
    rpc.start()

    class Rest(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name = self.path.removeprefix("/v1/models/").removesuffix(":predict")
            try:
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
        yield f"127.0.0.1:{port}", f"127.0.0.1:{web.server_port}"
    finally:
        web.shutdown()
        thread.join()
        web.server_close()
        rpc.stop(0).wait()
