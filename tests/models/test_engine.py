"""The engine of a trained run, and how the run becomes a Recommender."""

from dataclasses import replace

import checkerboard as board
import numpy as np
import pytest

from tfrec.artifact import Artifact
from tfrec.data.dataset import Dataset
from tfrec.data.interactions import TEST, TRAIN, VALID
from tfrec.data.sequences import EventCoding
from tfrec.errors import ArtifactError
from tfrec.models.engine import RetrievalCard, load_recommender, load_two_tower, recommender_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return board.trained(tmp_path_factory)


@pytest.fixture(scope="module")
def recommender(run):
    return load_recommender(run)


def test_a_card_survives_json():
    card = RetrievalCard(3, 2, 0, 1, 9, EventCoding(("a", "b"), 1.0, 5.0), ("select", "final"))
    assert RetrievalCard.parse(card.dump()) == card
    card = replace(card, text_digest="ab", pretrained=("query_tower.encoder.norm.beta",))
    assert RetrievalCard.parse(card.dump()) == card


@pytest.mark.parametrize(
    ("cut", "parts"),
    [("select", {TRAIN}), ("test", {TRAIN, VALID}), ("final", {TRAIN, VALID, TEST})],
)
def test_a_cut_knows_the_events_that_it_was_trained_on(run, cut, parts):
    found = load_recommender(run, cut)
    assert set(found.interactions.split.tolist()) == parts
    dataset = Dataset.load(run / "prepare")
    assert len(found.interactions) == np.isin(dataset.interactions.split, list(parts)).sum()


def test_an_unknown_cut_is_refused_where_weights_are_asked_for(run):
    retrieval = Artifact.load(run / "adapt" / "retrieval")
    with pytest.raises(ArtifactError, match="no weights of 'other'"):
        load_two_tower(retrieval, Dataset.load(run / "prepare"), "other")


def test_without_a_ranker_there_is_retrieval_alone(run):
    dataset = Dataset.load(run / "prepare")
    retrieval = Artifact.load(run / "adapt" / "retrieval")
    alone = recommender_of(dataset, retrieval, None, "final")
    assert alone.linear is None
    assert not alone.policy.ranks
    users = np.arange(3, dtype=np.int32)
    assert set(alone.lists(alone.interactions, users, 3)) == {"retrieval"}


def test_the_ranker_predicts_each_task_in_its_unit(run, recommender):
    events = recommender.interactions
    told = recommender.predictions(events, events)
    assert set(told) == {"click", "like", "rating"}
    for task in ("click", "like"):
        assert ((told[task] >= 0) & (told[task] <= 1)).all()
    assert 1 < told["rating"].mean() < 5


def test_a_batch_of_queries_equals_one_at_a_time(recommender):
    users = np.array([0, 5, 6, 30], np.int32)
    together = recommender.queries(recommender.who(recommender.interactions, users))
    for place, user in enumerate(users):
        one = np.array([user], np.int32)
        alone = recommender.queries(recommender.who(recommender.interactions, one))
        np.testing.assert_allclose(together[place], alone[0], atol=1e-5)


def test_texts_are_read_by_the_bert_of_the_run(recommender):
    row = 5
    again = recommender.engine.encode_text([recommender.catalog.texts[row]])
    np.testing.assert_allclose(again[0], recommender.text[row], atol=1e-5)


@pytest.mark.parametrize("missing", ["prepare", "adapt/retrieval"])
def test_an_unfinished_run_names_the_folder_that_is_missing(run, tmp_path, missing):
    for part in {"prepare", "adapt/retrieval"} - {missing}:
        (tmp_path / part).parent.mkdir(exist_ok=True)
        (tmp_path / part).symlink_to(run / part)
    with pytest.raises(ArtifactError, match=missing):
        load_recommender(tmp_path)


def test_models_of_another_dataset_are_refused(run, tmp_path):
    (tmp_path / "adapt").symlink_to(run / "adapt")
    board.dataset().save(tmp_path / "prepare")
    with pytest.raises(ArtifactError, match="adapt --task retrieval"):
        load_recommender(tmp_path)
