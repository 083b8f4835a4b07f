"""The operations an uploaded loss may use: nothing that is not on these lists is ever looked up.

Names alone, so that the gateway can check them without torch. The worker finds each function by the path written here
(`torch.exp`), never by a name from the wire. How an operation's result can grow is written beside it: the worker bounds
every result before it is computed. Left out on purpose: whatever draws random numbers (redoing the log must give the
same bits), changes a tensor in place, leaves torch (item, tolist), or makes a result whose size only the data know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto


class Growth(Enum):
    """How many elements a result can have."""

    NONE = auto()
    """No more than the largest tensor given: reductions, views, softmax, sorting."""
    BROADCAST = auto()
    """The tensors given, broadcast together: arithmetic, comparisons."""
    PRODUCT = auto()
    """At most rows x columns: matrix products."""
    JOIN = auto()
    """The sum of the tensors given."""
    INDEX = auto()
    """Rows picked by an index tensor."""
    SIZED = auto()
    """Sizes given as numbers: zeros, expand."""
    NUMBER = auto()
    """Python numbers in, a Python number out."""


@dataclass(frozen=True)
class Operation:
    """One allowed operation.

    path: where the worker finds it; "Tensor.<name>" for a method, "getattr" for the few attributes below.
    most_positional: more positional arguments are refused (in torch a further one would mean "in place").
    """

    path: str
    growth: Growth
    most_positional: int = 8


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_POINTWISE = _words(
    "abs neg negative exp expm1 log log1p log2 log10 sqrt rsqrt square reciprocal sigmoid tanh sin cos erf atan sign "
    "floor ceil round trunc clamp clip clamp_min clamp_max add sub subtract mul multiply div divide true_divide "
    "pow remainder minimum maximum where eq ne lt le gt ge logical_and logical_or logical_not logical_xor isnan isinf "
    "isfinite nan_to_num logaddexp lerp masked_fill xlogy logit detach clone max min"
)
_POINTWISE_FUNCTIONS = _words("zeros_like ones_like full_like")
_POINTWISE_METHODS = _words(
    "float double long int bool to type_as contiguous expand_as view_as reshape_as masked_select"
)
_SHRINKING = _words(
    "sum mean var std prod amax amin argmax argmin median logsumexp softmax log_softmax cumsum cumprod logcumsumexp "
    "flip roll sort argsort topk any all count_nonzero nansum nanmean squeeze unsqueeze reshape flatten transpose "
    "permute t narrow select chunk split unbind tril triu dot numel"
)
_SHRINKING_METHODS = _words("view size dim nelement norm")
_PRODUCTS = _words("matmul mm mv outer")
_PICKING = _words("gather index_select take_along_dim")

_FUNCTIONAL_POINTWISE = _words(
    "softplus logsigmoid gelu mse_loss l1_loss smooth_l1_loss huber_loss kl_div binary_cross_entropy_with_logits"
)
_OTHER_SPELLINGS = {
    # torch.fx records some functions of torch.nn.functional under the module that implements them.
    "torch._C._nn.softplus": "torch.nn.functional.softplus",
    "torch._C._nn.log_sigmoid": "torch.nn.functional.logsigmoid",
    "torch._C._nn.gelu": "torch.nn.functional.gelu",
    "torch._C._linalg.linalg_vector_norm": "torch.linalg.vector_norm",
    "torch.functional.split": "torch.split",
    "torch.concat": "torch.cat",
}

_ARITHMETIC = _words("add sub mul truediv floordiv mod pow neg pos abs lt le gt ge eq ne and_ or_ xor invert")
_MATH = _words("sqrt exp log log2 log10 log1p expm1 floor ceil fabs")


def _functions() -> dict[str, Operation]:
    listed: dict[str, Operation] = {}

    def allow(growth: Growth, *paths: str) -> None:
        listed.update({path: Operation(path, growth) for path in paths})

    allow(Growth.BROADCAST, *(f"torch.{name}" for name in (*_POINTWISE, *_POINTWISE_FUNCTIONS)))
    allow(Growth.NONE, *(f"torch.{name}" for name in _SHRINKING))
    allow(Growth.PRODUCT, *(f"torch.{name}" for name in _PRODUCTS))
    allow(Growth.INDEX, *(f"torch.{name}" for name in _PICKING))
    allow(Growth.JOIN, "torch.cat", "torch.stack")
    allow(Growth.SIZED, "torch.zeros", "torch.ones", "torch.full", "torch.arange")
    allow(Growth.BROADCAST, *(f"torch.nn.functional.{name}" for name in _FUNCTIONAL_POINTWISE))
    allow(Growth.NONE, "torch.nn.functional.softmax", "torch.nn.functional.log_softmax", "torch.linalg.vector_norm")
    for name in ("torch.relu", "torch.nn.functional.relu"):
        listed[name] = Operation(name, Growth.BROADCAST, most_positional=1)  # the second would be inplace
    allow(Growth.BROADCAST, *(f"operator.{name}" for name in _ARITHMETIC))
    allow(Growth.PRODUCT, "operator.matmul")
    allow(Growth.INDEX, "operator.getitem")
    allow(Growth.NUMBER, *(f"math.{name}" for name in _MATH))
    listed["getattr"] = Operation("getattr", Growth.NONE, most_positional=2)
    listed.update({other: listed[path] for other, path in _OTHER_SPELLINGS.items()})
    return listed


def _methods() -> dict[str, Operation]:
    listed: dict[str, Operation] = {}
    for growth, names in (
        (Growth.BROADCAST, (*_POINTWISE, *_POINTWISE_METHODS, "relu")),
        (Growth.NONE, (*_SHRINKING, *_SHRINKING_METHODS)),
        (Growth.PRODUCT, _PRODUCTS),
        (Growth.INDEX, _PICKING),
        (Growth.SIZED, ("expand", "repeat")),
    ):
        listed.update({name: Operation(f"Tensor.{name}", growth) for name in names})
    return listed


FUNCTIONS: Mapping[str, Operation] = _functions()
"""By the name the SDK sends for a call_function node."""
METHODS: Mapping[str, Operation] = _methods()
"""By the name of a call_method node."""
ATTRIBUTES = ("shape", "ndim", "dtype", "device", "T", "values", "indices")
"""What getattr may read; the last two are of the pairs that max, min, sort, topk and median return."""
KEYWORDS = frozenset(
    _words(
        "dim dim0 dim1 dims keepdim dtype device min max input other tensors mask value alpha beta threshold reduction "
        "correction unbiased descending largest sorted stable exponent rounding_mode nan posinf neginf condition self "
        "end start step size fill_value delta target log_target index indices diagonal shifts length k weight ord p "
        "pos_weight approximate"
    )
)
DEFAULTS = frozenset(_words("inplace _stacklevel size_average reduce"))
"""Keywords that torch.fx records at their defaults and that say nothing; at another value they are refused."""
TEXTS = frozenset({"none", "mean", "sum", "batchmean", "trunc", "floor", "tanh"})
"""Strings an argument may be: of `reduction`, `rounding_mode`, `approximate`."""
DTYPES = frozenset({"float32", "float64", "bfloat16", "float16", "int64", "int32", "bool"})
