"""Recommender: what it answers, whoever asks, with a real two-tower over a small catalog."""

from dataclasses import replace

import numpy as np
import pytest
from toys import make_interactions, make_two_tower, small_config

from tfrec.config import AdaptConfig
from tfrec.data.catalog import Catalog, FeatureSchema, Users
from tfrec.errors import InputError
from tfrec.index import ExactIndex, Ragged
from tfrec.index.scann import installed
from tfrec.models.bundling import without_users
from tfrec.models.engine import TensorFlowEngine
from tfrec.recommender import LinearItems, Policy, Recommender, Request, TextDirections

ITEMS, NEWCOMERS = 12, 2
GENRES = ("Drama", "War|Drama", "Comedy", "War")


class _Engine(TensorFlowEngine):
    """Texts become vectors by the letters they hold; all else is the real two-tower."""

    def encode_text(self, texts, query=False):
        letters = np.array([[text.count(x) for x in "abcde"] for text in texts], np.float32)
        return letters / np.maximum(np.linalg.norm(letters, axis=1, keepdims=True), 1e-9)

    def rank(self, inputs):
        """A ranker whose one task is known: newest first."""
        assert inputs["scalars"].shape == (*inputs["candidates"].shape[:2], 3)
        assert inputs["text"].shape[:2] == inputs["candidates"].shape[:2]
        assert inputs["profile"].shape == (len(inputs["query"]), 0)  # nobody has a profile
        return {"click": inputs["attributes"][:, :, 0]}


def catalog(items: int) -> Catalog:
    ids = ("", *(f"i{n}" for n in range(1, items + 1)))
    return Catalog(
        ids,
        tuple(f"Title {n}" if n else "" for n in ids),
        ids,
        {
            "genre": ("", *(GENRES[n % 4] for n in range(items))),
            "year": ("", *(str(1990 + n % 3) for n in range(items))),
        },
        FeatureSchema(numeric={"year": (1991.0, 1.0)}),
    )


@pytest.fixture(scope="module")
def model():
    return make_two_tower(small_config(), ITEMS)


def make(model, items=ITEMS, **parts) -> Recommender:
    """Six users, the last without an event; items beyond those the model was trained on are new."""
    rng = np.random.default_rng(4)
    items_ = catalog(items)
    attributes = np.zeros((items + 1, 2), np.float32)
    attributes[:, :1] = items_.features
    text = np.abs(rng.normal(size=(items + 1, 5))).astype(np.float32)
    text[0] = 0
    text /= np.maximum(np.linalg.norm(text, axis=1, keepdims=True), 1e-9)
    rows = np.arange(items + 1, dtype=np.int32)
    vectors = model.encode_candidate(text, attributes, rows)
    vectors[0] = 0
    lengths = [5, 3, 1, 8, 2, 0]
    users = Users(
        tuple(f"u{u}" for u in range(6)),
        tuple(f"u{u}" for u in range(6)),
        ("", "", "", "", "", "eee"),
        {"age": tuple("123456")},
        FeatureSchema(numeric={"age": (3.0, 1.0), "size": (0.0, 1.0)}),
    )
    return Recommender(
        _Engine(model, None, AdaptConfig()),
        items_,
        users,
        make_interactions(lengths, ITEMS),
        model.coding,
        vectors,
        text,
        np.zeros((6, 0), np.float32),
        **parts,
    )


@pytest.fixture(scope="module")
def plain(model):
    return make(model)


@pytest.fixture(scope="module")
def linear():
    weights = np.random.default_rng(7).normal(size=(ITEMS + 1, ITEMS + 1)).astype(np.float32)
    weights[0] = weights[:, 0] = 0
    return LinearItems(weights)


@pytest.fixture(scope="module")
def chain(model, linear):
    """Two sources of candidates and a ranker."""
    score = {"retrieval": 1.0, "linear": 0.5, "click": 0.25}
    return make(model, policy=Policy(3, 4, score, ("click",)), linear=linear)


def ids(answer) -> list[str]:
    return [found.item_id for found in answer]


def ask(recommender, k=5, **request) -> list[str]:
    return ids(recommender.recommend([Request(**request)], k)[0])


def seen(recommender, user: int) -> set[str]:
    (rows,) = recommender.interactions.histories([user])
    return {recommender.catalog.ids[row] for row in rows}


