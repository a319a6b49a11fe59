"""SavedModels for TensorFlow Serving: what happens in their graphs is what happens in Python."""

import http.server
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace

import checkerboard as board
import numpy as np
import pytest
from serving_server import Service, grpc_at

from tfrec.data.catalog import FeatureSchema, Users
from tfrec.errors import InputError, SetupError
from tfrec.golden import cosines
from tfrec.index import Ragged
from tfrec.models import serving
from tfrec.models.engine import load_recommender
from tfrec.models.keras_bridge import tf
from tfrec.recommender import Policy, Request

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recommender(tmp_path_factory):
    """One that reads texts and ranks; every part counts."""
    found = load_recommender(board.trained(tmp_path_factory))
    score = {"retrieval": 1.0, "linear": 2.0, "text": 0.5, "popularity": 0.3, "click": 1.0}
    found.policy = replace(found.policy, score=score, newcomer=0.7)
    return found


@pytest.fixture(scope="module")
def saved(recommender, tmp_path_factory):
    """The folder of the SavedModels, and what they take and give."""
    folder = tmp_path_factory.mktemp("serving")
    return folder, serving.save(recommender, folder).models


def call(saved, model, signature="serving_default", **inputs):
    serving.ready(saved[1][model]["needs"])
    loaded = tf.saved_model.load(str(saved[0] / model))
    found = loaded.signatures[signature](**{k: tf.constant(v) for k, v in inputs.items()})
    return {name: value.numpy() for name, value in found.items()}


HISTORIES = [("i2", "i4", "nothing", "i6"), (), ("i1",), tuple(f"i{n}" for n in range(1, 21))]
REQUESTS = [Request(history=history) for history in HISTORIES]


def padded(rows, fill=""):
    widest = max(len(row) for row in rows)
    return np.array([[*row, *[fill] * (widest - len(row))] for row in rows], object)


def test_queries_from_ids_are_those_of_the_recommender(recommender, saved):
    asked, _ = recommender.asked(REQUESTS)
    expected = recommender.queries(asked)
    found = call(saved, "encode_query", history=padded(HISTORIES))["query"]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    front = np.array([["", *row] for row in padded(HISTORIES)], object)
    np.testing.assert_allclose(
        call(saved, "encode_query", history=front)["query"], found, atol=1e-6
    )
    rows = np.array([[recommender.catalog.row(i) for i in row] for row in padded(HISTORIES)])
    again = call(saved, "encode_query", "rows", history_rows=rows.astype(np.int32))["query"]
    np.testing.assert_allclose(again, found, atol=1e-6)


def full(recommender, users, shift=0):
    """Inputs of the signature ``full`` that say all that is known of users."""
    events = recommender.interactions
    columns = {"history": [], "event": [], "rating": [], "timestamp": []}
    for user in users:
        place = slice(events.offsets[user], events.offsets[user + 1])
        columns["history"].append([recommender.catalog.ids[i] for i in events.item[place]])
        columns["event"].append([events.event_names[i] for i in events.event[place]])
        columns["rating"].append(events.rating[place].tolist())
        columns["timestamp"].append(events.timestamp[place].tolist())
    out = {name: padded(rows) for name, rows in columns.items() if name in ("history", "event")}
    out["rating"] = padded(columns["rating"], np.nan).astype(np.float32)
    out["timestamp"] = padded(columns["timestamp"], 0).astype(np.int64)
    out["profile"] = recommender.profile[users]
    for column, name in serving.Columns("user", recommender.users).inputs.items():
        cells = recommender.users.attributes[column]
        out[name] = np.array([cells[user] for user in users], object)
    return out


def asked_for(saved, model, inputs):
    wanted = saved[1][model]["signatures"]["full"]["inputs"]
    return {name: value for name, value in inputs.items() if name in wanted}


def test_events_ratings_times_and_profiles_are_read_as_in_training(recommender, saved):
    users = np.arange(board.USERS, dtype=np.int32)
    inputs = asked_for(saved, "encode_query", full(recommender, users))
    assert {"event", "rating", "timestamp"} <= set(inputs)
    expected = recommender.queries(recommender.who(recommender.interactions, users))
    found = call(saved, "encode_query", "full", **inputs)["query"]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    changed = {**inputs, "rating": np.full_like(inputs["rating"], np.nan)}
    assert np.abs(call(saved, "encode_query", "full", **changed)["query"] - found).max() > 1e-3


