from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from petalfl.model import ModelManifest
from server.config import SCHEMES, ConfigError, private_blocks
from tests.server.builders import LAYOUT, make_block, make_manifest, with_personal_head

TINY = make_manifest(*[make_block(name, *layout)[0] for name, layout in LAYOUT.items()])
LATE_FUSION = replace(TINY, blocks=tuple(b for b in TINY.blocks if b.kind != "fusion"))

PRIVATE = {
    "fm": set[str](),
    "ph": {"head"},
    "phf": {"fusion", "head"},
    "local": {"encoder-acc", "encoder-gyro", "fusion", "head"},
}


@pytest.mark.parametrize("scheme", PRIVATE)
def test_a_scheme_keeps_blocks_by_their_kind(scheme: str) -> None:
    assert set(private_blocks(scheme, TINY)) == PRIVATE[scheme]
    assert len(private_blocks(scheme, TINY)) == len(PRIVATE[scheme])


def test_a_model_without_fusion_has_none_to_keep() -> None:
    assert private_blocks("phf", LATE_FUSION) == ("head",)


@pytest.mark.parametrize("default", [(), ("head",), ("encoder-gyro", "head")])
def test_without_a_scheme_the_manifest_decides(default: tuple[str, ...]) -> None:
    manifest: ModelManifest = replace(TINY, private_blocks=default)
    assert private_blocks("", manifest) == default
    assert private_blocks("ph", manifest) == ("head",)


@pytest.mark.parametrize("scheme", ["", *SCHEMES])
def test_a_personal_head_stays_whatever_is_shared(scheme: str) -> None:
    manifest = replace(with_personal_head(TINY), private_blocks=())
    kept = PRIVATE.get(scheme, set[str]())
    assert set(private_blocks(scheme, manifest)) == {*kept, "head-personal"}


@pytest.mark.parametrize("scheme", ["full", "FM", "ph ", "fm,ph"])
def test_an_unknown_scheme_is_refused(scheme: str) -> None:
    with pytest.raises(ConfigError) as caught:
        private_blocks(scheme, TINY)
    expected = "expected one of fm, ph, phf, local, personal"
    assert str(caught.value) == f"unknown scheme {scheme!r}, {expected}"


def test_scheme_personal_needs_a_personal_head() -> None:
    with pytest.raises(ConfigError, match="the model has no personal head; export it with"):
        private_blocks("personal", TINY)


def test_the_tiny_model_is_a_valid_one(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(TINY.to_json())
    assert ModelManifest.load(tmp_path) == TINY
