"""deploy/: what can be checked of an image and of a compose file without a container engine."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tfrec import cli
from tfrec.config import Config
from tfrec.engines import TF_SERVING

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text("utf-8")
LINES = [
    line
    for line in re.sub(r"\\\n", " ", DOCKERFILE).splitlines()
    if line and not line.startswith("#")
]


def told(instruction):
    return [line.partition(" ")[2] for line in LINES if line.startswith(f"{instruction} ")]


@pytest.fixture(scope="module")
def compose():
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text("utf-8"))


def settings(command):
    """What tfrec's own parser makes of a command."""
    assert command[0] == "tfrec"
    arguments = cli.parser().parse_args(command[1:])
    assert arguments.verb == "serve"
    chosen = {name: getattr(arguments, name) for name in ("host", "port", "state", "engine")}
    changed = Config().changed(
        {
            f"serve.{name}": int(value) if name == "port" else value
            for name, value in chosen.items()
            if value
        }
    )
    return arguments.folder, changed.serve


class TestImage:
    def test_everything_it_copies_is_there_and_not_ignored(self):
        kept = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text("utf-8").split()
        sources = [
            source
            for line in told("COPY")
            if not line.startswith("--from")
            for source in line.split()[:-1]
        ]
        assert len(sources) == 5
        for source in sources:
            assert (ROOT / source).exists(), source
            assert f"!{source}" in kept

    def test_what_building_the_package_reads_is_copied(self):
        copied = " ".join(told("COPY"))
        project = (ROOT / "pyproject.toml").read_text("utf-8")
        for name in ("README.md", "LICENSE"):
            assert f'"{name}"' in project
            assert name in copied

    def test_the_packages_are_the_pinned_ones_of_serving(self):
        (install,) = [line for line in told("RUN") if "pip" in line.split("&&")[-1]]
        words = shlex.split(install.split("&&")[-1])
        assert words[words.index("-c") + 1] == "constraints.txt"
        assert ".[serve]" in words

    def test_the_command_is_one_that_tfrec_takes(self):
        folder, serve = settings(json.loads(told("CMD")[-1]))
        assert str(folder) == "/bundle"
        assert (serve.host, serve.port, serve.state) == ("0.0.0.0", 8080, "/state")
        assert told("EXPOSE") == [str(serve.port)]
        assert f"127.0.0.1:{serve.port}/readyz" in DOCKERFILE

    def test_it_runs_as_nobody_that_matters_and_ends_when_told(self):
        (user,) = told("USER")
        assert user.split(":")[0] not in ("0", "root")
        assert LINES.index(f"USER {user}") > max(
            place for place, line in enumerate(LINES) if line.startswith(("RUN", "COPY"))
        )
        assert told("STOPSIGNAL") == ["SIGTERM"]

    def test_the_health_check_is_python_that_compiles(self):
        check = told("HEALTHCHECK")[0].partition("CMD ")[2]
        program, option, code = json.loads(check)
        assert (program, option) == ("python", "-c")
        compile(code, "health", "exec")


class TestCompose:
    def test_serve_asks_the_two_others_by_their_names(self, compose):
        services = compose["services"]
        assert set(services) == {"serve", "redis", "tf-serving"}
        folder, serve = settings(services["serve"]["command"])
        assert serve.state == "redis://redis:6379/0"
        assert serve.engine == f"{TF_SERVING}tf-serving:8500"
        places = [
            volume.rpartition(":")[0].rpartition(":")[2]
            for volume in services["serve"]["volumes"][:1]
        ]
        assert places == [str(folder)]
        assert services["serve"]["volumes"][1].endswith(f":{folder}.state")

    def test_the_image_is_made_from_this_repository(self, compose):
        build = compose["services"]["serve"]["build"]
        context = (ROOT / "deploy" / build["context"]).resolve()
        assert context == ROOT
        assert (context / build["dockerfile"]).is_file()

    def test_redis_keeps_what_was_acknowledged(self, compose):
        words = compose["services"]["redis"]["command"]
        given = dict(zip(words[1::2], words[2::2], strict=True))
        assert given["--appendonly"] == "yes"
        assert given["--appendfsync"] == "always"
        assert given["--maxmemory-policy"] == "noeviction"

    def test_tensorflow_serving_is_the_version_that_is_tested_with(self, compose):
        served = compose["services"]["tf-serving"]
        pinned = re.search(
            r"^tensorflow-serving-api==(.*)$", (ROOT / "constraints.txt").read_text(), re.M
        )
        assert served["image"] == f"tensorflow/serving:{pinned[1]}"
        (config,) = served["command"]
        (volume,) = served["volumes"]
        assert config == "--model_config_file=/models/tf-serving/models.config"
        assert volume.endswith(":/models:ro")

    def test_only_serve_can_be_reached_and_only_from_this_machine(self, compose):
        ports = {name: one.get("ports") for name, one in compose["services"].items()}
        assert ports == {"serve": ["127.0.0.1:8080:8080"], "redis": None, "tf-serving": None}
        assert compose["networks"]["inside"]["internal"] is True
        for name in ("redis", "tf-serving"):
            assert compose["services"][name]["networks"] == ["inside"]

    def test_every_volume_and_network_is_declared(self, compose):
        for one in compose["services"].values():
            assert set(one["networks"]) <= set(compose["networks"])
            for volume in one["volumes"]:
                name = volume.partition(":")[0]
                assert name in compose["volumes"] or name.startswith("${BUNDLE")
