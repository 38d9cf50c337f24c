"""Which bundles a step issues, on small kernels that are known bundle by bundle."""

import pytest

from tests.pallas_kernels.tpu_static import cases
from tests.pallas_kernels.tpu_static.cases import (
    ADD,
    MULTIPLY,
    POP,
    SCALAR,
    SLOTS,
    STORE,
    jump,
    program,
    starting,
)
from vidgen.pallas_kernels.tpu_static.dumps import DumpError, read_listing
from vidgen.pallas_kernels.tpu_static.interior import Choice, interior_step


def step(bundles, **choice):
    return interior_step(read_listing(*cases.texts(bundles)), 4, Choice(**choice))


# Of cases.KERNEL, what is issued whichever block it is: all of the loop but what its jumps lead over.
BEFORE, BETWEEN, AFTER = (3, 10), (22, 28), ((104, 110), (110, 112), (112, 118), (122, 128))


def test_a_step_takes_one_body_and_neither_zeros_nor_results():
    for choice in ({"take": (0,)}, {"take": "fewest"}):
        found = step(cases.KERNEL, **choice)
        assert found.spans == (BEFORE, BETWEEN, (28, 48), (48, 54), *AFTER)
        assert found.bundles == 7 + 6 + 20 + 6 + 6 + 2 + 6 + 6
        assert [(a.start, a.stop, a.work, a.taken) for a in found.alternatives] == [
            (28, 48, 10, True),
            (54, 104, 10, False),
        ]


def test_another_body_can_be_chosen_or_both_or_none():
    assert step(cases.KERNEL, take=(1,)).spans == (BEFORE, BETWEEN, (48, 54), (54, 104), *AFTER)
    assert step(cases.KERNEL, take=(0, 1)).bundles == 59 + 50
    assert step(cases.KERNEL, take=()).bundles == 59 - 20


def test_an_alternative_that_is_not_there_is_an_error():
    with pytest.raises(DumpError, match=r"take=\(2,\): the kernel has 2 alternatives"):
        step(cases.KERNEL, take=(2,))


def test_slots_of_a_step_are_those_of_its_bundles():
    listing = read_listing(*cases.texts(cases.KERNEL))
    use = interior_step(listing, 4, Choice(take=(1,))).use(listing)
    assert (use["MXU"], use["VPOP"], use["VALU"], use["VSTORE"]) == (10, 10, 30, 0)


def looped(*body):
    """A loop over a grid whose step is the body, after its first bundle and before the jump back."""
    return program(starting(7, SCALAR), *body, jump(7, "!%p9"), SLOTS)


def test_what_has_most_work_is_taken_though_it_has_no_predicate():
    """A first step's product, e.g. that a reference is taken from, is not of an interior step."""
    bundles = looped(jump(1), SLOTS, [MULTIPLY] * 9, starting(1, MULTIPLY), [MULTIPLY] * 19)
    found = step(bundles)
    assert found.bundles == len(bundles) - 9
    assert [a.taken for a in found.alternatives] == [False]


def test_the_ends_of_a_row_are_done_too_where_they_are_asked_for():
    """A product that a row begins with, and how its result leaves; not the zeros of a row without work."""
    bundles = looped(
        *(jump(1), SLOTS, [MULTIPLY] * 5, starting(1, SCALAR)),
        [MULTIPLY] * 20,
        *(jump(2), SLOTS, [ADD] * 12, starting(2, SCALAR)),
        *(jump(3), SLOTS, [STORE] * 11, starting(3, SCALAR)),
    )
    assert step(bundles).bundles == len(bundles) - 5 - 12 - 11
    assert step(bundles, ends=True).bundles == len(bundles) - 11


def test_the_ends_of_a_row_are_found_where_the_whole_step_is_under_a_predicate():
    end = program(jump(2), SLOTS, [ADD] * 12, starting(2, SCALAR))
    bundles = looped(jump(1), SLOTS, [MULTIPLY] * 20, end, starting(1, SCALAR))
    assert step(bundles).bundles == len(bundles) - 12
    assert step(bundles, ends=True).bundles == len(bundles)


def test_what_lies_in_an_alternative_is_no_end_of_a_row():
    """What is done if the sums have grown, e.g."""
    rare = program(jump(2), SLOTS, [ADD] * 12, starting(2, SCALAR))
    first = program(jump(1), SLOTS, [MULTIPLY] * 20, rare, starting(1, SCALAR))
    other = program(jump(3), SLOTS, [MULTIPLY] * 20, [ADD] * 20, starting(3, SCALAR))
    bundles = looped(first, other)
    assert step(bundles, take="fewest", ends=True).spans == step(bundles, take="fewest").spans


def test_a_region_around_the_one_that_is_taken_is_taken():
    """A pipelined kernel's body lies under a predicate as a whole, and the first step's product within."""
    inner = program(jump(2), SLOTS, [MULTIPLY] * 9, starting(2, SCALAR))
    bundles = looped(jump(1), SLOTS, inner, [MULTIPLY] * 20, starting(1, SCALAR))
    found = step(bundles)
    assert [(a.work, a.taken) for a in found.alternatives] == [(20, True), (9, False)]
    assert found.bundles == len(bundles) - 9
    assert step(bundles, take=(1,)).bundles == len(bundles)


def test_the_second_of_two_branches_is_jumped_over():
    """`lax.cond`: a jump without a predicate leads over the second branch."""
    both = program(
        jump(1),
        SLOTS,
        [MULTIPLY] * 9,
        jump(2, None),
        SLOTS,
        starting(1, POP),
        [MULTIPLY] * 5,
        starting(2, ADD),
    )
    bundles = looped(both)
    assert step(bundles, take=(0,)).bundles == len(bundles) - 6
    assert step(bundles, take=(1,)).bundles == len(bundles) - 9 - 5


def test_an_inner_loop_is_repeated():
    inner = program(starting(2, MULTIPLY), [POP] * 3, jump(2), SLOTS)
    bundles = looped([ADD] * 20, inner)
    assert step(bundles).bundles == len(bundles)
    found = step(bundles, trips=(5,))
    assert found.bundles == len(bundles) + 4 * len(inner)
    assert found.spans.count((21, 21 + len(inner))) == 5


def test_a_kernel_without_a_loop_is_one_step():
    assert step([MULTIPLY, POP, ADD]).spans == ((0, 3),)


def test_a_kernel_without_products_goes_by_its_vectors():
    bundles = looped(jump(1), SLOTS, [ADD] * 30, starting(1, SCALAR))
    found = step(bundles)
    assert found.bundles == len(bundles)
    assert [(a.start, a.stop, a.taken) for a in found.alternatives] == [(6, 36, True)]


def test_a_jump_in_the_slots_of_another_opens_a_region_inside():
    """As for tpu7x, which has six slots."""
    bundles = program(
        starting(7, MULTIPLY),
        jump(1),
        SCALAR,
        jump(1),
        [SCALAR] * 6,
        [ADD] * 20,
        starting(1, SCALAR),
        jump(7),
        [SCALAR] * 6,
    )
    found = interior_step(read_listing(*cases.texts(bundles)), 6)
    assert found.spans == ((0, 8), (30, 38))
