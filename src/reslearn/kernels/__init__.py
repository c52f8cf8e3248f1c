"""C++ kernels, their compiler, and the transformation that puts them into a finished network."""
