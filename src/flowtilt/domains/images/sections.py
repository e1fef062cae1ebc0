"""Sections of the configuration of text-to-image models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from flowtilt.pipeline.configuration import Count, Name, NoRepeats, NotNegative, Positive, Section
from flowtilt.pipeline.sections import FitConfig, SearchedMethodConfig

Share = Annotated[float, Field(ge=0, lt=1)]
Channels = Annotated[tuple[Count, ...], Field(min_length=1)]


class BridgesConfig(Section):
    """The drawn set that the embedded models are trained on."""

    count: Count
    """Images with captions."""

    size: Annotated[int, Field(gt=0, multiple_of=8)] = 32
    """Pixels a side."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Of the drawing."""


class AutoencoderConfig(Section):
    """The variational autoencoder between images and latents, diffusers' AutoencoderKL."""

    channels: Channels
    """Of its levels, the image's first; each level but the last halves the side."""

    latent_channels: Count = 4
    """Channels of a latent."""

    kl_weight: NotNegative
    """Weight of the latents' KL divergence from noise, a latent channel, beside the mean absolute error."""

    fit: FitConfig
    """Its training."""

    refine: FitConfig | None = None
    """Training of the decoder alone after it, which leaves the latents as they are."""


class TextConfig(Section):
    """Tokenizer and text encoder, transformers' CLIPTokenizer and CLIPTextModel."""

    merges: Count
    """How many of the merges of CLIP's byte pairs the tokenizer keeps, the first ones of its 48,894."""

    length: Count
    """Tokens of a prompt, with its two ends."""

    width: Count
    """Features of a token."""

    layers: Count
    """Transformer layers."""

    heads: Count
    """Heads of the attention."""


class DenoiserConfig(Section):
    """The denoiser, diffusers' UNet2DConditionModel, trained together with the text encoder."""

    channels: Channels
    """Of its levels, the latent's own first; all but the last attend to the prompt."""

    layers: Count = 1
    """Residual blocks a level."""

    head_width: Count = 32
    """Features of an attention head."""

    empty_prompts: Share = 0.1
    """Share of the captions left empty in training, for guidance."""

    fit: FitConfig
    """Its training."""


class AlignmentConfig(Section):
    """The model of image and caption together, open_clip's CLIP."""

    embedding: Count
    """Features that images and captions share."""

    patch: Count
    """Pixels a side of a patch."""

    width: Count
    """Features of a patch and of a token."""

    layers: Count
    """Transformer layers of either side."""

    heads: Count
    """Heads of the attention."""

    fit: FitConfig
    """Its training."""


class EmbeddedConfig(Section):
    """Small models of the same kinds as Stable Diffusion and CLIP, and how they are trained."""

    bridges: BridgesConfig
    """The images."""

    autoencoder: AutoencoderConfig
    """Images to latents and back."""

    text: TextConfig
    """Prompts to embeddings."""

    denoiser: DenoiserConfig
    """The flow on latents."""

    alignment: AlignmentConfig
    """Scores of images with prompts."""

    @model_validator(mode="after")
    def _fits(self) -> EmbeddedConfig:
        halvings = len(self.autoencoder.channels) + len(self.denoiser.channels) - 2
        if self.bridges.size % 2**halvings:
            raise ValueError(
                f"bridges.size: {self.bridges.size} pixels cannot be halved {halvings} times, as the levels "
                "of autoencoder and denoiser ask for"
            )
        if self.bridges.size % self.alignment.patch:
            raise ValueError(
                f"alignment.patch: {self.bridges.size} pixels are not a multiple of {self.alignment.patch}"
            )
        return self

    @property
    def latent_size(self) -> int:
        """Side of a latent."""
        return self.bridges.size // 2 ** (len(self.autoencoder.channels) - 1)


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class HubConfig(Section):
    """Where the files of a model are fetched from, if they are not there."""

    repository: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    """Repository of the model hub, owner and name."""

    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    """Its commit: names of branches move."""

    files: Annotated[list[str], Field(min_length=1), NoRepeats]
    """Patterns of the files that are wanted, such as ``unet/*.safetensors``."""


