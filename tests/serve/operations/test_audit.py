"""The audit log: complete lines whatever happens, and no image without its record."""

from __future__ import annotations

import asyncio
import base64
import errno
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time

import httpx2
import pytest
from PIL import Image

from safegen.core.errors import FileError
from safegen.serve.config import ServerConfig
from safegen.serve.operations import audit
from safegen.serve.operations.audit import AuditLog, AuditLogError, hash_text, read_audit_log
from tests.serve.conftest import FakeEngine, serving
from tests.serve.operations.processes import ROOT, process

PATH = "/v1/images/generations"
WRITER = """
import asyncio, sys
from pathlib import Path
from safegen.serve.operations.audit import AuditLog

async def main():
    log = AuditLog(Path(sys.argv[1]))
    print("open", flush=True)
    while True:
        await asyncio.gather(*(log.write({"text": c * 400_000}) for c in "abc"))

asyncio.run(main())
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "audit.jsonl"


def write(path, *records, **options):
    """Write records to an audit log that is opened and closed for it."""
    log = AuditLog(path, **options)
    try:
        for record in records:
            asyncio.run(log.write(record))
    finally:
        log.close()


def lines(path):
    return path.read_bytes().split(b"\n")[:-1]


def test_every_image_has_a_record_with_hashes_in_place_of_texts(path):
    with serving(ServerConfig(stacks=("fake",), audit_log=path), FakeEngine()) as address:
        body = {"prompt": "a castle", "n": 2, "safegen": {"seed": 7, "negative_prompt": "fog"}}
        answer = httpx2.post(address + PATH, json=body)
        httpx2.post(address + PATH, json={"prompt": "a castle of skulls"})
        httpx2.post(address + PATH, json={"prompt": "a broken castle"})
        httpx2.post(address + PATH, json={"prompt": "a dead castle"})
    released, blocked, broken, dead = read_audit_log(path)
    assert released["request"] == answer.headers["x-request-id"]
    assert released["prompt_sha256"] == hash_text("a castle")
    assert released["negative_prompt_sha256"] == hash_text("fog")
    assert released["stack"] == "safe"
    assert released["stack_hash"] == "a" * 64
    assert released["settings"]["num_inference_steps"] == 25
    assert released["client"] == ""
    assert [image["seed"] for image in released["images"]] == [7, 8]
    assert {image["status"] for image in released["images"]} == {"released"}
    for image, data in zip(released["images"], answer.json()["data"], strict=True):
        pixels = Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))).convert("RGB")
        assert image["pixels_sha256"] == hashlib.sha256(pixels.tobytes()).hexdigest()
        assert [guard["guard"] for guard in image["trace"]["guards"]] == STACK_GUARDS
    (image,) = blocked["images"]
    assert (image["status"], image["stage"], image["guard"]) == (
        "blocked",
        "input",
        "prompt-filter",
    )
    assert "pixels_sha256" not in image
    assert broken["images"][0]["status"] == "fault"
    assert dead["images"][0]["reason"] == "engine"
    assert "castle" not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0


STACK_GUARDS = ["prompt-filter", "judge-filter"]


def test_prompts_are_written_if_the_operator_says_so(path):
    config = ServerConfig(stacks=("fake",), audit_log=path, log_prompts=True)
    with serving(config, FakeEngine()) as address:
        httpx2.post(address + PATH, json={"prompt": "a castle"})
    assert read_audit_log(path)[0]["prompt"] == "a castle"


@pytest.mark.parametrize("fault", ["write", "fsync", "short"])
def test_without_a_record_there_is_no_image(path, monkeypatch, fault):
    real = os.write

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with serving(ServerConfig(stacks=("fake",), audit_log=path), FakeEngine()) as address:
        assert httpx2.post(address + PATH, json={"prompt": "a castle"}).status_code == 200
        with monkeypatch.context() as patch:
            if fault == "short":
                patch.setattr(audit.os, "write", lambda file, data: real(file, data[:20]))
            else:
                patch.setattr(audit.os, fault, fail)
            answer = httpx2.post(address + PATH, json={"prompt": "a castle"})
        assert answer.status_code == 503
        assert "b64_json" not in answer.text
        assert answer.json()["error"]["message"] == "the audit log could not be written"
        metrics = httpx2.get(f"{address}/metrics").text
        assert 'safegen_faults_total{reason="audit-log",stack="safe"} 1.0' in metrics
        assert httpx2.post(address + PATH, json={"prompt": "a castle"}).status_code == 200
    assert len(read_audit_log(path)) == 2  # nothing is left of the record in between


def test_a_cancelled_request_has_a_record(path):
    engine = FakeEngine(slow_seconds=10)
    with serving(ServerConfig(stacks=("fake",), audit_log=path), engine) as address:
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(address + PATH, json={"prompt": "a slow castle"}, timeout=0.3)
        until = time.monotonic() + 5
        while not engine.cancelled and time.monotonic() < until:
            time.sleep(0.01)
    assert read_audit_log(path)[0]["images"][0]["reason"] == "cancelled"


def test_a_request_that_fails_in_an_unknown_way_has_a_record(path):
    class BrokenEngine(FakeEngine):
        async def generate(self, request):
            raise RuntimeError("a secret")

    with serving(ServerConfig(stacks=("fake",), audit_log=path), BrokenEngine()) as address:
        answer = httpx2.post(address + PATH, json={"prompt": "a castle"})
    assert answer.status_code == 500
    assert "secret" not in answer.text
    (image,) = read_audit_log(path)[0]["images"]
    assert (image["status"], image["reason"]) == ("fault", "engine")


@pytest.mark.parametrize(
    "torn",
    [b"{", b'{"request": "1', b'{"a": 1}', b"\x00" * 5000, b"\x00\x00\n", b"[1]\n", b"x" * 200_000],
)
def test_an_incomplete_last_line_is_moved_away(path, torn):
    write(path, {"n": 1}, {"n": 2})
    before = path.read_bytes()
    path.write_bytes(before + torn)
    write(path, {"n": 3})
    assert [record["n"] for record in read_audit_log(path)] == [1, 2, 3]
    assert path.read_bytes().startswith(before)
    (copy,) = path.parent.glob("audit.jsonl.torn-*")
    assert copy.read_bytes() == torn


def test_a_file_of_one_torn_line_or_none_can_be_opened(path):
    path.write_bytes(b"{")
    write(path)
    assert path.read_bytes() == b""
    write(path, {"n": 1})
    write(path)
    assert len(read_audit_log(path)) == 1
    assert len(list(path.parent.iterdir())) == 2


def test_two_servers_cannot_write_one_log(path):
    log = AuditLog(path)
    with pytest.raises(FileError, match="is being written by another server"):
        AuditLog(path)
    log.close()
    AuditLog(path).close()


def test_a_log_that_cannot_be_opened_is_one_line(tmp_path):
    for path in (tmp_path, tmp_path / "none" / "audit.jsonl"):
        with pytest.raises(FileError) as caught:
            AuditLog(path)
        assert "\n" not in str(caught.value)


def test_a_renamed_log_is_followed_by_a_new_one(path):
    log = AuditLog(path)
    asyncio.run(log.write({"n": 1}))
    old = path.rename(path.with_suffix(".1"))
    asyncio.run(log.write({"n": 2}))
    path.unlink()
    asyncio.run(log.write({"n": 3}))
    log.close()
    assert read_audit_log(old)[0]["n"] == 1
    assert [record["n"] for record in read_audit_log(path)] == [3]


def test_a_log_that_was_truncated_has_complete_lines(path):
    log = AuditLog(path)
    asyncio.run(log.write({"n": 1}))
    os.truncate(path, 0)
    asyncio.run(log.write({"n": 2}))
    log.close()
    assert [record["n"] for record in read_audit_log(path)] == [2]


def test_what_cannot_be_written_as_json_is_no_record(path):
    log = AuditLog(path)
    with pytest.raises(AuditLogError):
        asyncio.run(log.write({"n": object()}))
    log.close()
    with pytest.raises(AuditLogError):
        asyncio.run(log.write({"n": 1}))
    assert read_audit_log(path) == []


def test_a_reader_names_the_line_that_is_damaged(path):
    path.write_text('{"n": 1}\nnothing\n')
    with pytest.raises(FileError, match="line 2"):
        read_audit_log(path)
    path.write_text('{"n": 1}\n{"n": ')
    assert read_audit_log(path) == [{"n": 1}]


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_every_line_parses_after_kills_while_it_is_written(path, kills):
    command = [sys.executable, "-c", WRITER, str(path)]
    rng, counts = random.Random(1), []
    for _ in range(kills):
        writer = subprocess.Popen(
            command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT / "src")}
        )
        assert writer.stdout.readline() == b"open\n"
        time.sleep(rng.uniform(0.02, 0.1))
        writer.send_signal(signal.SIGKILL)
        writer.communicate(timeout=10)
        write(path)
        counts.append(len(read_audit_log(path)))
        assert all(isinstance(json.loads(line), dict) for line in lines(path))
    assert counts == sorted(counts)
    assert counts[-1] > 0


def test_a_killed_server_leaves_a_record_of_every_answer(path):
    answers = []
    for start in (0, 100):
        with process(audit_log=path) as (server, address):
            with httpx2.Client() as client:
                for seed in range(start, start + 5):
                    body = {"prompt": "a castle", "safegen": {"seed": seed}}
                    answers.append(client.post(address + PATH, json=body))
            server.send_signal(signal.SIGKILL)
    records = {record["request"]: record for record in read_audit_log(path)}
    assert len(records) == 10
    assert {answer.headers["x-request-id"] for answer in answers} == set(records)
