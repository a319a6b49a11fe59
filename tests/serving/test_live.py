"""Live: items put and taken out while a recommender runs are as if they had always been so."""

import numpy as np
import pytest

from tfrec.bundle import Bundle
from tfrec.data.catalog import Catalog
from tfrec.engines import recommender_of
from tfrec.errors import InputError
from tfrec.recommender import Request
from tfrec.serving.live import LiveRecommender
from tfrec.serving.state import Item

pytestmark = pytest.mark.slow

ITEMS = 24
WORDS = ("war", "space", "love", "film", "ship", "story")


@pytest.fixture
def live(bundle):
    return LiveRecommender.of(recommender_of(Bundle.load(bundle), 1))


def made(number, **more):
    title = f"the {WORDS[number % 6]} of {WORDS[number // 6 % 6]} {number}"
    shade = ("black", "white|pale")[number % 2]
    told = {"title": title, "attributes": {"shade": shade, "price": str(number % 12)}, **more}
    return Item(f"new{number}", **told)


def lists(live, k=10, **request):
    return [one.item_id for one in live.recommend([Request(**request)], k)[0]]


REQUESTS = (
    {},
    {"user_id": "u1"},
    {"history": ("i2", "i4")},
    {"profile": "war"},
    {"user_id": "u2", "profile": "love film"},
    {"filters": {"shade": ("pale",)}},
)


def same(one, other):
    """Whether two recommenders know and answer the same."""
    assert list(one.catalog.ids) == list(other.catalog.ids)
    assert list(one.catalog.titles) == list(other.catalog.titles)
    for name in ("vectors", "text", "popularity", "described"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), 1e-4, 1e-4)
    np.testing.assert_allclose(one.catalog.features, other.catalog.features, atol=1e-6)
    assert one.index.ids.tolist() == other.index.ids.tolist()
    for request in REQUESTS:
        assert lists(one, 200, **request) == lists(other, 200, **request)


class TestPut:
    def test_an_item_is_encoded_as_in_a_catalog_that_always_had_it(self, live):
        items = [made(0), made(1, text="a story about ships"), made(2, attributes={})]
        live.put(items)
        columns = {
            "shade": ("", "black", "white|pale", ""),
            "price": ("", "0", "1", ""),
        }
        ids = ("", *(item.item_id for item in items))
        fresh = Catalog(ids, ids, ids, columns, live.catalog.schema)
        for row, name in enumerate(ids[1:], 1):
            at = live.catalog.row(name)
            np.testing.assert_array_equal(live.catalog.features[at], fresh.features[row])
        # Alone or together, a text has the same vector, and so has the item.
        for row, item in enumerate(items, 1):
            at = live.catalog.row(item.item_id)
            text = live.engine.encode_text([live.text_of(item)])
            np.testing.assert_allclose(live.text[at], text[0], atol=1e-5)
            vector = live.engine.encode_candidate(
                text, fresh.features[row : row + 1], np.zeros(1, np.int32)
            )
            np.testing.assert_allclose(live.vectors[at], vector[0], atol=1e-5)
        assert live.catalog.texts[live.catalog.row("new1")] == "a story about ships"

    def test_what_the_bert_reads_is_what_prepare_makes_of_an_item(self, live):
        row = live.catalog.row("i5")
        attributes = {name: cells[row] for name, cells in live.catalog.attributes.items()}
        item = Item("copy", live.catalog.titles[row], attributes=attributes)
        assert live.text_of(item) == live.catalog.texts[row]
        live.put([item])
        copy = live.catalog.row("copy")
        np.testing.assert_allclose(live.text[copy], live.text[row], atol=0.02)  # stored as int8
        np.testing.assert_array_equal(live.catalog.features[copy], live.catalog.features[row])

    def test_it_can_be_recommended_searched_and_filtered_at_once(self, live):
        live.put([made(0)])
        for request in REQUESTS[:5]:
            assert "new0" in lists(live, 200, **request)
        assert "new0" in lists(live, 200, filters={"shade": ("black",)})
        assert "new0" not in lists(live, 200, filters={"shade": ("pale",)})
        assert lists(live, 5, include=("new0",)) == ["new0"]
        assert live.titled("WAR of war").tolist() == [live.catalog.row("new0")]
        assert "new0" not in lists(live, 200, history=("new0",))

    def test_putting_it_again_replaces_all_that_is_known(self, live):
        live.put([made(0)])
        row = live.catalog.row("new0")
        live.put([Item("new0", "the love story", attributes={"shade": "pale"})])
        assert live.catalog.row("new0") == row
        assert live.catalog.cells(row) == {"shade": ["pale"]}
        assert "new0" in lists(live, 200, filters={"shade": ("pale",)})
        assert "new0" not in lists(live, 200, filters={"shade": ("black",)})
        assert not len(live.titled("war of war"))
        assert live.catalog.texts[row].startswith("the love story")
        other = live.engine.encode_text([live.catalog.texts[row]])
        np.testing.assert_allclose(live.text[row], other[0], atol=1e-5)
        assert len(live.index.ids) == ITEMS + 1

    def test_attributes_that_were_shown_are_those_that_it_has_now(self, live):
        live.put([made(1)])
        row = live.catalog.row("new1")
        before = live.attributes_of(row)
        assert before == live.catalog.cells(row)
        assert live.attributes_of(row) is before
        live.put([made(1, attributes={"shade": "black"})])
        assert live.attributes_of(row) == {"shade": ["black"]}

    def test_an_item_of_the_bundle_changes_in_its_place_and_keeps_its_popularity(self, live):
        row = live.catalog.row("i5")
        popular = float(live.popularity[row])
        assert popular > 0
        live.put([Item("i5", "the war of space")])
        assert live.catalog.row("i5") == row
        assert live.popularity[row] == popular
        assert live.catalog.titles[row] == "the war of space"
        assert len(live.index.ids) == ITEMS

    def test_many_puts_are_the_same_as_one_of_all(self, bundle):
        items = [made(n) for n in range(40)] + [made(3, text="another text"), made(0)]
        one_by_one, together = (
            LiveRecommender.of(recommender_of(Bundle.load(bundle), 1)) for _ in range(2)
        )
        for item in items:
            one_by_one.put([item])
        together.put(items)
        same(one_by_one, together)

    def test_room_is_made_past_what_was_reserved(self, live):
        # For 25 rows there is room for 25 + 12 + 64.
        before = live.vectors[: ITEMS + 1].copy()
        for start in range(0, 300, 50):
            live.put([made(n) for n in range(start, start + 50)])
        assert len(live.catalog) == len(live.vectors) == len(live.text) == ITEMS + 1 + 300
        np.testing.assert_array_equal(live.vectors[: ITEMS + 1], before)
        everything = lists(live, 500, user_id="nobody")
        assert set(everything) == set(live.catalog.ids[1:])

    def test_vectors_that_are_kept_are_not_made_again(self, live, bundle):
        items = [made(0), made(1)]
        kept = live.put(items)
        assert set(kept) == {"new0", "new1"}
        other = LiveRecommender.of(recommender_of(Bundle.load(bundle), 1))
        assert other.put(items, kept) == {}
        same(live, other)
        broken = {"new0": b"too short", "new1": kept["new1"]}
        assert set(other.put(items, broken)) == {"new0"}
        same(live, other)

    @pytest.mark.parametrize("wrong", [Item(""), Item("bad", "x", attributes={"price": "a lot"})])
    def test_one_that_is_wrong_changes_nothing(self, live, bundle, wrong):
        with pytest.raises(InputError):
            live.put([made(0), wrong])
        same(live, LiveRecommender.of(recommender_of(Bundle.load(bundle), 1)))
        live.put([made(1)])
        assert "new1" in lists(live, 200)

    def test_nothing_is_nothing(self, live):
        assert live.put([]) == {}


