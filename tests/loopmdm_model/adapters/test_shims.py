"""Code written for an older transformers, lying beside weights: loaded, mended, and the shims gone again."""

import sys

import pytest
import torch
import transformers
from transformers import dynamic_module_utils, modeling_rope_utils
from transformers.utils import import_utils

from loopmdm.model import UsageError, open_model
from loopmdm.model.adapters import shims
from tests.loopmdm_model.adapters import natives

OLD = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import MaskedLMOutput
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils.import_utils import is_torch_fx_available

from tests.loopmdm_model.adapters.standins import Decoder, Stack

assert not is_torch_fx_available()


class DreamConfig(PretrainedConfig):
    model_type = "OldDream"

    def __init__(self, vocab_size=40, hidden_size=16, num_attention_heads=2, num_key_value_heads=1,
                 mask_token_id=30, max_position_embeddings=16, rope_theta=10000.0, use_cache=True, **kwargs):
        self.vocab_size, self.hidden_size, self.num_attention_heads = vocab_size, hidden_size, num_attention_heads
        self.num_key_value_heads, self.mask_token_id = num_key_value_heads, mask_token_id
        self.max_position_embeddings, self.use_cache = max_position_embeddings, use_cache
        self.rope_theta = rope_theta
        super().__init__(**kwargs)
        self.use_return_dict = True


class Rotary(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.rope_init_fn = config, ROPE_INIT_FUNCTIONS["default"]
        inv_freq, self.attention_scaling = self.rope_init_fn(config, None)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.original_inv_freq = self.inv_freq


class DreamModel(PreTrainedModel):
    config_class = DreamConfig
    _tied_weights_keys = ["lm_head.weight"]
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.model, self.lm_head = Stack([Decoder(bias=True) for _ in range(2)]), nn.Linear(16, 40, bias=False)
        self.model.rotary_emb = Rotary(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def forward(self, input_ids, attention_mask=None, use_cache=True):
        x = self.model.embed_tokens(input_ids)
        create_causal_mask(config=self.config, input_embeds=x, attention_mask=None, cache_position=None,
                           past_key_values=None)
        position = torch.arange(x.shape[1])[:, None] * self.model.rotary_emb.inv_freq
        x = x + torch.cat([position.sin(), position.cos()], -1).repeat(1, 2)
        for layer in self.model.layers:
            x = layer(x, attention_mask=None if attention_mask == "full" else attention_mask)[0]
        return MaskedLMOutput(logits=self.lm_head(self.model.norm(x)))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The code, a config that points to it, and weights that an older library tied."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    home = tmp_path / "olddream"
    home.mkdir()
    (home / "modeling_old.py").write_text(OLD)
    (home / "config.json").write_text(
        '{"model_type": "OldDream", "architectures": ["DreamModel"], "tie_word_embeddings": true,'
        ' "auto_map": {"AutoConfig": "modeling_old.DreamConfig", "AutoModel": "modeling_old.DreamModel"}}'
    )
    with shims.old_code():
        config = transformers.AutoConfig.from_pretrained(home, trust_remote_code=True)
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(config, trust_remote_code=True)
        model.save_pretrained(home)
    return home


def test_old_code_runs_behind_its_flag(folder):
    with pytest.raises(UsageError, match="brings its own code"):
        open_model(folder)
    m = open_model(folder, trust_remote_code=True)
    native = m.model.native
    assert m.record["family"] == "dream" and m.record["checks"]["logits"] == 0.0
    assert native.lm_head.weight is native.model.embed_tokens.weight
    torch.testing.assert_close(native.model.rotary_emb.inv_freq, 10000.0 ** (-torch.arange(0, 8, 2) / 8))
    assert native.config.use_cache is False
    tokens = natives.tokens(length=8) % 40
    assert torch.isfinite(m(tokens)[..., :30]).all()


def test_the_shims_are_gone_afterwards():
    before = transformers.PreTrainedModel.get_expanded_tied_weights_keys
    had = hasattr(import_utils, "is_torch_fx_available"), "default" in modeling_rope_utils.ROPE_INIT_FUNCTIONS
    with shims.old_code():
        assert hasattr(import_utils, "is_torch_fx_available")
        assert transformers.PreTrainedModel.get_expanded_tied_weights_keys is not before
    assert transformers.PreTrainedModel.get_expanded_tied_weights_keys is before
    now = hasattr(import_utils, "is_torch_fx_available"), "default" in modeling_rope_utils.ROPE_INIT_FUNCTIONS
    assert now == had
    with shims.old_code(needed=False):
        assert transformers.PreTrainedModel.get_expanded_tied_weights_keys is before
