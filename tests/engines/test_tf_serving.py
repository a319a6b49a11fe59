"""TensorFlow Serving as an engine: the same answers, and LiteRT's where it is gone, slow or wrong.

The server is a small one of ours with the real service definitions, on SavedModels run by
TensorFlow.
"""

import asyncio
import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import checkerboard as board
import grpc
import httpx
import numpy as np
import pytest
from serving_server import Models, Service, grpc_at
from tensorflow_serving.apis import prediction_log_pb2
from tiny_bert import write_tiny_bert

from tfrec.bundle import Bundle
from tfrec.config import Config
from tfrec.engines import engine_of, recommender_of
from tfrec.engines.tf_serving import TfServingEngine
from tfrec.errors import ConfigError, InputError, SetupError
from tfrec.models import serving
from tfrec.models.engine import load_recommender
from tfrec.models.keras_bridge import tf
from tfrec.recommender import Request
from tfrec.stages import export

pytestmark = pytest.mark.slow

ASKED = [Request(history=("i2", "i4")), Request(profile="the war of space ship"), Request()]
NAMES = ("encode_query", "encode_candidate", "rank", "encode_text")
TEXTS = ["the war", "love", "", "the war", *(f"film {n} of the love story" * 9 for n in range(30))]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of seconds that reads texts and ranks."""
    folder = tmp_path_factory.mktemp("served")
    bert = write_tiny_bert(folder / "bert")
    settings = board.config(board.write(folder / "files"), f"adapt.text={bert}")
    return board.train(folder / "run", settings)


@pytest.fixture(scope="module")
def bundle(run, tmp_path_factory):
    """A bundle of floats with the SavedModels that are asked for; changed by no test."""
    out = tmp_path_factory.mktemp("bundle") / "bundle"
    everything = serving.Graph.models

    def none():
        raise SetupError("its graph is not needed here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving.scann_graph, "operations", none)
        patch.setattr(
            serving.Graph, "models", lambda graph: {name: everything(graph)[name] for name in NAMES}
        )
        export.run(run, out, int8=False)
    return Bundle.load(out)


@pytest.fixture(scope="module")
def local(bundle):
    """The bundle's recommender by LiteRT; every part counts."""
    return counted(recommender_of(bundle, threads=1))


@pytest.fixture(scope="module")
def models(bundle):
    return Models(bundle.path / "tf-serving", "models.config")


@pytest.fixture
def service(models):
    """Answers as it should, until a test says otherwise."""
    return Service(models)


@pytest.fixture
def address(service):
    with grpc_at(service) as port:
        yield f"127.0.0.1:{port}"


@pytest.fixture
def engine(bundle, local, address):
    """It has time, so that a busy machine is no failure; and a long pause."""
    out = TfServingEngine(address, bundle, local.engine, timeout=30, pause=600)
    yield out
    out.close()


def counted(recommender):
    score = {"retrieval": 1.0, "linear": 2.0, "text": 0.5, "popularity": 0.3, "click": 1.0}
    recommender.policy = replace(recommender.policy, score=score, newcomer=0.7)
    return recommender


def by(recommender, engine):
    """What the recommender answers by an engine: ids, and scores."""
    before, recommender.engine = recommender.engine, engine
    try:
        answers = recommender.recommend(ASKED, 5)
    finally:
        recommender.engine = before
    ids = [[item.item_id for item in answer] for answer in answers]
    return ids, np.array([[item.score for item in answer] for answer in answers])


def same(recommender, engine):
    (ids, scores), (expected, told) = by(recommender, engine), by(recommender, recommender.engine)
    assert ids == expected
    np.testing.assert_allclose(scores, told, rtol=1e-4, atol=1e-4)


def query(recommender, engine):
    asked, _ = recommender.asked(ASKED)
    args = (asked.histories, recommender.vectors, asked.profile, asked.attributes)
    return engine.encode_query(*args)


