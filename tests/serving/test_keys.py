"""API keys: what the file holds, what a token opens, and what a running server sees of changes."""

import json
import os
import stat
import threading

import pytest

from tfrec.errors import ConfigError, InputError
from tfrec.serving.keys import Keys


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def keys(tmp_path, clock):
    return Keys(tmp_path / "keys.json", clock)


class TestToken:
    def test_opens_with_the_role_it_was_made_for(self, keys):
        token = keys.create("write", "shop")
        found = keys.find(token)
        assert (found.role, found.label) == ("write", "shop")

    def test_has_32_random_bytes(self, keys):
        secrets = {keys.create("read").split("_", 2)[2] for _ in range(20)}
        assert len(secrets) == 20
        assert all(len(secret) == 43 for secret in secrets)

    @pytest.mark.parametrize("changed", [lambda t: t[:-1], lambda t: t + "x", str.upper])
    def test_opens_nothing_when_changed(self, keys, changed):
        token = keys.create("read")
        assert keys.find(changed(token)) is None

    @pytest.mark.parametrize(
        "token", ["", "_", "tfrec", "tfrec_", "tfrec_a_b", "ü_\ud800_x", "a b"]
    )
    def test_that_is_none_opens_nothing(self, keys, token):
        keys.create("read")
        assert keys.find(token) is None

    def test_of_one_key_with_the_id_of_another_opens_nothing(self, keys):
        one, other = keys.create("read").split("_", 2), keys.create("admin").split("_", 2)
        assert keys.find("_".join([one[0], other[1], one[2]])) is None


class TestRole:
    def test_includes_those_below(self, keys):
        may = {role: keys.find(keys.create(role)).may for role in ("read", "write", "admin")}
        table = {role: [f(needed) for needed in may] for role, f in may.items()}
        assert table == {
            "read": [True, False, False],
            "write": [True, True, False],
            "admin": [True, True, True],
        }

    def test_that_is_unknown_is_refused(self, keys):
        with pytest.raises(InputError, match="no role 'root'; take one of read, write, admin"):
            keys.create("root")


class TestFile:
    def test_holds_no_token(self, keys):
        token = keys.create("admin", "ops")
        text = keys.path.read_text()
        assert token not in text
        assert token.split("_", 2)[2] not in text

    def test_is_for_its_owner_alone(self, keys):
        old = os.umask(0)
        try:
            keys.create("read")
            keys.create("read")
        finally:
            os.umask(old)
        assert stat.S_IMODE(keys.path.stat().st_mode) == 0o600

    def test_is_read_again(self, keys, clock):
        token = keys.create("write", "shop")
        assert Keys(keys.path, clock).listing() == keys.listing()
        assert Keys(keys.path, clock).find(token).role == "write"

    def test_takes_keys_from_several_processes_at_once(self, tmp_path):
        def add() -> None:
            for _ in range(10):
                Keys(tmp_path / "keys.json").create("read")

        threads = [threading.Thread(target=add) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(Keys(tmp_path / "keys.json").listing()) == 40

    @pytest.mark.parametrize(
        "text",
        [
            *("", "[]", "{}", "null", '{"format": 2, "keys": []}', '{"format": 1, "keys": [1]}'),
            '{"format": 1, "keys": [{"id": "a", "role": "root", "label": "", "created": "", '
            '"sha256": ""}]}',
            '{"format": 1, "keys": [{"id": 1, "role": "read", "label": "", "created": "", '
            '"sha256": ""}]}',
        ],
    )
    def test_that_is_no_file_of_keys_is_named(self, tmp_path, text):
        (tmp_path / "keys.json").write_text(text)
        with pytest.raises(ConfigError, match=r"keys\.json is not a file of API keys"):
            Keys(tmp_path / "keys.json")

    def test_that_cannot_be_read_is_named(self, tmp_path):
        (tmp_path / "keys.json").mkdir()
        with pytest.raises(ConfigError, match=r"cannot read the keys in .*keys\.json"):
            Keys(tmp_path / "keys.json")

    def test_in_a_folder_that_is_none_is_named(self):
        with pytest.raises(ConfigError, match=r"/dev/null/keys\.json: Not a directory"):
            Keys("/dev/null/keys.json")

    @pytest.mark.parametrize("label", ["two\nlines", "x" * 201])
    def test_takes_labels_of_one_short_line(self, keys, label):
        with pytest.raises(InputError, match="one line of at most 200"):
            keys.create("read", label)


class TestRunningServer:
    def test_sees_a_key_that_another_process_revoked_within_a_second(self, keys, clock):
        token = keys.create("read")
        Keys(keys.path).revoke(keys.listing()[0].id)
        clock.now += 1.0
        assert keys.find(token) is None

    def test_sees_a_key_that_another_process_made(self, keys, clock):
        token = Keys(keys.path).create("read")
        clock.now += 1.0
        assert keys.find(token)

    def test_asks_the_disk_at_most_once_a_second(self, keys, clock):
        token = keys.create("read")
        clock.now += 0.9
        Keys(keys.path).revoke(keys.listing()[0].id)
        assert keys.find(token)

    def test_opens_to_nobody_once_the_file_is_gone(self, keys, clock):
        token = keys.create("read")
        keys.path.unlink()
        clock.now += 1.0
        assert keys.find(token) is None

    def test_goes_on_with_the_keys_of_before_when_the_file_is_damaged(self, keys, clock, caplog):
        token = keys.create("read")
        keys.path.write_text(keys.path.read_text()[:-9])
        clock.now += 1.0
        assert keys.find(token)
        assert "is not a file of API keys" in caplog.text


class TestRevoke:
    def test_takes_the_key_out(self, keys):
        token = keys.create("read", "shop")
        assert keys.revoke(keys.listing()[0].id).label == "shop"
        assert keys.find(token) is None
        assert json.loads(keys.path.read_text())["keys"] == []

    def test_names_the_keys_there_are(self, keys):
        keys.create("read")
        known = keys.listing()[0].id
        with pytest.raises(InputError, match=f"has no key 'nobody'; its keys: {known}"):
            keys.revoke("nobody")