def test_retrieval_leaves_out_what_was_seen_and_what_is_excluded(recommender, saved):
    exclude = [["i8", ""], ["i2", "i4"], ["", ""], ["unknown", "i22"]]
    k = np.array([5, 3, 24, 10], np.int32)
    found = call(
        saved, "retrieve", history=padded(HISTORIES), exclude=np.array(exclude, object), k=k
    )
    asked, seen = recommender.asked(REQUESTS)
    query = recommender.queries(asked)
    assert found["item_id"].shape == (4, 24)
    for row in range(4):
        out = np.concatenate([seen.slice(row, row + 1).ids, recommender.catalog.rows(exclude[row])])
        best = recommender.index.search(query[row : row + 1], int(k[row]), Ragged.of([out]))
        ids = [recommender.catalog.ids[i] for i in best.ids[0] if i]
        mine = [i.decode() for i in found["item_id"][row]]
        assert mine[: len(ids)] == ids
        assert set(mine[len(ids) :]) <= {""}
        scores = found["score"][row, : len(ids)]
        np.testing.assert_allclose(scores, best.scores[0, : len(ids)], rtol=1e-4)


def test_scann_finds_what_an_exact_search_finds(recommender, saved):
    """The board is so small that ScaNN opens every leaf and scores everything again."""
    given = {
        "history": padded(HISTORIES),
        "exclude": np.array([["i8", ""], ["i2", "i4"], ["", ""], ["unknown", "i22"]], object),
        "k": np.array([5, 3, 4, 2], np.int32),
    }
    exact, found = (call(saved, name, **given) for name in ("retrieve", "retrieve_scann"))
    np.testing.assert_array_equal(found["item_id"], exact["item_id"])
    np.testing.assert_allclose(found["score"], exact["score"], rtol=1e-4)
    people = np.arange(board.USERS, dtype=np.int32)
    inputs = asked_for(saved, "retrieve_scann", full(recommender, people))
    inputs |= {"exclude": np.full((len(people), 1), "", object), "k": np.full(len(people), 3, "i4")}
    exact, found = (call(saved, name, "full", **inputs) for name in ("retrieve", "retrieve_scann"))
    np.testing.assert_array_equal(found["item_id"], exact["item_id"])


def test_nobody_comes_out_short_of_items_by_scann(saved):
    """More are wanted than ScaNN finds: everything is compared."""
    given = {
        "history": np.array([["i2", "i4"], ["i3", ""]], object),
        "exclude": np.array([[f"i{n}" for n in range(5, 15)], [""] * 10], object),
        "k": np.array([60, 2], np.int32),
    }
    exact, found = (call(saved, name, **given) for name in ("retrieve", "retrieve_scann"))
    for key in ("item_id", "score"):
        np.testing.assert_array_equal(found[key], exact[key])
    assert (found["item_id"][0] != b"").sum() == board.ITEMS - 12
    empty = {name: tf.zeros([0, 2], tf.string) for name in ("history", "exclude")}
    found = call(saved, "retrieve_scann", **empty, k=np.zeros(0, np.int32))
    assert found["item_id"].shape == (0, 0)


def test_what_needs_other_operations_says_so(saved):
    needs = {name: told["needs"] for name, told in saved[1].items() if told["needs"]}
    assert needs == {"retrieve_scann": ["scann"], "encode_text_strings": ["tensorflow-text"]}
    operations = (saved[0] / "retrieve_scann" / "saved_model.pb").read_bytes()
    assert b"Scann>" in operations
    for name in set(saved[1]) - set(needs):
        operations = (saved[0] / name / "saved_model.pb").read_bytes()
        assert b"Scann>" not in operations
        assert b"Wordpiece" not in operations
    assert not [path for path in saved[0].rglob("*") if path.suffix == ".pkl"]


