"""Static cycle counts of TPU kernels without a TPU: libtpu compiles them, and its dumps are analysed."""
