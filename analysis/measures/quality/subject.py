"""The model under evaluation with its test set, and what the measures share."""

from dataclasses import dataclass

import pandas as pd
from tokenizers import Tokenizer

from loopmdm.model.corpora.tokenizer import MASK, load_tokenizer
from loopmdm.model.errors import UsageError
from loopmdm.model.files import read_json
from loopmdm.model.network.checkpoints import RECORD, TOKENIZER, need, resolve
from loopmdm.model.network.model import LoopMDM
from loopmdm.model.tasks.test_sets import TestSet, load_test_set, task_of


@dataclass(frozen=True)
class Subject:
    """A model with its tokenizer and test set."""

    name: str
    model: LoopMDM
    tokenizer: Tokenizer
    test: TestSet

    @classmethod
    def load(cls, name: str) -> "Subject":
        """A shipped name, run folder or hub id."""
        folder = resolve(name)
        model = LoopMDM.from_pretrained(folder)
        tokenizer = load_tokenizer(need(folder, TOKENIZER), model.cfg.d_vocab)
        test = load_test_set(task_of(read_json(need(folder, RECORD))), model.cfg.n_ctx, tokenizer)
        return cls(name, model, tokenizer, test)

    def need_text(self, measure: str) -> None:
        """UsageError unless the model reads text."""
        if self.tokenizer.get_vocab_size() < 256 or self.tokenizer.token_to_id(MASK) is None:
            raise UsageError(f"{self.name} is no text model; {measure} needs one")


def at(frame: pd.DataFrame, counts: list[int]) -> pd.DataFrame:
    """The rows with one of the loop counts."""
    return frame[frame["n_loops"].isin(counts)].reset_index(drop=True)
