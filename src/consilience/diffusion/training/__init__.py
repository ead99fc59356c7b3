"""Training: one small trainer for any loss function, averages of the weights, and what makes training go further."""

from consilience.diffusion.training import lcsc
from consilience.diffusion.training.checkpoints import snapshots
from consilience.diffusion.training.ema import EMA, Decay, Power, combine, reconstruct
from consilience.diffusion.training.immiscible import assign, assigned
from consilience.diffusion.training.online_sfbd import DenoisedPool
from consilience.diffusion.training.trainer import Context, Trained, cosine, train

__all__ = [
    "EMA",
    "Context",
    "Decay",
    "DenoisedPool",
    "Power",
    "Trained",
    "assign",
    "assigned",
    "combine",
    "cosine",
    "lcsc",
    "reconstruct",
    "snapshots",
    "train",
]
