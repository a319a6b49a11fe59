"""Service: batches, queues and versions, without HTTP."""

import asyncio
import contextlib
import shutil
import threading
import time
from collections import Counter

import pytest

from tfrec.config import ServeConfig
from tfrec.errors import ArtifactError, ConfigError, InputError, StateError
from tfrec.serving import versions
from tfrec.serving.schemas import RecommendBody
from tfrec.serving.service import BusyError, ClosingError, LateError, Service
from tfrec.serving.state import Event, Item, open_state

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def serving(bundle, folder, started=True, **settings):
    """A service and its state; nothing of it is left at the end."""
    state = open_state(str(folder))
    told = ServeConfig(**{"watch": 0, "threads": 1, "deadline": 60, **settings})
    service = Service(bundle, told, state)
    try:
        if started:
            service.start()
        yield service
    finally:
        service.close()
        state.close()


@pytest.fixture
def service(bundle, tmp_path):
    with serving(bundle, tmp_path / "state") as found:
        yield found


def ask(service, *bodies, k=5):
    """The answers to requests that wait together; errors as they are."""

    async def all_of():
        waiting = [
            asyncio.ensure_future(service.ask(RecommendBody(**{"k": k, **body}), f"r{n}"))
            for n, body in enumerate(bodies)
        ]
        return await asyncio.gather(*waiting, return_exceptions=True)

    return asyncio.run(all_of())


def ids(answer):
    assert not isinstance(answer, Exception), answer
    return [item["item_id"] for item in answer.lists["items"].items]


class Gate:
    """Until it is opened the models answer nobody, and requests wait together."""

    def __init__(self, service):
        self._service, self._opened = service, threading.Event()
        holding = threading.Event()
        service.call(lambda: (holding.set(), self._opened.wait(30)))
        assert holding.wait(30)

    def open(self):
        self._opened.set()

    def open_when(self, holds):
        """Opens it as soon as something holds, from another thread."""

        def wait():
            while not holds():
                time.sleep(0.001)
            self.open()

        threading.Thread(target=wait, daemon=True).start()


def together(service, *bodies, k=5):
    """The answers to requests of which all are there before the first is looked at."""
    gate = Gate(service)
    gate.open_when(lambda: service.waiting == len(bodies))
    return ask(service, *bodies, k=k)


def like(user, item):
    return Event(f"{user}-{item}", user, item, "like", 1.7e9)


BODIES = (
    {"user_id": "u1"},
    {"user_id": "u2", "profile": "the war of space"},
    {"history": ["i1", "i3"]},
    {"profile": "love"},
    {},
    {"user_id": "u3", "filters": {"shade": ["pale"]}},
    {"user_id": "fresh"},
    {"history": ["i2"], "include": ["i4", "i6", "i8"]},
    {"user_id": "u1", "diversity": 0.7},
    {"context": {"time": 1.7e9}, "history": ["i2", "i9"]},
)


class TestBatches:
    def test_requests_answered_together_get_what_each_gets_alone(self, service):
        service.append([like("fresh", "i2"), like("u1", "i5")])
        alone = [ids(ask(service, body)[0]) for body in BODIES]
        assert [ids(answer) for answer in together(service, *BODIES)] == alone
        assert [ids(a) for a in together(service, *BODIES[::-1])] == alone[::-1]

    def test_one_that_is_wrong_fails_alone(self, service):
        wrong = {"filters": {"nope": ["x"]}}
        expected = [ids(ask(service, body)[0]) for body in BODIES]
        found = together(service, wrong, *BODIES, wrong)
        assert isinstance(found[0], InputError)
        assert isinstance(found[-1], InputError)
        assert [ids(answer) for answer in found[1:-1]] == expected

    def test_no_batch_is_larger_than_is_set(self, bundle, tmp_path, monkeypatch):
        with serving(bundle, tmp_path / "state", batch=3) as service:
            sizes = []
            answers = service._answer
            monkeypatch.setattr(service, "_answer", lambda b: (sizes.append(len(b)), answers(b)))
            together(service, *[{} for _ in range(8)])
            assert sizes == [3, 3, 2]

    def test_what_changes_takes_its_turn_among_the_requests(self, service):
        gate = Gate(service)

        async def in_turn():
            before = asyncio.ensure_future(service.ask(RecommendBody(k=100), "before"))
            await asyncio.sleep(0)
            put = service.put_items([Item("between", "the war", created=1.0)])
            after = asyncio.ensure_future(service.ask(RecommendBody(k=100), "after"))
            await asyncio.sleep(0)
            gate.open()
            await asyncio.wrap_future(put)
            return await before, await after

        before, after = asyncio.run(in_turn())
        assert "between" not in ids(before)
        assert "between" in ids(after)

    def test_an_event_is_in_the_very_next_answer(self, service):
        for _ in range(10):
            best = ids(ask(service, {"user_id": "eager"})[0])[0]
            service.append([like("eager", best)])
            assert best not in ids(ask(service, {"user_id": "eager"}, k=100)[0])


