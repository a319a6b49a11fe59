"""ScannGraph: what ScaNN's operations find in a graph, and what becomes of it in a SavedModel."""

import numpy as np
import pytest

from tfrec.errors import SetupError
from tfrec.index.tuner import Plan, Tuned, plan_for
from tfrec.models import scann_graph
from tfrec.models.keras_bridge import tf
from tfrec.models.scann_graph import ScannGraph

LOWEST = np.finfo(np.float32).min


def table(rows, seed=0, width=16):
    """float32 (rows, width), in clusters; row 0 is zero."""
    rng = np.random.default_rng(seed)
    found = rng.normal(size=(rows, 4)) @ rng.normal(size=(4, width))
    found += 0.3 * rng.normal(size=(rows, width))
    found[0] = 0
    return found.astype(np.float32)


def best(vectors, queries, k):
    scores = queries @ vectors.T
    return np.argsort(-scores, axis=1, kind="stable")[:, :k], -np.sort(-scores, axis=1)[:, :k]


def shared(mine, its):
    return np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(mine, its, strict=True)])


@pytest.fixture(scope="module")
def vectors():
    return table(3000)


@pytest.fixture(scope="module")
def graph(vectors):
    return ScannGraph(tf.Variable(vectors), table(500, seed=1))


def saved(graph, width, folder):
    module = tf.Module()
    module.used = graph.variables

    def run(queries, fetch):
        rows, scores = graph.search(queries, fetch)
        return {"rows": rows, "scores": scores}

    specs = [tf.TensorSpec([None, width], name="queries"), tf.TensorSpec([], tf.int32, "fetch")]
    traced = tf.function(run, input_signature=specs).get_concrete_function()
    tf.saved_model.save(module, str(folder), signatures=traced)
    return tf.saved_model.load(str(folder)).signatures["serving_default"]


def test_it_finds_most_of_the_best_in_order(graph, vectors):
    queries = table(300, seed=2)[1:]
    rows, scores = graph.search(queries, 20)
    expected, _ = best(vectors, queries, 20)
    assert shared(expected.tolist(), rows.numpy().tolist()) > 0.9
    inner = np.einsum("bd,bkd->bk", queries, vectors[rows.numpy()])
    np.testing.assert_allclose(scores, inner, rtol=1e-4, atol=1e-4)
    assert (np.diff(scores.numpy(), axis=1) <= 0).all()


@pytest.mark.parametrize("fetch", [1, 10, 55, 100, 230, 3000])
def test_the_plan_in_the_graph_is_that_of_the_index(graph, fetch):
    plan = plan_for(Tuned(0.95, dict(graph._plans)), fetch)
    leaves, candidates = (int(number) for number in graph.plan(tf.constant(fetch)))
    assert leaves == min(plan.leaves, graph._layout.leaves)
    assert candidates == min(max(plan.candidates, fetch), 3000)


def test_plans_are_of_the_operations_themselves(graph):
    assert all(isinstance(plan, Plan) and plan.recall > 0.9 for _, plan in graph._plans)


def test_more_than_there_are(graph):
    rows, scores = (part.numpy() for part in graph.search(table(3, seed=3)[1:], 10_000))
    assert rows.shape[1] <= 3000
    assert (rows[scores == LOWEST] == 0).all()
    assert all(
        len(set(row[kept])) == kept.sum() for row, kept in zip(rows, scores > LOWEST, strict=True)
    )


def test_nobody_asks(graph):
    rows, scores = graph.search(np.zeros((0, 16), np.float32), 5)
    assert rows.shape[0] == scores.shape[0] == 0


def test_a_query_that_is_no_number_finds_nothing(graph):
    queries = np.stack([np.full(16, np.nan, np.float32), table(2)[1]])
    rows, scores = (part.numpy() for part in graph.search(queries, 5))
    assert (scores[0] == LOWEST).all()
    assert (rows[0] == 0).all()
    assert (scores[1] > LOWEST).any()


@pytest.mark.parametrize("size", [1, 2, 15])
def test_too_few_for_codes_are_all_compared(tmp_path, size):
    vectors = table(size)
    found = ScannGraph(tf.Variable(vectors))
    run = saved(found, 16, tmp_path / "m")
    queries = table(4, seed=4)[1:]
    answer = run(queries=tf.constant(queries), fetch=tf.constant(3))
    expected, scores = best(vectors, queries, min(3, size))
    np.testing.assert_array_equal(answer["rows"], expected)
    np.testing.assert_allclose(answer["scores"], scores, rtol=1e-4, atol=1e-5)


def test_two_graphs_in_one_process_do_not_meet(tmp_path):
    """Without a name of its own, each would search what the first one holds."""
    tables = [table(200, seed=seed) for seed in (5, 6)]
    runs = [
        saved(ScannGraph(tf.Variable(vectors)), 16, tmp_path / str(place))
        for place, vectors in enumerate(tables)
    ]
    queries = table(20, seed=7)[1:]
    for vectors, run in zip(tables, runs, strict=True):
        found = run(queries=tf.constant(queries), fetch=tf.constant(5))
        assert shared(best(vectors, queries, 5)[0].tolist(), found["rows"].numpy().tolist()) > 0.8


def test_the_same_vectors_give_the_same_parts(graph, vectors):
    """Whatever was trained in the process before; only the tuner has a clock."""
    again = ScannGraph(tf.Variable(vectors), table(500, seed=1))
    for part, other in zip(graph.variables, again.variables, strict=True):
        assert part.shape == other.shape
        if part.shape.rank == 0:
            assert part.numpy() == other.numpy() == 0


def test_the_vectors_are_stored_once(graph, vectors, tmp_path):
    run = saved(graph, 16, tmp_path / "m")
    stored = (tmp_path / "m" / "variables" / "variables.data-00000-of-00001").stat().st_size
    assert stored < 1.5 * vectors.nbytes
    queries = table(20, seed=8)[1:]
    rows, _ = graph.search(queries, 10)
    answer = run(queries=tf.constant(queries), fetch=tf.constant(10))
    np.testing.assert_array_equal(answer["rows"], rows)


def test_without_scann_it_says_so(monkeypatch, tmp_path):
    scann_graph.operations.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(scann_graph, "find_spec", lambda name: None)
            with pytest.raises(SetupError, match="pip install scann"):
                scann_graph.operations()

        class Empty:
            submodule_search_locations = (str(tmp_path),)

        with monkeypatch.context() as patch:
            patch.setattr(scann_graph, "find_spec", lambda name: Empty)
            with pytest.raises(SetupError, match="operations for TensorFlow cannot be loaded"):
                scann_graph.operations()
    finally:
        scann_graph.operations.cache_clear()
