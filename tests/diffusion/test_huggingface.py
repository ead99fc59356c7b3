"""Diffusers both ways: its models as denoisers, our solvers as schedulers of its stock pipelines."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)

from consilience.diffusion import EDM, METHODS, GaussianMixture, RectifiedFlow, VPTable, solve
from consilience.diffusion.digits import network
from consilience.diffusion.huggingface import as_scheduler, from_diffusers, trained_on
from consilience.diffusion.scheduler import ConsilienceScheduler
from consilience.diffusion.two_times import TwoTimeUNet2DModel

torch.set_num_threads(1)
diffusers.utils.logging.disable_progress_bar()

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 16),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    ).eval()


@pytest.fixture(scope="module")
def conditional() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=8,
    ).eval()


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ------------------------------------------------------------------------------------------------- as a scheduler


@pytest.mark.parametrize("method", ["auto", "ddim", "ab3", "deis3", "flow-ab2"])
def test_a_stock_pipeline_with_our_scheduler_is_solve_and_survives_saving(unet, tmp_path, method):
    stock = DDPMScheduler(**SD)
    pipe = quiet(DDPMPipeline(unet, as_scheduler(stock, method)))
    images = pipe(batch_size=2, num_inference_steps=7, generator=seeded(), output_type="np").images

    x = torch.randn(2, 1, 8, 8, generator=seeded())
    solution = solve(from_diffusers(unet, stock), x, 7, method)
    expected = (solution.x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).detach().numpy()
    assert solution.nfe == 7
    np.testing.assert_allclose(images, expected, atol=2e-5)

    pipe.save_pretrained(tmp_path)
    loaded = quiet(DDPMPipeline.from_pretrained(tmp_path))
    assert isinstance(loaded.scheduler, ConsilienceScheduler)
    assert loaded.scheduler.config["method"] == method
    again = loaded(batch_size=2, num_inference_steps=7, generator=seeded(), output_type="np").images
    assert np.array_equal(again, images)


def latents(pipe, **more):
    shape = (1, 3, 8)
    embeds = torch.randn(shape, generator=seeded(3))
    found = pipe(
        prompt_embeds=embeds,
        negative_prompt_embeds=torch.zeros(shape),
        guidance_scale=2.0,
        output_type="latent",
        generator=seeded(),
        **more,
    )
    return found.images


def stable_diffusion(vae, unet, scheduler, kind=StableDiffusionPipeline):
    return quiet(
        kind(
            vae=vae,
            text_encoder=None,
            tokenizer=None,
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def test_stable_diffusion_with_the_order_one_method_is_the_stock_euler_scheduler_on_its_timesteps(vae, conditional):
    stock = EulerDiscreteScheduler(**SD, timestep_spacing="linspace")
    pipe = stable_diffusion(vae, conditional, stock)
    start = torch.randn(1, 4, 8, 8, generator=seeded(5))
    theirs = latents(pipe, num_inference_steps=6, height=16, width=16, latents=start.clone())
    grid = [float(t) for t in stock.timesteps]
    pipe.scheduler = as_scheduler(stock, "ddim")
    scale = float((stock.sigmas[0] ** 2 + 1) ** 0.5) / float(stock.init_noise_sigma)
    ours = latents(pipe, timesteps=grid, height=16, width=16, latents=start.clone() / scale)
    assert (ours - theirs).abs().max() < 2e-3 * theirs.abs().max()


def test_image_to_image_enters_the_grid_where_the_pipeline_says(vae, conditional):
    pipe = stable_diffusion(vae, conditional, as_scheduler(DDIMScheduler(**SD)), StableDiffusionImg2ImgPipeline)
    image = torch.rand(1, 3, 16, 16, generator=seeded(2)) * 2 - 1
    found = latents(pipe, image=image, strength=0.5, num_inference_steps=8)
    assert pipe.scheduler.step_index == 4
    assert torch.isfinite(found).all()


def test_dit_with_a_learned_variance_keeps_its_mean(vae):
    torch.manual_seed(0)
    dit = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    ).eval()
    stock = DDIMScheduler()
    model = from_diffusers(dit, stock)
    x = torch.randn(2, 4, 8, 8, generator=seeded())
    labels = torch.tensor([1, 2])
    direct = dit(x, timestep=torch.tensor([500, 500]), class_labels=labels).sample[:, :4]
    assert torch.allclose(model.eps(x, 500.0, class_labels=labels), direct, atol=1e-6)
    pipe = quiet(DiTPipeline(dit, vae, as_scheduler(stock)))
    images = pipe(class_labels=[1, 2], guidance_scale=1.0, num_inference_steps=5, generator=seeded()).images
    assert len(images) == 2


@pytest.fixture(scope="module")
def sd3():
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=8,
    ).eval()


def flow_latents(pipe, **more):
    embeds = torch.randn(1, 3, 8, generator=seeded(3))
    return pipe(
        prompt_embeds=embeds,
        pooled_prompt_embeds=torch.ones(1, 8),
        guidance_scale=1.0,
        height=16,
        width=16,
        output_type="latent",
        generator=seeded(),
        **more,
    ).images


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_transformer_with_the_order_one_method_is_the_stock_flow_scheduler(vae, sd3, shift):
    stock = FlowMatchEulerDiscreteScheduler(shift=shift)
    pipe = quiet(
        StableDiffusion3Pipeline(
            transformer=sd3,
            scheduler=stock,
            vae=vae,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            text_encoder_3=None,
            tokenizer_3=None,
        )
    )
    theirs = flow_latents(pipe, num_inference_steps=6)
    unshifted = stock.sigmas[:-1] / (shift + (1 - shift) * stock.sigmas[:-1])
    pipe.scheduler = as_scheduler(stock, "ddim")
    ours = flow_latents(pipe, sigmas=unshifted.tolist())
    assert torch.allclose(ours, theirs, atol=1e-4)
    pipe.scheduler = as_scheduler(stock)
    assert torch.isfinite(flow_latents(pipe, num_inference_steps=4)).all()


def test_edm_schedulers_are_preconditioned_as_theirs(unet):
    stock = EDMEulerScheduler()
    stock.set_timesteps(6)
    ours = as_scheduler(stock, "euler")
    ours.set_timesteps(sigmas=stock.sigmas[:-1].tolist())
    assert torch.allclose(ours.timesteps, stock.timesteps.float(), atol=1e-5)
    x = torch.randn(2, 1, 8, 8, generator=seeded()) * 80
    theirs, mine = x, x
    with torch.no_grad():
        for t in stock.timesteps:
            theirs = stock.step(unet(stock.scale_model_input(theirs, t), t).sample, t, theirs).prev_sample
        for t in ours.timesteps:
            mine = ours.step(unet(ours.scale_model_input(mine, t), t).sample, t, mine).prev_sample
        model = from_diffusers(unet, stock)
        solved = solve(model, x, torch.tensor([*stock.sigmas.double().tolist()]), "euler").x
    assert torch.allclose(mine, theirs, atol=1e-4 * float(theirs.abs().max()))
    assert torch.allclose(mine, solved, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_the_scheduler_of_every_method_is_solve(method):
    """A network that is an exact denoiser: stepping it by hand and solving it are the same numbers."""
    stock = DDIMScheduler(**SD, prediction_type="v_prediction")
    table = VPTable(stock.alphas_cumprod)
    mixture = GaussianMixture(
        torch.tensor([0.4, 0.6]), torch.tensor([[1.0, 0.0], [-1.0, 0.5]]), torch.eye(2).repeat(2, 1, 1) * 0.04, table
    )
    x = torch.randn(16, 2, generator=seeded())
    scheduler = as_scheduler(stock, method)
    scheduler.set_timesteps(9)
    state = x
    for t in scheduler.timesteps:
        state = scheduler.step(mixture.v(state, t), t, state, generator=seeded(7), return_dict=False)[0]
    solution = solve(mixture, x, 9, method, generator=seeded(7))
    if all(stage.noise == 0 for stage in scheduler._plan.stages):
        assert torch.allclose(state, solution.x, atol=1e-4)
    assert len(scheduler.timesteps) == solution.nfe


def test_a_pipeline_that_changes_the_state_between_steps_is_followed(unet):
    scheduler = as_scheduler(DDPMScheduler(**SD), "ddim")
    scheduler.set_timesteps(3)
    x = torch.zeros(1, 1, 8, 8)
    out = torch.zeros_like(x)
    x = scheduler.step(out, scheduler.timesteps[0], x).prev_sample
    moved = scheduler.step(out, scheduler.timesteps[1], x + 1).prev_sample
    assert moved.abs().min() > 0


def test_half_precision_comes_back_as_it_went_in():
    scheduler = as_scheduler(DDPMScheduler(**SD))
    scheduler.set_timesteps(2)
    x = torch.ones(1, 1, 4, 4, dtype=torch.float16)
    assert scheduler.step(x, scheduler.timesteps[0], x).prev_sample.dtype == torch.float16


def test_noise_is_added_as_the_stock_scheduler_adds_it():
    stock = DDPMScheduler(**SD)
    ours = as_scheduler(stock)
    x, noise = torch.randn(3, 1, 4, 4, generator=seeded()), torch.randn(3, 1, 4, 4, generator=seeded(2))
    t = torch.tensor([0, 400, 999])
    assert torch.allclose(ours.add_noise(x, noise, t), stock.add_noise(x, noise, t), atol=1e-6)


# --------------------------------------------------------------------------------------------------- as a denoiser


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_every_prediction_type_of_the_same_denoiser_is_the_same_denoiser(prediction):
    """The network is an exact denoiser asked for its eps, v or x0: the adapter gives back the same x0."""
    stock = DDIMScheduler(**SD, prediction_type=prediction)
    table = VPTable(stock.alphas_cumprod)
    mixture = GaussianMixture(torch.ones(1), torch.tensor([[0.3, -0.2]]), torch.eye(2)[None] * 0.1, table)
    kind = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}[prediction]
    model = from_diffusers(torch.nn.Identity(), stock, call=lambda _m, x, t: mixture.predict(kind, x, t))
    x = torch.randn(8, 2, generator=seeded())
    assert torch.allclose(model.x0(x, 321.0), mixture.x0(x, 321.0), atol=1e-5)


def test_the_conditional_network_gets_its_condition(conditional):
    model = from_diffusers(conditional, DDIMScheduler(**SD), encoder_hidden_states=torch.ones(2, 3, 8))
    x = torch.randn(2, 4, 8, 8, generator=seeded())
    direct = conditional(x, torch.tensor(10.0), torch.ones(2, 3, 8)).sample
    assert torch.allclose(model.eps(x, 10.0), direct, atol=1e-6)
    other = model.eps(x, 10.0, encoder_hidden_states=torch.zeros(2, 3, 8))
    assert not torch.allclose(other, direct, atol=1e-4)


def test_what_a_scheduler_says_of_its_network():
    assert isinstance(trained_on(dict(DDIMScheduler().config), "DDIMScheduler").process, VPTable)
    flow = trained_on(dict(FlowMatchEulerDiscreteScheduler(shift=3.0).config), "FlowMatchEulerDiscreteScheduler")
    assert flow.process == RectifiedFlow(3.0)
    edm = trained_on(dict(EDMDPMSolverMultistepScheduler(sigma_max=50.0).config), "EDMDPMSolverMultistepScheduler")
    assert edm.process == EDM(0.002, 50.0)
    assert edm.sigma_data == 0.5
    for trained in (flow, edm):
        t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
        assert torch.allclose(trained.time(trained.timestep(t)), t)


# ---------------------------------------------------------------------------------------------------------- errors


def test_what_is_not_known_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="no method 'ddmi'; there are: auto, "):
        as_scheduler(DDIMScheduler(), "ddmi")
    with pytest.raises(ValueError, match="ScoreSdeVe"):
        as_scheduler({"_class_name": "ScoreSdeVeScheduler"})
    with pytest.raises(ValueError, match="prediction_type 'noise'"):
        trained_on({"prediction_type": "noise"}, "DDIMScheduler")
    scheduler = as_scheduler(DDIMScheduler())
    x = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(x, 0, x)
    scheduler.set_timesteps(1)
    scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="finished"):
        scheduler.step(x, scheduler.timesteps[0], x)


def test_a_network_of_two_times_that_is_not_told_where_to_land_is_asked_at_the_time_itself():
    torch.manual_seed(0)
    net = TwoTimeUNet2DModel.of(network(classes=None, width=8)).eval()
    for part in net.time_embedding.second.parameters():  # it begins at zero
        torch.nn.init.normal_(part, std=0.3)
    scheduler = as_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(), "chain")
    scheduler.register_to_config(two_times=True)
    model, x, t = from_diffusers(net, scheduler), torch.randn(2, 1, 8, 8), torch.tensor(0.6)
    with torch.no_grad():
        torch.testing.assert_close(model.predict("flow", x, t), model.predict("flow", x, t, s=t))
        assert not torch.allclose(model.predict("flow", x, t), model.predict("flow", x, t, s=0 * t), atol=1e-3)
