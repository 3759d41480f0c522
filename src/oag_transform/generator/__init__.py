"""Algorithm 1 of the paper, from pixels to purified pixels.

``settings`` declares every hyper-parameter. ``reference`` is the algorithm in plain, differentiable PyTorch, ``loop`` is its
fast version, and ``fused`` is the same in Triton kernels. ``run`` takes pixels, selects a fast loop and returns pixels.
"""