def test_the_score_of_the_whole_chain(recommender, saved):
    users = np.arange(6, dtype=np.int32)
    rows = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 0], [9, 1, 2], [3, 4, 5], [24, 23, 22]], np.int32)
    inputs = asked_for(saved, "rank", full(recommender, users))
    candidates = np.array([[recommender.catalog.ids[i] for i in row] for row in rows], object)
    found = call(saved, "rank", "full", candidates=candidates, **inputs)
    asked = recommender.who(recommender.interactions, users)
    query = recommender.queries(asked)
    policy = recommender.policy
    everything = replace(policy, score={**dict.fromkeys(policy.tasks, 1e-9), **policy.score})
    parts = recommender.parts(asked, query, rows, everything)
    for task in policy.tasks:
        np.testing.assert_allclose(found[task], parts[task], atol=1e-5, err_msg=task)
    expected = policy.total(parts)
    expected += policy.prior(asked.events)[:, None] * recommender.popular(rows)
    np.testing.assert_allclose(found["score"][rows > 0], expected[rows > 0], rtol=1e-4)
    assert found["score"][2, 2] == np.finfo(np.float32).min


def test_items_new_and_known(recommender, saved):
    catalog = recommender.catalog
    rows = np.array([3, 7, 24], np.int32)
    given = {
        name: np.array([catalog.attributes[column][row] for row in rows], object)
        for column, name in serving.Columns("item", catalog).inputs.items()
    }
    text, features = recommender.text[rows], catalog.features[rows]
    for ids, known in (([catalog.ids[row] for row in rows], rows), (["", "new", ""], rows * 0)):
        found = call(saved, "encode_candidate", item_id=np.array(ids, object), text=text, **given)[
            "vector"
        ]
        expected = recommender.engine.encode_candidate(text, features, known)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_catalogs_own_vectors(recommender, saved):
    """Also of an item whose id was taught nothing."""
    catalog = recommender.catalog
    given = {
        name: np.array(catalog.attributes[column][1:], object)
        for column, name in serving.Columns("item", catalog).inputs.items()
    }
    ids, text = np.array(catalog.ids[1:], object), recommender.text[1:]
    found = call(saved, "encode_candidate", item_id=ids, text=text, **given)["vector"]
    np.testing.assert_allclose(found, recommender.vectors[1:], atol=1e-5)


def test_an_item_that_was_taught_nothing_has_no_id(recommender):
    changed = recommender.vectors.copy()
    recommender.vectors = changed.copy()
    zero = np.zeros(1, np.int32)
    recommender.vectors[5] = recommender.engine.encode_candidate(
        recommender.text[5:6], recommender.catalog.features[5:6], zero
    )
    rows = serving.Graph(recommender)._id_rows.numpy()
    recommender.vectors = changed
    assert rows[5] == 0
    np.testing.assert_array_equal(np.delete(rows, 5), np.delete(np.arange(len(rows)), 5))


def test_edges_of_retrieval(saved):
    found = call(
        saved,
        "retrieve",
        history=np.array([["i2"], ["i3"]], object),
        exclude=np.array([[""], [""]], object),
        k=np.array([60, -1], np.int32),
    )
    assert found["item_id"].shape == found["score"].shape == (2, 60)
    assert (found["item_id"][0] != b"").sum() == board.ITEMS - 1
    assert (found["item_id"][1] == b"").all()
    nobody = {"history": np.zeros((0, 2), object), "exclude": np.zeros((0, 1), object)}
    nobody = {name: tf.zeros(array.shape, tf.string) for name, array in nobody.items()}
    found = call(saved, "retrieve", **nobody, k=np.zeros(0, np.int32))
    assert found["item_id"].shape == (0, 0)


def test_an_item_met_twice_counts_once_in_the_linear_part(recommender, saved):
    history = [["i2", "i4", "i2", "i2"]]
    asked, _ = recommender.asked([Request(history=tuple(history[0]))])
    rows = np.array([[1, 7, 12]], np.int32)
    found = serving.Graph(recommender)._linear_scores(
        tf.constant(asked.histories.item[None]), tf.constant(rows)
    )
    expected = recommender.linear.scores_of(asked.seen, rows)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_texts(recommender, saved):
    texts = ["the war of space ship", "love"]
    encoder = recommender.engine.text_encoder
    tokens, mask = encoder.tokenize(texts)
    found = call(saved, "encode_text", token_ids=tokens, padding_mask=mask)["vector"]
    np.testing.assert_allclose(found, encoder.encode(texts), atol=1e-5)


