"""Steps: each source, filter and re-ranking step does what its name says, by hand."""

import math
import sys

import numpy as np
import pytest

from tfrec import steps
from tfrec.config import StepsConfig
from tfrec.data.catalog import Catalog, Users
from tfrec.data.interactions import Interactions
from tfrec.data.sequences import EventCoding
from tfrec.errors import ConfigError
from tfrec.index import ExactIndex, Ragged
from tfrec.recommender import LinearItems, Met, Policy, Recommender, Request
from tfrec.steps import FILTERS, RERANKERS, SOURCES, Registry, Search, Slate, check, reranked

DAY = 86_400.0


def slate(scores, vectors=None, values=None, age=None, places=None, diversity=0.0, seed=0):
    n = len(scores)
    return Slate(
        rows=np.arange(10, 10 + n, dtype=np.int32),
        scores=np.array(scores, np.float32),
        vectors=np.zeros((n, 2), np.float32) if vectors is None else np.array(vectors, np.float32),
        values=lambda column: (values or {})[column],
        age=np.full(n, np.inf) if age is None else np.array(age, np.float64),
        places=n if places is None else places,
        diversity=diversity,
        random=np.random.default_rng(seed),
        propensity=np.ones(n, np.float32),
        moved=("",) * n,
        before=np.arange(n),
    )


def order(name, given, **settings):
    return RERANKERS[name].order(given, StepsConfig(**settings))


class TestSlate:
    def test_taking_an_order_moves_everything_and_notes_who_moved(self):
        given = slate([4, 3, 2, 1], values={"g": [["a"], ["b"], ["c"], ["d"]]})
        first = given.take([0, 2, 1, 3], "one")
        assert first.rows.tolist() == [10, 12, 11, 13]
        assert first.scores.tolist() == [4, 2, 3, 1]
        assert first.before.tolist() == [0, 2, 1, 3]
        assert first.moved == ("", "one", "one", "")
        second = first.take([3, 1, 0], "two")  # one fewer
        assert second.rows.tolist() == [13, 12, 10]
        assert second.before.tolist() == [3, 2, 0]
        assert second.moved == ("two", "one", "two")
        assert second.values("g") == [["d"], ["c"], ["a"]]

    def test_relevance_lies_between_0_and_1(self):
        assert slate([5, 3, 1]).relevance.tolist() == [1, 0.5, 0]
        assert slate([2, 2]).relevance.tolist() == [1, 1]


class TestDiversity:
    # Relevance 1, 0.9, 0.5, 0. The second is the first again, the third at 60 degrees to it
    # (cosine 0.5), the fourth at a right angle to the first.
    VECTORS = ((1, 0), (1, 0), (0.5, math.sqrt(3) / 2), (0, 1))
    SCORES = (10, 9, 5, 0)

    def test_the_order_is_that_computed_by_hand(self):
        # share 0.5: worths are half of relevance less half of the nearest cosine.
        # place 2: (.9 - 1)/2 = -.05, (.5 - .5)/2 = 0, (0 - 0)/2 = 0: the first of equals, item 2.
        # place 3: item 1: -.05; item 3: (0 - cos 30°)/2 = -.433. So item 1, then item 3.
        found = order("diversity", slate(self.SCORES, self.VECTORS, diversity=0.5))
        assert found.before.tolist() == [0, 2, 1, 3]
        assert found.moved == ("", "diversity", "diversity", "")

    def test_all_variety_takes_who_is_least_like_those_before(self):
        # place 2: cosines 1, 0.5, 0 to the first: item 3. place 3: item 1 has 1, item 2 cos 30°.
        found = order("diversity", slate(self.SCORES, self.VECTORS, diversity=1.0))
        assert found.before.tolist() == [0, 3, 2, 1]

    def test_none_leaves_the_order(self):
        given = slate(self.SCORES, self.VECTORS, diversity=0.0)
        assert order("diversity", given) is given

    def test_only_the_places_that_are_shown_are_chosen(self):
        given = slate(self.SCORES, self.VECTORS, diversity=1.0, places=2)
        assert order("diversity", given).before.tolist() == [0, 3, 1, 2]

    def test_scores_stay_those_of_the_items(self):
        found = order("diversity", slate(self.SCORES, self.VECTORS, diversity=1.0))
        assert found.scores.tolist() == [10, 0, 5, 9]