class TestTheSignatureOfArrays:
    def test_it_takes_and_gives_what_litert_does(self, bundle):
        told = bundle.content["models"]
        pairs = {"query": "encode_query", "candidate": "encode_candidate", "rank": "rank"}
        for here, there in pairs.items():
            arrays = told[f"tf-serving/{there}"]["signatures"]["arrays"]
            for way in ("inputs", "outputs"):
                assert arrays[way] == told[here][way], (there, way)

    def test_a_server_is_warmed_up_for_it(self, bundle, models):
        default = ["serving_default"]
        for name, signatures in (("rank", [*default, "arrays"]), ("encode_text", default)):
            folder = bundle.folder / "tf-serving" / name / "assets.extra"
            logs = tf.data.TFRecordDataset(str(folder / "tf_serving_warmup_requests"))
            asked = [
                prediction_log_pb2.PredictionLog.FromString(log).predict_log.request
                for log in logs.as_numpy_iterator()
            ]
            assert [request.model_spec.signature_name for request in asked] == signatures
            given = {key: tf.make_ndarray(tensor) for key, tensor in asked[-1].inputs.items()}
            assert models.predict(name, signatures[-1], given)


class TestTheSameAnswers:
    def test_as_the_trained_models_and_as_litert(self, run, local, engine):
        """Float32 on all sides: 1e-5 from the trained models, 1e-4 from LiteRT."""
        trained = load_recommender(run).engine
        text, features = local.text[1:4], local.catalog.features[1:4]
        new = np.zeros(3, np.int32)
        for call in (
            lambda e: query(local, e),
            lambda e: e.encode_candidate(text, features, new),
            lambda e: e.encode_text(TEXTS),
            lambda e: e.encode_text(TEXTS, query=True),
        ):
            found = call(engine)
            np.testing.assert_allclose(found, call(trained), atol=1e-5)
            np.testing.assert_allclose(found, call(local.engine), atol=1e-4)
        status = engine.status()
        assert status.calls == status.answered > 4  # so many texts are not read in one call
        assert (status.failed, status.fallbacks) == (0, 0)

    def test_predictions_of_the_ranker(self, run, local, engine):
        trained = counted(load_recommender(run))
        users = np.arange(6, dtype=np.int32)
        asked = trained.who(trained.interactions, users)
        rows = np.arange(1, 13, dtype=np.int32).reshape(6, 2)
        queries = trained.queries(asked)
        expected = trained.parts(asked, queries, rows)
        trained.engine = engine
        for name, values in trained.parts(asked, queries, rows).items():
            np.testing.assert_allclose(values, expected[name], atol=1e-5, err_msg=name)
        assert engine.status().answered == 1

    def test_recommendations(self, local, engine, service):
        same(local, engine)
        assert service.asked == engine.status().answered > 0

    def test_nobody_and_nothing(self, local, engine):
        assert engine.encode_text([]).shape == (0, 32)
        asked, _ = local.asked(ASKED[:1])
        asked = asked.take(np.zeros(0, np.int64))
        args = (asked.histories, local.vectors, asked.profile, asked.attributes)
        assert engine.encode_query(*args).shape == (0, 8)

    def test_many_at_once(self, local, engine):
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: query(local, engine), range(40)))
        for one in found[1:]:
            np.testing.assert_allclose(one, found[0], atol=1e-6)
        assert engine.status().answered == 40

    def test_an_item_of_the_catalog_is_refused_as_by_litert(self, local, engine):
        with pytest.raises(InputError, match="new items alone"):
            engine.encode_candidate(local.text[1:2], local.catalog.features[1:2], np.array([1]))


