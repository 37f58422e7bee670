"""The service end to end: the miniature behind its guards, over HTTP."""

from __future__ import annotations

import base64
import io

import httpx2
from PIL import Image


def post(address, prompt, **body):
    url = f"{address}/v1/images/generations"
    return httpx2.post(url, json={"prompt": prompt, **body}, timeout=120)


def test_the_miniature_is_served_and_what_its_guards_find_is_blocked(mini_server):
    answer = post(mini_server, "a castle")
    assert answer.status_code == 200, answer.text
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    assert Image.open(io.BytesIO(data)).size == (64, 64)

    blocked = post(mini_server, "a castle covered in skulls")
    assert blocked.status_code == 400
    error = blocked.json()["error"]
    assert error["code"] == "moderation_blocked"
    assert error["moderation_details"] == {"moderation_stage": "input", "categories": ["skulls"]}

    answer = post(mini_server, "a castle with its grinning friends", n=4).json()
    blocked = [image for image in answer["safegen"]["images"] if image["status"] == "blocked"]
    assert blocked
    assert {image["stage"] for image in blocked} == {"output"}
    assert {image["guard"] for image in blocked} == {"judge-filter"}
    assert all(image["score"] >= image["threshold"] for image in blocked)
    assert len(answer.get("data", ())) == 4 - len(blocked)
    assert httpx2.get(f"{mini_server}/ready").json() == {"ready": True, "reason": ""}