class TestCaps:
    def test_what_is_over_the_cap_waits_behind_the_others(self):
        values = {"g": [["a"], ["a"], ["a", "b"], ["b"], ["c"]]}
        found = order("caps", slate([5, 4, 3, 2, 1], values=values), caps={"g": 1})
        # The third has "a", which is full; so it does not use up "b".
        assert found.before.tolist() == [0, 3, 4, 1, 2]
        assert found.moved == ("", "caps", "caps", "caps", "caps")

    def test_a_list_is_filled_all_the_same_where_there_are_no_others(self):
        found = order("caps", slate([3, 2, 1], values={"g": [["a"]] * 3}), caps={"g": 1})
        assert found.before.tolist() == [0, 1, 2]

    def test_an_item_without_the_attribute_is_under_no_cap(self):
        found = order("caps", slate([3, 2, 1], values={"g": [["a"], ["a"], []]}), caps={"g": 1})
        assert found.before.tolist() == [0, 2, 1]

    def test_several_caps_hold_at_once(self):
        # Neither the second (g1) nor the third (y1) may follow the first, the fourth may.
        values = {"g": [["1"], ["1"], ["2"], ["2"]], "y": [["1"], ["2"], ["1"], ["2"]]}
        found = order("caps", slate([4, 3, 2, 1], values=values), caps={"g": 1, "y": 1})
        assert found.before.tolist() == [0, 3, 1, 2]

    def test_a_value_that_stands_twice_in_an_item_counts_once(self):
        values = {"g": [["a", "a"], ["a"], ["b"]]}
        found = order("caps", slate([3, 2, 1], values=values), caps={"g": 2})
        assert found.before.tolist() == [0, 1, 2]


class TestFreshness:
    def test_a_new_item_gains_a_share_of_the_spread_that_halves_with_age(self):
        # Scores 2, 0, 0, 2 have a standard deviation of 1.
        given = slate([2, 2, 0, 0], age=[np.inf, np.inf, 0, 7 * DAY])
        found = order("freshness", given, freshness=3.0, half_life_days=7)
        assert found.scores.tolist() == [3.0, 2.0, 2.0, 1.5]
        assert found.before.tolist() == [2, 0, 1, 3]
        assert found.moved == ("freshness", "freshness", "freshness", "")

    def test_nothing_changes_without_new_items_or_without_a_gain(self):
        old = slate([2, 1])
        assert order("freshness", old, freshness=1.0) is old
        new = slate([2, 1], age=[0, 0])
        assert order("freshness", new, freshness=0.0) is new


SHARE, N, PLACES, TIMES = 0.3, 5, 3, 20_000


@pytest.fixture(scope="module")
def drawn():
    """int (times, n), which item stood where, and float (times, n), how likely it was."""
    found = [
        order("exploration", slate(range(N, 0, -1), places=PLACES, seed=seed), exploration=SHARE)
        for seed in range(TIMES)
    ]
    return np.stack([s.before for s in found]), np.stack([s.propensity for s in found])


class TestExploration:
    def test_places_are_drawn_as_often_as_is_said(self, drawn):
        # The best of the left has (1 - e) + e / left, each other one e / left.
        places, chances = drawn
        for place in range(PLACES):
            left = N - place
            for name in np.unique(chances[:, place]):
                said = chances[:, place] == name
                top = (1 - SHARE) + SHARE / left
                assert name == pytest.approx(top if name > 0.5 else SHARE / left, abs=1e-6)
                # All others are of one chance, and there are left - 1 of them.
                expected = name if name > 0.5 else name * (left - 1)
                off = math.sqrt(expected * (1 - expected) / TIMES)
                assert abs(said.mean() - expected) < 4.5 * off
        first = np.bincount(places[:, 0], minlength=N) / TIMES
        expected = np.array([0.7 + 0.06, 0.06, 0.06, 0.06, 0.06])
        assert (abs(first - expected) < 4.5 * np.sqrt(expected * (1 - expected) / TIMES)).all()

    def test_the_logged_chances_weigh_every_item_to_one(self, drawn):
        # Inverse propensities: at each place, each item that is left counts once on average.
        places, chances = drawn
        for place in range(PLACES):
            weight = 1 / chances[:, place]
            left = N - place
            error = weight.std() / math.sqrt(TIMES)
            assert abs(weight.mean() - left) < 4.5 * error
        for item in range(N):
            weight = (places[:, 0] == item) / chances[:, 0]
            assert abs(weight.mean() - 1) < 4.5 * weight.std() / math.sqrt(TIMES)

    def test_every_list_has_every_item_once_and_keeps_the_order_of_the_others(self, drawn):
        places, chances = drawn
        assert (np.sort(places, axis=1) == np.arange(N)).all()
        assert (np.diff(places[:, PLACES:], axis=1) > 0).all()
        assert (chances[:, PLACES:] == 1).all()

    def test_only_what_was_drawn_before_its_turn_counts_as_moved(self):
        for seed in range(50):
            found = order("exploration", slate([3, 2, 1], places=1, seed=seed), exploration=1.0)
            drawn = int(found.before[0])
            assert found.propensity[0] == pytest.approx(1 / 3)
            assert found.moved == (("exploration" if drawn else ""), "", "")

    def test_none_changes_nothing(self):
        given = slate([2, 1])
        assert order("exploration", given, exploration=0.0) is given


