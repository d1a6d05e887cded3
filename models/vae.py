"""The conditional variational autoencoder (Kingma and Welling 2014; Sohn et al. 2015).

A convolutional encoder and decoder for images, one hidden layer each for tables; no BatchNorm. The
label conditions both halves and adds a template of its class to the decoder's output, which is what
noisy steps learn first. The label's own distribution is learnt with the rest, under the same
clipping, so that labels can be sampled without looking at the data.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ..config import VaeOptions
from ..data_prep.schema import ImageSchema, Schema, TableSchema
from .family import Batch, Family
from .layers import Lookup
from .scaling import Scaling

# Noisy steps can push a log variance anywhere; its exponential must stay a number.
_MAX_LOG_VARIANCE = 8.0
# A reconstruction's gradient fills the clipping norm; without a gain the few numbers below would
# learn at the pace of one weight among thousands. The values are those that did best of a few.
_PRIOR_GAIN = 10.0
_SPREAD_GAIN = 3.0
_TEMPLATE_GAIN = 2.0
_LOG_SCALES = (-4.0, 0.0)  # bounds of the spread of a number, as its logarithm


class Vae(nn.Module):
    """p(y) p(z) p(x | z, y), with q(z | x, y) a diagonal Gaussian."""

    def __init__(self, options: VaeOptions, schema: Schema) -> None:
        super().__init__()
        self.options, self.schema = options, schema
        self.classes = len(schema.classes)
        self.prior = Lookup(1, self.classes, _PRIOR_GAIN) if self.classes else None
        self.template = (
            Lookup(self.classes, math.prod(schema.shape), _TEMPLATE_GAIN) if self.classes else None
        )
        self.spread: Lookup | None = None
        self.scaling: Scaling | None = None
        if isinstance(schema, TableSchema) and schema.numeric:
            self.scaling = Scaling(schema)
        self.encoder, self.decoder, features = (
            _conv_halves(options, schema, self.classes)
            if isinstance(schema, ImageSchema)
            else _dense_halves(options, _table(self), self.classes)
        )
        self.posterior = nn.Linear(features, 2 * options.latent)
        if isinstance(schema, TableSchema) and self.reconstruction == "mse" and schema.numeric:
            self.spread = Lookup(1, schema.width, _SPREAD_GAIN)

    @property
    def reconstruction(self) -> str:
        """The loss in force."""
        default = "bce" if self.schema.modality == "image" else "mse"
        return self.options.reconstruction or default

    def encode(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """X [B, ...], y [B, classes] one-hot -> mean and log variance of z, [B, latent] each."""
        features = self.encoder(torch.cat([2 * x.flatten(1) - 1, y], dim=1))
        mean, log_variance = self.posterior(features).chunk(2, dim=1)
        return mean, log_variance.clamp(-_MAX_LOG_VARIANCE, _MAX_LOG_VARIANCE)

    def decode(self, z: Tensor, y: Tensor) -> Tensor:
        """Z [B, latent], y [B, classes] one-hot -> logits of x, [B, ...]."""
        logits: Tensor = self.decoder(torch.cat([z, y], dim=1))
        return logits if self.template is None else logits + self.template(y).view_as(logits)


class _Split(nn.Module):
    """Runs images through convolutions and appends the label: flat [B, pixels + classes] in."""

    def __init__(self, convolutions: nn.Module, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.convolutions, self.shape = convolutions, shape

    def forward(self, flat: Tensor) -> Tensor:
        channels, height, width = self.shape
        pixels, label = flat.tensor_split([channels * height * width], dim=1)
        features = self.convolutions(pixels.view(-1, *self.shape)).flatten(1)
        return torch.cat([features, label], dim=1)


def _conv_halves(
    options: VaeOptions, schema: ImageSchema, classes: int
) -> tuple[nn.Module, nn.Module, int]:
    inner = (2 * options.width, schema.height // 4, schema.width // 4)
    flat = inner[0] * inner[1] * inner[2]
    encoder = nn.Sequential(
        nn.Conv2d(schema.channels, options.width, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(options.width, 2 * options.width, 3, stride=2, padding=1),
        nn.SiLU(),
    )
    decoder = nn.Sequential(
        nn.Linear(options.latent + classes, flat),
        nn.SiLU(),
        nn.Unflatten(1, inner),
        nn.ConvTranspose2d(2 * options.width, options.width, 4, stride=2, padding=1),
        nn.SiLU(),
        nn.ConvTranspose2d(options.width, schema.channels, 4, stride=2, padding=1),
    )
    return _Split(encoder, schema.shape), decoder, flat + classes


def _dense_halves(
    options: VaeOptions, schema: TableSchema, classes: int
) -> tuple[nn.Module, nn.Module, int]:
    encoder = nn.Sequential(nn.Linear(schema.width + classes, options.hidden), nn.SiLU())
    decoder = nn.Sequential(
        nn.Linear(options.latent + classes, options.hidden),
        nn.SiLU(),
        nn.Linear(options.hidden, schema.width),
    )
    return encoder, decoder, options.hidden


def build(options: VaeOptions, schema: Schema) -> Vae:
    """The module for a schema."""
    return Vae(options, schema)


def example_losses(module: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
    """[B] negative evidence lower bounds, one draw of z each, the KL term weighted by beta."""
    vae = _vae(module)
    batch, y = _scaled(vae, batch), _one_hot(vae, batch.y)
    mean, log_variance = vae.encode(batch.x, y)
    noise = torch.randn(mean.shape, generator=generator)
    z = mean + noise * (log_variance / 2).exp()
    return _negative_elbo(vae, batch, y, z, mean, log_variance)


@torch.no_grad()
def scores(module: nn.Module, batch: Batch) -> Tensor:
    """[B] evidence lower bounds at the posterior's mean."""
    vae = _vae(module)
    batch, y = _scaled(vae, batch), _one_hot(vae, batch.y)
    mean, log_variance = vae.encode(batch.x, y)
    return -_negative_elbo(vae, batch, y, mean, mean, log_variance)