class TestWhatMayCome:
    @pytest.mark.parametrize("which", ["plain", "chain"])
    def test_every_known_user_gets_all_that_he_has_not_seen_and_nothing_else(self, which, request):
        recommender = request.getfixturevalue(which)
        everything = set(recommender.catalog.ids[1:])
        for user in range(5):
            found = ask(recommender, ITEMS, user_id=f"u{user}")
            assert set(found) == everything - seen(recommender, user)
            assert len(found) == len(set(found))

    @pytest.mark.parametrize("which", ["plain", "chain"])
    def test_what_was_seen_comes_again_if_it_may(self, which, request):
        recommender = request.getfixturevalue(which)
        found = ask(recommender, ITEMS, user_id="u3", include_seen=True)
        assert set(found) == set(recommender.catalog.ids[1:])

    def test_a_raw_history_counts_as_seen_too(self, plain):
        assert not {"i1", "i2"} & set(ask(plain, ITEMS, history=("i1", "i2")))
        unseen = set(plain.catalog.ids[1:]) - seen(plain, 0) - {"i1"}
        assert set(ask(plain, ITEMS, user_id="u0", history=("i1",))) == unseen

    @pytest.mark.parametrize("who", [{"user_id": "u0"}, {"user_id": "new"}, {"profile": "abc"}])
    def test_excluded_items_do_not_come_and_unknown_ones_are_passed_over(self, plain, who):
        found = ask(plain, ITEMS, exclude=("i1", "i2", "i3", "nix"), **who)
        assert not {"i1", "i2", "i3"} & set(found)
        assert len(found) >= ITEMS - 3 - 5

    @pytest.mark.parametrize("who", [{"user_id": "u2"}, {"user_id": "new"}, {"profile": "abc"}])
    def test_only_included_items_come(self, plain, who):
        found = ask(plain, ITEMS, include=("i1", "i2", "i3", "nix"), include_seen=True, **who)
        assert set(found) == {"i1", "i2", "i3"}

    def test_a_filter_takes_items_with_any_of_its_values(self, plain):
        genre = dict(zip(plain.catalog.ids, plain.catalog.attributes["genre"], strict=True))
        found = ask(plain, ITEMS, history=("nix",), filters={"genre": ["War", "Comedy"]})
        assert set(found) == {i for i, g in genre.items() if "War" in g or "Comedy" in g}
        found = ask(plain, ITEMS, history=("nix",), filters={"genre": ["Drama"]})
        assert set(found) == {i for i, g in genre.items() if "Drama" in g}

    def test_all_filters_and_the_included_must_hold_together(self, plain):
        both = {"genre": ["War"], "year": ["1990"]}
        expected = {"i4", "i10"}  # places 3 and 9: a genre of War by 4, the year 1990 by 3
        assert set(ask(plain, ITEMS, filters=both)) == expected
        assert ask(plain, ITEMS, filters=both, include=("i4", "i1")) == ["i4"]

    def test_a_filter_by_an_unknown_attribute_names_those_there_are(self, plain):
        with pytest.raises(InputError, match=r"'color'.*genre, year"):
            ask(plain, filters={"color": ["red"]})

    @pytest.mark.parametrize("which", ["plain", "chain"])
    @pytest.mark.parametrize("who", [{"user_id": "u0"}, {"user_id": "new"}, {"profile": "a"}])
    def test_where_nothing_is_allowed_the_answer_is_empty(self, which, who, request):
        recommender = request.getfixturevalue(which)
        assert ask(recommender, filters={"genre": ["Western"]}, **who) == []

    @pytest.mark.parametrize("which", ["plain", "chain"])
    @pytest.mark.parametrize("k", [1, 4, 7])
    def test_exactly_k_come_where_k_exist(self, which, k, request):
        recommender = request.getfixturevalue(which)
        for who in ({"user_id": "u0"}, {"history": ("i3",)}, {"user_id": "u5"}, {"user_id": "x"}):
            assert len(ask(recommender, k, **who)) == k

    def test_k_below_one_is_refused(self, plain):
        with pytest.raises(InputError, match="at least 1"):
            plain.recommend([Request()], 0)

    def test_no_request_no_answer(self, plain):
        assert plain.recommend([], 3) == []


