"""Dataset: interactions, catalog and users together, as `prepare` leaves them on disk."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tfrec.artifact import Artifact
from tfrec.data.catalog import Catalog, Users
from tfrec.data.interactions import Interactions


@dataclass(frozen=True, eq=False)
class Dataset:
    """What every later stage reads.

    Attributes:
      interactions: All kept events, with their split.
      catalog: All items, also those without an event.
      users: All users; ``len(users) == interactions.num_users``.
    """

    interactions: Interactions
    catalog: Catalog
    users: Users

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes interactions.parquet, items.parquet, users.parquet and dataset.json."""
        raise NotImplementedError

    @classmethod
    def load(cls, artifact: Artifact | str | os.PathLike[str]) -> Dataset:
        """Reads a prepared dataset back.

        Raises:
          ArtifactError: it is missing, unfinished or damaged.
        """
        raise NotImplementedError
