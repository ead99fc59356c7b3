"""A diffusers pipeline for small image models, with or without classes, and the folders it is kept in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor

import consilience.diffusion.scheduler  # noqa: F401 - diffusers loads parts only from modules that were imported
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.guidance import classifier_free
from consilience.diffusion.huggingface import as_scheduler, from_diffusers, grid_of
from consilience.diffusion.solve import solve
from consilience.diffusion.two_times import TwoTimeDiTTransformer2DModel, TwoTimeUNet2DModel
from consilience.errors import InputError

_NETWORKS: dict[str, dict[str, Any]] = {
    "unet": {"UNet2DModel": UNet2DModel, "TwoTimeUNet2DModel": TwoTimeUNet2DModel},
    "transformer": {
        "DiTTransformer2DModel": DiTTransformer2DModel,
        "TwoTimeDiTTransformer2DModel": TwoTimeDiTTransformer2DModel,
    },
}


class ImagePipeline(DiffusionPipeline):
    """Images from a network in pixel space and a scheduler; a network with classes is told the class.

    The network is a UNet2DModel (``unet``) or a DiTTransformer2DModel (``transformer``). With ``unconditional`` its
    last class stands for "none". A folder saved by it loads with ``ImagePipeline.from_pretrained``; once this module is
    imported, diffusers loads its parts, and stock pipelines with our scheduler in them. Raises ValueError unless one
    network is given.
    """

    _optional_components = ["unet", "transformer"]  # noqa: RUF012 - as diffusers declares it

    def __init__(
        self,
        unet: UNet2DModel | None,
        scheduler: Any,
        transformer: DiTTransformer2DModel | None,
        unconditional: bool = True,
    ) -> None:
        super().__init__()
        if (unet is None) == (transformer is None):
            raise ValueError("an ImagePipeline has one network: unet or transformer")
        self.register_modules(unet=unet, scheduler=scheduler, transformer=transformer)  # type: ignore[no-untyped-call]
        self.register_to_config(unconditional=unconditional)  # type: ignore[no-untyped-call]

    @classmethod
    def of(cls, network: Any, scheduler: Any, unconditional: bool = True) -> ImagePipeline:
        """One with this network, a UNet2DModel or a DiTTransformer2DModel."""
        is_unet = isinstance(network, UNet2DModel)
        return cls(network if is_unet else None, scheduler, None if is_unet else network, unconditional)

    @property
    def network(self) -> Any:
        """The UNet or the transformer."""
        return self.transformer if self.unet is None else self.unet

    @property
    def classes(self) -> int:
        """How many classes can be asked for; 0 for a model without."""
        config = self.network.config
        if self.unet is None:
            return int(config["num_embeds_ada_norm"]) if config["num_embeds_ada_norm"] > 1 else 0
        count = config.get("num_class_embeds")
        return 0 if count is None else int(count) - bool(self.config["unconditional"])

    def denoiser(self, labels: Tensor | None = None) -> Denoiser:
        """The model as a `Denoiser` of these classes [batch], or of none; raises ValueError where it needs one."""
        if not self.classes and self.unet is not None:
            return from_diffusers(self.unet, self.scheduler)
        if labels is not None and self.classes:
            return from_diffusers(self.network, self.scheduler, class_labels=labels.to(self.network.device))
        if self.classes and not self.config["unconditional"]:
            raise ValueError("this model has no class that stands for none: name the classes")
        return from_diffusers(self.network, self.scheduler, call=self._without_class)

    def guided(self, labels: Tensor, scale: float) -> Denoiser:
        """Classifier-free guidance towards the classes [batch]; 1 is none, and only that is one evaluation a step.

        Raises ValueError for a few-step model, see `check_guidance`.
        """
        if scale == 1:
            return self.denoiser(labels)
        self.check_guidance()
        return classifier_free(self.denoiser(labels), scale, self.denoiser())

    def check_guidance(self) -> None:
        """Raise ValueError for a few-step model: guidance is put into its weights when it is made, or not at all."""
        inside = self.scheduler.config.get("guidance")
        if inside is not None:
            raise ValueError(
                f"this model samples in few steps and was made at a guidance scale of {inside:g}: "
                "leave guidance out, or distil one at the scale you want"
            )

    def _without_class(self, network: Any, x: Tensor, timestep: Tensor) -> Tensor:
        none = torch.full((len(x),), self.classes, device=x.device)
        value: Tensor = network(x, timestep=timestep, class_labels=none, return_dict=False)[0]
        return value

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 20,
        class_labels: Tensor | list[int] | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """``batch_size`` images by ``num_inference_steps`` steps of the scheduler's method."""
        labels = None if class_labels is None else torch.as_tensor(class_labels)
        model = self.denoiser(labels) if labels is None else self.guided(labels, guidance_scale)
        method = self.scheduler.config.get("method", "auto")
        x = model.process.prior(self.shape(batch_size), generator, dtype=self.network.dtype, device=self.network.device)
        steps = grid_of(self.scheduler.config, model.process, method, num_inference_steps)
        images = pixels(solve(model, x, steps, method, generator=generator).x)
        found: Any = self.numpy_to_pil(images) if output_type == "pil" else images  # type: ignore[no-untyped-call]
        return ImagePipelineOutput(images=found) if return_dict else (found,)

    def shape(self, count: int) -> tuple[int, ...]:
        """[count, channels, height, width] of a batch."""
        size = self.network.config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return count, int(self.network.config["in_channels"]), int(height), int(width)


def pixels(x: Tensor) -> np.ndarray:
    """Images [batch, channels, height, width] in [-1, 1] as [batch, height, width, channels] in [0, 1]."""
    found: np.ndarray = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
    return found


def load(folder: str | Path) -> ImagePipeline:
    """The model in a folder with unet/ or transformer/, and scheduler/, as diffusers saves it; raises InputError."""
    place = Path(folder)
    part = next((part for part in _NETWORKS if (place / part / "config.json").is_file()), None)
    if part is None or not (place / "scheduler" / "scheduler_config.json").is_file():
        missing = "unet/config.json" if part is None else "scheduler/scheduler_config.json"
        raise InputError(f"{place}: no {missing}; expected a folder that diffusers saved, with unet/ and scheduler/")
    if (place / "vae").exists() or (place / "vqvae").exists():
        raise InputError(f"{place}: a latent model; drop `as_scheduler` into its own pipeline instead")
    try:
        config = json.loads((place / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        scheduler = as_scheduler(config, config.get("method", "auto"))
        network = _network(place, part)
        return ImagePipeline.of(network, scheduler, _has_none(place, network))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{place}: not a model that can be loaded ({reason})") from error


def _network(place: Path, part: str) -> Any:
    kinds = _NETWORKS[part]
    usual = next(iter(kinds))
    found = json.loads((place / part / "config.json").read_text(encoding="utf-8")).get("_class_name", usual)
    if found not in kinds:
        raise ValueError(f"{part}/ holds a {found}, expected a {usual}")
    return kinds[found].from_pretrained(place, subfolder=part, local_files_only=True, low_cpu_mem_usage=False).eval()


def _has_none(place: Path, network: Any) -> bool:
    """Whether the last class stands for none: in the folders of `ImagePipeline`, and in every DiT."""
    if isinstance(network, DiTTransformer2DModel):
        return True
    try:
        index = json.loads((place / "model_index.json").read_text(encoding="utf-8"))
    except OSError:
        return False
    return index.get("_class_name") == ImagePipeline.__name__ and bool(index.get("unconditional", True))
