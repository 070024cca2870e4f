"""Token-wise matrix entropy through the dual Gram matrix (EntropyPrune, arXiv 2602.17196)."""

from torch import Tensor

from tokenprune_kernels.backend import backend_for
from tokenprune_kernels.dual_gram_entropy.arguments import Normalization, Order, check_arguments
from tokenprune_kernels.dual_gram_entropy.plain import dual_gram_entropy_plain

__all__ = ["Normalization", "Order", "dual_gram_entropy"]


def dual_gram_entropy(
    x: Tensor, *, normalization: Normalization = "none", column_groups: bool = False, order: Order = 1
) -> Tensor:
    """Matrix entropy of each token, from the ``h x h`` Gram matrix of its heads.

    ``H = -sum_i lambda_i log(lambda_i) / log(h)``, where ``lambda`` are the eigenvalues, clamped below at 1e-10,
    of ``A = X X^T / h`` and ``X`` is the token's ``h x d`` matrix centred over its heads. EntropyPrune
    (arXiv 2602.17196) keeps the tokens with the largest ``H``.

    Shapes are checked; values never are. Nothing here branches on tensor contents. On CUDA one Triton kernel does all
    of it; elsewhere, and for float64, plain PyTorch (``TOKENPRUNE_KERNELS=plain | triton`` forces one).

    Args:
        x: (..., h, d). One matrix per token: heads as rows, head channels as columns. Any real floating dtype.
        normalization: {"none", "trace"} (default "none"). ``"none"`` is the released code: ``H`` depends on the
            token's scale and is negative for large ones. ``"trace"`` divides ``A`` by its trace first (the von Neumann
            entropy, in [0, 1]); a token whose heads are all equal has no trace and gets ``H = 0``.
        column_groups: bool (default False). Average groups of ``d / 128`` neighbouring columns first, as the released
            code does. ``d`` must then be a multiple of 128.
        order: {1, 2} (default 1). Of the Rényi entropy (Giraldo et al., arXiv 1211.2459). 1 is ``H`` above; 2 is
            ``-log(sum_i lambda_i^2) / log(h)``, which needs no eigenvalues.

    Returns:
        Tensor, shape (...,), float32, on the device of ``x``, without a gradient. Within ``1e-3 * max(sum_i |lambda_i
        log(lambda_i)| / log(h), 0.01)`` of the float64 reference (order 2: within ``1e-5 * (1 + |H|)``). NaN for a
        token that holds a NaN or an infinity; its neighbours are unaffected. ``torch.topk`` ranks NaN first.

    Raises:
        TypeError: ``x`` is not a tensor of real floating numbers.
        ValueError: ``x`` has fewer than two dimensions, ``h < 2`` (log 1 = 0), ``d < 1``, ``column_groups`` with a
            ``d`` that is not a multiple of 128, an unknown ``normalization`` or ``order``, or a ``TOKENPRUNE_KERNELS``
            that names no backend.
        RuntimeError: ``TOKENPRUNE_KERNELS=triton`` without Triton.

    Example:
        >>> import torch
        >>> from tokenprune_kernels.dual_gram_entropy import dual_gram_entropy
        >>> queries = torch.eye(4).expand(576, 4, 4)
        >>> dual_gram_entropy(queries, normalization="trace").shape
        torch.Size([576])
    """
    check_arguments(x, normalization=normalization, column_groups=column_groups, order=order)
    if backend_for(x) == "triton":
        # Triton is imported only where it is used.
        from tokenprune_kernels.dual_gram_entropy.fused import dual_gram_entropy_fused

        return dual_gram_entropy_fused(
            x, normalization=normalization, column_groups=column_groups, order=order
        )
    return dual_gram_entropy_plain(x, normalization=normalization, column_groups=column_groups, order=order)
