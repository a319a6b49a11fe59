"""The server as others see it: HTTP in, JSON out, against a real one."""

import json
import uuid

import httpx
import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def api(server):
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client


def event(user, item, kind="like", **more):
    return {"event_id": uuid.uuid4().hex, "user_id": user, "item_id": item, "event": kind, **more}


def ids(answer):
    assert answer.status_code == 200, answer.text
    return [item["item_id"] for item in answer.json()["items"]]


def recommend(api, **body):
    return ids(api.post("/v1/recommend", json=body))


@pytest.fixture
def visitor():
    return f"visitor-{uuid.uuid4().hex}"


class TestRecommend:
    def test_an_answer_names_version_request_and_items(self, api):
        answer = api.post(
            "/v1/recommend", json={"user_id": "u1", "k": 3}, headers={"x-request-id": "abc-1"}
        )
        told = answer.json()
        assert told["model_version"] == "2"
        assert told["request_id"] == answer.headers["x-request-id"] == "abc-1"
        assert len(told["items"]) == 3
        scores = [item["score"] for item in told["items"]]
        assert scores == sorted(scores, reverse=True)

    def test_it_is_what_the_bundle_recommends(self, api, bundle):
        import tfrec

        chain = tfrec.load_recommender(bundle)
        for user in ("u1", "u4"):
            expected = [one.item_id for one in chain.recommend([tfrec.Request(user)], 5)[0]]
            assert recommend(api, user_id=user, k=5) == expected

    def test_nothing_seen_comes_and_nothing_excluded(self, api):
        user = api.get("/v1/users/u1").json()
        seen = {one["item_id"] for one in user["earlier"]}
        assert seen
        everything = recommend(api, user_id="u1", k=100)
        assert not seen & set(everything)
        assert everything[0] not in recommend(api, user_id="u1", k=100, exclude=[everything[0]])

    def test_only_what_is_included_comes(self, api):
        some = recommend(api, k=100)[3:6]
        assert set(recommend(api, k=10, include=some)) == set(some)

    def test_the_parts_add_up_to_the_score(self, api):
        for body in ({"user_id": "u1"}, {"history": ["i1", "i2"], "profile": "red"}, {}):
            for item in api.post("/v1/recommend", json=body).json()["items"]:
                assert sum(item["parts"].values()) == pytest.approx(item["score"], abs=2e-3)

    def test_an_explanation_names_what_is_near_in_the_history(self, api):
        answer = api.post("/v1/recommend", json={"history": ["i1", "i3"], "explain": True}).json()
        told = answer["items"][0]["explanation"]
        assert {near["item_id"] for near in told["because"]} <= {"i1", "i3"}
        assert told["rank_before"] == 1

    def test_all_variety_gives_another_list(self, api):
        focused = recommend(api, user_id="u1", k=5, diversity=0)
        assert recommend(api, user_id="u1", k=5, diversity=1) != focused

    def test_many_at_once_get_what_each_gets_alone(self, api):
        from concurrent.futures import ThreadPoolExecutor

        users = [f"u{n}" for n in range(8)]
        alone = [recommend(api, user_id=user, k=5) for user in users]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda user: recommend(api, user_id=user, k=5), users * 4))
        assert together == alone * 4

    @pytest.mark.parametrize(
        ("profile", "said"),
        [
            ("我需要西装", "knows no word of '我需要西装'"),
            ("\u200b", "knows no word of"),
            ("war " * 25_000, "profile is 100000 characters; at most"),
        ],
    )
    def test_a_profile_that_cannot_be_read_is_refused(self, api, profile, said):
        answer = api.post("/v1/recommend", json={"history": ["i1"], "profile": profile})
        assert (answer.status_code, said in answer.json()["error"]["message"]) == (422, True)

    def test_it_does_not_fail_those_who_are_answered_with_it(self, api):
        from concurrent.futures import ThreadPoolExecutor

        def status(profile):
            return api.post("/v1/recommend", json={"profile": profile}).status_code

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(status, ["red", "我"] * 6)) == [200, 422] * 6