class TestWhoAsks:
    def test_a_raw_history_equals_the_user_who_has_it(self, model):
        # Without times, ratings and attributes the two are the same to the model.
        recommender = make(model)
        events = recommender.interactions
        flat = replace(
            events,
            timestamp=np.zeros_like(events.timestamp),
            rating=np.full_like(events.rating, np.nan),
            event=np.zeros_like(events.event),
        )
        users = Users(recommender.users.ids, recommender.users.ids, ("",) * 6)
        users.__dict__["features"] = np.zeros((6, 2), np.float32)
        parts = (recommender.vectors, recommender.text, recommender.profile)
        same = Recommender(
            recommender.engine, recommender.catalog, users, flat, model.coding, *parts
        )
        told = tuple(same.catalog.ids[row] for row in flat.histories([0])[0])
        known, raw = same.recommend([Request(user_id="u0"), Request(history=told)], 5)
        assert ids(known) == ids(raw)
        assert [f.score for f in known] == pytest.approx([f.score for f in raw], abs=1e-6)

    def test_the_order_of_a_history_matters(self, plain):
        first, second = (
            plain.recommend([Request(history=h)], 5)[0] for h in (("i1", "i7"), ("i7", "i1"))
        )
        assert [f.score for f in first] != [f.score for f in second]

    def test_unknown_items_of_a_history_are_passed_over(self, plain):
        assert ask(plain, history=("i1", "nix", "i7")) == ask(plain, history=("i1", "i7"))

    def test_a_history_of_unknown_items_alone_is_none(self, plain):
        (answer,) = plain.recommend([Request(history=("nix", "nox"))], 3)
        assert {found.source for found in answer} == {"popular"}

    def test_behaviour_is_marked(self, plain):
        for request in (Request(user_id="u2"), Request(history=("i1",), profile="abc")):
            (answer,) = plain.recommend([request], 3)
            assert {found.source for found in answer} == {"behaviour"}

    def test_somebody_unknown_gets_what_is_popular(self, plain):
        (answer,) = plain.recommend([Request(user_id="new")], ITEMS)
        counts = np.bincount(plain.interactions.item, minlength=ITEMS + 1)[1:]
        order = np.argsort(-counts, kind="stable") + 1
        assert ids(answer) == [f"i{row}" for row in order]
        assert {found.source for found in answer} == {"popular"}

    def test_somebody_unknown_with_a_profile_gets_what_reads_like_it(self, plain):
        (answer,) = plain.recommend([Request(profile="b")], ITEMS)
        assert {found.source for found in answer} == {"text"}
        assert ids(answer)[0] == plain.catalog.ids[int(plain.text[:, 1].argmax())]

    def test_a_known_user_without_events_is_answered_by_his_profile(self, plain):
        (answer,) = plain.recommend([Request(user_id="u5")], 3)
        assert {found.source for found in answer} == {"text"}
        likeness = plain.text @ plain.engine.encode_text(["eee"])[0]
        score = likeness + 0.3 * plain.popularity / plain.popularity.max()
        score[0] = -np.inf
        best = np.argsort(-score, kind="stable")[:3]
        assert ids(answer) == [plain.catalog.ids[row] for row in best]
        assert ids(answer) != ids(plain.recommend([Request(profile="eee")], 3)[0])

    def test_a_profile_moves_the_list_of_a_known_user(self, plain):
        liked = plain.catalog.ids[int(plain.text[:, 1].argmax())]
        asked = {"user_id": "u4", "include_seen": True}
        without = ask(plain, ITEMS, **asked).index(liked)
        with_it = ask(plain, ITEMS, profile="b", **asked).index(liked)
        assert with_it <= without
        assert ask(plain, ITEMS, profile="b", **asked) != ask(plain, ITEMS, **asked)

    def test_without_text_a_profile_falls_back_to_popularity(self, model):
        recommender = make(model)
        recommender.text = np.zeros((ITEMS + 1, 0), np.float32)
        (answer,) = recommender.recommend([Request(profile="b")], 3)
        assert {found.source for found in answer} == {"popular"}

    def test_titles_come_with_the_ids_and_scores_fall(self, plain):
        (answer,) = plain.recommend([Request(user_id="u1")], 6)
        assert all(found.title == f"Title {found.item_id}" for found in answer)
        scores = [found.score for found in answer]
        assert scores == sorted(scores, reverse=True)


