"""The OpenAPI description: what it says of each path is what the running server does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.slow

SETTINGS = (
    """
[checks]
use_after_free.enabled = false
ensure_resource_availability.enabled = false
negative_data_rejection.expected-statuses = ["400", "404", "405", "413", "422"]
"""
    + "".join(
        f"""
[[operations]]
include-path = "{path}"
checks.positive_data_acceptance.enabled = false
"""
        for path in ("/v1/recommend", "/v1/shelves", "/v1/items/{item_id}")
    )
    + """
[[operations]]
include-path = "/v1/items:import"
checks.negative_data_rejection.enabled = false
"""
)
"""All checks but those about deleted things, since who is forgotten can still be asked for: he is
new. The attributes of filters and items are those of the catalog, which no schema knows; so bodies
there can be refused that look right. An import answers what is wrong with each of its lines."""

EXAMPLES = 10  # of each path, beside those that schemathesis makes of every keyword of a schema


@pytest.fixture(scope="module")
def asked(server, tmp_path_factory):
    """What schemathesis has to say of the server."""
    folder = tmp_path_factory.mktemp("schemathesis")
    (folder / "schemathesis.toml").write_text(SETTINGS)
    words = ["run", f"{server.url}/openapi.json"]
    words += ["--max-examples", str(EXAMPLES), "--phases", "coverage,fuzzing", "--seed", "1"]
    words += ["--request-timeout", "30", "--generation-database", "none", "--no-color"]
    room = Path(__file__).parent
    known = {"PYTHONPATH": f"{room}:{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", *words],
        cwd=folder,
        env={**os.environ, **known, "SCHEMATHESIS_HOOKS": "openapi_hooks"},
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_every_path_does_what_is_said_and_never_fails(asked):
    assert asked.returncode == 0, asked.stdout[-20_000:] + asked.stderr
    assert "Errors:" not in asked.stdout


def test_the_server_had_no_error_of_its_own(asked, server):
    assert "Traceback" not in server.log.read_text()


def test_the_description_tells_this_servers_limits(server):
    told = httpx.get(f"{server.url}/openapi.json").json()
    body = told["components"]["schemas"]["RecommendBody"]["properties"]
    assert body["k"]["maximum"] == 500
    wanted = {"k": body["k"]["maximum"], "exclude": ["x"] * body["exclude"]["maxItems"]}
    url = f"{server.url}/v1/recommend"
    assert httpx.post(url, json=wanted).status_code == 200
    for name, more in (("k", 501), ("exclude", [*wanted["exclude"], "x"])):
        answer = httpx.post(url, content=json.dumps({**wanted, name: more}))
        assert answer.status_code == 422
        assert answer.json()["error"]["field"] == name


def test_a_path_tells_all_methods_that_it_has(server):
    answer = httpx.patch(f"{server.url}/v1/items/i1")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "DELETE, GET, HEAD, PUT"
    assert httpx.put(f"{server.url}/v1/items/i1/similar", json={"title": "x"}).status_code == 405
