"""The arrays of a traced function."""

from jax.extend import core


def array_shapes(jaxpr):
    """Shapes of all arrays that its equations make, those of loops and calls too."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        yield from (tuple(x.aval.shape) for x in equation.outvars if hasattr(x.aval, "shape"))
        for value in equation.params.values():
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, core.ClosedJaxpr | core.Jaxpr):
                    yield from array_shapes(item)
