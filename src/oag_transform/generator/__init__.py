"""How an image is made: Algorithm 1 of the paper, from pixels to pixels.

``settings`` has every hyper-parameter; ``reference`` is the algorithm as plain, differentiable PyTorch, ``loop`` the same made
fast, ``fused`` the same as Triton kernels; ``run`` takes pixels, chooses one of the two fast ones and gives pixels back.
"""
