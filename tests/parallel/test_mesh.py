import jax
import pytest

from vidgen.parallel.mesh import AXES, MeshOptions, frame_mesh


def test_the_free_axis_takes_the_devices_that_are_left():
    mesh = MeshOptions(fsdp=2, tensor=2).build()
    assert mesh.axis_names == AXES == ("data", "fsdp", "context", "tensor")
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}
    assert dict(MeshOptions(data=1, context=-1).build(jax.devices()[:4]).shape)["context"] == 4
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"fsdp": 3},
            r"fsdp=3, context=1, tensor=1\) needs a multiple of 3 devices, found 8: change the sizes",
        ),
        ({"data": 2}, "needs 2 devices, found 8"),
        ({"fsdp": -1}, "at most one may be -1"),
        ({"tensor": 0}, "must be positive"),
    ],
)
def test_sizes_that_do_not_fit_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        MeshOptions(**options).build()


@pytest.mark.parametrize(
    ("devices", "size", "expected"),
    [
        (8, (136, 240), {"tensor": 2, "context": 4}),  # Parts of 68 x 60.
        (8, (135, 240), {"tensor": 1, "context": 8}),
        (8, (240, 135), {"tensor": 8, "context": 1}),
        (8, (6, 5), {"data": 4, "tensor": 2, "context": 1}),
        (1, (7, 7), {"tensor": 1, "context": 1}),
    ],
)
def test_frames_are_shared_by_as_many_devices_as_divide_them(devices, size, expected):
    found = frame_mesh(devices, *size)
    assert {name: getattr(found, name) for name in expected} == expected
    assert found.data * found.tensor * found.context == devices