class SourceConfig(Section):
    """A model on disk, and where it comes from."""

    path: str
    """Its folder, or its file of weights, relative to the workflow's folder."""

    sha256: dict[str, Sha256] = Field(default_factory=dict)
    """SHA-256 of its files, by their paths in the folder (of a single file, by its name); those that are not
    named are not checked."""

    hub: HubConfig | None = None
    """Where it is fetched from; without it, it must be there."""


class ImageModelConfig(Section):
    """A text-to-image model and the model that scores its images; a file of ``config/models``."""

    name: Name
    """Name of the model: that of its file."""

    pipeline: SourceConfig
    """Folder of diffusers' StableDiffusionPipeline."""

    alignment: SourceConfig
    """The CLIP that scores images: a folder of open_clip; with ``architecture``, a file of weights."""

    architecture: str | None = None
    """Name of one of open_clip's own architectures, such as ``ViT-B-32``, that the weights are of."""

    embedded: EmbeddedConfig | None = None
    """How both are trained by the pipeline, if they are small models on drawn images."""


class GuidanceConfig(Section):
    """Classifier-free guidance (Ho and Salimans 2022) by use; 1 is without, at half the cost.

    The prediction is ``e0 + scale (e - e0)`` of those with the prompt and with the empty one.
    """

    sampling: Annotated[float, Field(ge=1)] = 1.0
    """Scale in the sampling of trajectories, of offline batches and of the images of a run."""

    adjoint: Annotated[float, Field(ge=1)] = 1.0
    """Scale in the base model that the lean adjoint goes through."""

    control: Annotated[float, Field(ge=1)] = 1.0
    """Scale in the two velocities whose difference is the control, and in the scores of functionals."""

    dropout: Share = 0.0
    """Probability that a trajectory of a fine-tuning by Adjoint Matching has the empty prompt instead of its
    own, from its sampling to its loss; its reward is still that of its own."""


class ScheduleConfig(Section):
    """What is changed in the pipeline's noise schedule."""

    spacing: Literal["leading", "trailing"] = "trailing"
    """Timesteps of samplers and solvers: ``trailing`` begins at the noisiest."""

    betas: tuple[Positive, Positive] | None = None
    """First and last noise variance, instead of the pipeline's own."""

    end: Annotated[float, Field(ge=0, le=1)] | None = None
    """Signal level (cumulative alpha) that the last step leads to: how far it is moved from that of the
    cleanest timestep, 0, to that of data without noise, 1; by default the pipeline's own, one of the two."""

    zero_terminal_snr: bool = False
    """Whether the schedule is rescaled to end in pure noise (Lin et al. 2024, algorithm 1), which needs a
    model that predicts v or data."""


class AdapterConfig(Section):
    """Low-rank adapters of the denoiser's attention (LoRA, by peft), fine-tuned instead of its weights."""

    rank: Count
    """Rank of an adapter."""

    alpha: Positive
    """Scale of an adapter, over its rank."""

    targets: Annotated[tuple[str, ...], NoRepeats] = ("to_q", "to_k", "to_v", "to_out.0")
    """Endings of the names of the layers that get one."""


class ComputeConfig(Section):
    """How a network as large as Stable Diffusion's fits on a GPU."""

    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of matrix products, by autocast; weights and sums stay in 32 bits."""

    chunk: Count | None = None
    """Most latents that go through the denoiser, or the decoder, together where no gradient is kept."""

    gradient_checkpointing: bool = False
    """Whether activations are computed again in backward passes instead of kept."""


class ImageRewardConfig(Section):
    """The reward of an image for its prompt."""

    kind: Literal["clip", "image_reward"] = "clip"
    """``clip`` is the cosine similarity by the scoring model; ``image_reward`` takes the package
    image-reward."""

    weights: SourceConfig | None = None
    """Weights of ``image_reward`` as safetensors."""

    @model_validator(mode="after")
    def _has_weights(self) -> ImageRewardConfig:
        if (self.kind == "image_reward") != (self.weights is not None):
            raise ValueError("weights belong to image_reward, which must have them; clip has the model's own")
        return self


class LeftTailObjective(Section):
    """The mean of the worst share of the reward, under a KL weight; am raises the mean under the same."""

    utility: Literal["left_tail"]
    """Says that the objective is the left tail."""

    mass: Annotated[float, Field(gt=0, lt=1)]
    """Share b of the worst images, which the table is led by; methods may have shares of their own."""

    alpha: Positive
    """KL weight, in units of the reward a nat."""


class EntropyObjective(Section):
    """The entropy of the images' latents, under a KL weight."""

    utility: Literal["entropy"]
    """Says that the objective is the entropy."""

    alpha: Positive
    """KL weight of fdc, in nats of entropy a nat; methods may have weights of their own."""

    noise: Annotated[float, Field(gt=0, lt=1)]
    """Variance of the noise in the distribution whose entropy it is, where latents have about one: what
    differs by less counts for little. The solver's nearest time is taken."""

    pairs: Count = 4
    """Pairs of noise that a gradient is the mean of."""

    reward_alpha: Positive
    """KL weight of am, which raises the expected reward, in units of the reward a nat."""