REQUESTS = [
    Request(user_id="u0"),
    Request(user_id="u1", profile="abc"),
    Request(history=("i1", "i2", "i3")),
    Request(user_id="new"),
    Request(profile="ed"),
    Request(user_id="u2", filters={"genre": ["War"]}),
    Request(user_id="u3", exclude=("i1",)),
    Request(user_id="u3", include_seen=True),
    Request(user_id="u5"),
    Request(user_id="u4", include=("i1", "i2", "i3")),
    Request(user_id="u4", time=1_800_000_000),
]


@pytest.mark.parametrize("which", ["plain", "chain"])
def test_a_batch_answers_each_request_as_if_it_were_alone(which, request):
    recommender = request.getfixturevalue(which)
    together = recommender.recommend(REQUESTS, 4)
    for asked, answer in zip(REQUESTS, together, strict=True):
        (alone,) = recommender.recommend([asked], 4)
        assert ids(alone) == ids(answer)
        assert [f.score for f in alone] == pytest.approx([f.score for f in answer], abs=1e-5)


def test_a_request_without_a_time_is_the_same_beside_one_with_a_time():
    model = make_two_tower(small_config(request_time=True), ITEMS)
    recommender = make(model)
    timed = Request(user_id="u1", time=1_700_000_000)
    (alone,) = recommender.recommend([Request(user_id="u0")], 4)
    beside, _ = recommender.recommend([Request(user_id="u0"), timed], 4)
    assert [f.score for f in alone] == pytest.approx([f.score for f in beside], abs=1e-6)


class TestLists:
    @pytest.mark.parametrize("which", ["plain", "chain"])
    def test_they_are_what_recommend_answers(self, which, request):
        recommender = request.getfixturevalue(which)
        users = np.array([3, 0, 4], np.int32)
        lists = recommender.lists(recommender.interactions, users, 4)
        found = lists["ranking" if which == "chain" else "retrieval"]
        for row, user in zip(found.ids, users, strict=True):
            answer = ask(recommender, 4, user_id=f"u{user}")
            assert [recommender.catalog.ids[i] for i in row if i] == answer

    def test_they_are_of_retrieval_alone_where_there_is_nothing_else(self, plain, chain):
        users = np.array([0], np.int32)
        assert set(plain.lists(plain.interactions, users, 3)) == {"retrieval"}
        both = chain.lists(chain.interactions, users, 3)
        assert set(both) == {"retrieval", "ranking"}
        alone = plain.lists(plain.interactions, users, 3)["retrieval"]
        np.testing.assert_array_equal(both["retrieval"].ids, alone.ids)

    def test_who_has_no_event_gets_in_a_list_what_recommend_answers_him(self, chain):
        users = np.arange(6, dtype=np.int32)
        lists = chain.lists(chain.interactions, users, 4)
        expected = ask(chain, 4, user_id="u5")
        for found in lists.values():
            assert [chain.catalog.ids[i] for i in found.ids[5]] == expected
        bare = chain.lists(chain.interactions, users, 4, profile=False)["ranking"]
        popular = ask(chain, 4, user_id="nobody")
        assert [chain.catalog.ids[i] for i in bare.ids[5]] == popular != expected

    def test_they_can_be_of_some_items_alone_and_without_others(self, chain):
        users = np.array([3, 0, 5], np.int32)
        among = np.array([2, 4, 7, 9, 11], np.int32)
        exclude = Ragged.of([[2], [], [4, 9]])
        for found in chain.lists(
            chain.interactions, users, 6, among=among, exclude=exclude
        ).values():
            sets = [set(row[row > 0].tolist()) for row in found.ids]
            assert sets == [{4, 7, 9, 11}, {2, 4, 7, 9, 11}, {2, 7, 11}]

    def test_their_shape_is_fixed_and_missing_places_are_zero(self, chain):
        users = np.arange(6, dtype=np.int32)
        for found in chain.lists(chain.interactions, users, ITEMS + 3).values():
            assert found.ids.shape == found.scores.shape == (6, ITEMS + 3)
            assert found.ids.dtype == np.int32
            assert (found.ids > 0).sum(axis=1).tolist() == [
                ITEMS - len(seen(chain, user)) for user in range(6)
            ]
            assert (found.scores[found.ids == 0] == -np.inf).all()

    def test_history_stays_in_if_it_is_not_excluded(self, chain):
        users = np.array([3], np.int32)
        for found in chain.lists(chain.interactions, users, ITEMS, exclude_history=False).values():
            assert set(found.ids[0]) == set(range(1, ITEMS + 1))

    def test_the_history_given_counts_and_not_the_one_that_is_known(self, plain):
        cut = plain.interactions.select(np.arange(len(plain.interactions)) != 7)  # u1 keeps two
        users = np.array([1], np.int32)
        known = plain.lists(plain.interactions, users, ITEMS)["retrieval"].ids[0]
        given = plain.lists(cut, users, ITEMS)["retrieval"].ids[0]
        left_out = plain.interactions.item[7]
        assert (left_out in given) == (left_out not in cut.histories([1])[0])
        assert left_out not in known

    def test_of_nobody_are_empty(self, chain):
        nobody = np.zeros(0, np.int32)
        for found in chain.lists(chain.interactions, nobody, 3).values():
            assert found.ids.shape == (0, 3)


