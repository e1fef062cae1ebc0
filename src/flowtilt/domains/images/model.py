"""The flow in the latent space of a text-to-image diffusion model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flowtilt.domains.images.schedule import DiscreteSchedule, Spacing
from flowtilt.domains.images.sections import GuidanceConfig
from flowtilt.interpolants import Prediction, broadcast_time, convert
from flowtilt.model import Context, FlowModel, Use
from flowtilt.words import check_word

Target = Literal["epsilon", "v_prediction", "sample"]
"""What a denoiser predicts, as schedulers of diffusers name it: noise, Salimans and Ho's v, or data."""

Precision = Literal["float32", "bfloat16", "float16"]

ADAPTER_HEADER = "lora_adapter_metadata"
"""Key of a safetensors file's header under which diffusers looks for the settings of its adapters."""

_KEYS = {"r": "rank", "lora_alpha": "alpha", "target_modules": "targets"}
"""Settings of an adapter as peft names them, and as the section ``adapter`` does."""


@dataclass(frozen=True)
class Prompted:
    """The context of a batch: which prompt each sample has.

    Attributes:
        prompt: positions in the table, long (batch,).
        table: embeddings of the prompts, (prompts, tokens, width).
        empty: embedding of the empty prompt, (tokens, width).
        dropped: samples whose embedding is that of the empty prompt, bool (batch,); None for none.
    """

    prompt: Tensor
    table: Tensor
    empty: Tensor
    guidance: float = 1.0
    dropped: Tensor | None = None

    @property
    def embeddings(self) -> Tensor:
        """Of the samples' prompts, (batch, tokens, width)."""
        found = self.table[self.prompt]
        return found if self.dropped is None else torch.where(self.dropped[:, None, None], self.empty, found)

    def select(self, index: Tensor) -> Prompted:
        """That of the samples at ``index``."""
        dropped = None if self.dropped is None else self.dropped[index]
        return replace(self, prompt=self.prompt[index], dropped=dropped)


