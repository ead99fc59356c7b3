"""Few-step policies for continuous control: Consistency-AC and One-Step Flow Q-Learning, and what they shorten.

`control` runs them in gymnasium and is imported on its own, since it needs that package.
"""

from consilience.diffusion.applications.policies.actors import (
    ConsistencyPolicy,
    GaussianPolicy,
    MeanFlowPolicy,
    Policy,
    SolvedPolicy,
)
from consilience.diffusion.applications.policies.learning import (
    Episode,
    Learner,
    Settings,
    Transitions,
    actor_loss,
    critic_loss,
    transitions,
)
from consilience.diffusion.applications.policies.networks import ActionNetwork, Critics, perceptron

__all__ = [
    "ActionNetwork",
    "ConsistencyPolicy",
    "Critics",
    "Episode",
    "GaussianPolicy",
    "Learner",
    "MeanFlowPolicy",
    "Policy",
    "Settings",
    "SolvedPolicy",
    "Transitions",
    "actor_loss",
    "critic_loss",
    "perceptron",
    "transitions",
]
