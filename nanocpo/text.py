"""The toy's prompt encoder: a token for the caption and one for every leaf of the tree (ours).

A leaf's token is the sum of the embeddings of all nodes on its path, each in the leaf's state (not mentioned, positive, negative),
so "positive" is partly learned once for a whole branch. Every prompt has the same number of tokens: nothing is padded or masked.
"""
import torch
from torch import nn


class TextEncoder(nn.Module):
    """list of Prompt -> tokens -> (context, pooled). The empty caption "" is always known: it is the unconditional prompt."""

    def __init__(self, criteria, captions, dim):
        super().__init__()
        self.captions = {caption: i for i, caption in enumerate(dict.fromkeys(["", *captions]))}
        self.criteria = criteria
        nodes = [node.path for node in criteria.tree.walk() if node.path]
        on_path = [[leaf.path == path or leaf.path.startswith(path + "/") for path in nodes] for leaf in criteria.leaves]
        self.register_buffer("on_path", torch.tensor(on_path, dtype=torch.float32), persistent=False)      # (leaves, nodes)
        self.caption = nn.Embedding(len(self.captions), dim)
        self.node = nn.Parameter(torch.randn(3, len(nodes), dim) * 0.5)   # (states, nodes, dim)
        self.norm = nn.LayerNorm(dim)

    def tokens(self, prompts):
        """list of B Prompts -> int64 (B, 1 + leaves): the caption's number, then each leaf's state 0, 1, 2 (negative).
        Raises ValueError on a caption, CriteriaError on a phrase, that the model was not built for."""
        rows = []
        for prompt in prompts:
            if prompt.caption not in self.captions:
                raise ValueError(f"unknown caption '{prompt.caption}'; this model knows: {', '.join(filter(None, self.captions))}")
            states = self.criteria.annotation(prompt.positive, prompt.negative)
            rows.append([self.captions[prompt.caption], *(states % 3).tolist()])              # -1 is row 2 of the embeddings
        return torch.tensor(rows, device=self.on_path.device)

    def forward(self, tokens):
        """tokens (B, 1 + leaves) -> context (B, 1 + leaves, dim), pooled (B, dim)."""
        table = torch.einsum("ln,snd->sld", self.on_path, self.node)                 # (3, leaves, dim)
        leaves = table[tokens[:, 1:], torch.arange(len(self.on_path), device=tokens.device)]
        tokens = torch.cat([self.caption(tokens[:, :1]), leaves], dim=1)             # (B, 1 + leaves, dim)
        return self.norm(tokens), tokens[:, 0] + leaves.sum(1) / leaves.shape[1] ** 0.5        # caption and tree weigh alike
