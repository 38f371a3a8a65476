"""From a masked model to one that is really smaller or faster."""

from blockprune.export.shrink import Shrunk, Units, shrink

__all__ = ["Shrunk", "Units", "shrink"]