class TestAllTogether:
    def test_steps_run_in_the_order_of_the_settings(self):
        values = {"g": [["a"], ["a"], ["b"]]}
        vectors = ((1, 0), (1, 0), (0.9, math.sqrt(0.19)))

        def found(*names):
            given = slate([3, 2.9, 1], vectors, values, diversity=0.9)
            return reranked(given, StepsConfig(rerank=list(names), caps={"g": 1}))

        # Relevance 1, .95, 0: worth of the second .095 - .9, of the third 0 - .81.
        assert found("diversity").before.tolist() == [0, 1, 2]
        assert found("caps").before.tolist() == [0, 2, 1]
        assert found("diversity", "caps").moved == ("", "caps", "caps")
        assert found().before.tolist() == [0, 1, 2]

    def test_an_empty_list_stays_empty(self):
        settings = StepsConfig(freshness=1, exploration=0.5, caps={"g": 1})
        assert len(reranked(slate([], diversity=0.5), settings)) == 0


class TestNames:
    def test_a_name_that_is_not_there_is_refused_with_those_that_are(self):
        registry = Registry("kind of thing")
        registry.register("one")(object)
        with pytest.raises(ConfigError, match="no kind of thing 'two'; there are: one") as raised:
            registry["two"]
        assert "plugins" in str(raised.value)
        assert isinstance(registry["one"], object)

    @pytest.mark.parametrize("key", ["sources", "filters", "rerank"])
    def test_settings_name_only_steps_that_there_are(self, key):
        check(StepsConfig(), {})
        with pytest.raises(ConfigError, match="'nope'"):
            check(StepsConfig(**{key: ["nope"]}), {})

    @pytest.mark.parametrize("key", ["caps", "blocked"])
    def test_settings_name_only_attributes_that_there_are(self, key):
        told = {"caps": {"g": 1}, "blocked": {"g": ["a"]}}[key]
        check(StepsConfig(**{key: told}), {"g": ()})
        with pytest.raises(ConfigError, match=f"steps.{key} names the attribute 'g'.*genre"):
            check(StepsConfig(**{key: told}), {"genre": ()})

    def test_a_module_of_ones_own_adds_steps(self, tmp_path, monkeypatch):
        (tmp_path / "my_own_steps.py").write_text(
            "from tfrec import steps\n"
            "@steps.RERANKERS.register('backwards')\n"
            "class Backwards:\n"
            "    def order(self, slate, settings):\n"
            "        return slate.take(range(len(slate) - 1, -1, -1), 'backwards')\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        settings = StepsConfig(plugins=["my_own_steps"], rerank=["backwards"])
        try:
            check(settings, {})
            assert reranked(slate([3, 2, 1]), settings).before.tolist() == [2, 1, 0]
        finally:
            sys.modules.pop("my_own_steps")
            RERANKERS._steps.pop("backwards")

    @pytest.mark.parametrize("content", [None, "def broken(", "1 / 0"])
    def test_a_module_that_is_missing_or_broken_is_named(self, content, tmp_path, monkeypatch):
        if content is not None:
            (tmp_path / "broken_steps.py").write_text(content)
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ConfigError, match=r"steps.plugins names 'broken_steps', which fails"):
            check(StepsConfig(plugins=["broken_steps"]), {})


# Six items on a circle: item n is at 10 n degrees. The last is text alone.
ANGLES = np.deg2rad(10.0 * np.arange(1, 7))
VECTORS = np.vstack([[0, 0], np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1)]).astype(np.float32)
EAST, NORTH = np.float32([1, 0]), np.float32([0, 1])


def recommender(**more):
    """One user, who met item 1 and item 3; items 2 and 5 are the popular ones."""
    ids = ("", *(f"i{n}" for n in range(1, 7)))
    catalog = Catalog(ids, ids, ids, {"g": ("", "a", "b", "a", "b", "a", "b")})
    events = Interactions(
        user=np.zeros(2, np.int32),
        item=np.int32([1, 3]),
        timestamp=np.int64([100, 200]),
        event=np.zeros(2, np.int8),
        rating=np.full(2, np.nan, np.float32),
        weight=np.ones(2, np.float32),
        split=np.zeros(2, np.int8),
        num_users=1,
    )
    return Recommender(
        None,
        catalog,
        Users(("u",), ("u",), ("",)),
        events,
        EventCoding.of(events),
        VECTORS,
        VECTORS[:, ::-1].copy(),  # item 6 reads most like EAST
        np.zeros((1, 2), np.float32),
        popularity=np.float32([0, 1, 9, 2, 0, 8, 3]),
        **more,
    )