class TestNewItems:
    """Rows beyond those that the model was trained on."""

    def test_they_have_vectors_of_their_text_and_attributes_alone(self, model):
        recommender = make(model, ITEMS + NEWCOMERS)
        new = recommender.vectors[-NEWCOMERS:]
        assert np.abs(new).sum() > 0
        attributes = np.zeros((1, 2), np.float32)
        attributes[0, :1] = recommender.catalog.features[-1]
        text = recommender.text[-1:]
        unknown = model.encode_candidate(text, attributes, np.zeros(1, np.int32))
        np.testing.assert_allclose(new[-1:], unknown, atol=1e-6)

    def test_they_can_be_recommended_and_work_in_histories(self, model, linear):
        for parts in (
            {},
            {"policy": Policy(4, 4, {"retrieval": 1.0, "linear": 0.5}), "linear": linear},
        ):
            recommender = make(model, ITEMS + NEWCOMERS, **parts)
            found = ask(recommender, ITEMS + NEWCOMERS, history=("i1", "i13"))
            assert set(found) == set(recommender.catalog.ids[1:]) - {"i1", "i13"}
            (a,), (b,) = (
                recommender.recommend([Request(history=h)], 1) for h in (("i1",), ("i1", "i14"))
            )
            assert a[0].score != b[0].score


