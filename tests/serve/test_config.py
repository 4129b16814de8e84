"""The service's config: from YAML, from a Serve config, from flags; wrong ones say what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from diffray.cli.app import app
from diffray.cli.serve import _named, _scale
from diffray.serve.config import InvalidConfig, ServeConfig
from diffray.serve.keys import Keys

EXAMPLE = Path(__file__).parents[2] / "examples/serve.yaml"


def test_the_example_is_a_config_both_ways() -> None:
    config = ServeConfig.from_yaml(EXAMPLE)
    assert config.replicas is not None
    assert config.names == ["embedded"]
    assert (config.host, config.port) == ("127.0.0.1", 8000)
    arguments = yaml.safe_load(EXAMPLE.read_text())["applications"][0]["args"]
    assert ServeConfig.checked(arguments).replicas == config.replicas


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "x"}, "model: "),
        ({"models": {}}, "models: "),
        ({"default": "x"}, "allowed is one of embedded"),
        ({"limits": {"cost": 0}}, "limits.cost"),
        ({"replicas": {"min": 3, "max": 2}}, "above max"),
        ({"port": 70000}, "port"),
    ],
)
def test_mistakes_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        ServeConfig.checked(values)


def test_files_that_are_none(tmp_path: Path) -> None:
    for text in ("- a", "a: [", "applications: []"):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(InvalidConfig):
            ServeConfig.from_yaml(tmp_path / "c.yaml")
    with pytest.raises(InvalidConfig):
        ServeConfig.from_yaml(tmp_path / "none.yaml")


def test_names_of_models_and_scales(tmp_path: Path) -> None:
    assert _named("/m/xl_base.safetensors", {}) == ("xl_base", {"source": "/m/xl_base.safetensors"})
    assert _named("s3://b/folder/", {"dtype": "float16"})[0] == "folder"
    assert _named("org/name", {})[0] == "org/name"
    assert _named("fast=org/name@main", {}) == ("fast", {"source": "org/name@main"})
    assert _scale("3") == {"min": 3, "max": 3}
    assert _scale("0-4") == {"min": 0, "max": 4}
    assert _scale("0") == {"min": 0, "max": 1}


def test_keys_from_the_command_line(tmp_path: Path) -> None:
    file, run = tmp_path / "keys.json", CliRunner().invoke
    made = run(app, ["keys", "add", "alice", "--file", str(file), "--requests", "5/minute"])
    assert made.exit_code == 0, made.output
    token = made.output.splitlines()[0]
    key = Keys(str(file)).find(token)
    assert key is not None
    assert (key.id, key.requests) == ("alice", "5/minute")
    listed = run(app, ["keys", "list", "--file", str(file)]).output
    assert "alice" in listed
    assert "requests 5/minute" in listed
    assert token not in listed
    assert run(app, ["keys", "add", "alice", "--file", str(file), "--requests", "often"]).exit_code == 2
    assert run(app, ["keys", "revoke", "alice", "--file", str(file)]).exit_code == 0
    assert run(app, ["keys", "revoke", "alice", "--file", str(file)]).exit_code == 1
    assert Keys(str(file)).find(token) is None


def test_serve_refuses_to_be_open_by_mistake() -> None:
    refused = CliRunner().invoke(app, ["serve", "--host", "0.0.0.0", "--port", "0"])
    assert refused.exit_code == 2
    assert "diffray keys add" in refused.output
    assert CliRunner().invoke(app, ["serve", "--replicas", "many"]).exit_code == 2