class TestLimits:
    def test_who_waited_past_the_deadline_is_told_so_and_costs_no_work(
        self, bundle, tmp_path, monkeypatch
    ):
        with serving(bundle, tmp_path / "state", deadline=0.2) as service:
            looked = []
            answers = service._answers
            monkeypatch.setattr(
                service, "_answers", lambda v, asks: (looked.append(asks), answers(v, asks))[1]
            )
            gate, begun = Gate(service), time.monotonic()
            gate.open_when(lambda: time.monotonic() > begun + 0.5)
            assert isinstance(ask(service, {})[0], LateError)
            assert looked == []
            assert ids(ask(service, {})[0])

    def test_who_comes_when_too_many_wait_is_refused_at_once(self, bundle, tmp_path):
        with serving(bundle, tmp_path / "state", queue=3) as service:
            gate = Gate(service)
            gate.open_when(lambda: service.waiting == 3)
            kinds = Counter(type(answer).__name__ for answer in ask(service, *[{}] * 5))
            assert kinds == {"Answer": 3, "BusyError": 2}
            gate = Gate(service)
            for _ in range(3):
                service.call(lambda: None)
            with pytest.raises(BusyError):
                service.put_items([Item("x", "x")])
            gate.open()

    def test_who_would_wait_past_the_deadline_is_refused_before_he_does(self, bundle, tmp_path):
        with serving(bundle, tmp_path / "state", deadline=30.0) as service:
            assert ids(ask(service, {})[0])
            service.call(lambda: None).result()  # what follows an answer is done, too
            assert 0 < service._pace < 30  # learned from what the request took
            service._pace = 12.0
            gate = Gate(service)
            gate.open_when(lambda: service.waiting >= 3)
            kinds = Counter(type(answer).__name__ for answer in ask(service, *[{}] * 6))
            assert kinds == {"Answer": 3, "BusyError": 3}

    def test_who_gave_up_is_not_answered_and_nobody_else_suffers(self, service):
        gate = Gate(service)

        async def some():
            left = asyncio.ensure_future(service.ask(RecommendBody(), "left"))
            stays = asyncio.ensure_future(service.ask(RecommendBody(), "stays"))
            await asyncio.sleep(0)
            left.cancel()
            await asyncio.sleep(0)
            gate.open()
            return await stays

        assert ids(asyncio.run(some()))

    def test_closing_answers_what_waits_and_refuses_what_comes(self, bundle, tmp_path):
        with serving(bundle, tmp_path / "state") as service:
            gate = Gate(service)

            async def some():
                waiting = [asyncio.ensure_future(service.ask(RecommendBody(), "r"))]
                await asyncio.sleep(0)
                closing = threading.Thread(target=service.close)
                closing.start()
                while service.ready:
                    await asyncio.sleep(0.01)
                with pytest.raises(ClosingError):
                    await service.ask(RecommendBody(), "r")
                gate.open()
                found = await asyncio.gather(*waiting)
                closing.join()
                return found

            assert ids(asyncio.run(some())[0])


def versions_of(service, users):
    answers = ask(service, *[{"user_id": user, "k": 1} for user in users])
    return [answer.version.name for answer in answers]