class TestScore:
    def test_the_linear_model_brings_candidates_of_its_own(self, model):
        only = np.zeros((ITEMS + 1, ITEMS + 1), np.float32)
        plain = make(model)
        worst = ask(plain, ITEMS, history=("i1",))[-1]
        only[1, int(worst[1:])] = 1.0
        policy = Policy(1, 4, {"retrieval": 1e-9, "linear": 1.0})
        recommender = make(model, policy=policy, linear=LinearItems(only))
        assert ask(recommender, 1, history=("i1",)) == [worst]

    def test_the_linear_score_counts_each_item_of_a_history_once(self, linear, plain):
        who = plain.who(plain.interactions, np.array([0, 3], np.int32))
        found = linear.scores(who.seen)
        for row, user in zip(found, (0, 3), strict=True):
            own = np.unique(plain.interactions.histories([user])[0])
            np.testing.assert_allclose(row, linear.weights[own].sum(0), rtol=1e-5)

    def test_linear_scores_of_some_items_are_the_same_bits_as_those_of_all(self, linear, plain):
        who = plain.who(plain.interactions, np.arange(6, dtype=np.int32))
        rows = np.array([[3, 1, 0, 12], [2, 2, 5, 13]] * 3, np.int32)  # 13 was added later
        whole = np.pad(linear.scores(who.seen), ((0, 0), (0, 1)))
        some = linear.scores_of(who.seen, rows)
        np.testing.assert_array_equal(some, np.take_along_axis(whole, rows, axis=1))

    def test_sharing_what_is_computed_changes_no_bit_and_computes_it_once(
        self, model, linear, monkeypatch
    ):
        policy = Policy(3, 4, {"retrieval": 1.0, "linear": 0.5, "text": 0.7, "click": 0.1})
        recommender = make(model, ITEMS + NEWCOMERS, policy=policy, linear=linear)
        asked = recommender.who(recommender.interactions, np.arange(6, dtype=np.int32))
        query, evidence = recommender.queries(asked), recommender.evidence(asked, policy)
        index = recommender.index
        shared = recommender.candidates(asked, query, 3, None, index, policy, evidence)
        rows = recommender.candidates(asked, query, 3, None, index, policy)
        np.testing.assert_array_equal(shared, rows)
        rows[:, 0] = ITEMS + NEWCOMERS
        alone = recommender.parts(asked, query, rows, policy)
        for name, values in recommender.parts(asked, query, rows, policy, evidence).items():
            np.testing.assert_array_equal(values, alone[name])

        calls = []

        def counted(name, function):
            return lambda *given: (calls.append(name), function(*given))[1]

        for name in ("scores", "scores_of"):
            monkeypatch.setattr(LinearItems, name, counted(name, getattr(LinearItems, name)))
        queries = counted("text_queries", recommender.text_queries)
        monkeypatch.setattr(recommender, "text_queries", queries)
        recommender.chain(asked, 3, None, index, policy)
        assert sorted(calls) == ["scores", "text_queries"]

    def test_text_brings_candidates_of_its_own_and_favours_what_is_alike(self, model):
        policy = Policy(1, 4, {"retrieval": 1e-9, "text": 1.0})
        recommender = make(model, policy=policy)
        likeness = recommender.text[1:] @ recommender.text[3]
        likeness[2] = -np.inf
        nearest = f"i{int(np.argmax(likeness)) + 1}"
        assert ask(recommender, 1, history=("i3",)) == [nearest]

    def test_text_of_a_history_fades_with_its_age(self, model):
        policy = Policy(5, 4, {"text": 1.0}, text_decay=0.5)
        recommender = make(model, policy=policy)
        asked, _ = recommender.asked([Request(history=("i1", "i2", "i3")), Request()])
        found = recommender.text_queries(asked, policy)
        text = recommender.text
        mixed = 0.25 * text[1] + 0.5 * text[2] + text[3]
        np.testing.assert_allclose(found[0], mixed / np.linalg.norm(mixed), rtol=1e-5)
        assert not found[1].any()

    def test_text_scores_are_inner_products_however_they_are_cut(self, model, monkeypatch):
        policy = Policy(ITEMS, 4, {"text": 1.0})
        recommender = make(model, policy=policy)
        users = np.array([0, 3, 1], np.int32)
        asked = recommender.who(recommender.interactions, users)
        rows = np.array([[1, 5, 0], [2, 2, 7], [3, 8, 9]], np.int32)
        query = recommender.queries(asked)
        whole = recommender.parts(asked, query, rows, policy)["text"]
        wanted = recommender.text_queries(asked, policy)[:, None] * recommender.text[rows]
        np.testing.assert_allclose(whole, wanted.sum(-1), rtol=1e-5, atol=1e-6)
        monkeypatch.setattr("tfrec.recommender._CELLS", 1)
        np.testing.assert_array_equal(recommender.parts(asked, query, rows, policy)["text"], whole)

    def test_filters_hold_for_what_text_finds(self, model):
        recommender = make(model, policy=Policy(ITEMS, 4, {"retrieval": 1e-9, "text": 1.0}))
        assert sorted(ask(recommender, 9, history=("i3",), include=("i1", "i5"))) == ["i1", "i5"]

    def test_nothing_is_like_a_history_without_text(self, model):
        recommender = make(model, policy=Policy(3, 4, {"retrieval": 1.0, "text": 1.0}))
        recommender.text[9] = 0
        asked, exclude = recommender.asked([Request(history=("i9",)), Request(history=("i3",))])
        query = recommender.queries(asked)
        found = recommender.candidates(asked, query, 3, exclude)
        assert (found > 0).sum(axis=1)[0] == 3
        assert (found > 0).sum(axis=1)[1] > 3

    def test_popularity_counts_events(self, model):
        recommender = make(model, policy=Policy(ITEMS, 4, {"popularity": 1.0}))
        found = recommender.catalog.rows(ask(recommender, ITEMS, history=("i2",)))
        assert (np.diff(recommender.popularity[found]) <= 0).all()

    def test_the_fewer_events_the_more_popularity_counts(self, model):
        policy = Policy(candidates=2, newcomer=100.0, fade=1.0)
        few = make(model, policy=policy)
        plain = make(model)
        for user in (2, 4):  # one event and two
            rest = np.delete(few.popularity, [0, *few.interactions.histories([user])[0]])
            rows = [few.catalog.row(item) for item in ask(few, 3, user_id=f"u{user}")]
            assert few.popularity[rows].tolist() == np.sort(rest)[:-4:-1].tolist()
        for user in (0, 3):  # five and eight: e ** -5 is nothing
            assert ask(few, 3, user_id=f"u{user}") == ask(plain, 3, user_id=f"u{user}")
        found = few.lists(few.interactions, np.arange(5, dtype=np.int32), 3)
        asked = [ids(few.recommend([Request(user_id=f"u{u}")], 3)[0]) for u in range(5)]
        assert [[f"i{row}" for row in rows] for rows in found["ranking"].ids] == asked
        alone = plain.lists(few.interactions, np.arange(5, dtype=np.int32), 3)["retrieval"]
        np.testing.assert_array_equal(found["retrieval"].ids, alone.ids)

    def test_popular_items_come_though_another_source_lacks_them(self, model):
        """What each gets does not depend on who asks beside him."""
        few = make(model, policy=Policy(candidates=1, newcomer=1e4, fade=0.3))
        together = few.recommend([Request(user_id=u) for u in ("u0", "u2", "u3")], 2)
        for user, answer in zip(("u0", "u2", "u3"), together, strict=True):
            assert ids(answer) == ask(few, 2, user_id=user)
        rest = np.delete(few.popularity, [0, *few.interactions.histories([2])[0]])
        assert few.popularity[few.catalog.row(ids(together[1])[0])] == rest.max()

    def test_only_what_counts_is_computed(self, chain):
        asked = chain.who(chain.interactions, np.array([0], np.int32))
        rows = np.array([[1, 2]], np.int32)
        query = chain.queries(asked)
        assert set(chain.parts(asked, query, rows)) == {"retrieval", "linear", "click"}
        alone = Policy(3, 4, {"retrieval": 1.0})
        assert set(chain.parts(asked, query, rows, alone)) == {"retrieval"}

    def test_the_ranker_orders_the_candidates(self, model):
        recommender = make(model, policy=Policy(ITEMS, 4, {"click": 1.0}, ("click",)))
        found = ask(recommender, ITEMS, history=("i2",))
        year = dict(zip(recommender.catalog.ids, recommender.catalog.features[:, 0], strict=True))
        years = [float(year[i]) for i in found]
        assert years == sorted(years, reverse=True)
        # equal scores: the lower row first
        assert found == sorted(found, key=lambda i: (-year[i], int(i[1:])))

    def test_equal_vectors_come_in_the_order_of_their_rows(self, model):
        recommender = make(model)
        recommender.vectors = np.ones_like(recommender.vectors)
        rows = np.arange(1, ITEMS + 1, dtype=np.int32)
        recommender.index = ExactIndex.build(recommender.vectors[1:], rows)
        assert ask(recommender, 4, history=("i2",)) == ["i1", "i3", "i4", "i5"]

    def test_the_same_request_gives_the_same_list(self, chain):
        assert chain.recommend(REQUESTS, 5) == chain.recommend(REQUESTS, 5)


