"""The one recommendation chain: encode, retrieve, filter, rank, over the Engine protocol.

A trained run and a deployed bundle recommend through this same code; only the Engine differs.
"""

from tfrec.index import TopK

__all__ = ["TopK"]
