"""Predict: TensorFlow Serving's messages, as far as an engine needs them, without TensorFlow.

They are described here by name and number, and so are the same bytes as those of
``tensorflow_serving.apis``; fields that are not described are passed over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfrec.errors import SetupError

try:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, wrappers_pb2
except ImportError:
    raise SetupError(
        "protobuf is not installed; install what serving needs with: pip install 'tfrec[serve]'"
    ) from None

PREDICT = "/tensorflow.serving.PredictionService/Predict"
STATUS = "/tensorflow.serving.ModelService/GetModelStatus"
AVAILABLE = 30
"""The state of a version that is served."""

_NUMBERS = {1: "float_val", 3: "int_val", 9: "int64_val"}
_DTYPES = {1: "<f4", 3: "<i4", 9: "<i8"}

_Field = descriptor_pb2.FieldDescriptorProto
_INT32, _INT64, _FLOAT, _STRING, _BYTES, _MESSAGE = (
    _Field.TYPE_INT32,
    _Field.TYPE_INT64,
    _Field.TYPE_FLOAT,
    _Field.TYPE_STRING,
    _Field.TYPE_BYTES,
    _Field.TYPE_MESSAGE,
)
_TENSOR = ".tensorflow.TensorProto"
_SPEC = ".tensorflow.serving.ModelSpec"


def _one(name: str, number: int, kind: Any, message: str = "") -> Any:
    return _Field(name=name, number=number, type=kind, type_name=message or None, label=1)


def _many(name: str, number: int, kind: Any, message: str = "") -> Any:
    return _Field(name=name, number=number, type=kind, type_name=message or None, label=3)


def _message(name: str, *fields: Any, **more: Any) -> Any:
    return descriptor_pb2.DescriptorProto(name=name, field=fields, **more)


def _of_tensors(name: str, field: str, number: int, *fields: Any) -> Any:
    """A message with a map of names to tensors."""
    entry = f"{field.capitalize()}Entry"
    pair = _message(
        entry,
        _one("key", 1, _STRING),
        _one("value", 2, _MESSAGE, _TENSOR),
        options=descriptor_pb2.MessageOptions(map_entry=True),
    )
    place = f".tensorflow.serving.{name}.{entry}"
    return _message(name, *fields, _many(field, number, _MESSAGE, place), nested_type=[pair])


def _files() -> tuple[Any, Any]:
    """The messages; enums are written as the whole numbers that they are on the wire."""
    tensors = descriptor_pb2.FileDescriptorProto(
        name="tfrec/tensor.proto",
        package="tensorflow",
        syntax="proto3",
        message_type=[
            _message(
                "TensorShapeProto",
                _many("dim", 2, _MESSAGE, ".tensorflow.TensorShapeProto.Dim"),
                nested_type=[_message("Dim", _one("size", 1, _INT64))],
            ),
            _message(
                "TensorProto",
                _one("dtype", 1, _INT32),
                _one("tensor_shape", 2, _MESSAGE, ".tensorflow.TensorShapeProto"),
                _one("tensor_content", 4, _BYTES),
                _many("float_val", 5, _FLOAT),
                _many("int_val", 7, _INT32),
                _many("int64_val", 10, _INT64),
            ),
        ],
    )
    serving = descriptor_pb2.FileDescriptorProto(
        name="tfrec/predict.proto",
        package="tensorflow.serving",
        syntax="proto3",
        dependency=[tensors.name, wrappers_pb2.DESCRIPTOR.name],
        message_type=[
            _message(
                "ModelSpec",
                _one("name", 1, _STRING),
                _one("version", 2, _MESSAGE, ".google.protobuf.Int64Value"),
                _one("signature_name", 3, _STRING),
            ),
            _of_tensors("PredictRequest", "inputs", 2, _one("model_spec", 1, _MESSAGE, _SPEC)),
            _of_tensors("PredictResponse", "outputs", 1, _one("model_spec", 2, _MESSAGE, _SPEC)),
            _message("GetModelStatusRequest", _one("model_spec", 1, _MESSAGE, _SPEC)),
            _message("ModelVersionStatus", _one("version", 1, _INT64), _one("state", 2, _INT32)),
            _message(
                "GetModelStatusResponse",
                _many(
                    "model_version_status", 1, _MESSAGE, ".tensorflow.serving.ModelVersionStatus"
                ),
            ),
        ],
    )
    return tensors, serving


def _classes(*names: str) -> list[Any]:
    # A pool of its own, as TensorFlow, where it is loaded too, has these names in the default one.
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    for file in _files():
        pool.AddSerializedFile(file.SerializeToString())
    return [message_factory.GetMessageClass(pool.FindMessageTypeByName(name)) for name in names]


(
    TensorProto,
    PredictRequest,
    PredictResponse,
    GetModelStatusRequest,
    GetModelStatusResponse,
) = _classes(
    "tensorflow.TensorProto",
    "tensorflow.serving.PredictRequest",
    "tensorflow.serving.PredictResponse",
    "tensorflow.serving.GetModelStatusRequest",
    "tensorflow.serving.GetModelStatusResponse",
)


def request(model: str, version: int, signature: str, inputs: Mapping[str, NDArray[Any]]) -> Any:
    """A PredictRequest for one version of a model.

    Raises:
      TypeError: an array is not float32, int32 or int64.
    """
    out = PredictRequest()
    out.model_spec.name, out.model_spec.signature_name = model, signature
    out.model_spec.version.value = version
    for name, array in inputs.items():
        put(out.inputs[name], array)
    return out


def put(tensor: Any, array: NDArray[Any]) -> None:
    """Writes an array into a TensorProto.

    Raises:
      TypeError: it is not float32, int32 or int64.
    """
    kind = next((k for k, dtype in _DTYPES.items() if array.dtype == dtype), None)
    if kind is None:
        raise TypeError(f"an array is float32, int32 or int64, and got {array.dtype}")
    tensor.dtype = kind
    for size in array.shape:
        tensor.tensor_shape.dim.add(size=size)
    tensor.tensor_content = np.ascontiguousarray(array, _DTYPES[kind]).tobytes()


def array_of(tensor: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    """The array of a TensorProto: of its bytes, or of its numbers, the last of which repeats.

    Args:
      tensor: The TensorProto.
      shape: What it must have.

    Raises:
      ValueError: it is of another shape or kind, or shorter than it says.
    """
    told = tuple(dim.size for dim in tensor.tensor_shape.dim)
    dtype = _DTYPES.get(tensor.dtype)
    if told != shape or dtype is None:
        raise ValueError(f"shape {told} and type {tensor.dtype}, and shape {shape} was expected")
    if tensor.tensor_content:
        return np.frombuffer(tensor.tensor_content, dtype).reshape(shape)
    found = np.array(getattr(tensor, _NUMBERS[tensor.dtype]), dtype)
    if len(found):
        found = np.pad(found, (0, max(math.prod(shape) - len(found), 0)), "edge")
    return found.reshape(shape)