def test_texts_from_weights_in_int8(recommender, saved):
    texts = ["the war of space ship", "love", "", "story of film (1999)."]
    encoder = recommender.engine.text_encoder
    tokens, mask = encoder.tokenize(texts)
    found = call(saved, "encode_text_int8", token_ids=tokens, padding_mask=mask)["vector"]
    assert cosines(encoder.encode(texts), found)["cosine_min"] > 0.999
    assert np.abs(found - encoder.encode(texts)).max() > 1e-6


def test_strings(recommender, saved):
    texts = ["The WAR of spáce\u200bship", "love 日本 [MASK]", "", "film " * 40]
    encoder = recommender.engine.text_encoder
    for signature in ("serving_default", "query"):
        found = call(saved, "encode_text_strings", signature, text=np.array(texts, object))
        assert cosines(encoder.encode(texts), found["vector"])["cosine_min"] > 0.999


def test_strings_in_float32(recommender, tmp_path):
    told = serving.save(recommender, tmp_path, int8=False)
    assert "float32" in told.left_out["encode_text_int8"]
    assert "encode_text_int8" not in told.models
    texts = ["the war of space ship", "love"]
    found = call((tmp_path, told.models), "encode_text_strings", text=np.array(texts, object))
    np.testing.assert_allclose(
        found["vector"], recommender.engine.text_encoder.encode(texts), atol=1e-5
    )


def test_what_cannot_be_made_is_left_out_with_the_reason(recommender, monkeypatch):
    def missing():
        raise SetupError("ScaNN is not installed")

    def unigram(tokenizer, settings):
        raise InputError("the model of its tokenizer is Unigram and not WordPiece")

    monkeypatch.setattr(serving.scann_graph, "operations", missing)
    monkeypatch.setattr(serving, "WordPieces", unigram)
    graph = serving.Graph(recommender)
    assert graph.left_out == {
        "encode_text_strings": "the model of its tokenizer is Unigram and not WordPiece",
        "retrieve_scann": "ScaNN is not installed",
    }
    assert not {"retrieve_scann", "encode_text_strings"} & set(graph.models())


def test_texts_that_get_other_tokens_leave_the_model_out(recommender, monkeypatch):
    monkeypatch.setattr(serving.WordPieces, "differing", lambda pieces, texts, role: texts[:3])
    told = serving.Graph(recommender).left_out["encode_text_strings"]
    assert told == "3 of 25 texts get other tokens in a graph"


def test_attributes_are_encoded_as_the_schema_does():
    schema = FeatureSchema(
        {"genre & mood": ("war", "love", "fun"), "empty": ()}, {"age": (30.0, 10.0)}
    )
    cells = {
        "genre & mood": ("love|war", "fun", "nothing", "", "war|war"),
        "age": ("20", "", "45.5", "0", "-1e1"),
    }
    cells["empty"] = ("",) * 5
    table = Users(tuple("abcde"), tuple("abcde"), ("",) * 5, cells, schema)
    columns = serving.Columns("user", table)
    assert columns.inputs["genre & mood"] == "user_genre___mood"
    given = {columns.inputs[name]: tf.constant(values) for name, values in cells.items()}
    np.testing.assert_allclose(columns.encode(given, 5), table.features, atol=1e-6)
    np.testing.assert_array_equal(columns.encode({}, 2), np.zeros((2, 4)))


def test_a_model_holds_no_weights_that_it_does_not_use(saved):
    def size(name):
        return sum(path.stat().st_size for path in (saved[0] / name).rglob("*"))

    loaded = tf.saved_model.load(str(saved[0] / "encode_text"))
    words = max(int(np.prod(v.shape)) for v in loaded.used)
    for name in ("encode_query", "retrieve", "retrieve_scann", "encode_candidate", "rank"):
        serving.ready(saved[1][name]["needs"])
        used = tf.saved_model.load(str(saved[0] / name)).used
        assert all(int(np.prod(v.shape)) < words for v in used), name
        assert size(name) > 0


IMPORTS = {(): "", ("tensorflow-text",): "import tensorflow_text", ("scann",): "import scann"}


