"""Triton's interpreter, made to multiply bfloat16: it keeps such numbers as bit patterns and multiplies those."""

import numpy as np


def mend_dot():
    """Widens bfloat16 operands of tl.dot to float32, which is what the tensor cores sum in. Idempotent."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original = InterpreterBuilder.create_dot
    if getattr(original, "is_mended", False):
        return

    def widen(operand):
        if operand.dtype != tl.bfloat16:
            return operand
        bits = operand.data.view(np.uint16).astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, d, *args, **kwargs):
        return original(self, widen(a), widen(b), d, *args, **kwargs)

    create_dot.is_mended = True
    InterpreterBuilder.create_dot = create_dot
