"""Folders of diffusers' StableDiffusionPipeline as flows."""

from __future__ import annotations

from diffusers import DDIMScheduler

from flowtilt.domains.images.schedule import DiscreteSchedule


def schedule_of(scheduler: DDIMScheduler) -> DiscreteSchedule:
    """The path of a DDIM scheduler."""
    levels = scheduler.alphas_cumprod.double()
    return DiscreteSchedule(tuple(levels.tolist()), float(scheduler.final_alpha_cumprod))