class TestVersions:
    USERS = tuple(f"visitor-{n}" for n in range(200))

    def test_shares_hold_and_the_same_user_gets_the_same_version(self, bundle, tmp_path):
        with serving(bundle, tmp_path / "state") as service:
            assert set(versions_of(service, self.USERS)) == {"2"}
            service.activate("1", 0.25)
            found = versions_of(service, self.USERS)
            # 200 draws of 0.25: 50 and a standard deviation of 6.1.
            assert 25 < Counter(found)["1"] < 75
            assert versions_of(service, self.USERS) == found
            service.activate("1", 0.5)
            more = versions_of(service, self.USERS)
            assert all(now == "1" for now, then in zip(more, found, strict=True) if then == "1")
        with serving(bundle, tmp_path / "state") as service:  # and after a restart
            assert versions_of(service, self.USERS) == more

    def test_several_shares_add_up(self, own_bundle, tmp_path):
        shutil.copytree(own_bundle / "versions" / "1", own_bundle / "versions" / "3")
        with serving(own_bundle, tmp_path / "state") as service:
            for name, share in (("2", 0.5), ("1", 0.2)):
                service.activate(name, share)
            told = dict(service.versions.shares)
            assert told == pytest.approx({"3": 0.4, "2": 0.4, "1": 0.2})
            service.activate("2")
            assert service.versions.shares == (("2", 1.0),)
            assert set(service.versions.loaded) == {"2"}

    def test_an_item_is_in_every_version_that_is_or_will_be_served(self, bundle, tmp_path):
        with serving(bundle, tmp_path / "state") as service:
            service.put_items([Item("first", "the war", created=1.0)]).result(30)
            service.activate("1", 0.5)
            service.put_items([Item("second", "the love", created=2.0)]).result(30)
            assert service.delete_item("i3").result(30)
            for version in service.versions.loaded.values():
                assert version.chain.catalog.row("first")
                assert version.chain.catalog.row("second")
            for answer in ask(service, *[{"user_id": u} for u in self.USERS[:40]], k=100):
                assert {"first", "second"} <= set(ids(answer))
                assert "i3" not in ids(answer)
            assert not service.delete_item("i3").result(30)
            service.activate("2")
            service.activate("1")
            assert {"first", "second"} <= set(ids(ask(service, {}, k=100)[0]))

    def test_a_history_goes_along_from_version_to_version(self, service):
        service.append([like("loyal", "i2"), like("loyal", "i4")])
        for version in ("1", "2"):
            service.activate(version)
            (answer,) = ask(service, {"user_id": "loyal"}, k=100)
            assert answer.version.name == version
            assert not {"i2", "i4"} & set(ids(answer))

    def test_one_that_cannot_be_loaded_leaves_all_as_it_was(self, own_bundle, tmp_path):
        damaged = own_bundle / "versions" / "3"
        shutil.copytree(own_bundle / "versions" / "1", damaged)
        file = next(damaged.rglob("*.tflite"))
        file.write_bytes(file.read_bytes()[:-1])
        with serving(own_bundle, tmp_path / "state") as service:  # the newest is damaged already
            assert service.versions.shares == (("2", 1.0),)
            with pytest.raises(ArtifactError):
                service.activate("3")
            with pytest.raises(InputError, match="there are: 1, 2, 3"):
                service.activate("9")
            assert service.versions.shares == (("2", 1.0),)
            states = {one["version"]: one["state"] for one in service.versions.told()}
            assert states == {"3": "failed", "2": "active", "1": "available"}
            assert ids(ask(service, {})[0])

    def test_an_error_of_any_kind_while_loading_is_a_version_that_failed(
        self, bundle, tmp_path, monkeypatch
    ):
        with serving(bundle, tmp_path / "state") as service:
            monkeypatch.setattr(versions, "recommender_of", lambda *_, **__: 1 / 0)
            with pytest.raises(ArtifactError, match="version 1 cannot be used: ZeroDivisionError"):
                service.activate("1")
            assert service.versions.failed.keys() == {"1"}
            monkeypatch.undo()
            service.activate("1")
            assert not service.versions.failed

    def test_a_bundle_without_a_whole_version_is_refused(self, own_bundle, tmp_path):
        for file in own_bundle.rglob("*.tflite"):
            file.write_bytes(b"")
        with (
            serving(own_bundle, tmp_path / "state", started=False) as service,
            pytest.raises(ArtifactError, match="versions/2"),
        ):
            service.start()

    def test_what_another_process_activated_is_taken_over(self, service):
        service.look_around()
        assert service.versions.shares == (("2", 1.0),)
        service.state.set("active", '[["1", 0.5], ["2", 0.5]]')
        service.look_around()
        assert service.versions.shares == (("1", 0.5), ("2", 0.5))

    def test_what_another_activated_and_is_damaged_here_is_tried_once(
        self, own_bundle, tmp_path, monkeypatch
    ):
        with serving(own_bundle, tmp_path / "state") as service:
            for file in (own_bundle / "versions" / "1").rglob("*.tflite"):
                file.write_bytes(b"")
            service.state.set("active", '[["1", 1.0]]')
            with pytest.raises(ArtifactError):
                service.look_around()
            monkeypatch.setattr(service.versions, "_make", lambda number: 1 / 0)
            service.state.put_items([Item("other", "the war", created=1.0)])
            service.look_around()  # which does not stand in the way of what else is new
            assert service.versions.shares == (("2", 1.0),)
            assert "other" in ids(ask(service, {}, k=100)[0])


