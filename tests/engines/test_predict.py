"""Messages to TensorFlow Serving: the same bytes as those of its own packages, without them."""

import subprocess
import sys

import numpy as np
import pytest

from tfrec.engines import predict
from tfrec.models.keras_bridge import tf

ARRAYS = {
    "floats": np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 3, 4),
    "ints": np.array([[1, -2], [3, 2**31 - 1]], np.int32),
    "longs": np.array([2**40], np.int64),
    "nobody": np.zeros((0, 5), np.float32),
    "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
}


def test_a_request_is_what_tensorflow_serving_reads():
    from tensorflow_serving.apis import predict_pb2

    asked = predict.request("rank", 7, "arrays", ARRAYS)
    read = predict_pb2.PredictRequest.FromString(asked.SerializeToString())
    spec = read.model_spec
    assert (spec.name, spec.version.value, spec.signature_name) == ("rank", 7, "arrays")
    assert set(read.inputs) == set(ARRAYS)
    for name, array in ARRAYS.items():
        found = tf.make_ndarray(read.inputs[name])
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)
    again = predict.PredictRequest.FromString(read.SerializeToString())
    assert again.model_spec.version.value == 7


@pytest.mark.parametrize("name", list(ARRAYS))
def test_an_answer_in_bytes(name):
    from tensorflow_serving.apis import predict_pb2

    answer = predict_pb2.PredictResponse()
    answer.outputs["out"].CopyFrom(tf.make_tensor_proto(ARRAYS[name]))
    answer.model_spec.version.value = 3
    read = predict.PredictResponse.FromString(answer.SerializeToString())
    assert read.model_spec.version.value == 3
    found = predict.array_of(read.outputs["out"], ARRAYS[name].shape)
    np.testing.assert_array_equal(found, ARRAYS[name])


@pytest.mark.parametrize(
    ("dtype", "field"), [(np.float32, "float_val"), (np.int32, "int_val"), (np.int64, "int64_val")]
)
def test_an_answer_in_numbers(dtype, field):
    from tensorflow.core.framework import tensor_pb2

    array = np.arange(6, dtype=dtype).reshape(2, 3)
    for told, expected in ((array.ravel(), array), ([4, 9], [[4, 9, 9], [9, 9, 9]])):
        tensor = tensor_pb2.TensorProto(dtype=tf.as_dtype(dtype).as_datatype_enum)
        tensor.tensor_shape.CopyFrom(tf.TensorShape([2, 3]).as_proto())
        getattr(tensor, field).extend(told)
        np.testing.assert_array_equal(tf.make_ndarray(tensor), expected)
        read = predict.TensorProto.FromString(tensor.SerializeToString())
        np.testing.assert_array_equal(predict.array_of(read, (2, 3)), expected)


def test_what_is_not_the_array_that_was_expected():
    told = tf.make_tensor_proto(np.ones((2, 3), np.float32)).SerializeToString()
    with pytest.raises(ValueError, match=r"shape \(2, 3\) and type 1, and shape \(2, 4\)"):
        predict.array_of(predict.TensorProto.FromString(told), (2, 4))
    words = tf.make_tensor_proto(["a"]).SerializeToString()
    with pytest.raises(ValueError, match="type 7"):
        predict.array_of(predict.TensorProto.FromString(words), (1,))
    short = predict.TensorProto.FromString(told)
    for content in (b"1234", b""):
        short.tensor_content = content
        with pytest.raises(ValueError, match="reshape"):
            predict.array_of(short, (2, 3))


def test_a_kind_of_numbers_that_is_not_sent():
    with pytest.raises(TypeError, match="float32, int32 or int64, and got float64"):
        predict.request("rank", 1, "arrays", {"x": np.zeros(2)})


def test_which_versions_there_are():
    from tensorflow_serving.apis import get_model_status_pb2 as theirs

    asked = predict.GetModelStatusRequest()
    asked.model_spec.name = "rank"
    read = theirs.GetModelStatusRequest.FromString(asked.SerializeToString())
    assert read.model_spec.name == "rank"
    assert theirs.ModelVersionStatus.AVAILABLE == predict.AVAILABLE
    answer = theirs.GetModelStatusResponse()
    answer.model_version_status.add(version=2, state=theirs.ModelVersionStatus.LOADING)
    found = predict.GetModelStatusResponse.FromString(answer.SerializeToString())
    assert [(one.version, one.state) for one in found.model_version_status] == [(2, 20)]


def test_the_services_have_the_names_of_the_real_ones():
    from tensorflow_serving.apis import model_service_pb2_grpc, prediction_service_pb2_grpc

    class Paths:
        """Notes what a stub calls."""

        def __init__(self):
            self.found = []

        def unary_unary(self, path, **given):
            self.found.append(path)

    paths = Paths()
    prediction_service_pb2_grpc.PredictionServiceStub(paths)
    model_service_pb2_grpc.ModelServiceStub(paths)
    assert {predict.PREDICT, predict.STATUS} <= set(paths.found)


def test_tensorflow_is_not_loaded():
    code = (
        "import sys; import tfrec.engines.tf_serving; "
        "print([n for n in ('tensorflow', 'tensorflow_serving', 'keras') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
