"""Image files that travel with the exchange."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from guardreasoner_vl.errors import ImageError
from guardreasoner_vl.images.exchange import checked_exchange
from guardreasoner_vl.images.portable import portable_exchange
from guardreasoner_vl.types import Exchange, Turn
from tests.made_images import image

if TYPE_CHECKING:
    from pathlib import Path


def test_files_become_their_bytes_in_every_turn(tmp_path: Path) -> None:
    path = tmp_path / "cake.png"
    path.write_bytes(image(60, 40).png)
    shown = image(28, 28)
    exchange = Exchange("And this?", (path, str(path), shown), history=(Turn("This?", (path,)),))
    sent = portable_exchange(exchange)
    path.unlink()
    assert sent.images == (image(60, 40).png, image(60, 40).png, shown)
    assert sent.history[0].images == (image(60, 40).png,)
    assert (sent.prompt, sent.history[0].prompt) == ("And this?", "This?")
    assert len(checked_exchange(sent)[1]) == 4


@pytest.mark.parametrize("source", ["/nowhere/cake.png", "https://example.org/cake.png", "data:image/png;base64,?"])
def test_what_cannot_be_read_is_reported_where_it_is_judged(source: str) -> None:
    sent = portable_exchange(Exchange("This?", (source,)))
    assert sent.images == (source,)
    with pytest.raises(ImageError) as before:
        checked_exchange(Exchange("This?", (source,)))
    with pytest.raises(ImageError) as after:
        checked_exchange(sent)
    assert str(before.value) == str(after.value)
