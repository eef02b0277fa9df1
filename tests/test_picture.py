"""The picture: what is filled in is what the devices hold."""

import re
from pathlib import Path

import jax
import pytest

from jaxlm import check
from jaxlm.cli import build_config
from jaxlm.mesh import make_mesh
from jaxlm.models.decoder import Decoder
from jaxlm.picture import FILL, picture, stack_pictures
from jaxlm.sharding import split_boxes


def drawn(mesh: str, **model) -> str:
    config = build_config({"model": {"vocab_size": 64, **model}})
    boxed = jax.eval_shape(Decoder(config.model).init, jax.random.key(0))
    return picture(*split_boxes(boxed), (8, 256), make_mesh(mesh))


def filled(svg: str) -> float:
    """The area that is filled in, in pixels."""
    sizes = re.findall(rf'width="([\d.]+)" height="([\d.]+)" fill="{FILL}"', svg)
    return sum(float(width) * float(height) for width, height in sizes)


@pytest.mark.parametrize("mesh", ["fsdp8", "dp2,fsdp2,tp2", "pp2,cp2,tp2"])
def test_every_axis_that_splits_takes_its_share_of_the_area(mesh):
    whole = filled(drawn("dp1"))
    assert filled(drawn(mesh)) < 8 * whole
    # Rows alone are split by dp: parameters stay whole.
    assert filled(drawn(mesh)) < filled(drawn("dp8"))


def test_the_pipeline_splits_layers_and_experts_are_on_their_devices():
    svg = drawn("pp2,ep2", experts={"num_experts": 4})
    assert "4 layers × 4 experts × 768 mlp" in svg or "4 layers × 4 experts × 192 embed" in svg
    assert "pp1 ep0" in svg


def test_pictures_below_one_another():
    one, two = drawn("dp2"), drawn("tp2")
    both = stack_pictures([one, two])
    assert both.count("<svg ") == 3
    assert filled(both) == pytest.approx(filled(one) + filled(two))


def test_the_command_draws(tmp_path, capsys):
    target = tmp_path / "layout.svg"
    assert check.main([f"--draw={target}", "--meshes=dp2,tp2;fsdp4"]) == 0
    assert target.read_text().count("--mesh=") == 2
    assert str(target) in capsys.readouterr().err


def test_the_readmes_picture_is_the_programs(tmp_path):
    target = tmp_path / "parallelism.svg"
    meshes = "--meshes=dp2,fsdp2,tp2;pp2,ep2,tp2"
    assert check.main([f"--draw={target}", meshes, "--model.experts.num_experts=8"]) == 0
    docs = Path(__file__).parents[1] / "docs"
    assert target.read_text() == (docs / target.name).read_text()