@pytest.mark.parametrize("needs", list(IMPORTS), ids=" ".join)
def test_they_load_where_there_is_tensorflow_and_what_they_need(
    saved, recommender, tmp_path, needs
):
    """In a process that can import neither tfrec nor Keras, nor anything but what is needed."""
    folder, told = saved
    asked = {
        name: inputs
        for name, inputs in serving.questions(recommender, told).items()
        if tuple(told[name]["needs"]) == needs
    }
    assert asked
    expected = {
        name: serving.answers(folder / name, inputs, needs) for name, inputs in asked.items()
    }
    (tmp_path / "asked.json").write_text(
        json.dumps({name: serving.as_rest(inputs) for name, inputs in asked.items()})
    )
    missing = {"tfrec", "keras", "tf_keras", "keras_hub", "tensorflow_recommenders"}
    missing |= {"tensorflow_text", "scann"} - {name.replace("-", "_") for name in needs}
    missing -= {"keras"} if needs == ("tensorflow-text",) else set()  # which imports it
    code = """
import json, sys
for name in MISSING:
    sys.modules[name] = None
import tensorflow as tf
IMPORT
out = {}
for name, inputs in json.load(open("asked.json")).items():
    f = tf.saved_model.load(f"{sys.argv[1]}/{name}").signatures["serving_default"]
    specs = f.structured_input_signature[1]
    found = f(**{k: tf.constant(v, specs[k].dtype) for k, v in inputs.items()})
    out[name] = {k: v.numpy().astype(str if v.dtype == tf.string else float).tolist()
                 for k, v in found.items()}
json.dump(out, open("found.json", "w"))
""".replace("MISSING", repr(sorted(missing))).replace("IMPORT", IMPORTS[needs])
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if "KERAS" not in name},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    for name, outputs in expected.items():
        for key, values in outputs.items():
            if values.dtype == object:
                assert found[name][key] == serving.as_rest({key: values})[key]
            else:
                np.testing.assert_array_equal(np.float32(found[name][key]), values)


def test_warm_up_requests_are_records_that_the_server_reads(saved, recommender, tmp_path):
    from tensorflow_serving.apis import prediction_log_pb2

    inputs = serving.questions(recommender, saved[1])["retrieve"]
    serving.warm_up(tmp_path, "retrieve", inputs)
    path = tmp_path / "assets.extra" / "tf_serving_warmup_requests"
    (record,) = tf.data.TFRecordDataset(str(path)).as_numpy_iterator()
    request = prediction_log_pb2.PredictionLog.FromString(record).predict_log.request
    assert (request.model_spec.name, request.model_spec.signature_name) == (
        "retrieve",
        "serving_default",
    )
    given = {name: tf.make_ndarray(tensor) for name, tensor in request.inputs.items()}
    found = call(saved, "retrieve", **given)
    expected = serving.answers(saved[0] / "retrieve", inputs)
    np.testing.assert_array_equal(found["item_id"], expected["item_id"])


def test_a_two_tower_alone(tmp_path_factory, tmp_path):
    """No texts and no ranker: no models of these."""
    found = load_recommender(board.trained(tmp_path_factory))
    found.engine.ranker, found.policy = None, Policy()
    told = serving.save(found, tmp_path).models
    assert "rank" not in told
    answer = serving.answers(tmp_path / "encode_query", {"history": padded(HISTORIES)})
    assert answer["query"].shape == (4, 8)


SCORE = {"score": {"shape": [-1, -1], "dtype": "float32"}}
IDS = {"item_id": {"shape": [-1, -1], "dtype": "string"}}
TOLD = {
    "rank": {"signatures": {"full": {"outputs": SCORE}}},
    "retrieve": {"signatures": {"full": {"outputs": {**IDS, **SCORE}}}},
}


@contextmanager
def web(status, body):
    """A server that sends what it is told; gives its address, and the paths that were asked."""
    paths = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            paths.append(self.path)
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *given):
            """Nothing."""

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}", paths
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask_web(status, body, model="retrieve"):
    with web(status, body) as (address, paths), serving.over_rest(address, 3) as plain:
        ask = serving.as_told(plain, TOLD, f"by REST of {address}")
        found = ask(model, "full", {"k": np.array([2, 2], np.int32)})
        return found, paths