class TestEvents:
    def test_the_next_answer_knows_of_them(self, api, visitor):
        before = recommend(api, user_id=visitor, k=5)
        api.post("/v1/events", json=event(visitor, before[0])).raise_for_status()
        after = recommend(api, user_id=visitor, k=5)
        assert before[0] not in after

    def test_hidden_and_disliked_items_never_come_until_they_are_liked(self, api, visitor):
        for kind in ("hide", "dislike"):
            item = recommend(api, user_id=visitor, k=1)[0]
            api.post("/v1/events", json=event(visitor, item, kind)).raise_for_status()
            assert item not in recommend(api, user_id=visitor, k=500)

    def test_the_history_lists_every_event_in_order_and_repeats(self, api, visitor):
        sent = [
            event(visitor, "i3", "view", timestamp=50.0),
            event(visitor, "i3", "view", timestamp=40.0),
            event(visitor, "unknown", "click"),
            event(visitor, "i1", "rating", value=4.5),
        ]
        answer = api.post("/v1/events", json=sent).json()
        assert (answer["accepted"], answer["known"]) == (4, 0)
        again = api.post("/v1/events", json=sent[:2]).json()
        assert (again["accepted"], again["known"]) == (0, 2)
        history = api.get(f"/v1/users/{visitor}").json()["history"]
        assert [one["event_id"] for one in history] == [one["event_id"] for one in sent]
        assert history[0]["timestamp"] == 50.0
        assert history[3]["value"] == 4.5

    @pytest.mark.parametrize(
        ("wrong", "field"),
        [
            ({"event": "rating"}, "value"),
            ({"item_id": ""}, "item_id"),
            ({"timestamp": -1}, "timestamp"),
            ({"user_id": 3}, "user_id"),
            ({"color": "red"}, "color"),
        ],
    )
    def test_what_is_wrong_is_named_and_nothing_is_kept(self, api, visitor, wrong, field):
        answer = api.post("/v1/events", json=event(visitor, "i1", "view") | wrong)
        assert answer.status_code == 422
        assert answer.json()["error"]["field"] == field
        assert api.get(f"/v1/users/{visitor}").json()["history"] == []


class TestItems:
    def test_a_new_item_is_found_at_once_and_is_gone_when_deleted(self, api):
        name = f"new-{uuid.uuid4().hex}"
        made = api.put(f"/v1/items/{name}", json={"title": "A singular zebra"})
        assert made.status_code == 201
        assert made.json()["origin"] == "live"
        assert ids(api.get("/v1/search", params={"q": "singular zebra"}))[0] == name
        assert name in recommend(api, user_id="u1", k=500)
        assert api.put(f"/v1/items/{name}", json={"title": "Another"}).status_code == 200
        gone = api.delete(f"/v1/items/{name}").json()
        assert (gone["item_id"], gone["deleted"]) == (name, True)
        assert api.delete(f"/v1/items/{name}").status_code == 404
        assert api.get(f"/v1/items/{name}").status_code == 404
        assert name not in recommend(api, user_id="u1", k=500)

    def test_an_import_says_which_lines_are_wrong(self, api):
        tag = uuid.uuid4().hex
        lines = [json.dumps({"item_id": f"{tag}-{n}", "title": f"Item {n}"}) for n in range(70)]
        lines[3] = "{"
        lines[5] = json.dumps({"item_id": f"{tag}-5"})
        told = api.post("/v1/items:import", content="\n".join(lines)).json()
        assert told["imported"] == 68
        assert [one["line"] for one in told["errors"]] == [4, 6]
        assert api.get(f"/v1/items/{tag}-69").json()["title"] == "Item 69"

    def test_an_attribute_that_items_do_not_have_is_refused(self, api):
        answer = api.put("/v1/items/x", json={"title": "T", "attributes": {"nope": "1"}})
        assert answer.status_code == 422
        assert "nope" in answer.json()["error"]["message"]


class TestUsers:
    def test_who_is_forgotten_is_as_if_he_had_never_been(self, api):
        assert api.get("/v1/users/u5").json()["earlier"]
        api.post("/v1/events", json=event("u5", "i1")).raise_for_status()
        assert api.delete("/v1/users/u5").json()["events"] == 1
        gone = api.get("/v1/users/u5").json()
        assert (gone["known"], gone["history"], gone["earlier"]) == (False, [], [])
        assert recommend(api, user_id="u5", k=5) == recommend(api, user_id="nobody", k=5)
        assert "u5" not in [one["user_id"] for one in api.get("/v1/users").json()["users"]]


