"""Cycles of kernels on TPUs that are not there: libtpu compiles for them, and what it writes is read."""
