"""Small heads after the families of OCR code that are in use, and after forks that only look like them.

A family is a forward, or one method of it, over the layers of `Head`. `FAMILIES` says what of each runs fused.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import blocks
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS, DEPTH, REGIONS = 8, 6, 4
FEATS = (2, CHANNELS, 6, 4)


class Head(nn.Module):
    """Gather, attention and classifier, with regions `[B, C, K]` and biases everywhere."""

    def __init__(self, *, dims: int = 2, norm: Callable[[int], nn.Module] = nn.BatchNorm2d, regions: int = REGIONS):
        super().__init__()
        conv = nn.Conv3d if dims == 3 else nn.Conv2d
        self.aux = conv(CHANNELS, regions, 1)
        self.query = nn.Sequential(conv(CHANNELS, DEPTH, 1), norm(DEPTH))
        self.key = nn.Conv1d(CHANNELS, DEPTH, 1)
        self.value = nn.Sequential(nn.Conv1d(CHANNELS, DEPTH, 1), nn.ReLU(inplace=True))
        self.up = conv(DEPTH, CHANNELS, 1)
        self.classify = conv(2 * CHANNELS, regions, 1)
        self.drop = nn.Dropout(0.3)

    def forward(self, feats: Tensor) -> Any:
        logits = self.aux(feats)
        regions = self.gather(feats, logits)
        context = self.attend(self.query(feats), self.key(regions), self.value(regions))
        return logits, self.classify(self.join(feats, self.up(context)))

    def gather(self, feats: Tensor, logits: Tensor) -> Tensor:
        return torch.bmm(feats.flatten(2), logits.flatten(2).softmax(dim=2).transpose(1, 2))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = torch.bmm(query.flatten(2).transpose(1, 2), key) * DEPTH**-0.5
        return torch.bmm(value, scores.softmax(dim=2).transpose(1, 2)).view(query.shape)

    def join(self, feats: Tensor, context: Tensor) -> Tensor:
        return torch.cat([context, feats], 1)


# What OCR is written like


class RegionRows(Head):
    """Regions `[B, K, C]`, operators, linear layers and LayerNorm on regions, feats before contexts."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Sequential(nn.Linear(CHANNELS, DEPTH), nn.LayerNorm(DEPTH), nn.GELU())
        self.value = nn.Linear(CHANNELS, DEPTH)

    def gather(self, feats: Tensor, logits: Tensor) -> Tensor:
        return F.softmax(logits.flatten(2), -1) @ feats.flatten(2).mT

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = F.softmax(query.flatten(2).mT @ key.mT / DEPTH**0.5, -1)
        return (weights @ value).mT.reshape(query.shape)

    def join(self, feats: Tensor, context: Tensor) -> Tensor:
        return torch.cat([feats, context], 1)


