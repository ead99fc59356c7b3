"""Fresh noise while sampling: the values of whole draws, whatever goes through together, and little of it held."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra diffusion")

from consilience.diffusion import sampling
from consilience.diffusion.digits import network
from consilience.diffusion.huggingface import as_scheduler
from consilience.diffusion.pipeline import ImagePipeline
from consilience.diffusion.sampling import BLOCK, draw, noise_of
from consilience.diffusion.solve import solve

torch.set_num_threads(1)

SHAPES = [(150, 1, 8, 8), (33, 3, 5, 7), (37, 1, 3, 3), (1, 1, 3, 3), (BLOCK // 4 + 1, 1, 2, 2), (BLOCK + 15, 1, 1, 1)]
"""Fewer values than a block and more, an end that is not whole, and fewer values than are made together."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("together", [1, 7, 256, 5000])
def test_every_stage_has_the_noise_of_one_draw_for_all_images(shape, dtype, together):
    if together == 1 and shape[0] > 1000:
        together = 100
    generator = torch.Generator().manual_seed(3)
    wanted = [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3)]
    fresh = sampling._Fresh(torch.empty(shape), 3)
    for start in range(0, shape[0], together):
        part = slice(start, start + together)
        noise = fresh.of_the_next()
        for whole in wanted:
            assert torch.equal(noise(torch.empty_like(whole[part]), 0.0, 0.0), whole[part])


def test_no_more_than_a_block_of_each_stage_is_held():
    shape, stages = (64, 3, 32, 32), 5
    fresh = sampling._Fresh(torch.empty(shape), 0)
    for _ in range(0, 64, 16):
        noise = fresh.of_the_next()
        for _ in range(stages):
            noise(torch.empty(16, *shape[1:]), 0.0, 0.0)
        held = [stream._held.untyped_storage().nbytes() // 4 for stream in fresh._streams]
        assert len(held) == stages
        assert max(held) <= BLOCK + 15


def test_a_sampler_with_noise_makes_the_same_images_in_parts(monkeypatch):
    """The multistep consistency sampler on an untrained model against `solve` of all images at once."""
    torch.manual_seed(0)
    scheduler = as_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "consistency")
    pipe = ImagePipeline.of(network(classes=None, width=8).eval(), scheduler)
    noise, generator = noise_of(pipe, 21, 5), torch.Generator().manual_seed(6)
    with torch.no_grad():
        whole = solve(pipe.denoiser(), noise, 4, "consistency", generator=generator).x
    monkeypatch.setattr(sampling, "BATCH", 4)
    told: list[int] = []
    parts = draw(pipe, noise, 4, seed=5, keep=3, on_images=told.append)
    torch.testing.assert_close(parts.x, whole, rtol=1e-4, atol=1e-5)
    assert told == [4, 8, 12, 16, 20, 21]
    assert len(parts.states) == len(parts.times) == len(parts.scales)
    assert torch.equal(parts.states[0], noise[:3])
    torch.testing.assert_close(parts.states[-1], parts.x[:3])