class TestCatchingUp:
    def test_a_write_that_fails_halfway_is_made_good_by_the_next(self, service, monkeypatch):
        def away(*_):
            raise StateError("the store is away")

        monkeypatch.setattr(service.state, "vectors", away)
        with pytest.raises(StateError):
            service.put_items([Item("kept", "the war", created=1.0)]).result(30)
        assert "kept" not in ids(ask(service, {}, k=100)[0])
        monkeypatch.undo()
        service.look_around()
        assert "kept" in ids(ask(service, {}, k=100)[0])

    def test_many_changes_are_taken_in_once_and_in_order(self, service):
        items = [Item(f"many-{n % 100}", f"the war {n}", created=1.0) for n in range(150)]
        service.put_items(items).result(30)
        for n in range(0, 100, 7):
            service.delete_item(f"many-{n}").result(30)
        (version,) = service.versions.loaded.values()
        assert version.catch_up(service.state) == 0
        found = set(ids(ask(service, {}, k=500)[0]))
        expected = {f"many-{n}" for n in range(100) if n % 7}
        assert {name for name in found if name.startswith("many")} == expected
        row = version.chain.catalog.row("many-1")
        assert version.chain.catalog.titles[row] == "the war 101"

    def test_an_attribute_that_another_version_cannot_read_costs_the_attribute_alone(
        self, service, caplog
    ):
        # As a version did that reads prices as words.
        odd = Item("odd", "the war", attributes={"price": "much"}, created=1.0)
        even = Item("even", "the war", attributes={"price": "3"}, created=1.0)
        with pytest.raises(InputError, match="price"):
            service.put_items([odd]).result(30)
        service.state.put_items([odd, even])
        service.look_around()
        (version,) = service.versions.loaded.values()
        catalog = version.chain.catalog
        assert catalog.cells(catalog.row("odd")) == {}
        assert catalog.cells(catalog.row("even")) == {"price": ["3"]}
        assert {"odd", "even"} <= set(ids(ask(service, {}, k=100)[0]))
        assert "price" in caplog.text


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("[steps\nrank = ", "not valid TOML"),
        ("[steps]\nnope = 1", "nope"),
        ("[steps]\ndiversity = 2", "diversity"),
        ('[steps]\nsources = ["nowhere"]', "nowhere"),
        ('[steps]\nfilters = ["nowhere"]', "nowhere"),
        ("[steps]\ncaps = {colour = 2}", "colour"),
        ('[steps]\nplugins = ["there_is_no_such_module"]', "there_is_no_such_module"),
        ("\xff", "policy.toml"),
    ],
)
def test_a_policy_that_is_wrong_is_named_with_what_is_wrong(tmp_path, policy, says):
    (tmp_path / "policy.toml").write_bytes(policy.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"policy\.toml") as raised:
        versions.read_steps(tmp_path, {"genre": ()})
    assert says in str(raised.value)


def test_a_policy_may_be_in_a_section_or_not_or_not_there(tmp_path):
    assert versions.read_steps(tmp_path, {}).rank == 200
    for text in ("[steps]\nrank = 7", "rank = 7"):
        (tmp_path / "policy.toml").write_text(text)
        assert versions.read_steps(tmp_path, {}).rank == 7