class RegionImages(Head):
    """Regions `[B, K, C, 1]`, turned into `[B, C, K, 1]` for 2-D layers, whose results are flattened again."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value = nn.Conv2d(CHANNELS, DEPTH, 1), nn.Conv2d(CHANNELS, DEPTH, 1)

    def forward(self, feats: Tensor) -> Tensor:
        regions = self.gather(feats, self.aux(feats)).permute(0, 2, 1, 3)
        key, value = self.key(regions).squeeze(-1), self.value(regions).squeeze(-1)
        return self.classify(self.join(feats, self.up(self.attend(self.query(feats), key, value))))

    def gather(self, feats: Tensor, logits: Tensor) -> Tensor:
        batch, regions = logits.shape[:2]
        weights = nn.Softmax(dim=-1)(logits.reshape(batch, regions, -1))
        return torch.matmul(weights, feats.reshape(batch, feats.shape[1], -1).permute(0, 2, 1))[..., None]


class Volume(Head):
    """3-D images, regions `[B, C, K, 1, 1]`, GroupNorm, queries pooled and contexts brought back to size."""

    def __init__(self) -> None:
        super().__init__(dims=3, norm=functools.partial(nn.GroupNorm, 2))
        self.key, self.value = nn.Conv3d(CHANNELS, DEPTH, 1), nn.Conv3d(CHANNELS, DEPTH, 1)

    def gather(self, feats: Tensor, logits: Tensor) -> Tensor:
        return super().gather(feats, logits).view(*feats.shape[:2], -1, 1, 1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        pooled = F.max_pool3d(query, 2)
        context = super().attend(pooled, key.flatten(2), value.flatten(2))
        return F.interpolate(context, size=query.shape[2:], mode="trilinear", align_corners=True)


class Einsum(Head):
    def gather(self, feats: Tensor, logits: Tensor) -> Tensor:
        return torch.einsum("bcn,bkn->bck", feats.flatten(2), logits.flatten(2).softmax(-1))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = torch.einsum("bdn,bdk->bkn", query.flatten(2), key)
        return torch.einsum("bkn,bdk->bdn", (DEPTH**-0.5 * scores).softmax(1), value).view(query.shape)


def rearrange(x: Tensor, pattern: str) -> Tensor:
    """What these heads need of einops' function: dimensions reordered and merged. Like it, it takes tensors alone."""
    if not isinstance(x, Tensor):
        raise RuntimeError(f"Tensor type unknown to einops {type(x)}")
    before, after = pattern.split(" -> ")
    sizes = dict(zip(before.split(), x.shape, strict=True))
    groups = [group.strip("()").split() for group in re.findall(r"\(.*?\)|\w+", after)]
    x = x.permute([list(sizes).index(name) for group in groups for name in group])
    return x.reshape([math.prod(sizes[name] for name in group) for group in groups])


class Rearranged(Head):
    """einops instead of views and transpositions."""

    def gather(self, feats: Tensor, logits: Tensor) -> Tensor:
        weights = logits.flatten(2).softmax(dim=-1)
        return rearrange(weights @ rearrange(feats, "b c h w -> b (h w) c"), "b k c -> b c k")

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = rearrange(query, "b d h w -> b (h w) d") @ key * DEPTH**-0.5
        context = scores.softmax(dim=-1) @ rearrange(value, "b d k -> b k d")
        return rearrange(context, "b n d -> b d n").view(query.shape)


class RearrangedScores(Rearranged):
    """The scores go through einops as well, which has to see a tensor."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = rearrange(key, "b d k -> b k d") @ query.flatten(2) * DEPTH**-0.5
        weights = rearrange(scores, "b k n -> b n k").softmax(dim=-1)
        return (value @ weights.mT).view(query.shape)


class ActivatedNorm(nn.Module):
    """InPlaceABN's interface: the activation is a part of the norm, and a setting."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        self.activation = "leaky_relu"

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)
        return F.leaky_relu_(x, 0.01)


class Net(nn.Module):
    """A whole network in one forward, the head inlined, with coarse logits brought to the size of the feats."""

    def __init__(self, *, scale_logits: bool = True, mode: str = "bilinear", align_corners: bool | None = True) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS), nn.ReLU(inplace=True))
        self.aux = nn.Conv2d(CHANNELS, REGIONS, 3, stride=2, padding=1)
        self.proj = nn.ModuleDict({name: nn.Conv2d(CHANNELS, DEPTH, 1) for name in ("query", "key", "value")})
        self.out = nn.Conv2d(DEPTH + CHANNELS, REGIONS, 1)
        self.scale_logits = scale_logits
        self.resize = functools.partial(F.interpolate, mode=mode, align_corners=align_corners)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        feats = self.stem(image)
        logits = coarse = self.aux(feats)
        if self.scale_logits:
            logits = self.resize(coarse, size=feats.shape[2:])
        else:
            feats = self.resize(feats, size=logits.shape[2:])
        b, c, h, w = feats.size()
        weights = F.softmax(logits.view(b, -1, h * w), dim=2)
        regions = torch.matmul(weights, feats.view(b, c, -1).permute(0, 2, 1)).permute(0, 2, 1).unsqueeze(3)
        query = self.proj["query"](feats).view(b, DEPTH, -1).permute(0, 2, 1)
        key, value = self.proj["key"](regions).view(b, DEPTH, -1), self.proj["value"](regions).view(b, DEPTH, -1)
        weights = F.softmax(torch.matmul(query, key) * DEPTH**-0.5, dim=-1)
        context = torch.matmul(weights, value.permute(0, 2, 1)).permute(0, 2, 1).contiguous().view(b, DEPTH, h, w)
        out = self.resize(self.out(torch.cat([context, feats], 1)), size=image.shape[2:])
        return {"aux": coarse, "out": out}


