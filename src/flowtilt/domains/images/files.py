"""Names of the files of a run's images, for stages that write them and figures that read them."""

from __future__ import annotations


def image_name(prompt: int, number: int) -> str:
    """File of an image: that of its prompt's position, and its number among the prompt's."""
    return f"prompt{prompt:03d}_{number:04d}.png"
