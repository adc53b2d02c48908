"""Activations on disk: written once, resumed after a kill, read back piece by piece.

    record(case, "folder", Wanted("loop.*.hook_out"))   one vector a chosen position, mask ratio and site
    store = ActivationStore.open("folder")
    store.frame                                         whose each row is: sample, mask ratio, position, token, ..
    store.array(loop=3)[:100]                           read from disk when asked for
    for x in store.batches(1024, seed=0): ...           [row, site, ..] in random order

A case is a model with its test set, masked as its options say; a model with `batch=` does, too.
"""

from loopmdm.analysis.activations.catching import Gathered, Wanted, gather
from loopmdm.analysis.activations.identity import Identity, identity
from loopmdm.analysis.activations.store import ActivationStore
from loopmdm.analysis.activations.writing import estimate_store, record

__all__ = ["ActivationStore", "Gathered", "Identity", "Wanted", "estimate_store", "gather", "identity", "record"]
