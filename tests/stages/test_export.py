"""export, verify and recommend with a bundle: complete in itself, and the same answers."""

import importlib.abc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from urllib.request import urlopen

import checkerboard as board
import grpc
import numpy as np
import pytest
from serving_server import serving_at
from tensorflow_serving.apis import predict_pb2

from tfrec import bundle, cli, models
from tfrec.artifact import Artifact, content_digest, file_digest, write_json
from tfrec.bundle import Bundle, holds_codes, load_rows
from tfrec.engines import recommender_of
from tfrec.errors import ArtifactError, InputError, SetupError
from tfrec.golden import Golden
from tfrec.models import bundling, serving
from tfrec.models.engine import load_recommender
from tfrec.models.keras_bridge import tf
from tfrec.models.named import kernels, named_variables
from tfrec.recommender import Request, TextDirections
from tfrec.stages import export, verify

pytestmark = pytest.mark.slow

PLAIN = {"int8": False, "saved_models": False}
MODELS = (
    "encode_candidate",
    "encode_query",
    "encode_text",
    "encode_text_int8",
    "encode_text_strings",
    "rank",
    "retrieve",
    "retrieve_scann",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run; changed by no test."""
    return board.trained(tmp_path_factory)


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    """A bundle with one version; changed by no test."""
    out = tmp_path_factory.mktemp("exported") / "bundle"
    export.run(run, out, **PLAIN)
    return out


@pytest.fixture(scope="module")
def made_small(run, tmp_path_factory):
    """A bundle in int8 with one version; changed by no test."""
    out = tmp_path_factory.mktemp("exported") / "small"
    export.run(run, out, saved_models=False)
    return out


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made, tmp_path / "bundle", symlinks=True)
    return tmp_path / "bundle"


def requests(recommender):
    return [
        Request(user_id=recommender.users.ids[3]),
        Request(history=("i2", "i4")),
        Request(user_id=recommender.users.ids[0], history=("i7",), exclude=("i1",)),
        Request(profile="the war of space ship"),
        Request(history=("i2",), profile="love story", include=("i1", "i3", "i4")),
        Request(),
    ]


class TestExport:
    def test_it_recommends_what_the_run_recommends(self, run, made):
        trained, exported = load_recommender(run), recommender_of(Bundle.load(made), threads=1)
        asked = requests(trained)
        for mine, its in zip(trained.recommend(asked), exported.recommend(asked), strict=True):
            assert [item.item_id for item in mine] == [item.item_id for item in its]
            scores = [[item.score for item in answer] for answer in (mine, its)]
            np.testing.assert_allclose(*scores, rtol=1e-4)

    def test_the_manifest_describes_it(self, run, made):
        told = json.loads((made / "manifest.json").read_text())
        assert (told["version"], told["kind"], told["versions"]) == (
            1,
            "bundle",
            {"1": "versions/1"},
        )
        assert set(told["models"]) == {"query", "candidate", "rank", "text"}
        assert told["models"]["query"]["inputs"]["vectors"] == {
            "shape": [-1, -1, 8],
            "dtype": "float32",
        }
        retrieval = Artifact.peek(run / "adapt" / "retrieval")
        assert told["lineage"]["retrieval"] == retrieval.digest
        assert told["metrics"]["retrieval"]["validation"] == retrieval.metrics["validation"]
        ranking = Artifact.peek(run / "adapt" / "ranking").metrics
        assert told["metrics"]["ranking"]["validation"] == ranking["validation"]
        assert told["packages"]["numpy"] == np.__version__
        for name, entry in told["files"].items():
            assert (made / name).stat().st_size == entry["bytes"]
        assert not list(made.rglob("*.pkl"))

    def test_it_needs_nothing_of_the_run_and_no_tensorflow(self, made, tmp_path):
        shutil.copytree(made, tmp_path / "elsewhere")
        code = (
            "import sys; from tfrec import cli; "
            "code = cli.main(['recommend', 'elsewhere', '--history', 'i2,i4', '--k', '3']); "
            "code = code or cli.main(['verify', 'elsewhere']); "
            "sys.exit(code or 10 * ('tensorflow' in sys.modules or 'scipy' in sys.modules))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        assert "every digest and answer holds" in done.stdout
        assert "XNNPACK" not in done.stderr

    def test_inspect_says_what_it_is(self, made, capsys):
        assert cli.main(["inspect", str(made)]) == 0
        told = capsys.readouterr().out
        assert told.startswith(f"{made / 'versions' / '1'}: bundle")
        assert "litert/query.tflite" in told

    def test_the_same_run_again_makes_nothing_new(self, run, copy):
        before = Artifact.peek(copy / "versions" / "1")
        again = export.run(run, copy, **PLAIN)
        assert (again.digest, again.created) == (before.digest, before.created)
        assert bundle.versions(copy) == [1]

    def test_the_same_run_elsewhere_gives_the_same_bytes(self, run, made, tmp_path):
        other = export.run(run, tmp_path / "other", **PLAIN)
        assert other.digest == Artifact.peek(made / "versions" / "1").digest

    def test_another_process_gives_the_same_bytes_but_for_graphs(self, run, served, tmp_path):
        """In int8, with SavedModels: their graphs and what they save differ, and when it was."""
        code = "import sys; from tfrec import cli; sys.exit(cli.main(sys.argv[1:]))"
        said = ["export", str(run), "--to", str(tmp_path / "b"), "--no-users"]
        done = subprocess.run(
            [sys.executable, "-c", code, *said],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": "7"},
        )
        assert done.returncode == 0, done.stderr
        mine, its = (Bundle.load(folder).artifact.files for folder in (served, tmp_path / "b"))
        assert mine.keys() == its.keys()
        differing = {name for name in mine if mine[name] != its[name]}
        graphs = re.compile(r"tf-serving/\w+/(saved_model\.pb|fingerprint\.pb|variables/.*)")
        assert {name for name in differing if not graphs.fullmatch(name)} == set()
        assert sum(name.endswith("tf_serving_warmup_requests") for name in mine) == len(MODELS)

    def test_versions_grow_and_the_oldest_go(self, run, copy):
        export.run(run, copy, users=False, **PLAIN)
        assert (bundle.versions(copy), Bundle.load(copy).version) == ([1, 2], 2)
        export.run(run, copy, saved_models=False, keep=2)
        assert (bundle.versions(copy), Bundle.load(copy).version) == ([2, 3], 3)
        assert Bundle.load(copy, 2).content["users"] == 0
        with pytest.raises(ArtifactError, match="no version 1; there are: 2, 3"):
            Bundle.load(copy, 1)

    def test_without_users_nothing_of_them_is_in_it(self, run, tmp_path):
        made = export.run(run, tmp_path / "bundle", users=False, **PLAIN)
        exported, trained = recommender_of(Bundle.load(tmp_path / "bundle")), load_recommender(run)
        assert (len(exported.users), len(exported.interactions)) == (0, 0)
        names = {name.encode() for name in trained.users.ids}
        for name in made.files:
            words = set(made.file(name).read_bytes().split(b'"'))
            assert not names & words, name
        asked = [Request(history=("i2", "i4")), Request()]
        for mine, its in zip(trained.recommend(asked), exported.recommend(asked), strict=True):
            assert [item.item_id for item in mine] == [item.item_id for item in its]

    def test_int8_is_smaller_and_verified_by_bounds_of_its_own(self, made, made_small):
        text = "versions/1/litert/text/model.tflite"
        assert (made_small / text).stat().st_size < (made / text).stat().st_size
        found = {f"{f.model}, {f.measure}": f for f in verify.run(made_small)}
        assert found["text, LiteRT int8, cosine min"].bound == verify.INT8["cosine_min"]
        query = found["query, LiteRT float32, cosine min"]
        assert query.bound == verify.INT8_ARRAYS["cosine_min"]
        rank = found["rank, LiteRT int8, max difference"]
        assert rank.bound == verify.INT8["max_difference"]
        assert not [one for one in found.values() if not one.ok]

    def test_vectors_and_linear_model_are_int8_unless_told_otherwise(self, run, made, made_small):
        trained, exact, small = (
            load_recommender(run),
            recommender_of(Bundle.load(made)),
            recommender_of(Bundle.load(made_small)),
        )
        for name in ("vectors", "text", "profile"):
            np.testing.assert_array_equal(getattr(exact, name), getattr(trained, name))
        apart = np.abs(small.vectors - trained.vectors)
        step = np.abs(trained.vectors).max(axis=1, keepdims=True) / 127
        assert (apart <= 0.501 * step).all()
        assert apart.max() > 0
        # This BERT is random: to it all texts are nearly the same, and int8 would tell no more.
        np.testing.assert_array_equal(small.text, trained.text)
        assert (exact.linear.weights.dtype, small.linear.weights.dtype) == (np.float32, np.int8)
        error = small.linear.weights * small.linear.scales - trained.linear.weights
        assert 0 < np.abs(error).max() <= 0.501 * small.linear.scales.max()
        for made_of in (exact, small):
            np.testing.assert_array_equal(made_of.index.ids, trained.index.ids)

    def test_the_licence_of_the_weights(self, run, made, tmp_path, capsys):
        """The BERT of these tests is a folder that says nothing of one."""
        told = json.loads((made / "manifest.json").read_text())
        nothing = {"name": "bert", "licence": None, "source": None, "files": []}
        assert told["weights"] == nothing
        bert = run.parent / "bert"
        try:
            (bert / "LICENSE").write_text("as free as air")
            (bert / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
            export.run(run, tmp_path / "b", **PLAIN)
            assert "licence" not in capsys.readouterr().err
        finally:
            for name in ("LICENSE", "README.md"):
                (bert / name).unlink()
        weights = Bundle.load(tmp_path / "b").content["weights"]
        assert (weights["licence"], weights["files"]) == ("apache-2.0", ["litert/text/LICENSE"])
        copied = tmp_path / "b" / "versions" / "1" / "litert" / "text" / "LICENSE"
        assert copied.read_text() == "as free as air"
        export.run(run, tmp_path / "c", **PLAIN)
        assert (
            "the licence of the weights 'bert' is not known here, and no text of it was found"
            in capsys.readouterr().err
        )

    def test_texts_that_int8_tells_apart_are_int8(self, run, tmp_path):
        recommender = load_recommender(run)
        rng = np.random.default_rng(0)
        recommender.text = rng.normal(size=recommender.text.shape).astype(np.float32)
        most = recommender.directions.matrix.shape[1]
        recommender.directions = TextDirections.of(recommender.text, most)
        bundling.write(recommender, "", tmp_path, saved_models=False)
        assert holds_codes(tmp_path / "arrays" / "text.npy")
        found = load_rows(tmp_path / "arrays" / "text.npy")
        apart = recommender.read(found) - recommender.read(recommender.text)
        assert 0 < np.abs(apart).max() < 0.1

    def test_a_bundle_of_format_1_is_read(self, run, made, tmp_path):
        """Its arrays are floats, and its index is beside them whatever its kind."""
        shutil.copytree(made, tmp_path / "old", symlinks=True)
        folder = tmp_path / "old" / "versions" / "1"
        trained = load_recommender(run)
        trained.index.save(folder / "index")
        content = json.loads((folder / "content.json").read_text())
        del content["arrays_int8"]
        write_json(folder / "content.json", content)
        _rewrite(folder)
        bundle.publish(tmp_path / "old", 1, 1)
        manifest = json.loads((tmp_path / "old" / "manifest.json").read_text())
        del manifest["manifests"]
        write_json(tmp_path / "old" / "manifest.json", {**manifest, "format": 1})
        asked = requests(trained)
        old = recommender_of(Bundle.load(tmp_path / "old"))
        for mine, its in zip(trained.recommend(asked), old.recommend(asked), strict=True):
            assert [item.item_id for item in mine] == [item.item_id for item in its]
        assert all(one.ok for one in verify.run(tmp_path / "old"))

    @pytest.mark.parametrize("name", ["linear", "vectors"])
    def test_damaged_codes_are_one_line(self, made_small, tmp_path, name, capsys):
        shutil.copytree(made_small, tmp_path / "small", symlinks=True)
        folder = tmp_path / "small" / "versions" / "1"
        path = folder / "arrays" / f"{name}.int8.npy.zst"
        path.write_bytes(path.read_bytes()[:-4])
        _rewrite(folder)
        assert cli.main(["recommend", str(tmp_path / "small"), "--history", "i2"]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"{name}.int8.npy.zst cannot be read" in line

    def test_two_exports_at_once_make_two_versions(self, run, copy):
        def make(users):
            export.run(run, copy, users=users, int8=users, saved_models=False)

        threads = [threading.Thread(target=make, args=(users,)) for users in (True, False)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (bundle.versions(copy), Bundle.load(copy).version) == ([1, 2, 3], 3)
        assert {Bundle.load(copy, n).content["users"] for n in (2, 3)} == {0, board.USERS}

    def test_versions_that_still_hold_users_are_named(self, run, copy, capsys):
        export.run(run, copy, users=False, **PLAIN)
        assert "still holds the users of version 1; --keep 1 removes it" in capsys.readouterr().err
        export.run(run, copy, users=False, **PLAIN, keep=1)
        assert "still holds" not in capsys.readouterr().err
        assert not list((copy / "versions").glob(".*"))

    def test_the_golden_candidates_are_items(self, made):
        golden = Golden.load(Bundle.load(made).folder / "golden")
        assert (golden.candidates[:, 0] > 0).all()
        known = [i for i, request in enumerate(golden.requests) if request.user_id]
        assert known
        assert (golden.candidates[known] > 0).mean() > 0.2

    def test_progress_and_the_path_on_the_command_line(self, run, tmp_path, capsys):
        said = ("--no-int8", "--no-saved-models")
        assert cli.main(["export", str(run), "--to", str(tmp_path / "b"), *said]) == 0
        told = capsys.readouterr()
        assert told.out.strip() == str(tmp_path / "b" / "versions" / "1")
        assert "exporting" in told.err
        assert cli.main(["verify", str(tmp_path / "b")]) == 0
        told = capsys.readouterr()
        assert "ok    query, LiteRT float32: cosine min 1.000000  (bound 0.9999)" in told.out


@pytest.fixture(scope="module")
def served(run, tmp_path_factory):
    """A bundle with SavedModels; changed by no test."""
    out = tmp_path_factory.mktemp("served") / "bundle"
    export.run(run, out, users=False)
    return out


def told_of(folder, name):
    """The signatures of a SavedModel."""
    return Bundle.load(folder).content["models"][f"tf-serving/{name}"]["signatures"]


def same_answer(found, expected):
    """Compares outputs as REST writes them: names and strings exactly, numbers nearly."""
    if not isinstance(expected, dict):
        found, expected = {"": found}, {"": expected}
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        mine, its = np.array(values), np.array(found[name])
        if mine.dtype.kind == "U":
            np.testing.assert_array_equal(its, mine)
        else:
            np.testing.assert_allclose(its, mine, rtol=1e-5, atol=1e-6)


class TestForTensorFlowServing:
    def test_every_model_has_a_folder_of_versions(self, served):
        told = (served / "tf-serving" / "models.config").read_text()
        everything = (served / "tf-serving" / "models-scann.config").read_text()
        for name in MODELS:
            version = served / "tf-serving" / name / "1"
            assert (version / "saved_model.pb").is_file()
            assert (version / "assets.extra" / "tf_serving_warmup_requests").stat().st_size > 0
            place = f'base_path: "/models/tf-serving/{name}"'
            assert place in everything
            assert (place in told) == (name != "retrieve_scann")
        manifest = json.loads((served / "manifest.json").read_text())
        signature = manifest["models"]["tf-serving/retrieve"]["signatures"]["serving_default"]
        assert signature["inputs"]["history"] == {"shape": [-1, -1], "dtype": "string"}
        assert signature["outputs"]["score"] == {"shape": [-1, -1], "dtype": "float32"}
        told = {name.partition("/")[2]: each for name, each in manifest["models"].items()}
        assert told["retrieve_scann"]["signatures"] == told["retrieve"]["signatures"]
        assert told["retrieve_scann"]["needs"] == ["scann"]
        assert told["encode_text_strings"]["needs"] == ["tensorflow-text"]
        assert told["encode_text_int8"]["needs"] == []
        text = told["encode_text_strings"]["signatures"]["query"]["inputs"]["text"]
        assert text == {"shape": [-1], "dtype": "string"}
        assert manifest["left_out"] == {}
        assert not list(served.rglob("*.pkl"))

    def test_without_int8_it_says_what_is_left_out(self, run, tmp_path):
        export.run(run, tmp_path / "b", users=False, int8=False)
        manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
        assert set(manifest["left_out"]) == {"tf-serving/encode_text_int8"}
        found = {f.model: f for f in verify.run(tmp_path / "b") if f.measure == "cosine min"}
        assert found["encode_text_strings, SavedModel"].bound == verify.FLOORS["cosine_min"]
        assert all(each.ok for each in found.values())

    def test_what_cannot_be_loaded_here_is_said_and_the_rest_is_run(
        self, served, monkeypatch, capsys
    ):
        def missing():
            raise SetupError("ScaNN is not installed")

        monkeypatch.setattr(serving.scann_graph, "operations", missing)
        found = {f.model for f in verify.run(served)}
        assert "retrieve, SavedModel" in found
        assert "retrieve_scann, SavedModel" not in found
        assert "retrieve_scann was not run: ScaNN is not installed" in capsys.readouterr().err

    def test_old_versions_go_from_there_too(self, run, served, tmp_path):
        out = tmp_path / "bundle"
        shutil.copytree(served, out, symlinks=True)
        export.run(run, out, **PLAIN, keep=1)
        assert not (out / "tf-serving").exists()
        assert bundle.versions(out) == [2]

    def test_a_copy_that_followed_the_links_can_be_exported_to(self, run, served, tmp_path):
        out = tmp_path / "bundle"
        shutil.copytree(served, out)
        assert not (out / "tf-serving" / "rank" / "1").is_symlink()
        export.run(run, out, **PLAIN)
        assert (out / "tf-serving" / "rank" / "1").is_symlink()
        assert Bundle.load(out).version == 2

    def test_a_server_cannot_be_asked_without_tensorflow(self, served, monkeypatch):
        monkeypatch.delattr(models, "serving")
        monkeypatch.delitem(sys.modules, "tfrec.models.serving")
        monkeypatch.setattr(sys, "meta_path", [_Missing(), *sys.meta_path])
        assert verify.run(served)
        with pytest.raises(SetupError, match="no TensorFlow"):
            verify.run(served, server="localhost:8500")

    def test_the_examples_are_what_the_models_answer(self, served):
        for name in ("retrieve", "rank"):
            folder = served / "versions" / "1" / "examples"
            asked = json.loads((folder / f"{name}.request.json").read_text())
            answer = json.loads((folder / f"{name}.response.json").read_text())
            place = served / "tf-serving" / name / "1"
            types = {"k": np.int32}
            inputs = {
                key: np.array(value, types.get(key, object))
                for key, value in asked["inputs"].items()
            }
            assert serving.as_rest(serving.answers(place, inputs)) == answer["outputs"]

    def test_every_example_is_answered_by_a_server_as_it_says(self, served):
        """The files are sent as they are, by REST and by gRPC."""
        folder = served / "versions" / "1" / "examples"
        asked = {path.name.partition(".")[0] for path in folder.iterdir()}
        assert asked == set(MODELS)
        with (
            serving_at(served / "tf-serving", "models-scann.config") as (rpc, rest),
            grpc.insecure_channel(rpc) as channel,
        ):
            predict = channel.unary_unary(
                "/tensorflow.serving.PredictionService/Predict",
                response_deserializer=predict_pb2.PredictResponse.FromString,
            )
            for name in MODELS:
                expected = json.loads((folder / f"{name}.response.json").read_text())
                body = (folder / f"{name}.request.json").read_bytes()
                with urlopen(f"http://{rest}/v1/models/{name}:predict", body) as answer:
                    same_answer(json.load(answer)["outputs"], expected["outputs"])
                found = predict((folder / f"{name}.request.pb").read_bytes(), timeout=60).outputs
                told = serving.as_rest({key: tf.make_ndarray(found[key]) for key in found})
                told = told if len(told) > 1 else next(iter(told.values()))
                same_answer(told, expected["outputs"])

    def test_verify_runs_them_all(self, served, capsys):
        assert cli.main(["verify", str(served)]) == 0
        told = capsys.readouterr().out
        for name in MODELS:
            assert f"ok    {name}, SavedModel" in told

    def test_verify_runs_every_signature_and_sees_where_one_answers_otherwise(
        self, run, monkeypatch, tmp_path
    ):
        """Each model gives what it should to another row of what it was asked."""
        export.run(run, tmp_path / "b")
        signatures = {
            name if signature == "serving_default" else f"{name} {signature}"
            for name in MODELS
            for signature in told_of(tmp_path / "b", name)
        }
        assert {"rank full", "encode_query rows", "encode_text_strings query"} < signatures
        found = verify.run(tmp_path / "b")
        assert {f.model.removesuffix(", SavedModel") for f in found} > signatures
        assert [f for f in found if not f.ok] == []
        assert [f.model for f in found if f.measure == "score difference"] == [
            "rank, SavedModel",
            "rank full, SavedModel",
        ]
        load = serving.load

        def turned(folder, needs):
            ask = load(folder, needs)
            return lambda *given: {key: value[::-1] for key, value in ask(*given).items()}

        monkeypatch.setattr(serving, "load", turned)
        failed = {f.model for f in verify.run(tmp_path / "b") if not f.ok}
        assert failed == {f"{title}, SavedModel" for title in signatures}

    def test_a_stock_server_is_not_asked_for_scann(self, served, capsys):
        with serving_at(served / "tf-serving") as (rpc, rest):
            found = {f.model for f in verify.run(served, server=rpc, rest=rest)}
        for way in (f"by gRPC of {rpc}", f"by REST of {rest}"):
            assert f"encode_text_strings, {way}" in found
            assert f"retrieve_scann, {way}" not in found
        told = capsys.readouterr().err
        assert "retrieve_scann was not run: " in told
        assert "by gRPC: NOT_FOUND" in told

    def test_verify_asks_a_server_by_grpc_and_by_rest(self, served, capsys):
        with serving_at(served / "tf-serving", "models-scann.config") as (rpc, rest):
            found = verify.run(served, server=rpc, rest=rest)
            for name in MODELS:
                for signature in told_of(served, name):
                    title = name if signature == "serving_default" else f"{name} {signature}"
                    for way in (f"by gRPC of {rpc}", f"by REST of {rest}"):
                        told = [f for f in found if f.model == f"{title}, {way}"]
                        assert told, (name, way)
                        assert all(f.ok for f in told)
        asked = ["verify", str(served), "--tf-serving", rpc, "--rest", rest]
        assert cli.main(asked) == 3
        assert (
            "does not answer for version 1 of 'encode_candidate' by gRPC: UNAVAILABLE"
            in capsys.readouterr().err
        )

    def test_the_version_that_is_verified_is_the_one_that_is_asked(self, run, served, tmp_path):
        out = tmp_path / "bundle"
        shutil.copytree(served, out, symlinks=True)
        shutil.copytree(out / "versions" / "1", out / "versions" / "2")
        bundle.publish(out, 2, 2)
        with serving_at(out / "tf-serving", "models-scann.config") as (rpc, rest):
            for given in ({"server": rpc, "rest": rest}, {"rest": rest}):
                with pytest.raises(SetupError, match="not answer for version 1 of 'encode_cand"):
                    verify.run(out, version=1, **given)

    def test_a_server_without_the_models_is_one_line(self, served, tmp_path):
        with serving_at(tmp_path) as (rpc, rest):
            with pytest.raises(SetupError, match="by gRPC: NOT_FOUND, Servable not found"):
                verify.run(served, server=rpc, rest=rest)
            with pytest.raises(SetupError, match="by REST: Servable not found"):
                verify.run(served, rest=rest)

    @pytest.mark.parametrize("address", ["localhost", ":8500", "localhost:x", "localhost:0"])
    def test_what_is_no_address(self, served, address):
        with pytest.raises(InputError, match=f"'{address}' is not HOST:PORT"):
            verify.run(served, server=address)

    def test_a_bundle_without_saved_models_has_nothing_to_ask_for(self, made):
        with pytest.raises(InputError, match="exported with --no-saved-models"):
            verify.run(made, server="localhost:8500")

    def test_one_that_does_not_load_is_one_line(self, served, tmp_path):
        shutil.copytree(served, tmp_path / "b", symlinks=True)
        folder = tmp_path / "b" / "versions" / "1"
        (folder / "tf-serving" / "rank" / "saved_model.pb").write_bytes(b"nothing")
        _rewrite(folder)
        bundle.publish(tmp_path / "b", 1, 1)
        with pytest.raises(ArtifactError, match="rank holds no SavedModel that loads"):
            verify.run(tmp_path / "b")


def bundle_files(folder):
    """Name -> content of every file."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def largest(model):
    return max(named_variables(model).values(), key=lambda variable: int(np.prod(variable.shape)))


WEIGHTS = {
    "a kernel of the BERT": lambda engine: list(kernels(engine.text_encoder).values())[-1],
    "a word that no text has": lambda engine: engine.text_encoder.model.token_embedding.embeddings,
    "the query tower": lambda engine: largest(engine.two_tower.query_tower),
    "the candidate tower": lambda engine: largest(engine.two_tower.candidate_tower),
    "the ranker": lambda engine: largest(engine.ranker),
}


class TestBadInput:
    def test_a_run_that_was_never_trained(self, run, tmp_path):
        (tmp_path / "run").mkdir()
        shutil.copytree(run / "prepare", tmp_path / "run" / "prepare")
        with pytest.raises(ArtifactError, match=r"retrieval; run the stage that makes it first"):
            export.run(tmp_path / "run", tmp_path / "bundle")
        assert not (tmp_path / "bundle").exists()

    def test_vectors_that_are_not_finite(self, run, tmp_path, monkeypatch):
        broken = load_recommender(run)
        broken.vectors[3] = np.nan
        monkeypatch.setattr(export, "load_recommender", lambda folder: broken)
        with pytest.raises(InputError, match=r"vectors .* not finite; train again"):
            export.run(run, tmp_path / "bundle")
        assert bundle.versions(tmp_path / "bundle") == []

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    @pytest.mark.parametrize("int8", [False, True])
    @pytest.mark.parametrize("part", list(WEIGHTS))
    def test_a_weight_that_is_not_finite(self, run, tmp_path, monkeypatch, part, int8, value):
        broken = load_recommender(run)
        weight = WEIGHTS[part](broken.engine)
        changed = weight.numpy()
        changed[4, ...] = value
        weight.assign(changed)
        monkeypatch.setattr(export, "load_recommender", lambda folder: broken)
        with pytest.raises(InputError, match="weights that are not finite; train it again"):
            export.run(run, tmp_path / "bundle", int8=int8, saved_models=False)
        assert bundle.versions(tmp_path / "bundle") == []

    def test_something_else_at_the_place(self, run, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(InputError, match="no bundle; name another folder"):
            export.run(run, tmp_path)
        with pytest.raises(InputError, match="no bundle; name another folder"):
            export.run(run, tmp_path / "notes.txt")
        assert (tmp_path / "notes.txt").read_text() == "mine"

    def test_no_version_is_to_be_kept(self, run, tmp_path):
        with pytest.raises(InputError, match="--keep is at least 1, and got 0"):
            export.run(run, tmp_path / "bundle", keep=0)

    def test_a_changed_byte(self, copy):
        path = copy / "versions" / "1" / "litert" / "query.tflite"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=r"query\.tflite does not match its digest"):
            verify.run(copy)

    @pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
    def test_a_changed_byte_in_any_file(self, served, tmp_path, where):
        shutil.copytree(served, tmp_path / "b", symlinks=True)
        files = [path for path in (tmp_path / "b").rglob("*") if path.is_file()]
        kinds = {path.suffix for path in files}
        assert {".json", ".config", ".tflite", ".npy", ".zst", ".parquet", ".pb", ""} <= kinds
        for path in files:
            content = path.read_bytes()
            if not content:
                continue
            changed = bytearray(content)
            changed[int(where * (len(content) - 1))] ^= 1
            path.write_bytes(changed)
            with pytest.raises(ArtifactError):
                verify.run(tmp_path / "b")
            path.write_bytes(content)

    def test_a_version_without_its_description(self, copy):
        (copy / "versions" / "1" / "content.json").write_text("{")
        assert cli.main(["recommend", str(copy), "--history", "i2"]) == 2
        _rewrite(copy / "versions" / "1")
        assert cli.main(["recommend", str(copy), "--history", "i2"]) == 2
        (copy / "versions" / "1" / "content.json").write_text("{}")
        _rewrite(copy / "versions" / "1")
        assert cli.main(["recommend", str(copy), "--history", "i2"]) == 2

    def test_a_missing_file(self, copy):
        (copy / "versions" / "1" / "arrays" / "vectors.npy").unlink()
        with pytest.raises(ArtifactError, match=r"vectors\.npy is missing"):
            recommender_of(Bundle.load(copy))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (
                '{"format": 99, "version": 1}',
                "bundle format 99, and this tfrec .* reads formats 1 and 2",
            ),
            ('{"format": 1, "version": 1}', "is damaged"),
            ("not JSON", "is damaged"),
            ("[]", "is damaged"),
        ],
    )
    def test_another_manifest(self, run, copy, content, message):
        (copy / "manifest.json").write_text(content)
        with pytest.raises(ArtifactError, match=message):
            Bundle.load(copy)
        with pytest.raises(ArtifactError, match=message):
            export.run(run, copy)

    def test_no_bundle(self, tmp_path):
        with pytest.raises(ArtifactError, match="there is no bundle at"):
            Bundle.load(tmp_path / "nothing")
        with pytest.raises(ArtifactError, match="unfinished or no bundle"):
            Bundle.load(tmp_path)

    @pytest.mark.parametrize(
        ("share", "settings"), [(0.1, PLAIN), (0.6, PLAIN), (0.5, {})], ids=["0.1", "0.6", "graphs"]
    )
    def test_a_full_disk_leaves_the_old_version(
        self, run, made, served, small_disk, share, settings
    ):
        """Whoever writes then: NumPy, TensorFlow or this package."""
        room = share * _kilobytes(made if settings else served)
        disk = small_disk(int(_kilobytes(made) + room))
        shutil.copytree(made, disk / "bundle", symlinks=True)
        with pytest.raises(SetupError, match="no space left on the disk while writing"):
            export.run(run, disk / "bundle", users=False, **settings)
        assert (bundle.versions(disk / "bundle"), Bundle.load(disk / "bundle").version) == ([1], 1)
        assert [path.name for path in (disk / "bundle" / "versions").iterdir()] == ["1"]

    def test_a_kill_in_mid_export_leaves_the_old_version(self, run, copy):
        before = bundle_files(copy)
        code = (
            "import os, signal, sys; from pathlib import Path; from tfrec.golden import Golden; "
            "from tfrec.stages import export; "
            "Golden.save = lambda golden, folder: os.kill(os.getpid(), signal.SIGKILL); "
            "export.run(sys.argv[1], sys.argv[2], users=False, int8=False, saved_models=False)"
        )
        done = subprocess.run([sys.executable, "-c", code, str(run), str(copy)])
        assert done.returncode == -signal.SIGKILL
        (draft,) = (copy / "versions").glob(".*")
        assert list(draft.rglob("*.tflite"))
        assert {name: text for name, text in bundle_files(copy).items() if name in before} == before
        assert Bundle.load(copy).version == 1
        bundle.check(copy)
        assert recommender_of(Bundle.load(copy)).recommend([Request(history=("i2",))])[0]
        export.run(run, copy, users=False, **PLAIN)
        assert (bundle.versions(copy), Bundle.load(copy).version) == ([1, 2], 2)
        assert not list((copy / "versions").glob(".*"))
        bundle.check(copy)

    def test_answers_that_differ_fail(self, copy, capsys):
        folder = copy / "versions" / "1"
        queries = np.load(folder / "golden" / "query.npy")
        np.save(folder / "golden" / "query.npy", queries[::-1])
        _rewrite(folder)
        bundle.publish(copy, 1, 1)
        assert cli.main(["verify", str(copy)]) == 2
        assert "FAIL  query, LiteRT float32: cosine min" in capsys.readouterr().out


def _kilobytes(folder):
    """What it takes on a disk with blocks of 4 kB."""
    sizes = [path.lstat().st_size for path in folder.rglob("*")]
    return sum(4 * -(-size // 4096) for size in sizes)


class _Missing(importlib.abc.MetaPathFinder):
    """Says that TensorFlow is missing, as the bridge does, when it is needed."""

    def find_spec(self, name, path=None, target=None):
        if name == "tfrec.models.serving":
            raise SetupError("there is no TensorFlow")


def _rewrite(folder):
    """Gives an artifact whose payload was changed on purpose the digests it now has."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name, entry in manifest["files"].items():
        file = folder / name
        entry |= {"sha256": file_digest(file), "bytes": file.stat().st_size}
    manifest["digest"] = content_digest(
        manifest["kind"], manifest["config"], manifest["parents"], manifest["files"]
    )
    write_json(path, manifest)