@torch.no_grad()
def sample(
    module: nn.Module, n: int, generator: torch.Generator, labels: Tensor | None = None
) -> Batch:
    """N synthetic records; labels [n] are drawn from the learnt prior where they are not given."""
    vae = _vae(module)
    if labels is None:
        labels = torch.zeros(n, dtype=torch.int64)
        if vae.prior is not None:
            share = vae.prior(torch.ones(1, 1))[0].softmax(dim=0)
            # By a coin each: torch.multinomial refuses to draw none.
            ends = share.cumsum(dim=0)[:-1]
            labels = torch.bucketize(torch.rand(n, generator=generator), ends)
    z = torch.randn(n, vae.options.latent, generator=generator)
    logits = vae.decode(z, _one_hot(vae, labels))
    if isinstance(vae.schema, ImageSchema):
        return Batch(logits.sigmoid(), labels)
    x = _sample_table(vae, logits, generator)
    return Batch(x if vae.scaling is None else vae.scaling.inverse(x), labels)


def trainable(module: nn.Module) -> list[str]:
    """All parameters but the scaling, which is learnt from statistics or not at all."""
    names = [name for name, _ in module.named_parameters()]
    return [name for name in names if not name.startswith("scaling.")]


def _scaled(vae: Vae, batch: Batch) -> Batch:
    return batch if vae.scaling is None else Batch(vae.scaling(batch.x), batch.y)


def _negative_elbo(
    vae: Vae, batch: Batch, y: Tensor, z: Tensor, mean: Tensor, log_variance: Tensor
) -> Tensor:
    logits = vae.decode(z, y)
    if isinstance(vae.schema, ImageSchema):
        loss = _pixel_loss(logits, batch.x, vae.reconstruction).flatten(1).sum(dim=1)
    else:
        loss = _table_loss(vae, logits, batch.x)
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1)
    loss = loss + vae.options.beta * kl
    if vae.prior is not None:
        share = vae.prior(z.new_ones(len(y), 1)).log_softmax(dim=1)
        loss = loss - (share * y).sum(dim=1)
    return loss