class ImageMethodConfig(SearchedMethodConfig):
    """One method of an experiment on images."""

    kind: Literal["pretrained", "am", "fdc", "tfft", "best_of", "resampled", "steered"]
    """``pretrained`` is not fine-tuned; ``am`` is Adjoint Matching on the mean reward; ``fdc`` is Flow
    Density Control on the entropy, or by exponents on the left tail; ``tfft`` is Tail-aware Flow Fine-Tuning
    of the left tail. The others train nothing, and keep images of the pretrained model: ``best_of`` the best
    of every ``n``, ``resampled`` those of the offline batch, ``steered`` particles of sequential Monte
    Carlo."""

    mass: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the method's own tail, by default that of ``objective``; for ``tfft`` and for ``fdc`` on the
    left tail."""

    alpha: Positive | None = None
    """The method's own KL weight, by default that of ``objective``; for ``fdc``."""

    threshold: float | None = None
    """Where the hinge of ``tfft`` bends, in units of the reward, instead of at the solution of its dual on
    the offline batch."""

    step: Annotated[float, Field(gt=0, le=1)] | None = None
    """Size of a step, 1 being the largest in theory: for ``fdc``, which must have it where it goes by scores.
    Over the step's KL weight it is 1 + alpha on the entropy, by which the objective is smooth relative to the
    entropy, and alpha on the left tail."""

    @model_validator(mode="after")
    def _fields_of_kind(self) -> ImageMethodConfig:
        of_fdc = dict.fromkeys(("alpha", "iterations", "step", "by"), ("fdc",))
        self.check_keys({"mass": ("fdc", "tfft"), "threshold": ("tfft",), **of_fdc})
        return self


class FactorConfig(Section):
    """A factor that images differ in, and how the scoring model tells its classes apart."""

    classes: Annotated[list[str], Field(min_length=2), NoRepeats]
    """Names of its classes."""

    template: str = "{}"
    """Caption of a class, with its name for the braces."""


class ImageEvaluationConfig(Section):
    """How each run is measured."""

    renamed: ClassVar[Mapping[str, str]] = {"pictures": "images"}

    images: Annotated[int, Field(ge=2)]
    """Images of each prompt in a set, drawn by the memoryless process."""

    sets: Count = 1
    """Sets of images: what depends on how many there are, as scores of diversity do, is the mean over the
    sets, which has less noise than one set and is on the same scale."""

    designs: Annotated[list[str], NoRepeats] = Field(default_factory=list)
    """Classes that the scoring model tells images apart by, for how many of them are covered; in the drawn
    set, the designs."""

    template: str = "{}"
    """Caption of a class, with its name for the braces."""

    factors: list[FactorConfig] = Field(default_factory=list)
    """What else the scoring model tells images apart by, for how many combinations of the classes of all
    factors, with ``designs`` as the first, are covered."""

    @property
    def drawn(self) -> int:
        """Images of each prompt in all sets."""
        return self.sets * self.images

    @model_validator(mode="after")
    def _factors_beside_designs(self) -> ImageEvaluationConfig:
        if self.factors and not self.designs:
            raise ValueError("factors are told beside designs; add designs")
        return self
