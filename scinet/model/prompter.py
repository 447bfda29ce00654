"""The bi-dominant prompter: learned context on the text side, and cross attention both ways (method.md section 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scinet.model.backbone import TextTower
from scinet.options import ModelOptions, Prompt


class Prompter(nn.Module):
    """Class names in a context become text embeddings [C, D]; the context vectors may be trained."""

    def __init__(self, text: TextTower, class_names: tuple[str, ...], options: ModelOptions) -> None:
        """Tokenise the prompts and start the context vectors at the words of ``options.context``."""
        super().__init__()
        prompts = [f"{options.context} {name.replace('_', ' ')}." for name in class_names]
        tokens = text.tokenize(prompts)
        # saved, since another processor would compute other last digits
        self.register_buffer("fixed", text.embed(tokens))
        self.register_buffer("tokens", tokens, persistent=False)
        learns = options.head.is_prompted and options.prompt is Prompt.learned
        self.context = nn.Parameter(self.words(text, options.context)) if learns else None

    def forward(self, text: TextTower) -> Tensor:
        """Return the text embeddings [C, D] fp32, not normalised."""
        fixed: Tensor = self.get_buffer("fixed")
        if self.context is None:
            return fixed
        return self.read(text, self.context)

    def words(self, text: TextTower, context: str) -> Tensor:
        """Return the token embeddings [m, W] fp32 of the words that the prompts begin with."""
        with torch.no_grad():
            return text.embed_tokens(self.get_buffer("tokens")[0, 1 : 1 + text.count_words(context)]).float().clone()

    def read(self, text: TextTower, context: Tensor) -> Tensor:
        """Return the text embeddings [C, D] fp32 of the class names in a context [m, W], not normalised."""
        learned: Tensor = text(self.get_buffer("tokens"), context)
        return learned.float()


class CrossAttention(nn.Module):
    """Multi-head attention behind a gate that starts at zero.

    Queries are shared by all images, or keys are: either way the projections run once on what is shared.
    """

    def __init__(self, width: int, heads: int) -> None:
        """Take the width D and the number of heads, which must divide it."""
        super().__init__()
        self._heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return what is added to the queries.

        Args:
            queries: [B or 1, Q, D].
            keys: [B or 1, K, D]; also the values.

        Returns:
            [B, Q, D], or [B, 1, D] where there is one key, which every query attends to fully.
        """
        dtype = self.query.weight.dtype
        keys = keys.to(dtype)
        values = self.value(keys)
        if keys.shape[1] > 1:
            batch = max(len(queries), len(keys))
            query, key, value = (
                x.view(len(x), x.shape[1], self._heads, -1).transpose(1, 2).expand(batch, -1, -1, -1)
                for x in (self.query(queries.to(dtype)), self.key(keys), values)
            )
            values = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        change: Tensor = self.gate * self.out(values)
        return change.float()
