"""Sparse dictionaries over loops: one set of features for all loops of a site, and what it is worth.

    rows = gather(case)                                  or an ActivationStore
    dictionary = train_dictionary(rows, Shape("crosscoder", 512, k=16), Training(steps=2000))
    dictionary = Dictionary.from_pretrained("sudoku-loop", m)            one that is shipped with a model
    splice_losses(m, b, dictionary).loss_recovered(2)    put back in the run, against intact and the mean
    feature_page(dictionary, m, 7, b)                    when a feature lives, what it means, what it does

Our own, in a few hundred lines: SAELens (6.52) needs transformer-lens below 4 and reads one site at a time;
dictionary_learning has crosscoders over two models and brings nnsight; neither knows of loops.
"""

from loopmdm.analysis.measures.mechanism.dictionaries.coder import Dictionary, Origin, Shape, list_dictionaries
from loopmdm.analysis.measures.mechanism.dictionaries.lives import Lives, feature_lives
from loopmdm.analysis.measures.mechanism.dictionaries.making import make_dictionary
from loopmdm.analysis.measures.mechanism.dictionaries.meaning import Variables, coverage, known_variables, matches
from loopmdm.analysis.measures.mechanism.dictionaries.pages import FeaturePage, feature_page, feature_pages
from loopmdm.analysis.measures.mechanism.dictionaries.report import dictionary_scores
from loopmdm.analysis.measures.mechanism.dictionaries.splicing import Spliced, splice, splice_losses
from loopmdm.analysis.measures.mechanism.dictionaries.training import Training, train_dictionary
from loopmdm.analysis.measures.twins import untrained

__all__ = [
    "Dictionary", "FeaturePage", "Lives", "Origin", "Shape", "Spliced", "Training", "Variables", "coverage",
    "dictionary_scores", "feature_lives", "feature_page", "feature_pages", "known_variables", "list_dictionaries",
    "make_dictionary", "matches", "splice", "splice_losses", "train_dictionary", "untrained",
]  # fmt: skip
