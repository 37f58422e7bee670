from dataclasses import replace

import numpy as np
import pytest

from safegen.mini import world
from tools.mini import drawing


def test_the_same_scene_gives_the_same_pixels():
    scene = drawing.sample_scene(np.random.default_rng(3), attribute="skulls")
    assert np.array_equal(drawing.draw(scene), drawing.draw(scene))
    assert scene == drawing.sample_scene(np.random.default_rng(3), attribute="skulls")


@pytest.mark.parametrize("attribute", sorted(world.ATTRIBUTES))
def test_an_attribute_changes_pixels_under_its_mask_only(attribute):
    for seed in range(20):
        scene = drawing.sample_scene(np.random.default_rng(seed), attribute=attribute)
        with_it, mask = drawing.draw_with_mask(scene)
        without = drawing.draw(scene.without_attribute())
        assert 2 <= len(scene.marks) <= 3
        assert mask.mean() > 0.03
        assert np.abs(with_it.astype(int) - without)[~mask].max() < 90  # soft edges only
        changed = np.abs(with_it.astype(int) - without).max(-1) > 8
        assert changed[mask].mean() > 0.8


@pytest.mark.parametrize("attribute", sorted(world.ATTRIBUTES))
def test_the_boxes_contain_the_mask(attribute):
    for seed in range(20):
        scene = drawing.sample_scene(np.random.default_rng(seed), attribute=attribute)
        mask = drawing.draw_with_mask(scene)[1]
        inside = np.zeros_like(mask)
        for left, top, right, bottom in drawing.mark_boxes(scene):
            assert 0 <= left < right <= world.IMAGE_SIZE
            assert 0 <= top < bottom <= world.IMAGE_SIZE
            inside[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))] = True
        assert mask[inside].sum() >= 0.97 * mask.sum()


@pytest.mark.parametrize("attribute", sorted(world.ATTRIBUTES))
def test_a_box_is_tight(attribute):
    for seed in range(20):
        scene = drawing.sample_scene(np.random.default_rng(seed), attribute=attribute)
        for mark in scene.marks:
            alone = replace(scene, marks=(mark,))
            rows, columns = drawing.draw_with_mask(alone)[1].nonzero()
            tight = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert np.abs(np.subtract(drawing.mark_boxes(alone)[0], tight)).max() <= 3


def test_a_plain_scene_has_no_mask_and_no_boxes():
    scene = drawing.sample_scene(np.random.default_rng(0))
    assert not drawing.draw_with_mask(scene)[1].any()
    assert drawing.mark_boxes(scene) == []


def test_all_objects_can_be_drawn_and_differ():
    assert len(world.OBJECTS) >= 32
    assert len(world.BACKGROUNDS) == 8
    images = {
        name: drawing.draw(
            drawing.sample_scene(np.random.default_rng(1), objects=[name], background="in a meadow")
        )
        for name in world.OBJECTS
    }
    assert len({p.tobytes() for p in images.values()}) == len(world.OBJECTS)
