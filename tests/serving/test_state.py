"""State: what every store of it keeps, in whatever it keeps it."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
from redis_server import RedisServer

from tfrec.errors import InputError, StateError
from tfrec.serving.state import Event, Item, open_state

AWKWARD = ("é漢🙂", "a\nb", "\0", '"', "'; DROP TABLE events; --", " ", "%s", "x" * 5000)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if shutil.which("redis-server") is None:
        yield None
        return
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.close()


@pytest.fixture(params=["sqlite", "redis"])
def where(request, tmp_path, server):
    if request.param == "sqlite":
        return str(tmp_path / "state")
    if server is None:
        pytest.skip("no redis-server on this machine: apt-get install redis-server")
    with redis.Redis.from_url(server.url) as emptied:
        emptied.flushall()
    return server.url


@pytest.fixture
def state(where):
    state = open_state(where)
    yield state
    state.close()


def liked(event_id, user_id="u", item_id="i", **more):
    return Event(event_id, user_id, item_id, "like", 1.5, **more)


def test_a_history_is_what_was_appended_in_that_order(state):
    first = [liked("b", value=4.5), liked("a", "v"), liked("c", item_id="j")]
    assert state.append(first) == [True, True, True]
    assert state.append([liked("0")]) == [True]
    assert state.history("u") == [first[0], first[2], liked("0")]
    assert state.histories(["v", "nobody", "u", "v"]) == [
        [first[1]],
        [],
        state.history("u"),
        [first[1]],
    ]
    assert state.histories([]) == []


def test_an_event_whose_id_was_seen_is_known_and_changes_nothing(state):
    assert state.append([liked("a"), liked("a", "v"), liked("b")]) == [True, False, True]
    assert state.append([liked("b", "w"), liked("c")]) == [False, True]
    assert state.append([]) == []
    assert [e.event_id for e in state.history("u")] == ["a", "b", "c"]
    assert state.histories(["v", "w"]) == [[], []]
    assert state.counts() == {"events": 3, "users": 1, "items": 0}


def test_a_history_is_neither_shortened_nor_deduplicated(state):
    events = [liked(str(number)) for number in range(12_000)]
    state.append(events)
    assert state.history("u") == events
    assert [event for _, event in state.events()] == events


def test_a_caller_may_change_the_list_he_got(state):
    state.append([liked("a")])
    for _ in range(2):
        state.history("u").clear()
    assert state.history("u") == [liked("a")]


@pytest.mark.parametrize("text", AWKWARD)
def test_any_text_comes_back_as_it_was(state, text):
    event = Event(text, text, text, text, 0.1, 1e-300)
    item = Item(text, text, text, {text: text}, 0.1)
    state.append([event])
    state.put_items([item])
    state.put_vectors(text, {text: b"\0\xff"})
    state.set(text, text)
    assert state.history(text) == [event]
    assert [item for _, item in state.items()] == [item]
    assert state.vectors(text, [text]) == {text: b"\0\xff"}
    assert state.get(text) == text
    assert state.forget(text) == 1
    assert state.forgotten([text]) == {text}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_refused_with_all_that_came_with_it(state, value):
    with pytest.raises(InputError, match="'b' is"):
        state.append([liked("a"), liked("b", value=value)])
    assert state.history("u") == []


def test_half_a_character_is_refused_wherever_it_stands(state):
    for call in (
        lambda: state.append([liked("a", "\ud800")]),
        lambda: state.put_items([Item("a", "\ud800")]),
        lambda: state.forget("\ud800"),
        lambda: state.history("\ud800"),
    ):
        with pytest.raises(InputError, match="half a character"):
            call()


def test_a_forgotten_user_has_no_events_and_stays_forgotten(state):
    state.append([liked("a"), liked("b", "v"), liked("c")])
    assert state.histories(["u", "v"]) == [[liked("a"), liked("c")], [liked("b", "v")]]
    assert state.forget("u") == 2
    assert state.histories(["u", "v"]) == [[], [liked("b", "v")]]
    assert state.forgotten(["u", "v", "u"]) == {"u"}
    assert state.forgotten([]) == set()
    assert [event.event_id for _, event in state.events()] == ["b"]
    assert state.counts() == {"events": 1, "users": 1, "items": 0}
    state.append([liked("a"), liked("d")])
    assert state.history("u") == [liked("a"), liked("d")]
    assert state.forgotten(["u"]) == {"u"}
    assert state.counts()["users"] == 2


def test_one_without_events_can_be_forgotten_too(state):
    assert state.forget("u") == 0
    assert state.forget("u") == 0
    assert state.forgotten(["u"]) == {"u"}
    assert state.counts()["users"] == 0


def test_events_are_numbered_and_can_be_read_from_a_number_on(state):
    events = [liked(str(number), f"u{number % 3}") for number in range(1200)]
    state.append(events[:700])
    numbers = [number for number, _ in state.events()]
    assert numbers == sorted(set(numbers))
    state.append(events[700:])
    state.forget("u1")
    later = list(state.events(numbers[-1]))
    assert [event for _, event in later] == [e for e in events[700:] if e.user_id != "u1"]
    for user in ("u0", "u2"):
        state.forget(user)
    state.append([liked("new")])
    assert [event for _, event in state.events(later[-1][0])] == [liked("new")]


def test_an_item_is_as_it_was_put_last(state):
    state.put_items([Item("1", "one"), Item("2", "two", "words", {"genres": "a|b"}, 5.0)])
    seen = dict(state.items())
    assert [item.title for item in seen.values()] == ["one", "two"]
    state.put_items([Item("1", deleted=True), Item("3"), Item("1", "again")])
    state.put_items([])
    later = dict(state.items(max(seen)))
    assert list(later.values()) == [Item("3"), Item("1", "again")]
    assert list(later) == sorted(later)
    assert [item.item_id for _, item in state.items()] == ["2", "3", "1"]
    assert not list(state.items(max(later)))
    assert state.counts()["items"] == 3


def test_a_deleted_item_is_told_of_and_not_counted(state):
    state.put_items([Item("1"), Item("of the bundle", deleted=True)])
    assert state.counts()["items"] == 1
    state.put_items([Item("1", deleted=True), Item("1", deleted=True)])
    assert [item.deleted for _, item in state.items()] == [True, True]
    assert state.counts()["items"] == 0


def test_more_items_than_are_read_at_once_all_come(state):
    items = [Item(str(number)) for number in range(1700)]
    state.put_items(items)
    assert [item for _, item in state.items()] == items


def test_vectors_are_kept_by_key_until_their_item_is_put(state):
    many = {str(number): bytes([number % 256]) for number in range(1200)}
    state.put_vectors("old", {"1": b"o"})
    state.put_vectors("new", many)
    state.put_vectors("new", {})
    assert state.vectors("new", [*many, "none"]) == many
    assert state.vectors("none", ["1"]) == state.vectors("new", []) == {}
    state.put_items([Item("1")])
    assert state.vectors("old", ["1"]) == {}
    assert state.vectors("new", ["1", "2"]) == {"2": b"\2"}


def test_a_setting_is_empty_until_it_is_set(state):
    assert state.get("salt") == ""
    state.set("salt", "1")
    state.set("salt", "2")
    assert state.get("salt") == "2"


def test_everything_is_there_after_closing_and_opening(where):
    state = open_state(where)
    state.append([liked("a"), liked("b", "v")])
    state.forget("v")
    state.put_items([Item("1", "one", attributes={"x": "y"})])
    state.set("salt", "1")
    before = list(state.events()), list(state.items()), state.counts()
    state.close()
    state.close()
    state = open_state(where)
    assert (list(state.events()), list(state.items()), state.counts()) == before
    assert state.append([liked("a"), liked("c")]) == [False, True]
    assert state.forgotten(["u", "v"]) == {"v"}
    assert state.get("salt") == "1"
    state.close()


def test_many_threads_lose_and_double_nothing_and_read_what_they_wrote(state):
    def work(thread):
        for number in range(40):
            mine, shared = f"{thread}-{number}", f"shared-{number}"
            new = state.append([liked(mine, f"u{thread}"), liked(shared, "all")])
            won[thread] += new[1]
            assert new[0]
            assert state.history(f"u{thread}")[-1].event_id == mine
            assert shared in {event.event_id for event in state.history("all")}

    won = [0] * 8
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert sum(won) == len(state.history("all")) == 40
    for thread in range(8):
        ids = [event.event_id for event in state.history(f"u{thread}")]
        assert ids == [f"{thread}-{number}" for number in range(40)]
    assert state.counts() == {"events": 360, "users": 9, "items": 0}


def test_a_history_is_never_older_than_the_last_acknowledged_event(state):
    acknowledged, done = [0], threading.Event()

    def write():
        for number in range(150):
            state.append([liked(str(number))])
            acknowledged[0] = number + 1
            if number == 75:
                state.forget("v")
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        at_least = acknowledged[0]
        ids = [event.event_id for event in state.history("u")]
        assert ids == [str(number) for number in range(len(ids))]
        assert len(ids) >= at_least
    writer.join()


def test_a_closed_state_says_so(where):
    if where.startswith("redis"):
        pytest.skip("a connection to Redis is made anew when it is asked for")
    state = open_state(where)
    state.close()
    for call in (lambda: state.append([liked("a")]), lambda: state.history("u")):
        with pytest.raises(StateError, match="was closed"):
            call()
