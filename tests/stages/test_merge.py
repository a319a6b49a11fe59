"""merge: the same vectors from an artifact that needs no base."""

import json

import checkerboard as board
import numpy as np
import pytest

from tfrec import cli
from tfrec.artifact import Artifact
from tfrec.data.dataset import Dataset
from tfrec.errors import ArtifactError, InputError
from tfrec.models.engine import load_recommender, load_text, load_two_tower
from tfrec.models.named import read
from tfrec.models.text import TextEncoder
from tfrec.stages import merge

pytestmark = pytest.mark.slow

TEXTS = ["the war of space", "a love story", ""]
TOLERANCE = {"full": 0, "bitfit": 0, "adapter": 0, "prompt": 0, "lora": 1e-6}


def encoded(run, artifact, cut):
    """Candidate vectors made anew, and vectors of some texts."""
    dataset = Dataset.load(run / "prepare")
    model, text = load_two_tower(artifact, dataset, cut)
    rows = np.arange(len(dataset.catalog), dtype=np.int32)
    encoder = model.encoder or load_text(artifact, cut)
    return model.encode_candidate(text, dataset.catalog.features, rows), encoder.encode(TEXTS)


@pytest.fixture(scope="module", params=TOLERANCE)
def both(request, tmp_path_factory):
    """A method, the old and the merged artifact, what that gave, and what this does alone."""
    method, out = request.param, tmp_path_factory.mktemp("merged")
    run = board.tuned(tmp_path_factory, method)
    old = Artifact.load(run / "adapt" / "retrieval")
    before = {cut: encoded(run, old, cut) for cut in ("select", "final")}
    assert cli.main(["merge", str(run), "--to", str(out / "new" / "merged")]) == 0
    base, aside = run.parent / "bert", run.parent / "aside"
    base.rename(aside)
    try:
        new = Artifact.load(out / "new" / "merged", "retrieval")
        after = {cut: encoded(run, new, cut) for cut in ("select", "final")}
    finally:
        aside.rename(base)
    return method, old, new, before, after


def test_the_merged_artifact_gives_the_same_without_the_base(both):
    method, _, _, before, after = both
    for cut in before:
        for one, other in zip(after[cut], before[cut], strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE[method])
    assert np.abs(before["final"][1] - before["select"][1]).max() > 0


def test_its_arrays_are_those_of_the_old_one_to_the_bit(both):
    _, old, new, *_ = both
    arrays = [name for name in old.files if name.endswith(".npy")]
    assert len(arrays) == 8
    assert all(new.files[name] == old.files[name] for name in arrays)
    assert new.metrics == old.metrics


def test_it_says_what_it_was_made_from(both):
    _, old, new, *_ = both
    assert new.parents == {**old.parents, "merged": old.digest}


def test_its_text_is_a_plain_bert_that_others_read(both):
    method, _, new, _, after = both
    names = [name for name in new.files if name.endswith("model.safetensors")]
    weights = {
        name for cut in ("select", "final") for name in read(new.file(f"{cut}/weights.safetensors"))
    }
    if method in ("adapter", "prompt"):
        assert names == ["text/model.safetensors"]
        part = {"adapter": "adapter", "prompt": "prefix"}[method]
        assert any(part in name for name in weights)
        return
    assert names == [f"{cut}/text/model.safetensors" for cut in ("final", "select", "test")]
    assert not any(name.startswith("encoder.") for name in weights)
    plain = TextEncoder.load(new.path / "final" / "text", length=16)
    np.testing.assert_array_equal(plain.encode(TEXTS), after["final"][1])


def test_it_merges_again_into_the_same(both, tmp_path):
    _, _, new, *_ = both
    again = merge.run(new.path, tmp_path / "again")
    same = {name for name in new.files if not name.endswith(".json")}
    assert {n for n in again.files if not n.endswith(".json")} == same
    assert all(again.files[name] == new.files[name] for name in same)


def test_it_takes_the_place_of_the_old_one_beside_a_ranker(tmp_path_factory, tmp_path):
    run = board.trained(tmp_path_factory)
    for part in ("prepare", "adapt/ranking"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        (tmp_path / part).symlink_to(run / part)
    new = merge.run(run / "adapt" / "retrieval", tmp_path / "adapt" / "retrieval")
    assert "text/model.safetensors" in new.files
    old, base = load_recommender(run), run.parent / "bert"
    base.rename(run.parent / "aside")
    try:
        found = load_recommender(tmp_path)
        text = found.engine.encode_text(TEXTS)
    finally:
        (run.parent / "aside").rename(base)
    np.testing.assert_array_equal(text, old.engine.encode_text(TEXTS))
    users = np.arange(5, dtype=np.int32)
    for name, lists in old.lists(old.interactions, users, 5).items():
        np.testing.assert_array_equal(
            found.lists(found.interactions, users, 5)[name].ids, lists.ids
        )


class TestRefusals:
    def test_a_folder_that_is_something_else_stays(self, tmp_path_factory, tmp_path):
        run = board.tuned(tmp_path_factory, "lora")
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(InputError, match="is there already"):
            merge.run(run, tmp_path)
        with pytest.raises(InputError, match="is there already"):
            merge.run(run, run / "adapt" / "retrieval")
        assert (tmp_path / "notes.txt").read_text() == "mine"

    def test_a_run_without_a_model(self, tmp_path):
        with pytest.raises(ArtifactError, match="run the stage that makes it first"):
            merge.run(tmp_path / "nothing", tmp_path / "out")

    def test_a_base_that_is_another_one(self, tmp_path_factory, tmp_path):
        run = board.tuned(tmp_path_factory, "lora")
        card = json.loads((run / "adapt" / "retrieval" / "model.json").read_text())
        assert len(card["text_digest"]) == 64
        with board.other_bert(run), pytest.raises(ArtifactError, match=card["text_digest"][:12]):
            merge.run(run, tmp_path / "out")
        assert not (tmp_path / "out").exists()
