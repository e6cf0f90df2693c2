"""The elementwise work of `L4QLinear`, in three interchangeable ways.

| name     | device | what it is                                                                     |
|----------|--------|--------------------------------------------------------------------------------|
| `eager`  | any    | torch operations, one pass over the weight each: the oracle                    |
| `numba`  | CPU    | one compiled pass per direction, on as many threads as torch uses              |
| `triton` | CUDA   | one kernel per direction                                                       |

All three merge B @ A with torch.addmm in float32 and give the same W_q bit for bit (IEEE division, no contraction to
fused multiply-add, round half to even); their gradients differ in the order of sums. Freezing always takes the eager
way. `select.kernels_for` chooses, and compares the choice with the oracle before it is used.
"""
