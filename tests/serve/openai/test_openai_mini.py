"""The OpenAI interface end to end: OpenAI's client, and the miniature behind its guards."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

openai = pytest.importorskip("openai")

from safegen.mini.bundle import triplets_folder  # noqa: E402


@pytest.fixture(scope="module")
def client(mini_server):
    url = f"{mini_server}/v1"
    with openai.OpenAI(api_key="none", base_url=url, max_retries=0, timeout=120) as found:
        yield found


def triplet(role):
    """Return a file of the bundled triplets of skulls."""
    return min((triplets_folder("skulls") / role).iterdir())


def data_url(path):
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def pixels(entry):
    image = Image.open(io.BytesIO(base64.b64decode(entry.b64_json)))
    return np.asarray(image.convert("RGB")).astype(int)


def test_generations_edits_and_moderations_of_the_miniature(client):
    (stack,) = [model.id for model in client.models.list()]
    both = client.images.generate(
        prompt="a castle in a meadow", model=stack, n=2, extra_body={"safegen": {"seed": 1}}
    )
    single = client.images.generate(
        prompt="a castle in a meadow", extra_body={"safegen": {"seed": 2, "stack": stack}}
    )
    assert np.abs(pixels(both.data[1]) - pixels(single.data[0])).max() <= 2  # rounding
    assert [image["status"] for image in both.safegen["images"]] == ["released"] * 2

    start = base64.b64decode(both.data[0].b64_json)
    changed = client.images.edit(
        image=("a.png", start),
        prompt="a castle at dusk",
        extra_body={"safegen": {"seed": 1, "strength": 0.5, "scheduler": "euler"}},
    )
    near = np.abs(pixels(changed.data[0]) - pixels(both.data[0])).mean()
    far = np.abs(pixels(single.data[0]) - pixels(changed.data[0])).mean()
    assert 0 < near < far  # it starts from the image

    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 32, 64))
    buffer = io.BytesIO()
    mask.save(buffer, format="PNG")
    redrawn = client.images.edit(
        image=("a.png", start), mask=("m.png", buffer.getvalue()), prompt="a castle by the sea"
    )
    change = np.abs(pixels(redrawn.data[0]) - pixels(both.data[0])).mean(axis=(0, 2))
    assert change[:28].mean() > change[36:].mean()


def test_what_the_guards_of_the_miniature_find_is_blocked_and_flagged(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(image=triplet("unsafe"), prompt="a castle")
    assert caught.value.code == "moderation_blocked"
    details = caught.value.body["moderation_details"]
    assert details == {"moderation_stage": "input", "categories": ["skulls"]}

    with pytest.raises(openai.BadRequestError, match="scheduler") as caught:
        client.images.generate(prompt="a castle", extra_body={"safegen": {"scheduler": "eulr"}})
    assert caught.value.param == "safegen.scheduler"

    found = client.moderations.create(input=["a castle", "a castle covered in skulls"])
    assert [result.flagged for result in found.results] == [False, True]
    assert found.model_dump()["results"][1]["categories"]["skulls"]
    for role, flagged in (("unsafe", True), ("benign", False)):
        url = {"type": "image_url", "image_url": {"url": data_url(triplet(role))}}
        (result,) = client.moderations.create(input=[url]).model_dump()["results"]
        assert result["flagged"] == result["categories"]["skulls"] == flagged
        assert (result["category_scores"]["skulls"] > 0.5) == flagged