class LatentFlow(FlowModel):
    """A denoiser in latent space, conditioned on prompts, as a flow.

    Args:
        denoiser: a ``UNet2DConditionModel`` of diffusers, or what is called like one.
        shape: of one latent, (channels, height, width).
        offset: of the timesteps, see :meth:`DiscreteSchedule.grid`.
        guidance: scales by use; without it none is guided.
        precision: of the denoiser's matrix products, by autocast.
        chunk: most latents that go through the denoiser together where no gradient is kept, each of them
            twice under guidance; None for all.
        adapter: settings of the denoiser's low-rank adapters by peft's names ``r``, ``lora_alpha`` and
            ``target_modules``: a fine-tuning changes these adapters alone. None for a denoiser without.

    Raises:
        ValueError: if the schedule ends in pure noise and the denoiser predicts noise: there it says nothing
            of the data.
    """

    has_likelihood = False

    def __init__(
        self,
        denoiser: nn.Module,
        schedule: DiscreteSchedule,
        shape: tuple[int, int, int],
        target: Target = "epsilon",
        spacing: Spacing = "trailing",
        offset: int = 0,
        guidance: GuidanceConfig | None = None,
        precision: Precision = "float32",
        chunk: int | None = None,
        adapter: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_word(target, Target, "the denoiser's target")
        check_word(spacing, Spacing, "the spacing of timesteps")
        check_word(precision, Precision, "the precision")
        if target == "epsilon" and schedule.levels[-1] == 0:
            raise ValueError(
                "a schedule with a terminal signal-to-noise ratio of zero needs a denoiser that predicts "
                "v_prediction or sample, not epsilon"
            )
        self.denoiser = denoiser
        self.path: DiscreteSchedule = schedule
        self.shape, self.target, self.guidance = shape, target, guidance or GuidanceConfig()
        self.spacing, self.offset = spacing, offset
        self.precision, self.chunk, self.adapter = precision, chunk, adapter
        self.prompts: Prompted | None = None

    def time_grid(self, steps: int) -> list[float]:
        return self.path.grid(steps, self.spacing, self.offset)

    def tunable(self) -> list[nn.Parameter]:
        named = self.denoiser.named_parameters()
        return [p for name, p in named if self.adapter is None or "lora_" in name]

    def weights(self) -> dict[str, Tensor]:
        """The denoiser's, or those of its adapters by the names that diffusers' pipelines give them."""
        if self.adapter is None:
            return self.denoiser.state_dict()
        from peft import get_peft_model_state_dict

        found = get_peft_model_state_dict(self.denoiser, save_embedding_layers=False)
        return {f"unet.{name}": tensor for name, tensor in found.items()}

    def header(self) -> dict[str, str]:
        """An adapter's settings as diffusers writes them: without the scale, its weights say nothing. No more
        than one entry: safetensors writes several in random order."""
        if self.adapter is None:
            return {}
        return {ADAPTER_HEADER: json.dumps({f"unet.{k}": v for k, v in self.adapter.items()}, sort_keys=True)}

    def check_header(self, header: Mapping[str, str]) -> None:
        written = header.get(ADAPTER_HEADER)
        if self.adapter is None:
            if written is not None:
                raise ValueError("it holds an adapter, and the configuration has no section adapter")
            return
        if written is None:
            raise ValueError("it does not say the rank, scale and targets of an adapter, the section adapter")
        found = json.loads(written)
        for name, key in _KEYS.items():
            if found.get(f"unet.{name}") != self.adapter[name]:
                raise ValueError(
                    f"its adapter has the {key} {found.get(f'unet.{name}')}, and the configuration's key "
                    f"adapter.{key} is {self.adapter[name]}"
                )

    def use_prompts(self, table: Tensor, empty: Tensor) -> None:
        """Set the prompts that contexts are drawn from.

        Args:
            table: their embeddings, (prompts, tokens, width).
            empty: embedding of the empty prompt, (tokens, width).
        """
        self.prompts = Prompted(torch.zeros(0, dtype=torch.long), table, empty)

    def draw_context(self, count: int, generator: torch.Generator) -> Prompted:
        """Prompts of ``count`` samples: all equally often, up to one, in random order."""
        number = len(self._known().table)
        rounds = -(-count // number)
        order = torch.cat([torch.randperm(number, generator=generator) for _ in range(rounds)])
        return self.context_of(order[:count])

    def training_context(self, count: int, generator: torch.Generator) -> Prompted:
        """Prompts as of any samples, of which each is dropped with the probability ``guidance.dropout``."""
        context = self.draw_context(count, generator)
        if not self.guidance.dropout:
            return context
        return replace(context, dropped=torch.rand(count, generator=generator) < self.guidance.dropout)

    def context_of(self, labels: Tensor) -> Prompted:
        """The context of samples with given prompts, long (batch,), for sampling."""
        return replace(self._known(), prompt=labels, guidance=self.guidance.sampling)

    def _known(self) -> Prompted:
        if self.prompts is None:
            raise ValueError("a text-to-image flow needs prompts; give it some by use_prompts")
        return self.prompts

    def context_for(self, use: Use, context: Context) -> Context:
        scale = getattr(self.guidance, use)
        return context if context.guidance == scale else replace(context, guidance=scale)

    def evaluations(self, use: Use) -> int:
        return 1 if getattr(self.guidance, use) == 1 else 2

    def select_context(self, context: Context, index: Tensor) -> Context:
        return context.select(index)

    def context_labels(self, context: Context) -> Tensor:
        """Positions of the prompts."""
        return context.prompt

    def prior(self, count: int, generator: torch.Generator, context: Context = None) -> Tensor:
        return self.standard_normal(count, *self.shape, generator=generator)

    def predict(self, x: Tensor, t: Tensor, context: Prompted) -> Tensor:
        """The denoiser's prediction, guided, of the shape of ``x``."""
        if self.chunk is None or len(x) <= self.chunk or torch.is_grad_enabled():
            return self._predict(x, t, context)
        times = t.expand(len(x))
        parts = torch.arange(len(x), device=x.device).split(self.chunk)
        return torch.cat([self._predict(x[part], times[part], context.select(part)) for part in parts])

    def _predict(self, x: Tensor, t: Tensor, context: Prompted) -> Tensor:
        timesteps = self.path.timestep_of(t).to(x.dtype).expand(len(x))
        if context.guidance == 1:
            return self._denoised(x, timesteps, context.embeddings)
        empty = context.empty.expand(len(x), -1, -1)
        both = self._denoised(
            torch.cat([x, x]), torch.cat([timesteps, timesteps]), torch.cat([empty, context.embeddings])
        )
        without, conditional = both.chunk(2)
        return without + context.guidance * (conditional - without)

    def _denoised(self, x: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        lower = getattr(torch, self.precision)
        with torch.autocast(x.device.type, lower, enabled=self.precision != "float32"):
            return self.denoiser(x, timesteps, embeddings).sample.to(x.dtype)

    def velocity(self, x: Tensor, t: Tensor, context: Context = None) -> Tensor:
        found = self.predict(x, t, context)
        if self.target == "v_prediction":
            # v = alpha noise - beta endpoint (Salimans and Ho 2022, appendix D)
            at = broadcast_time(t, x)
            found = self.path.alpha(at) * x - self.path.beta(at) * found
        source: Prediction = "noise" if self.target == "epsilon" else "endpoint"
        return convert(found, x, t, self.path, source, "velocity")

    def score(self, x: Tensor, t: Tensor, context: Context = None) -> Tensor:
        """Score of the path, as the control sees the flow: a guided prediction is no distribution's score."""
        return super().score(x, t, self.context_for("control", context))

    def matching_residual(self, x1: Tensor, x0: Tensor, t: Tensor, context: Context = None) -> Tensor:
        """Prediction minus target at the timesteps nearest to ``t``, of the shape of ``x1``. A diffusion is
        trained at its timesteps alone, by the mean square of this (Ho et al. 2020, eq. 14)."""
        tau = self.path.timestep_of(t).round().clamp(0, self.path.timesteps - 1)
        at = (1 - (tau + 1) / self.path.timesteps).to(x1.dtype)
        wide = broadcast_time(at, x1)
        alpha, beta = self.path.alpha(wide), self.path.beta(wide)
        target = {"epsilon": x0, "v_prediction": alpha * x0 - beta * x1, "sample": x1}[self.target]
        return self.predict(alpha * x1 + beta * x0, at, context) - target