class TestTextDirections:
    def test_what_is_read_of_texts_is_centred_and_of_unit_variance(self):
        rng = np.random.default_rng(0)
        texts = (rng.normal(size=(200, 6)) * [9, 5, 1, 0, 0, 0] + 3).astype(np.float32)
        texts[7] = 0  # has no text
        found = TextDirections.of(texts, 2)
        read = found(texts)
        assert read.shape == (200, 2)
        assert read.dtype == np.float32
        assert not read[7].any()
        known = np.delete(read, 7, axis=0)
        np.testing.assert_allclose(known.mean(axis=0), 0, atol=1e-4)
        np.testing.assert_allclose(known.T @ known / 199, np.eye(2), atol=1e-3)
        # The widest directions are those along which the texts vary most.
        np.testing.assert_allclose(np.abs(found.matrix[:2].diagonal()), [1 / 9, 1 / 5], rtol=0.1)

    def test_there_are_no_more_than_texts_differ_in(self):
        assert TextDirections.of(np.zeros((3, 4), np.float32), 2) is None
        assert TextDirections.of(np.ones((3, 4), np.float32), 2) is None
        assert TextDirections.of(np.eye(4, dtype=np.float32), 0) is None
        assert TextDirections.of(np.eye(4, dtype=np.float32), 9).matrix.shape == (4, 3)

    def test_the_ranker_reads_the_texts_of_candidates_and_of_who_asks(self, model, monkeypatch):
        policy = Policy(3, 4, {"click": 1.0}, ("click",))
        recommender = make(model, policy=policy)
        recommender.directions = TextDirections.of(recommender.text, 2)
        asked = recommender.who(recommender.interactions, np.array([2, 5], np.int32))
        query = recommender.queries(asked)
        asked = replace(asked, profile=np.eye(6, 5, dtype=np.float32)[[2, 5]])
        given = {}
        monkeypatch.setattr(_Engine, "rank", lambda self, inputs: given.update(inputs) or {})
        rows = np.array([[1, 3], [2, 0]], np.int32)
        recommender.parts(asked, query, rows)
        expected = recommender.directions(recommender.text)[rows]
        np.testing.assert_array_equal(given["text"], expected)
        assert not given["text"][1, 1].any()
        np.testing.assert_array_equal(given["profile"], recommender.directions(asked.profile))
        assert given["profile"][0].any()
        assert not given["profile"][1].any()


