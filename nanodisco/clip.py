"""CLIP's image encoder: a photo of the person to the tokens that the networks attend to.

A vision transformer (CLIP, arXiv:2103.00020) cuts the photo into patches and gives one token a
patch, and one for the whole. DisCo (arXiv:2307.00040, section 3) shows all of them, 257 for
ViT-L/14, through a projection of its own. Official names: `CLIPVisionModelWithProjection`,
`refer_clip_proj`. The transformer itself is open_clip's; its weights are mapped by names.py.
"""
from torch import Tensor, nn

from nanodisco.config import ClipConfig


class ImageEncoder(nn.Module):
    """Photo -> tokens. `mode` says which:

    local        every token, post-LayerNorm, through the trained projection   (B, 257, context)
    local-clip   every token, post-LayerNorm, through CLIP's own projection    (B, 257, context)
    global       CLIP's embedding of the whole picture, as one token           (B, 1, context)
    """

    def __init__(self, config: ClipConfig, context: int, mode: str):
        from open_clip.transformer import QuickGELU, VisionTransformer       # slow to import: only when needed

        super().__init__()
        c = config
        self.mode = mode
        self.vision = VisionTransformer(
            c.image_size, c.patch, c.width, c.layers, c.heads, mlp_ratio=c.mlp / c.width, output_dim=c.projection,
            act_layer=QuickGELU if c.activation == "quick_gelu" else nn.GELU, pool_type="none", output_tokens=True)
        self.proj = nn.Linear(c.width, context, bias=False) if mode == "local" else None

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, S, S), normalised with CLIP's mean and std -> (B, M, context)

        official: the tower stays in float32 where the projection and all other networks are in half.
        """
        projected, normed = self.vision(x.to(self.vision.proj.dtype))    # (B, M, projection), (B, M, width)
        if self.mode == "local":
            return self.proj(normed.to(self.proj.weight.dtype))
        return projected if self.mode == "local-clip" else projected[:, :1]
