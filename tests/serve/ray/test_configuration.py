"""Deployments of Ray Serve: options, the configuration file, and errors in its messages."""

from __future__ import annotations

import importlib
import sys

import pytest

pytest.importorskip("ray.serve")
pytest.importorskip("yaml")

import yaml
from ray.serve.schema import ServeDeploySchema

from safegen.core.errors import ConfigError, FileError, MissingExtraError, UserError
from safegen.evaluation.engines.cluster import import_ray
from safegen.serve.config import RayConfig, ServerConfig
from safegen.serve.engine.base import EngineFaultError
from safegen.serve.ray.app import INGRESS, build_application, build_from_file, stack_options
from safegen.serve.ray.server import count_cpus, read_error, write_ray_config

SERVER = """
stacks = ["mini", "other.toml"]
guards = ["judge-filter"]
concept = "skulls"
port = 9001
workers = 2
max_queue = 33
threads = 1
[ray]
num_cpus = 0.5
"""


@pytest.fixture
def server_file(tmp_path):
    path = tmp_path / "server.toml"
    path.write_text(SERVER)
    return path


def test_the_written_file_is_one_of_ray_serve_and_names_every_setting(server_file, tmp_path):
    out = tmp_path / "serve.yaml"
    write_ray_config(server_file, out)
    document = yaml.safe_load(out.read_text())
    schema = ServeDeploySchema.model_validate(document)
    assert (schema.http_options.host, schema.http_options.port) == ("127.0.0.1", 9001)
    (application,) = document["applications"]
    names = [deployment["name"] for deployment in application["deployments"]]
    assert names == [INGRESS, "stack-0", "stack-1"]
    stack = application["deployments"][1]
    assert stack["num_replicas"] == 2
    assert stack["max_queued_requests"] == 33
    assert stack["ray_actor_options"] == {"num_cpus": 0.5, "num_gpus": 0.0}
    module, _, function = application["import_path"].partition(":")
    assert getattr(sys.modules[module], function) is build_from_file


def test_the_application_of_the_file_has_the_deployments_of_the_file(server_file):
    from ray.serve._private.build_app import build_app as build

    application = build_from_file({"config": str(server_file)})
    built = build(application, name="safegen")
    assert {d.name for d in built.deployments} == {INGRESS, "stack-0", "stack-1"}
    assert built.ingress_deployment_name == INGRESS


def test_more_replicas_than_workers_turn_autoscaling_on():
    config = ServerConfig(stacks=("mini",), workers=2, ray=RayConfig(max_replicas=5))
    options = stack_options(config)["stack-0"]
    assert "num_replicas" not in options
    assert options["autoscaling_config"]["min_replicas"] == 2
    assert options["autoscaling_config"]["max_replicas"] == 5
    assert count_cpus(config) == 5
    assert build_application(config)


def test_a_batch_fits_into_the_requests_of_a_replica():
    options = stack_options(ServerConfig(stacks=("mini",), max_batch_size=32))["stack-0"]
    assert options["max_ongoing_requests"] >= 32


def test_an_existing_file_is_kept(server_file, tmp_path):
    out = tmp_path / "serve.yaml"
    out.write_text("mine")
    with pytest.raises(FileError, match="already exists"):
        write_ray_config(server_file, out)
    assert out.read_text() == "mine"


def test_what_ray_cannot_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="max_replicas must be >= workers"):
        ServerConfig(stacks=("mini",), workers=3, ray=RayConfig(max_replicas=2))
    upstream = {"url": "http://127.0.0.1:1"}
    with pytest.raises(ConfigError, match="stacks must be given with the engine 'ray'"):
        ServerConfig(upstream=upstream, guards=("judge-filter",), engine="ray")


def test_an_error_in_a_message_of_ray_keeps_its_kind_and_words():
    message = """The replica failed: ray::ServeReplica:safegen:stack-0.initialize()
  File "session.py", line 1, in open_session
safegen.core.errors.ConfigError: a stack must have a guard, got none
The deployments ['stack-0'] are unhealthy."""
    error = read_error(message)
    assert type(error) is ConfigError
    assert str(error) == "a stack must have a guard, got none"
    fault = read_error("safegen.serve.engine.base.EngineFaultError: the replica failed")
    assert isinstance(fault, EngineFaultError)
    assert read_error("ValueError: x") is None
    assert isinstance(error, UserError)


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    with pytest.raises(MissingExtraError, match=r"safegen\[ray\]"):
        import_ray("ray.serve")


@pytest.mark.parametrize("module", ["app", "engine", "replica"])
def test_a_module_without_ray_names_the_extra(monkeypatch, module):
    name = f"safegen.serve.ray.{module}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    for missing in [found for found in sys.modules if found.split(".")[0] == "ray"]:
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingExtraError, match=r"safegen\[ray\]"):
        importlib.import_module(name)