class OpenSeg(Head):
    """openseg.pytorch: regions of the label instead of the prediction, and attention maps for inspection."""

    def __init__(self, *, use_gt: bool = False, fetch_attention: bool = False) -> None:
        super().__init__()
        self.use_gt, self.fetch_attention = use_gt, fetch_attention

    def forward(self, feats: Tensor, label: Tensor | None = None) -> Any:
        logits = self.aux(feats)
        regions = self.of_label(feats, label) if self.use_gt and label is not None else self.gather(feats, logits)
        query = self.query(feats).flatten(2).permute(0, 2, 1)
        sim_map = torch.matmul(query, self.key(regions)) * DEPTH**-0.5
        sim_map = F.softmax(sim_map, dim=-1)
        context = torch.matmul(sim_map, self.value(regions).permute(0, 2, 1))
        context = context.permute(0, 2, 1).contiguous().view(-1, DEPTH, *feats.shape[2:])
        out = self.classify(self.join(feats, self.up(context)))
        return (out, sim_map) if self.fetch_attention else out

    def of_label(self, feats: Tensor, label: Tensor) -> Tensor:
        weights = F.one_hot(label.long().flatten(1), REGIONS).permute(0, 2, 1).type_as(feats)
        weights = F.normalize(weights, p=1, dim=2)
        return torch.matmul(weights, feats.flatten(2).permute(0, 2, 1)).permute(0, 2, 1)


