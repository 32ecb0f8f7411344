"""Triton kernels. Each file is one op: the kernel, and a function that launches it over torch tensors.

They run unchanged under Triton's interpreter on CPU tensors, which is how they are tested without a card.
"""