class TestShelves:
    def test_each_has_its_key_and_nothing_seen(self, api):
        told = api.post("/v1/shelves", json={"user_id": "u1", "k": 4}).json()["shelves"]
        assert {shelf["key"] for shelf in told} == {"for_you", "because", "new_to_you", "popular"}
        seen = {one["item_id"] for one in api.get("/v1/users/u1").json()["earlier"]}
        for shelf in told:
            assert not seen & {item["item_id"] for item in shelf["items"]}
        about = [shelf["about"]["item_id"] for shelf in told if shelf["key"] == "because"]
        assert set(about) <= seen


class TestTheServerItself:
    @pytest.mark.parametrize(
        ("method", "path", "body", "status"),
        [
            ("POST", "/v1/recommend", "{", 400),
            ("POST", "/v1/recommend", '{"k": 0}', 422),
            ("POST", "/v1/recommend", '{"k": 100000}', 422),
            ("POST", "/v1/recommend", '{"diversity": 2}', 422),
            ("POST", "/v1/recommend", '{"filters": {"nope": ["x"]}}', 422),
            ("POST", "/v1/recommend", '{"diversity": NaN}', 422),
            ("GET", "/v1/search?q=", "", 400),
            ("GET", "/v1/search?q=a&k=-1", "", 422),
            ("GET", "/v1/items/nope/similar", "", 404),
            ("POST", "/v1/models/99:activate", "", 404),
            ("GET", "/nowhere", "", 404),
            ("PATCH", "/v1/users", "", 405),
        ],
    )
    def test_errors_have_one_form(self, api, method, path, body, status):
        answer = api.request(method, path, content=body)
        assert answer.status_code == status, answer.text
        told = answer.json()
        assert set(told) == {"error", "request_id"}
        assert told["error"]["message"]
        assert "Traceback" not in answer.text

    def test_a_version_takes_over_and_another_gets_a_share(self, api):
        def shares(answer):
            assert answer.status_code == 200, answer.text
            return {one["version"]: one["share"] for one in answer.json()["versions"]}

        assert shares(api.get("/v1/models")) == {"2": 1.0, "1": 0.0}
        half = shares(api.post("/v1/models/1:activate", json={"share": 0.5}))
        assert half == {"2": 0.5, "1": 0.5}
        users = [f"visitor {n}" for n in range(60)]

        def versions():
            bodies = [{"user_id": user, "k": 1} for user in users]
            return [api.post("/v1/recommend", json=b).json()["model_version"] for b in bodies]

        found = versions()
        assert set(found) == {"1", "2"}
        assert versions() == found
        assert shares(api.post("/v1/models/2:activate")) == {"2": 1.0, "1": 0.0}
        assert set(versions()) == {"2"}

    def test_figures_come_from_what_was_asked(self, api):
        before = api.get("/v1/stats").json()
        for _ in range(3):
            recommend(api, user_id="u1", k=5)
        after = api.get("/v1/stats").json()
        assert after["requests"] - before["requests"] == 3
        assert after["served"]["lists"] - before["served"]["lists"] == 3
        assert after["latency"]["rank"]["count"] >= 3
        counted = 'tfrec_request_seconds_count{method="POST",route="/v1/recommend",status="200"}'
        assert counted in api.get("/metrics").text

    def test_the_description_names_every_path(self, api):
        described = api.get("/openapi.json").json()
        assert {"/v1/recommend", "/v1/events", "/v1/items/{item_id}"} <= set(described["paths"])

    def test_another_catalog_is_counted_anew(self, own_server):
        def figures():
            return httpx.get(f"{own_server.url}/v1/stats", timeout=20).json()["served"]

        httpx.post(f"{own_server.url}/v1/recommend", json={}, timeout=20).raise_for_status()
        assert figures()["lists"] == 1
        activated = httpx.post(f"{own_server.url}/v1/models/1:activate", timeout=60)
        assert activated.status_code == 200
        assert figures()["lists"] == 0
        metrics = httpx.get(f"{own_server.url}/metrics", timeout=20).text
        assert 'tfrec_version_share{version="1"} 1.0' in metrics
        assert 'tfrec_version_share{version="2"}' not in metrics