class TestAtTheStart:
    def test_the_same_version(self, engine, address):
        told = ", ".join(sorted(NAMES))
        line = engine.check()
        assert line.startswith(f"{address} runs version 1 of ")
        assert ", ".join(sorted(line.split(" of ")[1].split(", as")[0].split(", "))) == told
        assert engine.status().state == "ok"

    def test_another_version(self, engine, service, local, monkeypatch):
        monkeypatch.setitem(service.models.versions, "rank", 4)
        line = engine.check()
        assert "is not used" in line
        assert "it has version 4 of 'rank', and not 1; LiteRT runs the models" in line
        same(local, engine)
        assert service.asked == 0

    def test_another_bundle_of_the_same_version(self, engine, service, local):
        service.spoil = lambda answer, _: turn(answer.outputs["query"].float_val)
        assert "answers otherwise: it is of another bundle" in engine.check()
        same(local, engine)
        assert service.asked == 1

    def test_no_server(self, bundle, local):
        engine = TfServingEngine("127.0.0.1:1", bundle, local.engine)
        assert "127.0.0.1:1 is not used until that is mended: UNAVAILABLE, " in engine.check()
        assert engine.status().state == "away"
        same(local, engine)
        engine.close()

    def test_a_bundle_of_an_older_tfrec(self, bundle, local, address, service, tmp_path):
        content = json.loads(json.dumps(bundle.content))
        del content["models"]["tf-serving/rank"]["signatures"]["arrays"]
        old = Bundle(bundle.path, bundle.version, bundle.artifact)
        vars(old)["content"] = content
        engine = TfServingEngine(address, old, local.engine)
        assert "no SavedModels with the signature 'arrays'; LiteRT runs" in engine.check()
        same(local, engine)
        assert (service.asked, engine.status().calls) == (0, 0)


def turn(values):
    values[:] = [-value for value in values]


def numbers(found):
    def spoil(answer, context):
        for output in answer.outputs.values():
            output.float_val[0] = found

    return spoil


def renamed(answer, context):
    (name,) = answer.outputs
    answer.outputs["other"].CopyFrom(answer.outputs.pop(name))


def reshaped(answer, context):
    for output in answer.outputs.values():
        output.tensor_shape.dim[0].size += 1


def renumbered(answer, context):
    answer.model_spec.version.value = 9


def broken(answer, context):
    raise ValueError("a bug")


WRONG = {
    "has numbers that are not finite": numbers(np.nan),
    "'query' of 'encode_query' has numbers": numbers(np.inf),
    "the answer of 'encode_query' has no 'query'": renamed,
    "cannot be read: shape": reshaped,
    "version 9 of 'encode_query' answered, and not 1": renumbered,
    "UNKNOWN, Exception calling application: a bug": broken,
}


class TestFaults:
    @pytest.mark.parametrize("said", list(WRONG))
    def test_a_wrong_answer(self, local, engine, service, said, caplog):
        service.spoil = WRONG[said]
        expected = query(local, local.engine)
        with caplog.at_level(logging.WARNING):
            for _ in range(5):
                np.testing.assert_array_equal(query(local, engine), expected)
        first, *_, last = [r.getMessage() for r in caplog.records if r.name.startswith("tfrec")]
        assert said in first
        assert "LiteRT answered" in first
        assert "failed 3 times in a row" in last
        assert len([r for r in caplog.records if r.name.startswith("tfrec")]) == 3
        status = engine.status()
        assert (status.state, service.asked) == ("away", 3)
        assert (status.answered, status.failed, status.fallbacks) == (0, 3, 5)

    def test_a_slow_server_costs_the_deadline_and_then_nothing(self, bundle, local, service):
        service.seconds = 2.0
        with grpc_at(service) as port:
            engine = TfServingEngine(
                f"127.0.0.1:{port}", bundle, local.engine, timeout=0.2, failures=2, pause=600
            )
            expected = query(local, local.engine)
            for _ in range(6):
                np.testing.assert_array_equal(query(local, engine), expected)
            assert engine.status().reason.startswith("DEADLINE_EXCEEDED")
            assert (service.asked, engine.status().fallbacks) == (2, 6)
            assert engine.status().retried == 0
            engine.close()

    def test_a_server_that_goes_and_comes_back(self, bundle, local, service, caplog):
        with grpc_at(service) as port:
            engine = TfServingEngine(
                f"127.0.0.1:{port}", bundle, local.engine, timeout=10, pause=0.3
            )
            same(local, engine)
        for _ in range(3):
            same(local, engine)
        gone = engine.status()
        assert gone.state == "away"
        assert gone.reason.startswith("UNAVAILABLE")
        with grpc_at(service, port), caplog.at_level(logging.INFO):
            until(lambda: query(local, engine) is not None and engine.status().state == "ok")
            same(local, engine)
        assert f"127.0.0.1:{port} is back" in caplog.text
        assert engine.status().answered > gone.answered
        engine.close()

    def test_it_does_not_come_back_as_another(self, local, engine, service):
        """While it was away somebody put other models there."""
        service.spoil = broken
        engine._breaker.pause = 0.0
        for _ in range(3):
            query(local, engine)
        service.spoil = lambda answer, _: turn(answer.outputs["query"].float_val)
        for _ in range(2):
            np.testing.assert_array_equal(query(local, engine), query(local, local.engine))
        assert "it is of another bundle" in str(engine.status())
        service.spoil = lambda answer, _: None
        query(local, engine)
        assert engine.status().state == "ok"

    def test_what_fails_once_is_asked_again(self, local, engine, service):
        def once(answer, context):
            service.spoil = lambda answer, context: None
            context.abort(grpc.StatusCode.UNAVAILABLE, "starting")

        service.spoil = once
        query(local, engine)
        status = engine.status()
        assert (status.answered, status.retried, status.failed) == (1, 1, 0)

    def test_models_that_the_server_lacks(self, local, engine, service, monkeypatch):
        monkeypatch.delitem(service.models.versions, "encode_text")
        found = engine.encode_text(TEXTS)
        np.testing.assert_array_equal(found, local.engine.encode_text(TEXTS))
        assert engine.status().reason.startswith("NOT_FOUND, Servable not found")

    def test_after_the_end_litert_answers(self, local, engine):
        engine.close()
        np.testing.assert_array_equal(query(local, engine), query(local, local.engine))
        assert engine.status().reason == "the connection was closed"


