"""Multi-token prediction (MTP): draft the next token with the layer that Qwen3.5 checkpoints contain for this purpose.

For each column, the layer reads the model's final hidden state together with the embedding of the token that follows, and predicts
the token after it (arXiv 2412.19437, section 2.2). It shares the embeddings and the output layer of the model.
"""

from collections.abc import Callable

import torch

from evoprune.language import decoder
from evoprune.language.decoder import KVCache
from evoprune.model import ANSWER_COLUMNS, QwenVL, norm


class MtpLayer:
    """The layer for multi-token prediction, with its own KV cache.

    Use `LanguageModel.mtp_layer` to create one.

    Args:
        model: A model with such a layer.
        embed: Looks up embeddings (see `LanguageModel.embed`).
    """

    def __init__(self, model: QwenVL, embed: Callable[[torch.Tensor], torch.Tensor]):
        self._mtp = model.mtp
        self._embed = embed
        self._model = model.mtp_model
        self._cache = KVCache(self._model, ANSWER_COLUMNS)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor, following: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Read new columns, and predict the token after the one that follows the last column.

        Args:
            hidden: `[n, hidden]`, the model's final hidden states of the columns.
            following: int64 `[n]` on the CPU, the token that follows each column.
            positions: int64 `[3, n]` on the CPU, the M-RoPE positions of the columns.

        Returns:
            float32 `[vocabulary]`.
        """
        mtp = self._mtp
        config = mtp.config
        embeds = norm(self._embed(following), mtp.pre_fc_norm_embedding.weight, config)
        states = norm(hidden, mtp.pre_fc_norm_hidden.weight, config)
        x = mtp.fc(torch.cat([embeds, states], 1))
        return decoder.logits(self._model, x, positions, self._cache)[0]
