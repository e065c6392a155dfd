"""lora_grouped: the fused product of groups against its plain twin, dense arithmetic, and gradcheck."""

import pytest
import torch
from counting import kept_for_backward

from lora.functional.grouped import lora_grouped, plain_lora_grouped

ENDS = torch.tensor([3, 3, 4, 9], dtype=torch.int32)
FORMS = (lora_grouped, plain_lora_grouped)
each_form = pytest.mark.parametrize("form", FORMS, ids=["fused", "plain"])


def product(x, weight, ends):
    """One matrix at a time; the rows that no group has are left at zero."""
    starts = [0, *ends.tolist()]
    pieces = [x[start:end] @ matrix for start, end, matrix in zip(starts, starts[1:], weight, strict=False)]
    return torch.cat([*pieces, x.new_zeros(len(x) - starts[-1], weight.shape[2])])


def tensors(r=3, rows=9, size=5, out=4, dtype=torch.float64, **options):
    made = [torch.randn(shape, dtype=dtype) for shape in ((rows, size), (4, size, out), (4, size, r), (4, r, out))]
    return [tensor.requires_grad_(i != 1) for i, tensor in enumerate(made)]


def dense(x, weight, left, right, scaling=0.5):
    return product(x, weight + scaling * left @ right, ENDS)


@each_form
@pytest.mark.parametrize("r", [1, 2, 3, 4, 5])
def test_it_is_the_product_with_w(form, r):
    given = tensors(r)
    y, right = form(*given, 0.5, ENDS, product), dense(*given)
    torch.testing.assert_close(y, right)
    wanted = [given[0], *given[2:]]
    upstream = torch.randn_like(y)
    for got, expected in zip(
        torch.autograd.grad(y, wanted, upstream), torch.autograd.grad(right, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("trains", [(0,), (2,), (3,), (0, 3), (2, 3), (0, 2, 3)], ids=str)
def test_whatever_trains(trains):
    given = [tensor.detach().requires_grad_(i in trains) for i, tensor in enumerate(tensors())]
    wanted = [given[i] for i in trains]
    found = [torch.autograd.grad(form(*given, 0.5, ENDS, product).square().sum(), wanted) for form in FORMS]
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


@each_form
def test_once_and_twice(form):
    x, weight, left, right = tensors()
    function = lambda x, left, right: form(x, weight, left, right, 0.5, ENDS, product)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, left, right))
    assert torch.autograd.gradgradcheck(function, (x, left, right))


def test_twice_needs_the_input():
    x, weight, left, right = tensors()
    y = lora_grouped(x, weight, left.detach(), right, 0.5, ENDS, product)
    with pytest.raises(RuntimeError, match="needs the layer's input, which is not kept while"):
        torch.autograd.grad(y.sum(), right, create_graph=True)


def test_it_keeps_x_and_h():
    x, weight, left, right = tensors(rows=200, size=64, out=96, r=2)
    ends = torch.tensor([50, 100, 150, 200], dtype=torch.int32)
    kept = kept_for_backward(lambda: lora_grouped(x, weight, left, right, 0.5, ends, product), x, weight, left, right)
    assert kept == 8 * 200 * 2


def test_rows_in_no_group_are_the_products_affair():
    given = tensors(rows=12)
    for form in FORMS:
        y = form(*given, 0.5, ENDS, product)
        torch.testing.assert_close(y[:9], dense(*given)[:9])
        assert not y[9:].any()
        assert torch.isfinite(torch.autograd.grad(y.sum(), given[0])[0]).all()


def test_no_rows_at_all():
    given, none = tensors(rows=0), torch.zeros(4, dtype=torch.int32)
    y = lora_grouped(*given, 0.5, none, product)
    assert y.shape == (0, 4)
    assert not torch.autograd.grad(y.sum(), given[2])[0].any()


def test_in_float16_nothing_overflows_between():
    """s · x L is beyond float16 where s · x L R is not: R has the scaling."""
    x, weight = torch.full((9, 4), 16.0).half(), torch.zeros(4, 4, 4).half()
    left, right = torch.full((4, 4, 2), 32.0).half(), torch.full((4, 2, 4), 1e-4).half()
    for tensor in (left, right):
        tensor.requires_grad_()
    for form in FORMS:
        y = form(x, weight, left, right, 64.0, ENDS, product)
        expected = 64.0 * (x.double() @ left[0].double() @ right[0].double())
        torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=0)
        assert torch.isfinite(torch.autograd.grad((y * 1e-3).sum(), left)[0]).all()


def test_dropout_is_drawn_again_for_its_gradients():
    given = tensors()
    x, weight, left, right = given

    def computed(left, right, x=x):
        torch.manual_seed(7)
        return lora_grouped(x, weight, left, right, 0.5, ENDS, product, dropout=0.5)

    assert torch.autograd.gradcheck(computed, (left, right))
    assert torch.autograd.gradcheck(lambda x: computed(left, right, x), (x,))
    torch.testing.assert_close(computed(left, torch.zeros_like(right)), product(x, weight, ENDS))
    assert not torch.equal(computed(left, right), dense(*given))