class TestRemove:
    def test_it_never_comes_back_until_it_is_put_again(self, live):
        live.put([made(0)])
        for name in ("new0", "i5"):
            assert live.remove(name)
            assert not live.remove(name)
            for request in REQUESTS:
                assert name not in lists(live, 200, **request)
            assert lists(live, 5, include=(name,)) == []
        assert not live.remove("nowhere")
        assert not len(live.titled("war of war"))
        assert live.newest(10).tolist() == []
        live.put([made(1)])
        assert "new0" not in lists(live, 200)
        live.put([made(0)])
        assert "new0" in lists(live, 200)

    def test_a_history_still_counts_it(self, live):
        before = lists(live, 5, history=("i2", "i4"))
        live.remove("i2")
        assert live.met(Request(history=("i2",)))
        assert lists(live, 5, history=("i2", "i4")) == before

    @pytest.mark.parametrize("request_", REQUESTS[:5])
    def test_lists_are_filled_as_long_as_there_are_items(self, live, request_):
        live.put([made(n) for n in range(30)])
        for name in [f"i{n}" for n in range(12)] + [f"new{n}" for n in range(0, 30, 2)]:
            live.remove(name)
        left = {f"i{n}" for n in range(12, 24)} | {f"new{n}" for n in range(1, 30, 2)}
        _, exclude = live.asked([Request(**request_)])
        may = left - {live.catalog.ids[row] for row in exclude.ids}
        assert set(lists(live, 200, **request_)) == may
        for k in (1, 5, len(may)):
            assert len(lists(live, k, **request_)) == k

    def test_the_last_one_may_go(self, live):
        for number in range(ITEMS):
            live.remove(f"i{number}")
        assert lists(live, 5, user_id="u1") == lists(live, 5) == []
        live.put([made(0)])
        assert lists(live, 5, user_id="u1") == lists(live, 5) == ["new0"]


def test_any_changes_leave_what_a_recommender_of_the_result_would_hold(bundle):
    rng = np.random.default_rng(5)
    changed = LiveRecommender.of(recommender_of(Bundle.load(bundle), 1))
    there = {}
    for _ in range(60):
        number = int(rng.integers(12))
        if rng.random() < 0.4:
            assert changed.remove(f"new{number}") == (f"new{number}" in there)
            there.pop(f"new{number}", None)
        else:
            item = made(number, text=f"text {WORDS[int(rng.integers(6))]}")
            changed.put([item])
            there.pop(item.item_id, None)
            there[item.item_id] = item
    fresh = LiveRecommender.of(recommender_of(Bundle.load(bundle), 1))
    fresh.put(list(there.values()))
    newest = [fresh.catalog.ids[row] for row in fresh.newest(50)]
    assert [changed.catalog.ids[row] for row in changed.newest(50)] == newest
    for name in there:
        one, other = changed.catalog.row(name), fresh.catalog.row(name)
        np.testing.assert_allclose(changed.vectors[one], fresh.vectors[other], atol=1e-5)
        assert changed.catalog.cells(one) == fresh.catalog.cells(other)
    for request in REQUESTS:
        assert set(lists(changed, 200, **request)) == set(lists(fresh, 200, **request))