def search(chain, query=EAST, count=2, exclude=None, index=None, user="u", **policy):
    asked, _ = chain.asked([Request(user)])
    policy = Policy(**policy)
    evidence = chain.evidence(asked, policy)
    left_out = None if exclude is None else Ragged.of([np.int32(exclude)])
    index = index or chain.index
    return Search(asked, query[None], count, left_out, index, policy, evidence)


def found(name, chain, given):
    return [rows.tolist() for rows in SOURCES[name].find(chain, given)]


class TestSources:
    def test_behaviour_finds_what_is_near_the_query(self):
        chain = recommender()
        assert found("behaviour", chain, search(chain)) == [[[1, 2]]]
        assert found("behaviour", chain, search(chain, NORTH, exclude=[6])) == [[[5, 4]]]

    def test_behaviour_finds_what_goes_with_the_history_by_the_linear_model_too(self):
        weights = np.zeros((7, 7), np.float32)
        weights[1, 4], weights[3, 5], weights[2, 6] = 1, 2, 9  # item 2 was not met
        chain = recommender(linear=LinearItems(weights))
        score = {"retrieval": 1.0, "linear": 1.0}
        assert found("behaviour", chain, search(chain, score=score)) == [[[1, 2]], [[5, 4]]]
        without = search(chain, score=score, exclude=[5])
        assert found("behaviour", chain, without)[1][0][0] == 4

    def test_text_finds_what_reads_like_the_history(self):
        chain = recommender()
        # Items 1 and 3 read like 80 and 60 degrees; the later one weighs more.
        given = search(chain, score={"retrieval": 1.0, "text": 1.0}, exclude=[1, 3])
        assert found("text", chain, given) == [[[2, 4]]]
        assert found("text", chain, search(chain)) == []  # text does not count
        stranger = search(chain, user="", score={"text": 1.0})
        assert not np.any(found("text", chain, stranger))  # nobody's history is like nothing

    def test_popular_is_for_those_with_few_events(self):
        chain = recommender()
        assert found("popular", chain, search(chain, newcomer=1.0, count=3)) == [[[2, 5, 6]]]
        assert found("popular", chain, search(chain, newcomer=1.0, exclude=[5])) == [[[2, 6]]]
        assert found("popular", chain, search(chain)) == []
        assert found("popular", chain, search(chain, newcomer=1.0, fade=0.1)) == []

    def test_new_finds_the_items_that_were_added_last_by_the_query(self):
        chain = recommender()
        assert found("new", chain, search(chain)) == []
        chain._added = np.int32([6, 4, 5])
        assert found("new", chain, search(chain, EAST)) == [[[4, 5]]]
        assert found("new", chain, search(chain, NORTH)) == [[[6, 5]]]
        assert found("new", chain, search(chain, NORTH, exclude=[6])) == [[[5, 4]]]
        few = ExactIndex.build(VECTORS[[1, 4]], np.int32([1, 4]))
        assert found("new", chain, search(chain, NORTH, index=few)) == [[[4]]]

    def test_only_the_newest_items_count_as_new(self, monkeypatch):
        monkeypatch.setattr(steps, "_NEWEST", 2)
        chain = recommender()
        chain._added = np.int32([6, 4, 5])
        assert found("new", chain, search(chain, NORTH)) == [[[5, 4]]]


def left_out(name, **request):
    chain = recommender()
    asked = Request(**request)
    who, _ = chain.asked([asked])
    return sorted(set(FILTERS[name].left_out(chain, asked, who.histories).tolist()))


class TestFilters:
    def test_seen_leaves_out_what_is_known_and_what_is_told(self):
        assert left_out("seen", user_id="u") == [1, 3]
        assert left_out("seen", user_id="u", history=("i5", "nowhere")) == [1, 3, 5]
        assert left_out("seen", user_id="u", history=("i5",), include_seen=True) == []
        assert left_out("seen", user_id="u", history=("i5",), forgotten=True) == [5]

    def test_seen_lets_an_item_come_again_whose_events_all_allow_it(self):
        again = Met("i5", again=True)
        assert left_out("seen", user_id="u", history=(again, Met("i6"))) == [1, 3, 6]
        assert left_out("seen", history=(again, Met("i6", again=True))) == []

    def test_seen_keeps_out_what_was_met_once_in_a_way_that_counts(self):
        met = (Met("i5", again=True), Met("i5"))
        assert left_out("seen", history=met) == [5]

    def test_hidden_leaves_out_what_is_hidden(self):
        assert left_out("hidden", user_id="u", hidden=("i2", "i4")) == [2, 4]
        assert left_out("hidden", user_id="u") == []