def test_a_version_is_asked_by_rest():
    found, paths = ask_web(200, '{"outputs": [[1.5, 2], [0, 1]]}', "rank")
    assert paths == ["/v1/models/rank/versions/3:predict"]
    assert found["score"].dtype == np.float32
    np.testing.assert_array_equal(found["score"], [[1.5, 2], [0, 1]])
    found, _ = ask_web(200, '{"outputs": {"item_id": [["a"], ["b"]], "score": [[1], [2]]}}')
    assert found["item_id"].tolist() == [["a"], ["b"]]


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, "{}", "version 3 of 'retrieve' by REST: what it sends has no 'outputs'"),
        (200, "[[1, 2]]", "what it sends has no 'outputs'"),
        (200, '"yes"', "what it sends has no 'outputs'"),
        (200, "<html>", "by REST: JSONDecodeError"),
        (404, '{"error": "Servable not found"}', "by REST: Servable not found"),
        (500, "[]", "by REST: 500"),
        (200, '{"outputs": {}}', "the answer has no 'item_id'; is it another model"),
        (200, '{"outputs": [[1]]}', "the answer has no 'item_id'"),
        (200, '{"outputs": {"item_id": [["a"], ["b"]]}}', "the answer has no 'score'"),
        (200, '{"outputs": {"item_id": [[1], [2]], "score": [[1], [2]]}}', "is no string"),
        (200, '{"outputs": {"item_id": ["a", "b"], "score": [[1], [2]]}}', r"shape \(2,\), not"),
        (200, '{"outputs": {"item_id": [["a"]], "score": [[1]]}}', r"\(1, 1\), not \(2, -1\)"),
        (200, '{"outputs": {"item_id": [["a"], ["b"]], "score": [[1], ["x"]]}}', "'score' is not"),
        (200, '{"outputs": {"item_id": [["a"], ["b"]], "score": [[1], [2, 3]]}}', "'score' is not"),
        (200, '{"outputs": {"item_id": [["a"], ["b"]], "score": {"a": 1}}}', "'score' is not"),
    ],
)
def test_an_answer_that_is_none_is_one_line(status, body, message):
    with pytest.raises(SetupError, match=message) as raised:
        ask_web(status, body)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, serving.NotServedError) == (status == 404)


class Canned:
    """In place of the models of a server: one version of one, which always says the same."""

    def __init__(self):
        self.versions = {"rank": 3}

    def predict(self, name, signature, inputs):
        return {"score": np.array([[1.5], [2.5]], np.float32)}


def test_a_version_is_asked_by_grpc_and_the_connection_closed():
    k = {"k": np.array([1, 1], np.int32)}
    with grpc_at(Service(Canned())) as port:
        address = f"127.0.0.1:{port}"
        with serving.over_grpc(address, 3) as ask:
            np.testing.assert_array_equal(ask("rank", "full", k)["score"], [[1.5], [2.5]])
        with pytest.raises(SetupError, match="closed channel"):
            ask("rank", "full", k)
        with (
            serving.over_grpc(address, 2) as ask,
            pytest.raises(serving.NotServedError, match="version 2 of 'rank' by gRPC: NOT_FOUND"),
        ):
            ask("rank", "full", k)


def renamed(answer, context):
    answer.outputs["other"].CopyFrom(answer.outputs.pop("score"))


def misshapen(answer, context):
    answer.outputs["score"].tensor_shape.dim[0].size = 7


def untyped(answer, context):
    answer.outputs["score"].dtype = 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (renamed, "the answer has no 'score'"),
        (misshapen, "by gRPC cannot be read: |'score' is not what the bundle says: it has the sha"),
        (untyped, "'rank' by gRPC cannot be read: "),
    ],
)
def test_an_answer_by_grpc_that_is_none_is_one_line(spoil, message):
    service = Service(Canned())
    service.spoil = spoil
    with grpc_at(service) as port, serving.over_grpc(f"127.0.0.1:{port}", 3) as plain:
        ask = serving.as_told(plain, TOLD, "by gRPC")
        with pytest.raises(SetupError, match=message):
            ask("rank", "full", {"k": np.array([1, 1], np.int32)})