def until(true, seconds=30.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


class TestTheSetting:
    def test_the_two_that_there_are(self, bundle, local):
        assert engine_of("litert", bundle, local.engine) is local.engine
        made = engine_of("tf-serving://localhost:8500", bundle, local.engine, 0.5)
        assert isinstance(made, TfServingEngine)
        assert (made.timeout, made.history, made.tasks) == (
            0.5,
            local.engine.history,
            local.engine.tasks,
        )
        made.close()

    @pytest.mark.parametrize(
        "setting",
        ["onnx", "tf-serving://localhost", "tf-serving://:8500", "tf-serving://a:0", "a:8500"],
    )
    def test_others(self, bundle, local, setting):
        with pytest.raises(ConfigError, match="neither litert nor tf-serving://HOST:PORT"):
            engine_of(setting, bundle, local.engine)


def test_a_server_of_tfrec_asks_it_and_goes_on_without_it(bundle, service, tmp_path, caplog):
    """The whole server but the port, by HTTP."""
    from tfrec.serving.server import running

    def recommend(app):
        async def ask():
            way = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=way, base_url="http://127.0.0.1") as to:
                answer = await to.post("/v1/recommend", json={"history": ["i2", "i4"], "k": 5})
                return answer, (await to.get("/metrics")).text

        return asyncio.run(ask())

    with caplog.at_level(logging.INFO), ExitStack() as server, ExitStack() as stack:
        port = server.enter_context(grpc_at(service))
        engine = f"tf-serving://127.0.0.1:{port}"
        told = {"serve.engine": engine, "serve.engine_timeout": 30.0, "serve.watch": 0.0}
        told |= {"serve.state": str(tmp_path / "state")}
        app = stack.enter_context(running(bundle.path, Config().changed(told).serve))
        by_server, metrics = recommend(app)
        server.close()
        by_litert, later = recommend(app)
    assert f"127.0.0.1:{port} runs version 1 of" in caplog.text
    assert by_server.status_code == by_litert.status_code == 200
    ids = [[item["item_id"] for item in one.json()["items"]] for one in (by_server, by_litert)]
    assert ids[0] == ids[1]
    assert "tfrec_engine_fallbacks_total 0.0" in metrics
    assert "tfrec_engine_fallbacks_total 0.0" not in later
    assert service.asked > 4
