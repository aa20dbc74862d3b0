"""Fixtures that several stages share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from guardreasoner_vl.images import sizes
from guardreasoner_vl.images.decode import decoded_images

if TYPE_CHECKING:
    from PIL import Image

    from guardreasoner_vl.types import ImageSource


@pytest.fixture
def measured_images(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The images that are decoded to learn their size, in order, as they come."""
    measured: list[str] = []

    def noted(image: ImageSource) -> tuple[Image.Image, ...]:
        measured.append(str(image))
        return decoded_images(image)

    monkeypatch.setattr(sizes, "decoded_images", noted)
    return measured
