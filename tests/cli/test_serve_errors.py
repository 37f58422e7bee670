"""Wrong calls of `safegen serve`: each is answered before anything is loaded, with a way out."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")

GUARD = ("--guard", "judge-filter", "--concept", "skulls")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--stack, --upstream or --config must be given. For example: --stack mini --guard"),
        (("--upstream", "localhost:7860", *GUARD), "must start with http:// or https://"),
        (("--upstream", "http://127.0.0.1:7860"), "guards must be given with an upstream"),
        (("--upstream", "http://127.0.0.1:7860", "--stack", "mini", *GUARD), "and not both"),
        (("--upstream", "http://localhost:8484", *GUARD), "another server than this one"),
        (("--upstream", "http://127.0.0.1:port", *GUARD), "Port could not be cast"),
        (("--upstream-kind", "a1111", "--stack", "mini"), "--upstream-kind must have --upstream"),
        (("--config", "missing.toml"), "the server file 'missing.toml' does not exist"),
        (
            ("--stack", "mini", *GUARD, "--host", "0.0.0.0"),
            "Make a token with: safegen serve --new-token NAME",
        ),
    ],
)
def test_a_wrong_call_is_refused_with_a_way_out(safegen, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = safegen("serve", *words)
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if not line.startswith("loading")]
    assert len(lines) == 1
    assert message in lines[0]


def test_options_change_single_settings_of_the_file(safegen, tmp_path, monkeypatch):
    from safegen.serve import server

    (tmp_path / "server.toml").write_text(
        'guards = ["judge-filter"]\nconcept = "skulls"\ndtype = "bf16"\ndevice = "cuda"\n'
        '[upstream]\nurl = "http://127.0.0.1:1"\nkind = "a1111"\ntimeout = 7\n'
    )
    found = []
    monkeypatch.setattr(server, "run_server", lambda config, **options: found.append(config) or 0)
    url = "http://127.0.0.1:2"
    words = ["--dtype", "fp32", "--device", "auto", "--upstream", url]
    code, _, err = safegen("serve", "--config", tmp_path / "server.toml", *words)
    assert code == 0, err
    (config,) = found
    assert (config.dtype, config.device, config.guards) == ("fp32", "auto", ("judge-filter",))
    upstream = config.upstream
    assert (upstream.url, upstream.kind, upstream.timeout) == (url, "a1111", 7)