def _pixel_loss(logits: Tensor, x: Tensor, reconstruction: str) -> Tensor:
    if reconstruction == "bce":
        return F.binary_cross_entropy_with_logits(logits, x, reduction="none")
    return (logits.sigmoid() - x).square()


def _table_loss(vae: Vae, logits: Tensor, x: Tensor) -> Tensor:
    """[B] sums over columns: cross-entropy of levels, the numeric loss of present numbers."""
    total = logits.new_zeros(len(logits))
    spread = vae.spread(x.new_ones(len(x), 1)) if vae.spread is not None else None
    for block in _table(vae).blocks:
        span = slice(block.start, block.stop)
        if block.column.kind == "categorical":
            total = total - (x[:, span] * logits[:, span].log_softmax(dim=1)).sum(dim=1)
            continue
        value, start = x[:, block.start], block.start
        # A number is a Gaussian around a mean within its bounds; its spread is learnt, or samples
        # would all sit at their means.
        if spread is None:
            loss = F.binary_cross_entropy_with_logits(logits[:, start], value, reduction="none")
        else:
            log_scale = _log_scale(spread[:, start])
            error = (logits[:, start].sigmoid() - value) * (-log_scale).exp()
            loss = 0.5 * error.square() + log_scale
        if block.column.nullable:
            present = x[:, start + 1]
            loss = loss * present + F.binary_cross_entropy_with_logits(
                logits[:, start + 1], present, reduction="none"
            )
        total = total + loss
    return total


def _sample_table(vae: Vae, logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draws every column given z: a level by its probability, a number around its mean."""
    x = torch.zeros_like(logits)
    spread = vae.spread(torch.ones(len(x), 1)) if vae.spread is not None else None
    for block in _table(vae).blocks:
        span, start = slice(block.start, block.stop), block.start
        if block.column.kind == "categorical":
            drawn = torch.multinomial(logits[:, span].softmax(dim=1), 1, generator=generator)
            x[:, span] = x[:, span].scatter(1, drawn, 1.0)
            continue
        x[:, start] = logits[:, start].sigmoid()
        if spread is not None:
            noise = torch.randn(len(x), generator=generator)
            x[:, start] = (x[:, start] + noise * _log_scale(spread[:, start]).exp()).clamp(0, 1)
        if block.column.nullable:
            coin = torch.rand(len(x), generator=generator)
            x[:, start + 1] = (coin < logits[:, start + 1].sigmoid()).float()
    return x


def _log_scale(spread: Tensor) -> Tensor:
    """Of a numeric column: between e^-4 and 1 of its range, e^-1.5 at the start."""
    return (spread - 1.5).clamp(*_LOG_SCALES)


def _one_hot(vae: Vae, labels: Tensor) -> Tensor:
    """[B, classes]. A comparison, not `F.one_hot`: that one looks at the labels and may raise."""
    return (labels[:, None] == torch.arange(vae.classes)).to(vae.posterior.weight.dtype)


def _vae(module: nn.Module) -> Vae:
    if not isinstance(module, Vae):
        raise TypeError(f"{type(module).__name__}: is no Vae")
    return module


def _table(vae: Vae) -> TableSchema:
    if not isinstance(vae.schema, TableSchema):
        raise TypeError("schema: is for no table")
    return vae.schema


def score_bounds(module: nn.Module) -> tuple[float, float]:
    """Bounds of what a score may count for: a nat a pixel; twice a column's widest guess or so."""
    vae = _vae(module)
    if isinstance(vae.schema, ImageSchema):
        return -float(math.prod(vae.schema.shape)), 0.0
    columns = _table(vae).features
    guesses = [math.log(column.levels) for column in columns if column.kind == "categorical"]
    low = -(2.0 * len(columns) + sum(guesses) + math.log(max(vae.classes, 1)))
    numbers = len(columns) - len(guesses)
    return low, -_LOG_SCALES[0] * numbers if vae.spread is not None else 0.0


FAMILY = Family(
    build=build,
    example_losses=example_losses,
    sample=sample,
    scores=scores,
    score_bounds=score_bounds,
    trainable=trainable,
    modalities=("table", "image"),
)