@pytest.mark.skipif(not installed(), reason="ScaNN has no wheel here")
class TestLargeCatalog:
    """The indexes that it makes itself are tuned by what users ask, not by items."""

    @pytest.fixture(autouse=True)
    def few(self, monkeypatch):
        monkeypatch.setattr("tfrec.index.EXACT_LIMIT", 30)
        monkeypatch.setattr("tfrec.recommender.EXACT_LIMIT", 30)

    def test_known_users_ask(self, model):
        large = make(model, 40)
        known = large.who(large.interactions, np.arange(5, dtype=np.int32))
        assert large.index.precision == "bfloat16"
        for index, asked in (
            (large.index, large.queries(known)),
            (large.text_index, large.text_queries(known, large.policy)),
        ):
            order = np.lexsort(index.tuned.queries.T)
            np.testing.assert_allclose(
                index.tuned.queries[order], asked[np.lexsort(asked.T)], atol=1e-6
            )

    def test_where_nobody_is_known_made_up_histories_ask(self, model):
        large = make(model, 40)
        nobody = without_users(large)
        asked = nobody.typical()
        assert set(asked.events) == {4}
        assert asked.profile.shape == (len(asked), 0)
        again = Recommender(
            *(getattr(nobody, name) for name in ("engine", "catalog", "users", "interactions")),
            *(getattr(nobody, name) for name in ("coding", "vectors", "text", "profile")),
        )
        assert len(again.index.tuned.queries) == len(asked)
        assert not np.isin(again.index.tuned.queries, large.vectors).all()
        assert again.text_index.tuned.queries.shape[1] == 5

    def test_in_a_small_one_nobody_asks(self, model, monkeypatch):
        monkeypatch.setattr(Recommender, "typical", None)
        assert isinstance(make(model, 30).index, ExactIndex)


class TestPredictions:
    def test_there_is_one_for_each_event_and_task(self, chain):
        events = chain.interactions.select(np.arange(len(chain.interactions)) % 3 == 0)
        told = chain.predictions(events, chain.interactions)
        assert set(told) == {"click"}
        assert told["click"].shape == (len(events),)
        assert told["click"].dtype == np.float32
        np.testing.assert_allclose(told["click"], chain.catalog.features[events.item, 0])

    def test_without_a_ranker_there_are_none(self, plain):
        assert plain.predictions(plain.interactions, plain.interactions) == {}

    def test_of_no_event_they_are_empty(self, chain):
        none = chain.interactions.select(np.zeros(len(chain.interactions), bool))
        assert chain.predictions(none, chain.interactions)["click"].shape == (0,)
