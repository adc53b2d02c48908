"""When features live: at which loops they are written or active, and how their directions turn.

A crosscoder's feature has a profile |D_s|, the norm of its direction at each site; an SAE's, which has one
direction, how often it is active there. Both over their largest value:

    present   profile above half of its largest;   birth, death   first and last site where it is present
    turn      mean cosine of D_s and D_(s+1) over neighbouring sites where it is present at both (1: never turns)

Features that are active nowhere in the rows given are dead, and have no life.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loopmdm.analysis.measures.mechanism.dictionaries.coder import Dictionary

HALF = 0.5


@dataclass(frozen=True)
class Lives:
    """`frequency` [site or 1, feature]: share of rows where a feature is active; `profile` [site, feature].

    `cosine` [site - 1, feature]: of directions at neighbouring sites.
    """

    loops: list[int | None]
    frequency: Float[Tensor, "code feature"]
    profile: Float[Tensor, "site feature"]
    cosine: Float[Tensor, "step feature"]

    @property
    def alive(self) -> Bool[Tensor, " feature"]:
        """Which features are active somewhere."""
        return self.frequency.sum(0) > 0

    @property
    def present(self) -> Bool[Tensor, "site feature"]:
        """Profile above half of its largest; nowhere if dead."""
        return (self.profile > HALF * self.profile.amax(0)) & self.alive

    @property
    def birth(self) -> Tensor:
        """First site of each feature, [feature]."""
        return self.present.int().argmax(0)

    @property
    def death(self) -> Tensor:
        """Last site of each feature, [feature]."""
        return len(self.profile) - 1 - self.present.flip(0).int().argmax(0)

    @property
    def turn(self) -> Tensor:
        """Mean cosine of neighbouring directions while present, [feature]; NaN for fewer than two such sites."""
        both = self.present[1:] & self.present[:-1]
        return (self.cosine * both).sum(0) / both.sum(0)

    def frame(self) -> pd.DataFrame:
        """A row a feature: feature alive frequency birth death peak (loops, where there are) n_present turn."""
        place = np.array([loop if loop is not None else number for number, loop in enumerate(self.loops)])
        alive = self.alive.numpy()

        def at_loop(index: Tensor) -> pd.Series:
            return pd.Series(place[index.numpy()], dtype="Int64").where(alive)

        return pd.DataFrame(
            {
                "feature": np.arange(len(alive)),
                "alive": alive,
                "frequency": self.frequency.mean(0).numpy(),
                "birth": at_loop(self.birth),
                "death": at_loop(self.death),
                "peak": at_loop(self.profile.argmax(0)),
                "n_present": self.present.sum(0).numpy(),
                "turn": self.turn.numpy(),
            }
        )

    def profiles(self) -> pd.DataFrame:
        """Tidy: feature loop profile (over its largest) of live features."""
        share = (self.profile / self.profile.amax(0).clamp(min=1e-12))[:, self.alive]
        features = self.alive.nonzero()[:, 0].numpy()
        return pd.DataFrame(
            {
                "feature": np.tile(features, len(share)),
                "loop": np.repeat([-1 if loop is None else loop for loop in self.loops], len(features)),
                "profile": share.flatten().numpy(),
            }
        )


@torch.no_grad()
def feature_lives(dictionary: Dictionary, codes: Float[Tensor, "row code feature"]) -> Lives:
    """Lives of the features of a dictionary, on the codes of some rows."""
    frequency = (codes > 0).float().mean(0)
    n_sites = len(dictionary.origin.sites)
    if dictionary.shared:
        directions = dictionary.decoder
        cosine = torch.nn.functional.cosine_similarity(directions[1:], directions[:-1], dim=-1)
        return Lives(dictionary.origin.loops, frequency, directions.norm(dim=-1), cosine)
    return Lives(dictionary.origin.loops, frequency, frequency, torch.ones(n_sites - 1, frequency.shape[-1]))