class Hierarchical(nn.Module):
    """NVIDIA's hierarchical multi-scale attention: one head at two sizes in a step, blended by a learned sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.weigh = Head(), nn.Conv2d(CHANNELS, 1, 1)

    def forward(self, feats: Tensor) -> list[Tensor]:
        small = F.interpolate(feats, scale_factor=0.5, mode="bilinear")
        (aux, out), (small_aux, small_out) = self.head(feats), self.head(small)
        weight = torch.sigmoid(self.weigh(small))
        small_out, weight = (F.interpolate(x, out.shape[2:], mode="bilinear") for x in (weight * small_out, weight))
        return [aux, small_aux, small_out + (1 - weight) * out]


class SpatialEinsum(Head):
    """No flattening before the product: the weights have four dimensions."""

    def gather(self, feats: Tensor, logits: Tensor) -> Tensor:
        weights = logits.flatten(2).softmax(2).view(logits.shape)
        return torch.einsum("bkhw,bchw->bck", weights, feats)


class MultiHead(Head):
    """Two heads, so that scores have four dimensions."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.flatten(2).unflatten(1, (2, -1)) for x in (query, key, value))
        weights = torch.softmax(q.mT @ k / (DEPTH // 2) ** 0.5, dim=-1)
        return (v @ weights.mT).flatten(1, 2).view(query.shape)


class FoldedHeads(Head):
    """Two heads folded into the batch, so that they are attentions of our kind."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.flatten(2).reshape(2 * len(x), DEPTH // 2, -1) for x in (query, key, value))
        weights = torch.softmax(q.mT.bmm(k) / (DEPTH // 2) ** 0.5, dim=-1)
        return torch.bmm(v, weights.mT).reshape(query.shape)


# What only looks like OCR, or does more


class NoScale(Head):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (value @ torch.softmax(key.mT @ query.flatten(2), dim=1)).view(query.shape)


class AddedScale(Head):
    """+ sqrt(D) where / sqrt(D) was meant."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query.flatten(2).mT @ key + DEPTH**0.5
        return (value @ scores.softmax(-1).mT).view(query.shape)


class Residual(Head):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return query + super().attend(query, key, value)


class ScoreResidual(Head):
    """A learned prior on the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = nn.Parameter(torch.randn(REGIONS))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query.flatten(2).mT @ key
        return (value @ (scores + self.prior).softmax(-1).mT).view(query.shape)


class TwoProxies(Head):
    """Two sets of regions under one softmax: joined keys are more regions, joined scores are not seen through."""

    def __init__(self, *, join_scores: bool) -> None:
        super().__init__()
        self.join_scores = join_scores

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, values = query.flatten(2).mT, torch.cat([value, value.flip(2).relu()], 2)
        if self.join_scores:
            scores = torch.cat([q @ key, q @ key.roll(1, 2)], -1)
        else:
            scores = q @ torch.cat([key, key.roll(1, 2)], 2)
        return (values @ scores.softmax(-1).mT).view(query.shape)


class DroppedWeights(Head):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = self.drop((query.flatten(2).mT @ key).softmax(-1))
        return (value @ weights.mT).view(query.shape)


class ModifiedWeights(Head):
    """Weights of one region cut out and the rest normalised again, in place."""

    @torch.no_grad()
    def weigh(self, query: Tensor, key: Tensor) -> Tensor:
        weights = (query.flatten(2).mT @ key).softmax(-1)
        weights[..., 0] = 0
        weights /= weights.sum(-1, keepdim=True)
        return weights

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (value @ self.weigh(query, key).mT).view(query.shape)


class AssignedScores(Head):
    """The first region is masked out before the softmax."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query.flatten(2).mT @ key
        scores[..., 0] = -torch.inf
        return (value @ scores.softmax(-1).mT).view(query.shape)


class ModifiedKeys(Head):
    """The keys change after the scores were computed, by a function of another file."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with torch.no_grad():
            keys = key.clone()
            scores = query.flatten(2).mT @ keys
            nn.init.zeros_(keys)
        return (value @ scores.softmax(-1).mT).view(query.shape) + keys.sum()


class SinglePrecisionWeights(Head):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = F.softmax(query.flatten(2).mT @ key, dim=-1, dtype=torch.float32).to(value.dtype)
        return (value @ weights.mT).view(query.shape)


class WrongAxis(Head):
    """The gather's softmax over regions, the attention's over pixels."""

    def gather(self, feats: Tensor, logits: Tensor) -> Tensor:
        return feats.flatten(2) @ logits.flatten(2).softmax(1).mT

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (value @ (query.flatten(2).mT @ key).softmax(1).mT).view(query.shape)


class Sigmoid(Head):
    def gather(self, feats: Tensor, logits: Tensor) -> Tensor:
        return feats.flatten(2) @ logits.flatten(2).sigmoid().mT

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (value @ (query.flatten(2).mT @ key).sigmoid().mT).view(query.shape)


def doubled(module: nn.Module, args: Any, output: Any) -> Any:
    return [2 * item for item in output] if isinstance(output, tuple) else 2 * output


def hooked() -> nn.Module:
    """A head and two of its projections, whose results are changed by hooks."""
    head = Head()
    for module in (head, head.query, head.key):
        module.register_forward_hook(doubled)
    return head


@dataclass(frozen=True)
class Family:
    """How to make a head, how often each op runs, what the report says of the rest, and what to call it with.

    `eval_attentions` is how often the attention runs in eval mode, if that differs. `blocks` is how often step
    4 runs as one op, in eval mode without gradients, and `why_no_block` what the report says of a module that may be
    step 4 and is not one that runs so. Where pixels attend at a lower resolution, `attends_apart`, the block
    runs the attention as an op of its own.
    """

    name: str
    make: Callable[[], nn.Module]
    gathers: int = 1
    attentions: int = 1
    reason: str = ""
    inputs: tuple[tuple[int, ...], ...] = (FEATS,)
    eval_attentions: int | None = None
    blocks: int = 0
    why_no_block: str = ""
    attends_apart: bool = False


IMAGE, LABEL = (2, 3, 6, 4), (2, 6, 4)
NO_PRODUCT = "the softmax is not followed by a product over its dimension"
NOT_3D = "the softmax's input has 4 dimensions instead of 3"
FAMILIES = [
    Family("regions [B, C, K], Conv1d, bmm", Head),
    Family("regions [B, K, C], Linear, @", RegionRows),
    Family("regions [B, K, C, 1]", RegionImages),
    Family("volumes, regions [B, C, K, 1, 1]", Volume, inputs=((2, CHANNELS, 4, 2, 6),)),
    Family("einsum", Einsum),
    Family("einops", Rearranged),
    Family("einops on scores", RearrangedScores, 1, 0),
    Family("inplace-abn", lambda: Head(norm=ActivatedNorm)),
    Family("inlined, coarse logits", Net, inputs=(IMAGE,)),
    Family("inlined, coarse feats", lambda: Net(scale_logits=False), inputs=((2, 3, 8, 8),)),
    Family("nearest up-sampling", lambda: Net(mode="nearest", align_corners=None), inputs=(IMAGE,)),
    Family("unaligned up-sampling", lambda: Net(align_corners=False), inputs=(IMAGE,)),
    Family("openseg", OpenSeg, inputs=(FEATS, LABEL)),
    Family("openseg with labels", lambda: OpenSeg(use_gt=True), 0, inputs=(FEATS, LABEL)),
    Family("openseg with labels, none given", lambda: OpenSeg(use_gt=True)),
    Family("openseg returning its maps", lambda: OpenSeg(fetch_attention=True)),
    Family("RITM: a single region", lambda: Head(regions=1)),
    Family("NVIDIA: two sizes in a step", Hierarchical, 2, 2),
    Family("hooks", hooked),
    Family("heads folded into the batch", FoldedHeads),
    Family("two heads", MultiHead, 1, 0, NOT_3D),
    Family("weights of four dimensions", SpatialEinsum),
    Family("no scale", NoScale),
    Family("residual", Residual),
    Family("joined keys", lambda: TwoProxies(join_scores=False)),
    Family("joined scores", lambda: TwoProxies(join_scores=True), 1, 0),
    Family("a number added to the scores", AddedScale, 1, 0),
    Family("a parameter added to the scores", ScoreResidual, 1, 0),
    Family(
        "dropout on weights", DroppedWeights, 1, 0, "dropout is applied to the attention weights", eval_attentions=1
    ),
    Family("weights modified", ModifiedWeights, 1, 0, NO_PRODUCT),
    Family("scores assigned to", AssignedScores, 1, 0),
    Family("keys modified elsewhere", ModifiedKeys, 1, 0),
    Family("float32 weights", SinglePrecisionWeights, 1, 0, "the softmax converts its dtype"),
    Family("wrong axis", WrongAxis, 0, 0, "is not over pixels"),
    Family("sigmoid", Sigmoid, 0, 0, "it takes a sigmoid, not a softmax"),
]


def shapes(head: nn.Module) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(t.shape) for t in blocks.inputs(head))


OURS = "ours", "LeakyReLU", "no activation"  # which train as one op of their own
FAMILIES += [
    Family(
        f"step 4: {name}",
        make,
        0,
        int(name not in ("learned temperature", *OURS)),
        inputs=shapes(make()),
        blocks=1,
        attends_apart="scale," in f"{name}," or "pooled" in name or "joined by" in name,
    )
    for name, make in blocks.HEADS.items()
]
NO_ATTENTIONS = {
    "wrong axis": "the softmax over dim 1 of the product (2, 35, 4) is not over regions",
    "two heads": NOT_3D,
    "prior": "is not over pixels",
}
FAMILIES += [
    Family(
        f"no step 4: {name}",
        make,
        0,
        int(name not in NO_ATTENTIONS),
        reason=NO_ATTENTIONS.get(name, ""),
        inputs=shapes(make()),
        why_no_block="" if name in NO_ATTENTIONS else reason,
    )
    for name, (make, reason) in blocks.REFUSALS.items()
    if name not in ("meta", "float64", "arguments", "recording")
]
